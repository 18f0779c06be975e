"""Persistent Evolution Strategies: unbiased gradients from short unrolls.

P. Vicol, L. Metz, J. Sohl-Dickstein, "Unbiased Gradient Estimation in Unrolled Computation Graphs with Persistent
Evolution Strategies", ICML 2021, algorithm 2.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lopt import base, checks
from lopt.outer import unrolls


class PESState(NamedTuple):
  """N antithetic pairs of particles in the middle of their episodes."""

  index: Int[Array, " N"]  # a pair's number among all pairs, from which its random numbers derive
  episodes: unrolls.Episodes  # state leaves are [N, 2, ...]: particles θ + ε and θ - ε
  xi: Float[Array, "N P"]  # ξ: sum of the perturbations that the current episode has seen


def build(
  problem: base.UnrolledProblem,
  *,
  num_pairs: int = 32,
  sigma: float = 0.01,
  unroll_length: int = 20,
  stagger: bool = True,
  pairs_per_block: int = 1,
) -> base.GradientEstimator:
  """PES with antithetic pairs.

  In each window of K steps every pair i draws ε_i ~ N(0, σ²I) and continues its two inner runs with θ ± ε_i. With
  ξ_i = Σ of the ε_i of the windows that the episode has seen, this one included, and L_i^± the sum of the window's
  losses,

      ĝ = 1/N Σ_i [ξ_i (L_i^+ - L_i^-)_old + ε_i (L_i^+ - L_i^-)_new] / (2σ²K).

  Old losses are those of the episode that was running when the window began; new ones are those of episodes that
  began inside the window, which have seen ε_i alone and leave ξ_i = ε_i. This weighting (the paper only treats K
  that divide T) makes the mean of ĝ over the windows of an episode unbiased for any horizon and any K.

  Args:
    problem: What is unrolled.
    num_pairs: N, antithetic pairs; a pair's particles share everything but the sign of ε.
    sigma: σ, standard deviation of the perturbations.
    unroll_length: K, inner steps between two estimates.
    stagger: Whether pairs are spread over the ages of an episode (the first one of each is cut short at random).
      Otherwise all run in lockstep.
    pairs_per_block: Pairs that advance together. Few keep the working set in the cache, which pays on CPUs; an
      accelerator wants many.

  Returns:
    The estimator. Time ∝ NK and memory ∝ N, whatever the horizon.

  Raises:
    ValueError: For counts below 1 or σ ≤ 0.
  """
  checks.counts(num_pairs=num_pairs, unroll_length=unroll_length, pairs_per_block=pairs_per_block)
  unrolls.check_sigma(sigma)

  def init(key: base.PRNGKey, theta: base.Theta) -> PESState:
    index = jnp.arange(num_pairs)
    flat, _ = unrolls.ravel(theta)
    episodes = unrolls.before_first(problem, key, index, particles=(2,), stagger=stagger)
    return PESState(index, episodes, jnp.zeros((num_pairs, flat.size), flat.dtype))

  def estimate(key: base.PRNGKey, theta: base.Theta, state: PESState) -> tuple[base.Theta, PESState, base.Metrics]:
    flat, unravel = unrolls.ravel(theta)

    def advance_block(state: PESState) -> tuple[PESState, Float[Array, "N P"], unrolls.Losses]:
      keys = jax.vmap(jax.random.split)(unrolls.group_keys(key, state.index))
      epsilon = unrolls.perturbations(keys[:, 0], sigma, flat)
      thetas = unrolls.perturbed(flat, epsilon, signs=(1, -1))
      episodes, losses = unrolls.unroll_window(problem, thetas, unravel, state.episodes, keys[:, 1], unroll_length)
      xi_old = state.xi + epsilon
      gradients = unrolls.antithetic_gradients(xi_old, losses.first, sigma, unroll_length)
      gradients += unrolls.antithetic_gradients(epsilon, losses.rest, sigma, unroll_length)
      xi = jnp.where(losses.restarted[:, None], epsilon, xi_old)
      return PESState(state.index, episodes, xi), gradients, losses

    state, gradients, losses = unrolls.in_blocks(advance_block, pairs_per_block, state)
    return unravel(jnp.mean(gradients, axis=0)), state, unrolls.metrics(gradients, losses, unroll_length)

  return base.GradientEstimator(init, estimate)
