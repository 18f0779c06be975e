"""A comparison as tables, as JSON and as a picture."""

import io
import itertools
import json
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lopt.evaluation.comparison import REFERENCE, UNTUNED, Comparison, Measures, Summary, summarize
from lopt.evaluation.measures import Interval
from lopt.runs import files

# Okabe and Ito's colours, which the colour-blind can tell apart: warm ones for the learned, cold ones for baselines.
_LEARNED_COLORS = ("#D55E00", "#CC79A7", "#E69F00")
_BASELINE_COLORS = ("#0072B2", "#009E73", "#56B4E9")
_OTHER_COLOR = "#aaaaaa"
_MAX_TASK_PANELS = 6
LOSS = "training loss (1 = knowing nothing)"


def table(comparison: Comparison) -> str:
  """Two tables, of single tasks and of means over tasks, in Markdown that is aligned for terminals.

  Measures are defined in `comparison.Measures` and `comparison.Summary`. An asterisk marks a learning rate at the end
  of the grid.
  """
  c = comparison
  return "\n".join(
    [
      f"Mean training loss over {c.num_steps} steps and {c.num_seeds} seeds. In brackets, the learning rate: "
      f"that of the lowest {tuned_for(c)} on other seeds.",
      "",
      *_markdown(task_rows(c)),
      "",
      f"Over the {len(c.tasks)} held-out tasks (seed {c.seed}): means, but for speed-up and relative loss, which are "
      "interquartile means with 95% intervals.",
      "",
      *_markdown(_summary_rows(c)),
      *remarks(c),
    ]
  )


def to_json(comparison: Comparison) -> str:
  """All measures and summaries, without the curves; numbers that are not finite become null.

  {"tasks": […], "num_steps": …, …, "optimizers": {name: {"learned": bool, "summary": {…}, "measures": [one a task]}}}
  """
  return json.dumps(as_dict(comparison), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def as_dict(comparison: Comparison) -> dict[str, Any]:
  """What `to_json` writes."""
  settings = ("tasks", "num_steps", "num_seeds", "num_tuning_seeds", "seed")
  content = {name: getattr(comparison, name) for name in settings}
  content["optimizers"] = {
    name: {
      "learned": name in comparison.learned,
      "summary": summarize([comparison], name),
      "measures": e.measures,
      "seconds_per_step": comparison.seconds_per_step.get(name),
    }
    for name, e in comparison.evaluations.items()
  }
  return plain(content)


def write_json(comparison: Comparison, path: str | os.PathLike[str]) -> None:
  """Writes `to_json` to a file, atomically.

  Raises:
    OSError: The file cannot be written.
  """
  files.write_atomically(path, to_json(comparison))


def verdict(comparison: Comparison, name: str) -> str:
  """One line that says how a learned optimizer compares with tuned Adam."""
  own, adam = (summarize([comparison], x) for x in (name, REFERENCE))
  return (
    f"Over {len(comparison.tasks)} held-out tasks the {name} optimizer's mean training loss is {_with_error(own)}, "
    f"tuned {REFERENCE}'s {_with_error(adam)}; it is lower on {own.tasks_won[REFERENCE]} of them. {_sooner(own)} On "
    f"the test split they end at {own.test_loss:.3g} and {adam.test_loss:.3g}."
  )


def write(comparison: Comparison, folder: str | os.PathLike[str]) -> Path:
  """Writes comparison.json, comparison.md and comparison.png into a folder; returns the picture's path.

  Raises:
    OSError: A file cannot be written.
  """
  folder = Path(folder)
  write_json(comparison, folder / "comparison.json")
  files.write_atomically(folder / "comparison.md", table(comparison) + "\n")
  plot(comparison, folder / "comparison.png")
  return folder / "comparison.png"


def write_all(comparisons: Mapping[str, Comparison], folder: str | os.PathLike[str]) -> Path:
  """Writes each comparison into a folder of its name, and summary.md, summary.json and summary.png beside them.

  A single comparison is written into the folder itself, as by `write`. Returns the path of the picture of all.

  Raises:
    OSError: A file cannot be written.
  """
  if len(comparisons) == 1:
    return write(next(iter(comparisons.values())), folder)
  folder = Path(folder)
  for name, comparison in comparisons.items():
    (folder / name).mkdir(parents=True, exist_ok=True)
    write(comparison, folder / name)
  summaries = {
    name: {optimizer: summarize([c], optimizer) for optimizer in (*c.learned, *c.baselines)}
    for name, c in comparisons.items()
  }
  files.write_atomically(folder / "summary.json", json.dumps(plain(summaries), indent=2, allow_nan=False) + "\n")
  files.write_atomically(folder / "summary.md", table_of_all(comparisons) + "\n")
  plot_all(comparisons, folder / "summary.png")
  return folder / "summary.png"


def table_of_all(comparisons: Mapping[str, Comparison]) -> str:
  """A line for each comparison in Markdown: means over its tasks. Of a single one, `table`."""
  if len(comparisons) == 1:
    return table(next(iter(comparisons.values())))
  first = next(iter(comparisons.values()))
  header = ["family", "steps", *first.learned, *first.baselines]
  for name in first.learned:
    whose = f"{name}: " if len(first.learned) > 1 else ""
    header += [f"{whose}better than {REFERENCE}", f"{whose}speed-up", f"{whose}diverged"]
  rows = [header]
  for title, c in comparisons.items():
    summaries = {name: summarize([c], name) for name in (*c.learned, *c.baselines)}
    row = [title, str(c.num_steps), *(_with_error(s) for s in summaries.values())]
    for s in (summaries[name] for name in c.learned):
      row += [f"{s.tasks_won[REFERENCE]}/{len(c.tasks)}", interval(s.speed_up), f"{100 * s.diverged:.3g}%"]
    rows.append(row)
  what = (
    f"Mean training loss over all steps, the means over {len(first.tasks)} held-out tasks of each family and "
    f"{first.num_seeds} seeds; {_enumerate(_tuned(first))} with each task's learning rate of lowest "
    f"{tuned_for(first)} on other seeds. Speed-up is over tuned Adam, the interquartile mean over tasks with its 95% "
    "interval."
  )
  return "\n".join([what, "", *_markdown(rows)])


def verdict_of_all(comparisons: Mapping[str, Comparison], name: str) -> str:
  """One line that says how a learned optimizer compares with tuned Adam over several families."""
  if len(comparisons) == 1:
    return verdict(next(iter(comparisons.values())), name)
  everything = list(comparisons.values())
  own, adam = (summarize(everything, x) for x in (name, REFERENCE))
  lower = sum(summarize([c], name).mean_loss < summarize([c], REFERENCE).mean_loss for c in everything)
  return (
    f"The {name} optimizer's mean training loss is lower than tuned {REFERENCE}'s on {own.tasks_won[REFERENCE]} of "
    f"{own.num_tasks} held-out tasks, and in the mean on {lower} of {len(everything)} families (over all "
    f"{own.mean_loss:.3g} and {adam.mean_loss:.3g}). {_sooner(own)} {100 * own.diverged:.3g}% of its runs diverged."
  )


def plot_all(comparisons: Mapping[str, Comparison], path: str | os.PathLike[str]) -> None:
  """Draws a panel for each comparison into a PNG file, atomically: the mean training curves over its tasks.

  Raises:
    OSError: The file cannot be written.
  """
  columns = min(4, math.ceil(math.sqrt(len(comparisons))))
  rows = math.ceil(len(comparisons) / columns)
  figure = Figure(figsize=(3.2 * columns, 2.6 * rows + 0.7), layout="constrained")
  panels = figure.subplots(rows, columns, squeeze=False)
  for axes in panels.flat[len(comparisons) :]:
    axes.set_visible(False)
  for axes, (title, comparison) in zip(panels.flat, comparisons.items(), strict=False):
    _draw(axes, comparison, range(len(comparison.tasks)))
    axes.set_title(title, fontsize=10)
    axes.tick_params(labelsize=8)
  panels[0, 0].legend(frameon=False, fontsize=8)
  figure.supylabel(LOSS, fontsize=9)
  first = next(iter(comparisons.values()))
  caption = textwrap.fill(f"Inner steps. {_caption(first)}", int(15 * figure.get_figwidth()))
  figure.supxlabel(caption, fontsize=7.5, color="#555555")
  files.write_atomically(path, png(figure))


def plot(
  comparison: Comparison,
  path: str | os.PathLike[str],
  *,
  loss_label: str = LOSS,
) -> None:
  """Draws `training_curves` into a PNG file, atomically.

  Raises:
    OSError: The file cannot be written.
  """
  files.write_atomically(path, png(training_curves(comparison, loss_label)))


def training_curves(comparison: Comparison, loss_label: str = LOSS) -> Figure:
  """Training curves: the mean over all tasks, and each of the first six."""
  num_tasks = len(comparison.tasks)
  num_panels = min(num_tasks, _MAX_TASK_PANELS) if num_tasks > 1 else 0
  columns = math.ceil(num_panels / 2)
  # Not pyplot, whose figures are global. Small, so that the letters can be read where a page scales it down.
  figure = Figure(figsize=(4.8 + 1.6 * columns, 4.4), layout="constrained")
  grid = figure.add_gridspec(2, 1 + columns, width_ratios=[2.6] + [1.0] * columns)
  large = figure.add_subplot(grid[:, 0])
  _draw(large, comparison, range(num_tasks))
  large.set_ylabel(loss_label)
  large.set_xlabel("inner step")
  large.set_title(f"Mean over {num_tasks} held-out tasks" if num_panels else "A held-out task", fontsize=10)
  large.legend(frameon=False, fontsize=9)
  small = None
  for index in range(num_panels):
    row, column = divmod(index, columns)
    small = figure.add_subplot(grid[row, 1 + column], sharey=small)
    _draw(small, comparison, [index])
    small.set_title(f"Task {index + 1}", fontsize=9)
    small.set_xticks([0, comparison.num_steps])
    small.tick_params(labelsize=8, labelleft=column == 0, labelbottom=index + columns >= num_panels)
  caption = textwrap.fill(_caption(comparison), int(15 * figure.get_figwidth()))  # letters to the inch
  figure.supxlabel(caption, fontsize=7.5, color="#555555")
  return figure


def meta_training_curves(records: Sequence[Mapping[str, float | int | None]]) -> Figure:
  """While meta-training: the meta-loss of the episodes as they go, the mean loss on the periodic evaluation's tasks.

  Args:
    records: Of the metrics, as in metrics.jsonl; each has its outer `step`. Of a mixture each family is drawn too.
  """
  figure = Figure(figsize=(7.2, 3.4), layout="constrained")
  for axes, prefix, title, quantity in zip(
    figure.subplots(1, 2),
    ("meta_loss", "evaluation/mean_loss"),
    ("meta-training episodes", "periodic evaluation"),
    ("meta-loss", "mean loss"),
    strict=True,
  ):
    there = [record for record in records if prefix in record]
    steps = np.array([record["step"] for record in there])
    families = sorted(name for name in (there[0] if there else ()) if name.startswith(f"{prefix}/"))
    for i, name in enumerate([*families, prefix]):
      values = np.array([record[name] for record in there], float)  # null becomes NaN
      if prefix == "meta_loss":  # a mean over the few episodes of a step: noisy
        values = _smooth_for_the_eye(values[None])[0]
      label = name.removeprefix(f"{prefix}/") if name != prefix else "all" if families else None
      color = "black" if name == prefix else f"C{i}"
      axes.plot(steps, values, color=color, linewidth=1.8 if name == prefix else 1.0, label=label)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("outer step")
    axes.set_ylabel(quantity)
    axes.set_yscale("log")
    axes.spines[["top", "right"]].set_visible(False)
  handles, labels = figure.axes[-1].get_legend_handles_labels()
  if labels:
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False, fontsize=8)
  return figure


def png(figure: Figure, dpi: int = 200) -> bytes:
  """The figure as a picture."""
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png", dpi=dpi)
  return buffer.getvalue()


def task_rows(c: Comparison) -> list[list[str]]:
  """The mean training loss of each optimizer on each task, with the learning rates chosen, and the speed-ups."""
  header = ["task", *c.learned, *(f"{name} (learning rate)" if name != UNTUNED else name for name in c.baselines)]
  header += [f"{name}: speed-up" if len(c.learned) > 1 else "speed-up" for name in c.learned]
  rows = [header]
  for index in range(len(c.tasks)):
    learned = [e.measures[index] for e in c.learned.values()]
    losses = [_with_rate(e.measures[index]) for e in c.evaluations.values()]
    rows.append([task_name(c, index), *losses, *map(speed_up, learned)])
  return rows


def _summary_rows(c: Comparison) -> list[list[str]]:
  return [summary_header([c]), *(summary_row([c], name) for name in c.evaluations)]


def summary_header(comparisons: Sequence[Comparison]) -> list[str]:
  """The columns of `summary_row`."""
  timed = all(c.seconds_per_step for c in comparisons)
  columns = [
    "optimizer",
    "speed-up",
    "median",
    "final loss ÷ Adam's",
    "training loss",
    "final training loss",
    "test loss",
  ]
  columns += ["test accuracy", "rank", "diverged", f"better than {REFERENCE}", f"better than {UNTUNED}"]
  return columns + (["time per step ÷ Adam's", "wall-clock speed-up"] if timed else []) + ["learning rate interior"]


def summary_row(comparisons: Sequence[Comparison], name: str) -> list[str]:
  """One optimizer, over all tasks of some comparisons."""
  s = summarize(comparisons, name)
  bounds = f", {s.bounds} of {s.num_tasks} ≥" if s.bounds else ""
  row = [name, f"{interval(s.speed_up)}{bounds}", f"{s.median_speed_up:.3g}", interval(s.relative_loss)]
  row += [_with_error(s), number(s.final_loss)]
  row += [number(s.test_loss), "–" if s.test_accuracy is None else f"{100 * s.test_accuracy:.1f}%"]
  row += [f"{s.rank:.1f}", f"{100 * s.diverged:.3g}%"]
  row += [f"{s.tasks_won[x]}/{s.num_tasks}" if x in s.tasks_won else "–" for x in (REFERENCE, UNTUNED)]
  if s.relative_time is not None and s.wall_clock_speed_up is not None:
    row += [f"{s.relative_time:.2f}×", f"{s.wall_clock_speed_up:.2f}×"]
  return [*row, "–" if s.tasks_interior is None else f"{s.tasks_interior}/{s.num_tasks}"]


def remarks(c: Comparison) -> list[str]:
  """What has to be said about a table of tasks."""
  tuned = [m.tuning for e in c.baselines.values() for m in e.measures if m.tuning]
  if all(t.interior for t in tuned):
    return []
  return ["", "\\* The lowest or the highest learning rate tried: a better one may lie outside the grid."]


def _markdown(rows: list[list[str]]) -> list[str]:
  """A table whose first row is the header; the first column is aligned left, the others right."""
  rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

  def line(cells: list[str]) -> str:
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


def interval(value: Interval) -> str:
  """An estimate, with its interval where there is one."""
  bounds = "" if math.isnan(value.low) else f" ({number(value.low)} to {number(value.high)})"
  return f"{number(value.value)}{bounds}"


def speed_up(m: Measures) -> str:
  """Of one task: "≥" where tuned Adam did not get there."""
  return f"{'≥ ' if m.speed_up_is_bound else ''}{m.speed_up:.2f}×"


def _with_error(s: Summary) -> str:
  """The mean training loss, with its standard error where there is more than one seed."""
  return number(s.mean_loss) + ("" if math.isnan(s.mean_loss_error) else f" ± {s.mean_loss_error:.1g}")


def _with_rate(m: Measures) -> str:
  rate = "" if m.tuning is None else f" ({m.tuning.best:g}{'' if m.tuning.interior else '*'})"
  return f"{number(m.mean_loss)}{rate}"


def _sooner(s: Summary) -> str:
  return (
    f"To the loss that it ends with, {REFERENCE} at the best of all its learning rates takes {interval(s.speed_up)} "
    f"times as many steps (interquartile mean over tasks; median {s.median_speed_up:.3g})."
  )


def _enumerate(names: Sequence[str]) -> str:
  return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _tuned(c: Comparison) -> list[str]:
  return [name for name in c.baselines if name != UNTUNED]


def plain(value: Any) -> Any:
  """As JSON has it: NamedTuples become objects, numbers that are not finite null."""
  if hasattr(value, "_asdict"):
    value = value._asdict()
  if isinstance(value, dict):
    return {name: plain(x) for name, x in value.items()}
  if isinstance(value, (tuple, list)):
    return [plain(x) for x in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def _draw(axes: Axes, c: Comparison, tasks: Sequence[int]) -> None:
  """The curves of all optimizers but untuned Adam, averaged over some of the tasks; many baselines are grey."""
  steps = np.arange(1, c.num_steps + 1)
  others = itertools.chain(_BASELINE_COLORS, itertools.repeat(_OTHER_COLOR))
  colors = [*learned_colors(c), *zip(_tuned(c), others, strict=False)]
  for name, color in colors:
    learned, grey = name in c.learned, color == _OTHER_COLOR
    style = {"color": color, "zorder": 3 if learned else 1 if grey else 2}
    seeds = _smooth_for_the_eye(c.evaluations[name].curves[list(tasks)].mean(axis=0))
    last = name == colors[-1][0]
    label = name if learned else f"{name}, tuned" if not grey else "other baselines, tuned" if last else None
    width = 2 if learned else 0.7 if grey else 1.4
    axes.plot(steps, seeds.mean(axis=0), linewidth=width, label=label, **style)
    if not grey:
      axes.fill_between(steps, seeds.min(axis=0), seeds.max(axis=0), alpha=0.2, linewidth=0, **style)
  if _spans_decades(c):
    axes.set_yscale("log")
  axes.set_xlim(0, c.num_steps)
  axes.spines[["top", "right"]].set_visible(False)
  axes.grid(color="#e0e0e0", linewidth=0.5)
  axes.set_axisbelow(True)


def learned_colors(c: Comparison) -> list[tuple[str, str]]:
  """The learned optimizers with their colours, the same in all pictures."""
  return list(zip(c.learned, itertools.cycle(_LEARNED_COLORS), strict=False))


def _spans_decades(c: Comparison) -> bool:
  """Whether a logarithmic scale suits the losses: never negative, and their means of very different sizes."""
  curves = [e.curves for name, e in c.evaluations.items() if name != UNTUNED]
  means = np.stack([x.mean(axis=(0, 1)) for x in curves])
  return bool(min(x.min() for x in curves) >= 0 and 0 < 10 * means.min() < means.max())


def _smooth_for_the_eye(curves: Float[np.ndarray, "seeds T"]) -> Float[np.ndarray, "seeds T"]:
  """The trailing mean over a tenth of the steps so far, at most 5% of all: the first steps stay sharp."""
  num_steps = curves.shape[1]
  sums = np.cumsum(np.pad(curves, ((0, 0), (1, 0))), axis=1)
  end = np.arange(1, num_steps + 1)
  length = np.clip(end // 10, 1, max(1, num_steps // 20))
  return (sums[:, end] - sums[:, end - length]) / length


def _caption(c: Comparison) -> str:
  return (
    f"Lines: means over {c.num_seeds} seeds. Bands: lowest to highest seed. Both smoothed by a trailing mean over "
    f"a tenth of the steps so far, at most 5% of all. {_enumerate(_tuned(c))}: learning "
    f"rate of the lowest {tuned_for(c)}, for each task on other seeds."
  )


def tuned_for(c: Comparison) -> str:
  """In words."""
  return {"mean_loss": "mean training loss", "final_loss": "final training loss"}[c.tuned_for]
