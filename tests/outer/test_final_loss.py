"""The final loss as a telescoping sum: exactly that sum, and its gradient under every estimator."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lopt import base
from lopt.outer import backprop, es, final_loss, forward, pes

A = jnp.array([[0.8, 0.3], [-0.2, 0.9]])
B = jnp.array([[1.0, 0.5], [-0.5, 1.0]])
THETA = jnp.array([0.6, -0.4])
REPLICATES, SIZE, WINDOWS, BURN_IN = 32, 128, 70, 30


def problem(minimum, maximum, loss_cap=np.inf):
  """Linear in the state, quadratic in the loss: smoothing does not change its gradient."""

  def horizon(key):
    return jax.random.randint(key, (), minimum, maximum + 1)

  def init(key, num_steps):
    del num_steps
    return 0.3 * jax.random.normal(key, (2,))

  def step(theta, s, key):
    s = A @ s + B @ theta + 0.1 * jax.random.normal(key, (2,))
    return s, 0.5 * jnp.sum(jnp.square(s - 1))

  return base.UnrolledProblem(horizon, init, step, loss_cap)


def exact_gradient(minimum, maximum):
  """∇ E[L_T] / E[T]."""

  def last(theta, horizon):
    s = jnp.zeros(2)
    for _ in range(horizon):
      s = A @ s + B @ theta
    return 0.5 * jnp.sum(jnp.square(s - 1))

  horizons = range(minimum, maximum + 1)
  return np.asarray(sum(jax.grad(last)(THETA, n) for n in horizons) / sum(horizons))


def episode(problem, horizon, theta=THETA):
  """The losses of one episode."""
  state, losses = problem.init(jax.random.key(0), jnp.int32(horizon)), []
  for key in jax.random.split(jax.random.key(1), horizon):
    state, loss = problem.step(theta, state, key)
    losses.append(float(loss))
  return losses


@pytest.mark.parametrize("horizon", [1, 7])
def test_losses_sum_to_the_final_loss(horizon):
  plain = problem(horizon, horizon)
  for n in range(1, horizon + 1):
    wrapped = episode(final_loss.wrap(plain), horizon)
    np.testing.assert_allclose(sum(wrapped[:n]), episode(plain, horizon)[n - 1], rtol=1e-5)


PES = {"num_pairs": SIZE, "sigma": 0.3, "unroll_length": 3, "pairs_per_block": SIZE}
RUNS = {"num_runs": SIZE, "runs_per_block": SIZE}
UNBIASED = {
  "pes": partial(pes.build, **PES),
  "nres": partial(pes.build, **PES, noise_period=15),
  "pes+analytic": partial(pes.build, **PES, analytic=True),
  "full es": partial(es.build, num_pairs=SIZE, sigma=0.3, pairs_per_block=SIZE),
  "full bptt": partial(backprop.build, **RUNS, unroll_length=None, max_horizon=13),
  "rtrl": partial(forward.build, **RUNS, method="rtrl", unroll_length=3),
  "uoro": partial(forward.build, **RUNS, method="uoro", unroll_length=3),
}


@partial(jax.jit, static_argnums=0)
def replicated_means(build, minimum, maximum):
  estimator = build(final_loss.wrap(problem(minimum, maximum)))

  def replicate(key):
    init_key, key = jax.random.split(key)

    def window(state, key):
      gradient, state, _ = estimator.estimate(key, THETA, state)
      return state, gradient

    keys = jax.random.split(key, BURN_IN + WINDOWS)
    _, gradients = jax.lax.scan(window, estimator.init(init_key, THETA), keys)
    return jnp.mean(gradients[BURN_IN:], axis=0)

  return jax.vmap(replicate)(jax.random.split(jax.random.key(0), REPLICATES))


LONG = {"pes+analytic", "full bptt", "uoro"}  # to compile; the wrapper does not know under which it is


@pytest.mark.slow_but_for("pes")
@pytest.mark.parametrize("name", [pytest.param(x, marks=[pytest.mark.long] if x in LONG else []) for x in UNBIASED])
def test_its_gradient_under_every_unbiased_estimator(name):
  for minimum, maximum in [(7, 7), (3, 13)]:
    means, exact = np.asarray(replicated_means(UNBIASED[name], minimum, maximum)), exact_gradient(minimum, maximum)
    error = np.std(means, axis=0, ddof=1) / np.sqrt(len(means))
    assert np.linalg.norm(error) <= 0.05 * np.linalg.norm(exact)
    assert np.all(np.abs(np.mean(means, axis=0) - exact) < 4 * error), (minimum, maximum, means.mean(axis=0), exact)


@pytest.mark.slow_but_for("8")
@pytest.mark.parametrize("unroll_length", [4, 8])
def test_truncated_estimators_have_that_of_the_last_window(unroll_length):
  """T = 8, no noise: the first window's Σ p is its last loss, the second's is that less a constant."""
  runs = problem(8, 8)._replace(
    step=lambda theta, s, key: (
      A @ s + B @ theta,
      0.5 * jnp.sum(jnp.square(A @ s + B @ theta - 1)),
    ),
    init=lambda key, num_steps: jnp.zeros(2),
  )
  options = {"unroll_length": unroll_length, "stagger": False}
  backwards = backprop.build(final_loss.wrap(runs), num_runs=1, **options)
  evolution = es.build(final_loss.wrap(runs), num_pairs=8192, sigma=0.3, pairs_per_block=8192, **options)

  def last_of_window(theta, s):
    for _ in range(unroll_length):
      s = A @ s + B @ theta
    return 0.5 * jnp.sum(jnp.square(s - 1)), s

  states = [e.init(jax.random.key(0), THETA) for e in (backwards, evolution)]
  s = jnp.zeros(2)
  for i in range(8 // unroll_length):
    exact, s = jax.grad(last_of_window, has_aux=True)(THETA, s)
    tbptt, states[0], _ = backwards.estimate(jax.random.key(i), THETA, states[0])
    np.testing.assert_allclose(tbptt, exact / unroll_length, rtol=1e-4)
    truncated, states[1], metrics = evolution.estimate(jax.random.key(i), THETA, states[1])
    error = np.sqrt(float(metrics["mean_square_gradient"]) / 8192)
    assert error < 0.1 * np.linalg.norm(exact / unroll_length)
    assert np.linalg.norm(truncated - exact / unroll_length) < 4 * error


def diverging(horizon, first_bad):
  """L_t = 0.5 t before step `first_bad`, then 1e30 or NaN; the cap is 7."""

  def step(theta, t, key):
    del key
    bad = jnp.where(t % 2 == 0, jnp.nan, 1e30)
    return t + 1, jnp.where(t + 1 >= first_bad, bad, 0.5 * (t + 1)) + 0 * theta

  return base.UnrolledProblem(lambda key: jnp.int32(horizon), lambda key, num_steps: jnp.int32(0), step, 7.0)


@pytest.mark.parametrize(("horizon", "first_bad"), [(6, 1), (6, 4), (6, 5), (6, 6), (1, 1)])
def test_diverged_runs_end_with_the_cap_and_are_counted(horizon, first_bad):
  wrapped = final_loss.wrap(diverging(horizon, first_bad))
  estimator = es.build(wrapped, num_pairs=2, sigma=0.1)
  theta = jnp.zeros(())
  _, _, metrics = estimator.estimate(jax.random.key(0), theta, estimator.init(jax.random.key(0), theta))
  np.testing.assert_allclose(metrics["meta_loss"] * horizon, 7.0, rtol=1e-5)
  # Where it only shows in the last step, nothing could make up for a report; but a first p of 7 is one.
  assert metrics["diverged"] == (first_bad < horizon or horizon == 1)
