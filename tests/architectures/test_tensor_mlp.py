"""The tensor MLP against a plain NumPy one, written from its equations, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lopt.architectures import tensor_mlp

DECAYS = np.array([0.5, 0.9, 0.97, 0.99, 0.997])
SHAPES = {"w": (5, 3), "b": (4,)}


def rms(x):
  return np.sqrt(np.mean(np.square(x)))


def numpy_update(theta, history, p):
  """Δp of a tensor with these gradients so far."""
  m, v, s = [np.zeros(p.shape)] * 5, np.zeros(p.shape), 0.0
  for g in history:
    m = [beta * x + (1 - beta) * g for beta, x in zip(DECAYS, m, strict=True)]
    v, s = 0.99 * v + 0.01 * g**2, 0.997 * s + 0.003 * np.mean(g**2)
  t, g = len(history), history[-1]
  root = np.sqrt(v / (1 - 0.99**t))
  features = [g / root, *[x / root for x in m], *m, p]
  corrected = [x / (1 - beta**t) for beta, x in zip(DECAYS, m, strict=True)]
  inputs = [np.log(rms(x) / np.sqrt(s / (1 - 0.997**t))) for x in corrected]
  inputs += [np.mean(g * x) / (rms(g) * rms(x)) for x in m]
  inputs += [min(p.ndim, 2) / 2, *(np.tanh((t - 1) / scale - 1) for scale in (10, 100, 1000))]
  layer = lambda name, x: x @ np.asarray(theta[name]["w"], np.float64) + np.asarray(theta[name]["b"], np.float64)
  c = layer("coefficients", np.tanh(layer("hidden", np.array(inputs))))
  return -0.01 * sum(weight * f / rms(f) for weight, f in zip(c, features, strict=True))


def test_updates_equal_those_of_a_plain_implementation():
  optimizer = tensor_mlp.build(time_scales=(10, 100, 1000), step_multiplier=0.01)
  theta = jax.tree.map(lambda x: x + 0.1, optimizer.init(jax.random.key(0)))
  rng = np.random.default_rng(0)
  p = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
  tx = optimizer.transform(theta, 10)
  params = jax.tree.map(jnp.float32, p)
  state, history = tx.init(params), {name: [] for name in SHAPES}
  for _ in range(4):
    for name, shape in SHAPES.items():
      history[name].append(rng.normal(size=shape) * 10.0 ** rng.integers(-3, 3))
    gradients = {name: jnp.float32(gs[-1]) for name, gs in history.items()}
    updates, state = jax.jit(tx.update)(gradients, state, params)
    for name in SHAPES:
      np.testing.assert_allclose(updates[name], numpy_update(theta, history[name], p[name]), rtol=2e-4, atol=1e-7)


def test_no_parameters_no_update():
  optimizer = tensor_mlp.build()
  tx = optimizer.transform(optimizer.init(jax.random.key(0)), 10)
  gradients = {"w": jnp.ones((2, 2))}
  with pytest.raises(ValueError, match="needs the parameters"):
    tx.update(gradients, tx.init(gradients))


def test_a_hidden_layer_without_units_is_refused():
  with pytest.raises(ValueError, match="hidden_size"):
    tensor_mlp.build(hidden_size=0)
