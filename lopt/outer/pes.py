"""Persistent Evolution Strategies: unbiased gradients from short unrolls.

P. Vicol, L. Metz, J. Sohl-Dickstein, "Unbiased Gradient Estimation in Unrolled Computation Graphs with Persistent
Evolution Strategies", ICML 2021, algorithm 2; PES+Analytic: its section on reducing the variance. With noise that is
kept for longer than one unroll: O. Li, J. Harrison, J. Sohl-Dickstein, V. Smith, L. Metz, "Variance-Reduced Gradient
Estimation via Noise-Reuse in Online Evolution Strategies", NeurIPS 2023 (GPES, NRES), and P. Vicol, "Low-Variance
Gradient Estimation in Unrolled Computation Graphs with ES-Single", ICML 2023.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lopt import base, checks
from lopt.outer import unrolls, vectors


class Noise(NamedTuple):
  """The perturbation that an episode goes on with, where it is kept for longer than one unroll."""

  epsilon: Float[Array, "N P"]
  windows_left: Int[Array, " N"]  # at 0, the next window draws another


class PESState(NamedTuple):
  """N antithetic pairs of particles in the middle of their episodes."""

  index: Int[Array, " N"]  # a pair's number among all pairs, from which its random numbers derive
  episodes: unrolls.Episodes  # state leaves are [N, 2, ...]: particles θ + ε and θ - ε; or [N, 3, ...], with θ
  xi: Float[Array, "N P"]  # ξ: sum of the perturbations that the current episode has seen
  noise: Noise | None


def build(
  problem: base.UnrolledProblem,
  *,
  num_pairs: int = 32,
  sigma: float = 0.01,
  unroll_length: int = 20,
  noise_period: int | None = None,
  analytic: bool = False,
  stagger: bool = True,
  pairs_per_block: int | None = None,
) -> base.GradientEstimator:
  """PES with antithetic pairs, and the estimators that differ from it by when noise is drawn.

  In each window of K steps every pair i draws ε_i ~ N(0, σ²I) and continues its two inner runs with θ ± ε_i. With
  ξ_i = Σ of the perturbations drawn for the episode so far, this window's included, and L_i^± the sum of the window's
  losses,

      ĝ = 1/N Σ_i [ξ_i (L_i^+ - L_i^-)_old + ε_i (L_i^+ - L_i^-)_new] / (2σ²K).

  Old losses are those of the episode that was running when the window began; new ones are those of episodes that
  began inside the window, which have seen ε_i alone and leave ξ_i = ε_i. This weighting (the paper only treats K
  that divide T) makes the mean of ĝ over the windows of an episode unbiased for any horizon and any K.

  Noise reuse: with a period W > K an episode keeps its perturbation for W/K windows before the next is drawn and
  added to ξ (generalised PES); with W at least the horizon it has one from beginning to end, and ξ_i = ε_i (NRES,
  ES-Single). An episode that begins inside a window does so with a perturbation of its own, ε_i of the second term.

  PES+Analytic: a third, unperturbed particle gives g_i, the backpropagated gradient of its losses within the window.
  It takes the place of this window's own perturbation, and is a control variate for those before, ξ_i - ε_i:

      ĝ = 1/N Σ_i [g_i,old + g_i,new + (ξ_i - ε_i) (L_i^+ - L_i^- - 2 ε_i·g_i)_old / (2σ²)] / K.

  Unbiased where smoothing over ε does not change the gradient within a window, as for quadratic losses of linear
  states.

  Args:
    problem: What is unrolled.
    num_pairs: N, antithetic pairs; a pair's particles share everything but the sign of ε.
    sigma: σ, standard deviation of the perturbations.
    unroll_length: K, inner steps between two estimates.
    noise_period: W, inner steps for which an episode keeps a perturbation, a multiple of K; None: K, which is PES.
    analytic: Whether to estimate by PES+Analytic; needs losses that are differentiable, and memory ∝ NK.
    stagger: Whether pairs are spread over the ages of an episode (the first one of each is cut short at random).
      Otherwise all run in lockstep.
    pairs_per_block: Pairs that advance together; None: as many as stay in the cache of a CPU, all on an accelerator.

  Returns:
    The estimator. Time ∝ NK and memory ∝ N, whatever the horizon.

  Raises:
    ValueError: For counts below 1, σ ≤ 0, a period that is no multiple of K, or a longer one with `analytic`.
  """
  checks.counts(num_pairs=num_pairs, unroll_length=unroll_length, pairs_per_block=pairs_per_block)
  vectors.check_sigma(sigma)
  noise_period = unroll_length if noise_period is None else noise_period
  checks.counts(noise_period=noise_period)
  if noise_period % unroll_length:
    longer = noise_period + unroll_length - noise_period % unroll_length
    raise ValueError(
      f"noise_period: must be a multiple of unroll_length={unroll_length}, such as {longer}, not {noise_period}"
    )
  windows = noise_period // unroll_length
  if analytic and windows > 1:
    raise ValueError(f"noise_period: must be unroll_length={unroll_length} where analytic is set, not {noise_period}")
  particles = 3 if analytic else 2

  def init(key: base.PRNGKey, theta: base.Theta) -> PESState:
    index = jnp.arange(num_pairs)
    flat, _ = vectors.ravel(theta)
    episodes = unrolls.before_first(problem, key, index, particles=(particles,), stagger=stagger)
    zeros = jnp.zeros((num_pairs, flat.size), flat.dtype)
    noise = Noise(zeros, jnp.zeros(num_pairs, jnp.int32)) if windows > 1 else None
    return PESState(index, episodes, zeros, noise)

  def estimate(key: base.PRNGKey, theta: base.Theta, state: PESState) -> tuple[base.Theta, PESState, base.Metrics]:
    flat, unravel = vectors.ravel(theta)

    def advance_block(state: PESState) -> tuple[PESState, Float[Array, "N P"], unrolls.Losses]:
      keys = jax.vmap(jax.random.split)(unrolls.group_keys(key, state.index))
      drawn = vectors.perturbations(keys[:, 0], sigma, flat)
      if state.noise is None:
        due, epsilon, thetas_of_new = jnp.ones(len(drawn), bool), drawn, None
      else:
        due = state.noise.windows_left == 0
        epsilon = unrolls.where_group(due, drawn, state.noise.epsilon)
        thetas_of_new = vectors.perturbed(flat, drawn, signs=(1, -1))
      thetas = vectors.perturbed(flat, epsilon, signs=(1, -1))
      pair = state.episodes._replace(state=jax.tree.map(lambda x: x[:, :2], state.episodes.state))
      episodes, losses = unrolls.unroll_window(
        problem, thetas, unravel, pair, keys[:, 1], unroll_length, thetas_of_new=thetas_of_new
      )
      xi_old = unrolls.where_group(due, state.xi + drawn, state.xi)
      if analytic:
        mean = state.episodes._replace(state=jax.tree.map(lambda x: x[:, 2:], state.episodes.state))
        mean, _, gradients_of = unrolls.differentiate_window(problem, flat, unravel, mean, keys[:, 1], unroll_length)
        g_old, g_new = gradients_of(1.0, 0.0), gradients_of(0.0, 1.0)
        explained = jnp.sum(epsilon * g_old, axis=1, keepdims=True) * jnp.array([[1.0, -1.0]])
        gradients = (g_old + g_new) / unroll_length
        gradients += vectors.antithetic_gradients(state.xi, losses.first - explained, sigma, unroll_length)
        both = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), episodes.state, mean.state)
        episodes = episodes._replace(state=both)
      else:
        gradients = vectors.antithetic_gradients(xi_old, losses.first, sigma, unroll_length)
        gradients += vectors.antithetic_gradients(drawn, losses.rest, sigma, unroll_length)
      xi = unrolls.where_group(losses.restarted, drawn, xi_old)
      noise = state.noise
      if noise is not None:
        left = jnp.where(due | losses.restarted, windows, noise.windows_left) - 1
        noise = Noise(unrolls.where_group(losses.restarted, drawn, epsilon), left)
      return PESState(state.index, episodes, xi, noise), gradients, losses

    state, gradients, losses = unrolls.in_blocks(advance_block, problem, theta, pairs_per_block, state)
    metrics = unrolls.metrics(gradients, losses, unroll_length)
    metrics["inner_steps"] = jnp.float32(particles * unroll_length)
    return unravel(jnp.mean(gradients, axis=0)), state, metrics

  return base.GradientEstimator(init, estimate)
