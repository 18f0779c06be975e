"""Data for the tests of image tasks."""

import jax.numpy as jnp
import numpy as np
import pytest

from lopt.tasks import datasets


@pytest.fixture
def colour_images(monkeypatch):
  """Makes every data set one of random 4x6 colour images in 3 classes: none of the numbers are equal."""
  generator = np.random.default_rng(0)

  def split(examples):
    images = generator.integers(0, 256, (examples, 4, 6, 3), np.uint8)
    labels = np.arange(examples, dtype=np.int32) % 3
    return datasets.Split(jnp.asarray(images), jnp.asarray(labels))

  data = datasets.Dataset(split(90), split(30), split(30), num_classes=3, max_value=255)
  monkeypatch.setattr(datasets, "load", lambda name, *, resolution, data_dir: data)
  return data
