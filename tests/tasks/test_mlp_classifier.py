"""The family of MLP classifiers against scikit-learn's digits, NumPy in float64 and chi-square tests."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import scipy.stats
import sklearn.datasets

from lopt import base
from lopt.tasks import datasets, mlp_classifier

ACTIVATIONS = {
  "relu": lambda x: np.maximum(x, 0),
  "tanh": np.tanh,
  "sigmoid": scipy.special.expit,
  "swish": lambda x: x * scipy.special.expit(x),
  "gelu": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  return str(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def family(data_dir):
  return mlp_classifier.build(data_dir=data_dir)


@pytest.fixture(scope="module")
def tasks(family):
  """A thousand tasks, stacked."""
  return sample(family, 1000)


def sample(family, n):
  return jax.jit(jax.vmap(family.sample))(jax.random.split(jax.random.key(0), n))


def take(stacked, i):
  return jax.tree.map(lambda x: x[i], stacked)


def pixels_of(inputs, task_params):
  """The pixels that the inputs were made of; digits' are 0 to 16."""
  return np.asarray(inputs, np.float64) / float(task_params.input_scale) * 16


def test_tasks_are_drawn_as_documented(tasks):
  np.testing.assert_array_equal(np.sort(tasks.classes, axis=1), np.broadcast_to(np.arange(10), (1000, 10)))
  for values, choices in ((tasks.num_classes, np.arange(2, 11)), (tasks.activation, np.arange(5))):
    counts = np.array([np.sum(np.asarray(values) == choice) for choice in choices])
    assert counts.sum() == 1000
    assert scipy.stats.chisquare(counts).pvalue > 1e-3
  first = np.bincount(np.asarray(tasks.classes[:, 0]), minlength=10)
  assert scipy.stats.chisquare(first).pvalue > 1e-3
  for values, low, high in (
    (tasks.weight_scale, 0.25, 2.0),
    (tasks.input_scale, 0.3, 1.0),
    (tasks.loss_scale, 0.1, 10.0),
  ):
    log_uniform = scipy.stats.uniform(math.log(low), math.log(high / low))
    assert scipy.stats.kstest(np.log(np.asarray(values, np.float64)), log_uniform.cdf).pvalue > 1e-3


def test_options_fix_what_varies(data_dir):
  family = mlp_classifier.build(
    activations=("tanh",),
    min_classes=3,
    max_classes=3,
    weight_scale=(1.0, 1.0),
    input_scale=(0.25, 0.25),
    loss_scale=(3.0, 3.0),
    data_dir=data_dir,
  )
  tasks = sample(family, 20)
  assert set(np.asarray(tasks.num_classes)) == {3}
  assert set(np.asarray(tasks.activation)) == {0}
  for name, value in (("weight_scale", 1.0), ("input_scale", 0.25), ("loss_scale", 3.0)):
    np.testing.assert_allclose(getattr(tasks, name), value, rtol=1e-6)


@pytest.mark.parametrize("split", base.SPLITS)
def test_a_batch_has_images_of_the_split_under_the_tasks_labels(family, tasks, data_dir, split):
  """Every image is looked up in scikit-learn's set, where no two are equal."""
  images, classes = sklearn.datasets.load_digits(return_X_y=True)
  class_of = {image.astype(np.uint8).tobytes(): c for image, c in zip(images, classes, strict=True)}
  own = np.asarray(getattr(datasets.load("digits", data_dir=data_dir), split).images)
  own = {image.tobytes() for image in own}
  batch = jax.jit(family.batch, static_argnums=2)
  for i in range(5):
    task_params = take(tasks, i)
    examples = batch(jax.random.key(i), task_params, split)
    assert examples.inputs.shape == (64, 64)
    assert examples.inputs.dtype == jnp.float32
    pixels = pixels_of(examples.inputs, task_params)
    np.testing.assert_allclose(pixels, np.rint(pixels), atol=1e-4)
    for image, label in zip(np.rint(pixels).astype(np.uint8), np.asarray(examples.labels), strict=True):
      assert image.tobytes() in own
      assert label < task_params.num_classes
      assert class_of[image.tobytes()] == task_params.classes[label]


@pytest.mark.parametrize("num_classes", [2, 7, 10])
def test_labels_and_examples_are_drawn_uniformly(family, tasks, data_dir, num_classes):
  """Chi-square tests of the labels, and of the examples within each label, on a million draws."""
  task_params = take(tasks, 0)._replace(num_classes=jnp.int32(num_classes))
  keys = jax.random.split(jax.random.key(num_classes), 2**20 // 64)
  weights = jax.random.bits(jax.random.key(9), (64,), jnp.uint32)  # of a hash by which images are told apart

  @jax.jit
  def draw(key):
    examples = family.batch(key, task_params, "train")
    pixels = jnp.rint(examples.inputs / task_params.input_scale * 16).astype(jnp.uint32)
    return pixels @ weights, examples.labels

  hashes, labels = (np.asarray(x).reshape(-1) for x in jax.lax.map(draw, keys, batch_size=1024))
  counts = np.bincount(labels, minlength=num_classes)
  assert len(counts) == num_classes
  assert scipy.stats.chisquare(counts).pvalue > 1e-3
  train_labels = np.asarray(datasets.load("digits", data_dir=data_dir).train.labels)
  for label in range(num_classes):
    _, counts = np.unique(hashes[labels == label], return_counts=True)
    assert len(counts) == np.sum(train_labels == task_params.classes[label])
    assert scipy.stats.chisquare(counts).pvalue > 1e-4


def test_random_numbers_stay_the_same(family):
  """Recorded before what classifiers share became a file of its own: published results depend on them."""
  task_params = jax.jit(family.sample)(jax.random.key(7))
  np.testing.assert_array_equal(task_params.classes, [8, 3, 4, 5, 2, 1, 0, 7, 6, 9])
  assert (int(task_params.num_classes), int(task_params.activation)) == (8, 4)
  examples = jax.jit(family.batch, static_argnums=2)(jax.random.key(9), task_params, "train")
  np.testing.assert_array_equal(examples.labels[:12], [0, 7, 3, 0, 1, 6, 2, 0, 0, 3, 5, 3])
  first_pixels = [0, 0, 9, 16, 6, 0, 0, 0, 0, 3, 16, 1, 16, 10, 8, 0]
  np.testing.assert_allclose(pixels_of(examples.inputs[0], task_params)[:16], first_pixels, atol=1e-4)
  params = jax.jit(family.init)(jax.random.key(8), task_params)
  first_weights = [[0.10393061, 0.01456538, 0.0231038], [-0.06296492, -0.05031816, 0.07005037]]
  np.testing.assert_allclose(params["mlp/~/linear_0"]["w"][:2, :3], first_weights, rtol=1e-5)
  loss, _ = jax.jit(family.loss)(params, jax.random.key(0), examples, task_params)
  np.testing.assert_allclose(loss, 6.024428, rtol=1e-5)


def reference(params, batch, num_classes, activation):
  """Mean cross-entropy over the first `num_classes` logits, and accuracy, in float64."""
  layers = [jax.tree.map(lambda x: np.asarray(x, np.float64), params[name]) for name in sorted(params)]
  x = np.asarray(batch.inputs, np.float64)
  for layer in layers[:-1]:
    x = ACTIVATIONS[activation](x @ layer["w"] + layer["b"])
  logits = (x @ layers[-1]["w"] + layers[-1]["b"])[:, :num_classes]
  log_probabilities = logits - scipy.special.logsumexp(logits, axis=1, keepdims=True)
  labels = np.asarray(batch.labels)
  return -log_probabilities[np.arange(len(labels)), labels].mean(), np.mean(logits.argmax(axis=1) == labels)


@pytest.mark.parametrize("hidden_sizes", [(), (16,), (12, 8)])
def test_loss_is_the_masked_cross_entropy(data_dir, hidden_sizes):
  """For all activations and several numbers of classes under one vmap."""
  family = mlp_classifier.build(hidden_sizes=hidden_sizes, activations=tuple(ACTIVATIONS), data_dir=data_dir)

  @jax.jit
  def start(key, activation, num_classes):
    task_key, init_key, batch_key = jax.random.split(key, 3)
    task_params = family.sample(task_key)._replace(activation=activation, num_classes=num_classes)
    return family.init(init_key, task_params), family.batch(batch_key, task_params, "train"), task_params

  @jax.jit
  @jax.vmap
  def losses(params, batch, task_params):
    loss, metrics = family.loss(params, jax.random.key(0), batch, task_params)
    return loss, metrics["accuracy"], family.normalize(loss, task_params)

  cases = np.array(list(itertools.product(range(len(ACTIVATIONS)), (2, 5, 10))), np.int32)
  keys = jax.random.split(jax.random.key(0), len(cases))
  starts = [start(key, *case) for key, case in zip(keys, cases, strict=True)]
  params, batch, task_params = jax.tree.map(lambda *x: np.stack(x), *starts)
  # Biases start at zero, where they would go untested.
  noise = np.random.default_rng(0)
  params = jax.tree.map(lambda x: x + 0.1 * noise.standard_normal(x.shape, np.float32), params)
  results = losses(params, batch, task_params)
  for i, (activation, num_classes) in enumerate(cases):
    name = tuple(ACTIVATIONS)[activation]
    expected_loss, expected_accuracy = reference(take(params, i), take(batch, i), num_classes, name)
    loss, accuracy, normalized = take(results, i)
    np.testing.assert_allclose(loss, task_params.loss_scale[i] * expected_loss, rtol=2e-5)
    np.testing.assert_allclose(accuracy, expected_accuracy, rtol=1e-6)
    np.testing.assert_allclose(normalized, expected_loss / np.log(num_classes), rtol=2e-5)


def test_a_uniform_guess_has_normalized_loss_one(family, tasks):
  def uniform_guess(key, task_params):
    init_key, batch_key, loss_key = jax.random.split(key, 3)
    params = jax.tree.map(jnp.zeros_like, family.init(init_key, task_params))
    batch = family.batch(batch_key, task_params, "validation")
    return family.normalize(family.loss(params, loss_key, batch, task_params)[0], task_params)

  keys = jax.random.split(jax.random.key(1), 1000)
  np.testing.assert_allclose(jax.jit(jax.vmap(uniform_guess))(keys, tasks), 1.0, rtol=1e-5)


@pytest.fixture(scope="module")
def first_gradient(family):
  """`(task_params) -> (params, batch, gradient)` at the start of training."""

  @jax.jit
  def compute(task_params):
    init_key, batch_key, loss_key = jax.random.split(jax.random.key(1), 3)
    params = family.init(init_key, task_params)
    batch = family.batch(batch_key, task_params, "train")
    gradient, _ = jax.grad(family.loss, has_aux=True)(params, loss_key, batch, task_params)
    return params, batch, gradient

  return compute


def test_classes_outside_the_task_have_no_gradient(first_gradient, tasks):
  _, _, gradient = first_gradient(take(tasks, 0)._replace(num_classes=jnp.int32(4)))
  last = gradient[max(gradient)]
  for leaf in (last["w"], last["b"]):
    assert np.all(np.isfinite(leaf))
    assert np.all(np.asarray(leaf)[..., 4:] == 0)
    assert np.all(np.any(np.asarray(leaf).reshape(-1, 10)[:, :4] != 0, axis=0))


def test_gradient_agrees_with_finite_differences(first_gradient, tasks):
  task_params = take(tasks, 3)
  params, batch, gradient = first_gradient(task_params)
  activation = tuple(ACTIVATIONS)[int(task_params.activation)]
  direction = jax.tree.map(lambda x: np.sin(np.arange(x.size)).reshape(x.shape), params)
  slope = sum(np.sum(g * d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))

  def at(step):
    moved = jax.tree.map(lambda x, d: np.asarray(x, np.float64) + step * d, params, direction)
    return float(task_params.loss_scale) * reference(moved, batch, int(task_params.num_classes), activation)[0]

  np.testing.assert_allclose(slope, (at(1e-5) - at(-1e-5)) / 2e-5, rtol=1e-3)


def test_initial_weights_have_the_tasks_scale(data_dir):
  family = mlp_classifier.build(hidden_sizes=(200,), data_dir=data_dir)
  sample, init = jax.jit(family.sample), jax.jit(family.init)
  for i in range(3):
    task_params = sample(jax.random.key(i))
    params = init(jax.random.key(i + 10), task_params)
    for name, fan_in in zip(sorted(params), (64, 200), strict=True):
      weights = np.asarray(params[name]["w"])
      unit = float(task_params.weight_scale) / math.sqrt(fan_in)
      truncated = scipy.stats.truncnorm(-2, 2, scale=unit)
      assert scipy.stats.kstest(weights.ravel(), truncated.cdf).pvalue > 1e-3
      assert np.all(np.asarray(params[name]["b"]) == 0)


@pytest.mark.slow
def test_tasks_are_trained_under_vmap(family, tasks):
  """Runs start below the cap, and 200 steps of Adam take all of them well below a uniform guess."""
  tasks = take(tasks, slice(0, 100))
  optimizer = optax.adam(0.01)

  def run(key, task_params):
    init_key, test_key, train_key = jax.random.split(key, 3)
    params = family.init(init_key, task_params)

    def evaluate(params):
      batch_key, loss_key = jax.random.split(test_key)
      loss, _ = family.loss(params, loss_key, family.batch(batch_key, task_params, "test"), task_params)
      return family.normalize(loss, task_params)

    def step(carry, key):
      params, state = carry
      batch_key, loss_key = jax.random.split(key)
      batch = family.batch(batch_key, task_params, "train")
      gradient, _ = jax.grad(family.loss, has_aux=True)(params, loss_key, batch, task_params)
      updates, state = optimizer.update(gradient, state)
      return (optax.apply_updates(params, updates), state), None

    (trained, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(train_key, 200))
    return evaluate(params), evaluate(trained)

  before, after = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(5), 100), tasks)
  assert np.max(before) < 0.6 * family.loss_cap
  assert 1 < np.median(before) < 2
  assert np.max(after) < 0.8
  assert np.median(after) < 0.3


def test_an_antithetic_pair_shares_its_batch(family, tasks):
  """With the parameters mapped over and the rest shared, nothing of the batch has the pair's axis."""
  task_params, key = take(tasks, 0), jax.random.key(0)
  params = family.init(key, task_params)

  def loss(params):
    return family.loss(params, key, family.batch(key, task_params, "train"), task_params)[0]

  text = str(jax.make_jaxpr(jax.vmap(loss))(jax.tree.map(lambda x: jnp.stack([x, -x]), params)))
  assert "f32[64,64]" in text
  assert "[2,64,64]" not in text


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"batch_size": 0}, "batch_size=0: must be at least 1"),
    ({"hidden_sizes": (32, 0)}, "hidden_sizes="),
    ({"hidden_sizes": (-1,)}, "hidden_sizes="),
    ({"activations": ()}, "activations="),
    ({"activations": ("relu", "step")}, "activations=.*sigmoid"),
    ({"min_classes": 1}, "min_classes=1: must be at least 2"),
    ({"min_classes": 4, "max_classes": 3}, "max_classes=3: must be at least min_classes=4"),
    ({"weight_scale": (0.0, 1.0)}, "weight_scale="),
    ({"input_scale": (2.0, 1.0)}, "input_scale="),
    ({"loss_scale": (1.0, math.inf)}, "loss_scale="),
    ({"loss_scale": (math.nan, 1.0)}, "loss_scale="),
  ],
)
def test_bad_options_fail_before_data_is_loaded(options, message, monkeypatch):
  monkeypatch.setattr(datasets, "load", None)
  with pytest.raises(ValueError, match=f"^{message}"):
    mlp_classifier.build(**options)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"dataset": "digitz"}, "dataset='digitz' does not exist; did you mean 'digits'"),
    ({"resolution": 0}, "resolution=0: must be at least 1"),
    ({"max_classes": 11}, "max_classes=11: must be at most digits's 10"),
    ({"min_classes": 11}, "min_classes=11: must be at most digits's 10"),
  ],
)
def test_bad_options_that_the_data_show(options, message, data_dir):
  with pytest.raises(ValueError, match=f"^{message}"):
    mlp_classifier.build(data_dir=data_dir, **options)


def test_unknown_split(family, tasks):
  with pytest.raises(ValueError, match="split='valid': must be one of train, validation, test"):
    family.batch(jax.random.key(0), take(tasks, 0), "valid")


def test_a_class_without_examples(data_dir, monkeypatch):
  data = datasets.load("digits", data_dir=data_dir)
  monkeypatch.setattr(datasets, "load", lambda *args, **kwargs: data._replace(num_classes=11))
  with pytest.raises(ValueError, match=r"1 to 65535 examples of each class, and has 0 to .* in split 'train'"):
    mlp_classifier.build()
