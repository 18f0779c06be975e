"""θ that starts from another, of which a part is trained."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lopt import base, inner_training
from lopt.architectures import meta_parameters, mlp
from lopt.outer import meta_training, pes
from lopt.tasks import quadratic

THETA = {"rule": {"w": jnp.arange(3.0), "b": jnp.float32(7.0)}, "scheduler": {"w": jnp.ones((2, 2))}}


def architecture():
  return base.LearnedOptimizer(lambda key: THETA, lambda theta, num_steps: optax.sgd(theta["rule"]["b"]))


def test_names_are_paths():
  assert list(meta_parameters.named(THETA)) == ["rule/b", "rule/w", "scheduler/w"]
  assert list(meta_parameters.named(jnp.ones(3))) == ["theta"]


def test_a_part_and_the_whole():
  part, whole = meta_parameters.start_from(architecture(), THETA, ("rule/w", "sched"))
  theta = part.init(jax.random.key(0))
  assert set(theta) == {"rule/w", "scheduler/w"}
  changed = whole(theta | {"rule/w": jnp.zeros(3)})
  np.testing.assert_array_equal(changed["rule"]["w"], np.zeros(3))
  assert changed["rule"]["b"] == 7.0
  assert jax.tree.structure(changed) == jax.tree.structure(THETA)
  tx = part.transform(theta, 10)
  updates, _ = tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
  np.testing.assert_array_equal(np.asarray(updates), [-7.0, -7.0])  # by the frozen learning rate


def test_a_name_that_is_none_of_theta():
  with pytest.raises(ValueError, match="trainable: 'head' begins no name of θ, whose leaves are rule/b, rule/w"):
    meta_parameters.start_from(architecture(), THETA, ("head",))


@pytest.mark.slow
def test_meta_training_leaves_the_frozen_part_alone():
  optimizer = mlp.build(hidden_sizes=(4,))
  theta = optimizer.init(jax.random.key(3))
  part, whole = meta_parameters.start_from(optimizer, theta, ("layer_1",))
  problem = inner_training.build(
    quadratic.build(dimension=3), part, horizon=inner_training.log_uniform_horizon(minimum=5, maximum=5)
  )
  estimator = pes.build(problem, num_pairs=4, sigma=0.1, unroll_length=5)
  trainer = meta_training.build(estimator, part.init, optax.sgd(1.0), seed=0, steps_per_call=2)
  state, _ = trainer.advance(0, trainer.init())
  before, after = meta_parameters.named(theta), meta_parameters.named(whole(state.theta))
  assert list(before) == list(after)
  for name, value in before.items():
    assert np.array_equal(value, after[name]) == (not name.startswith("layer_1")), name
