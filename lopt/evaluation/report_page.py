"""Comparisons over suites of tasks as one self-contained page, report.html, with the same numbers in report.json."""

import base64
import html
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from lopt.evaluation import held_out, measures, report
from lopt.evaluation.comparison import REFERENCE, UNTUNED, Comparison, Measures, summarize
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


def write(suites: Suites, folder: str | os.PathLike[str], about: About) -> Path:
  """Writes report.html, report.json and summary.png into a folder; returns the page's path.

  Raises:
    OSError: A file cannot be written.
  """
  folder = Path(folder)
  picture = report.png(summary_plot(suites))
  files.write_atomically(folder / "summary.png", picture)
  content = json.dumps(as_dict(suites, about), indent=2, allow_nan=False, ensure_ascii=False)
  files.write_atomically(folder / "report.json", content + "\n")
  files.write_atomically(folder / "report.html", page(suites, about, picture))
  return folder / "report.html"


def as_dict(suites: Suites, about: About) -> dict[str, Any]:
  """All numbers of the page: those of each comparison, and the summaries over suites and over everything."""

  def summaries(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    return {name: summarize(comparisons, name) for name in comparisons[0].evaluations}

  content = {
    "about": about,
    "summary": summaries(_all(suites)),
    "suites": {
      suite: {
        "summary": summaries(list(families.values())),
        "families": {name: report.as_dict(c) for name, c in families.items()},
      }
      for suite, families in suites.items()
    },
  }
  return report.plain(content)


def summary_plot(suites: Suites) -> Figure:
  """The speed-up over tuned Adam by suite, or by family where there is one suite: interquartile means, intervals and
  single tasks.
  """
  if len(suites) > 1:
    rows = {suite: list(families.values()) for suite, families in suites.items()}
  else:
    rows = {name: [c] for name, c in next(iter(suites.values())).items()}
  first = _all(suites)[0]
  figure = Figure(figsize=(7.2, 1.5 + 0.34 * len(rows) * max(1, 0.6 * len(first.learned))), layout="constrained")
  axes = figure.add_subplot()
  colors = [*report.learned_colors(first), (REFERENCE, "#0072B2")]
  others = [name for name in first.baselines if name not in (REFERENCE, UNTUNED)]
  if len(others) <= 2:  # more would hide what matters; the tables have them
    colors += zip(others, ("#009E73", "#56B4E9"), strict=False)
  for k, (name, color) in enumerate(colors):
    for i, comparisons in enumerate(rows.values()):
      y = i + 0.7 * ((k + 0.5) / len(colors) - 0.5)
      s = summarize(comparisons, name).speed_up
      tasks = [m.speed_up for c in comparisons for m in c.evaluations[name].measures]
      axes.plot(tasks, [y] * len(tasks), "|", color=color, alpha=0.35, markersize=6)
      axes.plot([s.low, s.high], [y, y], color=color, linewidth=2)
      label = f"{name}, tuned" if name in first.baselines else name
      axes.plot([s.value], [y], "o", color=color, markersize=6, label=label if i == 0 else None)
  axes.axvline(1, color="#555555", linewidth=0.8, zorder=0)
  axes.axvline(held_out.REFERENCE_FACTOR, color="#bbbbbb", linewidth=0.8, linestyle=":", zorder=0)
  axes.set_yticks(range(len(rows)), list(rows))
  axes.set_ylim(len(rows) - 0.5, -0.5)
  axes.set_xscale("log")
  low, high = axes.get_xlim()
  ticks = [x for x in (0.05, 0.1, 0.2, 0.5, 1, 2, 4) if low <= x <= high]
  axes.set_xticks(ticks, [f"{x:g}×" for x in ticks])
  axes.minorticks_off()
  axes.set_xlabel(f"speed-up over {REFERENCE} at the best of all its learning rates")
  axes.spines[["top", "right"]].set_visible(False)
  axes.grid(axis="x", color="#e8e8e8", linewidth=0.5)
  axes.set_axisbelow(True)
  figure.legend(loc="outside upper left", ncols=min(4, len(colors)), frameon=False, fontsize=9)
  return figure


def page(suites: Suites, about: About, summary: bytes) -> str:
  """The page's HTML. It needs no other file and no network.

  Args:
    suites: What to show.
    about: How it came to be.
    summary: The picture of `summary_plot`.
  """
  everything = _all(suites)
  names = list(everything[0].learned)
  everyone = [name for name in everything[0].evaluations if all(name in c.evaluations for c in everything)]
  families = {f"{suite} / {name}": c for suite, members in suites.items() for name, c in members.items()}
  verdicts = "".join(f"<p class=verdict>{_text(report.verdict_of_all(families, name))}</p>" for name in names)
  rows = [report.summary_row(everything, name) for name in everyone]
  parts = [
    f"<h1>{_text(' and '.join(names))}, beside tuned baselines</h1>",
    verdicts,
    _image(summary, "Speed-up over tuned Adam"),
    "<p class=note>Dots: interquartile means over tasks. Lines: their 95% intervals for other tasks and seeds. "
    f"Ticks: tasks. Right of 1, {REFERENCE} takes longer. It was trained {held_out.REFERENCE_FACTOR} times as "
    "long: that is the largest speed-up to be seen, and tasks on which it is reached count with it.</p>",
    f"<h2>Over all {sum(len(c.tasks) for c in everything)} tasks</h2>",
    _table([report.summary_header(everything), *rows], names),
    _definitions(report.tuned_for(everything[0])),
    "<h2>Beyond the training horizon</h2>",
    _beyond(families, names, about.horizons),
    "<h2>Failures</h2>",
    *(_failures(families, name) for name in names),
  ]
  for suite, members in suites.items():
    comparisons = list(members.values())
    parts.append(f"<h2>{_text(suite)}</h2>")
    if len(suites) > 1:
      parts += [f"<p class=verdict>{_text(report.verdict_of_all(members, name))}</p>" for name in names]
    if len(members) > 1:
      rows = [report.summary_row(comparisons, name) for name in everyone]
      parts.append(_table([report.summary_header(comparisons), *rows], names))
    parts += [_family(name, c) for name, c in members.items()]
  facts = "".join(f"<tr><td>{_text(name)}<td class=wrap>{_text(fact)}" for name, fact in about.facts.items())
  parts.append(f"<h2>How this was made</h2><table>{facts}</table>")
  for name, configuration in about.configurations.items():
    text = _text(json.dumps(configuration, indent=2, ensure_ascii=False))
    parts.append(f"<details><summary>Configuration of {_text(name)}</summary><pre>{text}</pre></details>")
  title = _text(f"{', '.join(names)}: evaluation")
  return _PAGE.format(title=title, style=_STYLE, body="\n".join(parts))


def _family(name: str, c: Comparison) -> str:
  """One comparison: curves, table of optimizers, table of tasks."""
  timed = ""
  if c.seconds_per_step:
    times = ", ".join(f"{_text(x)} {1e6 * seconds:.3g}" for x, seconds in c.seconds_per_step.items())
    timed = f"<p class=note>Microseconds per step of one run alone: {times}.</p>"
  return "\n".join(
    [
      f"<h3>{_text(name)}: {len(c.tasks)} tasks, {c.num_seeds} seeds, {c.num_steps} steps</h3>",
      _image(report.png(report.training_curves(c), dpi=100), f"Training curves on {name}"),
      _table([report.summary_header([c]), *(report.summary_row([c], x) for x in c.evaluations)], list(c.learned)),
      timed,
      "<details><summary>Each task: mean training loss, learning rate, speed-up</summary>",
      _table(report.task_rows(c), []),
      "".join(f"<p class=note>{_text(line)}</p>" for line in report.remarks(c) if line),
      "</details>",
    ]
  )


def _beyond(families: Mapping[str, Comparison], names: Sequence[str], horizons: Mapping[str, int]) -> str:
  """What becomes of runs that are longer than any in meta-training."""
  rows = [["optimizer", "tasks", "trained on up to", "steps here", "speed-up", "final loss ÷ Adam's", "diverged"]]
  for name in names:
    for title, c in families.items():
      if name in horizons and c.num_steps > horizons[name]:
        s, known = summarize([c], name), horizons[name]
        ratio = f"{c.num_steps} ({c.num_steps / known:.3g}×)"
        row = [name, title, str(known), ratio, report.interval(s.speed_up), report.interval(s.relative_loss)]
        rows.append([*row, f"{100 * s.diverged:.3g}%"])
  missing = [name for name in names if all(row[0] != name for row in rows[1:])]
  parts = [_table(rows, names)] if len(rows) > 1 else []
  for name in missing:
    known = f"of up to {horizons[name]} steps" if name in horizons else "of a length that its file does not tell"
    parts.append(
      f"<p>Not measured here for {_text(name)}, which was meta-trained on runs {known}: no run of this comparison is "
      "known to be longer.</p>"
    )
  return "\n".join(parts)


def _failures(families: Mapping[str, Comparison], name: str) -> str:
  """The tasks on which an optimizer diverges or ends worse than Adam, tuned or not."""
  rows = [["task", "diverged", "final training loss", f"tuned {REFERENCE}", UNTUNED, "what"]]
  counts: dict[str, int] = dict.fromkeys(
    ("diverges", f"ends worse than tuned {REFERENCE}", f"ends worse than {UNTUNED}"), 0
  )
  total = 0
  for title, c in families.items():
    for i, own in enumerate(c.learned[name].measures):
      adam, untuned = (c.baselines[x].measures[i] for x in (REFERENCE, UNTUNED))
      found = [what for what, fails in zip(counts, _fails(own, adam, untuned), strict=True) if fails]
      for what in found:
        counts[what] += 1
      if found:
        losses = [report.number(m.final_loss) for m in (own, adam, untuned)]
        rows.append([f"{title} {report.task_name(c, i)}", f"{100 * own.diverged:.3g}%", *losses, "; ".join(found)])
      total += 1
  summary = ", ".join(f"{what} on {count}" for what, count in counts.items())
  text = f"<p>{_text(name)}: of {total} tasks it {_text(summary)}.</p>"
  if len(rows) == 1:
    return text
  return f"{text}<details><summary>These tasks</summary>{_table(rows, [])}</details>"


def _fails(own: Measures, adam: Measures, untuned: Measures) -> tuple[bool, bool, bool]:
  worse = [own.final_loss > other.final_loss * (1 + measures.PRECISION) for other in (adam, untuned)]
  return own.diverged > 0, worse[0], worse[1]


def _all(suites: Suites) -> list[Comparison]:
  return [c for families in suites.values() for c in families.values()]


def _text(value: str) -> str:
  return html.escape(value)


def _table(rows: Sequence[Sequence[str]], bold: Sequence[str]) -> str:
  """The first row is the header; rows whose first cell is in `bold` stand out."""
  header = "".join(f"<th>{_text(cell)}" for cell in rows[0])
  lines = []
  for row in rows[1:]:
    mark = " class=learned" if row[0] in bold else ""
    lines.append(f"<tr{mark}>{''.join(f'<td>{_text(cell)}' for cell in row)}")
  return f"<div class=wide><table><tr>{header}\n{chr(10).join(lines)}\n</table></div>"


def _image(png: bytes, what: str) -> str:
  return f'<img alt="{_text(what)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _definitions(tuned_for: str) -> str:
  return f"""<details><summary>What the columns are</summary><dl>
<dt>speed-up<dd>The steps that {REFERENCE} needs to get to the loss that the optimizer ends with, divided by the
  optimizer's; losses are those of fixed training batches, the same for all. {REFERENCE} may take the best of all
  its learning rates for each number of steps, so its own one best rate is at 1 or below (Metz et al. 2022, VeLO).
  Interquartile mean over tasks (Agarwal et al. 2021) with a 95% interval from a bootstrap over the tasks of
  each family. “k ≥”: tasks on which {REFERENCE} did not get there in
  {held_out.REFERENCE_FACTOR} times the steps.
<dt>median<dd>Of the same, over tasks.
<dt>final loss ÷ Adam's<dd>Training loss after the last step, on fixed batches, divided by tuned {REFERENCE}'s; below
  1 is better. Interquartile mean and interval as above.
<dt>training loss<dd>Mean over all steps, tasks and seeds, with the standard error over seeds; 1 = knowing nothing.
<dt>test loss, test accuracy<dd>On the test split after the last step; nothing was chosen on it.
<dt>rank<dd>Mean place among all optimizers of the table by final training loss, 1 the best.
<dt>diverged<dd>Runs in which a loss was not a number or reached the family's cap.
<dt>better than …<dd>Tasks on which the mean training loss is lower.
<dt>time per step, wall-clock speed-up<dd>Of one run alone, compiled, in steady state; speed-up divided by it.
<dt>learning rate interior<dd>Tasks on which lower and higher rates than the chosen one were tried. It is chosen among
  14 half-decades and more, by {tuned_for}, on seeds that are not reported.
</dl></details>"""


_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 92rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { margin-top: 2.2rem; border-bottom: 1px solid #ddd } img { max-width: min(100%, 62rem) }
.verdict { max-width: 62rem; border-left: 4px solid #D55E00; padding-left: .8rem }
.note { color: #666; font-size: .85rem } .wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; margin: .6rem 0 }
th, td { padding: .2rem .5rem; text-align: right; border-bottom: 1px solid #eee } th { vertical-align: bottom }
td { white-space: nowrap } td.wrap { white-space: normal; overflow-wrap: anywhere; text-align: left }
th:first-child, td:first-child { text-align: left } .learned { font-weight: 600; background: #fff4ec }
dt { font-weight: 600 } summary { cursor: pointer; color: #0072B2 } pre { font-size: .8rem; overflow-x: auto }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>{style}</style></head>
<body>
{body}
</body></html>
"""
