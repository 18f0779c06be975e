"""An MLP update rule and a recurrent step-size scheduler, meta-trained one after the other.

A. Moudgil, B. Knyazev, G. Lajoie, E. Belilovsky, "Celo: Training versatile learned optimizers on a compute diet",
TMLR 2025 (arXiv:2501.12670); the normalised update is that of A. Moudgil, B. Knyazev, E. Belilovsky, "Celo2: Towards
learned optimization free lunch", 2026 (arXiv:2602.19142).
"""

import math
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from lopt import base, checks
from lopt.architectures import layers, origin, sharding, summaries

FACTORED_DECAYS = (0.9, 0.99, 0.999)
NUM_FEATURES = 29  # of a parameter


class CeloState(NamedTuple):
  """What the optimizer remembers of an inner run. Lists have an entry, and the LSTM a row, for each tensor."""

  count: Int[Array, ""]  # inner steps taken
  moments: summaries.Moments
  factored: list[tuple[Array, ...]]
  """Moving averages of `summaries.mean_squares`, with the three decays on a leading axis."""
  losses: summaries.LossHistory
  lstm: hk.LSTMState


@origin.remembered
def build(
  *,
  hidden_sizes: tuple[int, ...] = (8, 8),
  lstm_size: int = 16,
  tensor_features: bool = True,
  normalize: bool = True,
  step_multiplier: float = 0.01,
  exp_multiplier: float = 1e-3,
  parameter_floor: float = 0.01,
) -> base.LearnedOptimizer:
  """A rule for the direction of each parameter, and a scheduler for the step size of each tensor.

  The rule is an MLP on the features of a parameter that Adam and Adafactor know: with gradient g, momenta m_β, second
  moment v, and moving averages R_β, C_β of g² averaged along the largest and the second largest axis,

      g, p, m_β, √v, m_β/√v, 1/√v, g/√v, g ρ_β, m_β ρ_β, √R_β, 1/√R_β, √C_β, 1/√C_β,   ρ = √(mean R / (R C))

  for three β, each divided by its root mean square over the tensor. (For tensors of fewer than two axes R and C are
  the plain moving averages of g², and ρ = 1/√R.) From its outputs d, a the update is

      u = d exp(λ₂ a),   Δp = -λ₁ exp(s) √(mean p² + floor²) u / √(mean u²)

  with means over the tensor. The scheduler is an LSTM, shared by all tensors, each with a state of its own. Its
  inputs are the training fraction, how the loss has been moving, and statistics of the tensor
  (`lopt.architectures.summaries`); s is a linear function of its output. It starts at zero, so exp(s) is exactly 1.

  θ's modules are `rule/...` and `scheduler/...`. The first phase trains `rule` while the scheduler is neutral, the
  second `scheduler` with the rule frozen. Loss and gradients can be multiplied by constants without any effect
  (gradients of at least about 1e-7, see `summaries.EPSILON`).

  What differs from the authors' code for Celo: the update is normalised, as in Celo2, unless `normalize=False`; one
  MLP instead of a mixture of 64; roots of second moments as features, because their own squares are too small for
  float32; no clipped gradients. The scheduler has no layers before its LSTM, and sees the tensor's statistics,
  without which it would be one scheduler for all tensors.

  Args:
    hidden_sizes: Widths of the rule's hidden layers (4, 4 in the paper). By default the rule has 330 meta-parameters.
    lstm_size: Units of the scheduler (128 in the paper). By default the scheduler has 2,449 meta-parameters.
    tensor_features: Whether the scheduler sees statistics of the tensor. If not, all tensors get the same s.
    normalize: Whether u is divided by its root mean square. If not, step sizes are the rule's business too, and
      `step_multiplier` should be small (1e-3 in the paper).
    step_multiplier: λ₁; with `normalize` the relative size of an untrained step, 0.01 as in Adafactor.
    exp_multiplier: λ₂.
    parameter_floor: Scale of a tensor of zeros, such as a fresh bias. The authors' is 3e-5, with which these start
      slowly.

  Raises:
    ValueError: For a size below 1, no hidden layer, a multiplier that is not finite, a floor that is not above 0; by
      `update`, without parameters or without `value=loss`.
  """
  checks.require(
    len(hidden_sizes) > 0 and min(hidden_sizes) >= 1, "hidden_sizes", hidden_sizes, "one or more widths of at least 1"
  )
  checks.require(lstm_size >= 1, "lstm_size", lstm_size, "at least 1")
  checks.require(math.isfinite(step_multiplier), "step_multiplier", step_multiplier, "finite")
  checks.require(math.isfinite(exp_multiplier), "exp_multiplier", exp_multiplier, "finite")
  checks.require(0 < parameter_floor < math.inf, "parameter_floor", parameter_floor, "above 0 and finite")
  num_inputs = len(summaries.PROGRESS) + summaries.NUM_LOSS_FEATURES
  num_inputs += summaries.NUM_TENSOR_FEATURES if tensor_features else 0

  def rule(features: tuple[Float[Array, "_ *n"], ...]) -> Float[Array, "*n"]:
    rms = jnp.concatenate([summaries.rms(x) for x in features])
    with hk.name_scope("rule"):
      d, a = layers.mlp(features, rms, jnp.zeros(0, jnp.float32), (*hidden_sizes, 2))
    u = d * jnp.exp(exp_multiplier * a)
    return u / summaries.rms(u[None])[0] if normalize else u

  def scheduler(
    inputs: Float[Array, "tensors inputs"], state: hk.LSTMState
  ) -> tuple[Float[Array, " tensors"], hk.LSTMState]:
    with hk.name_scope("scheduler"):
      hidden, state = hk.LSTM(lstm_size)(inputs, state)
      return jnp.exp(hk.Linear(1, w_init=jnp.zeros)(hidden)[:, 0]), state

  rule_net = hk.without_apply_rng(hk.transform(rule))
  scheduler_net = hk.without_apply_rng(hk.transform(scheduler))

  def initial_lstm(num_tensors: int) -> hk.LSTMState:
    shape = (num_tensors, lstm_size)
    return hk.LSTMState(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32))

  def init(key: base.PRNGKey) -> base.Theta:
    rule_key, scheduler_key = jax.random.split(key)
    return {
      **rule_net.init(rule_key, (jnp.ones((NUM_FEATURES, 1)),)),
      **scheduler_net.init(scheduler_key, jnp.zeros((1, num_inputs), jnp.float32), initial_lstm(1)),
    }

  def transform(theta: base.Theta, num_steps: Any) -> optax.GradientTransformationExtraArgs:
    def init_fn(params):
      leaves = jax.tree.leaves(params)
      return CeloState(
        jnp.zeros((), jnp.int32),
        summaries.no_moments(params),
        [_no_squares(p) for p in leaves],
        summaries.no_losses(),
        initial_lstm(len(leaves)),
      )

    def update_fn(updates, state, params=None, *, value=None, **extra_args):
      del extra_args
      if params is None or value is None:
        missing = "the parameters" if params is None else "the loss"
        raise ValueError(f"the Celo optimizer needs {missing}: call update(gradients, state, params, value=loss)")
      gradients, structure = jax.tree.flatten(updates)
      moments = summaries.accumulate(state.moments, updates)
      factored = [
        _accumulate(old, summaries.mean_squares(g)) for old, g in zip(state.factored, gradients, strict=True)
      ]
      losses, of_loss = summaries.observe(state.losses, jnp.asarray(value, jnp.float32), state.count)
      momenta, second = summaries.corrected(moments, state.count + 1)
      tensors = list(zip(jax.tree.leaves(params), gradients, momenta, second, strict=True))

      of_run = jnp.concatenate([summaries.progress(state.count, num_steps), of_loss])
      rows = [[of_run, summaries.of_tensor(*tensor)] if tensor_features else [of_run] for tensor in tensors]
      multipliers, lstm = scheduler_net.apply(theta, jnp.stack([jnp.concatenate(row) for row in rows]), state.lstm)

      def update(p, g, m, v, factors, multiplier):
        features = _features(p, g, m, v, factors)
        scale = multiplier * (step_multiplier * summaries.parameter_scale(p, parameter_floor))
        return -scale * rule_net.apply(theta, features)

      steps = [update(*tensor, factored[i], multipliers[i]) for i, tensor in enumerate(tensors)]
      return structure.unflatten(steps), CeloState(state.count + 1, moments, factored, losses, lstm)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)

  return base.LearnedOptimizer(init, transform)


def _no_squares(p: Array) -> tuple[Array, ...]:
  """The averages of `summaries.mean_squares` before the first gradient, for each of the decays."""
  axes = summaries.factored_axes(p.shape) or (None,)
  return tuple(sharding.zeros_like(p, len(FACTORED_DECAYS), averaged=axis) for axis in axes)


def _accumulate(averages: tuple[Array, ...], squares: tuple[Array, ...]) -> tuple[Array, ...]:
  return tuple(
    jnp.stack([beta * old[i] + (1 - beta) * new for i, beta in enumerate(FACTORED_DECAYS)])
    for old, new in zip(averages, squares, strict=True)
  )


def _features(p: Array, g: Array, m: Array, v: Array, factored: tuple[Array, ...]) -> tuple[Array, ...]:
  """What a parameter's MLP sees, 29 rows in all, each array [rows, *shape]."""
  root = summaries.root(v[None])
  sides = [summaries.root(x) for x in factored]
  if p.ndim < 2:
    ratio = 1 / sides[0]
    sides = 2 * sides
  else:
    _, second_largest = summaries.factored_axes(p.shape)
    mean = jnp.mean(jnp.square(sides[0]), axis=1 + second_largest, keepdims=True)
    ratio = jnp.sqrt(mean) / (sides[0] * sides[1])
  g, p = g[None], p[None]
  rows = [g, p, m, root, m / root, 1 / root, g / root, g * ratio, m * ratio]
  rows += [jnp.broadcast_to(x, m.shape) for side in sides for x in (side, 1 / side)]
  return tuple(rows)
