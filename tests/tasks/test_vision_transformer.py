"""Vision transformers against NumPy in float64, and what positions are for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from lopt.tasks import datasets, vision_transformer


def start(family):
  """A task, random parameters and a batch."""
  task_params = family.sample(jax.random.key(0))
  # Not those of `init`, whose biases are zero and gains one, so that errors in them would go unnoticed.
  generator = np.random.default_rng(0)
  shapes = jax.eval_shape(family.init, jax.random.key(1), task_params)
  params = jax.tree.map(lambda x: jnp.asarray(0.5 * generator.standard_normal(x.shape), jnp.float32), shapes)
  return task_params, params, family.batch(jax.random.key(2), task_params, "train")


def linear(x, layer):
  return x @ layer["w"] + layer["b"]


def layer_norm(x, layer):
  x = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)
  return x * layer["scale"] + layer["offset"]


def attention(x, params, name, heads):
  """softmax(q kᵀ / √d) v for each image and head."""
  results = np.zeros_like(x)
  for image, tokens in enumerate(x):
    q, k, v = (
      np.split(linear(tokens, params[f"{name}/{part}"]), heads, axis=1) for part in ("query", "key", "value")
    )
    parts = [
      scipy.special.softmax(a @ b.T / np.sqrt(a.shape[1]), axis=1) @ c for a, b, c in zip(q, k, v, strict=True)
    ]
    results[image] = linear(np.concatenate(parts, axis=1), params[f"{name}/linear"])
  return results


def test_network(colour_images):
  family = vision_transformer.build(
    width=6, layers=2, heads=3, mlp_ratio=3, batch_size=8, activations=("tanh",), min_classes=3
  )

  task_params, params, batch = start(family)
  loss, _ = jax.jit(family.loss)(params, jax.random.key(3), batch, task_params)

  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  images = np.asarray(batch.inputs, np.float64).reshape(8, 4, 6, 3)
  patches = [images[:, i : i + 2, j : j + 2].reshape(8, 12) for i in (0, 2) for j in (0, 2, 4)]
  x = linear(np.stack(patches, axis=1), params["embedding"]) + params["~"]["positions"]
  for norms, heads, mlp in (
    (("layer_norm", "layer_norm_1"), "multi_head_attention", "mlp"),
    (("layer_norm_2", "layer_norm_3"), "multi_head_attention_1", "mlp_1"),
  ):
    x = x + attention(layer_norm(x, params[norms[0]]), params, heads, 3)
    hidden = np.tanh(linear(layer_norm(x, params[norms[1]]), params[f"{mlp}/~/linear_0"]))
    assert hidden.shape == (8, 6, 18)
    x = x + linear(hidden, params[f"{mlp}/~/linear_1"])
  logits = linear(layer_norm(x, params["layer_norm_4"]).mean(axis=1), params["head"])
  log_p = scipy.special.log_softmax(logits, axis=1)
  expected = -log_p[np.arange(8), np.asarray(batch.labels)].mean() * task_params.loss_scale
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("positions", [False, True])
def test_only_positions_tell_the_order_of_patches(colour_images, positions):
  family = vision_transformer.build(width=4, positions=positions, batch_size=8, activations=("tanh",))

  task_params, params, batch = start(family)
  # Rows and columns of patches first, and then one axis of patches.
  x = np.asarray(batch.inputs).reshape(8, 2, 2, 3, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(8, 6, 2, 2, 3)
  x = x[:, [3, 0, 5, 1, 4, 2]].reshape(8, 2, 3, 2, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(8, -1)
  loss = jax.jit(lambda batch: family.loss(params, jax.random.key(3), batch, task_params)[0])
  change = abs(loss(batch._replace(inputs=jnp.asarray(x))) / loss(batch) - 1)
  assert change > 1e-3 if positions else change < 1e-5


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"patch_size": 0}, "patch_size: must be at least 1, not 0"),
    ({"layers": 0}, "layers: must be at least 1, not 0"),
    ({"heads": 3}, "width=16: must be a multiple of heads=3"),
  ],
)
def test_bad_options(options, message, monkeypatch):
  monkeypatch.setattr(datasets, "load", None)
  with pytest.raises(ValueError, match=f"^{message}"):
    vision_transformer.build(**options)


def test_patches_that_do_not_fit(colour_images):
  with pytest.raises(ValueError, match=r"^patch_size=3: must be a divisor of 4 and 6"):
    vision_transformer.build(patch_size=3)
