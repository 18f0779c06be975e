"""The coordinatewise LSTM optimizer.

M. Andrychowicz et al., "Learning to learn by gradient descent by gradient descent", NIPS 2016.
"""

import functools
import math
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from lopt import base
from lopt.architectures import layers, origin, sharding

LSTMStates = tuple[hk.LSTMState, ...]
LARGE_BLOCK = 4_096  # half of that of other networks: there is as much again for each parameter


def log_and_sign(gradient: Float[Array, "*n"], p: float) -> Float[Array, "2 *n"]:
  """Gradients of every order of magnitude as two inputs of order one (appendix A of the paper).

  (log|g| / p, sgn g) where |g| ≥ exp(-p), else (-1, exp(p) g).
  """
  size = jnp.abs(gradient)
  large = size >= math.exp(-p)
  log_size = jnp.log(jnp.where(large, size, 1.0)) / p  # the logarithm of 0 would poison gradients through `where`
  return jnp.stack([jnp.where(large, log_size, -1.0), jnp.where(large, jnp.sign(gradient), math.exp(p) * gradient)])


class LSTM(hk.Module):
  """`hk.LSTM` with features first and parameters last, [units, *n], and the same weights; twice as fast.

  The sigmoid gates are ½ + ½ tanh(x/2), with the half in the weights: one function for all four.
  """

  def __init__(self, units: int):
    super().__init__()
    self.units = units

  def __call__(
    self, inputs: Float[Array, "features *n"], state: hk.LSTMState
  ) -> tuple[Float[Array, "units *n"], hk.LSTMState]:
    w, b = layers.LinearWeights("linear")(len(inputs) + self.units, 4 * self.units)
    halves = jnp.repeat(jnp.array([0.5, 1.0, 0.5, 0.5], jnp.float32), self.units)
    bias = halves * (
      b + jnp.repeat(jnp.array([0.0, 0.0, 1.0, 0.0], jnp.float32), self.units)
    )  # of 1: remember at first
    gates = layers.product(w * halves[None], jnp.concatenate([inputs, state.hidden]))
    gates = jnp.tanh(gates + bias.reshape(-1, *[1] * (gates.ndim - 1)))
    i, g, f, o = jnp.split(gates, 4)
    cell = 0.5 * ((1 + f) * state.cell + (1 + i) * g)
    hidden = 0.5 * (1 + o) * jnp.tanh(cell)
    return hidden, hk.LSTMState(hidden, cell)


@origin.remembered
def build(
  *,
  hidden_sizes: tuple[int, ...] = (20, 20),
  step_multiplier: float = 0.01,
  p: float = 10.0,
  zero_output: bool = False,
) -> base.LearnedOptimizer:
  """One small LSTM whose weights all inner parameters share, each with a hidden state of its own.

      h_t = LSTM(h_{t-1}, log_and_sign(g_t)),   Δp = λ (w·h_t + b)

  Args:
    hidden_sizes: Units of the stacked LSTM layers.
    step_multiplier: λ, which makes the first steps of an untrained network small ones.
    p: Gradients below exp(-p) are passed on linearly, larger ones by logarithm and sign.
    zero_output: Whether the last layer begins at zero, and with it the updates: for learned directions.

  Raises:
    ValueError: For no layer, or one with less than one unit, or p ≤ 0.
  """
  if not hidden_sizes or min(hidden_sizes) < 1:
    raise ValueError(f"hidden_sizes: needs one or more layers of at least 1 unit, not {hidden_sizes}")
  if not p > 0:
    raise ValueError(f"p: must be above 0, not {p}")

  def network(gradient: Float[Array, "1 *n"], states: LSTMStates) -> tuple[Float[Array, "1 *n"], LSTMStates]:
    hidden, new = log_and_sign(gradient[0], p), []
    for size, state in zip(hidden_sizes, states, strict=True):
      hidden, state = LSTM(size)(hidden, state)
      new.append(state)
    w, b = layers.LinearWeights("linear")(hidden_sizes[-1], 1, jnp.zeros if zero_output else None)
    return jnp.tensordot(w, hidden, (0, 0)) + b.reshape([1] * hidden.ndim), tuple(new)

  net = hk.without_apply_rng(hk.transform(network))

  def start(p: Float[Array, "*n"]) -> LSTMStates:
    return tuple(hk.LSTMState(sharding.zeros_like(p, size), sharding.zeros_like(p, size)) for size in hidden_sizes)

  def init(key: base.PRNGKey) -> base.Theta:
    return net.init(key, jnp.zeros((1, 1)), start(jnp.zeros(1)))

  def transform(theta: base.Theta, num_steps: Any) -> optax.GradientTransformationExtraArgs:
    del num_steps

    def init_fn(params):
      return jax.tree.map(start, params)

    def update_fn(updates, state, params=None, **extra_args):
      del params, extra_args
      gradients, structure = jax.tree.flatten(updates)
      states = structure.flatten_up_to(state)
      apply = functools.partial(net.apply, theta)
      results = [
        layers.by_blocks(apply, g[None], s, large=LARGE_BLOCK) for g, s in zip(gradients, states, strict=True)
      ]
      steps = [step_multiplier * step[0] for step, _ in results]
      return structure.unflatten(steps), structure.unflatten([state for _, state in results])

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)

  return base.LearnedOptimizer(init, transform)
