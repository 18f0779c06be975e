"""The variance of PES against the number of unrolls W, which the paper analyses, against closed forms.

Losses that are linear in the θ of their own window only, with gradient G_w for the sum of window w. One pair's
estimate for a whole episode is ĝ = Σ_w Σ_{u≤w} ε_u (G_w·ε_w) / σ², whose terms with u < w have mean zero and square
P |G_w|², and those with u = w variance (P + 1) |G_w|². No two terms are correlated, so

    tr Cov ĝ = Σ_w (P + 1 + (w - 1) P) |G_w|².

Relative to |Σ G_w|² that grows linearly in W for G_w that are independent, and falls to P/2 for identical ones. With
noise kept for the whole episode, ĝ = ε (ε·Σ G_w) / σ², the variance is (P + 1) |Σ G_w|² for any W.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lopt import base
from lopt.outer import pes

T, P, SIGMA, REPLICATES = 16, 3, 0.7, 2**16
UNROLLS = [1, 2, 4, 8, 16]
STEP_GRADIENTS = {
  "identical": np.tile([[0.5, -1.0, 2.0]], (T, 1)),
  "independent": np.random.default_rng(0).normal(size=(T, P)),
}


def measured(gradients, unroll_length, noise_period):
  """The trace of the covariance of one pair's estimate of ∇ Σ_t L_t over an episode, and its standard error."""
  table = jnp.asarray(gradients, jnp.float32)
  problem = base.UnrolledProblem(
    lambda key: jnp.int32(T), lambda key, num_steps: jnp.int32(0), lambda theta, t, key: (t + 1, table[t] @ theta)
  )
  estimator = pes.build(
    problem, num_pairs=1, sigma=SIGMA, unroll_length=unroll_length, noise_period=noise_period, stagger=False
  )
  theta = jnp.zeros(P)

  @jax.jit
  @jax.vmap
  def episode(key):
    keys = jax.random.split(key, T // unroll_length)

    def window(state, key):
      gradient, state, _ = estimator.estimate(key, theta, state)
      return state, gradient

    _, windows = jax.lax.scan(window, estimator.init(key, theta), keys)
    return unroll_length * jnp.sum(windows, axis=0)

  values = np.asarray(episode(jax.random.split(jax.random.key(1), REPLICATES)), np.float64)
  squares = np.sum((values - values.mean(axis=0)) ** 2, axis=1)
  return squares.mean(), squares.std() / np.sqrt(REPLICATES)


def closed_form(gradients, unroll_length):
  sums = gradients.reshape(-1, unroll_length, P).sum(axis=1)
  return sum((P + 1 + w * P) * g @ g for w, g in enumerate(sums))


@pytest.mark.slow_but_for("identical-4", "independent-4")
@pytest.mark.parametrize("unroll_length", UNROLLS)
@pytest.mark.parametrize("kind", STEP_GRADIENTS)
def test_variance_of_pes(kind, unroll_length):
  gradients = STEP_GRADIENTS[kind]
  variance, error = measured(gradients, unroll_length, unroll_length)
  assert error < 0.03 * variance
  assert abs(variance - closed_form(gradients, unroll_length)) < 4 * error


@pytest.mark.slow_but_for("independent-4")
@pytest.mark.parametrize("unroll_length", [1, 4])
@pytest.mark.parametrize("kind", STEP_GRADIENTS)
def test_variance_with_noise_kept_for_the_episode(kind, unroll_length):
  total = STEP_GRADIENTS[kind].sum(axis=0)
  variance, error = measured(STEP_GRADIENTS[kind], unroll_length, T)
  assert error < 0.03 * variance
  assert abs(variance - (P + 1) * total @ total) < 4 * error


def test_what_the_paper_says_of_the_number_of_unrolls():
  """Of the closed forms: relative variance falls with W for identical gradients, grows for independent ones."""
  relative = {
    kind: [closed_form(g, k) / np.sum(g.sum(axis=0) ** 2) for k in reversed(UNROLLS)]
    for kind, g in STEP_GRADIENTS.items()
  }
  assert np.all(np.diff(relative["identical"]) < 0)
  assert relative["identical"][-1] > P / 2
  assert np.all(np.diff(relative["independent"]) > 0)
