"""Evolution strategies over full unrolls, and over truncated ones (the biased comparison).

I. Rechenberg, "Evolutionsstrategie", 1973; T. Salimans et al., "Evolution Strategies as a Scalable Alternative to
Reinforcement Learning", 2017; as compared with in section 4 of Vicol et al., ICML 2021.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lopt import base, checks
from lopt.outer import unrolls, vectors


class FullState(NamedTuple):
  """Full unrolls begin afresh each time."""

  index: Int[Array, " N"]  # a pair's number among all pairs, from which its random numbers derive
  mean_horizon: Float[Array, " N"]  # E[T], the same for every pair


class TruncatedState(NamedTuple):
  """N inner runs under the mean θ, from which each window's antithetic pairs depart."""

  index: Int[Array, " N"]  # a pair's number among all pairs, from which its random numbers derive
  episodes: unrolls.Episodes  # state leaves are [N, ...]


def build(
  problem: base.UnrolledProblem,
  *,
  num_pairs: int = 32,
  sigma: float = 0.01,
  unroll_length: int | None = None,
  stagger: bool = True,
  pairs_per_block: int | None = None,
) -> base.GradientEstimator:
  """Evolution strategies with antithetic pairs, ε_i ~ N(0, σ²I).

  Full (`unroll_length=None`): every estimate unrolls each pair over an episode of its own, from beginning to end,

      ĝ = 1/N Σ_i ε_i Σ_t (L_t^+ - L_t^-) / (2σ² E[T]),

  unbiased for the gradient of the loss smoothed by N(0, σ²I). One estimate costs T inner steps a particle.

  Truncated (`unroll_length=K`): pairs depart from inner runs that advance under the unperturbed θ,

      ĝ = 1/N Σ_i ε_i Σ_{t in window} (L_t^+ - L_t^-) / (2σ²K),

  which leaves out how θ shaped the state that the window began with, and so is biased whenever K < T.

  Args:
    problem: What is unrolled.
    num_pairs: N, antithetic pairs; a pair's particles share everything but the sign of ε.
    sigma: σ, standard deviation of the perturbations.
    unroll_length: K, inner steps between two estimates; None for whole episodes.
    stagger: Truncated only: whether runs are spread over the ages of an episode, or run in lockstep.
    pairs_per_block: Pairs that advance together; None: as many as stay in the cache of a CPU, all on an accelerator.

  Raises:
    ValueError: For counts below 1 or σ ≤ 0.
  """
  checks.counts(num_pairs=num_pairs, pairs_per_block=pairs_per_block)
  vectors.check_sigma(sigma)
  if unroll_length is None:
    return _full(problem, num_pairs, sigma, pairs_per_block)
  checks.counts(unroll_length=unroll_length)
  return _truncated(problem, num_pairs, sigma, unroll_length, stagger, pairs_per_block)


def _full(
  problem: base.UnrolledProblem, num_pairs: int, sigma: float, pairs_per_block: int | None
) -> base.GradientEstimator:
  def init(key: base.PRNGKey, theta: base.Theta) -> FullState:
    del theta
    return FullState(jnp.arange(num_pairs), jnp.full(num_pairs, unrolls.mean_horizon(problem, key)))

  def estimate(key: base.PRNGKey, theta: base.Theta, state: FullState) -> tuple[base.Theta, FullState, base.Metrics]:
    flat, unravel = vectors.ravel(theta)

    def unroll_block(index: Int[Array, " N"]) -> tuple[Float[Array, "N P"], unrolls.Losses]:
      keys = jax.vmap(jax.random.split)(unrolls.group_keys(key, index))
      epsilon = vectors.perturbations(keys[:, 0], sigma, flat)
      thetas = vectors.perturbed(flat, epsilon, signs=(1, -1))
      return epsilon, unrolls.unroll_episode(problem, thetas, unravel, keys[:, 1])

    epsilon, losses = unrolls.in_blocks(unroll_block, problem, theta, pairs_per_block, state.index)
    gradients = vectors.antithetic_gradients(epsilon, losses.first, sigma, state.mean_horizon[0])
    metrics = unrolls.metrics(gradients, losses, state.mean_horizon[0])
    return unravel(jnp.mean(gradients, axis=0)), state, metrics

  return base.GradientEstimator(init, estimate)


def _truncated(
  problem: base.UnrolledProblem,
  num_pairs: int,
  sigma: float,
  unroll_length: int,
  stagger: bool,
  pairs_per_block: int | None,
) -> base.GradientEstimator:
  def init(key: base.PRNGKey, theta: base.Theta) -> TruncatedState:
    del theta
    index = jnp.arange(num_pairs)
    return TruncatedState(index, unrolls.before_first(problem, key, index, particles=(), stagger=stagger))

  def estimate(
    key: base.PRNGKey, theta: base.Theta, state: TruncatedState
  ) -> tuple[base.Theta, TruncatedState, base.Metrics]:
    flat, unravel = vectors.ravel(theta)

    def advance_block(
      state: TruncatedState,
    ) -> tuple[TruncatedState, Float[Array, "N P"], unrolls.Losses]:
      keys = jax.vmap(jax.random.split)(unrolls.group_keys(key, state.index))
      epsilon = vectors.perturbations(keys[:, 0], sigma, flat)
      thetas = vectors.perturbed(flat, epsilon, signs=(1, -1, 0))
      start = state.episodes._replace(state=unrolls.copies(state.episodes.state, 3))
      end, losses = unrolls.unroll_window(problem, thetas, unravel, start, keys[:, 1], unroll_length)
      mean_run = jax.tree.map(lambda x: x[:, 2], end.state)
      return TruncatedState(state.index, end._replace(state=mean_run)), epsilon, losses

    state, epsilon, losses = unrolls.in_blocks(advance_block, problem, theta, pairs_per_block, state)
    gradients = vectors.antithetic_gradients(epsilon, losses.first + losses.rest, sigma, unroll_length)
    return unravel(jnp.mean(gradients, axis=0)), state, unrolls.metrics(gradients, losses, unroll_length)

  return base.GradientEstimator(init, estimate)
