"""What a comparison of optimizers says: measures of every optimizer on every task, and their summaries.

How the measures are defined, and where they come from: `lopt.evaluation.measures`.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from lopt.evaluation import measures
from lopt.evaluation.measures import Interval

REFERENCE = "Adam"
"""The tuned baseline with which everything is compared."""
UNTUNED = "Adam at 1e-3"
"""The same with the learning rate that one takes who does not tune."""


TunedFor = Literal["mean_loss", "final_loss"]
"""The mean training loss of all steps, or the training loss after the last: of these `Measures` the lowest."""


class Runs(NamedTuple):
  """What inner training runs produced: losses in the family's common unit, capped at `family.loss_cap`."""

  losses: Float[Array | np.ndarray, "*runs steps"]
  """The training loss at each step: that of the step's minibatch, before the update."""
  train_losses: Float[Array | np.ndarray, "*runs points"]
  """The mean over fixed training batches, the same ones for all optimizers, after as many steps as were asked for."""
  held_out_loss: Float[Array | np.ndarray, "*runs"]
  """After step T, the mean over batches of the validation or the test split."""
  held_out_metrics: Mapping[str, Float[Array | np.ndarray, "*runs"]]
  """What else the family's loss function tells of these batches, such as `accuracy`, averaged likewise."""
  diverged: Bool[Array | np.ndarray, "*runs"]
  """Whether any of the losses until then was NaN or reached the cap."""


class Tuning(NamedTuple):
  """How a baseline's learning rate was chosen for one task."""

  learning_rates: tuple[float, ...]
  """Those tried, ascending."""
  losses: tuple[float, ...]
  """`tuned_for` of each, over tuning seeds."""
  best: float
  """The learning rate with the lowest."""
  interior: bool
  """Whether lower and higher ones were tried; if not, a better one may lie outside the grid."""


class Measures(NamedTuple):
  """One optimizer on one task. Losses are in the family's common unit, 1 = knowing nothing; `_error` is the standard
  error of the mean over seeds (NaN when there is only one).
  """

  mean_loss: float
  """Mean training loss over all steps and seeds: the area under the training curve."""
  mean_loss_error: float
  final_loss: float
  """Training loss after the last step, over fixed batches and seeds."""
  final_loss_error: float
  test_loss: float
  """Mean loss on the test split after the last step, over seeds."""
  test_loss_error: float
  test_metrics: dict[str, float]
  """Likewise what else the family tells, such as `accuracy`."""
  diverged: float
  """Share of the runs in which a loss was NaN or reached the cap."""
  speed_up: float
  """`measures.speed_up`: the steps that Adam, at the best of all learning rates for each number of steps, needs to
  get to `final_loss`, divided by T."""
  speed_up_is_bound: bool
  """Whether Adam did not get there in `REFERENCE_FACTOR` T steps, so that the speed-up is that much or more."""
  relative_loss: float
  """`final_loss` divided by tuned Adam's; NaN where that is not above 0."""
  rank: float
  """The place among all optimizers of the comparison by `final_loss`, 1 the lowest."""
  tuning: Tuning | None
  """How the learning rate was chosen; None where none was."""


class Evaluation(NamedTuple):
  """One optimizer on all tasks."""

  measures: tuple[Measures, ...]
  """One a task."""
  curves: Float[np.ndarray, "tasks seeds T"]
  """The training losses."""


class Envelope(NamedTuple):
  """What Adam reached at the best of all learning rates, see `measures.envelope`; of the mean over seeds."""

  steps: Int[np.ndarray, " points"]
  """The numbers of steps after which it was measured, beyond the horizon T: `measures.points`."""
  losses: Float[np.ndarray, "tasks points"]


class Comparison(NamedTuple):
  """Learned optimizers and baselines on the same held-out tasks, with the same seeds."""

  tasks: tuple[str, ...]
  """What tells each task from the others, in a few words."""
  num_steps: int
  """T."""
  num_seeds: int
  num_tuning_seeds: int
  tuned_for: TunedFor
  """What the learning rates of baselines were chosen by."""
  seed: int
  learned: dict[str, Evaluation]
  baselines: dict[str, Evaluation]
  """Tuned for each task; and Adam as it is."""
  envelope: Envelope
  seconds_per_step: dict[str, float]
  """Of one run alone, by `seconds_per_step`; empty where that was not measured."""

  @property
  def evaluations(self) -> dict[str, Evaluation]:
    """All of them by name, the learned ones first."""
    return self.learned | self.baselines


class Summary(NamedTuple):
  """One optimizer, over all tasks of one comparison or of several."""

  speed_up: Interval
  """The interquartile mean over tasks, with its interval for other tasks of the same families and other seeds;
  likewise the next."""
  relative_loss: Interval
  median_speed_up: float
  """The median over tasks."""
  bounds: int
  """The number of tasks on which the speed-up is a lower bound, with which it enters the mean."""
  num_tasks: int
  mean_loss: float
  """The mean over tasks; likewise the next five."""
  final_loss: float
  test_loss: float
  test_accuracy: float | None
  """Over those tasks that have one."""
  rank: float
  diverged: float
  mean_loss_error: float
  """The standard error of `mean_loss` over seeds; the tasks are taken as given."""
  tasks_won: dict[str, int]
  """For each (other) baseline: the number of tasks on which this optimizer's mean training loss is lower."""
  tasks_interior: int | None
  """The number of tasks whose best learning rate is interior to the grid; None where none was chosen."""
  relative_time: float | None
  """The time of a step divided by Adam's, the median over comparisons; None where it was not measured."""
  wall_clock_speed_up: float | None
  """The interquartile mean over tasks of speed-up divided by that."""


def summarize(comparisons: Sequence[Comparison], name: str) -> Summary:
  """One optimizer over all tasks of comparisons that have it."""
  evaluations = [c.evaluations[name] for c in comparisons]
  own = [m for e in evaluations for m in e.measures]
  speed_ups = np.array([m.speed_up for m in own])
  relative = [np.array([m.relative_loss for m in e.measures if not np.isnan(m.relative_loss)]) for e in evaluations]
  accuracies = [m.test_metrics["accuracy"] for m in own if "accuracy" in m.test_metrics]
  times = None
  if all(c.seconds_per_step for c in comparisons):
    times = [c.seconds_per_step[name] / c.seconds_per_step[REFERENCE] for c in comparisons]
  per_task = np.repeat(times or np.nan, [len(c.tasks) for c in comparisons] if times else len(own))
  rivals = [set(c.baselines) for c in comparisons]
  return Summary(
    speed_up=measures.summarize([np.array([m.speed_up for m in e.measures]) for e in evaluations]),
    relative_loss=measures.summarize(relative),
    median_speed_up=float(np.median(speed_ups)),
    bounds=sum(m.speed_up_is_bound for m in own),
    num_tasks=len(own),
    mean_loss=float(np.mean([m.mean_loss for m in own])),
    final_loss=float(np.mean([m.final_loss for m in own])),
    test_loss=float(np.mean([m.test_loss for m in own])),
    test_accuracy=float(np.mean(accuracies)) if accuracies else None,
    rank=float(np.mean([m.rank for m in own])),
    diverged=float(np.mean([m.diverged for m in own])),
    mean_loss_error=float(np.sqrt(np.sum(np.square([m.mean_loss_error for m in own]))) / len(own)),
    tasks_won={
      other: sum(
        m.mean_loss < o.mean_loss
        for c in comparisons
        for m, o in zip(c.evaluations[name].measures, c.baselines[other].measures, strict=True)
      )
      for other in comparisons[0].baselines
      if other != name and all(other in names for names in rivals)
    },
    tasks_interior=sum(m.tuning.interior for m in own if m.tuning) if any(m.tuning for m in own) else None,
    relative_time=float(np.median(times)) if times else None,
    wall_clock_speed_up=float(measures.interquartile_mean(speed_ups / per_task)) if times else None,
  )


def evaluate(
  runs: Mapping[str, Runs],
  tuning: Mapping[str, Sequence[Tuning]],
  envelope: Envelope,
  num_steps: int,
) -> dict[str, Evaluation]:
  """Measures of runs [tasks, seeds, ...] by optimizer, measured after T steps; `tuning` has those that were tuned."""
  num_tasks = len(runs[REFERENCE].held_out_loss)
  losses = {name: to_float64(x.losses) for name, x in runs.items()}
  finals = {name: to_float64(x.train_losses)[..., -1] for name, x in runs.items()}  # [tasks, seeds]
  final_loss = {name: x.mean(axis=1) for name, x in finals.items()}
  ranks = dict(zip(runs, measures.ranks(np.stack(list(final_loss.values()))), strict=True))
  reference = final_loss[REFERENCE]

  def of_one(name: str) -> Evaluation:
    speed_ups, bounds = measures.speed_up(final_loss[name], envelope.losses, envelope.steps, num_steps)
    relative_losses = np.divide(final_loss[name], reference, out=np.full(num_tasks, np.nan), where=reference > 0)
    test_loss, diverged = to_float64(runs[name].held_out_loss), to_float64(runs[name].diverged)
    metrics = {metric: to_float64(x) for metric, x in runs[name].held_out_metrics.items()}
    return Evaluation(
      tuple(
        Measures(
          mean_loss=float(losses[name][i].mean()),
          mean_loss_error=measures.standard_error(losses[name][i].mean(axis=1)),
          final_loss=float(final_loss[name][i]),
          final_loss_error=measures.standard_error(finals[name][i]),
          test_loss=float(test_loss[i].mean()),
          test_loss_error=measures.standard_error(test_loss[i]),
          test_metrics={metric: float(x[i].mean()) for metric, x in metrics.items()},
          diverged=float(diverged[i].mean()),
          speed_up=float(speed_ups[i]),
          speed_up_is_bound=bool(bounds[i]),
          relative_loss=float(relative_losses[i]),
          rank=float(ranks[name][i]),
          tuning=tuning[name][i] if name in tuning else None,
        )
        for i in range(num_tasks)
      ),
      losses[name],
    )

  return {name: of_one(name) for name in runs}


def to_float64(x: ArrayLike) -> np.ndarray:
  """In float64, so that means of many float32 are exact enough to be compared."""
  return np.asarray(x, np.float64)
