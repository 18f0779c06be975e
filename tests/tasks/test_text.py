"""What language models share, with texts whose characters are their own positions, and a table of bigrams."""

import itertools
import math

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from lopt import base
from lopt.tasks import datasets, text

SPLITS = {"train": (0, 500), "validation": (500, 560), "test": (560, 650)}
PARTS = {name: jnp.arange(first, end, dtype=jnp.int32) for name, (first, end) in SPLITS.items()}
TEXT = datasets.Text(**PARTS, alphabet="".join(map(chr, range(650))))


def bigrams(characters):
  return hk.Embed(650, 650)(characters)


def family(**options):
  settings = {
    "context": 4,
    "batch_size": 32,
    "part": (0.1, 1.0),
    "weight_scale": (0.5, 2.0),
    "loss_scale": (0.1, 10.0),
  }
  return text.language_model(TEXT, bigrams, **(settings | options))


def test_windows_start_everywhere_in_their_split():
  tasks = family(part=(0.3, 0.3), batch_size=10_000)
  task = tasks.sample(jax.random.key(2))
  assert task.length == 150
  for split, (first, end) in SPLITS.items():
    if split == "train":
      first, end = int(task.start), int(task.start) + 150
      assert 0 < first < end < 500
    windows = np.asarray(tasks.batch(jax.random.key(3), task, split))
    assert windows.shape == (10_000, 5)
    np.testing.assert_array_equal(windows - windows[:, :1], np.broadcast_to(np.arange(5), windows.shape))
    counts = np.bincount(windows[:, 0] - first)
    assert len(counts) == end - first - 4  # all, to the last whose window ends with the split
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_the_shortest_split_with_one_window():
  tasks = family(context=59, batch_size=3, part=(1.0, 1.0))
  windows = tasks.batch(jax.random.key(0), tasks.sample(jax.random.key(1)), "validation")
  np.testing.assert_array_equal(windows, np.broadcast_to(np.arange(500, 560), (3, 60)))


def test_a_part_has_at_least_one_window():
  tasks = family(part=(1e-6, 1e-6))
  task = tasks.sample(jax.random.key(0))
  windows = np.asarray(tasks.batch(jax.random.key(1), task, "train"))
  np.testing.assert_array_equal(windows, np.broadcast_to(int(task.start) + np.arange(5), (32, 5)))


def test_the_distribution_of_tasks():
  tasks = jax.jit(jax.vmap(family().sample))(jax.random.split(jax.random.key(0), 3000))
  start, length, weight_scale, loss_scale = (np.asarray(x, np.float64) for x in tasks)
  assert length.min() >= 50
  assert (start + length).max() == 500
  for values, low, high in ((weight_scale, 0.5, 2), (loss_scale, 0.1, 10), (length + 0.5, 50, 501)):
    uniform = scipy.stats.uniform(math.log(low), math.log(high / low))
    assert scipy.stats.kstest(np.log(values), uniform.cdf).pvalue > 1e-3
  place = (start + 0.5)[length < 400] / (501 - length)[length < 400]
  assert scipy.stats.kstest(place, scipy.stats.uniform.cdf).pvalue > 1e-3


def test_loss_is_the_cross_entropy_of_the_next_characters():
  tasks = family()
  task = tasks.sample(jax.random.key(0))
  params = tasks.init(jax.random.key(1), task)
  windows = np.asarray(tasks.batch(jax.random.key(2), task, "train"))
  loss, metrics = tasks.loss(params, jax.random.key(3), jnp.asarray(windows), task)
  table = np.asarray(params["embed"]["embeddings"], np.float64)
  surprise, hits = [], []
  for window in windows:
    for this, following in itertools.pairwise(window):
      surprise.append(np.log(np.sum(np.exp(table[this]))) - table[this, following])
      hits.append(np.argmax(table[this]) == following)
  np.testing.assert_allclose(loss, float(task.loss_scale) * np.mean(surprise), rtol=1e-5)
  np.testing.assert_allclose(metrics["accuracy"], np.mean(hits), atol=1e-6)
  np.testing.assert_allclose(tasks.normalize(loss, task), np.mean(surprise) / math.log(650), rtol=1e-5)


def test_a_uniform_guess_has_normalized_loss_one():
  tasks = family()
  for seed in range(3):
    task = tasks.sample(jax.random.key(seed))
    params = jax.tree.map(jnp.zeros_like, tasks.init(jax.random.key(1), task))
    for split in base.SPLITS:
      batch = tasks.batch(jax.random.key(2), task, split)
      loss, _ = tasks.loss(params, jax.random.key(3), batch, task)
      np.testing.assert_allclose(tasks.normalize(loss, task), 1.0, rtol=1e-5)


def test_weight_scale_is_a_factor_on_matrices():
  def with_norm(characters):
    return hk.LayerNorm(axis=-1, create_scale=True, create_offset=True)(bigrams(characters))

  one, three = (
    text.language_model(
      TEXT, with_norm, context=4, batch_size=2, part=(1.0, 1.0), weight_scale=(s, s), loss_scale=(1.0, 1.0)
    )
    for s in (1.0, 3.0)
  )
  starts = [f.init(jax.random.key(0), f.sample(jax.random.key(1))) for f in (one, three)]
  np.testing.assert_allclose(starts[1]["embed"]["embeddings"], 3 * starts[0]["embed"]["embeddings"], rtol=1e-6)
  np.testing.assert_array_equal(starts[1]["layer_norm"]["scale"], 1.0)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"context": 0}, "context: must be at least 1"),
    ({"context": 60}, "context=60: must be below the 60 characters"),
    ({"batch_size": 0}, "batch_size: must be at least 1"),
    ({"part": (0.0, 1.0)}, "part="),
    ({"part": (0.5, 1.5)}, "part="),
    ({"weight_scale": (2.0, 1.0)}, "weight_scale="),
    ({"loss_scale": (1.0, math.inf)}, "loss_scale="),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match=f"^{message}"):
    family(**options)


def test_unknown_split():
  tasks = family()
  with pytest.raises(ValueError, match="split='eval': must be one of train, validation, test"):
    tasks.batch(jax.random.key(0), tasks.sample(jax.random.key(1)), "eval")
