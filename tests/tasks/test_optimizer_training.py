"""The task of training an optimizer against a plain NumPy run, and optimizers whose losses are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lopt.tasks import optimizer_training


def example(**options):
  family = optimizer_training.build(**options)
  task = family.sample(jax.random.key(0))
  return family, task, family.init(jax.random.key(1), task), family.batch(jax.random.key(2), task, "train")


def test_the_loss_equals_a_plain_run():
  family, task, params, batch = example(dimension=3, num_steps=4, hidden_size=5, batch_size=2)
  w0, b0, w1, b1 = (np.asarray(params[f"mlp/~/linear_{i}"][name], np.float64) for i in (0, 1) for name in ("w", "b"))
  means = []
  for h, x in zip(*(np.asarray(a, np.float64) for a in batch), strict=True):
    first, scale, m, values = 0.5 * h @ x**2, np.sqrt(np.mean((h * x) ** 2)), np.zeros(3), []
    for _ in range(4):
      g = h * x / scale
      m = 0.9 * m + 0.1 * g
      inputs = np.stack([g, m], axis=1)
      x = x - float(task.step_multiplier) * (np.tanh(inputs @ w0 + b0) @ w1 + b1)[:, 0]
      values.append(0.5 * h @ x**2 / first)
    means.append(np.mean(values))
  loss, _ = family.loss(params, jax.random.key(3), batch, task)
  np.testing.assert_allclose(loss, task.loss_scale * np.mean(means), rtol=1e-5)
  np.testing.assert_allclose(family.normalize(loss, task), np.mean(means), rtol=1e-5)


def test_an_optimizer_that_does_nothing_has_loss_1():
  family, task, params, batch = example()
  loss, _ = family.loss(jax.tree.map(jnp.zeros_like, params), jax.random.key(3), batch, task)
  np.testing.assert_allclose(family.normalize(loss, task), 1.0, rtol=1e-6)


def test_curvatures_lie_between_the_tasks_smallest_and_largest():
  _, task, _, batch = example(batch_size=4000, condition_number=(20.0, 20.0))
  relative = np.asarray(batch.curvatures / task.curvature)
  assert relative.max() <= 1.0 + 1e-6
  assert relative.min() >= 1 / 20 - 1e-6
  np.testing.assert_allclose(np.log(relative).mean(), -np.log(20) / 2, rtol=0.02)


def test_gradient_descent_trains_it():
  """By backpropagation through the runs, the optimizer becomes better than doing nothing."""
  family, task, params, _ = example()

  @jax.jit
  def train(params):
    def step(params, key):
      batch = family.batch(key, task, "train")
      loss, gradient = jax.value_and_grad(lambda p: family.loss(p, key, batch, task)[0])(params)
      return jax.tree.map(lambda p, g: p - 0.1 * g / task.loss_scale, params, gradient), family.normalize(loss, task)

    return jax.lax.scan(step, params, jax.random.split(jax.random.key(4), 300))[1]

  losses = train(params)
  assert np.mean(losses[-30:]) < 0.8


def test_bad_options():
  with pytest.raises(ValueError, match="num_steps"):
    optimizer_training.build(num_steps=0)
  with pytest.raises(ValueError, match="condition_number"):
    optimizer_training.build(condition_number=(0.5, 2.0))
