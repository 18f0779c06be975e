"""Image classification by small multi-layer perceptrons, varied in what decides how hard they are to train."""

from typing import Any

import haiku as hk

from lopt import base, checks
from lopt.tasks import classification


@classification.with_options
def build(
  *,
  hidden_sizes: tuple[int, ...] = (32,),
  batch_size: int = 64,
  **options: Any,
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

  return classification.family(network, batch_size=batch_size, **options)
