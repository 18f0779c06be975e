"""Mixtures of problems against their parts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lopt import base
from lopt.outer import meta_training, mixture, pes

THETA = {"w": jnp.array([0.3, -0.2]), "b": jnp.float32(0.1)}
WEIGHTS = {"narrow": 3.0, "wide": 1.0}


def problem(width):
  """A recurrence in so many dimensions: problems of different widths have states of different shapes."""

  def init(key, num_steps):
    del num_steps
    return jax.random.normal(key, (width,))

  def step(theta, state, key):
    state = jnp.tanh(theta["w"][0] * state + theta["b"] + 0.3 * jax.random.normal(key, (width,)))
    return state, jnp.mean(jnp.square(state - theta["w"][1]))

  return base.UnrolledProblem(lambda key: jax.random.randint(key, (), 3, 9), init, step)


def parts(num_pairs=8):
  return {
    name: pes.build(problem(width), num_pairs=num_pairs, sigma=0.1, unroll_length=5)
    for name, width in {"narrow": 2, "wide": 7}.items()
  }


def leaves(tree):
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def test_it_is_the_weighted_mean_of_its_parts():
  """Over three windows, each part alone on the key that the mixture gives it."""
  combined = mixture.combine(parts(), WEIGHTS)
  state = combined.init(jax.random.key(0), THETA)
  alone = {
    name: part.init(jax.random.fold_in(jax.random.key(0), i), THETA) for i, (name, part) in enumerate(parts().items())
  }
  for window in range(3):
    key = jax.random.key(10 + window)
    gradient, state, metrics = combined.estimate(key, THETA, state)
    expected, losses = 0.0, {}
    for i, (name, part) in enumerate(parts().items()):
      g, alone[name], m = part.estimate(jax.random.fold_in(key, i), THETA, alone[name])
      expected = expected + WEIGHTS[name] / 4 * leaves(g)
      losses[name] = m["meta_loss"]
    np.testing.assert_allclose(leaves(gradient), expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["meta_loss"], 0.75 * losses["narrow"] + 0.25 * losses["wide"], rtol=1e-5)
    np.testing.assert_allclose(metrics["meta_loss/wide"], losses["wide"], rtol=1e-5)
    assert metrics["inner_steps"] == 2 * 2 * 5


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_the_number_of_devices_does_not_matter(devices, monkeypatch):
  """The same θ on any number of devices."""
  monkeypatch.setattr(meta_training.parallel, "num_devices", lambda pairs: devices)
  trainer = meta_training.build(
    mixture.combine(parts(), WEIGHTS), lambda key: THETA, optax.sgd(0.1), seed=0, steps_per_call=4
  )
  state, metrics = trainer.advance(0, trainer.init())
  plain = meta_training.build(mixture.combine(parts(), WEIGHTS), lambda key: THETA, optax.sgd(0.1), seed=0)
  monkeypatch.setattr(meta_training.parallel, "num_devices", lambda pairs: 1)
  expected = plain.init()
  for step in range(4):
    expected, _ = plain.advance(step, expected)
  np.testing.assert_allclose(leaves(state.theta), leaves(expected.theta), rtol=1e-4, atol=1e-6)
  assert metrics["inner_steps"].tolist() == [8 * 2 * 2 * 5] * 4


def test_the_mean_square_gives_the_variance_of_the_mean():
  """(E|g_n|² - |g|²) / (N - 1), averaged over many mixtures, is the variance of their gradients."""
  combined = mixture.combine(parts(), WEIGHTS)

  @jax.jit
  @jax.vmap
  def first_gradients(key):
    init_key, key = jax.random.split(key)
    gradient, _, metrics = combined.estimate(key, THETA, combined.init(init_key, THETA))
    square = jnp.square(optax.tree.norm(gradient))
    return gradient, (metrics["mean_square_gradient"] - square) / 7

  gradients, variances = first_gradients(jax.random.split(jax.random.key(0), 4_000))
  observed = sum(np.var(np.asarray(x), axis=0).sum() for x in jax.tree.leaves(gradients))
  np.testing.assert_allclose(np.mean(variances), observed, rtol=0.1)


@pytest.mark.parametrize(
  "weights", [{}, {"narrow": 1.0}, {"narrow": 1.0, "wide": 0.0}, {"narrow": 1.0, "broad": 1.0}]
)
def test_weights_must_fit(weights):
  with pytest.raises(ValueError, match="weights: must be"):
    mixture.combine(parts(), weights)


def test_parts_must_have_as_many_particles():
  unequal = parts() | {"wide": pes.build(problem(7), num_pairs=4, sigma=0.1, unroll_length=5)}
  with pytest.raises(ValueError, match="as many particles"):
    mixture.combine(unequal, WEIGHTS).init(jax.random.key(0), THETA)


@pytest.mark.slow_but_for("1")
@pytest.mark.parametrize("devices", [1, 2])
def test_balanced_families_have_noise_of_one_size(devices, monkeypatch):
  """Σ_i w_i g_i / √(mean |g_in|²), each part alone; scaling a family's loss changes nothing, on any devices."""
  monkeypatch.setattr(meta_training.parallel, "num_devices", lambda pairs: devices)

  def louder(estimator):
    def estimate(key, theta, state):
      gradient, state, metrics = estimator.estimate(key, theta, state)
      squares = 1e6 * metrics["mean_square_gradient"]
      return optax.tree.scale(1e3, gradient), state, {**metrics, "mean_square_gradient": squares}

    return base.GradientEstimator(estimator.init, estimate)

  def theta_after_a_step(estimators):
    combined = mixture.combine(estimators, WEIGHTS, balance=meta_training.parallel.mean)
    trainer = meta_training.build(combined, lambda key: THETA, optax.sgd(1.0), seed=0)
    return leaves(trainer.advance(0, trainer.init())[0].theta)

  keys = meta_training.keys(0)
  expected = leaves(THETA)
  for i, (name, part) in enumerate(parts().items()):
    state = part.init(jax.random.fold_in(keys.particles, i), THETA)
    g, _, m = part.estimate(jax.random.fold_in(jax.random.fold_in(keys.steps, 0), i), THETA, state)
    expected = expected - WEIGHTS[name] / 4 * leaves(g) / np.sqrt(m["mean_square_gradient"])
  np.testing.assert_allclose(theta_after_a_step(parts()), expected, rtol=1e-4)
  loud = {**parts(), "wide": louder(parts()["wide"])}
  np.testing.assert_allclose(theta_after_a_step(loud), expected, rtol=1e-4)
