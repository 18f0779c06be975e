"""The Adafactor-feature MLP against plain NumPy, written as published: 39 columns a parameter, features last."""

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lopt.architectures import adafactor_mlp, published

DECAYS = (0.9, 0.99, 0.999)
SHAPES = {
  "scalar": (),
  "vector": (7,),
  "wide": (3, 5),
  "tall": (6, 2),
  "square": (4, 4),
  "one": (1, 1),
  "kernel": (3, 2, 4, 5),
  "reversed": (5, 4, 3),
}


def published_weights(seed):
  """A dictionary as AdafacMLPLOpt has it, with decays moved off their initial values."""
  rng = np.random.default_rng(seed)
  sizes = [39, 4, 4, 2]
  nn = {f"w{i}": rng.normal(size=(a, b)) for i, (a, b) in enumerate(itertools.pairwise(sizes))}
  nn |= {f"b{i}": rng.normal(size=size) for i, size in enumerate(sizes[1:])}
  names = {"momentum_decays": 3, "rms_decays": 1, "adafactor_decays": 3}
  # An offset of 0.3 multiplies 1 - β by 20: one decay of the factored moments is cut off at 0.
  offsets = {name: np.round(0.05 * rng.normal(size=size), 3) for name, size in names.items()}
  offsets["adafactor_decays"][0] = 0.3
  return {**offsets, "nn": {"~": nn}}


class NumpyOptimizer:
  """One tensor under AdafacMLPLOpt, in float64."""

  def __init__(self, weights, shape):
    self.nn = weights["nn"]["~"]
    self.decays = [
      1 - np.exp(10 * (np.log(1 - np.array(initial)) / 10 + weights[name]))
      for name, initial in (("momentum_decays", DECAYS), ("rms_decays", (0.999,)), ("adafactor_decays", DECAYS))
    ]
    self.m, self.v, self.full = np.zeros((*shape, 3)), np.zeros((*shape, 1)), np.zeros((*shape, 3))
    self.step = 0
    self.factored = len(shape) >= 2
    if self.factored:
      order = sorted(range(len(shape)), key=lambda axis: (shape[axis], axis))
      self.d1, self.d0 = order[-2], order[-1]
      self.row = np.zeros((*np.delete(shape, self.d0), 3))
      self.col = np.zeros((*np.delete(shape, self.d1), 3))

  def update(self, g, p):
    g, p = np.asarray(g, np.float64)[..., None], np.asarray(p, np.float64)[..., None]
    beta_m, beta_v, beta_f = self.decays
    self.m = beta_m * self.m + (1 - beta_m) * g
    beta_v, beta_f = np.clip(beta_v, 0, 1), np.clip(beta_f, 0, 1)
    self.v = beta_v * self.v + (1 - beta_v) * g**2
    if self.factored:
      square = g**2 + 1e-30
      d0, d1 = self.d0, self.d1
      self.row = beta_f * self.row + (1 - beta_f) * square.mean(axis=d0)
      self.col = beta_f * self.col + (1 - beta_f) * square.mean(axis=d1)
      reduced = d1 - 1 if d1 > d0 else d1
      mean = self.row.mean(axis=reduced, keepdims=True)
      row_factor = np.expand_dims(1 / np.sqrt(np.maximum(self.row / (mean + 1e-9), 1e-9)), d0)
      col_factor = np.expand_dims(1 / np.sqrt(np.maximum(self.col, 1e-9)), d1)
      everywhere = np.ones((*g.shape[:-1], 3))
      row, col = np.expand_dims(self.row, d0) * everywhere, np.expand_dims(self.col, d1) * everywhere
      g_factored, m_factored = g * row_factor * col_factor, self.m * row_factor * col_factor
    else:
      self.full = beta_f * self.full + (1 - beta_f) * (g**2 + 1e-30)
      row = col = self.full
      g_factored = g / np.sqrt(np.maximum(self.full + 1e-9, 1e-9))
      m_factored = self.m * (self.full + 1e-6) ** -0.5
    rsqrt = 1 / np.sqrt(self.v + 1e-6)
    columns = [g, p, self.m, self.v, self.m * rsqrt, rsqrt, g_factored, row, col]
    columns += [1 / np.sqrt(row + 1e-8), 1 / np.sqrt(col + 1e-8), m_factored]
    x = np.concatenate(columns, axis=-1)
    assert x.shape[-1] == 28
    x = x / np.sqrt(1e-5 + np.mean(x**2, axis=tuple(range(x.ndim - 1)), keepdims=True))
    scales = np.array([1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000])
    time = np.tanh(self.step / scales - 1) * np.ones((*x.shape[:-1], 1))
    x = np.concatenate([x, time], axis=-1)
    x = np.maximum(x @ self.nn["w0"] + self.nn["b0"], 0)
    x = np.maximum(x @ self.nn["w1"] + self.nn["b1"], 0)
    x = x @ self.nn["w2"] + self.nn["b2"]
    self.step += 1
    return -x[..., 0] * np.exp(0.001 * x[..., 1]) * 0.001


def test_published_weights_give_the_updates_of_a_plain_implementation():
  weights = published_weights(0)
  tx = adafactor_mlp.build().transform(published.adafactor_mlp(weights), 10)
  rng = np.random.default_rng(1)
  params = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
  state = tx.init(jax.tree.map(jnp.float32, params))
  update = jax.jit(tx.update)
  references = {name: NumpyOptimizer(weights, shape) for name, shape in SHAPES.items()}
  for scale in (0.0, 1.0, 1e-3, 0.0, 30.0, 0.1):
    gradients = {name: scale * rng.normal(size=shape) for name, shape in SHAPES.items()}
    updates, state = update(jax.tree.map(jnp.float32, gradients), state, jax.tree.map(jnp.float32, params))
    for name, reference in references.items():
      expected = reference.update(gradients[name], params[name])
      tolerance = 1e-5 * np.abs(expected).max()
      np.testing.assert_allclose(np.asarray(updates[name]), expected, rtol=1e-5, atol=tolerance, err_msg=name)
      np.testing.assert_allclose(state.momenta[name], np.moveaxis(reference.m, -1, 0), rtol=1e-5, atol=1e-9)
      params[name] = params[name] + expected


@pytest.mark.slow_but_for("shape1")
@pytest.mark.parametrize("shape", [(4, 3), (5,)])
def test_derivatives_are_those_of_the_plain_implementation(shape):
  """Forward and reverse mode, by all of θ and through the state, against differences of the NumPy optimizer."""
  rng = np.random.default_rng(2)
  weights = published_weights(3)
  params = rng.normal(size=shape)
  gradients = rng.normal(size=(2, *shape))
  direction = jax.tree.map(lambda w: rng.normal(size=np.shape(w)), weights)

  def plain(h):
    reference = NumpyOptimizer(jax.tree.map(lambda w, d: w + h * d, weights, direction), shape)
    return sum((np.cos(1e3 * reference.update(g, params)) * params).sum() for g in gradients)

  def ours(weights):
    tx: Any = adafactor_mlp.build().transform(weights, 10)
    state = tx.init(jnp.asarray(params))
    result = jnp.zeros(())
    for g in gradients:
      updates, state = tx.update(jnp.asarray(g), state, jnp.asarray(params))
      result += jnp.sum(jnp.cos(1e3 * updates) * params)
    return result

  expected = (plain(1e-6) - plain(-1e-6)) / 2e-6
  with jax.enable_x64(True):
    theta, tangent = jax.tree.map(jnp.float64, (weights, direction))
    gradient = jax.jit(jax.grad(ours))(theta)
    reverse = sum(jnp.vdot(g, t) for g, t in zip(*map(jax.tree.leaves, (gradient, tangent)), strict=True))
    _, forward = jax.jit(partial(jax.jvp, ours))((theta,), (tangent,))
  np.testing.assert_allclose([float(reverse), float(forward)], expected, rtol=1e-5)


def test_the_gradient_scale_multiplies_gradients():
  scaled, plain = adafactor_mlp.build(gradient_scale=1e3), adafactor_mlp.build()
  theta = plain.init(jax.random.key(0))
  rng = np.random.default_rng(0)
  params, gradients = ({"w": jnp.float32(rng.normal(size=(3, 2)))} for _ in range(2))

  def second_update(optimizer, gradients) -> Any:
    tx = optimizer.transform(theta, 10)
    _, state = tx.update(gradients, tx.init(params), params)
    return tx.update(gradients, state, params)[0]["w"]

  small = {"w": 1e-3 * gradients["w"]}
  np.testing.assert_allclose(second_update(scaled, small), second_update(plain, gradients), rtol=1e-3)
  assert np.abs(second_update(plain, small) - second_update(plain, gradients)).max() > 1e-5


def test_number_of_meta_parameters():
  """39·4 + 4 + 4·4 + 4 + 4·2 + 2 weights and 7 decays, as published."""
  theta = jax.eval_shape(adafactor_mlp.build().init, jax.random.key(0))
  assert sum(x.size for x in jax.tree.leaves(theta)) == 197


def test_parameters_are_required():
  optimizer = adafactor_mlp.build()
  tx = optimizer.transform(optimizer.init(jax.random.key(0)), 10)
  with pytest.raises(ValueError, match=r"update\(gradients, state, params\)"):
    tx.update({"w": jnp.ones(3)}, tx.init({"w": jnp.ones(3)}))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"hidden_sizes": ()}, "hidden_sizes="),
    ({"hidden_sizes": (4, 0)}, "hidden_sizes="),
    ({"decays": ()}, "decays="),
    ({"decays": (0.9, 1.0)}, "decays="),
    ({"second_moment_decay": -0.1}, "second_moment_decay=-0.1"),
    ({"epsilon": 0.0}, "epsilon=0.0"),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match=f"^{message}"):
    adafactor_mlp.build(**options)
