"""What a network sees of a whole tensor and of an inner run: running moments, losses, progress, statistics.

Nearly all of it is scale-free: multiplying loss and gradients by a constant changes nothing, as long as gradients are
well above `EPSILON`. The exception is the size of the parameters themselves.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lopt import base
from lopt.architectures import sharding

MOMENTUM_DECAYS = (0.9, 0.99, 0.999)
SECOND_MOMENT_DECAY = 0.999
LOSS_DECAYS = (0.9, 0.99, 0.999)
PROGRESS = (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)  # fractions t/T

EPSILON = 1e-16
"""Added to mean squares before roots and logarithms: the square of what Adam adds to the root, 1e-8."""

NUM_LOSS_FEATURES = 4
NUM_TENSOR_FEATURES = 8


class Moments(NamedTuple):
  """Exponential moving averages over the inner steps, from zero: a_t = β a_{t-1} + (1 - β) x_t."""

  momenta: base.PyTree
  """Of the gradients; like the parameters, with the three decays on a leading axis."""
  second: base.PyTree
  """Of their squares."""


class LossHistory(NamedTuple):
  """What is remembered of the losses so far."""

  means: Float[Array, "3"]
  """Moving averages with `LOSS_DECAYS`, from zero."""
  first: base.Scalar


def no_moments(params: base.Params) -> Moments:
  """The moments before the first inner step."""
  momenta = jax.tree.map(lambda p: sharding.zeros_like(p, len(MOMENTUM_DECAYS)), params)
  return Moments(momenta, jax.tree.map(sharding.zeros_like, params))


def accumulate(moments: Moments, gradients: base.Params) -> Moments:
  """The moments after one more gradient."""

  def momenta(m, g):
    return jnp.stack([beta * m[i] + (1 - beta) * g for i, beta in enumerate(MOMENTUM_DECAYS)])

  def second(v, g):
    return SECOND_MOMENT_DECAY * v + (1 - SECOND_MOMENT_DECAY) * jnp.square(g)

  return Moments(jax.tree.map(momenta, moments.momenta, gradients), jax.tree.map(second, moments.second, gradients))


def total_weights(decays: tuple[float, ...], count: Int[Array, ""]) -> Float[Array, " decays"]:
  """1 - β^t of moving averages from zero after t values, by which one divides to make averages of them."""
  # In float32, 1 - 0.999¹ is wrong in the fifth digit.
  return -jnp.expm1(count * jnp.array([math.log(beta) for beta in decays], jnp.float32))


def corrected(moments: Moments, count: Int[Array, ""]) -> tuple[list[Array], list[Array]]:
  """Bias-corrected momenta and second moments after `count` gradients, as lists in the order of `jax.tree.leaves`."""
  weights = total_weights(MOMENTUM_DECAYS, count)
  (weight,) = total_weights((SECOND_MOMENT_DECAY,), count)
  momenta = [m / weights.reshape(-1, *[1] * (m.ndim - 1)) for m in jax.tree.leaves(moments.momenta)]
  return momenta, [v / weight for v in jax.tree.leaves(moments.second)]


def no_losses() -> LossHistory:
  """The history before the first inner step."""
  return LossHistory(jnp.zeros(len(LOSS_DECAYS), jnp.float32), jnp.zeros((), jnp.float32))


def observe(history: LossHistory, loss: base.Scalar, count: Int[Array, ""]) -> tuple[LossHistory, Float[Array, "4"]]:
  """The history with the loss of step `count` (0, 1, ...) in it, and how the loss has been moving.

  Features are contrasts c(a, b) = (a - b) / (|a| + |b|) of the loss and its bias-corrected averages m_β: c(L, m_0.9),
  c(m_0.9, m_0.99), c(m_0.99, m_0.999) and c(m_0.9, L_0). For positive a and b, c = tanh(½ log(a / b)), a squashed
  difference of logarithms; unlike these it takes losses of any sign. All are 0 in the first step.
  """
  first = jnp.where(count == 0, loss, history.first)
  decays = jnp.array(LOSS_DECAYS, jnp.float32)
  gains = jnp.array([1 - beta for beta in LOSS_DECAYS], jnp.float32)
  means = decays * history.means + gains * loss
  fast, middle, slow = means / total_weights(LOSS_DECAYS, count + 1)
  features = jnp.stack(
    [_contrast(loss, fast), _contrast(fast, middle), _contrast(middle, slow), _contrast(fast, first)]
  )
  return LossHistory(means, first), features


def progress(count: Int[Array, ""], num_steps: Any) -> Float[Array, "9"]:
  """tanh(10 (t/T - x)) at nine positions x, of which most change little at any one time (Metz et al. 2022, VeLO)."""
  return jnp.tanh(10 * (jnp.float32(count) / num_steps - jnp.array(PROGRESS, jnp.float32)))


def rms(x: Float[Array, "rows *shape"]) -> Float[Array, " rows"]:
  """√(mean x² + ε) of each row."""
  return jnp.sqrt(_mean_squares(x) + EPSILON)


def root(x: Float[Array, "rows *shape"]) -> Float[Array, "rows *shape"]:
  """√(x + 10⁻⁶ mean x + ε) of second moments, to divide by; the mean is over the tensor, for each row.

  Entries that never get a gradient (weights of a pixel that is always black) would otherwise have reciprocals that
  drown all others once these are divided by their root mean square.
  """
  mean = jnp.mean(x, axis=range(1, x.ndim), keepdims=True)
  return jnp.sqrt(x + 1e-6 * mean + EPSILON)


def factored_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
  """The largest axis and the second largest, of equal ones the later as the larger; none below two axes."""
  return tuple(int(axis) for axis in np.argsort(shape, kind="stable")[:-3:-1]) if len(shape) > 1 else ()


def mean_squares(g: Float[Array, "*shape"]) -> tuple[Array, ...]:
  """g² averaged along the largest and along the second largest axis, kept with size 1; g² itself below two axes.

  What N. Shazeer, M. Stern, "Adafactor: Adaptive learning rates with sublinear memory cost", ICML 2018, keep of g².
  """
  axes = factored_axes(g.shape)
  return tuple(jnp.mean(jnp.square(g), axis=axis, keepdims=True) for axis in axes) if axes else (jnp.square(g),)


def parameter_scale(parameter: Array, floor: float) -> base.Scalar:
  """√(mean p² + floor²) over a tensor, to which relative steps are relative."""
  return jnp.sqrt(jnp.mean(jnp.square(parameter)) + floor**2)


def of_tensor(
  parameter: Float[Array, "*shape"],
  gradient: Float[Array, "*shape"],
  momenta: Float[Array, "3 *shape"],
  second: Float[Array, "*shape"],
) -> Float[Array, "8"]:
  """Statistics of one tensor, of order one.

  With s = √mean(v) the scale of its gradients so far: a quarter of the tensor's rank, a tenth of the logarithm of its
  size, half the common logarithms of RMS(p), RMS(g)/s, RMS(m_β)/s for three β (how consistent gradients are), and
  mean(√v)/s (how evenly they are spread over the tensor).

  Args:
    parameter: p.
    gradient: g of this step.
    momenta: m_β, bias-corrected.
    second: v, bias-corrected.
  """
  scale = log10_root(jnp.mean(second))
  spread = log10_root(jnp.square(jnp.mean(jnp.sqrt(second + EPSILON))))
  logs = jnp.stack([log10_root(jnp.mean(jnp.square(parameter))), spread - scale])
  ratios = log10_root(jnp.concatenate([_mean_squares(gradient[None]), _mean_squares(momenta)])) - scale
  return jnp.concatenate(
    [jnp.array([parameter.ndim / 4, math.log(parameter.size) / 10], jnp.float32), logs / 2, ratios / 2]
  )


def log10_root(square: Array, epsilon: float = EPSILON) -> Array:
  """log₁₀ √(x + ε)."""
  return 0.5 * jnp.log10(square + epsilon)


def _mean_squares(x: Float[Array, "rows *shape"]) -> Float[Array, " rows"]:
  return jnp.mean(jnp.square(x), axis=range(1, x.ndim))


def _contrast(a: base.Scalar, b: base.Scalar) -> base.Scalar:
  size = jnp.abs(a) + jnp.abs(b)
  return (a - b) / jnp.where(size == 0, 1.0, size)
