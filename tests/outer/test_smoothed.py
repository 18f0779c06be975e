"""Estimators against the gradient of the smoothed objective, integrated numerically, on a nonlinear problem.

An episode of T steps is cut into windows, each with its own perturbation ε_w of the scalar θ. The objective is the
mean over ε of Σ_t L_t, an integral over as many dimensions as there are perturbations, by Gauss-Hermite quadrature.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lopt import base
from lopt.outer import es, forward, pes

T, SIGMA = 5, 0.3
THETA = jnp.float32(0.4)
REPLICATES, PAIRS, WINDOWS, BURN_IN = 32, 128, 120, 5  # 120 windows hold whole cycles for every K below


def first_state():
  return jnp.float32(0.8)


def inner_step(theta, s):
  s = s + theta * jnp.sin(s) + 0.3
  return s, jnp.exp(-theta * s)


def problem():
  return base.UnrolledProblem(
    lambda key: jnp.int32(T), lambda key, num_steps: first_state(), lambda theta, s, key: inner_step(theta, s)
  )


def smoothed_gradient(owners, nodes=24):
  """∇_θ E[Σ_t L_t] where step t has the perturbation number owners[t]."""
  x, weights = np.polynomial.hermite_e.hermegauss(nodes)
  numbers = sorted(set(owners))
  points = np.array(list(itertools.product(SIGMA * x, repeat=len(numbers))))
  mass = np.prod(np.array(list(itertools.product(weights / weights.sum(), repeat=len(numbers)))), axis=1)

  def objective(theta):
    def total(epsilon):
      s, losses = first_state(), 0.0
      for owner in owners:
        s, loss = inner_step(theta + epsilon[numbers.index(owner)], s)
        losses += loss
      return losses

    return jnp.sum(mass * jax.vmap(total)(jnp.asarray(points)))

  with jax.enable_x64(True):
    return float(jax.grad(objective)(float(THETA)))


def owners(unroll_length, offset, noise_windows):
  """Whose perturbation each step has, for an episode that begins `offset` steps into a window."""
  return [((offset + t) // unroll_length) // noise_windows for t in range(T)]


def expected(unroll_length, noise_windows):
  """The mean over episodes, which in lockstep begin at every offset that is a multiple of gcd(T, K) equally often."""
  offsets = range(0, unroll_length, np.gcd(T, unroll_length))
  return np.mean([smoothed_gradient(owners(unroll_length, o, noise_windows)) for o in offsets]) / T


@partial(jax.jit, static_argnums=0)
def replicated_means(build):
  estimator = build(problem())

  def replicate(key):
    init_key, key = jax.random.split(key)
    state = estimator.init(init_key, THETA)

    def window(state, key):
      gradient, state, _ = estimator.estimate(key, THETA, state)
      return state, gradient

    _, gradients = jax.lax.scan(window, state, jax.random.split(key, BURN_IN * T + WINDOWS))
    return jnp.mean(gradients[BURN_IN * T :])

  return jax.vmap(replicate)(jax.random.split(jax.random.key(0), REPLICATES))


def assert_mean(means, exact):
  means = np.asarray(means)
  error = np.std(means, ddof=1) / np.sqrt(len(means))
  assert error <= 0.02 * abs(exact), "too noisy to catch a wrong weight"
  assert abs(np.mean(means) - exact) < 4 * error, f"{np.mean(means)} ± {error}, not {exact}"


@pytest.mark.slow_but_for("3-pes", "3-nres")
@pytest.mark.parametrize("noise_windows", [1, 2, 5], ids=["pes", "gpes", "nres"])
@pytest.mark.parametrize("unroll_length", [2, 3, 5])
def test_noise_reuse_has_the_smoothed_gradient(unroll_length, noise_windows):
  build = partial(
    pes.build,
    num_pairs=PAIRS,
    sigma=SIGMA,
    unroll_length=unroll_length,
    noise_period=noise_windows * unroll_length,
    stagger=False,
    pairs_per_block=PAIRS,
  )
  assert_mean(replicated_means(build), expected(unroll_length, noise_windows))


def test_full_es_has_the_smoothed_gradient():
  build = partial(es.build, num_pairs=PAIRS, sigma=SIGMA, pairs_per_block=PAIRS)
  assert_mean(replicated_means(build), smoothed_gradient([0] * T) / T)


def test_uoro_has_the_plain_gradient():
  def total(theta):
    s, losses = first_state(), 0.0
    for _ in range(T):
      s, loss = inner_step(theta, s)
      losses += loss
    return losses

  build = partial(forward.build, method="uoro", num_runs=PAIRS, unroll_length=1, stagger=False, runs_per_block=PAIRS)
  assert_mean(replicated_means(build), float(jax.grad(total)(THETA)) / T)


def test_the_quadrature_has_converged():
  for owner in ([0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 1, 1, 2]):
    np.testing.assert_allclose(smoothed_gradient(owner), smoothed_gradient(owner, nodes=32), rtol=1e-3)


def test_these_gradients_can_be_told_apart():
  """Smoothing matters here, and how perturbations are shared too, by more than the tests above allow for."""
  different = [expected(2, 1), expected(3, 1), expected(5, 1), expected(2, 2)]
  assert np.min(np.abs(np.subtract.outer(different, different))[~np.eye(4, dtype=bool)]) > 0.03 * max(different)
