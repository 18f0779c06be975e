"""Measures of training curves, and what sums them up over tasks: NumPy that knows nothing of how runs are made.

Where the measures come from:

- speed-up over tuned Adam: Metz et al. 2022, "VeLO: Training Versatile Learned Optimizers by Scaling Up"
  (arXiv 2211.09760), figure 1: "the relative number of steps it takes learning-rate-tuned Adam to achieve the same
  loss each optimizer reaches", with the lower envelope of Adam's curves over its learning rates; losses are those of
  fixed training batches (see `evaluation`), because the minimum of many noisy losses would flatter Adam;
- final loss relative to tuned Adam's, and the interquartile mean over tasks of both: Moudgil et al. 2025, "Celo"
  (arXiv 2501.12670; there the ratio is the other way up, so that more is better);
- interquartile mean with bootstrap intervals: Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the
  Statistical Precipice" (arXiv 2108.13264). There runs are drawn for tasks that are given; here tasks are drawn.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from scipy import stats

NUM_POINTS = 20
"""Per horizon: after how many numbers of steps a run's training loss is measured. Adam's are interpolated between."""
NUM_RESAMPLES = 1000
"""Of the bootstrap."""
CONFIDENCE = 0.95
PRECISION = 1e-6
"""To which relative difference two losses are the same."""


def points(num_steps: int, total: int) -> Int[np.ndarray, " points"]:
  """The numbers of steps at which runs of `total` steps are measured, for the horizon T = `num_steps` ≤ `total`.

  0, T, `total` and `NUM_POINTS` in between per horizon, or every step of shorter ones.
  """
  stride = max(1, num_steps // NUM_POINTS)
  within, beyond = np.arange(num_steps, 0, -stride), np.arange(num_steps, total, stride)
  return np.unique(np.concatenate([[0], within, beyond, [total]]))


def envelope(curves: Float[np.ndarray, "*tasks rates points"]) -> Float[np.ndarray, "*tasks points"]:
  """The lowest loss that Adam has reached at any of its learning rates until then."""
  return np.minimum.accumulate(curves.min(axis=-2), axis=-1)


def speed_up(
  final_loss: Float[np.ndarray, "*tasks"],
  lowest: Float[np.ndarray, "*tasks points"],
  steps: Int[np.ndarray, " points"],
  num_steps: int,
) -> tuple[Float[np.ndarray, "*tasks"], Bool[np.ndarray, "*tasks"]]:
  """The steps that Adam needs to reach a loss, divided by the T steps that the optimizer took to get there.

  Adam is allowed the best of all its learning rates at every step: it is the envelope that has to reach the loss. So
  2 means that tuned Adam takes twice as long, and Adam itself, at its one best rate, is at 1 or a little below.

  Between two points of the envelope it is taken to be straight.

  Args:
    final_loss: What the optimizer reached after T steps.
    lowest: Adam's `envelope`.
    steps: The numbers of steps of the envelope's points.
    num_steps: T.

  Returns:
    The speed-up, and whether it is a lower bound only: where Adam's runs end before they reach the loss, their length
    counts.
  """
  # Losses are means of float32: Adam's own best rate reaches its own final loss, however they were added up.
  goal = final_loss + PRECISION * np.abs(final_loss)
  reached = lowest <= goal[..., None]
  never = np.asarray(~reached.any(axis=-1))
  after = np.where(never, len(steps) - 1, reached.argmax(axis=-1))
  before = np.maximum(after - 1, 0)
  high, low = (np.take_along_axis(lowest, index[..., None], axis=-1)[..., 0] for index in (before, after))
  # From the first point on there is no slope, and where Adam's runs end early none is needed.
  share = np.divide(high - goal, high - low, out=np.ones_like(goal), where=~never & (high > low))
  return (steps[before] + share * (steps[after] - steps[before])) / num_steps, never


class Interval(NamedTuple):
  """An estimate with its confidence interval; NaN bounds where no family has more than one task."""

  value: float
  low: float
  high: float


def interquartile_mean(values: Float[np.ndarray, "*some tasks"]) -> Float[np.ndarray, "*some"]:
  """The mean of the middle half, over the last axis: without the lowest and the highest quarter, rounded down."""
  return np.asarray(stats.trim_mean(values, 0.25, axis=-1))


def summarize(families: Sequence[Float[np.ndarray, " _"]]) -> Interval:
  """The interquartile mean over all tasks, and its 95% percentile interval of the bootstrap over each family's tasks.

  It is about other tasks of the same families, and other seeds: measured values differ by both, so that drawing seeds
  as well would count them twice. With n tasks a family it is √((n - 1) / n) times as wide as it should be.
  """
  rng = np.random.default_rng(0)  # the same for all optimizers
  resamples = np.concatenate([rng.choice(x, (NUM_RESAMPLES, len(x))) for x in families], axis=1)
  tail = 50 * (1 - CONFIDENCE)
  low, high = np.percentile(interquartile_mean(resamples), [tail, 100 - tail])
  if max(map(len, families)) < 2:
    low = high = np.nan
  return Interval(float(interquartile_mean(np.concatenate(families))), float(low), float(high))


def ranks(losses: Shaped[np.ndarray, "optimizers tasks"]) -> Float[np.ndarray, "optimizers tasks"]:
  """The place of each optimizer on each task by its loss, 1 the lowest; equal ones share the mean of their places."""
  return np.asarray(stats.rankdata(losses, axis=0), np.float64)


def standard_error(values: Float[np.ndarray, " seeds"]) -> float:
  """Of the mean; NaN for a single one."""
  return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")
