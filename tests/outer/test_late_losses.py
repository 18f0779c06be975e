"""Losses weighted by their age: exactly those weights, and the gradient of their sum under PES and ES."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lopt import base
from lopt.outer import es, late_losses, pes

THETA = jnp.array([0.6, -0.4])
REPLICATES, SIZE, WINDOWS, BURN_IN = 32, 64, 60, 20


def problem(minimum, maximum):
  """Linear in the state, quadratic in the loss: smoothing does not change its gradient."""

  def step(theta, s, key):
    s = 0.8 * s + theta + 0.1 * jax.random.normal(key, (2,))
    return s, 0.5 * jnp.sum(jnp.square(s - 1))

  horizon = lambda key: jax.random.randint(key, (), minimum, maximum + 1)
  return base.UnrolledProblem(horizon, lambda key, num_steps: jnp.zeros(2), step)


def losses_of(problem, horizon):
  state, losses = problem.init(jax.random.key(0), jnp.int32(horizon)), []
  for key in jax.random.split(jax.random.key(1), horizon):
    state, loss = problem.step(THETA, state, key)
    losses.append(float(loss))
  return np.array(losses)


@pytest.mark.parametrize("power", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("horizon", [1, 9])
def test_each_loss_has_the_weight_of_its_age(power, horizon):
  plain = problem(horizon, horizon)
  weights = (power + 1) * (np.arange(1, horizon + 1) / horizon) ** power
  wrapped = losses_of(late_losses.wrap(plain, power), horizon)
  np.testing.assert_allclose(wrapped, weights * losses_of(plain, horizon), rtol=1e-5)


def exact_gradient(minimum, maximum, power):
  """∇ E[Σ w_t L_t] / E[T]."""

  def total(theta, horizon):
    s, losses = jnp.zeros(2), []
    for t in range(1, horizon + 1):
      s = 0.8 * s + theta
      losses.append((power + 1) * (t / horizon) ** power * 0.5 * jnp.sum(jnp.square(s - 1)))
    return sum(losses)

  horizons = range(minimum, maximum + 1)
  return np.asarray(sum(jax.grad(total)(THETA, n) for n in horizons) / sum(horizons))


ESTIMATORS = {
  "pes": functools.partial(pes.build, num_pairs=SIZE, sigma=0.3, unroll_length=3, pairs_per_block=SIZE),
  "nres": functools.partial(
    pes.build, num_pairs=SIZE, sigma=0.3, unroll_length=3, noise_period=15, pairs_per_block=SIZE
  ),
  "full es": functools.partial(es.build, num_pairs=SIZE, sigma=0.3, pairs_per_block=SIZE),
}


@pytest.mark.slow_but_for("pes")
@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_gradient_of_their_sum_under_unbiased_estimators(name):
  for minimum, maximum in [(7, 7), (3, 13)]:
    estimator = ESTIMATORS[name](late_losses.wrap(problem(minimum, maximum), 2.0))

    @jax.jit
    @jax.vmap
    def replicated_means(key, estimator=estimator):
      init_key, key = jax.random.split(key)

      def window(state, key):
        gradient, state, _ = estimator.estimate(key, THETA, state)
        return state, gradient

      _, gradients = jax.lax.scan(window, estimator.init(init_key, THETA), jax.random.split(key, BURN_IN + WINDOWS))
      return jnp.mean(gradients[BURN_IN:], axis=0)

    means = np.asarray(replicated_means(jax.random.split(jax.random.key(0), REPLICATES)))
    exact, error = exact_gradient(minimum, maximum, 2.0), np.std(means, axis=0, ddof=1) / np.sqrt(REPLICATES)
    assert np.linalg.norm(error) <= 0.05 * np.linalg.norm(exact)
    assert np.all(np.abs(np.mean(means, axis=0) - exact) < 4 * error), (minimum, maximum, means.mean(axis=0), exact)


@pytest.mark.parametrize("bad", [np.nan, 1e30, 7.0])
def test_a_diverged_loss_counts_with_the_largest_weight_and_is_counted(bad):
  def step(theta, t, key):
    del key
    return t + 1, jnp.where(t == 1, bad, 0.5) + 0 * theta

  runs = base.UnrolledProblem(lambda key: jnp.int32(4), lambda key, num_steps: jnp.int32(0), step, 7.0)
  estimator = es.build(late_losses.wrap(runs, 1.0), num_pairs=2, sigma=0.1)
  theta = jnp.zeros(())
  _, _, metrics = estimator.estimate(jax.random.key(0), theta, estimator.init(jax.random.key(0), theta))
  np.testing.assert_allclose(metrics["meta_loss"], (0.5 * 0.5 + 2 * 7.0 + 1.5 * 0.5 + 2 * 0.5) / 4, rtol=1e-5)
  assert metrics["diverged"] == 1


@pytest.mark.parametrize("power", [-1.0, float("inf"), float("nan")])
def test_bad_powers_are_named(power):
  with pytest.raises(ValueError, match=r"^late_power="):
    late_losses.wrap(problem(3, 3), power)
