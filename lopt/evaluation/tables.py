"""Comparisons as tables: rows of text, and Markdown of them."""

import math
from collections.abc import Mapping, Sequence

from lopt.evaluation.comparison import (
  BEST,
  CONTROL,
  EACH,
  NONE,
  REFERENCE,
  RIVALS,
  Comparison,
  Measures,
  Row,
  Summary,
  relative_time,
  summarize,
  update_share,
)
from lopt.evaluation.measures import Interval, SpeedUp

Measured = Mapping[str, Mapping[Row, tuple[Measures, ...]]]
"""What `comparison.measure` returns."""


def rows_of(measured: Measured) -> list[Row]:
  """The rows that all comparisons have."""
  first, *others = measured.values()
  return [row for row in first if all(row in other for other in others)]


BRIEF = ("optimizer", "learning rate", "slower than the best", "final loss", "test accuracy", "diverged")
"""Columns that a terminal has room for, beside the speed-ups over rivals."""


def brief(table: Sequence[Sequence[str]]) -> list[list[str]]:
  """What people look at first of a `summary_table`, without columns that have no number."""
  kept = [
    [title.removeprefix("speed-up "), *cells]
    for title, *cells in zip(*table, strict=True)
    if (title in BRIEF or title.startswith("speed-up over ")) and set(cells) != {"–"}
  ]
  return [list(row) for row in zip(*kept, strict=True)]


def summary_table(comparisons: Mapping[str, Comparison], measured: Measured) -> list[list[str]]:
  """One optimizer and tuning a row, over all tasks of some comparisons; the first row is the header."""
  everyone = list(comparisons.values())
  summaries = {row: summarize([own[row] for own in measured.values()]) for row in rows_of(measured)}
  rivals = [rival for rival in RIVALS if all(rival in s.speed_up for s in summaries.values())]
  timed = any(relative_time(everyone, name) for name, _ in summaries)
  header = ["optimizer", "learning rate", *(f"speed-up over {over(rival)}" for rival in rivals)]
  header += [
    "slower than the best",
    f"final loss ÷ {REFERENCE}'s",
    "÷ at each task's rate",
    "final loss",
    "test loss",
  ]
  header += ["test accuracy", "diverged", "rate interior"]
  header += ["step time", "update's share", "speed-up in time"] if timed else []
  rows = [header]
  for (name, tuning), s in summaries.items():
    row = [name, tuning, *(_counted(s, rival) for rival in rivals)]
    row += [percent(s.slower.get(BEST, math.nan)), interval(s.relative_loss)]
    row += [
      "–" if tuning in (EACH, NONE) else f"{number(s.loss_of_tuning)}",
      number(s.final_loss),
      number(s.test_loss),
    ]
    row += ["–" if s.test_accuracy is None else f"{100 * s.test_accuracy:.1f}%", percent(s.diverged)]
    row += ["–" if tuning == NONE else f"{s.interior}/{s.num_tasks}"]
    if timed:
      time, share = relative_time(everyone, name), update_share(everyone, name)
      row += ["–" if time is None else f"{time:.2f}×", "–" if share is None else percent(share)]
      row += ["–" if time is None or REFERENCE not in s.speed_up else f"{s.speed_up[REFERENCE].value / time:.2f}×"]
    rows.append(row)
  return rows


def suite_table(
  suites: Mapping[str, Measured], rivals: Sequence[str] = RIVALS, roles: Mapping[str, str] | None = None
) -> list[list[str]]:
  """Speed-ups by suite, of learned optimizers and the control; `roles` is a comparison's."""
  rows = [["suite", "tasks", "optimizer", "learning rate", *(f"over {over(rival)}" for rival in rivals), "diverged"]]
  for suite, measured in suites.items():
    for name, tuning in rows_of(measured):
      if roles is not None and roles[name] == "baseline":
        continue
      s = summarize([own[name, tuning] for own in measured.values()])
      cells = [interval(s.speed_up[r]) if r in s.speed_up else "–" for r in rivals]
      rows.append([suite, str(s.num_tasks), name, tuning, *cells, percent(s.diverged)])
  return rows


def task_table(c: Comparison, own: Mapping[Row, Sequence[Measures]]) -> list[list[str]]:
  """Final losses of each task, with the learning rates of each task's tuning; an asterisk where it is at an end."""
  rows = [row for row in own if row[1] in (EACH, NONE)]
  header = ["task", *(name for name, _ in rows), *(f"{name}: speed-up" for name, _ in rows if name in c.learned)]
  table = [header]
  for i in range(len(c.tasks)):
    cells = [_with_rate(own[row][i], row) for row in rows]
    cells += [speed_up(own[row][i].speed_up[REFERENCE]) for row in rows if row[0] in c.learned]
    table.append([task_name(c, i), *cells])
  return table


def over(rival: str) -> str:
  """A rival in words."""
  return {REFERENCE: f"tuned {REFERENCE}", BEST: "the best baseline", CONTROL: "θ = 0"}.get(rival, rival)


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
  """A table whose first row is the header, aligned for terminals; the first column to the left, the others right."""
  rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

  def line(cells: Sequence[str]) -> str:
    first, *others = zip(cells, widths, strict=True)
    return f"| {' | '.join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)])} |"

  rules = ["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]
  return [line(rows[0]), f"|{'|'.join(rules)}|", *map(line, rows[1:])]


def task_name(c: Comparison, index: int) -> str:
  """Its number from 1 on, and what distinguishes it."""
  return f"{index + 1}: {c.tasks[index]}" if c.tasks[index] else str(index + 1)


def number(value: float) -> str:
  """To three digits."""
  return "–" if math.isnan(value) else f"{value:.3g}"


def percent(value: float) -> str:
  return "–" if math.isnan(value) else f"{100 * value:.3g}%"


def interval(value: Interval) -> str:
  """An estimate, with its interval where there is one."""
  bounds = "" if math.isnan(value.low) else f" ({number(value.low)} to {number(value.high)})"
  return f"{number(value.value)}{bounds}"


def speed_up(value: SpeedUp) -> str:
  """Of one task, with a mark where it is a bound."""
  return f"{value.bound}{' ' if value.bound else ''}{value.value:.2f}×"


def in_words(s: Summary, rival: str) -> str:
  """How many times as many steps a rival takes, as part of a sentence."""
  everywhere = {"at most ": s.at_most[rival], "at least ": s.at_least[rival]}
  bound = next((words for words, count in everywhere.items() if count == s.num_tasks), "")
  return f"{bound}{interval(s.speed_up[rival])}"


def how_many(count: int, what: str) -> str:
  """A number of things, in words."""
  return f"{count} {what}{'' if count == 1 else 's'}"


def _counted(s: Summary, rival: str) -> str:
  bounds = [f"{count} {mark}" for count, mark in ((s.at_least[rival], "≥"), (s.at_most[rival], "≤")) if count]
  return ", ".join([interval(s.speed_up[rival]), *bounds])


def _with_rate(m: Measures, row: Row) -> str:
  return number(m.final_loss) + ("" if row[1] == NONE else f" ({m.rate:.3g}{'' if m.interior else '*'})")
