"""Evaluation from Python: optimizers of any kind beside tuned baselines on tasks that they never saw."""

import numbers
import os
import platform
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from matplotlib.figure import Figure

from lopt import base, configuration
from lopt.evaluation import baselines as hand_designed
from lopt.evaluation import comparison, held_out, inner_runs, pictures, report, report_page, suites, tables, timing
from lopt.evaluation.comparison import Comparison
from lopt.runs import files
from lopt.runs.trained import TrainedOptimizer
from lopt.tasks import contract

Families = base.TaskFamily | Collection[base.TaskFamily] | Mapping[str, base.TaskFamily] | str


class Result(NamedTuple):
  """What a comparison found; its measures are those of `comparison.Measures`."""

  comparisons: dict[str, Comparison]
  """By family."""
  about: report_page.About

  def table(self) -> str:
    """Markdown: final losses, speed-ups over tuned baselines, shares of tasks and runs that went badly."""
    return report.table_of_all(self.comparisons)

  def __repr__(self) -> str:
    return f"Result(families: {', '.join(self.comparisons)}); .table(), .plot(), .report(path), .records()"

  def _repr_markdown_(self) -> str:
    """What a notebook shows."""
    return self.table()

  def plot(self) -> Figure:
    """Speed-ups by family, with their intervals and single tasks; a notebook shows it when it is a cell's value."""
    first = next(iter(self.comparisons.values()))
    return pictures.speed_ups({"": comparison.measure(self.comparisons)}, first)

  def report(self, path: str | Path) -> Path:
    """Writes a page with all tables and curves, and needs no other file.

    Args:
      path: A .html file; or a folder, for report.html with its numbers and pictures beside it.

    Raises:
      OSError: It cannot be written.
    """
    compared, path = {"held-out tasks": self.comparisons}, Path(path)
    if path.suffix != ".html":
      return report_page.write(compared, path, self.about)
    files.write_atomically(path, report_page.page(compared, self.about, *report_page.images(compared)))
    return path

  def records(self) -> list[dict[str, Any]]:
    """One flat record for each family, task, optimizer and way of tuning."""
    found = []
    for family, rows in comparison.measure(self.comparisons).items():
      for (optimizer, tuning), measures in rows.items():
        for task, m in enumerate(measures):
          record = {"family": family, "task": task, "optimizer": optimizer, "tuning": tuning}
          record |= {"learning_rate": m.rate, "mean_loss": m.mean_loss, "final_loss": m.final_loss}
          record |= {"test_loss": m.test_loss, **m.test_metrics, "diverged": m.diverged}
          found.append(record | {f"speed_up_over_{tables.over(rival)}": x.value for rival, x in m.speed_up.items()})
    return found

  def to_dataframe(self) -> Any:
    """`records` as a pandas DataFrame.

    Raises:
      ImportError: pandas is not installed, which lopt does not need itself.
    """
    try:
      import pandas as pd  # pyright: ignore[reportMissingImports]
    except ImportError as error:
      raise ImportError("to_dataframe() needs pandas: pip install pandas; records() gives plain dicts") from error
    return pd.DataFrame(self.records())


def evaluate(
  optimizers: Mapping[str, TrainedOptimizer | tuple[base.LearnedOptimizer, base.Theta]],
  families: Families = "fresh",
  *,
  baselines: Collection[str] | str = ("adamw", "muon"),
  num_tasks: int | None = None,
  num_seeds: int | None = None,
  num_steps: int | None = None,
  seed: int = 0,
  cache_folder: str | Path | None = None,
  progress: Callable[[str], None] | None = print,
) -> Result:
  """Trains held-out tasks with the optimizers and with baselines, all tuned alike for each task.

      result = lopt.evaluate({"mine": run.optimizer, "shipped": lopt.load("tensor_mlp")}, [family])
      print(result.table())

  Args:
    optimizers: By the names that they get in tables: what `lopt.load` gives, or an architecture and its θ.
    families: One task family or several, with names or without; or the name of a suite of `lopt.evaluation.suites`.
    baselines: Functions of `lopt/evaluation/baselines.py`; AdamW is always there.
    num_tasks, num_seeds, num_steps: Tasks drawn of each family, runs of each task, and inner steps of each run; None:
      what the suite says, or 4, 3 and 200 for families of one's own.
    seed: Which tasks and runs.
    cache_folder: Where runs are kept for the next time; None: nowhere.
    progress: Is told what is about to run; None for silence.

  Raises:
    ValueError: An unknown baseline or suite, no optimizer, or what `held_out.compare` says; before any run.
  """
  example = 'give them by name, such as {"shipped": lopt.load("tensor_mlp")}'
  if not isinstance(optimizers, Mapping) or not optimizers:
    raise ValueError(f"optimizers: {example}")
  chosen = hand_designed.named((baselines,) if isinstance(baselines, str) else baselines)
  pairs = {}
  for name, x in optimizers.items():
    pair = (x.architecture, x.theta) if isinstance(x, TrainedOptimizer) else x
    if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], base.LearnedOptimizer):
      kind = type(x).__name__
      raise ValueError(
        f"optimizers: {name!r} is of type {kind}, no trained optimizer nor (architecture, θ); {example}"
      )
    pairs[name] = pair
  given = {"num_tasks": num_tasks, "num_seeds": num_seeds, "num_steps": num_steps}
  for option, value in {**given, "seed": seed}.items():
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if value is not None and (not whole or value < (option != "seed")):
      raise ValueError(f"{option}: must be a whole number of at least {int(option != 'seed')}, not {value!r}")
  compared = compare(
    {"": _members(families, int(seed))},
    pairs,
    settings={option: int(value) for option, value in given.items() if value is not None},
    baselines=chosen,
    cache_folder=cache_folder,
    progress=progress,
  )
  return Result(compared[""], about(optimizers, {"function": "lopt.evaluate", "seed": str(seed)}))


def compare(
  chosen: Mapping[str, Mapping[str, suites.Member]],
  optimizers: Mapping[str, tuple[base.LearnedOptimizer, base.Theta]],
  *,
  settings: Mapping[str, int],
  baselines: Sequence[str],
  cache_folder: str | Path | None,
  times: bool = False,
  progress: Callable[[str], None] | None,
) -> dict[str, dict[str, Comparison]]:
  """Trains with all optimizers on all members of suites: `{suite: {member: comparison}}`.

  Args:
    chosen: The members by suite.
    optimizers: Architectures with their θ, by the names that they get in tables.
    settings: In place of the members' own: `num_tasks`, `num_seeds` and `num_steps`.
    baselines: Names of `baselines.ALL`.
    cache_folder: Where runs are kept for the next time; None: nowhere.
    times: Whether to measure the time of a step too, on the first member of each suite, which stands for all.
    progress: Is told what is about to run; None for silence.

  Raises:
    ValueError: What `contract.check` and `held_out.compare` say; a family is checked before any run.
  """
  for members in chosen.values():
    for name, member in members.items():
      contract.check(member.family, name)
  compared = {}
  for suite, members in chosen.items():
    compared[suite] = {}
    for name, member in members.items():
      title = ": ".join(filter(None, (suite, name)))
      say = None if progress is None else lambda stage, title=title: progress(f"{title}: {stage}")
      options = {**member.options, **settings, "baseline_names": baselines, "cache_folder": cache_folder}
      found = held_out.compare(member.family, optimizers, **options, progress=say)
      if times and not compared[suite]:
        if say:
          say("timing")
        found = timing.with_times(found, member.family, optimizers)
      compared[suite][name] = found
  return compared


def _members(families: Families, seed: int) -> dict[str, suites.Member]:
  """The families by name, each with how it is to be compared."""
  if isinstance(families, str):
    return suites.build(families, seed=seed)
  named = contract.named(families, "tasks")
  seeds = inner_runs.seeds_of_families(seed, named)
  own = {"num_tasks": 4, "num_seeds": 3, "num_steps": 200}
  return {name: suites.Member(family, {**own, "seed": seeds[name]}) for name, family in named.items()}


def about(optimizers: Mapping[str, Any], facts: Mapping[str, str]) -> report_page.About:
  """What one has to know to repeat a comparison: these facts, the machine, versions, and how optimizers were made."""
  configurations = {name: x.config for name, x in optimizers.items() if isinstance(x, TrainedOptimizer)}
  horizons = {name: config.get("horizon", {}).get("maximum") for name, config in configurations.items()}
  versions = [f"{package} {metadata.version(package)}" for package in ("jax", "jaxlib", "optax", "numpy")]
  device = jnp.zeros(()).device
  return report_page.About(
    facts={
      **facts,
      "machine": f"{_processor()}, {os.cpu_count()} cores; {platform.system()} {platform.machine()}",
      "device": f"{getattr(device, 'platform', '')} ({getattr(device, 'device_kind', '')})",
      "versions": ", ".join([f"Python {platform.python_version()}", *versions]),
    },
    horizons={name: steps for name, steps in horizons.items() if isinstance(steps, int)},
    configurations={name: configuration.plain(config) for name, config in configurations.items()},
  )


def _processor() -> str:
  """Its name where the system tells it."""
  cpuinfo = Path("/proc/cpuinfo")
  lines = cpuinfo.read_text("utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
  names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
  return names[0] if names else platform.processor() or "unknown processor"
