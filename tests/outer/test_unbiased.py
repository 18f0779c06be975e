"""PES and ES against exact gradients, on a problem whose smoothed objective has the same gradient as the plain one.

The state is linear in θ and the loss quadratic, so Gaussian smoothing adds a constant only, and the mean of every
unbiased estimator is the gradient that `jax.grad` gives of the whole unroll, at any σ, horizon and unroll length.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lopt import base
from lopt.outer import backprop, es, forward, pes

A = jnp.array([[0.8, 0.3], [-0.2, 0.9]])
B = jnp.array([[1.0, 0.5, 0.0], [0.0, -0.5, 1.0]])
THETA = {"a": jnp.array([0.6, -0.4]), "b": jnp.array(0.8)}
SIGMA = 0.3
REPLICATES, PAIRS, WINDOWS, BURN_IN = 32, 64, 70, 30  # 70 windows hold whole cycles for every T and K below


@pytest.fixture(autouse=True, scope="module")
def with_optimizations():
  """Here running takes longer than compiling."""
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", True)


def vector(theta):
  return jnp.append(theta["a"], theta["b"])


def loss_weight(t):
  """Differs from step to step, so that a loss given to the wrong episode or perturbation shows."""
  return 1.0 + 0.5 * jnp.sin(2.0 * t)


def problem(minimum, maximum):
  """s_t = A s_{t-1} + B θ + x_t, L_t = w_t |s_t - 1|²/2, with T uniform in minimum..maximum (may be traced)."""

  def horizon(key):
    return jax.random.randint(key, (), minimum, maximum + 1)

  def init(key, num_steps):
    del num_steps
    return 0.3 * jax.random.normal(key, (2,)), jnp.int32(0)

  def step(theta, state, key):
    s, t = state
    s = A @ s + B @ vector(theta) + 0.3 * jax.random.normal(key, (2,))
    return (s, t + 1), loss_weight(t) * 0.5 * jnp.sum(jnp.square(s - 1))

  return base.UnrolledProblem(horizon, init, step)


def exact_gradient(minimum, maximum):
  """∇ E[Σ_t L_t] / E[T]: noise of mean zero does not enter the gradient of a quadratic."""

  def total(theta, num_steps):
    s, sum_of_losses = jnp.zeros(2), 0.0
    for t in range(num_steps):
      s = A @ s + B @ vector(theta)
      sum_of_losses += loss_weight(t) * 0.5 * jnp.sum(jnp.square(s - 1))
    return sum_of_losses

  horizons = range(minimum, maximum + 1)
  gradients = [vector(jax.grad(total)(THETA, n)) for n in horizons]
  return np.asarray(sum(gradients) / sum(horizons))


@partial(jax.jit, static_argnums=(0, 3))
def replicated_means(build, minimum, maximum, windows):
  """The estimate's mean over `windows` windows after the burn-in, for independent estimators: [REPLICATES, P]."""
  estimator = build(problem(minimum, maximum))

  def replicate(key):
    init_key, key = jax.random.split(key)
    state = estimator.init(init_key, THETA)

    def window(state, key):
      gradient, state, metrics = estimator.estimate(key, THETA, state)
      return state, (vector(gradient), metrics["mean_square_gradient"])

    _, (gradients, squares) = jax.lax.scan(window, state, jax.random.split(key, windows))
    return jnp.mean(gradients[-WINDOWS:], axis=0), squares

  return jax.vmap(replicate)(jax.random.split(jax.random.key(0), REPLICATES))


def assert_unbiased(means, exact):
  error = np.std(means, axis=0, ddof=1) / np.sqrt(len(means))
  assert np.linalg.norm(error) <= 0.02 * np.linalg.norm(exact), "too noisy to catch a wrong weight"
  z = (np.mean(means, axis=0) - exact) / error
  assert np.all(np.abs(z) < 4), f"{np.mean(means, axis=0)} is {z} standard errors away from {exact}"


HORIZONS = [(1, 1), (7, 7), (10, 10), (1, 10), (3, 13)]
UNROLLS = [1, 3, 5, 10, 16]
SIZES = {1: 80, 3: 56, 5: 40, 10: 20, 16: 16}  # pairs or runs for each: longer unrolls have less noise
STAGGER = pytest.mark.parametrize("stagger", [False, True], ids=["lockstep", "staggered"])


def pes_with(noise_windows=1, **options):
  def build(problem, unroll_length, stagger):
    return pes.build(
      problem,
      num_pairs=SIZES[unroll_length],
      sigma=SIGMA,
      unroll_length=unroll_length,
      noise_period=noise_windows * unroll_length,
      stagger=stagger,
      pairs_per_block=SIZES[unroll_length],
      **options,
    )

  return build


def forward_with(method):
  def build(problem, unroll_length, stagger):
    size = SIZES[unroll_length]
    return forward.build(
      problem, method=method, num_runs=size, unroll_length=unroll_length, stagger=stagger, runs_per_block=size
    )

  return build


ONLINE = {
  "pes": pes_with(),
  "gpes": pes_with(noise_windows=2),
  "nres": pes_with(noise_windows=13),  # the longest horizon, whatever the unroll length
  "pes+analytic": pes_with(analytic=True),
  "rtrl": forward_with("rtrl"),
  "uoro": forward_with("uoro"),
}


def full_es(problem):
  return es.build(problem, num_pairs=PAIRS, sigma=SIGMA, pairs_per_block=PAIRS)


def full_bptt(problem):
  return backprop.build(problem, num_runs=PAIRS, unroll_length=None, max_horizon=13, runs_per_block=PAIRS)


# Always tested: K = 3, which divides neither 7 nor 10; episodes of one step begin several times in its windows. The
# rest waits for `pytest -m long`.
GRID = [pytest.param(name, k, marks=[] if k == 3 else [pytest.mark.long]) for name in ONLINE for k in UNROLLS]


@pytest.mark.slow_but_for("pes-3-lockstep")
@STAGGER
@pytest.mark.parametrize(("name", "unroll_length"), GRID)
def test_online_estimators_are_unbiased(name, unroll_length, stagger):
  if name == "gpes" and unroll_length > 5:
    pytest.skip("the period of two unrolls is longer than any episode: NRES")
  build = partial(ONLINE[name], unroll_length=unroll_length, stagger=stagger)
  for minimum, maximum in HORIZONS:
    means, _ = replicated_means(build, minimum, maximum, BURN_IN + WINDOWS)
    assert_unbiased(np.asarray(means), exact_gradient(minimum, maximum))


@pytest.mark.slow
@pytest.mark.parametrize("build", [full_es, pytest.param(full_bptt, marks=pytest.mark.long)])  # exact: test_exact
def test_estimators_of_whole_episodes_are_unbiased(build):
  for minimum, maximum in HORIZONS:
    means, _ = replicated_means(build, minimum, maximum, WINDOWS)
    assert_unbiased(np.asarray(means), exact_gradient(minimum, maximum))
