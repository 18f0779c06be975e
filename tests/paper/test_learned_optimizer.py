"""Experiment 8: what its curves are made of."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lopt import base
from lopt.evaluation import baselines


def random_walk(cap=math.inf):
  """Plain enough for NumPy; θ scales the noise."""

  def step(theta, state, key):
    state = state + theta * jax.random.normal(key, (2,))
    return state, jnp.sum(jnp.square(state))

  init = lambda key, horizon: horizon * jax.random.uniform(key, (2,)) / 5
  return base.UnrolledProblem(lambda key: jnp.int32(5), init, step, cap)


def test_mean_losses_equal_a_plain_loop_and_are_capped(script):
  cap = 3.0
  thetas = jnp.array([0.0, 0.5, 2.0, jnp.nan])
  measured = script.mean_losses(random_walk(cap), thetas, horizon=5, runs=3)

  losses = np.zeros((4, 3, 5))
  for run, key in enumerate(jax.random.split(jax.random.key(1), 3)):
    init_key, steps_key = jax.random.split(key)
    start = np.asarray(jax.random.uniform(init_key, (2,)))
    noise = [np.asarray(jax.random.normal(key, (2,))) for key in jax.random.split(steps_key, 5)]
    for i, theta in enumerate(np.asarray(thetas)):
      states = start + theta * np.cumsum(noise, axis=0)
      losses[i, run] = np.sum(states**2, axis=1)
  losses = np.where(losses < cap, losses, cap)  # NaN counts as diverged
  np.testing.assert_allclose(measured, losses.mean(axis=(1, 2)), rtol=1e-5)
  assert measured[3] == cap


@pytest.mark.slow
def test_estimators_take_as_many_inner_steps(script):
  settings = script.QUICK._replace(unroll_length=3, particles=12)
  for name, estimator in script.build_estimators(settings, random_walk()).items():
    state = estimator.init(jax.random.key(0), jnp.ones(()))
    _, state, metrics = jax.jit(estimator.estimate)(jax.random.key(1), jnp.ones(()), state)
    groups = jax.tree.leaves(state)[0].shape[0]
    assert groups * metrics["inner_steps"] == 12 * 3, name


@pytest.mark.slow
def test_every_episode_trains_the_same_task(script):
  settings = script.QUICK._replace(hidden_sizes=(3,), batch_size=4, horizon=6)
  problem = script.build_problem(settings, baselines.adam())
  states = [problem.init(jax.random.key(i), jnp.int32(6)) for i in range(2)]
  drawn = [{name: x for name, x in state.task_params._asdict().items() if x is not None} for state in states]
  numberings = [sorted(np.asarray(x.pop("classes"))) for x in drawn]
  assert numberings[0] == numberings[1] == list(range(10))
  assert (
    drawn[0]
    == drawn[1]
    == {"num_classes": 10, "activation": 0} | dict.fromkeys(("weight_scale", "input_scale", "loss_scale"), 1.0)
  )
  # The loss is in units of a uniform guess over ten classes: a network of zeros, which Adam has not moved yet, has 1.
  zeros = states[0]._replace(params=jax.tree.map(jnp.zeros_like, states[0].params))
  _, loss = problem.step(baselines.theta_at(0.01), zeros, jax.random.key(2))
  assert math.isclose(loss, 1.0, rel_tol=1e-6)
