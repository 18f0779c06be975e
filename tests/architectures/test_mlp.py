"""The MLP optimizer against a plain NumPy one, written from the paper's description with 19 columns a parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lopt.architectures import mlp

PARAMS = {"w": np.random.default_rng(0).normal(size=(5, 3)), "b": np.zeros(3)}


def numpy_update(theta, gradient, parameter, momenta, step, epsilon=1e-12):
  """Metz et al. 2019: features of each parameter in a row, normalised over the tensor, through the whole MLP."""
  columns = [gradient.ravel(), parameter.ravel(), *(m.ravel() for m in momenta)]
  columns = [c / np.sqrt(np.mean(c**2) + epsilon) for c in columns]
  scales = [1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000]
  columns += [np.full(gradient.size, np.tanh(step / scale - 1)) for scale in scales]
  x = np.stack(columns, axis=1)
  assert x.shape == (gradient.size, 19)
  layers = [theta[name] for name in sorted(theta)]
  for i, layer in enumerate(layers):
    x = x @ np.asarray(layer["w"], np.float64) + np.asarray(layer["b"], np.float64)
    x = np.maximum(x, 0) if i < len(layers) - 1 else x
  return (-1e-3 * x[:, 0] * np.exp(1e-3 * x[:, 1])).reshape(gradient.shape)


def test_updates_equal_those_of_a_plain_implementation():
  optimizer = mlp.build()
  # 300 times the initial weights, so that magnitudes far from 1 are seen too.
  theta = jax.tree.map(lambda x: 3.0 * x + 0.1, optimizer.init(jax.random.key(0)))
  tx = optimizer.transform(theta, 10)
  params = jax.tree.map(jnp.float32, PARAMS)
  state = jax.jit(tx.init)(params)
  momenta = {name: np.zeros((6, *p.shape)) for name, p in PARAMS.items()}
  decays = np.array([0.1, 0.5, 0.9, 0.99, 0.999, 0.9999])
  rng = np.random.default_rng(1)
  for step in range(4):
    gradients = {name: rng.normal(size=p.shape) * 10.0 ** rng.integers(-4, 2) for name, p in PARAMS.items()}
    updates, state = jax.jit(tx.update)(jax.tree.map(jnp.float32, gradients), state, params)
    for name, g in gradients.items():
      beta = decays.reshape(-1, *[1] * g.ndim)
      momenta[name] = beta * momenta[name] + (1 - beta) * g
      expected = numpy_update(theta, g, PARAMS[name], momenta[name], step)
      np.testing.assert_allclose(updates[name], expected, rtol=1e-4, atol=1e-8)
      np.testing.assert_allclose(state.momenta[name], momenta[name], rtol=1e-5)


def test_number_of_meta_parameters():
  """19·32 + 32 + 32·32 + 32 + 32·2 + 2, as published for two hidden layers of 32."""
  assert sum(x.size for x in jax.tree.leaves(mlp.build().init(jax.random.key(0)))) == 1762


def test_updates_do_not_depend_on_the_gradient_scale():
  """The features are normalised, so gradients above √ε move parameters alike at any scale."""
  optimizer = mlp.build()
  tx = optimizer.transform(optimizer.init(jax.random.key(0)), 10)
  params = jax.tree.map(jnp.float32, PARAMS)
  gradients = jax.tree.map(lambda p: jnp.float32(np.random.default_rng(2).normal(size=p.shape)), PARAMS)

  def update(scale):
    return tx.update(optax.tree.scale(scale, gradients), tx.init(params), params)[0]

  small, large = update(1.0), update(1e6)
  for a, b in zip(jax.tree.leaves(small), jax.tree.leaves(large), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3)


def test_parameters_are_required():
  optimizer = mlp.build()
  tx = optimizer.transform(optimizer.init(jax.random.key(0)), 10)
  with pytest.raises(ValueError, match=r"update\(gradients, state, params\)"):
    tx.update({"w": jnp.ones(3)}, tx.init({"w": jnp.ones(3)}))


@pytest.mark.parametrize("hidden_sizes", [(), (32, 0)])
def test_bad_widths_are_named(hidden_sizes):
  with pytest.raises(ValueError, match="hidden_sizes"):
    mlp.build(hidden_sizes=hidden_sizes)
