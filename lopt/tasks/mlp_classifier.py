"""Image classification by small multi-layer perceptrons, varied in what decides how hard they are to train."""

import haiku as hk

from lopt import base, checks
from lopt.tasks import classification


def build(
  *,
  dataset: str = "digits",
  resolution: int | None = 8,
  hidden_sizes: tuple[int, ...] = (32,),
  batch_size: int = 64,
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
  """MLP classifiers on an image data set that stays on the device.

  Args:
    hidden_sizes: units of each hidden layer; () for a linear classifier.

  The other options are those of `classification.family`, which says what tasks of the family share and differ in.

  Raises:
    ValueError: an argument is out of range; the message starts with its name.
    FileNotFoundError, OSError: the data set cannot be had; see `lopt.tasks.datasets.load`.
  """
  checks.require(all(size >= 1 for size in hidden_sizes), "hidden_sizes", hidden_sizes, "sizes of at least 1")

  def network(inputs, activate, num_outputs):
    return hk.nets.MLP([*hidden_sizes, num_outputs], activation=activate)(hk.Flatten()(inputs))

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
