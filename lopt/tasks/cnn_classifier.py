"""Image classification by small convolutional networks."""

from typing import Literal

import haiku as hk

from lopt import base, checks
from lopt.tasks import classification, images


def build(
  *,
  dataset: str = "digits",
  resolution: int | None = 8,
  channels: tuple[int, ...] = (8, 16),
  pooling: Literal["mean", "flatten"] = "flatten",
  batch_size: int = 32,
  activations: tuple[str, ...] = ("relu", "tanh", "sigmoid", "swish", "gelu"),
  losses: tuple[str, ...] = ("cross_entropy",),
  min_classes: int = 2,
  max_classes: int | None = None,
  weight_scale: tuple[float, float] = (0.25, 2.0),
  input_scale: tuple[float, float] = (0.3, 1.0),
  loss_scale: tuple[float, float] = (0.1, 10.0),
  width_fraction: tuple[float, float] | None = None,
  label_noise: tuple[float, float] | None = None,
  input_noise: tuple[float, float] | None = None,
  data_fraction: tuple[float, float] | None = None,
  data_dir: str | None = None,
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

  return classification.family(
    network,
    dataset=dataset,
    resolution=resolution,
    batch_size=batch_size,
    activations=activations,
    losses=losses,
    min_classes=min_classes,
    max_classes=max_classes,
    weight_scale=weight_scale,
    input_scale=input_scale,
    loss_scale=loss_scale,
    width_fraction=width_fraction,
    label_noise=label_noise,
    input_noise=input_noise,
    data_fraction=data_fraction,
    data_dir=data_dir,
  )
