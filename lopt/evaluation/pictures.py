"""Comparisons as pictures: speed-ups, final losses by learning rate, training curves."""

import io
import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lopt.evaluation.comparison import CONTROL, EACH, NONE, REFERENCE, RIVALS, Comparison, Measures, Row, summarize
from lopt.evaluation.tables import Measured, over

# Okabe and Ito's colours, which the colour-blind can tell apart: warm ones for the learned, cold ones for baselines.
_LEARNED_COLORS = ("#D55E00", "#CC79A7", "#E69F00")
_BASELINE_COLORS = {"AdamW": "#0072B2", "Muon": "#009E73"}
_CONTROL_COLOR = "#000000"
_OTHER_COLOR = "#b0b0b0"
_MAX_TASK_PANELS = 6
LOSS = "training loss (1 = knowing nothing)"


class Shown(Figure):
  """A figure that a notebook shows when it is a cell's value, without pyplot and its global state."""

  def _repr_png_(self) -> bytes:
    return png(self, dpi=80)


def speed_ups(suites: Mapping[str, Measured], c: Comparison) -> Figure:
  """Speed-ups by suite, or by family where there is one suite: interquartile means, intervals and single tasks.

  Args:
    suites: What was measured, by suite.
    c: One of the comparisons.
  """
  rows = dict(suites) if len(suites) > 1 else {k: {k: v} for k, v in next(iter(suites.values())).items()}
  shown = [(name, color) for name, color in colors(c) if color != _OTHER_COLOR]
  first = next(iter(next(iter(rows.values())).values()))
  there = next(iter(first.values()))[0].speed_up
  rivals = [rival for rival in RIVALS if rival in there]
  figure = Shown(figsize=(3.4 * len(rivals) + 0.8, 1.5 + 0.13 * len(rows) * (len(shown) + 1)), layout="constrained")
  panels = figure.subplots(1, len(rivals), sharey=True, squeeze=False)[0]
  for axes, rival in zip(panels, rivals, strict=True):
    drawn = [(name, color) for name, color in shown if name != rival]
    for i, measured in enumerate(rows.values()):
      for k, (name, color) in enumerate(drawn):
        families = [own[_tuned_row(own, name)] for own in measured.values()]
        y = i + 0.8 * ((k + 0.5) / len(drawn) - 0.5)
        s = summarize(families).speed_up[rival]
        axes.plot([m.speed_up[rival].value for f in families for m in f], [y] * sum(map(len, families)), "|",
                  color=color, alpha=0.3, markersize=5)  # fmt: skip
        axes.plot([s.low, s.high], [y, y], color=color, linewidth=2, solid_capstyle="butt")
        axes.plot([s.value], [y], "o", color=color, markersize=5)
    for i in range(1, len(rows)):
      axes.axhline(i - 0.5, color="#eeeeee", linewidth=0.8, zorder=0)
    axes.axvline(1, color="#555555", linewidth=0.8, zorder=0)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    ticks = [x for x in (0.25, 0.5, 1, 2, 4, 8, 16) if low <= x <= high]
    axes.set_xticks(ticks, [f"{x:g}×" for x in ticks])
    axes.minorticks_off()
    axes.set_title(f"over {over(rival)}", fontsize=10)
    _plain_axes(axes, "x")
  panels[0].set_yticks(range(len(rows)), list(rows))
  panels[0].set_ylim(len(rows) - 0.5, -0.5)
  figure.supxlabel("speed-up: steps that the rival needs to the same final loss", fontsize=9)
  marks = [Line2D([], [], color=color, marker="o", markersize=5, linewidth=2, label=name) for name, color in shown]
  figure.legend(handles=marks, loc="outside upper center", ncols=min(6, len(shown)), frameon=False, fontsize=9)
  return figure


def rate_curves(comparisons: Mapping[str, Comparison]) -> Figure:
  """Final loss against learning rate, relative to tuned AdamW's: the geometric mean over each comparison's tasks."""
  columns = min(4, math.ceil(math.sqrt(len(comparisons))))
  rows = math.ceil(len(comparisons) / columns)
  figure = Shown(figsize=(3.0 * columns, 2.3 * rows + 0.8), layout="constrained")
  panels = figure.subplots(rows, columns, squeeze=False)
  for axes in panels.flat[len(comparisons) :]:
    axes.set_visible(False)
  for axes, (title, c) in zip(panels.flat, comparisons.items(), strict=False):
    for name, color in reversed(colors(c)):
      x, y = _by_rate(c, name)
      if len(x) == 1:  # of one that takes no learning rate
        axes.axhline(y[0], color=color, linewidth=1.2, linestyle=":", label=name)
      else:
        label = "other baselines" if color == _OTHER_COLOR else name
        wide = name in c.learned or name == CONTROL
        axes.plot(x, y, color=color, linewidth=1.8 if wide else 0.9, label=label, zorder=3 if wide else 2)
      if (rate := c.recommended.get(name)) is not None:
        axes.plot([rate], np.interp(np.log([rate]), np.log(x), y), "o", color=color, markersize=5, zorder=4)
    axes.axhline(1, color="#555555", linewidth=0.8, zorder=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    lowest = min(float(np.nanmin(_by_rate(c, name)[1])) for name in c.roles)
    axes.set_ylim(0.8 * lowest, 5)
    ticks = [x for x in (1e-4, 1e-3, 0.01, 0.03, 0.1, 0.3, 1, 3) if x >= 0.8 * lowest]
    axes.set_yticks(ticks, [f"{x:g}" for x in ticks])
    axes.minorticks_off()
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=8)
    _plain_axes(axes, "both")
  handles = {}
  for handle, label in zip(*panels[0, 0].get_legend_handles_labels(), strict=True):
    handles[label] = handle
  figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=5, frameon=False, fontsize=8)
  figure.supylabel(f"final loss ÷ tuned {REFERENCE}'s", fontsize=9)
  figure.supxlabel("learning rate, in each optimizer's unit (dots: recommended)", fontsize=9)
  return figure


def training_curves(c: Comparison, own: Mapping[Row, Sequence[Measures]], loss_label: str = LOSS) -> Figure:
  """Training curves with each task's best learning rates: the mean over all tasks, and each of the first six."""
  num_tasks = len(c.tasks)
  num_panels = min(num_tasks, _MAX_TASK_PANELS) if num_tasks > 1 else 0
  columns = math.ceil(num_panels / 2)
  # Not pyplot, whose figures are global. Small, so that the letters can be read where a page scales it down.
  figure = Shown(figsize=(4.8 + 1.6 * columns, 4.2), layout="constrained")
  grid = figure.add_gridspec(2, 1 + columns, width_ratios=[2.6] + [1.0] * columns)
  large = figure.add_subplot(grid[:, 0])
  _draw_curves(large, c, own, range(num_tasks))
  large.set_ylabel(loss_label)
  large.set_xlabel("inner step")
  large.set_title(f"Mean over {num_tasks} held-out tasks" if num_panels else "A held-out task", fontsize=10)
  large.legend(frameon=False, fontsize=8)
  small = None
  for index in range(num_panels):
    row, column = divmod(index, columns)
    small = figure.add_subplot(grid[row, 1 + column], sharey=small)
    _draw_curves(small, c, own, [index])
    small.set_title(f"Task {index + 1}", fontsize=9)
    small.set_xticks([0, c.num_steps])
    small.tick_params(labelsize=8, labelleft=column == 0, labelbottom=index + columns >= num_panels)
  figure.supxlabel(textwrap.fill(caption(c), int(15 * figure.get_figwidth())), fontsize=7.5, color="#555555")
  return figure


def all_training_curves(comparisons: Mapping[str, Comparison], measured: Measured) -> Figure:
  """A panel for each comparison: the mean training curves over its tasks."""
  columns = min(4, math.ceil(math.sqrt(len(comparisons))))
  rows = math.ceil(len(comparisons) / columns)
  figure = Shown(figsize=(3.2 * columns, 2.6 * rows + 0.7), layout="constrained")
  panels = figure.subplots(rows, columns, squeeze=False)
  for axes in panels.flat[len(comparisons) :]:
    axes.set_visible(False)
  for axes, (title, c) in zip(panels.flat, comparisons.items(), strict=False):
    _draw_curves(axes, c, measured[title], range(len(c.tasks)))
    axes.set_title(title, fontsize=10)
    axes.tick_params(labelsize=8)
  panels[0, 0].legend(frameon=False, fontsize=8)
  figure.supylabel(LOSS, fontsize=9)
  first = next(iter(comparisons.values()))
  text = textwrap.fill(f"Inner steps. {caption(first)}", int(15 * figure.get_figwidth()))
  figure.supxlabel(text, fontsize=7.5, color="#555555")
  return figure


def meta_training_curves(records: Sequence[Mapping[str, float | int | None]]) -> Figure:
  """While meta-training: the meta-loss of the episodes as they go, the mean loss on the periodic evaluation's tasks.

  Args:
    records: Of the metrics, as in metrics.jsonl; each has its outer `step`. Of a mixture each family is drawn too.
  """
  figure = Shown(figsize=(7.2, 3.4), layout="constrained")
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
        values = _smooth_for_the_eye(values)
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


def colors(c: Comparison) -> list[tuple[str, str]]:
  """All optimizers with their colours, the same in all pictures; many baselines are grey."""
  learned = list(zip(c.learned, itertools.cycle(_LEARNED_COLORS), strict=False))
  others = [(name, _CONTROL_COLOR) for name, role in c.roles.items() if role == "control"]
  return [*learned, *others, *((name, _BASELINE_COLORS.get(name, _OTHER_COLOR)) for name in c.baselines)]


def caption(c: Comparison) -> str:
  """What lines and bands of training curves are."""
  return (
    f"Lines: means over {c.num_seeds} seeds. Bands: lowest to highest seed. Smoothed. Learning rates: of the lowest "
    "final loss, for each task on the other seeds."
  )


def _tuned_row(own: Mapping[Row, Sequence[Measures]], name: str) -> Row:
  return (name, EACH) if (name, EACH) in own else (name, NONE)


def _by_rate(c: Comparison, name: str) -> tuple[np.ndarray, np.ndarray]:
  """Learning rates that were tried on all tasks, and the geometric mean over these of the loss relative to AdamW."""
  sweeps = c.sweeps[name]
  rates = sorted(set.intersection(*(set(s.rates) for s in sweeps)))
  ratios = [
    [
      max(s.runs.final_loss[:, s.rates.index(rate)].mean(), 1e-12) / max(reference.tuned_losses.mean(), 1e-12)
      for rate in rates
    ]
    for s, reference in zip(sweeps, c.sweeps[REFERENCE], strict=True)
  ]
  return np.array(rates), np.exp(np.mean(np.log(ratios), axis=0))


def _draw_curves(axes: Axes, c: Comparison, own: Mapping[Row, Sequence[Measures]], tasks: Sequence[int]) -> None:
  """The curves of all optimizers, averaged over some of the tasks."""
  steps = (np.arange(own[next(iter(own))][0].curve.shape[-1]) + 0.5) / own[next(iter(own))][0].curve.shape[-1]
  values = []
  last_grey = [name for name, color in colors(c) if color == _OTHER_COLOR][-1:]
  for name, color in colors(c):
    learned, grey = name in c.learned, color == _OTHER_COLOR
    style = {"color": color, "zorder": 3 if learned else 1 if grey else 2}
    seeds = _smooth_for_the_eye(np.mean([own[_tuned_row(own, name)][i].curve for i in tasks], axis=0))
    label = ("other baselines" if name in last_grey else None) if grey else name
    width = 2 if learned else 0.7 if grey else 1.4
    axes.plot(steps * c.num_steps, seeds.mean(axis=0), linewidth=width, label=label, **style)
    if not grey:
      axes.fill_between(steps * c.num_steps, seeds.min(axis=0), seeds.max(axis=0), alpha=0.2, linewidth=0, **style)
    values.append(seeds.mean(axis=0))
  if np.nanmin(values) > 0 and np.nanmax(values) > 10 * np.nanmin(values):
    axes.set_yscale("log")
    axes.set_ylim(bottom=np.nanmin(values) / 2)  # a band's lower side may go down to nothing
  axes.set_xlim(0, c.num_steps)
  _plain_axes(axes, "both")


def _plain_axes(axes: Axes, grid: str) -> None:
  axes.spines[["top", "right"]].set_visible(False)
  axes.grid(axis=grid, color="#e8e8e8", linewidth=0.5)  # pyright: ignore[reportArgumentType]
  axes.set_axisbelow(True)


def _smooth_for_the_eye(curves: Float[np.ndarray, "*seeds points"]) -> Float[np.ndarray, "*seeds points"]:
  """The trailing mean over a tenth of the points so far, at most 5% of all: the first ones stay sharp."""
  points = curves.shape[-1]
  sums = np.cumsum(np.concatenate([np.zeros((*curves.shape[:-1], 1)), curves], axis=-1), axis=-1)
  end = np.arange(1, points + 1)
  length = np.clip(end // 10, 1, max(1, points // 20))
  return (sums[..., end] - sums[..., end - length]) / length
