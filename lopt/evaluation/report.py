"""Comparisons as files: Markdown, JSON and pictures; and in a sentence."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lopt.evaluation import comparison, pictures, tables
from lopt.evaluation.comparison import BEST, EACH, NONE, Comparison, summarize
from lopt.evaluation.tables import Measured
from lopt.runs import files


def table_of_all(comparisons: Mapping[str, Comparison], *, full: bool = False) -> str:
  """Summaries of all optimizers over all tasks in Markdown; then, of several comparisons, each one's speed-ups.

  Measures are defined in `comparison.Measures` and `comparison.Summary`.

  Args:
    comparisons: By the families' names.
    full: Whether all columns are there, also those for which a terminal has no room.
  """
  measured = comparison.measure(comparisons)
  first = next(iter(comparisons.values()))
  steps = sorted({c.num_steps for c in comparisons.values()})
  total = sum(len(c.tasks) for c in comparisons.values())
  table = tables.summary_table(comparisons, measured)
  lines = [
    f"{tables.how_many(total, 'held-out task')}, {tables.how_many(first.num_seeds, 'seed')}, "
    f"{', '.join(map(str, steps))} steps.",
    METHOD,
    "",
    *tables.markdown(table if full else tables.brief(table)),
  ]
  if len(comparisons) > 1:
    by_family = {title: {title: own} for title, own in measured.items()}
    lines += ["", *tables.markdown(tables.suite_table(by_family, roles=first.roles))]
  return "\n".join(lines)


METHOD = """Over a rival: how many times as many steps it needs to the same final training loss, tuned for the task,
with a schedule that ends there. Interquartile means over tasks, 95% intervals; "2 ≥" and "2 ≤": of 2 tasks the number
is a bound. Other columns are means."""


def verdict_of_all(comparisons: Mapping[str, Comparison], name: str) -> str:
  """One line that says how a learned optimizer compares with its rivals."""
  measured = comparison.measure(comparisons)
  row = (name, EACH) if (name, EACH) in next(iter(measured.values())) else (name, NONE)
  s = summarize([own[row] for own in measured.values()])
  rivals = [f"{tables.over(r)} takes {tables.in_words(s, r)} times as many steps" for r in s.speed_up]
  how = "with each task's best learning rate, " if row[1] == EACH else ""
  tasks = tables.how_many(s.num_tasks, "held-out task")
  return (
    f"{name}, {how}over {tasks}: to the loss that it ends with, {', '.join(rivals)} "
    f"(interquartile means). {tables.percent(s.slower[BEST])} of the tasks are more than 10% slower than the best "
    f"baseline of each; {tables.percent(s.diverged)} of the runs diverged."
  )


def to_json(comparisons: Mapping[str, Comparison]) -> str:
  """All measures and summaries; numbers that are not finite become null."""
  return json.dumps(plain(as_dict(comparisons)), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def as_dict(comparisons: Mapping[str, Comparison]) -> dict[str, Any]:
  """`{"summary": {optimizer: {learning rate: …}}, "families": {name: {"tasks": […], …, "optimizers": …}}}`."""
  measured = comparison.measure(comparisons)
  return {
    "summary": summaries(measured),
    "families": {title: _family(c, measured[title]) for title, c in comparisons.items()},
  }


def summaries(measured: Measured) -> dict[str, Any]:
  """`{optimizer: {how its learning rate was chosen: summary}}` over all tasks."""
  content: dict[str, Any] = {}
  for name, tuning in tables.rows_of(measured):
    content.setdefault(name, {})[tuning] = summarize([own[name, tuning] for own in measured.values()])
  return content


def numbers(suites: Mapping[str, Mapping[str, Comparison]]) -> dict[str, float]:
  """The summaries of comparisons by suite as a tracker takes them: `{"suite/optimizer/tuning/measure": number}`."""
  found: dict[str, float] = {}
  for suite, members in suites.items():
    for name, by_tuning in summaries(comparison.measure(members)).items():
      for tuning, s in by_tuning.items():
        where = f"{suite}/{name}/{tuning}"
        found |= {f"{where}/speed_up_over/{rival}": x.value for rival, x in s.speed_up.items()}
        found[f"{where}/relative_loss"] = s.relative_loss.value
        found |= {f"{where}/{x}": getattr(s, x) for x in ("mean_loss", "final_loss", "test_loss", "diverged")}
  return found


def _family(c: Comparison, own: Mapping[comparison.Row, tuple[comparison.Measures, ...]]) -> dict[str, Any]:
  optimizers: dict[str, Any] = {}
  for (name, tuning), found in own.items():
    there = optimizers.setdefault(
      name, {"role": c.roles[name], "recommended": c.recommended.get(name), "measures": {}}
    )
    there["measures"][tuning] = [{k: x for k, x in m._asdict().items() if k != "curve"} for m in found]
    there["final_losses"] = [
      {"learning_rates": s.rates, "mean_over_seeds": s.runs.final_loss.mean(axis=0).tolist()} for s in c.sweeps[name]
    ]
    there["seconds_per_step"] = c.seconds_per_step.get(name)
    if name in c.ladders:
      there["ladders"] = [{str(x): float(y.mean()) for x, y in ladder.items()} for ladder in c.ladders[name]]
  settings = {name: getattr(c, name) for name in ("tasks", "num_steps", "num_seeds", "seed")}
  return {**settings, "optimizers": optimizers}


def write_all(comparisons: Mapping[str, Comparison], folder: str | os.PathLike[str]) -> Path:
  """Writes comparison.md, comparison.json, comparison.png and learning_rates.png; returns the picture's path.

  Raises:
    OSError: A file cannot be written.
  """
  folder = Path(folder)
  measured = comparison.measure(comparisons)
  files.write_atomically(folder / "comparison.json", to_json(comparisons))
  files.write_atomically(folder / "comparison.md", table_of_all(comparisons, full=True) + "\n")
  if len(comparisons) == 1:
    ((title, only),) = comparisons.items()
    figure = pictures.training_curves(only, measured[title])
  else:
    figure = pictures.all_training_curves(comparisons, measured)
  files.write_atomically(folder / "comparison.png", pictures.png(figure))
  files.write_atomically(folder / "learning_rates.png", pictures.png(pictures.rate_curves(comparisons)))
  return folder / "comparison.png"


def plain(value: Any) -> Any:
  """As JSON has it: NamedTuples become objects, numbers that are not finite null."""
  if hasattr(value, "_asdict"):
    value = value._asdict()
  if isinstance(value, dict):
    return {name: plain(x) for name, x in value.items()}
  if isinstance(value, (tuple, list)):
    return [plain(x) for x in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value
