"""Neural Adam against plain NumPy, and against Optax's Adam."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lopt.architectures import neural_adam

SHAPES = {"kernel": (2, 3, 2), "matrix": (4, 3), "scalar": (), "vector": (5,)}
LOW = np.array([np.log(1e-8), -10, -10, np.log(1e-11)]) / 10
HIGH = np.array([np.log(1e3), 0, 0, np.log(1e4)]) / 10


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def magnitude(x):
  return 0.5 * np.clip(np.log(1e-8 + np.abs(x)), -5, 5)


class NumpyOptimizer:
  """One tensor, in float64; `hyper` is [lr, beta1, beta2, epsilon] in their coordinates."""

  def __init__(self, theta, shape):
    self.theta = jax.tree.map(lambda x: np.asarray(x, np.float64), theta)
    self.m, self.rms = np.zeros(shape), np.zeros(shape)
    self.hidden, self.cell, self.hyper = (self.theta[name] for name in ("hidden", "cell", "controls"))

  def update(self, g, p, scale, decay):
    g = np.clip(g, -1000, 1000)
    lr, eps = np.clip(np.exp(10 * self.hyper[0]), 1e-8, 1e3), np.clip(np.exp(10 * self.hyper[3]), 1e-11, 1e4)
    beta1, beta2 = 1 - np.exp(np.clip(10 * self.hyper[1:3], -10, 0))
    self.m = beta1 * self.m + (1 - beta1) * g
    self.rms = beta2 * self.rms + (1 - beta2) * g**2
    step = lr * (1 + eps) / (eps + np.sqrt(self.rms + 1e-10)) * self.m
    features = dict(zip(["lr", "beta1", "beta2", "epsilon"], 0.2 * np.clip(self.hyper, -5, 5), strict=True))
    for name, x in (("m", self.m), ("p", p), ("g", g)):
      features[f"mean_{name}_mag"], features[f"mean_{name}_sign"] = magnitude(np.mean(x)), np.sign(np.mean(x))
      features[f"var_{name}"] = magnitude(np.mean((x - np.mean(x)) ** 2))
    features["mean_rms"], features["mean_sign"] = magnitude(np.mean(self.rms)), np.sign(np.mean(self.rms))
    features["var_rms"] = magnitude(np.mean((self.rms - np.mean(self.rms)) ** 2))
    features["mean_gabs_mag"] = magnitude(np.mean(np.abs(g)))
    features["is_scalar"], features["is_bias"] = (1.0 if np.ndim(g) == ndim else -1.0 for ndim in (0, 1))
    x = np.array([features[name] for name in sorted(features)])
    assert len(x) == 19
    network = self.theta["network"]
    gates = np.concatenate([x, self.hidden]) @ network["lstm/linear"]["w"] + network["lstm/linear"]["b"]
    i, candidate, f, o = np.split(gates, 4)
    self.cell = sigmoid(f + 1) * self.cell + sigmoid(i) * np.tanh(candidate)
    self.hidden = sigmoid(o) * np.tanh(self.cell)
    self.hyper = self.hyper + scale * (self.hidden @ network["controls"]["w"] + network["controls"]["b"])
    self.hyper = self.hyper - decay * (self.hyper - self.theta["controls"])
    self.hyper = np.clip(self.hyper, LOW, HIGH)
    return -step


def test_updates_equal_those_of_a_plain_implementation():
  optimizer = neural_adam.build(hidden_size=6, output_multiplier=0.05, learning_rate=0.01, decay_strength=0.1)
  rng = np.random.default_rng(0)
  theta = jax.tree.map(lambda x: x + jnp.float32(0.3 * rng.normal(size=x.shape)), optimizer.init(jax.random.key(0)))
  theta = {**theta, "controls": jnp.array([-0.5, -0.2, -0.7, -0.5])}
  tx = optimizer.transform(theta, 10)
  params = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
  state = tx.init(jax.tree.map(jnp.float32, params))
  update = jax.jit(tx.update)
  references = {name: NumpyOptimizer(theta, shape) for name, shape in SHAPES.items()}
  for scale in (1.0, 1e-3, 3000.0, 0.1, 0.0, 1.0):
    gradients = {name: scale * rng.normal(size=shape) for name, shape in SHAPES.items()}
    updates, state = update(jax.tree.map(jnp.float32, gradients), state, jax.tree.map(jnp.float32, params))
    for i, (name, reference) in enumerate(references.items()):
      expected = reference.update(gradients[name], params[name], scale=0.05, decay=0.1)
      tolerance = 1e-5 * np.abs(expected).max()
      np.testing.assert_allclose(np.asarray(updates[name]), expected, rtol=2e-5, atol=tolerance, err_msg=name)
      np.testing.assert_allclose(state.controls[i], reference.hyper, rtol=1e-5, atol=1e-6)
      params[name] = params[name] + expected
  spread = np.ptp(np.asarray(state.controls), axis=0)
  assert np.all(spread > 0.003)  # each tensor has hyperparameters of its own


@pytest.mark.parametrize("output", [0.0, -5.0])
def test_a_network_of_constant_output_is_adam(output):
  """Untrained, Adam; where the network keeps moving the learning rate, Adam with an exponential schedule."""
  optimizer = neural_adam.build(hidden_size=3, learning_rate=0.02, beta1=0.8, beta2=0.98)
  theta = optimizer.init(jax.random.key(0))
  theta["network"]["controls"]["b"] = jnp.array([output, 0.0, 0.0, 0.0])
  tx = optimizer.transform(theta, 10)

  def schedule(step):
    """The learning rate times what undoes Optax's bias correction, which Neural Adam does not have."""
    t = step + 1
    return 0.02 * jnp.exp(10 * 0.01 * output * step) * (1 - 0.8**t) / jnp.sqrt(1 - 0.98**t)

  adam = optax.adam(schedule, b1=0.8, b2=0.98, eps=1e-8)
  params = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
  state, adam_state = tx.init(params), adam.init(params)
  update, adam_update = jax.jit(tx.update), jax.jit(adam.update)
  rng = np.random.default_rng(0)
  for _ in range(5):
    gradients = {name: jnp.float32(rng.normal(size=shape)) for name, shape in SHAPES.items()}
    updates, state = update(gradients, state, params)
    expected, adam_state = adam_update(gradients, adam_state, params)
    for name in SHAPES:
      np.testing.assert_allclose(updates[name], expected[name], rtol=2e-5)


def test_controls_stay_within_their_bounds():
  optimizer = neural_adam.build(hidden_size=3)
  theta = optimizer.init(jax.random.key(0))
  params = {"w": jnp.ones((2, 3))}
  for sign, bound in ((1.0, HIGH), (-1.0, LOW)):
    theta["network"]["controls"]["b"] = sign * jnp.full(4, 1000.0)
    tx = optimizer.transform(theta, 10)
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    np.testing.assert_allclose(state.controls[0], bound, rtol=1e-6)
    updates, _ = jax.jit(tx.update)(params, state, params)
    assert np.all(np.isfinite(updates["w"]))


def test_parameters_are_required():
  optimizer = neural_adam.build()
  tx = optimizer.transform(optimizer.init(jax.random.key(0)), 10)
  with pytest.raises(ValueError, match=r"update\(gradients, state, params\)"):
    tx.update({"w": jnp.ones(3)}, tx.init({"w": jnp.ones(3)}))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"hidden_size": 0}, "hidden_size: must be at least 1"),
    ({"learning_rate": 0.0}, "learning_rate=0.0"),
    ({"beta1": -0.1}, "beta1=-0.1"),
    ({"beta2": 0.99999}, "beta2=0.99999"),
    ({"epsilon": 0.0}, "epsilon=0.0"),
    ({"decay_strength": 1.5}, "decay_strength=1.5"),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match=f"^{message}"):
    neural_adam.build(**options)
