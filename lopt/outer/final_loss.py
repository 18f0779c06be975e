"""The final loss as a sum over steps, so that every estimator can be asked for it.

Section on telescoping sums of Vicol, Metz, Sohl-Dickstein, ICML 2021.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lopt import base
from lopt.outer import unrolls


class FinalLossState(NamedTuple):
  """The wrapped problem's state, and what the episode's losses have come to."""

  inner: base.State
  steps_left: base.Horizon
  total: base.Scalar  # Σ p so far: the last loss, bounded
  diverged: jax.Array  # whether it was


def wrap(problem: base.UnrolledProblem) -> base.UnrolledProblem:
  """The problem with losses p_t = L_t - L_{t-1} (and L_0 = 0), whose sum over an episode is its final loss L_T.

  An estimator of ∇ E[Σ_t p_t] / E[T] then gives ∇ E[L_T] / E[T], from windows as short as before.

  Losses are bounded by the problem's `loss_cap` before they are subtracted; where that is finite, they must not be
  negative. The step on which a run diverges is reported by p_t = ∞, which estimators count and replace by the cap;
  the next p makes up for the difference. Not so if it is the last step, for which none would.
  """

  def init(key: base.PRNGKey, horizon: base.Horizon) -> FinalLossState:
    inner = problem.init(key, horizon)
    return FinalLossState(inner, jnp.asarray(horizon, jnp.int32), jnp.zeros(()), jnp.array(False))

  def step(theta: base.Theta, state: FinalLossState, key: base.PRNGKey) -> tuple[FinalLossState, base.Scalar]:
    inner, loss = problem.step(theta, state.inner, key)
    loss, diverged = unrolls.bounded(loss, problem.loss_cap)
    reported = diverged & ~state.diverged & (state.steps_left > 1)
    total = jnp.where(reported, state.total + problem.loss_cap, loss)
    p = jnp.where(reported, jnp.inf, loss - state.total)
    return FinalLossState(inner, state.steps_left - 1, total, diverged), p

  return base.UnrolledProblem(problem.horizon, init, step, problem.loss_cap)
