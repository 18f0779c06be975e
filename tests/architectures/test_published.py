"""Published weights of MLPLOpt: same updates as a plain NumPy one that reads the published dictionary.

Those of AdafacMLPLOpt are imported in test_adafactor_mlp.py, whose reference reads the published dictionary too.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lopt.architectures import adafactor_mlp, mlp, published

SHAPES = {"scalar": (), "vector": (7,), "matrix": (3, 5), "kernel": (3, 2, 4, 5)}


def mlp_weights(sizes=(19, 8, 6, 2)):
  rng = np.random.default_rng(0)
  return {
    f"mlp/~/linear_{i}": {"w": rng.normal(size=shape), "b": rng.normal(size=shape[1])}
    for i, shape in enumerate(itertools.pairwise(sizes))
  }


def numpy_update(weights, g, p, m, step):
  """MLPLOpt with features last; momenta m are [..., 6]."""
  x = np.concatenate([g[..., None], p[..., None], m], axis=-1)
  x = x / np.sqrt(1e-5 + np.mean(x**2, axis=tuple(range(g.ndim)), keepdims=True))
  scales = np.array([1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000])
  x = np.concatenate([x, np.tanh(step / scales - 1) * np.ones((*g.shape, 1))], axis=-1)
  for i in range(3):
    layer = weights[f"mlp/~/linear_{i}"]
    x = (np.maximum(x, 0) if i else x) @ layer["w"] + layer["b"]
  return -0.001 * x[..., 0] * np.exp(0.001 * x[..., 1])


def test_mlp_weights_give_the_updates_of_a_plain_implementation():
  weights = mlp_weights()
  tx = mlp.build(hidden_sizes=(8, 6), epsilon=1e-5).transform(published.mlp(weights), 10)
  rng = np.random.default_rng(1)
  params = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
  state = tx.init(jax.tree.map(jnp.float32, params))
  update = jax.jit(tx.update)
  decays = np.array([0.1, 0.5, 0.9, 0.99, 0.999, 0.9999])
  momenta = {name: np.zeros((*shape, 6)) for name, shape in SHAPES.items()}
  for step, scale in enumerate((1.0, 1e-3, 0.0, 30.0)):
    gradients = {name: scale * rng.normal(size=shape) for name, shape in SHAPES.items()}
    updates, state = update(jax.tree.map(jnp.float32, gradients), state, jax.tree.map(jnp.float32, params))
    for name, g in gradients.items():
      momenta[name] = decays * momenta[name] + (1 - decays) * np.asarray(g)[..., None]
      expected = numpy_update(weights, np.asarray(g), np.asarray(params[name]), momenta[name], step)
      tolerance = 1e-5 * np.abs(expected).max()
      np.testing.assert_allclose(np.asarray(updates[name]), expected, rtol=1e-5, atol=tolerance, err_msg=name)
      params[name] = params[name] + expected


def test_theta_has_the_structure_of_the_architectures():
  key = jax.random.key(0)
  theta = published.mlp(mlp_weights((19, 32, 32, 2)))
  assert jax.tree.map(jnp.shape, theta) == jax.tree.map(jnp.shape, jax.eval_shape(mlp.build().init, key))
  like = jax.eval_shape(adafactor_mlp.build(hidden_sizes=(5, 3, 4), decays=(0.5, 0.9)).init, key)
  theta = jax.tree.map(lambda x: np.random.default_rng(0).normal(size=x.shape).astype(np.float32), like)
  jax.tree.map(np.testing.assert_array_equal, theta, published.adafactor_mlp(theta))


def test_flat_names_do_as_well():
  weights = mlp_weights()
  flat = {f"{module}/{name}": x for module, arrays in weights.items() for name, x in arrays.items()}
  jax.tree.map(np.testing.assert_array_equal, published.mlp(weights), published.mlp(flat))


def adafactor_weights(**changes):
  shapes = {"momentum_decays": 3, "rms_decays": 1, "adafactor_decays": 3}
  shapes |= {f"nn/~/w{i}": shape for i, shape in enumerate(itertools.pairwise((39, 4, 4, 2)))}
  shapes |= {f"nn/~/b{i}": size for i, size in enumerate((4, 4, 2))}
  shapes |= {name.replace("nn_", "nn/~/"): shape for name, shape in changes.items()}
  return {name: np.zeros(shape) for name, shape in shapes.items() if shape is not None}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"rms_decays": None}, "rms_decays: missing; other arrays: adafactor_decays, nn/~/w0, "),
    ({"adafactor_decays": 2}, r"adafactor_decays: must have shape \(3\), not \(2,\)"),
    ({"nn_w0": (31, 4)}, r"nn/~/w0: must have shape \(39, any\), not \(31, 4\)"),
    ({"nn_w1": None}, "nn/~/w1: missing"),
    ({"nn_w2": (4, 3)}, r"nn/~/w2: must have shape \(4, 2\)"),
    ({"nn_b1": 5}, r"nn/~/b1: must have shape \(4\), not \(5,\)"),
    ({"nn_b2": None}, "nn/~/b2: missing"),
    ({"other": 1}, "other: not of this architecture"),
  ],
)
def test_bad_adafactor_weights(changes, message):
  with pytest.raises(ValueError, match=f"^{message}"):
    published.adafactor_mlp(adafactor_weights(**changes))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"mlp/~/linear_0": {}}, "mlp/~/linear_0/w: missing"),
    ({"mlp/~/linear_1": {"w": np.zeros((8, 6))}}, "mlp/~/linear_1/b: missing"),
    ({"mlp/~/linear_0": {"w": np.zeros((18, 8)), "b": np.zeros(8)}}, "mlp/~/linear_0/w: must have shape"),
  ],
)
def test_bad_mlp_weights(change, message):
  with pytest.raises(ValueError, match=f"^{message}"):
    published.mlp({**mlp_weights(), **change})


def test_no_weights():
  with pytest.raises(ValueError, match="linear_0/w: missing; other arrays: none"):
    published.mlp({})
