"""Inner training as an unrolled problem, against plain loops."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lopt import base, inner_training
from lopt.tasks import mlp_classifier


def family():
  """Fits a vector to noisy targets: L = scale·|x - b|²/2, b ~ N(task mean, 1); losses are reported over scale."""

  def batch(key, task_params, split):
    shift = {"train": 0.0, "validation": 10.0, "test": 20.0}[split]
    return task_params["mean"] + shift + jax.random.normal(key, (3,))

  def loss(params, key, batch, task_params):
    noise = jax.random.normal(key)
    return task_params["scale"] * (0.5 * jnp.sum(jnp.square(params - batch)) + noise), {}

  return base.TaskFamily(
    sample=lambda key: {"mean": jax.random.normal(key, (3,)), "scale": jnp.float32(4.0)},
    init=lambda key, task_params: jax.random.normal(key, (3,)),
    batch=batch,
    loss=loss,
    normalize=lambda loss, task_params: loss / task_params["scale"],
    loss_cap=123.0,
  )


def sgd(decay=False):
  """θ is the learning rate, divided by the length of the run if `decay`."""

  def transform(theta, num_steps):
    rate = theta / num_steps if decay else theta
    return optax.with_extra_args_support(optax.sgd(rate, momentum=0.5))

  return base.LearnedOptimizer(lambda key: jnp.float32(0.1), transform)


def batch_and_noise(key, task_params, split):
  batch_key, loss_key = jax.random.split(key)
  return np.asarray(family().batch(batch_key, task_params, split)), float(jax.random.normal(loss_key))


@pytest.mark.parametrize("meta_loss", ["train", "validation"])
def test_an_episode_is_plain_training(meta_loss):
  problem = inner_training.build(family(), sgd(decay=True), horizon=lambda key: jnp.int32(7), meta_loss=meta_loss)
  theta, num_steps = jnp.float32(0.8), 7
  state = problem.init(jax.random.key(0), jnp.int32(num_steps))
  x, task = np.asarray(state.params, np.float64), jax.tree.map(np.asarray, state.task_params)
  velocity = np.zeros(3)
  for t in range(num_steps):
    key = jax.random.key(100 + t)
    state, loss = jax.jit(problem.step)(theta, state, key)
    train_key, validation_key = jax.random.split(key)

    batch, noise = batch_and_noise(train_key, state.task_params, "train")
    expected = 0.5 * np.sum((x - batch) ** 2) + noise
    velocity = 0.5 * velocity + task["scale"] * (x - batch)
    x = x - 0.8 / num_steps * velocity
    if meta_loss == "validation":
      batch, noise = batch_and_noise(validation_key, state.task_params, "validation")
      expected = 0.5 * np.sum((x - batch) ** 2) + noise
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    np.testing.assert_allclose(state.params, x, rtol=1e-4)
  assert problem.loss_cap == 123.0


def test_step_spread_multiplies_an_episodes_updates_by_one_factor():
  """Log-uniform between 1/S and S, the same in all of an episode's steps, and the optimizer sees nothing of it."""
  problem = inner_training.build(family(), sgd(), horizon=lambda key: jnp.int32(7), step_spread=4.0)
  plain = inner_training.build(family(), sgd(), horizon=lambda key: jnp.int32(7))
  starts = jax.vmap(lambda key: problem.init(key, jnp.int32(7)))(jax.random.split(jax.random.key(0), 2_000))
  exponents = np.log(starts.step_factor) / np.log(4.0)
  assert -1 <= exponents.min() < -0.98
  assert 0.98 < exponents.max() <= 1
  assert abs(np.mean(exponents)) < 4 / np.sqrt(3 * 2_000)  # four standard errors
  key = jax.random.key(1)
  one, other = problem.init(key, jnp.int32(7)), plain.init(key, jnp.int32(7))
  factor = one.step_factor
  for t in range(3):
    before, theta = one.params, jnp.float32(0.1)
    one, _ = problem.step(theta, one, jax.random.key(t))
    other, _ = plain.step(factor * theta, other, jax.random.key(t))  # which for SGD is the same
    np.testing.assert_allclose(one.params, other.params, rtol=1e-5)
    assert np.any(one.params != before)


@pytest.mark.parametrize("step_spread", [0.5, np.inf, np.nan])
def test_a_bad_step_spread_is_refused(step_spread):
  with pytest.raises(ValueError, match="step_spread"):
    inner_training.build(family(), sgd(), horizon=lambda key: jnp.int32(7), step_spread=step_spread)


@pytest.mark.parametrize(("loss_cap", "expected"), [(None, 123.0), (500.0, 123.0), (2.0, 2.0)])
def test_a_lower_cap_replaces_the_familys(loss_cap, expected):
  problem = inner_training.build(family(), sgd(), horizon=lambda key: jnp.int32(7), loss_cap=loss_cap)
  assert problem.loss_cap == expected


def test_logarithmic_meta_loss():
  floor, theta = 0.01, jnp.float32(0.3)
  plain, logarithmic = (
    inner_training.build(family(), sgd(), horizon=lambda key: jnp.int32(7), log_floor=f) for f in (None, floor)
  )
  states = [problem.init(jax.random.key(0), jnp.int32(7)) for problem in (plain, logarithmic)]
  for t in range(7):
    (states[0], loss), (states[1], logarithm) = (
      problem.step(theta, state, jax.random.key(t))
      for problem, state in zip((plain, logarithmic), states, strict=True)
    )
    expected = np.log(1 + max(np.float64(loss), 0) / floor) / np.log(1 + 1 / floor)
    np.testing.assert_allclose(logarithm, expected, rtol=1e-5)
    np.testing.assert_array_equal(states[0].params, states[1].params)
  np.testing.assert_allclose(logarithmic.loss_cap, np.log(1 + 123 / floor) / np.log(1 + 1 / floor), rtol=1e-6)
  with pytest.raises(ValueError, match=r"^log_floor=0.0: must be above 0"):
    inner_training.build(family(), sgd(), horizon=lambda key: jnp.int32(7), log_floor=0.0)


def test_an_optimizer_state_that_depends_on_theta_shows():
  """An episode outlives θ, so a state initialised from θ's values would be stale; it is NaN instead."""

  def transform(theta, num_steps):
    del num_steps
    return optax.with_extra_args_support(optax.stateless(lambda updates, params: updates))._replace(
      init=lambda params: theta
    )

  stale = base.LearnedOptimizer(lambda key: jnp.float32(1.0), transform)
  problem = inner_training.build(family(), stale, horizon=lambda key: jnp.int32(7))
  assert np.isnan(problem.init(jax.random.key(0), jnp.int32(7)).optimizer_state)


@pytest.mark.parametrize(("per", "distribution"), [("episode", np.log), ("step", lambda t: -1 / t)])
def test_horizons_are_log_uniform_and_include_both_ends(per, distribution):
  horizon = inner_training.log_uniform_horizon(minimum=3, maximum=40, per=per)
  drawn = np.asarray(jax.vmap(horizon)(jax.random.split(jax.random.key(0), 100_000)))
  assert drawn.min() == 3
  assert drawn.max() == 40
  shares = np.diff(distribution(np.arange(3.0, 42)))
  expected = 100_000 * shares / shares.sum()
  counts = np.bincount(drawn, minlength=41)[3:]
  chi_square = np.sum((counts - expected) ** 2 / expected)
  assert chi_square < 37 + 5 * np.sqrt(2 * 37)


def test_a_fixed_horizon_is_exact():
  horizon = inner_training.log_uniform_horizon(minimum=17, maximum=17)
  assert set(np.asarray(jax.vmap(horizon)(jax.random.split(jax.random.key(0), 1000)))) == {17}


@pytest.mark.parametrize(("minimum", "maximum"), [(0, 5), (6, 5), (-3, -1)])
def test_bad_horizons_are_refused(minimum, maximum):
  with pytest.raises(ValueError, match=f"1 <= minimum <= maximum, not {minimum} and {maximum}"):
    inner_training.log_uniform_horizon(minimum=minimum, maximum=maximum)
  with pytest.raises(ValueError, match="per='run': must be one of episode, step"):
    inspect.unwrap(inner_training.log_uniform_horizon)(minimum=1, maximum=2, per="run")


def test_bad_meta_loss_is_refused():
  unchecked = inspect.unwrap(inner_training.build)  # without the tests' own type check, as users call it
  with pytest.raises(ValueError, match="meta_loss='test': must be one of train, validation"):
    unchecked(family(), sgd(), horizon=lambda key: jnp.int32(7), meta_loss="test")


def test_bfloat16_rounds_the_linear_layers_and_nothing_else():
  family = mlp_classifier.build(dataset="digits", hidden_sizes=(16,), activations=("relu",))
  task = family.sample(jax.random.key(0))
  params = family.init(jax.random.key(1), task)
  batch = family.batch(jax.random.key(2), task, "train")

  def gradient(precision):
    rounded = inner_training.in_precision(family, precision)
    return jax.jit(jax.value_and_grad(lambda p: rounded.loss(p, jax.random.key(3), batch, task)[0]))(params)

  exact_loss, exact = gradient("float32")
  loss, slopes = gradient("bfloat16")
  assert {x.dtype for x in [loss, *jax.tree.leaves(slopes)]} == {jnp.dtype("float32")}
  # bfloat16 has 8 bits: layers are off by their rounding, a loss summed in it would be by 0.4%.
  assert 0 < abs(float(loss / exact_loss) - 1) < 0.002
  for x, y in zip(jax.tree.leaves(slopes), jax.tree.leaves(exact), strict=True):
    assert 1e-4 < np.linalg.norm(x - y) / np.linalg.norm(y) < 0.02
