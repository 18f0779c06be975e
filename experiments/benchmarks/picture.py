"""Draws what the benchmarks measured: throughput against pairs, cores and parameters, and the cost of an update.

    python experiments/benchmarks/picture.py [--folder=runs/benchmarks]

It reads what `throughput.py`, `scaling.py` and `update_cost.py` wrote there; what they did not measure is left out.
`make bench` runs all four. Points are medians over rounds, bars go from the lowest to the highest.
"""

import collections
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from lopt import command_line, configuration

FOLDER = flags.DEFINE_string("folder", "runs/benchmarks", "Of the figures; speed.png is written into it.")

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLORS = {
  "tensor_mlp, as a direction": "#D55E00",
  "tensor_mlp": "#999999",
  "mlp": "#000000",
  "adafactor_mlp": "#E69F00",
  "lstm": "#CC79A7",
  "Adam": "#0072B2",
  "Muon": "#009E73",
}


class Point(NamedTuple):
  """One case, over its rounds."""

  curve: str
  x: float
  values: list[float]


def main(argv: list[str]) -> None:
  del argv
  folder = Path(FOLDER.value)
  figures = {name: list(_lines(folder / f"{name}.jsonl")) for name in ("throughput", "scaling", "update_cost")}
  if not any(figures.values()):
    raise configuration.ConfigError(
      f"--folder: nothing in {folder}; run throughput.py, scaling.py and update_cost.py before"
    )
  throughput = [(*line["case"].split("/"), line) for line in figures["throughput"] if "seconds" in line]
  updates = [(*line["case"].rsplit("/", 2), line) for line in figures["update_cost"] if "seconds" in line]
  figure = Figure(figsize=(9.5, 7), layout="constrained")
  panels = figure.subplots(2, 2).flat
  _draw(
    next(panels),
    _points(
      (name, int(pairs), line["inner_steps_per_second"])
      for name, task, pairs, length, line in throughput
      if (task, length) == ("mlp8", "20")
    ),
    ("pairs of PES", "inner steps in a second", "images of 8 × 8, 2,410 parameters, K = 20"),
  )
  _draw(
    next(panels),
    _points(
      ("64 pairs" if kind == "strong" else "32 pairs a core", int(cores), line["inner_steps_per_second"])
      for kind, cores, line in ((*line["case"].split("/"), line) for line in figures["scaling"] if "seconds" in line)
      if cores.isdigit()
    ),
    ("cores", "inner steps in a second", "`mlp` on images of 8 × 8, K = 20"),
  )
  _draw(
    next(panels),
    _points(
      (
        name,
        line["parameter_updates_per_second"] / line["inner_steps_per_second"],
        line["parameter_updates_per_second"] / 1e6,
      )
      for name, _, pairs, length, line in throughput
      if (pairs, length) == ("8", "20")
    ),
    (
      "parameters of the inner network",
      "million updates of a parameter in a second",
      "meta-training, 8 pairs, K = 20",
    ),
  )
  _draw(
    next(panels),
    _points(
      (_label(name), line["parameters"], 1e3 * line["seconds"]) for name, tree, _, line in updates if tree == "mlp"
    ),
    ("parameters", "milliseconds", "one update of an MLP"),
  )
  path = folder / "speed.png"
  figure.savefig(path, dpi=120)
  print(f"The picture is {path}.")


def _lines(path: Path) -> Iterator[dict[str, Any]]:
  if path.exists():
    yield from (line for line in map(json.loads, path.read_text("utf-8").splitlines()) if "against" not in line)


def _label(name: str) -> str:
  wrapped, _, own = name.rpartition("/")
  return f"{own}, as a direction" if wrapped else {"adam": "Adam", "muon": "Muon"}.get(name, name)


def _points(measured: Iterator[tuple[str, float, float]]) -> list[Point]:
  cases: dict[tuple[str, float], list[float]] = collections.defaultdict(list)
  for curve, x, value in measured:
    cases[curve, x].append(value)
  return [Point(curve, x, values) for (curve, x), values in sorted(cases.items())]


def _draw(axes: Axes, points: list[Point], texts: tuple[str, str, str]) -> None:
  """One panel, with the texts of its axes and above it; counts, of cores or pairs, are marked one by one."""
  x_text, y_text, title = texts
  of_counts = x_text in ("cores", "pairs of PES")
  others = iter(("#000000", "#0072B2"))
  for curve in dict.fromkeys(point.curve for point in points):
    own = [point for point in points if point.curve == curve]
    middle = [statistics.median(point.values) for point in own]
    spread = [
      [m - min(p.values) for m, p in zip(middle, own, strict=True)],
      [max(p.values) - m for m, p in zip(middle, own, strict=True)],
    ]
    color = COLORS.get(curve) or next(others)
    axes.errorbar(
      [p.x for p in own], middle, yerr=spread, marker="o", markersize=4, capsize=2, color=color, label=curve
    )
  axes.set_xscale("log", base=2 if of_counts else 10)
  axes.set_yscale("log")
  axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
  axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.10g}")
  axes.yaxis.set_minor_locator(NullLocator())
  if of_counts:
    ticks = sorted({point.x for point in points})
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
  axes.set_xlabel(x_text)
  axes.set_ylabel(y_text)
  axes.set_title(title, fontsize=10)
  axes.grid(axis="y", color="#eeeeee", linewidth=0.8)
  axes.spines[["top", "right"]].set_visible(False)
  if points:
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.3)  # room for the legend
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
  else:
    axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="#777777")


if __name__ == "__main__":
  command_line.run(main)
