"""Measures of training curves, and what sums them up over tasks: NumPy that knows nothing of how runs are made.

Where the measures come from:

- speed-up over tuned Adam: Metz et al. 2022, "VeLO: Training Versatile Learned Optimizers by Scaling Up"
  (arXiv 2211.09760), figure 1: "the relative number of steps it takes learning-rate-tuned Adam to achieve the same
  loss each optimizer reaches", with the lower envelope of Adam's curves over its learning rates;
- final loss relative to tuned Adam's, and the interquartile mean over tasks of both: Moudgil et al. 2025, "Celo"
  (arXiv 2501.12670; there the ratio is the other way up, so that more is better);
- interquartile mean with stratified bootstrap intervals: Agarwal et al. 2021, "Deep Reinforcement Learning at the
  Edge of the Statistical Precipice" (arXiv 2108.13264).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from scipy import stats

FINAL_SHARE = 0.05
"""The share of the steps over which the final training loss, and each point of a smoothed curve, is a mean."""
NUM_RESAMPLES = 1000
"""Of the bootstrap."""
CONFIDENCE = 0.95
PRECISION = 1e-6
"""To which relative difference two losses are the same."""
RESOLUTION = 200
"""Points per horizon at which the envelope is kept, all steps of shorter ones: speed-ups are exact to 1/200."""


def window(num_steps: int) -> int:
  """The length of the window of `smooth` for runs of a length: 5% of the steps, at least one."""
  return max(1, round(FINAL_SHARE * num_steps))


def smooth(curve: Float[np.ndarray, "*runs steps"], width: int) -> Float[np.ndarray, "*runs windows"]:
  """The trailing mean of a curve over `width` steps, along the last axis.

  Only whole windows: entry i is the mean of the losses of steps i+1, …, i+width, as known after step i+width.
  """
  return np.lib.stride_tricks.sliding_window_view(curve, width, axis=-1).mean(axis=-1)


class Ladder(NamedTuple):
  """Adam's smoothed training curves at all of its learning rates, beyond the horizon T."""

  steps: Int[np.ndarray, " points"]
  """The numbers of steps after which they are known: from `window(T)` to the runs' length, T among them."""
  curves: Float[np.ndarray, "tasks seeds rates points"]


def ladder(losses: Float[np.ndarray, "tasks seeds rates steps"], num_steps: int) -> Ladder:
  """Smooths runs of T or more steps with the window of T, at `RESOLUTION` points per T."""
  width, stride, last = window(num_steps), max(1, num_steps // RESOLUTION), losses.shape[-1]
  steps = np.unique(
    np.concatenate([np.arange(num_steps, width - 1, -stride), np.arange(num_steps, last, stride), [last]])
  )
  sums = np.cumsum(np.pad(losses.astype(np.float64), ((0, 0),) * 3 + ((1, 0),)), axis=-1)
  return Ladder(steps, ((sums[..., steps] - sums[..., steps - width]) / width).astype(np.float32))


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

  Args:
    final_loss: What the optimizer reached: its smoothed loss after T steps.
    lowest: Adam's `envelope`.
    steps: The numbers of steps of the envelope's points.
    num_steps: T.

  Returns:
    The speed-up, and whether it is a lower bound only: where Adam's runs end before they reach the loss, their length
    counts. (Nor is there less than 5%, the first window.)
  """
  # Losses are means of float32: Adam's own best rate reaches its own final loss, however they were added up.
  reached = lowest <= (final_loss + PRECISION * np.abs(final_loss))[..., None]
  never = np.asarray(~reached.any(axis=-1))
  return np.where(never, steps[-1], steps[reached.argmax(axis=-1)]) / num_steps, never


def resampled_means(
  values: Float[np.ndarray, "tasks seeds *rest"], seed: int
) -> Float[np.ndarray, "tasks resamples *rest"]:
  """Means over seeds drawn with replacement, task by task: the stratified bootstrap.

  Whatever has the same number of tasks and seeds is resampled alike, so that runs of different optimizers from the
  same start stay together.
  """
  num_tasks, num_seeds = values.shape[:2]
  draws = np.random.default_rng(seed).integers(num_seeds, size=(num_tasks, NUM_RESAMPLES, num_seeds))
  weights = (draws[..., None] == np.arange(num_seeds)).mean(axis=2)
  return np.stack([np.tensordot(w, x, axes=1) for w, x in zip(weights, values.astype(np.float32), strict=True)])


class Interval(NamedTuple):
  """An estimate with its confidence interval; NaN bounds where there is one seed only."""

  value: float
  low: float
  high: float


def interquartile_mean(values: Float[np.ndarray, "*some tasks"]) -> Float[np.ndarray, "*some"]:
  """The mean of the middle half, over the last axis: without the lowest and the highest quarter, rounded down."""
  return np.asarray(stats.trim_mean(values, 0.25, axis=-1))


def summarize(values: Float[np.ndarray, " tasks"], resamples: Float[np.ndarray, "resamples tasks"]) -> Interval:
  """The interquartile mean over tasks, with the 95% percentile interval of the stratified bootstrap over seeds.

  The tasks are taken as given: the interval is about other seeds, not about other tasks.
  """
  tail = 50 * (1 - CONFIDENCE)
  low, high = np.percentile(interquartile_mean(resamples), [tail, 100 - tail])
  return Interval(float(interquartile_mean(values)), float(low), float(high))


def ranks(losses: Shaped[np.ndarray, "optimizers tasks"]) -> Float[np.ndarray, "optimizers tasks"]:
  """The place of each optimizer on each task by its loss, 1 the lowest; equal ones share the mean of their places."""
  return np.asarray(stats.rankdata(losses, axis=0), np.float64)


def standard_error(values: Float[np.ndarray, " seeds"]) -> float:
  """Of the mean; NaN for a single one."""
  return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")
