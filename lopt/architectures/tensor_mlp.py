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
from lopt.architectures import layers, origin, sharding

MOMENTUM_DECAYS = (0.5, 0.9, 0.97, 0.99, 0.997)
SECOND_DECAY = 0.99
NUM_INPUTS = 2 * len(MOMENTUM_DECAYS) + 1  # and one for each time scale
NUM_FEATURES = 2 * len(MOMENTUM_DECAYS) + 2
TINY = 1e-20


class TensorMLPState(NamedTuple):
  """What the optimizer remembers of an inner run: six numbers for each parameter, and one for each tensor."""

  count: Int[Array, ""]  # inner steps taken
  momenta: base.PyTree  # like the parameters, with the decays on a leading axis
  second_moment: base.PyTree  # like the parameters
  mean_square: Float[Array, " tensors"]  # of gradients: moving average with the longest of the momenta's decays


@origin.remembered
def build(
  *,
  hidden_size: int = 8,
  time_scales: tuple[int, ...] = (10, 100),
  step_multiplier: float = 1e-3,
  zero_output: bool = False,
) -> base.LearnedOptimizer:
  """Δp = -λ Σ_k c_k f_k, with features f_k of the parameter and coefficients c_k of its tensor.

  With momenta m_β ← β m_β + (1 - β) g for five β, the second moment v ← 0.99 v + 0.01 g², all corrected for their
  beginning at zero, the twelve features are

      g / √v,  m_β / √v,  m_β,  p,

  each divided by its root mean square over the tensor. Coefficients come from an MLP with one hidden layer (tanh).
  Its inputs are, with root mean squares over the tensor and ⟨·⟩ averaged with the longest of the decays,

      log rms(m_β) / √⟨mean g²⟩      how far the gradients of the last 1 / (1 - β) steps agree
      cos(g, m_β)                    whether the newest does
      min(axes of the tensor, 2) / 2
      tanh(t/τ - 1)                  of the step t, for each time scale τ.

  Nothing in it depends on the scale of gradients or parameters.

  Args:
    hidden_size: Units of the hidden layer; 8 make 220 meta-parameters, with two time scales.
    time_scales: τ, in inner steps: when the network may change what it does.
    step_multiplier: λ.
    zero_output: Whether the last layer begins at zero, and with it the updates: for learned directions.

  Raises:
    ValueError: The hidden layer has less than one unit.
  """
  if hidden_size < 1:
    raise ValueError(f"hidden_size: must be at least 1, not {hidden_size}")

  num_inputs = NUM_INPUTS + len(time_scales)

  def coefficients(inputs: Float[Array, "inputs tensors"]) -> Float[Array, "features tensors"]:
    w, b = layers.LinearWeights("hidden")(num_inputs, hidden_size)
    hidden = jnp.tanh(layers.product(w, inputs) + b[:, None])
    w, b = layers.LinearWeights("coefficients")(hidden_size, NUM_FEATURES, jnp.zeros if zero_output else None)
    return layers.product(w, hidden) + b[:, None]

  net = hk.without_apply_rng(hk.transform(coefficients))

  def init(key: base.PRNGKey) -> base.Theta:
    return net.init(key, jnp.zeros((num_inputs, 1)))

  def transform(theta: base.Theta, num_steps: Any) -> optax.GradientTransformationExtraArgs:
    del num_steps
    decays = jnp.array(MOMENTUM_DECAYS, jnp.float32)
    gains = jnp.array([1 - beta for beta in MOMENTUM_DECAYS], jnp.float32)

    def init_fn(params):
      return TensorMLPState(
        jnp.zeros((), jnp.int32),
        jax.tree.map(lambda p: sharding.zeros_like(p, len(MOMENTUM_DECAYS)), params),
        jax.tree.map(sharding.zeros_like, params),
        jnp.zeros(len(jax.tree.leaves(params)), jnp.float32),
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
      columns = [jax.tree.leaves(x) for x in (updates, params, momenta, second_moment)]
      tensors = [(g, p, m, jax.lax.rsqrt(v / second_weight + TINY)) for g, p, m, v in zip(*columns, strict=True)]
      sizes = jnp.array([[max(g.size, 1) for g, *_ in tensors]], jnp.float32)
      means = jnp.stack([_sums(*x) for x in tensors], axis=1) / sizes
      squares, dots, of_gradient = means[:NUM_FEATURES], means[NUM_FEATURES:-1], means[-1:]
      of_momenta = squares[1 + len(MOMENTUM_DECAYS) : -1]
      mean_square = decays[-1] * state.mean_square + gains[-1] * of_gradient[0]
      slow = mean_square[None] / slow_weight
      agreement = 0.5 * jnp.log((of_momenta / jnp.square(weights)[:, None] + TINY) / (slow + TINY))
      alignment = dots * jax.lax.rsqrt(of_gradient * of_momenta + TINY)
      axes = jnp.array([[min(g.ndim, 2) / 2 for g, *_ in tensors]], jnp.float32)
      time = jnp.tanh(state.count / jnp.array(time_scales, jnp.float32) - 1.0)
      inputs = jnp.concatenate([agreement, alignment, axes, jnp.tile(time[:, None], len(tensors))])
      scaled = -step_multiplier * net.apply(theta, inputs) * jax.lax.rsqrt(squares + TINY)
      steps = [_weighted_sum(*x, scaled[:, i]) for i, x in enumerate(tensors)]
      updates = jax.tree.unflatten(jax.tree.structure(updates), steps)
      return updates, TensorMLPState(count, momenta, second_moment, mean_square)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)

  return base.LearnedOptimizer(init, transform)


def _sums(g: Array, p: Array, m: Array, precondition: Array) -> Float[Array, " sums"]:
  """Sums of squares of a tensor's features, of products of its momenta and its gradient, and of this one's squares.

  In few operations, since each is compiled for each shape.
  """
  each = tuple(range(1, m.ndim))
  features = (
    jnp.sum(jnp.square(g * precondition)),
    jnp.sum(jnp.square(m * precondition[None]), each),
    jnp.sum(jnp.square(m), each),
    jnp.sum(jnp.square(p)),
  )
  return jnp.hstack([*features, jnp.sum(m * g[None], each), jnp.sum(jnp.square(g))])


def _weighted_sum(g: Array, p: Array, m: Array, precondition: Array, c: Float[Array, " features"]) -> Array:
  """Σ_k c_k f_k, with the features in the order of `build`."""
  count = len(m)
  preconditioned = c[0] * g + sum(c[1 + k] * m[k] for k in range(count))
  return precondition * preconditioned + sum(c[1 + count + k] * m[k] for k in range(count)) + c[-1] * p
