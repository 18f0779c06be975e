"""Measures of final losses, and what sums them up over tasks: NumPy that knows nothing of how runs are made.

Where they come from:

- speed-up: the number of steps that a rival needs to the loss that an optimizer ends with, as Metz et al. 2022 (VeLO,
  arXiv 2211.09760, figure 1) have it for tuned Adam. There it is read off the rival's training curves; here the rival
  is trained anew for each length, with a schedule that ends there, since a curve is not at its best before its
  schedule has ended;
- final loss relative to a rival's, and the interquartile mean over tasks of both: Moudgil et al. 2025, "Celo"
  (arXiv 2501.12670; there the ratio is the other way up, so that more is better);
- interquartile mean with bootstrap intervals: Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the
  Statistical Precipice" (arXiv 2108.13264). There runs are drawn for tasks that are given; here tasks are drawn.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

NUM_RESAMPLES = 1000
"""Of the bootstrap."""
CONFIDENCE = 0.95
PRECISION = 1e-6
"""To which relative difference two losses are the same."""
ZERO = 1e-7
"""Losses up to this are the same, and are rounding: float32 tells a probability from 1 by 6e-8 at best."""


class SpeedUp(NamedTuple):
  """How many times as many steps a rival takes."""

  value: float
  bound: Literal["", "≥", "≤"] = ""
  """'≥' where the rival does not get there in the longest of its runs, '≤' where it does in the shortest."""


def speed_up(goal: float, lengths: Sequence[float], losses: Sequence[float]) -> SpeedUp:
  """The length of the rival's run that ends with the loss `goal`.

  Between two lengths the logarithm of the loss is straight in that of the length. Where a longer run ends with a
  higher loss than a shorter one, the shorter one counts. Where both are at zero after as many steps, it is 1: nothing
  tells them apart.

  Args:
    goal: The loss that the optimizer ends with after a run of length 1.
    lengths: Of the rival's runs, ascending.
    losses: That these end with.
  """
  goal, losses = max(goal, ZERO), [max(loss, ZERO) for loss in losses]
  if goal == ZERO == dict(zip(lengths, losses, strict=True)).get(1.0):
    return SpeedUp(1.0)
  highest = goal + PRECISION * abs(goal)  # means of the same float32 numbers differ by how they are added up
  reached = [loss <= highest for loss in losses]
  if not any(reached):
    return SpeedUp(lengths[-1], "≥")
  i = reached.index(True)
  if i == 0:
    return SpeedUp(lengths[0], "" if losses[0] >= goal - PRECISION * abs(goal) else "≤")
  before, here, there = (math.log(x) for x in (losses[i - 1], goal, losses[i]))
  share = min((before - here) / (before - there), 1.0) if before > there else 1.0
  return SpeedUp(lengths[i - 1] * (lengths[i] / lengths[i - 1]) ** share)


def cross_fit(losses: Float[np.ndarray, "seeds rates"]) -> Int[np.ndarray, " seeds"]:
  """For each seed the learning rate, by index, whose mean loss over all the other seeds is the lowest.

  So that no run is reported at a rate that was chosen for it. A single seed has none but itself.
  """
  others = losses.sum(axis=0) - losses if len(losses) > 1 else losses
  return np.argmin(others, axis=1)


def regret(losses: Float[np.ndarray, "tasks rates"]) -> Float[np.ndarray, " rates"]:
  """How much is lost by one learning rate for all tasks: the mean over tasks of log(loss / lowest loss)."""
  logs = np.log(np.maximum(losses, ZERO))
  return np.mean(logs - logs.min(axis=1, keepdims=True), axis=0)


class Interval(NamedTuple):
  """An estimate with its confidence interval; NaN bounds where no family has more than one task."""

  value: float
  low: float
  high: float


def interquartile_mean(values: Float[np.ndarray, "*some tasks"]) -> Float[np.ndarray, "*some"]:
  """The mean of the middle half, over the last axis: without the lowest and the highest quarter, rounded down."""
  from scipy import stats  # here, as it takes as long to import as JAX

  return np.asarray(stats.trim_mean(values, 0.25, axis=-1))


def summarize(families: Sequence[Float[np.ndarray, " _"]]) -> Interval:
  """The interquartile mean over all tasks, and its 95% percentile interval of the bootstrap over each family's tasks.

  It is about other tasks of the same families, and other seeds: measured values differ by both, so that drawing seeds
  as well would count them twice. With n tasks a family it is √((n - 1) / n) times as wide as it should be.
  """
  rng = np.random.default_rng(0)  # the same for all optimizers
  families = [x for x in families if len(x)]
  if not families:
    return Interval(np.nan, np.nan, np.nan)
  resamples = np.concatenate([rng.choice(x, (NUM_RESAMPLES, len(x))) for x in families], axis=1)
  tail = 50 * (1 - CONFIDENCE)
  low, high = np.percentile(interquartile_mean(resamples), [tail, 100 - tail])
  if max(map(len, families)) < 2:
    low = high = np.nan
  return Interval(float(interquartile_mean(np.concatenate(families))), float(low), float(high))


def standard_error(values: Float[np.ndarray, " seeds"]) -> float:
  """Of the mean; NaN for a single one."""
  return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")
