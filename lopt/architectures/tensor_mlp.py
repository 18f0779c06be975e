"""One small MLP for each tensor, which decides how the tensor's momenta are combined.

Per-parameter networks spend their arithmetic on every parameter, and normalise away what tells a tensor whose
gradients agree from one whose gradients are noise. Here a network sees that, once for each tensor, and a parameter
costs a weighted sum of a dozen momenta, as in AggMo (J. Lucas et al., "Aggregated momentum", ICLR 2019), with weights
that follow the state of training. Networks with one run for each tensor are those of hierarchical optimizers
(O. Wichrowska et al., ICML 2017; L. Metz et al., "VeLO", 2022).
"""

from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from lopt import base
from lopt.architectures import layers, sharding

MOMENTUM_DECAYS = (0.5, 0.9, 0.97, 0.99, 0.997)
SECOND_DECAY = 0.99
TIME_SCALES = (10, 100)  # inner steps
NUM_INPUTS = 2 * len(MOMENTUM_DECAYS) + 1 + len(TIME_SCALES)
TINY = 1e-20


class TensorMLPState(NamedTuple):
  """What the optimizer remembers of an inner run: six numbers for each parameter, and one for each tensor."""

  count: Int[Array, ""]  # inner steps taken
  momenta: base.PyTree  # like the parameters, with the decays on a leading axis
  second_moment: base.PyTree  # like the parameters
  mean_square: base.PyTree  # of each tensor's gradients: moving average with the longest of the momenta's decays


def build(*, hidden_size: int = 8, step_multiplier: float = 1e-3, zero_output: bool = False) -> base.LearnedOptimizer:
  """Δp = -λ Σ_k c_k f_k, with features f_k of the parameter and coefficients c_k of its tensor.

  With momenta m_β ← β m_β + (1 - β) g for five β, the second moment v ← 0.99 v + 0.01 g², all corrected for their
  beginning at zero, the twelve features are

      g / √v,  m_β / √v,  m_β,  p,

  each divided by its root mean square over the tensor. Coefficients come from an MLP with one hidden layer (tanh).
  Its inputs are, with root mean squares over the tensor and ⟨·⟩ averaged with the longest of the decays,

      log rms(m_β) / √⟨mean g²⟩      how far the gradients of the last 1 / (1 - β) steps agree
      cos(g, m_β)                    whether the newest does
      min(axes of the tensor, 2) / 2
      tanh(t/τ - 1)                  of the step t, for τ = 10 and 100.

  Nothing in it depends on the scale of gradients or parameters.

  Args:
    hidden_size: Units of the hidden layer; 8 make 220 meta-parameters.
    step_multiplier: λ.
    zero_output: Whether the last layer begins at zero, and with it the updates: for learned directions.

  Raises:
    ValueError: The hidden layer has less than one unit.
  """
  if hidden_size < 1:
    raise ValueError(f"hidden_size: must be at least 1, not {hidden_size}")
  num_features = 2 * len(MOMENTUM_DECAYS) + 2

  def coefficients(inputs: Float[Array, "inputs tensors"]) -> Float[Array, "features tensors"]:
    w, b = layers.LinearWeights("hidden")(NUM_INPUTS, hidden_size)
    hidden = jnp.tanh(layers.product(w, inputs) + b[:, None])
    w, b = layers.LinearWeights("coefficients")(hidden_size, num_features, jnp.zeros if zero_output else None)
    return layers.product(w, hidden) + b[:, None]

  net = hk.without_apply_rng(hk.transform(coefficients))

  def init(key: base.PRNGKey) -> base.Theta:
    return net.init(key, jnp.zeros((NUM_INPUTS, 1)))

  def transform(theta: base.Theta, num_steps: Any) -> optax.GradientTransformationExtraArgs:
    del num_steps
    decays = jnp.array(MOMENTUM_DECAYS)
    gains = jnp.array([1 - beta for beta in MOMENTUM_DECAYS])

    def init_fn(params):
      return TensorMLPState(
        jnp.zeros((), jnp.int32),
        jax.tree.map(lambda p: sharding.zeros_like(p, len(MOMENTUM_DECAYS)), params),
        jax.tree.map(sharding.zeros_like, params),
        jax.tree.map(lambda p: jnp.zeros((), p.dtype), params),
      )

    def update_fn(updates, state, params=None, **extra_args):
      del extra_args
      if params is None:
        raise ValueError("the tensor MLP optimizer needs the parameters: call update(gradients, state, params)")
      count = state.count + 1
      weights = 1 - decays**count  # of what the averages have seen
      second_weight, slow_weight = 1 - jnp.float32(SECOND_DECAY) ** count, weights[-1]

      def accumulate(m, g):
        leading = (-1, *[1] * g.ndim)
        return decays.reshape(leading) * m + gains.reshape(leading) * g[None]

      momenta = jax.tree.map(accumulate, state.momenta, updates)
      second_moment = jax.tree.map(
        lambda v, g: SECOND_DECAY * v + (1 - SECOND_DECAY) * jnp.square(g), state.second_moment, updates
      )
      mean_square = jax.tree.map(
        lambda s, g: decays[-1] * s + gains[-1] * _mean_square(g), state.mean_square, updates
      )

      g, p, m, v, s = (jax.tree.leaves(x) for x in (updates, params, momenta, second_moment, mean_square))
      time = jnp.tanh(state.count / jnp.array(TIME_SCALES, jnp.float32) - 1.0)
      features = [_features(*x, second_weight) for x in zip(g, p, m, v, strict=True)]
      inputs = [_inputs(*x, weights, slow_weight, time) for x in zip(g, m, s, strict=True)]
      c = net.apply(theta, jnp.stack(inputs, axis=1))
      steps = []
      for i, (values, squares) in enumerate(features):
        scaled = -step_multiplier * c[:, i] * jax.lax.rsqrt(squares + TINY)
        steps.append(sum(scaled[k] * x for k, x in enumerate(values)))
      updates = jax.tree.unflatten(jax.tree.structure(updates), steps)
      return updates, TensorMLPState(count, momenta, second_moment, mean_square)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)

  return base.LearnedOptimizer(init, transform)


def _features(g: Array, p: Array, m: Array, v: Array, second_weight: base.Scalar) -> tuple[list[Array], Array]:
  """The features of a tensor's parameters, and their mean squares."""
  precondition = jax.lax.rsqrt(v / second_weight + TINY)
  values = [g * precondition, *[x * precondition for x in m], *m, p]
  return values, jnp.stack([_mean_square(x) for x in values])


def _inputs(
  g: Array, m: Array, mean_square: base.Scalar, weights: Array, slow_weight: base.Scalar, time: Array
) -> Float[Array, " inputs"]:
  """What the network sees of a tensor."""
  axes = tuple(range(1, m.ndim))
  square, dots = _mean_square(g), jnp.sum(m * g[None], axis=axes) / max(g.size, 1)
  squares = jnp.sum(jnp.square(m), axis=axes) / max(g.size, 1)
  agreement = 0.5 * jnp.log((squares / jnp.square(weights) + TINY) / (mean_square / slow_weight + TINY))
  alignment = dots * jax.lax.rsqrt(square * squares + TINY)
  return jnp.concatenate([agreement, alignment, jnp.array([min(g.ndim, 2) / 2]), time])


def _mean_square(x: Array) -> base.Scalar:
  return jnp.sum(jnp.square(x)) / max(x.size, 1)
