"""Baselines against plain-NumPy recursions of the papers' algorithms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lopt import baselines

LEARNING_RATES = np.array([1e-3, 0.1, 0.5])
CURVATURE = np.array([0.5, 1.0, 4.0])
START = np.array([1.0, -2.0, 0.5])
STEPS = 7


def gradient(x, t):
  """Of a quadratic whose minimum moves, so that no step repeats another."""
  return CURVATURE * (x - np.sin(t))


def numpy_adam(learning_rate):
  """Kingma & Ba 2015, algorithm 1."""
  x, m, v = START.copy(), np.zeros(3), np.zeros(3)
  for t in range(1, STEPS + 1):
    g = gradient(x, t)
    m = 0.9 * m + 0.1 * g
    v = 0.999 * v + 0.001 * g**2
    x = x - learning_rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
  return x


def numpy_sgdm(learning_rate):
  """Heavy ball, without damping or Nesterov's look-ahead."""
  x, m = START.copy(), np.zeros(3)
  for t in range(1, STEPS + 1):
    m = 0.9 * m + gradient(x, t)
    x = x - learning_rate * m
  return x


@pytest.mark.parametrize(
  ("baseline", "reference"), [(baselines.adam, numpy_adam), (baselines.sgdm, numpy_sgdm)], ids=["adam", "sgdm"]
)
def test_equals_numpy_reference_under_vmap_over_learning_rates(baseline, reference):
  optimizer = baseline()

  @jax.jit
  @jax.vmap
  def train(theta):
    tx = optimizer.transform(theta, STEPS)
    x = jnp.asarray(START, jnp.float32)
    state = tx.init(x)
    for t in range(1, STEPS + 1):
      g = jnp.asarray(CURVATURE, jnp.float32) * (x - np.float32(np.sin(t)))
      updates, state = tx.update(g, state, x, value=jnp.float32(0))
      x = x + updates
    return x

  expected = np.stack([reference(learning_rate) for learning_rate in LEARNING_RATES])
  np.testing.assert_allclose(train(baselines.theta_at(LEARNING_RATES)), expected, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("baseline", [baselines.adam, baselines.sgdm])
def test_initial_theta_is_the_learning_rate_1e_3(baseline):
  theta = baseline().init(jax.random.key(0))
  assert set(theta) == {"log_learning_rate"}
  assert theta["log_learning_rate"].shape == ()
  np.testing.assert_allclose(np.exp(theta["log_learning_rate"]), 1e-3, rtol=1e-6)


def test_grid_has_the_fourteen_half_decades_from_1e_6_to_3():
  expected = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
  assert expected == baselines.LEARNING_RATES
  assert [baselines.half_decade(index) for index in (-13, 2, 3)] == [3e-7, 10.0, 30.0]
