"""Image classification by small residual networks with pre-activation.

K. He, X. Zhang, S. Ren, J. Sun, "Identity mappings in deep residual networks", ECCV 2016.

The normalisation is group norm (Y. Wu, K. He, "Group normalization", ECCV 2018). Batch norm needs running statistics,
which are neither parameters to train nor part of a loss that is a function of parameters and batch; and it makes
training and test losses two different functions of the parameters.
"""

from typing import Any

import haiku as hk

from lopt import base, checks
from lopt.tasks import classification, images


@classification.with_options
def build(
  *,
  channels: tuple[int, ...] = (8, 16),
  blocks: int = 1,
  groups: int = 4,
  **options: Any,
) -> base.TaskFamily:
  """Residual classifiers: a 3x3 convolution, stages of residual blocks, the mean over the pixels, a linear layer.

  A block is x + c(a(n(c(a(n(x)))))) of group norm n, activation a and 3x3 convolution c. The first block of each
  stage but the first has stride 2 in its first convolution, and x goes through a 1x1 convolution with that stride.

  Args:
    channels: of each stage, multiples of `groups`.
    blocks: residual blocks of each stage.
    groups: over which the channels of an image are normalised; 1 is layer norm.

  The other options are those of `classification.family`, which says what tasks of the family share and differ in.

  Raises:
    ValueError: an argument is out of range; the message starts with its name.
    FileNotFoundError, OSError: the data set cannot be had; see `lopt.tasks.datasets.load`.
  """
  checks.require(blocks >= 1, "blocks", blocks, "at least 1")
  checks.require(groups >= 1, "groups", groups, "at least 1")
  checks.require(len(channels) > 0, "channels", channels, "one or more numbers")
  for n in channels:
    checks.require(n >= 1 and n % groups == 0, "channels", channels, f"multiples of groups={groups}")

  def network(inputs, activate, num_outputs):
    def normalized(x):
      return activate(hk.GroupNorm(groups)(x))

    x = images.convolve(inputs, channels[0])
    for stage, n in enumerate(channels):
      for block in range(blocks):
        stride = 2 if stage > 0 and block == 0 else 1
        residual = images.convolve(normalized(x), n, stride=stride)
        residual = images.convolve(normalized(residual), n)
        x = (x if stride == 1 else images.convolve(x, n, size=1, stride=stride)) + residual
    return hk.Linear(num_outputs)(normalized(x).mean(axis=(1, 2)))

  return classification.family(network, **options)
