"""Runs all experiments of the PES paper, one after the other, and says which of its findings were seen.

    python experiments/paper/run_all.py
    python experiments/paper/run_all.py --scale=full --workdir=runs/paper-full

Each script runs in a process of its own; one that fails does not stop the others. At the end stand the verdicts and
the path of the page with all figures, <workdir>/index.html. Exits with 1 where a script failed.

Time on 2 CPU cores: 20 to 40 minutes; with --scale=full, days.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from absl import flags

from lopt import command_line

SCRIPTS = (
  "influence_balancing",
  "toy_regression",
  "lstm_variance",
  "mnist_schedule",
  "hyperparameters",
  "swimmer",
  "yacht",
  "learned_optimizer",
)
"""In the order of the experiments' numbers."""


class Outcome(NamedTuple):
  """What became of a script."""

  name: str
  status: str  # 'yes', 'NO' or 'FAILED'
  verdict: str
  seconds: float


def run_script(path: Path, scale: str, workdir: Path, seed: int) -> Outcome:
  """Runs one script, its output on ours; what it found is what it wrote into <workdir>/<name>/result.json."""
  record = workdir / path.stem / "result.json"
  before = record.stat().st_mtime_ns if record.exists() else None
  begun = time.perf_counter()
  arguments = [f"--scale={scale}", f"--workdir={workdir}", f"--seed={seed}"]
  code = subprocess.run([sys.executable, str(path), *arguments]).returncode
  seconds = time.perf_counter() - begun
  # A crash has the exit status of a finding that was not seen, but leaves no new record.
  if code not in (0, 1) or not record.exists() or record.stat().st_mtime_ns == before:
    return Outcome(path.stem, "FAILED", f"exit status {code}", seconds)
  result = json.loads(record.read_text("utf-8"))
  return Outcome(path.stem, "yes" if result["holds"] else "NO", result["verdict"], seconds)


def summary(outcomes: list[Outcome]) -> str:
  """A line for each script."""
  width = max(len(x.name) for x in outcomes)
  head = f"{'experiment':{width}}  as in the paper"
  lines = [f"{x.name:{width}}  {x.status:6}  {x.seconds:5.0f} s  {x.verdict}" for x in outcomes]
  return "\n".join([head, *lines])


def run_all(folder: Path, scale: str, workdir: Path, seed: int = 0) -> int:
  """Runs every script of `folder`, prints the summary, and returns the exit status: 1 where one did not end.

  What was measured is a result, also where the paper says otherwise.
  """
  outcomes = []
  for i, name in enumerate(SCRIPTS, start=1):
    print(f"\n[{i}/{len(SCRIPTS)}] {name}", flush=True)
    outcomes.append(run_script(folder / f"{name}.py", scale, workdir, seed))
  print(f"\n{summary(outcomes)}\n\nPage: {workdir / 'index.html'}")
  return 1 if any(x.status == "FAILED" for x in outcomes) else 0


def main(argv: list[str]) -> None:
  sys.exit(run_all(Path(argv[0]).parent, flags.FLAGS.scale, Path(flags.FLAGS.workdir), flags.FLAGS.seed))


if __name__ == "__main__":
  flags.DEFINE_enum("scale", "quick", ["quick", "full"], "Minutes on a laptop, or the paper's sizes.")
  flags.DEFINE_integer("seed", 0, "Another number gives other runs.", lower_bound=0)
  flags.DEFINE_string("workdir", "runs/paper", "Where results and the page with all of them are kept.")
  command_line.run(main, again="the same command runs all again")
