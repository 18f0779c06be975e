"""What task families on images share: activations, factors, a convolution that is fast under `vmap`, and batches of
bare pixels.
"""

from collections.abc import Callable
from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.special
from jaxtyping import Array, Float, Int, UInt8

from lopt import base, checks
from lopt.tasks import datasets

Activation = Callable[[Array], Array]

ACTIVATIONS: dict[str, Activation] = {
  "relu": jax.nn.relu,
  "tanh": jnp.tanh,
  "sigmoid": jax.nn.sigmoid,
  "swish": jax.nn.swish,
  "gelu": jax.nn.gelu,
}


class Pixels(NamedTuple):
  """The images of a data set without their labels, row by row as flat uint8 arrays on the device."""

  train: UInt8[Array, "examples pixels"]
  validation: UInt8[Array, "examples pixels"]
  test: UInt8[Array, "examples pixels"]
  max_value: int
  mean: np.ndarray
  """The mean training image, [pixels], drawn by half an example towards grey so that it lies within (0, 1)."""
  squared_error: float
  """Mean squared error per pixel of `mean` on the training images."""
  divergence: float
  """Mean `pixel_divergence` of `mean` on the training images."""


def load_pixels(dataset: str, resolution: int | None, data_dir: str | None) -> Pixels:
  """The arrays of `datasets.load`, and what is known of an image before one has seen it."""
  data = datasets.load(dataset, resolution=resolution, data_dir=data_dir)
  train, validation, test = (split.images.reshape(len(split.images), -1) for split in data[:3])
  host = np.asarray(train)  # sums of integers there are exact, and of float32 would not be
  first = np.sum(host, axis=0, dtype=np.int64) / data.max_value
  second = np.sum(np.square(host, dtype=np.uint16), axis=0, dtype=np.int64) / data.max_value**2
  mean = (first + 0.5) / (len(host) + 1)
  first, second = first / len(host), second / len(host)
  counts = [np.count_nonzero(host == value) for value in range(data.max_value + 1)]
  grey = np.arange(data.max_value + 1) / data.max_value
  entropy = np.average(scipy.special.entr(grey) + scipy.special.entr(1 - grey), weights=counts)
  return Pixels(
    train,
    validation,
    test,
    data.max_value,
    np.asarray(mean),
    squared_error=float(np.mean(second - 2 * mean * first + mean**2)),
    divergence=float(-np.mean(first * np.log(mean) + (1 - first) * np.log1p(-mean)) - entropy),
  )


def mean_logits(pixels: Pixels) -> Float[Array, " pixels"]:
  """The logits whose sigmoid is the mean training image."""
  return jnp.asarray(scipy.special.logit(pixels.mean), jnp.float32)


def draw_pixels(key: base.PRNGKey, pixels: Pixels, split: str, batch_size: int) -> Float[Array, "B pixels"]:
  """Images of a split, from 0 to 1, drawn uniformly with replacement.

  Raises:
    ValueError: no such split.
  """
  checks.one_of("split", split, base.SPLITS)
  images = getattr(pixels, split)
  rows = jax.random.randint(key, (batch_size,), 0, len(images))
  return images[rows].astype(jnp.float32) / pixels.max_value


def pixel_divergence(logits: Float[Array, "B pixels"], pixels: Float[Array, "B pixels"]) -> Float[Array, "B pixels"]:
  """Kullback-Leibler divergence, in nats, from the prediction p = sigmoid(logits) to the pixels x:

      x log (x/p) + (1 - x) log ((1 - x)/(1 - p)).

  Each pixel is a Bernoulli variable that is on with probability x, and so is its prediction. It is the usual
  cross-entropy less the entropy of x, a constant without which a perfect prediction of grey pixels would not have 0.
  """
  # XLA may compute 1 - x/255 as one fused 1 - x·r with r = 1/255 rounded, which for x = 255 is below 0.
  entropy = jax.scipy.special.entr(pixels) + jax.scipy.special.entr(jnp.maximum(1 - pixels, 0))
  return optax.sigmoid_binary_cross_entropy(logits, pixels) - entropy


def choose_activation(
  names: tuple[str, ...], index: Int[Array, ""], width_fraction: base.Scalar | None = None
) -> Activation:
  """The activation `names[index]`.

  Under `vmap` over tasks all of them are evaluated; next to the matrix products that is little.

  Args:
    names: of `ACTIVATIONS`.
    index: which of them; may be traced.
    width_fraction: if not None, the units beyond this fraction of the last axis give zero.
  """
  functions = [ACTIVATIONS[name] for name in names]

  def activate(x: Array) -> Array:
    activated = jax.lax.switch(index, functions, x)
    if width_fraction is None:
      return activated
    kept = jnp.arange(x.shape[-1]) < jnp.ceil(width_fraction * x.shape[-1])
    return jnp.where(jnp.broadcast_to(kept, x.shape), activated, 0.0)

  return activate


def scale_weights(params: base.Params, scale: base.Scalar) -> base.Params:
  """Multiplies the weights `w` of all Haiku modules, but not biases and the gains of normalisations."""
  return hk.data_structures.map(lambda module, name, value: scale * value if name == "w" else value, params)


def convolve(
  images: Float[Array, "B height width channels"], channels: int, *, size: int = 3, stride: int = 1
) -> Float[Array, "B new_height new_width new_channels"]:
  """A convolution with zeros around the images, for use inside of `hk.transform`.

  It is an `hk.Linear` on the size x size neighbourhoods of pixels 0, stride, 2·stride, ..., gathered beside each
  other. With a weight array per task a convolution becomes a grouped one, for which XLA has no fast code: 16 networks
  of two layers (8 and 16 channels, 8x8 pixels) trained 6 times faster this way on a CPU core.

  Args:
    images: the input.
    channels: of the output.
    size: height and width of the neighbourhood, odd.
    stride: height and width are divided by this, rounded up.
  """
  _, height, width, _ = images.shape
  margin = (size - 1) // 2
  padded = jnp.pad(images, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
  neighbours = [padded[:, i : i + height : stride, j : j + width : stride] for i in range(size) for j in range(size)]
  return hk.Linear(channels, name="convolution")(jnp.concatenate(neighbours, axis=-1))
