"""Truncated estimators are biased on influence balancing, by the amount that a closed form gives.

s_t = A s_{t-1} + b θ with loss ½(s_t[0] - 1)²: the gradient of a step's loss is (s_t[0] - 1) [Σ_{j<t} A^j b]₀.
Truncated estimators see the sum's first K terms only, which here have the other sign than the whole (Tallec and
Ollivier 2017; the PES paper's experiment on influence balancing).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lopt import base
from lopt.outer import backprop, es, forward, pes

N, POSITIVE, THETA, WARM_UP = 23, 10, 0.5, 60
A = 0.5 * np.eye(N) + 0.5 * np.eye(N, k=1)
B = np.where(np.arange(N) < POSITIVE, 1.0, -1.0)


def problem():
  """An episode that never ends."""
  a, b = jnp.asarray(A, jnp.float32), jnp.asarray(B, jnp.float32)

  def step(theta, s, key):
    del key
    s = a @ s + b * theta
    return s, 0.5 * jnp.square(s[0] - 1)

  return base.UnrolledProblem(lambda key: jnp.int32(2**30), lambda key, num_steps: jnp.ones(N), step)


def closed_form(unroll_length):
  """The mean loss of steps WARM_UP + 1 .. WARM_UP + K: its gradient, and what truncation makes of it."""
  s, influence, within = np.ones(N), np.zeros(N), np.zeros(N)
  whole, truncated = 0.0, 0.0
  for t in range(WARM_UP + unroll_length):
    s = A @ s + B * THETA
    influence = A @ influence + B
    if t >= WARM_UP:
      within = A @ within + B
      whole += (s[0] - 1) * influence[0]
      truncated += (s[0] - 1) * within[0]
  return whole / unroll_length, truncated / unroll_length


def estimates(build, unroll_length, replicates):
  """The window that follows WARM_UP steps, of independent estimators."""
  assert WARM_UP % unroll_length == 0
  estimator = build(problem(), unroll_length=unroll_length, stagger=False)

  @jax.jit
  @jax.vmap
  def replicate(key):
    theta = jnp.float32(THETA)

    def window(state, key):
      gradient, state, _ = estimator.estimate(key, theta, state)
      return state, gradient

    keys = jax.random.split(key, WARM_UP // unroll_length + 1)
    _, gradients = jax.lax.scan(window, estimator.init(key, theta), keys)
    return gradients[-1]

  return np.asarray(replicate(jax.random.split(jax.random.key(0), replicates)))


@pytest.mark.slow_but_for("3")
@pytest.mark.parametrize("unroll_length", [1, 3, 10])
def test_truncation_has_the_bias_of_the_closed_form(unroll_length):
  whole, truncated = closed_form(unroll_length)
  assert whole * truncated < 0  # it is the wrong way
  (tbptt,) = estimates(partial(backprop.build, num_runs=1), unroll_length, 1)
  np.testing.assert_allclose(tbptt - whole, truncated - whole, rtol=1e-4)
  build = partial(es.build, num_pairs=64, sigma=0.1, pairs_per_block=64)
  values = estimates(build, unroll_length, 256)
  error = np.std(values, ddof=1) / np.sqrt(len(values))
  assert error < 0.02 * abs(truncated)
  assert abs(np.mean(values) - truncated) < 4 * error


@pytest.mark.slow_but_for("1")
@pytest.mark.parametrize("unroll_length", [1, 10])
def test_unbiased_estimators_have_none_of_it(unroll_length):
  whole, _ = closed_form(unroll_length)
  (rtrl,) = estimates(partial(forward.build, num_runs=1), unroll_length, 1)
  np.testing.assert_allclose(rtrl, whole, rtol=1e-4)
  noisy = {
    "pes": partial(pes.build, num_pairs=512, sigma=0.1, pairs_per_block=512),
    "uoro": partial(forward.build, method="uoro", num_runs=512, runs_per_block=512),
  }
  for name, build in noisy.items():
    values = estimates(build, unroll_length, 64)
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    assert error < 0.1 * abs(whole), name  # truncation would be off by more than 100%
    assert abs(np.mean(values) - whole) < 4 * error, name
