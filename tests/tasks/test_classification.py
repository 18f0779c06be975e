"""What is optional in classification tasks, on data whose pixels tell which example one has; and the random bits."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from lopt.tasks import datasets, examples, mlp_classifier

PER_CLASS = 1000
CLASSES = 4


@pytest.fixture
def build(monkeypatch):
  """`mlp_classifier.build` on images of three pixels: class c, and two digits to base 100 of the example's number."""
  number = np.arange(PER_CLASS * CLASSES)
  labels = number % CLASSES
  images = np.stack([labels, number // 100, number % 100], axis=1).astype(np.uint8).reshape(-1, 1, 3, 1)
  split = datasets.Split(jnp.asarray(images), jnp.asarray(labels, jnp.int32))
  data = datasets.Dataset(split, split, split, num_classes=CLASSES, max_value=100)
  monkeypatch.setattr(datasets, "load", lambda name, *, resolution, data_dir: data)
  return lambda **options: mlp_classifier.build(batch_size=4096, **options)


def draw(family, task_params, split="train", batches=4):
  """Classes, examples' numbers and labels of many draws."""
  batch = jax.jit(family.batch, static_argnums=2)
  examples = [batch(jax.random.key(100 + i), task_params, split) for i in range(batches)]
  inputs, labels = (np.concatenate(x) for x in zip(*examples, strict=True))
  pixels = np.rint(inputs / np.asarray(task_params.input_scale) * 100).astype(int)
  return pixels[:, 0], pixels[:, 1] * 100 + pixels[:, 2], labels


def true_labels(classes, task_params):
  return np.argsort(np.asarray(task_params.classes))[classes]


def test_fields_of_tasks_have_the_ranges_asked_for(build):
  family = build(
    losses=("cross_entropy", "mean_squared_error"),
    width_fraction=(0.2, 0.8),
    label_noise=(0.1, 0.5),
    input_noise=(0.0, 2.0),
    data_fraction=(0.01, 1.0),
  )
  tasks = jax.jit(jax.vmap(family.sample))(jax.random.split(jax.random.key(0), 1000))
  assert scipy.stats.chisquare(np.bincount(tasks.loss)).pvalue > 1e-3
  for values, low, high in (
    (tasks.label_noise.probability, 0.1, 0.5),
    (tasks.input_noise, 0.0, 2.0),
    (tasks.subset.start, 0.0, 1.0),
    (np.log(tasks.width_fraction), math.log(0.2), math.log(0.8)),
    (np.log(tasks.subset.fraction), math.log(0.01), 0.0),
  ):
    assert scipy.stats.kstest(np.asarray(values, np.float64), "uniform", (low, high - low)).pvalue > 1e-3
  assert len(np.unique(tasks.label_noise.seed)) > 990


def test_mislabelled_examples(build):
  """Fixed ones, as many as asked for, with the other labels of the task in equal shares; and in training only."""
  family = build(label_noise=(0.3, 0.3), min_classes=3, max_classes=3)
  task_params = family.sample(jax.random.key(0))
  classes, numbers, labels = draw(family, task_params)
  truth = true_labels(classes, task_params)
  label_of = {}
  for number, label in zip(numbers, labels, strict=True):
    assert label_of.setdefault(number, label) == label
  examples, first = np.unique(numbers, return_index=True)
  assert len(examples) > 0.9 * 3 * PER_CLASS
  shift = (labels[first] - truth[first]) % 3
  counts = np.bincount(shift, minlength=3)
  assert scipy.stats.chisquare(counts, len(examples) * np.array([0.7, 0.15, 0.15])).pvalue > 1e-3
  # For each of the labels alike.
  for label in range(3):
    assert scipy.stats.binomtest(int(np.sum(shift[truth[first] == label] > 0)), PER_CLASS, 0.3).pvalue > 1e-3
  for split in ("validation", "test"):
    classes, _, labels = draw(family, task_params, split, batches=1)
    np.testing.assert_array_equal(labels, true_labels(classes, task_params))

  _, numbers, labels = draw(family, task_params._replace(label_noise=task_params.label_noise._replace(seed=5)))
  changed = [label_of[number] != label for number, label in zip(numbers, labels, strict=True) if number in label_of]
  # Right both times, or wrong alike both times: 0.7² + 0.3²/2 of the examples keep their label.
  assert abs(np.mean(changed) - (1 - 0.49 - 0.045)) < 0.05


@pytest.mark.parametrize(("fraction", "start", "used"), [(0.05, 0.3, 50), (0.0001, 0.0, 1), (0.1, 0.95, 100)])
def test_a_subset_of_each_class(build, fraction, start, used):
  """Neighbours among the class's examples, each as often; the whole of the other splits."""
  family = build(data_fraction=(fraction, fraction), min_classes=CLASSES)
  task_params = family.sample(jax.random.key(0))
  task_params = task_params._replace(subset=task_params.subset._replace(start=jnp.float32(start)))
  classes, numbers, labels = draw(family, task_params)
  np.testing.assert_array_equal(labels, true_labels(classes, task_params))
  for c in range(CLASSES):
    places, counts = np.unique(numbers[classes == c] // CLASSES, return_counts=True)
    ring = (int(start * PER_CLASS) + np.arange(used)) % PER_CLASS
    np.testing.assert_array_equal(places, np.sort(ring))
    assert scipy.stats.chisquare(counts).pvalue > 1e-3 or used == 1
  _, numbers, _ = draw(family, task_params, "test")
  assert len(np.unique(numbers)) > 0.9 * CLASSES * PER_CLASS


def test_input_noise(build):
  family, clean = build(input_noise=(0.5, 0.5)), build()
  task_params = family.sample(jax.random.key(0))
  examples = family.batch(jax.random.key(1), task_params, "train")
  # The images are those that the first half of the key picks.
  expected = clean.batch(jax.random.split(jax.random.key(1))[0], task_params._replace(input_noise=None), "train")
  np.testing.assert_array_equal(examples.labels, expected.labels)
  noise = np.asarray((examples.inputs - expected.inputs) / task_params.input_scale, np.float64)
  assert scipy.stats.kstest(noise.ravel() / 0.5, scipy.stats.norm.cdf).pvalue > 1e-3
  for split in ("validation", "test"):
    noisy = family.batch(jax.random.key(1), task_params, split)
    np.testing.assert_array_equal(noisy.inputs, clean.batch(jax.random.key(1), task_params, split).inputs)


def test_squared_error_is_the_brier_score(build):
  family = build(losses=("cross_entropy", "mean_squared_error"), hidden_sizes=(), min_classes=3, max_classes=3)
  task_params = family.sample(jax.random.key(0))
  params = family.init(jax.random.key(1), task_params)
  examples = family.batch(jax.random.key(2), task_params, "train")
  (layer,) = params.values()
  logits = np.asarray(examples.inputs, np.float64) @ np.asarray(layer["w"], np.float64)[:, :3]
  p, y = scipy.special.softmax(logits, axis=1), np.eye(3)[np.asarray(examples.labels)]
  expected = (np.mean(np.sum(-y * np.log(p), axis=1)), np.mean(np.sum((p - y) ** 2, axis=1)))
  loss = jax.jit(lambda params, task_params: family.loss(params, jax.random.key(3), examples, task_params)[0])
  clueless = jax.tree.map(jnp.zeros_like, params)
  for index, value in enumerate(expected):
    chosen = task_params._replace(loss=jnp.int32(index))
    np.testing.assert_allclose(loss(params, chosen), task_params.loss_scale * value, rtol=1e-5)
    np.testing.assert_allclose(family.normalize(loss(clueless, chosen), chosen), 1.0, rtol=1e-5)
    gradient = jax.grad(loss)(params, chosen)
    assert np.all(np.isfinite(jax.tree.leaves(gradient)[1]))


def test_a_narrower_network(build):
  """A quarter of 32 hidden units is a network of 8, and the gradient of the others is 0."""
  wide, narrow = build(width_fraction=(0.25, 0.25)), build(hidden_sizes=(8,))
  task_params = wide.sample(jax.random.key(0))
  params = wide.init(jax.random.key(1), task_params)
  first, second = params.values()
  names = tuple(params)
  small = {names[0]: {"w": first["w"][:, :8], "b": first["b"][:8]}, names[1]: {**second, "w": second["w"][:8]}}
  examples = wide.batch(jax.random.key(2), task_params, "train")

  def value_and_gradient(family, params, task_params):
    loss = lambda params: family.loss(params, jax.random.key(3), examples, task_params)[0]
    return jax.jit(jax.value_and_grad(loss))(params)

  value, gradient = value_and_gradient(wide, params, task_params)
  expected_value, expected = value_and_gradient(narrow, small, task_params._replace(width_fraction=None))
  np.testing.assert_allclose(value, expected_value, rtol=1e-5)
  np.testing.assert_allclose(gradient[names[0]]["w"][:, :8], expected[names[0]]["w"], rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(gradient[names[1]]["w"][:8], expected[names[1]]["w"], rtol=1e-4, atol=1e-6)
  assert np.all(gradient[names[0]]["w"][:, 8:] == 0)
  assert np.all(gradient[names[1]]["w"][8:] == 0)


def test_scale_bits_is_exact():
  """Against Python's integers, which have no width."""
  generator = np.random.default_rng(0)
  edges = [0, 1, 2**16 - 1, 2**16, 2**31, 2**32 - 1]
  bits = np.concatenate([np.array(edges, np.uint32), generator.integers(0, 2**32, 2000, np.uint32)])
  for n in (1, 2, 3, 10, 143, 6000, 2**15 + 1, 2**16 - 1):
    high, rest = examples.scale_bits(jnp.asarray(bits), jnp.int32(n))
    products = [int(b) * n for b in bits]
    np.testing.assert_array_equal(high, [p >> 32 for p in products])
    np.testing.assert_array_equal(rest, np.array([p & 0xFFFFFFFF for p in products], np.uint32))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"losses": ()}, "losses="),
    ({"losses": ("hinge",)}, "losses=.*cross_entropy, mean_squared_error"),
    ({"width_fraction": (0.0, 1.0)}, "width_fraction="),
    ({"width_fraction": (0.5, 1.5)}, "width_fraction=.*at most 1"),
    ({"data_fraction": (0.5, 2.0)}, "data_fraction=.*at most 1"),
    ({"data_fraction": (0.5, 0.2)}, "data_fraction="),
    ({"label_noise": (0.5, 1.1)}, "label_noise="),
    ({"label_noise": (-0.1, 0.1)}, "label_noise="),
    ({"input_noise": (0.0, math.inf)}, "input_noise="),
    ({"input_noise": (math.nan, 1.0)}, "input_noise="),
  ],
)
def test_bad_options(options, message, monkeypatch):
  monkeypatch.setattr(datasets, "load", None)
  with pytest.raises(ValueError, match=f"^{message}"):
    mlp_classifier.build(**options)
