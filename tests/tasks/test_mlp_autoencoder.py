"""Autoencoders against NumPy and SciPy in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from lopt.tasks import datasets, mlp_autoencoder

LOSSES = ("mean_squared_error", "cross_entropy")


def forward(x, params):
  """[encoder, decoder] of two layers each, with tanh between those."""
  for part in ("encoder", "decoder"):
    layers = [params[f"{part}/~/linear_{i}"] for i in range(2)]
    x = np.tanh(x @ layers[0]["w"] + layers[0]["b"]) @ layers[1]["w"] + layers[1]["b"]
  return x


def reference(params, x, mean):
  """Both losses."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  p = scipy.special.expit(scipy.special.logit(mean) + forward(x, params))
  divergence = scipy.special.rel_entr(x, p) + scipy.special.rel_entr(1 - x, 1 - p)
  return np.mean((x - p) ** 2), divergence.mean()


def test_loss(colour_images):
  """And 1 is the loss of the mean image, which a network of zeros predicts, on all of the training set."""
  family = mlp_autoencoder.build(hidden_sizes=(5,), latent_size=3, batch_size=8, activations=("relu", "tanh"))
  train = np.asarray(colour_images.train.images, np.float64).reshape(90, -1) / 255
  mean = (train.sum(axis=0) + 0.5) / 91

  @jax.jit
  def losses(params, batch, task_params):
    value = family.loss(params, jax.random.key(1), batch, task_params)[0]
    return value, family.normalize(value, task_params)

  task_params = family.sample(jax.random.key(0))._replace(activation=jnp.int32(1))
  # Not those of `init`, whose biases are zero and gains one, so that errors in them would go unnoticed.
  generator = np.random.default_rng(0)
  shapes = jax.eval_shape(family.init, jax.random.key(1), task_params)
  params = jax.tree.map(lambda x: jnp.asarray(0.5 * generator.standard_normal(x.shape), jnp.float32), shapes)
  batch = family.batch(jax.random.key(2), task_params, "test")
  for index, expected in enumerate(reference(params, np.asarray(batch, np.float64), mean)):
    chosen = task_params._replace(loss=jnp.int32(index))
    value, _ = losses(params, batch, chosen)
    np.testing.assert_allclose(value, chosen.loss_scale * expected, rtol=2e-5)
    _, normalized = losses(jax.tree.map(jnp.zeros_like, params), jnp.asarray(train, jnp.float32), chosen)
    np.testing.assert_allclose(normalized, 1.0, rtol=1e-5)


def test_a_perfect_reconstruction_costs_nothing(colour_images, monkeypatch):
  """The decoder's biases are all that it needs for a single image, of all shades of grey."""
  image = jnp.arange(0, 256, 5, dtype=jnp.uint8)[None, None, :, None]
  split = datasets.Split(jnp.concatenate([image, 255 - image]), jnp.zeros(2, jnp.int32))
  data = datasets.Dataset(split, split, split, num_classes=1, max_value=255)
  monkeypatch.setattr(datasets, "load", lambda name, *, resolution, data_dir: data)
  family = mlp_autoencoder.build(hidden_sizes=(), latent_size=1)
  task_params = family.sample(jax.random.key(0))
  params = jax.tree.map(jnp.zeros_like, family.init(jax.random.key(1), task_params))
  x = np.arange(0, 256, 5)[None] / 255
  params["decoder/~/linear_0"]["b"] = jnp.asarray(scipy.special.logit(np.clip(x[0], 1e-9, 1 - 1e-7)), jnp.float32)
  for index in range(2):  # the mean of the two images is grey, whose logit is 0
    chosen = task_params._replace(loss=jnp.int32(index))
    loss, _ = family.loss(params, jax.random.key(2), jnp.asarray(x, jnp.float32), chosen)
    np.testing.assert_allclose(family.normalize(loss, chosen), 0.0, atol=1e-5)


def test_tasks_are_drawn_as_documented(colour_images):
  family = mlp_autoencoder.build()
  tasks = jax.jit(jax.vmap(family.sample))(jax.random.split(jax.random.key(0), 1000))
  for values, choices in ((tasks.activation, 5), (tasks.loss, 2)):
    assert scipy.stats.chisquare(np.bincount(values, minlength=choices)).pvalue > 1e-3
  for values, low, high in ((tasks.weight_scale, 0.25, 2.0), (tasks.loss_scale, 0.1, 10.0)):
    log_uniform = scipy.stats.uniform(math.log(low), math.log(high / low))
    assert scipy.stats.kstest(np.log(np.asarray(values, np.float64)), log_uniform.cdf).pvalue > 1e-3
  first = jax.tree.map(lambda x: x[0], tasks)
  weights = jax.jit(family.init)(jax.random.key(1), first)["encoder/~/linear_0"]["w"]
  unit = float(tasks.weight_scale[0]) / math.sqrt(72)
  assert scipy.stats.kstest(np.ravel(weights), scipy.stats.truncnorm(-2, 2, scale=unit).cdf).pvalue > 1e-3


def test_one_loss_alone(colour_images):
  for loss, expected in zip(LOSSES, (False, True), strict=True):
    family = mlp_autoencoder.build(losses=(loss,), loss_scale=(1.0, 1.0), batch_size=90)
    both = mlp_autoencoder.build(losses=LOSSES, loss_scale=(1.0, 1.0), batch_size=90)
    task_params = family.sample(jax.random.key(0))
    params = family.init(jax.random.key(1), task_params)
    batch = family.batch(jax.random.key(2), task_params, "train")
    chosen = task_params._replace(loss=jnp.int32(expected))
    value = family.loss(params, jax.random.key(3), batch, task_params)[0]
    np.testing.assert_allclose(value, both.loss(params, jax.random.key(3), batch, chosen)[0], rtol=1e-6)
    np.testing.assert_allclose(family.normalize(value, task_params), both.normalize(value, chosen), rtol=1e-6)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"hidden_sizes": (0,)}, "hidden_sizes="),
    ({"latent_size": 0}, "latent_size: must be at least 1, not 0"),
    ({"losses": ("absolute",)}, "losses=.*mean_squared_error, cross_entropy"),
    ({"activations": ()}, "activations="),
    ({"weight_scale": (0.0, 1.0)}, "weight_scale="),
  ],
)
def test_bad_options(options, message, monkeypatch):
  monkeypatch.setattr(datasets, "load", None)
  with pytest.raises(ValueError, match=f"^{message}"):
    mlp_autoencoder.build(**options)


def test_unknown_split(colour_images):
  family = mlp_autoencoder.build()
  with pytest.raises(ValueError, match="split='eval': must be one of train, validation, test"):
    family.batch(jax.random.key(0), family.sample(jax.random.key(1)), "eval")
