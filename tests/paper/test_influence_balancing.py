"""The problem of experiment 1 against the matrix it is defined by, and the bias that truncation has there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lopt.outer import backprop, es

A = 0.5 * np.eye(23) + 0.5 * np.eye(23, k=1)
SIGNS = np.array([1.0] * 10 + [-1.0] * 13)


def truncated_influence(num_steps):
  """Σ_{j<K} (A^j p)_0: what θ adds to s[0] within K steps."""
  return sum((np.linalg.matrix_power(A, j) @ SIGNS)[0] for j in range(num_steps))


def test_windows_pay_the_loss_of_their_last_state(script):
  problem = script.problem(3)
  step = jax.jit(problem.step)
  state, s = problem.init(jax.random.key(0), jnp.int32(1)), np.ones(23)
  for t in range(1, 8):
    state, loss = step(jnp.float32(0.5), state, jax.random.key(t))
    s = A @ s + 0.5 * SIGNS
    np.testing.assert_allclose(state[0], s, rtol=1e-6)
    np.testing.assert_allclose(loss, 3 * 0.5 * (s[0] - 1) ** 2 if t % 3 == 0 else 0.0, rtol=1e-5)


def test_evaluation_tends_to_the_fixed_point(script):
  theta = jnp.array([[0.5, -1 / 6], [0.0, 3.0]])
  np.testing.assert_allclose(script.evaluate(theta, 500), 0.5 * np.square(6 * theta + 1), rtol=1e-5, atol=1e-10)


def test_influence_is_the_closed_form_and_changes_its_sign(script):
  influence = script.influence(100)
  np.testing.assert_allclose(influence, [truncated_influence(k) for k in range(1, 101)], rtol=1e-4, atol=1e-4)
  assert np.all(influence[:40] > 0)
  np.testing.assert_allclose(influence[[0, 9, 99]], [1, 10, -6], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("unroll_length", [1, 10, 100])
def test_truncated_backpropagation_has_the_closed_forms_bias(script, unroll_length):
  theta = jnp.float32(0.5)
  estimator = backprop.build(script.problem(unroll_length), num_runs=1, unroll_length=unroll_length, stagger=False)
  estimate = jax.jit(estimator.estimate)
  state, s = jax.jit(estimator.init)(jax.random.key(0), theta), np.ones(23)
  for i in range(2):
    gradient, state, metrics = estimate(jax.random.key(i), theta, state)
    for _ in range(unroll_length):
      s = A @ s + 0.5 * SIGNS
    np.testing.assert_allclose(gradient, (s[0] - 1) * truncated_influence(unroll_length), rtol=1e-4)
    np.testing.assert_allclose(metrics["meta_loss"], 0.5 * (s[0] - 1) ** 2, rtol=1e-4)


def test_truncated_es_has_the_bias_of_one_step_of_backpropagation(script):
  theta, pairs = jnp.float32(0.5), 4000
  estimator = es.build(
    script.problem(1), num_pairs=pairs, sigma=0.1, unroll_length=1, stagger=False, pairs_per_block=pairs
  )
  state = jax.jit(estimator.init)(jax.random.key(0), theta)
  gradient, _, metrics = jax.jit(estimator.estimate)(jax.random.key(1), theta, state)
  expected = 0.5  # (s[0] - 1) · 1 with s[0] = 1 + θ after the first step
  error = np.sqrt((metrics["mean_square_gradient"] - np.square(gradient)) / pairs)
  assert error < 0.05 * expected
  assert abs(gradient - expected) < 4 * error


@pytest.mark.parametrize(
  ("final", "expected"),
  [
    ([0.01, 0.07], "minimises the loss"),
    ([0.01, 7.0], "lowers the loss"),
    ([9.0, 1e9], "goes the wrong way"),
    ([7.0, 9.0], "depends on the seed"),
    ([np.nan, 0.01], "depends on the seed"),
  ],
)
def test_outcome(script, final, expected):
  assert script.outcome(8.0, np.array(final)) == expected
