"""Augmented tasks against closed forms in the family's own loss, gradient and parameters."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from lopt import base, inner_training
from lopt.tasks import augmentation, quadratic

N = 6 + 3
"""Parameters of `FAMILY`."""


def _loss(params, key, batch, task_params):
  """Smooth, not convex, and as random as a dropout: the identities must not depend on what the family is."""
  output = batch @ params["w"] + params["b"] + jax.random.normal(key, (3,))
  return task_params * jnp.mean(jnp.square(jnp.tanh(output) - 0.5)), {"largest": jnp.max(output)}


FAMILY = base.TaskFamily(
  sample=lambda key: jax.random.uniform(key, minval=1.0, maxval=100.0),
  init=lambda key, task_params: {"w": jax.random.normal(key, (2, 3)), "b": jnp.ones(3)},
  batch=lambda key, task_params, split: jax.random.normal(key, (2,)) * (1.0 if split == "train" else 2.0),
  loss=_loss,
  normalize=lambda loss, task_params: loss / task_params - 0.1,
  loss_cap=7.0,
)


def keys(n=1, seed=0):
  return jax.random.split(jax.random.key(seed), n)


def task_and_start(family, seed=0):
  sample_key, init_key = keys(2, seed)
  task = family.sample(sample_key)
  return task, family.init(init_key, task)


def value_and_grad(family, params, task, split="train", seed=5):
  batch_key, loss_key = keys(2, seed)
  batch = family.batch(batch_key, task, split)
  return jax.value_and_grad(family.loss, has_aux=True)(params, loss_key, batch, task)


def assert_close(actual, expected, rtol=1e-5, atol=0.0):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), actual, expected)


def by_tensor(function, params, scales):
  """Applies the function to each tensor with its scale; leaves are in the order of their names."""
  return {name: function(params[name], scale) for name, scale in zip(sorted(params), scales, strict=True)}


def test_off_is_the_family_itself():
  assert augmentation.wrap(FAMILY) is FAMILY


def test_reparametrization_changes_coordinates_only():
  family = augmentation.wrap(FAMILY, reparametrization=(1e-3, 1e3))
  task, stored = task_and_start(family)
  assert task.scales.shape == (2,)
  own = by_tensor(lambda q, c: c * q, stored, task.scales)
  init_key = keys(2)[1]
  assert_close(own, FAMILY.init(init_key, task.task))
  for split in base.SPLITS:
    (loss, metrics), gradient = value_and_grad(family, stored, task, split)
    (own_loss, own_metrics), own_gradient = value_and_grad(FAMILY, own, task.task, split)
    assert (loss, metrics) == (own_loss, own_metrics)
    assert family.normalize(loss, task) == FAMILY.normalize(own_loss, task.task)
    assert_close(gradient, by_tensor(lambda g, c: c * g, own_gradient, task.scales))
  assert family.loss_cap == FAMILY.loss_cap


def test_descent_in_other_coordinates():
  """Steps of η/c² on p/c are steps of η on p, and Adam without ε takes steps that are c times too long."""
  reparametrized = augmentation.wrap(FAMILY, reparametrization=(1e-2, 1e2))
  task, stored = task_and_start(reparametrized)
  names = {"b": "b", "w": "w"}

  def train(family, tx, params, task):
    state = tx.init(params)
    for key in keys(5, seed=9):
      params, state, _ = inner_training.train_step(family, tx, key, params, state, task)
    return params

  start = FAMILY.init(keys(2)[1], task.task)
  for optimizer, power in ((optax.sgd, 2), (functools.partial(optax.adam, eps=0.0), 1)):
    rates = dict(zip(names, 1e-3 / np.asarray(task.scales) ** power, strict=True))
    tx = optax.partition({name: optimizer(rate) for name, rate in rates.items()}, names)
    trained = train(reparametrized, tx, stored, task)
    expected = train(FAMILY, optimizer(1e-3), start, task.task)
    assert_close(by_tensor(lambda q, c: c * q, trained, task.scales), expected, rtol=1e-4)
    assert abs(expected["b"] - start["b"]).max() > 1e-3


def test_numbers_are_log_uniform_and_independent():
  family = augmentation.wrap(
    FAMILY, reparametrization=(1e-3, 1e3), gradient_noise=(0.1, 2.0), weight_decay=(1e-6, 1e-2), init_scale=(0.5, 0.6)
  )
  tasks = jax.jit(jax.vmap(family.sample))(keys(3000))
  columns = {
    (1e-3, 1e3): tasks.scales.T,
    (0.1, 2.0): tasks.gradient_noise[None],
    (1e-6, 1e-2): tasks.weight_decay[None],
    (0.5, 0.6): tasks.init_scale[None],
  }
  logs = [(bounds, np.log(np.asarray(x, np.float64))) for bounds, rows in columns.items() for x in rows]
  for (low, high), x in logs:
    uniform = scipy.stats.uniform(math.log(low), math.log(high / low))
    assert scipy.stats.kstest(x, uniform.cdf).pvalue > 1e-3
  correlations = np.corrcoef([*(x for _, x in logs), tasks.task])[np.triu_indices(6, 1)]
  assert abs(correlations).max() < 4 / math.sqrt(3000)


def test_gradient_noise():
  """In the gradient of the normalised loss: without bias, of root mean square norm σ, evenly spread, fresh."""
  sigma, repetitions = 0.3, 4000
  family = augmentation.wrap(FAMILY, gradient_noise=(sigma, sigma), reparametrization=(10.0, 10.0))
  task, stored = task_and_start(family)
  own = jax.tree.map(lambda q: 10 * q, stored)
  batch = family.batch(keys()[0], task, "train")

  @jax.jit
  @jax.vmap
  def noisy_and_exact(key):
    (loss, _), gradient = jax.value_and_grad(family.loss, has_aux=True)(stored, key, batch, task)
    family_key = jax.random.split(key)[0]
    (own_loss, _), own_gradient = jax.value_and_grad(_loss, has_aux=True)(own, family_key, batch.batch, task.task)
    difference = jax.tree.map(lambda g, h: (g / 10 - h) / task.task, gradient, own_gradient)
    return loss, own_loss, jnp.concatenate([x.ravel() for x in jax.tree.leaves(difference)])

  loss, own_loss, noise = map(np.asarray, noisy_and_exact(keys(repetitions, seed=3)))
  np.testing.assert_array_equal(loss, own_loss)
  assert noise.shape == (repetitions, N)
  assert scipy.stats.kstest(noise.ravel() * math.sqrt(N) / sigma, scipy.stats.norm.cdf).pvalue > 1e-3
  np.testing.assert_allclose(np.mean(np.sum(noise**2, axis=1)), sigma**2, rtol=4 * math.sqrt(2 / N / repetitions))
  assert abs(np.corrcoef(noise.T)[np.triu_indices(N, 1)]).max() < 4.5 / math.sqrt(repetitions)
  for split in ("validation", "test"):
    value, gradient = value_and_grad(family, stored, task, split)
    own_value, own_gradient = value_and_grad(FAMILY, own, task.task, split)
    assert_close(value, own_value)
    assert_close(gradient, jax.tree.map(lambda g: 10 * g, own_gradient))


def test_weight_decay():
  """Adds λ/2 ‖p‖² to the normalised train loss and λ p to its gradient, in the family's own coordinates."""
  decay = 0.02
  family = augmentation.wrap(FAMILY, weight_decay=(decay, decay), reparametrization=(1e-1, 1e1))
  task, stored = task_and_start(family)
  own = by_tensor(lambda q, c: c * q, stored, task.scales)
  (loss, _), gradient = value_and_grad(family, stored, task)
  (own_loss, _), own_gradient = value_and_grad(FAMILY, own, task.task)
  square = sum(float(np.sum(np.square(p))) for p in own.values())
  added = family.normalize(loss, task) - FAMILY.normalize(own_loss, task.task)
  np.testing.assert_allclose(added, decay / 2 * square, rtol=1e-4)
  expected = jax.tree.map(lambda g, p: g + task.task * decay * p, own_gradient, own)
  assert_close(gradient, by_tensor(lambda g, c: c * g, expected, task.scales), rtol=1e-4, atol=1e-6)
  for split in ("validation", "test"):
    assert value_and_grad(family, stored, task, split)[0] == value_and_grad(FAMILY, own, task.task, split)[0]


def test_initial_scale():
  family = augmentation.wrap(FAMILY, init_scale=(3.0, 3.0))
  task, start = task_and_start(family)
  assert_close(start, jax.tree.map(lambda p: 3 * p, FAMILY.init(keys(2)[1], task.task)))
  assert value_and_grad(family, start, task)[0] == value_and_grad(FAMILY, start, task.task)[0]


def test_an_augmented_quadratic_trains_inside_an_unroll():
  """With everything on, gradient descent finds the minimum of the loss with weight decay, here in closed form.

  Steps are of 1/c², the metric of the family's own coordinates; noise is small enough not to matter.
  """
  decay = 0.5
  family = augmentation.wrap(
    quadratic.build(dimension=3, condition_number=(1.0, 4.0), curvature=(1.0, 1.0)),
    reparametrization=(0.1, 10.0),
    gradient_noise=(1e-4, 1e-4),
    weight_decay=(decay, decay),
    init_scale=(2.0, 3.0),
  )

  @jax.jit
  @jax.vmap
  def train(key):
    sample_key, init_key, scan_key = jax.random.split(key, 3)
    task = family.sample(sample_key)

    def step(params, key):
      batch_key, loss_key = jax.random.split(key)
      batch = family.batch(batch_key, task, "train")
      gradient, _ = jax.grad(family.loss, has_aux=True)(params, loss_key, batch, task)
      return params - 0.2 / task.scales**2 / (1 + decay * task.task.start_loss) * gradient, None

    return task, jax.lax.scan(step, family.init(init_key, task), jax.random.split(scan_key, 300))[0]

  task, params = train(keys(4))
  for i in range(4):
    hessian, minimum, unit = (np.asarray(x[i], np.float64) for x in task.task)
    expected = np.linalg.solve(hessian + decay * unit * np.eye(3), hessian @ minimum)
    np.testing.assert_allclose(params[i] * task.scales[i], expected, atol=5e-3)


@pytest.mark.parametrize("option", ["reparametrization", "gradient_noise", "weight_decay", "init_scale"])
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (2.0, 1.0), (1.0, math.inf), (math.nan, 1.0)])
def test_bad_options(option, bounds):
  with pytest.raises(ValueError, match=f"^{option}="):
    augmentation.wrap(FAMILY, **{option: bounds})
