"""Surfaces against gradients written down by hand in NumPy, and the distribution of what disturbs them."""

import functools
import math
from typing import Any

import jax
import numpy as np
import pytest
import scipy.stats

from lopt import base
from lopt.tasks import surfaces

DIMENSION = 5
EXACT: dict[str, Any] = {"density": (1.0, 1.0), "gradient_noise": None}


def sample(family, n, seed=0):
  return jax.jit(jax.vmap(family.sample))(jax.random.split(jax.random.key(seed), n))


def take(tree, i):
  return jax.tree.map(lambda x: x[i], tree)


def double(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def rosenbrock(z, task):
  y, b = 1 + z, task.valley
  value = sum(b * (y[i + 1] - y[i] ** 2) ** 2 + (1 - y[i]) ** 2 for i in range(len(y) - 1))
  gradient = np.zeros_like(y)
  for i in range(len(y) - 1):
    gradient[i] += -4 * b * y[i] * (y[i + 1] - y[i] ** 2) - 2 * (1 - y[i])
    gradient[i + 1] += 2 * b * (y[i + 1] - y[i] ** 2)
  return value, gradient


def log_sum_exp(z, task):
  weights = np.exp(task.slopes @ z)
  return math.log(weights.mean()), task.slopes.T @ weights / weights.sum()


def power_law(z, task):
  hessian = task.root_hessian.T @ task.root_hessian
  return z @ hessian @ z / 2, hessian @ z


KINDS = {"rosenbrock": rosenbrock, "log_sum_exp": log_sum_exp, "power_law": power_law}


@functools.cache
def compiled(kind):
  family = surfaces.build(kinds=(kind,), dimension=DIMENSION, **EXACT)

  def value_and_grad(params, task):
    batch_key, loss_key = jax.random.split(jax.random.key(0))
    batch = family.batch(batch_key, task, "train")
    (loss, _), gradient = jax.value_and_grad(family.loss, has_aux=True)(params, loss_key, batch, task)
    return loss, family.normalize(loss, task), gradient

  return family, jax.jit(value_and_grad)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient(kind):
  family, value_and_grad = compiled(kind)
  tasks = sample(family, 3)
  for i in range(3):
    task = take(tasks, i)
    start = family.init(jax.random.key(1), task)
    for scale in (0.01, 1.0, 3.0):
      params = task.minimum + scale * (start - task.minimum)
      loss, _, gradient = value_and_grad(params, task)
      value, expected = KINDS[kind](np.asarray(params, np.float64) - double(task.minimum), double(task))
      s = float(task.loss_scale)
      # atol: what is lost in float32 of x − c, and of log-sum-exp's value, is relative to 1
      np.testing.assert_allclose(loss, s * value, rtol=1e-4, atol=1e-5 * s)
      np.testing.assert_allclose(gradient, s * expected, rtol=1e-4, atol=1e-4 * s * max(1, abs(expected).max()))


@pytest.mark.parametrize("kind", KINDS)
def test_start_is_one_and_minimum_zero(kind):
  family, value_and_grad = compiled(kind)
  tasks = sample(family, 3)
  for i in range(3):
    task = take(tasks, i)
    _, normalized, _ = value_and_grad(family.init(jax.random.key(1), task), task)
    np.testing.assert_allclose(normalized, 1.0, rtol=1e-5)
    loss, normalized, gradient = value_and_grad(task.minimum, task)
    np.testing.assert_allclose([loss, normalized], 0.0, atol=1e-5)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-5)
    distant = np.random.default_rng(i).normal(size=(2000, DIMENSION)) * 10.0 ** np.linspace(-3, 1, 2000)[:, None]
    assert all(KINDS[kind](z, double(task))[0] > 0 for z in distant)


def test_rosenbrocks_own_value():
  """At y = (−1.2, 1), the usual start, with b = 100: 24.2."""
  family = surfaces.build(kinds=("rosenbrock",), dimension=2, valley=(100.0, 100.0), loss_scale=(1.0, 1.0))
  task = family.sample(jax.random.key(0))
  batch = family.batch(jax.random.key(1), task, "test")
  y = np.array([-1.2, 1.0], np.float32)
  loss, _ = family.loss(task.minimum + (y - 1), jax.random.key(2), batch, task)
  np.testing.assert_allclose(loss, 24.2, rtol=1e-5)


def test_the_distribution_of_tasks():
  options: dict[str, Any] = {
    "valley": (2.0, 20.0),
    "sharpness": (0.5, 4.0),
    "exponent": (0.5, 3.0),
    "loss_scale": (0.1, 10.0),
  }
  disturbances: dict[str, Any] = {"density": (0.2, 1.0), "gradient_noise": (0.01, 0.1)}
  tasks = double(sample(surfaces.build(dimension=DIMENSION, **options, **disturbances), 2000))
  assert scipy.stats.chisquare(np.bincount(tasks.kind.astype(int), minlength=3)).pvalue > 1e-3
  eigenvalues = np.linalg.eigvalsh(np.swapaxes(tasks.root_hessian, 1, 2) @ tasks.root_hessian)[:, ::-1]
  np.testing.assert_allclose(eigenvalues[:, 0], 1.0, rtol=1e-4)
  exponents = -np.log(eigenvalues[:, -1]) / math.log(DIMENSION)
  np.testing.assert_allclose(eigenvalues[:, 2], 3.0**-exponents, rtol=1e-3)
  np.testing.assert_allclose(tasks.slopes.sum(axis=1), 0.0, atol=1e-4)
  drawn = {name: getattr(tasks, name) for name in ("valley", "loss_scale", *disturbances)} | {"exponent": exponents}
  for name, values in drawn.items():
    low, high = (options | disturbances)[name]
    uniform = scipy.stats.uniform(math.log(low), math.log(high / low))
    assert scipy.stats.kstest(np.log(values), uniform.cdf).pvalue > 1e-3, name
  for values in (tasks.minimum, tasks.start - tasks.minimum):
    assert scipy.stats.kstest(values.ravel(), scipy.stats.norm.cdf).pvalue > 1e-3


def test_the_sharpness_of_slopes():
  tasks = double(sample(surfaces.build(kinds=("log_sum_exp",), dimension=DIMENSION, sharpness=(2.0, 2.0)), 2000))
  m = 2 * DIMENSION  # centring takes one of m degrees of freedom
  np.testing.assert_allclose(tasks.slopes.var(), 4 * (1 - 1 / m), rtol=4 * math.sqrt(2 / tasks.slopes.size))


def gradients(family, task, params, split, n):
  @jax.jit
  @jax.vmap
  def one(key):
    batch_key, loss_key = jax.random.split(key)
    batch = family.batch(batch_key, task, split)
    (loss, _), gradient = jax.value_and_grad(family.loss, has_aux=True)(params, loss_key, batch, task)
    return loss, gradient

  return map(np.asarray, one(jax.random.split(jax.random.key(7), n)))


def test_sparse_gradients():
  """Each coordinate's is the exact one or zero, independently and at the rate asked for; the loss is exact."""
  family = surfaces.build(kinds=("power_law",), dimension=DIMENSION, density=(0.3, 0.3), gradient_noise=None)
  task = family.sample(jax.random.key(0))
  params = family.init(jax.random.key(1), task)
  n = 4000
  exact_loss, exact = (x[0] for x in gradients(family, task, params, "validation", 1))
  loss, gradient = gradients(family, task, params, "train", n)
  np.testing.assert_allclose(loss, exact_loss, rtol=1e-6)
  active = gradient != 0
  np.testing.assert_allclose(gradient, active * exact, rtol=1e-5)
  np.testing.assert_allclose(active.mean(axis=0), 0.3, atol=4.5 * math.sqrt(0.21 / n))
  assert abs(np.corrcoef(active.T)[np.triu_indices(DIMENSION, 1)]).max() < 4.5 / math.sqrt(n)


def test_gradient_noise():
  """In the normalised loss the noise has the norm asked for; validation and test have none."""
  sigma, n = 0.4, 4000
  family = surfaces.build(
    kinds=("log_sum_exp",), dimension=DIMENSION, density=(1.0, 1.0), gradient_noise=(sigma, sigma)
  )
  task = family.sample(jax.random.key(0))
  params = family.init(jax.random.key(1), task)
  exact_loss, exact = (x[0] for x in gradients(family, task, params, "test", 1))
  loss, gradient = gradients(family, task, params, "train", n)
  noise = (gradient - exact) / task.start_loss
  assert scipy.stats.kstest(noise.ravel() * math.sqrt(DIMENSION) / sigma, scipy.stats.norm.cdf).pvalue > 1e-3
  expected = exact_loss + (gradient - exact) @ np.asarray(params - task.minimum)
  np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-5)
  for split in ("validation", "test"):
    losses, same = gradients(family, task, params, split, 3)
    assert np.all(losses == losses[0])
    assert np.all(same == same[0])


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"kinds": ()}, r"kinds=\(\): must be one or more of rosenbrock, log_sum_exp, power_law"),
    ({"kinds": ("sphere",)}, "kinds="),
    ({"dimension": 1}, "dimension=1: must be at least 2"),
    ({"valley": (0.0, 1.0)}, "valley="),
    ({"sharpness": (2.0, 1.0)}, "sharpness="),
    ({"exponent": (-1.0, 1.0)}, "exponent="),
    ({"loss_scale": (1.0, math.inf)}, "loss_scale="),
    ({"density": (0.5, 1.5)}, "density="),
    ({"gradient_noise": (0.0, 1.0)}, "gradient_noise="),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match=f"^{message}"):
    surfaces.build(**options)


def test_unknown_split():
  family = surfaces.build()
  with pytest.raises(ValueError, match=f"split='eval': must be one of {', '.join(base.SPLITS)}"):
    family.batch(jax.random.key(0), family.sample(jax.random.key(1)), "eval")
