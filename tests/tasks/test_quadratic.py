"""The family of quadratics against its closed forms."""

import functools
import math

import jax
import numpy as np
import pytest
import scipy.stats

from lopt.tasks import quadratic


def sample(family, n, seed=0):
  return jax.jit(jax.vmap(family.sample))(jax.random.split(jax.random.key(seed), n))


def take(stacked, i):
  return jax.tree.map(lambda x: x[i], stacked)


def spectra(tasks):
  return np.linalg.eigvalsh(np.asarray(tasks.hessian, np.float64))  # ascending


@pytest.mark.parametrize("dimension", [1, 2, 7])
def test_loss_and_gradient_have_their_closed_form(dimension):
  family = quadratic.build(dimension=dimension)

  @jax.jit
  def compute(key):
    task_key, init_key, batch_key, loss_key = jax.random.split(key, 4)
    task_params = family.sample(task_key)
    params = family.init(init_key, task_params)
    batch = family.batch(batch_key, task_params, "train")

    def loss(params):
      value, metrics = family.loss(params, loss_key, batch, task_params)
      assert metrics == {}
      return value

    at_minimum = loss(task_params.minimum)
    return task_params, params, loss(params), jax.grad(loss)(params), jax.hessian(loss)(params), at_minimum

  for i in range(5):
    task_params, params, value, gradient, second, at_minimum = compute(jax.random.key(i))
    hessian = np.asarray(task_params.hessian, np.float64)
    error = np.asarray(params, np.float64) - np.asarray(task_params.minimum, np.float64)
    np.testing.assert_allclose(value, error @ hessian @ error / 2, rtol=1e-4)
    np.testing.assert_allclose(gradient, hessian @ error, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(second, hessian, atol=1e-5)
    assert at_minimum == 0


def test_gradient_descent_has_its_closed_form():
  """x_k − c = (I − ηA)^k (x_0 − c)."""
  family = quadratic.build(dimension=6, curvature=(1.0, 1.0))
  task_params = take(sample(family, 1), 0)
  start = family.init(jax.random.key(1), task_params)

  def step(params, key):
    batch_key, loss_key = jax.random.split(key)
    batch = family.batch(batch_key, task_params, "train")
    return params - 0.5 * jax.grad(family.loss, has_aux=True)(params, loss_key, batch, task_params)[0], None

  end, _ = jax.lax.scan(step, start, jax.random.split(jax.random.key(2), 30))
  decay = np.linalg.matrix_power(np.eye(6) - 0.5 * np.asarray(task_params.hessian, np.float64), 30)
  np.testing.assert_allclose(end - task_params.minimum, decay @ np.asarray(start - task_params.minimum), atol=1e-5)


def test_spectrum():
  family = quadratic.build(dimension=5, condition_number=(2.0, 50.0), curvature=(0.5, 4.0))
  tasks = sample(family, 2000)
  eigenvalues = spectra(tasks)
  condition = eigenvalues[:, -1] / eigenvalues[:, 0]
  uniform = scipy.stats.uniform
  for values, low, high in ((eigenvalues[:, -1], 0.5, 4.0), (condition, 2.0, 50.0)):
    assert scipy.stats.kstest(np.log(values), uniform(math.log(low), math.log(high / low)).cdf).pvalue > 1e-3
  # Those in between are log-uniform between the ends.
  inner = np.log(eigenvalues[:, 1:-1] / eigenvalues[:, :1]) / np.log(condition)[:, None]
  assert scipy.stats.kstest(inner.ravel(), uniform.cdf).pvalue > 1e-3


def test_the_basis_has_no_preferred_direction():
  """For a uniform basis E[A] = E[tr A] / d · I; here with eigenvalues 1 and 1/9, so tr A is known."""
  tasks = sample(quadratic.build(dimension=2, condition_number=(9.0, 9.0), curvature=(1.0, 1.0)), 4000)
  hessians = np.asarray(tasks.hessian, np.float64)
  np.testing.assert_allclose(spectra(tasks), np.broadcast_to([1 / 9, 1.0], (4000, 2)), rtol=1e-5)
  error = hessians.std(axis=0) / math.sqrt(4000)
  assert np.all(np.abs(hessians.mean(axis=0) - np.eye(2) * (1 + 1 / 9) / 2) < 4 * error)


def test_one_dimension_has_the_curvature_asked_for():
  tasks = sample(quadratic.build(dimension=1, curvature=(3.0, 3.0)), 10)
  np.testing.assert_allclose(tasks.hessian, 3.0, rtol=1e-6)


@pytest.mark.parametrize("start_scale", [0.0, 2.0])
def test_the_expected_start_has_normalized_loss_one(start_scale):
  family = quadratic.build(start_scale=start_scale)

  def at_start(key, task_params):
    init_key, batch_key, loss_key = jax.random.split(key, 3)
    batch = family.batch(batch_key, task_params, "train")
    loss, _ = family.loss(family.init(init_key, task_params), loss_key, batch, task_params)
    return family.normalize(loss, task_params)

  tasks = sample(family, 3)
  starts = jax.jit(jax.vmap(at_start, in_axes=(0, None)))
  for i in range(3):
    losses = np.asarray(starts(jax.random.split(jax.random.key(i + 10), 20_000), take(tasks, i)), np.float64)
    # Four standard errors; without scatter, the rounding of float32.
    assert abs(losses.mean() - 1) < 4 * losses.std() / math.sqrt(20_000) + 1e-5
    assert np.quantile(losses, 0.999) < family.loss_cap


def test_minimum_and_start_are_normal():
  family = quadratic.build(dimension=3, start_scale=2.0)
  tasks = sample(family, 3000)
  starts = jax.jit(jax.vmap(family.init))(jax.random.split(jax.random.key(1), 3000), tasks)
  for values, scale in ((tasks.minimum, 1.0), (starts, 2.0)):
    assert scipy.stats.kstest(np.ravel(values) / scale, scipy.stats.norm.cdf).pvalue > 1e-3


def test_gradient_noise():
  """Train gradients scatter around the true one as asked for; validation and test are exact."""
  noisy, exact = quadratic.build(gradient_noise=0.3), quadratic.build()
  task_params = take(sample(noisy, 1), 0)
  params = noisy.init(jax.random.key(1), task_params)

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def gradients(family, split):
    def one(key):
      batch_key, loss_key = jax.random.split(key)
      batch = family.batch(batch_key, task_params, split)
      return jax.grad(family.loss, has_aux=True)(params, loss_key, batch, task_params)[0]

    return jax.vmap(one)(jax.random.split(jax.random.key(3), 2000))

  truth = np.asarray(gradients(exact, "train"))
  assert np.all(truth == truth[0])
  noise = np.asarray(gradients(noisy, "train")) - truth
  assert scipy.stats.kstest(noise.ravel() / 0.3, scipy.stats.norm.cdf).pvalue > 1e-3
  for split in ("validation", "test"):
    np.testing.assert_allclose(gradients(noisy, split), truth, rtol=1e-6)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"dimension": 0}, "dimension=0: must be at least 1"),
    ({"condition_number": (0.5, 2.0)}, "condition_number="),
    ({"condition_number": (3.0, 2.0)}, "condition_number="),
    ({"curvature": (0.0, 2.0)}, "curvature="),
    ({"curvature": (1.0, math.inf)}, "curvature="),
    ({"start_scale": -1.0}, "start_scale=-1.0: must be at least 0"),
    ({"gradient_noise": -0.1}, "gradient_noise=-0.1: must be at least 0"),
    ({"gradient_noise": math.nan}, "gradient_noise=nan"),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match=f"^{message}"):
    quadratic.build(**options)


def test_unknown_split():
  family = quadratic.build()
  with pytest.raises(ValueError, match="split='eval': must be one of train, validation, test"):
    family.batch(jax.random.key(0), take(sample(family, 1), 0), "eval")
