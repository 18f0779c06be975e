"""Inner steps that are longer or shorter than the optimizer means them to be, by factors that it is not told.

Optimizers that are meta-trained on some kinds of networks take steps as large as these bear, and fall apart on others
that bear less. With hidden factors they have to find out, from losses and gradients, how large a step may be. Domain
randomization (Tobin et al. 2017, arXiv:1703.06907), of the size of steps.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lopt import base, checks


class ScaledStepsState(NamedTuple):
  """The wrapped problem's state, and the factors of this episode."""

  inner: base.State
  factors: base.PyTree  # a scalar for each tensor of the inner parameters


def wrap(problem: base.UnrolledProblem, spread: float) -> base.UnrolledProblem:
  """Inner training whose parameters move by c_i Δp_i where the optimizer moves tensor i by Δp_i.

  For every episode log c_i = s (z + z_i / 2) is drawn, with z and z_i from the standard normal distribution: one
  factor for all tensors, and a smaller one for each.

  Args:
    problem: States have a field `params`, as those of `inner_training`.
    spread: s.

  Raises:
    ValueError: s is not at least 0 and finite.
  """
  checks.require(0 <= spread < math.inf, "step_spread", spread, "at least 0 and finite")

  def init(key: base.PRNGKey, horizon: base.Horizon) -> ScaledStepsState:
    inner_key, factors_key = jax.random.split(key)
    inner = problem.init(inner_key, horizon)
    leaves, structure = jax.tree.flatten(inner.params)
    z = jax.random.normal(factors_key, (1 + len(leaves),))
    factors = jnp.exp(spread * (z[0] + z[1:] / 2))
    return ScaledStepsState(inner, structure.unflatten(list(factors)))

  def step(theta: base.Theta, state: ScaledStepsState, key: base.PRNGKey) -> tuple[ScaledStepsState, base.Scalar]:
    inner, loss = problem.step(theta, state.inner, key)
    params = jax.tree.map(lambda c, p, q: p + c * (q - p), state.factors, state.inner.params, inner.params)
    return ScaledStepsState(inner._replace(params=params), state.factors), loss

  return base.UnrolledProblem(problem.horizon, init, step, problem.loss_cap)
