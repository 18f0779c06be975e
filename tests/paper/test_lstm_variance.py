"""The LSTM of experiment 3 against NumPy, and its exact variance against closed forms and sampling."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from lopt import base


def random_weights(script, net, size, scale):
  """Weights of order one: at Haiku's initial ones, biases are 0 and the state hardly matters."""
  zeros = jnp.zeros(size)
  theta = net.init(jax.random.key(0), jnp.int32(0), script.hk.LSTMState(zeros, zeros))
  flat, unravel = ravel_pytree(theta)
  return unravel(scale * jax.random.normal(jax.random.key(1), flat.shape))


def test_the_lstm_against_numpy(script):
  size, text = 3, np.array([0, 2, 1, 1, 3, 0, 2])
  net = script.network(4, size)
  theta = random_weights(script, net, size, 1.0)
  problem = script.reading(net, size, jnp.asarray(text))
  assert problem.horizon(jax.random.key(0)) == 6

  embeddings, weights = np.asarray(theta["embed"]["embeddings"]), theta["lstm/linear"]
  logistic = lambda x: 1 / (1 + np.exp(-x))
  hidden = cell = np.zeros(size)
  state = problem.init(jax.random.key(0), jnp.int32(6))
  for now, following in itertools.pairwise(text):
    gates = np.concatenate([embeddings[now], hidden]) @ np.asarray(weights["w"]) + np.asarray(weights["b"])
    i, g, f, o = np.split(gates, 4)
    cell = logistic(f + 1) * cell + logistic(i) * np.tanh(g)
    hidden = logistic(o) * np.tanh(cell)
    logits = hidden @ np.asarray(theta["linear"]["w"]) + np.asarray(theta["linear"]["b"])
    state, loss = problem.step(theta, state, jax.random.key(0))
    np.testing.assert_allclose(loss, np.log(np.sum(np.exp(logits))) - logits[following], rtol=1e-5)


def uninfluenced(gradients):
  """L_t = g_t·θ: no window influences another."""
  gradients = jnp.asarray(gradients, jnp.float32)
  return base.UnrolledProblem(
    lambda key: jnp.int32(len(gradients)),
    lambda key, horizon: jnp.int32(0),
    lambda theta, t, key: (t + 1, gradients[t] @ theta),
  )


@pytest.mark.parametrize("gradients", [np.ones((6, 3)), np.random.default_rng(0).normal(size=(6, 3))])
def test_exact_variance_without_influence(script, gradients):
  """ξ of window s = 1, 2, ... is a sum of s perturbations, of which only the last enters its loss.

  So the covariance of ξ (ε_s·g_s) / σ² has trace ((s - 1) P + P + 1) |g_s|², and windows are uncorrelated.
  """
  for length in (1, 2, 6):
    sums = gradients.reshape(-1, length, 3).sum(axis=1)
    windows = 1 + np.arange(len(sums))
    variance, norm = script.linear_variance(
      uninfluenced(gradients), jnp.zeros(3), num_windows=len(sums), window_length=length
    )
    np.testing.assert_allclose(variance, np.sum((windows * 3 + 1) * np.sum(sums**2, axis=1)), rtol=1e-5)
    np.testing.assert_allclose(norm, np.sum(gradients.sum(axis=0) ** 2), rtol=1e-5)


@pytest.mark.slow
def test_exact_variance_against_sampling(script):
  size, num_pairs = 2, 4000
  net = script.network(3, size)
  theta = random_weights(script, net, size, 0.5)
  text = jax.random.randint(jax.random.key(2), (13,), 0, 3)
  read = functools.partial(script.reading, net, size)
  cases = jax.tree.map(lambda x: x[None], script.Case(theta, text))
  flat, unravel = ravel_pytree(theta)

  def loss(flat):
    step = lambda state, _: read(text).step(unravel(flat), state, jax.random.key(0))
    return jnp.sum(jax.lax.scan(step, read(text).init(jax.random.key(0), jnp.int32(12)), length=12)[1])

  gradient = jax.grad(loss)(flat)
  for length in (3, 12):
    # σ is small for the losses to be linear within it, and large for their differences to survive rounding.
    mean, squares = script.sample("PES", length, jax.random.key(3), num_pairs, cases, gradient[None], read, 1e-2)
    variance, norm = script.linear_variance(read(text), theta, num_windows=12 // length, window_length=length)
    assert squares.shape == (1, num_pairs)
    assert abs(squares.mean() - variance) < 4 * squares.std() / num_pairs**0.5
    assert squares.std() / num_pairs**0.5 < 0.05 * variance
    assert np.sum((mean[0] - np.asarray(gradient)) ** 2) < 2 * variance / num_pairs
    np.testing.assert_allclose(norm, np.sum(gradient**2), rtol=1e-4)
  np.testing.assert_allclose(variance, (flat.size + 1) * norm, rtol=1e-4)  # one window: ES
  by_es = script.sample("full ES", 12, jax.random.key(3), num_pairs, cases, gradient[None], read, 1e-2)
  by_nres = script.sample("NRES", 6, jax.random.key(3), num_pairs, cases, gradient[None], read, 1e-2)
  np.testing.assert_allclose(by_es[1], squares, rtol=1e-2, atol=1e-2 * variance)
  assert abs(by_nres[1].mean() - variance) < 4 * by_nres[1].std() / num_pairs**0.5


def test_cases(script):
  """Every seed has its own weights and text, and the same weights in the three scenarios."""
  train = jax.random.randint(jax.random.key(0), (500,), 0, 5)
  text = script.datasets.Text(train, train[:9], train[:9], "abcde")
  settings = script.Settings(num_characters=40, size=2, num_seeds=2)
  cases = script.draw(jax.random.key(1), script.network(5, 2), text, settings)
  texts = np.asarray(cases.text)
  assert texts.shape == (6, 41)
  windows = np.lib.stride_tricks.sliding_window_view(np.asarray(train), 41)
  for seed in range(2):
    random, real, repeated = texts[seed::2]
    assert np.any(np.all(windows == real, axis=1))
    assert not np.any(np.all(windows == random, axis=1))
    assert np.all(repeated == real[0])
  assert not np.array_equal(texts[2], texts[3])
  biases = np.asarray(cases.theta["lstm/linear"]["w"])
  np.testing.assert_array_equal(biases[:2], biases[2:4])
  assert not np.array_equal(biases[0], biases[1])
