"""What the benchmarks share: a fresh process for each case, alternation with a second command, tables.

A benchmark script has named cases and `measure(case) -> {figure: number}`. Run as it is, it starts itself once for
each case (`--case=NAME`), so that no case profits or suffers from another, and prints what the children print: one
JSON object a line, then a table. With `--against` a second command takes turns with each case,

    python experiments/benchmarks/throughput.py --rounds=5 --against='python other.py {case}'

where the last line of its output must be a JSON object too, and the table has the ratio of the two for each
figure that both have: the median over rounds, and the lowest and highest.
"""

import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from lopt import command_line, configuration
from lopt.runs import files

CASE = flags.DEFINE_string("case", None, "Measure this one case in this process, and print one JSON object.")
ONLY = flags.DEFINE_string("only", "", "Regular expression: the cases to run.")
ROUNDS = flags.DEFINE_integer("rounds", 1, "How often each case is run.", 1)
AGAINST = flags.DEFINE_string("against", None, "A second command to alternate with; {case} becomes the case's name.")
OUTPUT = flags.DEFINE_string("output", "runs/benchmarks", "Folder for <script>.jsonl and <script>.md.")

Figures = dict[str, Any]


def main(cases: Sequence[str], measure: Callable[[str], Figures], columns: Sequence[str]) -> None:
  """The whole of a benchmark script.

  Args:
    cases: Their names.
    measure: Makes the figures of one.
    columns: Those that are shown in the table, by their names in the figures.
  """

  def run(argv: list[str]) -> None:
    if CASE.value is not None:
      if CASE.value not in cases:
        raise configuration.ConfigError(f"--case: no {CASE.value!r}; there are: {', '.join(cases)}")
      print(json.dumps({"case": CASE.value, **measure(CASE.value)}), flush=True)
      return
    script, folder = Path(argv[0]), Path(OUTPUT.value)
    chosen = [case for case in cases if re.search(ONLY.value, case)]
    if not chosen:
      raise configuration.ConfigError(f"--only: {ONLY.value!r} is in no case; there are: {', '.join(cases)}")
    rows, lines = [], []
    for case in chosen:
      ours, theirs = [], []
      for _ in range(ROUNDS.value):
        ours.append(_figures([sys.executable, str(script), f"--case={case}"]))
        if AGAINST.value:
          theirs.append(_figures(shlex.split(AGAINST.value.replace("{case}", case))))
      lines += [json.dumps(x) for x in (*ours, *({"against": AGAINST.value, **x} for x in theirs))]
      print("\n".join(lines[-len(ours) - len(theirs) :]), flush=True)
      files.write_atomically(folder / f"{script.stem}.jsonl", "\n".join(lines) + "\n")  # an interruption loses none
      rows.append([case, *(_cell([x.get(column) for x in ours]) for column in columns)])
      if AGAINST.value:
        rows[-1].append(_ratio(ours, theirs))
    header = ["case", *columns, *(["seconds of the other / ours"] if AGAINST.value else [])]
    text = "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))
    files.write_atomically(folder / f"{script.stem}.md", text + "\n")
    print(f"\n{text}\n\nFigures: {folder / script.stem}.jsonl; table: {folder / script.stem}.md")

  command_line.run(run)


def _figures(command: Sequence[str]) -> Figures:
  """The JSON object on the last line of what a command prints; {} where it failed."""
  root = str(Path(__file__).parents[2])
  environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
  result = subprocess.run(command, capture_output=True, text=True, env=environment)
  try:
    return json.loads(result.stdout.strip().splitlines()[-1])
  except (IndexError, ValueError):
    error = (result.stderr.strip().splitlines() or ["no output"])[-1]
    print(f"{shlex.join(command)}: failed with exit status {result.returncode}: {error}", file=sys.stderr)
    return {}


def _cell(values: Sequence[Any]) -> str:
  """The median, or the text."""
  numbers = [x for x in values if isinstance(x, (int, float))]
  if not numbers:
    return str(next((x for x in values if x is not None), "–"))
  return _number(statistics.median(numbers))


def _number(value: float) -> str:
  return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _ratio(ours: Sequence[Figures], theirs: Sequence[Figures]) -> str:
  """How many times faster we are, round by round: median (lowest to highest)."""
  ratios = [
    b["seconds"] / a["seconds"] for a, b in zip(ours, theirs, strict=True) if "seconds" in a and "seconds" in b
  ]
  if not ratios:
    return "–"
  return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
