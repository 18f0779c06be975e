"""Which examples a batch of a classification task has, and which of them bear a wrong label."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt32

from lopt import base
from lopt.tasks import datasets


class LabelNoise(NamedTuple):
  """Which training examples bear a wrong label."""

  probability: base.Scalar
  seed: UInt32[Array, ""]
  """Of the hash that picks examples and their labels."""


class Subset(NamedTuple):
  """Which training examples of each class are used: neighbours on the ring of them all."""

  fraction: base.Scalar
  start: base.Scalar
  """The first one's place on the ring, 0 to 1."""


class Split(NamedTuple):
  """Examples sorted by class: those of class c are rows offsets[c] ... offsets[c] + counts[c] - 1."""

  images: Array
  offsets: Array
  counts: Array


def mislabel(
  labels: Int[Array, " B"], rows: Int[Array, " B"], num_classes: Int[Array, ""], noise: LabelNoise
) -> Int[Array, " B"]:
  """Replaces the labels of some examples, by a hash of the seed and the example's row in the data set."""
  key = jax.random.key(noise.seed)
  uniform = jax.vmap(lambda row: jax.random.uniform(jax.random.fold_in(key, row), (2,)))(rows)
  wrong = (labels + 1 + (uniform[:, 1] * (num_classes - 1)).astype(jnp.int32)) % num_classes
  return jnp.where(uniform[:, 0] < noise.probability, wrong, labels)


def sort_by_class(data: datasets.Dataset, split: str, dataset: str) -> Split:
  pixels, labels = (np.asarray(x) for x in getattr(data, split))
  counts = np.bincount(labels, minlength=data.num_classes)
  if counts.min() < 1 or counts.max() >= 2**16:
    raise ValueError(
      f"dataset={dataset!r}: must have 1 to 65535 examples of each class, and has {counts.min()} to "
      f"{counts.max()} in split {split!r}"
    )
  order = np.argsort(labels, kind="stable")
  return Split(
    images=jnp.asarray(pixels[order].reshape(len(pixels), -1)),
    offsets=jnp.asarray(np.cumsum(counts) - counts, jnp.int32),
    counts=jnp.asarray(counts, jnp.int32),
  )


def scale_bits(bits: UInt32[Array, " B"], n: Int[Array, "..."]) -> tuple[Int[Array, " B"], UInt32[Array, " B"]]:
  """⌊u·n⌋ and the bits of the fraction u·n − ⌊u·n⌋, for u = bits / 2³² in [0, 1) and n < 2¹⁶."""
  n = jnp.broadcast_to(n.astype(jnp.uint32), bits.shape)
  high = ((bits >> 16) * n + ((bits & 0xFFFF) * n >> 16)) >> 16  # of the 48 bits of bits·n, those above 2³²
  return high.astype(jnp.int32), bits * n
