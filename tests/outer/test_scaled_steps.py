"""Hidden factors on inner steps: what they multiply, how they are drawn, and what the optimizer sees of them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lopt import base
from lopt.outer import pes, scaled_steps


class State(NamedTuple):
  params: dict[str, jax.Array]
  count: jax.Array


def problem():
  """θ is the step of every parameter; the loss is what the optimizer would see."""

  def init(key, num_steps):
    del num_steps
    return State({"a": jax.random.normal(key, (3,)), "b": jnp.zeros(())}, jnp.int32(0))

  def step(theta, state, key):
    del key
    params = jax.tree.map(lambda p: p + theta, state.params)
    return State(params, state.count + 1), jnp.sum(state.params["a"])

  return base.UnrolledProblem(lambda key: jnp.int32(4), init, step, 7.0)


def test_steps_are_multiplied_and_nothing_else():
  wrapped = scaled_steps.wrap(problem(), 0.8)
  assert wrapped.loss_cap == 7.0
  state = wrapped.init(jax.random.key(3), jnp.int32(4))
  first, c = state.inner.params, state.factors
  for t in range(1, 4):
    expected = jnp.sum(state.inner.params["a"])
    state, loss = wrapped.step(jnp.float32(0.5), state, jax.random.key(t))
    assert loss == expected
    assert state.inner.count == t
    for name, p in first.items():
      np.testing.assert_allclose(state.inner.params[name], p + 0.5 * t * c[name], rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, state.factors, c)


def test_factors_are_log_normal_with_a_common_part():
  wrapped = scaled_steps.wrap(problem(), 0.8)
  factors = jax.vmap(lambda key: wrapped.init(key, jnp.int32(4)).factors)(jax.random.split(jax.random.key(0), 20_000))
  logs = np.log(np.stack([factors["a"], factors["b"]]))
  np.testing.assert_allclose(logs.mean(axis=1), 0, atol=4 * 0.9 / 20_000**0.5)
  common, own = 0.8**2, 0.4**2
  np.testing.assert_allclose(np.cov(logs), [[common + own, common], [common, common + own]], rtol=0.06)


def test_particles_of_a_pair_share_factors():
  estimator = pes.build(scaled_steps.wrap(problem(), 0.8), num_pairs=3, sigma=0.1, unroll_length=2)
  theta = jnp.float32(0.5)
  _, state, _ = estimator.estimate(jax.random.key(0), theta, estimator.init(jax.random.key(0), theta))
  factors = np.asarray(state.episodes.state.factors["a"])
  assert factors.shape == (3, 2)
  np.testing.assert_array_equal(factors[:, 0], factors[:, 1])
  assert len(set(factors[:, 0])) == 3


@pytest.mark.parametrize("spread", [-0.1, float("inf"), float("nan")])
def test_bad_spreads_are_named(spread):
  with pytest.raises(ValueError, match=r"^step_spread="):
    scaled_steps.wrap(problem(), spread)
