"""Convolutional classifiers against SciPy's correlation in float64, on colour images that are not square."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
import scipy.special

from lopt.tasks import cnn_classifier, datasets


def convolve(x, layer, stride):
  """One image with zeros around it, by 3x3 kernels."""
  kernel = layer["w"].reshape(3, 3, x.shape[-1], -1)
  padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
  channels = [
    scipy.signal.correlate(padded, kernel[..., i], mode="valid")[..., 0] + layer["b"][i]
    for i in range(kernel.shape[-1])
  ]
  return np.stack(channels, axis=-1)[::stride, ::stride]


@pytest.mark.parametrize("pooling", ["mean", "flatten"])
def test_network_is_scipys(colour_images, pooling):
  family = cnn_classifier.build(
    channels=(4, 6), pooling=pooling, batch_size=8, activations=("relu", "tanh"), min_classes=3
  )

  task_params = family.sample(jax.random.key(0))._replace(activation=jnp.int32(1))
  # Not those of `init`, whose biases are zero and gains one, so that errors in them would go unnoticed.
  generator = np.random.default_rng(0)
  shapes = jax.eval_shape(family.init, jax.random.key(1), task_params)
  params = jax.tree.map(lambda x: jnp.asarray(0.5 * generator.standard_normal(x.shape), jnp.float32), shapes)
  batch = family.batch(jax.random.key(2), task_params, "train")
  loss, _ = jax.jit(family.loss)(params, jax.random.key(3), batch, task_params)

  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  image_of = {image.tobytes(): image for image in np.asarray(colour_images.train.images)}
  logits = []
  for pixels in np.asarray(batch.inputs) / np.asarray(task_params.input_scale) * 255:
    image = image_of[np.rint(pixels).astype(np.uint8).tobytes()]
    x = image / 255 * float(task_params.input_scale)
    for name in ("convolution", "convolution_1"):
      x = np.tanh(convolve(x, params[name], 2))
    assert x.shape == (1, 2, 6)
    x = x.mean(axis=(0, 1)) if pooling == "mean" else x.ravel()
    logits.append(x @ params["linear"]["w"] + params["linear"]["b"])
  log_p = scipy.special.log_softmax(logits, axis=1)
  expected = -log_p[np.arange(8), np.asarray(batch.labels)].mean() * task_params.loss_scale
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"channels": ()}, "channels="),
    ({"channels": (4, 0)}, "channels="),
    ({"batch_size": 0}, "batch_size=0: must be at least 1"),
  ],
)
def test_bad_options(options, message, monkeypatch):
  monkeypatch.setattr(datasets, "load", None)
  with pytest.raises(ValueError, match=f"^{message}"):
    cnn_classifier.build(**options)
