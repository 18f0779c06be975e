"""The coordinatewise LSTM optimizer.

M. Andrychowicz et al., "Learning to learn by gradient descent by gradient descent", NIPS 2016.
"""

import math
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from lopt import base


def log_and_sign(gradient: Float[Array, " n"], p: float) -> Float[Array, "n 2"]:
  """Gradients of every order of magnitude as two inputs of order one (appendix A of the paper).

  (log|g| / p, sgn g) where |g| ≥ exp(-p), else (-1, exp(p) g).
  """
  size = jnp.abs(gradient)
  large = size >= math.exp(-p)
  log_size = jnp.log(jnp.where(large, size, 1.0)) / p  # the logarithm of 0 would poison gradients through `where`
  return jnp.stack(
    [jnp.where(large, log_size, -1.0), jnp.where(large, jnp.sign(gradient), math.exp(p) * gradient)], axis=-1
  )


def build(
  *, hidden_sizes: tuple[int, ...] = (20, 20), step_multiplier: float = 0.01, p: float = 10.0
) -> base.LearnedOptimizer:
  """One small LSTM whose weights all inner parameters share, each with a hidden state of its own.

      h_t = LSTM(h_{t-1}, log_and_sign(g_t)),   Δp = λ (w·h_t + b)

  Args:
    hidden_sizes: Units of the stacked LSTM layers.
    step_multiplier: λ, which makes the first steps of an untrained network small ones.
    p: Gradients below exp(-p) are passed on linearly, larger ones by logarithm and sign.

  Raises:
    ValueError: For no layer, or one with less than one unit, or p ≤ 0.
  """
  if not hidden_sizes or min(hidden_sizes) < 1:
    raise ValueError(f"hidden_sizes: needs one or more layers of at least 1 unit, not {hidden_sizes}")
  if not p > 0:
    raise ValueError(f"p: must be above 0, not {p}")

  def core() -> hk.RNNCore:
    return hk.DeepRNN([hk.LSTM(size) for size in hidden_sizes])

  def network(gradient: Float[Array, " n"], state: base.State) -> tuple[Float[Array, " n"], base.State]:
    hidden, state = core()(log_and_sign(gradient, p), state)
    return hk.Linear(1)(hidden)[:, 0], state

  net = hk.without_apply_rng(hk.transform(network))
  start = hk.without_apply_rng(hk.transform(lambda n: core().initial_state(n)))  # zeros: no parameters

  def init(key: base.PRNGKey) -> base.Theta:
    return net.init(key, jnp.zeros(1), start.apply({}, 1))

  def transform(theta: base.Theta, num_steps: Any) -> optax.GradientTransformationExtraArgs:
    del num_steps

    def init_fn(params):
      return start.apply({}, sum(p.size for p in jax.tree.leaves(params)))

    def update_fn(updates, state, params=None, **extra_args):
      del params, extra_args
      gradient, unravel = ravel_pytree(updates)
      steps, state = net.apply(theta, gradient, state)
      return unravel(step_multiplier * steps), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)

  return base.LearnedOptimizer(init, transform)
