"""What a comparison of optimizers says: measures of every optimizer on every task, and their summaries.

An optimizer that takes a learning rate is there with three tunings: each task's best rate, one rate for all tasks,
and, of a learned direction, what it recommends. How measures are defined: `lopt.evaluation.measures`.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from lopt.evaluation import measures
from lopt.evaluation.inner_runs import Runs
from lopt.evaluation.measures import Interval, SpeedUp

REFERENCE = "AdamW"
"""The tuned baseline that is in every comparison."""
CONTROL = "θ = 0"
"""The untrained direction: what is no better has learned nothing."""
BEST = "best baseline"
"""Of each task, the baseline with the lowest final loss, each at the task's best learning rate."""
RIVALS = (REFERENCE, BEST, CONTROL)
"""Those over which speed-ups are told."""

Tuning = Literal["each task's", "one for all", "recommended", "none"]
"""The learning rate: each task's best, chosen on the other seeds; one for all tasks, chosen on those of the other
families; what the optimizer recommends; or that it takes none."""
EACH, ONE, RECOMMENDED, NONE = "each task's", "one for all", "recommended", "none"
Role = Literal["learned", "control", "baseline"]


class Sweep(NamedTuple):
  """One optimizer on one task at several learning rates."""

  rates: tuple[float, ...]
  """Ascending."""
  runs: Runs
  """[seeds, rates, ...]."""

  @property
  def best(self) -> int:
    """The learning rate of lowest final loss over all seeds, by index."""
    return int(np.argmin(self.runs.final_loss.mean(axis=0)))

  @property
  def tuned_losses(self) -> Float[np.ndarray, " seeds"]:
    """Each seed's final loss at the rate that is best for the others."""
    return of_seeds(self.runs, measures.cross_fit(np.asarray(self.runs.final_loss))).final_loss


Ladder = Mapping[float, Float[np.ndarray, " seeds"]]
"""Final losses by length, of runs whose schedules end there; 1 is the length of the comparison's runs."""


class Comparison(NamedTuple):
  """Learned optimizers, their untrained direction and baselines on the same held-out tasks of a family, with the same
  seeds.
  """

  tasks: tuple[str, ...]
  """What tells each task from the others, in a few words."""
  num_steps: int
  """T."""
  num_seeds: int
  seed: int
  roles: dict[str, Role]
  """Of every optimizer, learned ones first."""
  sweeps: dict[str, tuple[Sweep, ...]]
  """By optimizer, one a task."""
  recommended: dict[str, float | None]
  """The learning rate that each learned optimizer (and the control) recommends; None where it takes none."""
  ladders: dict[str, tuple[Ladder, ...]]
  """One a task of those baselines (and the control) that were trained at several lengths; empty where not."""
  seconds_per_step: dict[str, float]
  """Of one run alone, by `timing`, and of the gradient alone as `GRADIENT`; empty where that was not measured."""

  @property
  def learned(self) -> list[str]:
    return [name for name, role in self.roles.items() if role == "learned"]

  @property
  def baselines(self) -> list[str]:
    return [name for name, role in self.roles.items() if role == "baseline"]

  def tunings(self, name: str) -> list[Tuning]:
    """Those that an optimizer is reported with."""
    if self.roles[name] == "baseline":
      return [EACH, ONE]
    return [NONE] if self.recommended[name] is None else [EACH, ONE, RECOMMENDED]

  def best_baseline(self, task: int) -> str:
    """The one with the lowest final loss on a task."""
    return min(self.baselines, key=lambda name: self.sweeps[name][task].tuned_losses.mean())

  def ladder(self, rival: str, task: int) -> Ladder:
    """Of one of `RIVALS`; empty where there is none."""
    name = self.best_baseline(task) if rival == BEST else rival
    return self.ladders[name][task] if name in self.ladders else {}


GRADIENT = "gradient alone"


class Measures(NamedTuple):
  """One optimizer on one task. Losses are means over seeds in the family's common unit, 1 = knowing nothing."""

  mean_loss: float
  """Training loss over all steps: the area under the training curve."""
  final_loss: float
  """Training loss after the last step, over fixed batches."""
  final_loss_error: float
  """Its standard error over seeds, NaN of a single one."""
  test_loss: float
  """Loss on the test split after the last step."""
  test_metrics: dict[str, float]
  """Likewise what else the family tells, such as `accuracy`."""
  diverged: float
  """Share of the runs in which a training loss was NaN or reached the cap."""
  speed_up: dict[str, SpeedUp]
  """Over each of `RIVALS` that the comparison has, itself tuned for the task: see `measures.speed_up`."""
  relative_loss: float
  """`final_loss` divided by that of tuned AdamW; NaN where that is not above 0."""
  loss_of_tuning: float
  """`final_loss` divided by its own with each task's best rate; NaN where that is not above 0."""
  rate: float
  """The learning rate; of several seeds with different ones, that of the lowest mean loss."""
  interior: bool
  """Whether lower and higher ones than that were tried."""
  curve: Float[np.ndarray, "seeds points"]
  """The training losses."""


Row = tuple[str, Tuning]
"""An optimizer and how its learning rate was chosen."""


def of_seeds(runs: Runs, index: Int[np.ndarray, " seeds"]) -> Runs:
  """[seeds, rates, ...] -> [seeds, ...], each seed at its own learning rate."""
  return jax.tree.map(lambda x: np.asarray(x)[np.arange(len(index)), index], runs)


def measure(comparisons: Mapping[str, Comparison]) -> dict[str, dict[Row, tuple[Measures, ...]]]:
  """All measures of comparisons that are reported together: by comparison, row and task."""
  everyone = {name for c in comparisons.values() for name in c.roles}
  shared = {
    name: one_rate({title: c.sweeps[name] for title, c in comparisons.items() if name in c.sweeps})
    for name in everyone
  }

  def chosen(c: Comparison, title: str, name: str, task: int, tuning: Tuning) -> Int[np.ndarray, " seeds"]:
    sweep = c.sweeps[name][task]
    if tuning == EACH:
      return measures.cross_fit(np.asarray(sweep.runs.final_loss))
    if tuning == NONE:
      return np.zeros(c.num_seeds, int)
    rate = shared[name][title][task] if tuning == ONE else c.recommended[name]
    return np.full(c.num_seeds, sweep.rates.index(rate))

  return {
    title: {
      (name, tuning): tuple(_measure(c, name, i, chosen(c, title, name, i, tuning)) for i in range(len(c.tasks)))
      for name in c.roles
      for tuning in c.tunings(name)
    }
    for title, c in comparisons.items()
  }


def one_rate(sweeps: Mapping[str, Sequence[Sweep]]) -> dict[str, list[float]]:
  """The learning rate for all tasks, of one optimizer, as it is chosen for each task of each comparison.

  Of those tried on every task, it is the one with the least `measures.regret` on the tasks of all other comparisons;
  of a single comparison, on its other tasks; of a single task, on that.
  """
  rates = sorted(set.intersection(*(set(s.rates) for own in sweeps.values() for s in own)))
  losses = {
    title: np.array([[s.runs.final_loss[:, s.rates.index(rate)].mean() for rate in rates] for s in own])
    for title, own in sweeps.items()
  }

  def best(losses: Float[np.ndarray, "tasks rates"]) -> float:
    return rates[int(np.argmin(measures.regret(losses)))]

  if len(sweeps) > 1:
    return {
      title: [best(np.concatenate([x for other, x in losses.items() if other != title]))] * len(own)
      for title, own in sweeps.items()
    }
  ((title, only),) = losses.items()
  return {title: [best(np.delete(only, i, axis=0) if len(only) > 1 else only) for i in range(len(only))]}


def _measure(c: Comparison, name: str, task: int, chosen: Int[np.ndarray, " seeds"]) -> Measures:
  sweep = c.sweeps[name][task]
  runs = of_seeds(sweep.runs, chosen)
  final_loss = float(runs.final_loss.mean())
  rival = float(c.sweeps[REFERENCE][task].tuned_losses.mean())
  tuned = float(sweep.tuned_losses.mean())
  speed_ups = {}
  for reference in RIVALS:
    if ladder := c.ladder(reference, task):
      lengths = sorted(ladder)
      speed_ups[reference] = measures.speed_up(final_loss, lengths, [float(ladder[x].mean()) for x in lengths])
  used = sweep.best if len(set(chosen.tolist())) > 1 else int(chosen[0])
  return Measures(
    mean_loss=float(runs.mean_loss.mean()),
    final_loss=final_loss,
    final_loss_error=measures.standard_error(runs.final_loss),
    test_loss=float(runs.held_out_loss.mean()),
    test_metrics={metric: float(x.mean()) for metric, x in runs.held_out_metrics.items()},
    diverged=float(runs.diverged.mean()),
    speed_up=speed_ups,
    relative_loss=final_loss / rival if rival > 0 else np.nan,
    loss_of_tuning=final_loss / tuned if tuned > 0 else np.nan,
    rate=sweep.rates[used],
    interior=0 < used < len(sweep.rates) - 1,
    curve=runs.curve,
  )


class Summary(NamedTuple):
  """One optimizer, over the tasks of one family or of several."""

  speed_up: dict[str, Interval]
  """Over each rival: the interquartile mean over tasks, with its interval for other tasks of the same families and
  other seeds; likewise `relative_loss`. Bounds enter with their value."""
  at_least: dict[str, int]
  """Over each rival, the number of tasks on which the speed-up is a lower bound; likewise an upper one."""
  at_most: dict[str, int]
  slower: dict[str, float]
  """Over each rival, the share of tasks with a speed-up below 0.9."""
  relative_loss: Interval
  loss_of_tuning: float
  """The interquartile mean over tasks."""
  num_tasks: int
  final_loss: float
  """The mean over tasks; likewise the next ones."""
  mean_loss: float
  test_loss: float
  test_accuracy: float | None
  """Over those tasks that have one."""
  diverged: float
  interior: int
  """The number of tasks on whose learning rate is interior to those tried."""


def summarize(families: Sequence[Sequence[Measures]]) -> Summary:
  """One optimizer over tasks, given by family."""
  own = [m for family in families for m in family]
  rivals = [name for name in RIVALS if all(name in m.speed_up for m in own)]
  finite = [np.array([m.relative_loss for m in family if np.isfinite(m.relative_loss)]) for family in families]
  ratios = np.array([m.loss_of_tuning for m in own if np.isfinite(m.loss_of_tuning)])
  accuracies = [m.test_metrics["accuracy"] for m in own if "accuracy" in m.test_metrics]
  return Summary(
    speed_up={
      r: measures.summarize([np.array([m.speed_up[r].value for m in family]) for family in families]) for r in rivals
    },
    at_least={r: sum(m.speed_up[r].bound == "≥" for m in own) for r in rivals},
    at_most={r: sum(m.speed_up[r].bound == "≤" for m in own) for r in rivals},
    slower={r: float(np.mean([m.speed_up[r].value < 0.9 for m in own])) for r in rivals},
    relative_loss=measures.summarize(finite),
    loss_of_tuning=float(measures.interquartile_mean(ratios)) if len(ratios) else np.nan,
    num_tasks=len(own),
    final_loss=float(np.mean([m.final_loss for m in own])),
    mean_loss=float(np.mean([m.mean_loss for m in own])),
    test_loss=float(np.mean([m.test_loss for m in own])),
    test_accuracy=float(np.mean(accuracies)) if accuracies else None,
    diverged=float(np.mean([m.diverged for m in own])),
    interior=sum(m.interior for m in own),
  )


def relative_time(comparisons: Sequence[Comparison], name: str) -> float | None:
  """The time of a step divided by AdamW's, the median over the comparisons where both were measured."""
  times = [c.seconds_per_step for c in comparisons if {name, REFERENCE} <= c.seconds_per_step.keys()]
  return float(np.median([x[name] / x[REFERENCE] for x in times])) if times else None


def update_share(comparisons: Sequence[Comparison], name: str) -> float | None:
  """The share of a step that is the optimizer's update; the median likewise."""
  times = [c.seconds_per_step for c in comparisons if {name, GRADIENT} <= c.seconds_per_step.keys()]
  return float(np.median([max(0.0, 1 - x[GRADIENT] / x[name]) for x in times])) if times else None
