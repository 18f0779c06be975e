"""Image classification by small convolutional networks."""

from typing import Any, Literal

import haiku as hk

from lopt import base, checks
from lopt.tasks import classification, images


@classification.with_options
def build(
  *,
  channels: tuple[int, ...] = (8, 16),
  pooling: Literal["mean", "flatten"] = "flatten",
  **options: Any,
) -> base.TaskFamily:
  """Convolutional classifiers: 3x3 convolutions with stride 2, each followed by the activation, and a linear layer.

  Args:
    channels: of each convolution; height and width halve (rounded up) with each.
    pooling: what the linear layer sees of the last convolution: the mean over the pixels, or all of them.

  The other options are those of `classification.family`, which says what tasks of the family share and differ in.

  Raises:
    ValueError: an argument is out of range; the message starts with its name.
    FileNotFoundError, OSError: the data set cannot be had; see `lopt.tasks.datasets.load`.
  """
  checks.require(len(channels) > 0 and min(channels) >= 1, "channels", channels, "one or more numbers of at least 1")
  checks.one_of("pooling", pooling, ("mean", "flatten"))

  def network(inputs, activate, num_outputs):
    x = inputs
    for n in channels:
      x = activate(images.convolve(x, n, stride=2))
    return hk.Linear(num_outputs)(x.mean(axis=(1, 2)) if pooling == "mean" else hk.Flatten()(x))

  return classification.family(network, **options)
