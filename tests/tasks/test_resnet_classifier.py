"""Residual classifiers against NumPy in float64, on colour images that are not square."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
import scipy.special

from lopt.tasks import datasets, resnet_classifier


def convolve(x, layer, stride=1):
  """Images with zeros around them, by square kernels."""
  size = round((len(layer["w"]) / x.shape[-1]) ** 0.5)
  kernel = layer["w"].reshape(1, size, size, x.shape[-1], -1)
  margin = (size // 2, size // 2)
  padded = np.pad(x, ((0, 0), margin, margin, (0, 0)))
  channels = [scipy.signal.correlate(padded, kernel[..., i], mode="valid")[..., 0] for i in range(kernel.shape[-1])]
  return np.stack(channels, axis=-1)[:, ::stride, ::stride] + layer["b"]


def group_norm(x, layer, groups):
  """Wu & He (2018), equations 1 to 6: each image's groups of channels have mean 0 and variance 1."""
  y = x.reshape(*x.shape[:3], groups, -1)
  mean, variance = y.mean(axis=(1, 2, 4), keepdims=True), y.var(axis=(1, 2, 4), keepdims=True)
  y = ((y - mean) / np.sqrt(variance + 1e-5)).reshape(x.shape)
  return y * layer["scale"] + layer["offset"]


def cross_entropy(x, params, batch):
  logits = x.mean(axis=(1, 2)) @ params["linear"]["w"] + params["linear"]["b"]
  return -scipy.special.log_softmax(logits, axis=1)[np.arange(len(x)), np.asarray(batch.labels)].mean()


def test_network(colour_images):
  """All of it; and with the last convolution of each block at zero, the path past the blocks."""
  family = resnet_classifier.build(
    channels=(4, 6), blocks=2, groups=2, batch_size=8, activations=("tanh",), min_classes=3, loss_scale=(1.0, 1.0)
  )

  task_params = family.sample(jax.random.key(0))
  # Not those of `init`, whose biases are zero and gains one, so that errors in them would go unnoticed.
  generator = np.random.default_rng(0)
  shapes = jax.eval_shape(family.init, jax.random.key(1), task_params)
  arrays = jax.tree.map(lambda x: jnp.asarray(0.5 * generator.standard_normal(x.shape), jnp.float32), shapes)
  batch = family.batch(jax.random.key(2), task_params, "train")
  loss = jax.jit(lambda params: family.loss(params, jax.random.key(3), batch, task_params)[0])

  params = jax.tree.map(lambda x: np.asarray(x, np.float64), arrays)
  images = np.asarray(batch.inputs, np.float64).reshape(8, 4, 6, 3)

  convolutions = iter(["convolution", *(f"convolution_{i}" for i in range(1, 20))])
  norms = iter(["group_norm", *(f"group_norm_{i}" for i in range(1, 20))])
  x = convolve(images, params[next(convolutions)])
  last = []
  for stride in (1, 1, 2, 1):
    y = np.tanh(group_norm(x, params[next(norms)], 2))
    y = convolve(y, params[next(convolutions)], stride)
    y = np.tanh(group_norm(y, params[next(norms)], 2))
    last.append(next(convolutions))
    y = convolve(y, params[last[-1]])
    x = y + (x if stride == 1 else convolve(x, params[next(convolutions)], stride))
  assert x.shape == (8, 2, 3, 6)
  expected = cross_entropy(np.tanh(group_norm(x, params[next(norms)], 2)), params, batch)
  np.testing.assert_allclose(loss(arrays), expected, rtol=1e-5)
  assert not {next(convolutions), next(norms)} & set(params)

  shortcut = {name: jax.tree.map(jnp.zeros_like, layer) if name in last else layer for name, layer in arrays.items()}
  x = convolve(convolve(images, params["convolution"]), params["convolution_7"], 2)
  expected = cross_entropy(np.tanh(group_norm(x, params["group_norm_8"], 2)), params, batch)
  np.testing.assert_allclose(loss(shortcut), expected, rtol=1e-5)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"channels": ()}, "channels="),
    ({"channels": (4, 6)}, "channels=.*multiples of groups=4"),
    ({"channels": (0,)}, "channels="),
    ({"blocks": 0}, "blocks=0: must be at least 1"),
    ({"groups": 0}, "groups=0: must be at least 1"),
  ],
)
def test_bad_options(options, message, monkeypatch):
  monkeypatch.setattr(datasets, "load", None)
  with pytest.raises(ValueError, match=f"^{message}"):
    resnet_classifier.build(**options)
