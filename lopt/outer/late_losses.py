"""Losses that count the more the later they come, so that every estimator can be asked for where runs end.

Between the mean loss, of which most is the beginning, and the final one, whose differences are mostly noise.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp

from lopt import base, checks
from lopt.outer import unrolls


class LateLossesState(NamedTuple):
  """The wrapped problem's state, and where in the episode it is."""

  inner: base.State
  steps: base.Horizon  # t, taken so far
  horizon: base.Horizon  # T


def wrap(problem: base.UnrolledProblem, power: float) -> base.UnrolledProblem:
  """The problem with losses (q + 1) (t/T)^q L_t at steps t = 1 … T, whose weights have a mean of about 1.

  With q = 0 it is the mean loss; the mean age of what counts is (q + 1) / (q + 2) of the episode. A loss that is not
  below `loss_cap` counts as the cap with the largest weight, q + 1, so that estimators count it as diverged.

  Args:
    problem: What is unrolled.
    power: q.

  Raises:
    ValueError: q is not at least 0 and finite.
  """
  checks.require(0 <= power < math.inf, "late_power", power, "at least 0 and finite")

  def init(key: base.PRNGKey, horizon: base.Horizon) -> LateLossesState:
    return LateLossesState(problem.init(key, horizon), jnp.zeros((), jnp.int32), jnp.asarray(horizon, jnp.int32))

  def step(theta: base.Theta, state: LateLossesState, key: base.PRNGKey) -> tuple[LateLossesState, base.Scalar]:
    inner, loss = problem.step(theta, state.inner, key)
    steps = state.steps + 1
    loss, diverged = unrolls.bounded(loss, problem.loss_cap)
    weighted = (power + 1) * (steps / state.horizon) ** power * loss
    return LateLossesState(inner, steps, state.horizon), jnp.where(diverged, jnp.inf, weighted)

  return base.UnrolledProblem(problem.horizon, init, step, (power + 1) * problem.loss_cap)
