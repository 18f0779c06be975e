"""Times of steps that are known to be slow and fast."""

import jax
import jax.numpy as jnp
import optax
import pytest

from lopt.base import LearnedOptimizer, TaskFamily
from lopt.evaluation import baselines, comparison, timing


def family(waste):
  """The loss x²/2, and as many sines."""

  def loss(params, key, batch, task_params):
    wasted = jax.lax.fori_loop(0, waste, lambda _, x: jnp.sin(x), jax.lax.stop_gradient(params["x"]))
    return params["x"] ** 2 / 2 + 1e-9 * wasted, {}

  return TaskFamily(
    lambda key: {}, lambda key, task_params: {"x": jnp.ones(())}, lambda key, task_params, split: {}, loss
  )


def slow_optimizer(waste):
  def update(updates, state, params=None, **extra_args):
    return jax.tree.map(lambda g: 1e-9 * jax.lax.fori_loop(0, waste, lambda _, x: jnp.sin(x), g), updates), state

  tx = optax.GradientTransformationExtraArgs(lambda params: (), update)
  return LearnedOptimizer(lambda key: {}, lambda theta, num_steps: tx)


def test_seconds_per_step_tell_a_slow_step_from_a_fast_one():
  def time(waste):
    sgd = baselines.from_learning_rate(optax.sgd)
    return timing.seconds_per_step(family(waste), sgd, baselines.theta_at(0.1), num_steps=9, at_least=0.02, repeats=3)

  fast, slow = time(0), time(2000)
  assert 0 < fast < 1e-3
  assert slow > 2 * fast


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "update", "low", "high"), [(3000, 0, 0.0, 0.4), (0, 3000, 0.6, 1.0)])
def test_the_updates_share_of_a_step(loss, update, low, high):
  empty = comparison.Comparison(
    tasks=("",),
    num_steps=5,
    num_seeds=1,
    seed=0,
    roles={"mine": "learned", "AdamW": "baseline"},
    sweeps={},
    recommended={},
    ladders={},
    seconds_per_step={},
  )
  timed = timing.with_times(empty, family(loss), {"mine": (slow_optimizer(update), {})})
  assert timed.seconds_per_step.keys() == {"mine", "AdamW", comparison.GRADIENT}
  share = comparison.update_share([timed], "mine")
  assert share is not None
  assert low <= share <= high
  time = comparison.relative_time([timed, empty], "mine")
  assert time == pytest.approx(timed.seconds_per_step["mine"] / timed.seconds_per_step["AdamW"])
