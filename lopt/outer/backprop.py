"""Backpropagation through time: through whole episodes, and truncated (the biased comparison).

P. J. Werbos, "Backpropagation through time: what it does and how to do it", 1990; truncated: R. J. Williams, J. Peng,
"An efficient gradient-based algorithm for on-line training of recurrent network trajectories", 1990. Memory:
A. Griewank, "Achieving logarithmic growth of temporal and spatial complexity in reverse automatic differentiation",
1992; T. Chen et al., "Training deep nets with sublinear memory cost", 2016.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Key

from lopt import base, checks
from lopt.outer import unrolls, vectors

KEPT_BYTES = 2**29  # of states, one for each step of a block of episodes


class FullState(NamedTuple):
  """Whole episodes begin afresh each time."""

  index: Int[Array, " N"]  # a run's number among all runs, from which its random numbers derive
  mean_horizon: Float[Array, " N"]  # E[T], the same for every run


class TruncatedState(NamedTuple):
  """N inner runs under θ."""

  index: Int[Array, " N"]  # a run's number among all runs, from which its random numbers derive
  episodes: unrolls.Episodes  # state leaves are [N, 1, ...]


def build(
  problem: base.UnrolledProblem,
  *,
  num_runs: int = 32,
  unroll_length: int | None = 20,
  max_horizon: int | None = None,
  discount: float = 1.0,
  stagger: bool = True,
  clip_norm: float | None = None,
  runs_per_block: int | None = None,
) -> base.GradientEstimator:
  """Backpropagation through time.

  Truncated (`unroll_length=K`, TBPTT): runs continue from window to window, and derivatives stop at its beginning,

      ĝ = 1/N Σ_i ∇_θ Σ_{t in window} L_t(s_start, θ) / K,   s_start constant,

  which leaves out how θ shaped the state that the window began with, and so is biased whenever K < T.

  Full (`unroll_length=None`, `max_horizon=T_max`): every estimate differentiates whole episodes,

      ĝ = 1/N Σ_i ∇_θ Σ_t L_t / E[T],

  unbiased. Only states between steps are kept, and what a step computes is computed again on the way back. Where
  T_max of them would need more than `KEPT_BYTES`, an episode is cut into √T_max segments, whose steps are computed
  once more, and about 2√T_max states are kept.

  Discounted (`discount=γ`, of whole episodes): a derivative is multiplied by γ whenever it passes from a step to the
  one before, ∂s_t = γ A_t ∂s_{t-1} + B_t ∂θ with the step's Jacobians A and B. So what θ did k steps ago counts γ^k
  times, as in temporal differences: a smooth form of truncation, and as biased as one to about 1/(1 - γ) steps, with
  which gradients no longer explode where training is a little chaotic.

  A run with a capped loss and a gradient that is not finite contributes 0, and is counted in the metric `diverged`.
  Gradients through chaotic training explode long before (L. Metz et al., "Understanding and correcting pathologies in
  the training of learned optimizers", 2019), so that one run outweighs all the others; `clip_norm` bounds each one's
  share, at the price of bias.

  Args:
    problem: What is unrolled; its step must be differentiable.
    num_runs: N, inner runs, each with random numbers of its own.
    unroll_length: K, inner steps between two estimates; None for whole episodes.
    max_horizon: T_max, of whole episodes only: the longest horizon that the problem draws.
    discount: γ, of whole episodes only; 1 is the unbiased gradient.
    stagger: Truncated only: whether runs are spread over the ages of an episode, or run in lockstep.
    clip_norm: The largest norm of a run's own ĝ_i; larger ones are scaled down to it before the mean over runs is
      taken, and those that are not finite count as 0. None: gradients as they are.
    runs_per_block: Runs that advance together; None: as many as stay in the cache of a CPU, all on an accelerator.

  Raises:
    ValueError: For counts below 1, a `clip_norm` that is not above 0 and finite, a `discount` that is not above 0 and
      at most 1 or not for whole episodes, not exactly one of `unroll_length` and `max_horizon`, or (where horizons
      can be drawn while building) horizons longer than `max_horizon`. Where that is only met later, the gradient is
      NaN.
  """
  checks.counts(num_runs=num_runs, runs_per_block=runs_per_block)
  if clip_norm is not None:
    checks.require(0 < clip_norm < math.inf, "clip_norm", clip_norm, "above 0 and finite")
  if (unroll_length is None) == (max_horizon is None):
    raise ValueError(
      "unroll_length: give it alone (truncated), or None and max_horizon, the longest horizon (whole episodes), "
      f"not {unroll_length} and max_horizon={max_horizon}"
    )
  checks.require(0 < discount <= 1, "discount", discount, "above 0 and at most 1")
  if unroll_length is not None:
    checks.counts(unroll_length=unroll_length)
    checks.require(discount == 1, "discount", discount, "1 where unroll_length is given: it is for whole episodes")
    return _truncated(problem, num_runs, unroll_length, stagger, clip_norm, runs_per_block)
  assert max_horizon is not None
  checks.counts(max_horizon=max_horizon)
  longest = jnp.max(jax.vmap(problem.horizon)(jax.random.split(jax.random.key(0), unrolls.HORIZON_SAMPLES)))
  if not isinstance(longest, Tracer) and longest > max_horizon:
    raise ValueError(f"max_horizon: the problem draws horizons of {longest} and more, longer than {max_horizon}")
  return _full(problem, num_runs, max_horizon, discount, clip_norm, runs_per_block)


def _truncated(
  problem: base.UnrolledProblem,
  num_runs: int,
  unroll_length: int,
  stagger: bool,
  clip_norm: float | None,
  runs_per_block: int | None,
) -> base.GradientEstimator:
  def init(key: base.PRNGKey, theta: base.Theta) -> TruncatedState:
    del theta
    index = jnp.arange(num_runs)
    return TruncatedState(index, unrolls.before_first(problem, key, index, particles=(1,), stagger=stagger))

  def estimate(
    key: base.PRNGKey, theta: base.Theta, state: TruncatedState
  ) -> tuple[base.Theta, TruncatedState, base.Metrics]:
    flat, unravel = vectors.ravel(theta)

    def advance_block(state: TruncatedState) -> tuple[TruncatedState, Float[Array, "N P"], unrolls.Losses]:
      keys = jax.vmap(jax.random.split)(unrolls.group_keys(key, state.index))[:, 1]
      episodes, losses, gradients_of = unrolls.differentiate_window(
        problem, flat, unravel, state.episodes, keys, unroll_length
      )
      return TruncatedState(state.index, episodes), gradients_of(1.0, 1.0) / unroll_length, losses

    state, gradients, losses = unrolls.in_blocks(advance_block, problem, theta, runs_per_block, state)
    gradients = _clipped(gradients, clip_norm)
    return unravel(jnp.mean(gradients, axis=0)), state, unrolls.metrics(gradients, losses, unroll_length)

  return base.GradientEstimator(init, estimate)


def _full(
  problem: base.UnrolledProblem,
  num_runs: int,
  max_horizon: int,
  discount: float,
  clip_norm: float | None,
  runs_per_block: int | None,
) -> base.GradientEstimator:
  def init(key: base.PRNGKey, theta: base.Theta) -> FullState:
    del theta
    return FullState(jnp.arange(num_runs), jnp.full(num_runs, unrolls.mean_horizon(problem, key)))

  def estimate(key: base.PRNGKey, theta: base.Theta, state: FullState) -> tuple[base.Theta, FullState, base.Metrics]:
    flat, unravel = vectors.ravel(theta)

    def differentiate_block(index: Int[Array, " N"]) -> tuple[Float[Array, "N P"], unrolls.Losses]:
      keys = jax.vmap(jax.random.split)(unrolls.group_keys(key, index))[:, 1]

      def total(thetas: Float[Array, "N 1 P"]) -> tuple[base.Scalar, unrolls.Losses]:
        losses = _unroll_episode(problem, thetas, unravel, keys, max_horizon, discount)
        return jnp.sum(losses.first), losses

      thetas = jnp.broadcast_to(flat, (len(index), 1, flat.size))
      gradients, losses = jax.grad(total, has_aux=True)(thetas)
      return unrolls.without_capped(gradients[:, 0], losses.diverged[:, 0]), losses

    gradients, losses = unrolls.in_blocks(differentiate_block, problem, theta, runs_per_block, state.index)
    gradients = _clipped(gradients / state.mean_horizon[0], clip_norm)
    metrics = unrolls.metrics(gradients, losses, state.mean_horizon[0])
    return unravel(jnp.mean(gradients, axis=0)), state, metrics

  return base.GradientEstimator(init, estimate)


def _clipped(gradients: Float[Array, "N P"], norm: float | None) -> Float[Array, "N P"]:
  """Each run's gradient scaled down to at most this norm; 0 for those that are not finite."""
  if norm is None:
    return gradients
  gradients = unrolls.finite_or_zero(gradients)
  # The square of a float32 above 10^19 overflows.
  largest = jnp.maximum(jnp.max(jnp.abs(gradients), axis=1, keepdims=True), 1.0)
  scaled = gradients / largest
  return scaled * jnp.minimum(largest, norm / jnp.linalg.norm(scaled, axis=1, keepdims=True))


def _unroll_episode(
  problem: base.UnrolledProblem,
  thetas: Float[Array, "N 1 P"],
  unravel: vectors.Unravel,
  keys: Key[Array, " N"],
  max_horizon: int,
  discount: float,
) -> unrolls.Losses:
  """`unrolls.unroll_episode`, same keys, in a form that reverse mode can go back through."""
  runs = keys.shape[0]
  state, horizon = unrolls.begin(problem, unrolls.split_step_keys(keys, 0)[:, 0], 1)

  def step(carry, t):
    running = t < horizon

    def advance(carry):
      state, total, diverged = carry
      state = _discounted(state, discount)
      step_keys = unrolls.split_step_keys(keys, t)[:, 1]
      new, loss, diverged_now = unrolls.advance(problem, thetas, unravel, state, step_keys)
      # A run that has ended stays where it is: beyond, its state might overflow, and reverse mode make NaN of it.
      state = unrolls.where_group(running, new, state)
      return state, total + jnp.where(running[:, None], loss, 0.0), diverged | (diverged_now & running[:, None])

    advance = jax.checkpoint(advance, prevent_cse=False)
    return jax.lax.cond(jnp.any(running), advance, lambda carry: carry, carry), None

  start = (state, jnp.zeros((runs, 1), thetas.dtype), jnp.zeros((runs, 1), bool))
  if max_horizon * sum(x.nbytes for x in jax.tree.leaves(state)) <= KEPT_BYTES:
    (_, total, diverged), _ = jax.lax.scan(step, start, jnp.arange(max_horizon))
  else:
    length = math.isqrt(max_horizon - 1) + 1

    def segment(carry, first):
      return jax.lax.scan(step, carry, first + jnp.arange(length))

    segments = length * jnp.arange(math.ceil(max_horizon / length))
    (_, total, diverged), _ = jax.lax.scan(jax.checkpoint(segment, prevent_cse=False), start, segments)
  total *= jnp.where(horizon > max_horizon, jnp.nan, 1.0)[:, None]
  return unrolls.Losses(total, jnp.zeros_like(total), horizon, jnp.zeros(runs, bool), diverged)


def _discounted(state: base.State, discount: float) -> base.State:
  """The same state, with derivatives through it multiplied by the discount."""
  if discount == 1:
    return state

  def weigh(x: Array) -> Array:
    # Not γ x + (1 - γ) x, which might round to something else than x.
    return x + (discount - 1) * (x - jax.lax.stop_gradient(x)) if jnp.issubdtype(x.dtype, jnp.floating) else x

  return jax.tree.map(weigh, state)
