"""Images of another size, in NumPy."""

import numpy as np


def resize(images: np.ndarray, resolution: int | None) -> np.ndarray:
  """Area average: with box weights W of shape [resolution, size], each image X becomes W_rows · X · W_columnsᵀ."""
  if resolution is None or images.shape[1:3] == (resolution, resolution):
    return images
  rows, columns = (_box_weights(size, resolution) for size in images.shape[1:3])
  resized = np.empty((len(images), resolution, resolution, images.shape[3]), np.uint8)
  for start in range(0, len(images), 4096):  # floats for all images at once would take 4 times their memory
    part = images[start : start + 4096].astype(np.float32)
    mean = np.einsum("ri,nijc,sj->nrsc", rows, part, columns, optimize=True)
    resized[start : start + 4096] = np.rint(mean)
  return resized


def _box_weights(size: int, resolution: int) -> np.ndarray:
  """weights[r, i]: the part of output pixel r, which spans size / resolution input pixels, that pixel i covers."""
  edges = np.linspace(0, size, resolution + 1)
  pixels = np.arange(size)
  overlap = np.minimum(edges[1:, None], pixels[None] + 1) - np.maximum(edges[:-1, None], pixels[None])
  return (np.maximum(overlap, 0) * resolution / size).astype(np.float32)
