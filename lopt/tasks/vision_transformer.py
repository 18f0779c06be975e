"""Image classification by small vision transformers.

A. Dosovitskiy et al., "An image is worth 16x16 words: transformers for image recognition at scale", ICLR 2021; with
the mean over the patches in place of a class token (X. Zhai, A. Kolesnikov, N. Houlsby, L. Beyer, "Scaling vision
transformers", CVPR 2022).
"""

from typing import Any

import haiku as hk
import jax.numpy as jnp
from jaxtyping import Array, Float

from lopt import base, checks
from lopt.tasks import classification


@classification.with_options
def build(
  *,
  patch_size: int = 2,
  width: int = 16,
  layers: int = 1,
  heads: int = 2,
  mlp_ratio: int = 2,
  positions: bool = True,
  **options: Any,
) -> base.TaskFamily:
  """Transformer classifiers: patches, pre-norm transformer blocks, the mean over the patches, a linear layer.

  A block is x ← x + attention(norm(x)), x ← x + mlp(norm(x)), with layer norm; another norm follows the last block.
  The task's activation is that of the MLPs.

  Args:
    patch_size: height and width of a patch in pixels; divides the images'.
    width: of the residual stream; a multiple of `heads`.
    layers: transformer blocks.
    heads: of attention.
    mlp_ratio: hidden units of a block's MLP in units of `width`.
    positions: whether learned embeddings of the patches' positions are added to the patches. Without them the network
      does not know where a patch is.

  The other options are those of `classification.family`, which says what tasks of the family share and differ in.

  Raises:
    ValueError: an argument is out of range; the message starts with its name.
    FileNotFoundError, OSError: the data set cannot be had; see `lopt.tasks.datasets.load`.
  """
  checks.counts(patch_size=patch_size, width=width, layers=layers, heads=heads, mlp_ratio=mlp_ratio)
  checks.require(width % heads == 0, "width", width, f"a multiple of heads={heads}")

  def norm(x):
    return hk.LayerNorm(axis=-1, create_scale=True, create_offset=True)(x)

  def network(inputs, activate, num_outputs):
    x = hk.Linear(width, name="embedding")(_patches(inputs, patch_size))
    if positions:
      table = hk.get_parameter("positions", x.shape[1:], init=hk.initializers.TruncatedNormal(0.02))
      x = x + jnp.broadcast_to(table, x.shape)
    for _ in range(layers):
      h = norm(x)
      attention = hk.MultiHeadAttention(heads, width // heads, w_init=hk.initializers.TruncatedNormal(width**-0.5))
      x = x + attention(h, h, h)
      x = x + hk.nets.MLP([mlp_ratio * width, width], activation=activate)(norm(x))
    return hk.Linear(num_outputs, name="head")(norm(x).mean(axis=1))

  return classification.family(network, **options)


def _patches(images: Float[Array, "B height width channels"], size: int) -> Float[Array, "B patches patch_pixels"]:
  """Non-overlapping size x size patches, row by row, each flattened."""
  n, height, width, channels = images.shape
  checks.require(height % size == 0 and width % size == 0, "patch_size", size, f"a divisor of {height} and {width}")
  x = images.reshape(n, height // size, size, width // size, size, channels)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(n, -1, size * size * channels)
