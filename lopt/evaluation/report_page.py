"""Comparisons over suites of tasks as one self-contained page, report.html, with the same numbers in report.json."""

import base64
import html
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lopt.evaluation import comparison, pictures, report, tables
from lopt.evaluation.comparison import BEST, CONTROL, EACH, NONE, REFERENCE, Comparison, Measures, Row
from lopt.evaluation.tables import Measured
from lopt.runs import files

Suites = Mapping[str, Mapping[str, Comparison]]
"""`{suite: {family: comparison}}`, all with the same learned optimizers."""


class About(NamedTuple):
  """What was compared, how and where."""

  facts: dict[str, str]
  """Command, date, machine, versions, …: whatever one needs to know to repeat it."""
  horizons: dict[str, int]
  """The longest inner run that each learned optimizer was meta-trained on, where that is known."""
  configurations: dict[str, Any]
  """By learned optimizer, in JSON's types."""


class _Everything(NamedTuple):
  """All comparisons under titles of suite and family, with what was measured; and the latter by suite and family."""

  comparisons: dict[str, Comparison]
  measured: Measured
  by_suite: Mapping[str, Measured]


def write(suites: Suites, folder: str | os.PathLike[str], about: About) -> Path:
  """Writes report.html, report.json, summary.png and learning_rates.png into a folder; returns the page's path.

  Raises:
    OSError: A file cannot be written.
  """
  folder = Path(folder)
  summary, rates = images(suites)
  files.write_atomically(folder / "summary.png", summary)
  files.write_atomically(folder / "learning_rates.png", rates)
  content = json.dumps(as_dict(suites, about), indent=2, allow_nan=False, ensure_ascii=False)
  files.write_atomically(folder / "report.json", content + "\n")
  files.write_atomically(folder / "report.html", page(suites, about, summary, rates))
  return folder / "report.html"


def images(suites: Suites) -> tuple[bytes, bytes]:
  """The pictures of the page as PNG: speed-ups by suite, and final losses by learning rate."""
  everything = _everything(suites)
  first = next(iter(everything.comparisons.values()))
  summary = pictures.png(pictures.speed_ups(everything.by_suite, first))
  return summary, pictures.png(pictures.rate_curves(everything.comparisons), dpi=120)


def as_dict(suites: Suites, about: About) -> dict[str, Any]:
  """All numbers of the page: those of each comparison, and the summaries over suites and over everything."""
  everything = _everything(suites)
  content = {
    "about": about,
    **report.as_dict(everything.comparisons),
    "suites": {suite: report.summaries(measured) for suite, measured in everything.by_suite.items()},
  }
  return report.plain(content)


def page(suites: Suites, about: About, summary: bytes, rates: bytes) -> str:
  """The page's HTML. It needs no other file and no network.

  Args:
    suites: What to show.
    about: How it came to be.
    summary, rates: What `images` gives.
  """
  everything = _everything(suites)
  all_of_them = everything.comparisons
  first = next(iter(all_of_them.values()))
  names = first.learned
  verdicts = "".join(f"<p class=verdict>{_text(report.verdict_of_all(all_of_them, name))}</p>" for name in names)
  parts = [
    f"<h1>{_text(' and '.join(names))}, beside tuned baselines</h1>",
    verdicts,
    _image(summary, "Speed-ups by suite"),
    "<p class=note>Dots: interquartile means over tasks. Lines: their 95% intervals for other tasks and seeds. "
    "Ticks: tasks. Every optimizer has each task's best learning rate. Right of 1, the rival takes longer; a task on "
    "which it does not get there in its longest run counts with that.</p>",
    "<h2>Suites</h2>",
    _table(tables.suite_table(everything.by_suite, roles=first.roles), names, column=2),
    f"<h2>Over all {sum(len(c.tasks) for c in all_of_them.values())} tasks</h2>",
    _table(tables.summary_table(all_of_them, everything.measured), names),
    _DEFINITIONS,
    "<h2>How wide the range of good learning rates is</h2>",
    _image(rates, "Final loss by learning rate"),
    "<h2>Beyond the training horizon</h2>",
    _beyond(everything, names, about.horizons),
    "<h2>Failures</h2>",
    *(_failures(everything, name) for name in names),
  ]
  for suite, members in suites.items():
    parts.append(f"<h2>{_text(suite)}</h2>")
    if len(members) > 1:
      parts.append(_table(tables.summary_table(members, everything.by_suite[suite]), names))
    parts += [_family(name, c, everything.by_suite[suite][name]) for name, c in members.items()]
  facts = "".join(f"<tr><td>{_text(name)}<td class=wrap>{_text(fact)}" for name, fact in about.facts.items())
  parts.append(f"<h2>How this was made</h2><table>{facts}</table>")
  for name, configuration in about.configurations.items():
    text = _text(json.dumps(configuration, indent=2, ensure_ascii=False))
    parts.append(f"<details><summary>Configuration of {_text(name)}</summary><pre>{text}</pre></details>")
  title = _text(f"{', '.join(names)}: evaluation")
  return _PAGE.format(title=title, style=_STYLE, body="\n".join(parts))


def _everything(suites: Suites) -> _Everything:
  """One rate for all tasks is chosen over all suites: what is measured has to be measured together."""
  titles = {(suite, name): f"{suite}: {name}" for suite, members in suites.items() for name in members}
  comparisons = {title: suites[suite][name] for (suite, name), title in titles.items()}
  measured = comparison.measure(comparisons)
  by_suite = {suite: {name: measured[titles[suite, name]] for name in members} for suite, members in suites.items()}
  return _Everything(comparisons, measured, by_suite)


def _family(name: str, c: Comparison, own: Mapping[Row, tuple[Measures, ...]]) -> str:
  """One comparison: curves, table of optimizers, table of tasks."""
  timed = ""
  if c.seconds_per_step:
    times = ", ".join(f"{_text(x)} {1e6 * seconds:.3g}" for x, seconds in c.seconds_per_step.items())
    timed = f"<p class=note>Microseconds per step of one run alone: {times}.</p>"
  return "\n".join(
    [
      f"<h3>{_text(name)}: {len(c.tasks)} tasks, {c.num_seeds} seeds, {c.num_steps} steps</h3>",
      _image(pictures.png(pictures.training_curves(c, own), dpi=100), f"Training curves on {name}"),
      "<details><summary>Optimizers</summary>",
      _table(tables.summary_table({name: c}, {name: own}), c.learned),
      timed,
      "</details>",
      "<details><summary>Each task: final training loss, learning rate, speed-up</summary>",
      _table(tables.task_table(c, own), []),
      "<p class=note>* The lowest or the highest learning rate tried: a better one may lie outside the grid.</p>",
      "</details>",
    ]
  )


def _tuned(own: Mapping[Row, tuple[Measures, ...]], name: str) -> Row:
  return (name, EACH) if (name, EACH) in own else (name, NONE)


def _beyond(everything: _Everything, names: Sequence[str], horizons: Mapping[str, int]) -> str:
  """What becomes of runs that are longer than any in meta-training."""
  rows = [["optimizer", "tasks", "trained on up to", "steps here", "speed-up", "final loss ÷ AdamW's", "diverged"]]
  for name in names:
    for title, c in everything.comparisons.items():
      if name in horizons and c.num_steps > horizons[name]:
        own = everything.measured[title]
        s, known = comparison.summarize([own[_tuned(own, name)]]), horizons[name]
        ratio = f"{c.num_steps} ({c.num_steps / known:.3g}×)"
        row = [name, title, str(known), ratio, tables.interval(s.speed_up[REFERENCE])]
        rows.append([*row, tables.interval(s.relative_loss), tables.percent(s.diverged)])
  parts = [_table(rows, names)] if len(rows) > 1 else []
  for name in [name for name in names if all(row[0] != name for row in rows[1:])]:
    known = f"of up to {horizons[name]} steps" if name in horizons else "of a length that its file does not tell"
    parts.append(
      f"<p>Not measured here for {_text(name)}, which was meta-trained on runs {known}: no run of this comparison is "
      "known to be longer.</p>"
    )
  return "\n".join(parts)


def _failures(everything: _Everything, name: str) -> str:
  """The tasks on which an optimizer diverges, or is slower than a rival, both with each task's best rate."""
  counts: dict[str, int] = {"diverges": 0}
  rows = [["task", "diverged", "final loss", f"{REFERENCE}'s", "what"]]
  total = 0
  for title, own in everything.measured.items():
    c = everything.comparisons[title]
    adam = own[REFERENCE, EACH]
    for i, m in enumerate(own[_tuned(own, name)]):
      total += 1
      found = ["diverges"] if m.diverged else []
      found += [f"slower than {tables.over(r)}" for r, x in m.speed_up.items() if x.value < 0.9]
      for what in found:
        counts[what] = counts.get(what, 0) + 1
      if found:
        losses = [tables.number(x.final_loss) for x in (m, adam[i])]
        task = f"{title} {tables.task_name(c, i)}"
        rows.append([task, tables.percent(m.diverged), *losses, "; ".join(found)])
  summary = ", ".join(f"{what} on {count}" for what, count in counts.items())
  text = f"<p>{_text(name)}: of {total} tasks it {_text(summary)} (slower: by more than 10% of the steps).</p>"
  if len(rows) == 1:
    return text
  return f"{text}<details><summary>These tasks</summary>{_table(rows, [])}</details>"


def _text(value: str) -> str:
  return html.escape(value)


def _table(rows: Sequence[Sequence[str]], bold: Sequence[str], column: int = 0) -> str:
  """The first row is the header; rows whose cell in `column` is in `bold` stand out; a first cell is told once."""
  header = "".join(f"<th>{_text(cell)}" for cell in rows[0])
  lines, last = [], ""
  for row in rows[1:]:
    kinds = (["learned"] if row[column] in bold else []) + (["first"] if row[0] != last else [])
    cells = ["" if row[0] == last else row[0], *row[1:]]
    last = row[0]
    lines.append(f"<tr class='{' '.join(kinds)}'>{''.join(f'<td>{_text(cell)}' for cell in cells)}")
  return f"<div class=wide><table><tr>{header}\n{chr(10).join(lines)}\n</table></div>"


def _image(png: bytes, what: str) -> str:
  return f'<img alt="{_text(what)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


_DEFINITIONS = f"""<details><summary>What rows and columns are</summary><dl>
<dt>learning rate<dd>“{EACH}”: half-decades, further where the best is at an end; each seed is reported at the rate
  with the lowest final training loss over the other seeds. “{comparison.ONE}”: the rate that loses least (mean
  logarithm of the final loss over that of the best rate) on the tasks of all other families.
  “{comparison.RECOMMENDED}”: what the optimizer takes if told only the number of steps. “{NONE}”: it takes no
  learning rate. Baselines and directions have the same warm-up and cosine to zero, but for schedule-free AdamW.
<dt>{CONTROL}<dd>The learned direction before any meta-training: what is no better was not learned.
<dt>speed-up over …<dd>The rival is trained at 0.5, 1, 2, 4 and 8 times the steps, each with a schedule that ends
  there and with learning rates around its best; the speed-up is the length at which it ends with the loss that the
  optimizer ends with, between two lengths interpolated in logarithms. The rival always has each task's best rate.
  “k ≥”, “k ≤”: tasks on which it does not get there in its longest run, or does in its shortest; they count with
  that length. Interquartile mean over tasks (Agarwal et al. 2021) with a 95% interval from a bootstrap over each
  family's tasks.
<dt>{BEST}<dd>Of each task, the baseline with the lowest final loss.
<dt>slower than the best<dd>Share of tasks with a speed-up below 0.9 over the best baseline.
<dt>final loss<dd>Training loss after the last step, over fixed batches that are the same for all; 1 = knowing
  nothing.
<dt>÷ at each task's rate<dd>Final loss divided by its own with each task's best learning rate.
<dt>test loss, test accuracy<dd>On the test split after the last step; nothing was chosen on it.
<dt>diverged<dd>Runs in which a training loss was not a number or reached the family's cap.
<dt>rate interior<dd>Tasks on which lower and higher rates than the chosen one were tried.
<dt>step time, update's share, speed-up in time<dd>Of one run alone, compiled, in steady state: a step's time
  divided by {REFERENCE}'s, the share of it that is not the gradient's, and the speed-up over {REFERENCE} divided by
  the first.
</dl></details>"""


_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 92rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { margin-top: 2.2rem; border-bottom: 1px solid #ddd } img { max-width: min(100%, 62rem) }
.verdict { max-width: 62rem; border-left: 4px solid #D55E00; padding-left: .8rem }
.note { color: #666; font-size: .85rem; max-width: 62rem } .wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; margin: .6rem 0 }
th, td { padding: .2rem .5rem; text-align: right } th { vertical-align: bottom; max-width: 9rem }
tr.first td { border-top: 1px solid #ddd }
td { white-space: nowrap } td.wrap { white-space: normal; overflow-wrap: anywhere; text-align: left }
th:first-child, td:first-child { text-align: left } .learned { font-weight: 600; background: #fff4ec }
dt { font-weight: 600 } dd { max-width: 60rem } summary { cursor: pointer; color: #0072B2 }
pre { font-size: .8rem; overflow-x: auto }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>{style}</style></head>
<body>
{body}
</body></html>
"""
