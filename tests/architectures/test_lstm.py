"""The LSTM optimizer against a plain NumPy one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lopt.architectures import lstm


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def numpy_lstm(weights, x, hidden, cell):
  """The LSTM of Haiku's documentation: gates i, g, f, o; forget gate biased by one."""
  gates = np.concatenate([x, hidden], axis=1) @ np.asarray(weights["w"]) + np.asarray(weights["b"])
  i, g, f, o = np.split(gates, 4, axis=1)
  cell = sigmoid(f + 1) * cell + sigmoid(i) * np.tanh(g)
  return sigmoid(o) * np.tanh(cell), cell


def numpy_inputs(gradient, p=10.0):
  """Andrychowicz et al. 2016, appendix A, one coordinate at a time."""
  rows = [(np.log(abs(g)) / p, np.sign(g)) if abs(g) >= np.exp(-p) else (-1.0, np.exp(p) * g) for g in gradient]
  return np.array(rows)


def test_updates_equal_those_of_a_plain_implementation():
  optimizer = lstm.build()
  theta = optimizer.init(jax.random.key(0))
  first, second, linear = theta["lstm/linear"], theta["lstm_1/linear"], theta["linear"]
  tx = optimizer.transform(theta, 10)
  params = {"b": jnp.zeros(2), "w": jnp.zeros((2, 3))}
  state = jax.jit(tx.init)(params)
  states = [(np.zeros((8, 20)), np.zeros((8, 20))) for _ in range(2)]
  rng = np.random.default_rng(1)
  for _ in range(5):
    gradient = rng.normal(size=8) * 10.0 ** rng.integers(-7, 2, size=8)
    gradient[3] = 0.0
    updates, state = jax.jit(tx.update)(
      {"b": jnp.float32(gradient[:2]), "w": jnp.float32(gradient[2:].reshape(2, 3))}, state, params
    )
    hidden = numpy_inputs(gradient)
    for layer, weights in enumerate((first, second)):
      states[layer] = numpy_lstm(weights, hidden, *states[layer])
      hidden = states[layer][0]
    expected = 0.01 * (hidden @ np.asarray(linear["w"]) + np.asarray(linear["b"]))[:, 0]
    np.testing.assert_allclose(updates["b"], expected[:2], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(updates["w"], expected[2:].reshape(2, 3), rtol=1e-4, atol=1e-7)


def test_gradients_flow_through_a_zero_gradient():
  """Backpropagation through an unroll must not meet log 0 behind a `where`."""
  slope = jax.grad(lambda g: jnp.sum(lstm.log_and_sign(g, 10.0)))(jnp.zeros(2))
  np.testing.assert_allclose(slope, np.exp(10.0), rtol=1e-5)


@pytest.mark.parametrize("options", [{"hidden_sizes": ()}, {"hidden_sizes": (0,)}, {"p": 0.0}])
def test_bad_settings_are_named(options):
  with pytest.raises(ValueError, match=next(iter(options))):
    lstm.build(**options)
