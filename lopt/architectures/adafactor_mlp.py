"""The Adafactor-feature MLP optimizer, also known as small_fc_lopt.

L. Metz, C. D. Freeman, J. Harrison, N. Maheswaranathan, J. Sohl-Dickstein, "Practical tradeoffs between memory,
compute, and performance in learned optimizers", CoLLAs 2022. Features, constants and the layout of θ are those of the
authors' code (AdafacMLPLOpt in github.com/google/learned_optimization), so that weights trained with it can be used:
see `lopt.architectures.published`.
"""

import functools
import math
import operator
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from lopt import base, checks
from lopt.architectures import origin, sharding, summaries

TIME_SCALES = (1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)  # inner steps


class AdafactorMLPState(NamedTuple):
  """What the optimizer remembers of an inner run: about four numbers per parameter."""

  count: Int[Array, ""]  # inner steps taken
  momenta: base.PyTree  # like the parameters, with the decays on a leading axis
  second_moment: base.PyTree  # like the parameters
  factored: base.PyTree
  """For each tensor (R, C), second moments averaged along one axis, of size 1 then, with the decays on a leading
  axis; (V,) of the tensor's own shape if it has fewer than two axes."""


def _mean(x: Float[Array, "features ..."]) -> Float[Array, " features"]:
  """Over the tensor, for each feature."""
  return jnp.mean(x, axis=range(1, x.ndim))


def _mean_square(x: Float[Array, "..."], factors: list[Float[Array, "features ..."]]) -> Float[Array, " features"]:
  """The mean over the tensor of (x · Π factors)², which broadcast, by contractions instead of storing the product."""
  size = math.prod(jnp.broadcast_shapes(x.shape, *(y.shape for y in factors))[1:])
  operands = [operand for y in (x, *factors) for operand in (jnp.square(y).squeeze(), _long_axes(y))]
  output = [0] if len(factors[0]) > 1 else []
  return jnp.einsum(*operands, output).reshape(-1) / size


def _long_axes(x: Array) -> list[int]:
  return [axis for axis, size in enumerate(x.shape) if size > 1]


@jax.custom_jvp
def _dense(w: Float[Array, "fan_in size"], x: list[Array], b: list[Array]) -> list[Array]:
  """w.T @ x + b in scalar arithmetic, which XLA fuses into one loop over the parameters."""
  return [sum((w[i, j] * x[i] for i in range(len(x))), start=bias) for j, bias in enumerate(b)]


@_dense.defjvp
def _dense_jvp(primals, tangents):
  # As products of matrices, which are stored: in scalar arithmetic, the derivative by every weight and every input
  # would be a loop of its own over the parameters, each with all of the network in it.
  def products(w, x, b):
    return [y + bias for y, bias in zip(jnp.tensordot(w, jnp.stack(x), (0, 0)), b, strict=True)]

  return jax.jvp(products, primals, tangents)


@origin.remembered
def build(
  *,
  hidden_sizes: tuple[int, ...] = (4, 4),
  decays: tuple[float, ...] = (0.9, 0.99, 0.999),
  second_moment_decay: float = 0.999,
  step_multiplier: float = 1e-3,
  exp_multiplier: float = 1e-3,
  epsilon: float = 1e-5,
  gradient_scale: float = 1.0,
  time_scales: tuple[int, ...] = TIME_SCALES,
  zero_output: bool = False,
) -> base.LearnedOptimizer:
  """One very small MLP, applied to every inner parameter on its own, that sees what Adam and Adafactor see.

  For a tensor p with gradient g, averages ← β · average + (1 - β) · (new value) run over

      m_β    momenta g, three β                     v      second moment g², one β
      R_β    g² averaged along the largest axis, three β
      C_β    g² averaged along the second largest axis, three β

  and with ρ = (R_β / mean R_β)^-½ and γ = C_β^-½ (the mean runs along the second largest axis), the 28 features of a
  parameter are

      g, p, m_β, v, m_β v^-½, v^-½, g ρ γ, R_β, C_β, R_β^-½, C_β^-½, m_β ρ γ.

  A tensor of fewer than two axes has the plain second moments V_β for R_β and C_β, and V_β^-½ for ρ γ. (Small
  constants keep the roots finite: 1e-6 is added to v, and to V_β next to m_β; 1e-9 to V_β next to g; 1e-8 to R_β and
  C_β as features; ρ^-2 and γ^-2 are at least 1e-9.) Each feature is divided by its root mean square √(mean x² + ε)
  over the tensor. With tanh(t/τ - 1) of the step t at several time scales τ these are the inputs of the network, from
  whose outputs d, a the update is

      Δp = -λ₁ d exp(λ₂ a).

  θ holds the network's weights and an offset θ_β for each decay, 1 - β = (1 - β_initial) exp(10 θ_β).

  Args:
    hidden_sizes: Widths of the hidden layers. Two of 4 make 197 meta-parameters. The network is unrolled into scalar
      arithmetic, which is fastest for small widths; compile time grows with the number of weights.
    decays: Initial β of the momenta and of the factored second moments.
    second_moment_decay: Initial β of v.
    step_multiplier: λ₁.
    exp_multiplier: λ₂.
    epsilon: ε, below which mean squares are not normalised away.
    gradient_scale: By which gradients are multiplied first. Nothing depends on it but for ε and the small constants,
      which are the authors' and large for gradients of the size of 1e-3: those look like converged tasks' then.
    time_scales: τ. Those beyond the runs of meta-training go on changing in longer runs, as never seen.
    zero_output: Whether the last layer begins at zero, and with it the updates: for learned directions.

  Raises:
    ValueError: For no hidden layer, a width below 1, no decay, a decay outside of 0 ≤ β < 1, ε ≤ 0, or a scale that
      is not above 0 and finite.
  """
  checks.require(
    len(hidden_sizes) > 0 and min(hidden_sizes) >= 1, "hidden_sizes", hidden_sizes, "one or more widths of at least 1"
  )
  checks.require(
    len(decays) > 0 and all(0 <= beta < 1 for beta in decays), "decays", decays, "one or more, from 0 to below 1"
  )
  checks.require(0 <= second_moment_decay < 1, "second_moment_decay", second_moment_decay, "from 0 to below 1")
  checks.require(epsilon > 0, "epsilon", epsilon, "above 0")
  checks.require(0 < gradient_scale < math.inf, "gradient_scale", gradient_scale, "above 0 and finite")
  k = len(decays)
  # Inputs in the order of their rows in the first layer's weights, and those that differ from parameter to parameter.
  sizes = {"g": 1, "p": 1, "m": k, "v": 1, "m_v": k, "v_rsqrt": 1, "g_factored": k, "row": k, "column": k}
  sizes |= {"row_rsqrt": k, "column_rsqrt": k, "m_factored": k, "time": len(time_scales)}
  elementwise = ("g", "p", "m", "v", "m_v", "v_rsqrt", "g_factored", "m_factored")

  def layers() -> list[tuple[Float[Array, "fan_in size"], Float[Array, " size"]]]:
    fan_ins = (sum(sizes.values()), *hidden_sizes)
    initial = [hk.initializers.TruncatedNormal(1 / math.sqrt(fan_in)) for fan_in in fan_ins]
    initial[-1] = jnp.zeros if zero_output else initial[-1]
    return [
      (
        hk.get_parameter(f"w{i}", (fan_in, size), init=initial[i]),
        hk.get_parameter(f"b{i}", (size,), init=jnp.zeros),
      )
      for i, (fan_in, size) in enumerate(zip(fan_ins, (*hidden_sizes, 2), strict=True))
    ]

  net = hk.without_apply_rng(hk.transform(layers))

  def init(key: base.PRNGKey) -> base.Theta:
    sizes = {"momentum_decays": k, "rms_decays": 1, "adafactor_decays": k}
    return {**{name: jnp.zeros(size, jnp.float32) for name, size in sizes.items()}, "nn": net.init(key)}

  def transform(theta: base.Theta, num_steps: Any) -> optax.GradientTransformationExtraArgs:
    del num_steps
    # Gains are 1 - β, computed as such: in float32, 1 - 0.999 is wrong in the fifth digit.
    initial_gains = jnp.array([1 - beta for beta in decays], jnp.float32)
    momentum_gains = initial_gains * jnp.exp(10 * theta["momentum_decays"])
    second_gain = jnp.minimum((1 - second_moment_decay) * jnp.exp(10 * theta["rms_decays"][0]), 1.0)
    factored_gains = jnp.minimum(initial_gains * jnp.exp(10 * theta["adafactor_decays"]), 1.0)

    (first_w, first_b), *later_layers = net.apply(theta["nn"])
    w = dict(zip(sizes, jnp.split(first_w, np.cumsum(list(sizes.values()))[:-1]), strict=True))
    w_elementwise = jnp.concatenate([w[name] for name in elementwise])

    def init_fn(params):
      return AdafactorMLPState(
        count=jnp.zeros((), jnp.int32),
        momenta=jax.tree.map(lambda p: sharding.zeros_like(p, k), params),
        second_moment=jax.tree.map(sharding.zeros_like, params),
        factored=jax.tree.map(
          lambda p: tuple(
            sharding.zeros_like(p, k, averaged=axis) for axis in summaries.factored_axes(p.shape) or (None,)
          ),
          params,
        ),
      )

    def accumulate(average, x, gains):
      gains = gains.reshape(-1, *[1] * x.ndim)
      return (1 - gains) * average + gains * x[None]

    def weighted_side(x, w_x, w_rsqrt):
      """What a row's or a column's features add to the first layer: [width, ...], of size 1 along one axis."""
      features = jnp.concatenate([x, jax.lax.rsqrt(x + 1e-8)])
      rms = jnp.sqrt(_mean(jnp.square(features)) + epsilon)
      return jnp.tensordot(jnp.concatenate([w_x, w_rsqrt]) / rms[:, None], features, (0, 0))

    def step(g, p, m, v, factored, *, bias):
      """Δp of one tensor.

      Normalisation is folded into the first layer's weights, time into its bias; rows and columns are added to it as
      such. Nothing of the size of the tensor is stored but v^-½ and the squares, which the mean squares need.
      """
      if len(factored) == 1:
        (second,) = factored
        factors_g, factors_m = [jax.lax.rsqrt(second + 1e-9)], [jax.lax.rsqrt(second + 1e-6)]
        side = weighted_side(second, w["row"] + w["column"], w["row_rsqrt"] + w["column_rsqrt"])
      else:
        row, column = factored
        # `row` has size 1 along the largest axis, so its mean along both axes is that along the second largest.
        mean_row = jnp.mean(row, axis=[1 + axis for axis in summaries.factored_axes(g.shape)], keepdims=True)
        relative_row = row / (mean_row + 1e-9)
        factors_g = factors_m = [jax.lax.rsqrt(jnp.maximum(x, 1e-9)) for x in (relative_row, column)]
        side = weighted_side(row, w["row"], w["row_rsqrt"]) + weighted_side(column, w["column"], w["column_rsqrt"])
      v_rsqrt = jax.lax.rsqrt(v + 1e-6)
      mean_squares = [_mean(jnp.square(x)) for x in (g[None], p[None], m, v[None], m * v_rsqrt[None], v_rsqrt[None])]
      mean_squares += [_mean_square(g[None], factors_g), _mean_square(m, factors_m)]
      # In the order of `elementwise`.
      features = [g, p, *m, v, *[x * v_rsqrt for x in m], v_rsqrt]
      features += [g * math.prod(factors) for factors in zip(*factors_g, strict=True)]
      features += [x * math.prod(factors) for x, *factors in zip(m, *factors_m, strict=True)]
      normalized_w = w_elementwise / jnp.sqrt(jnp.concatenate(mean_squares) + epsilon)[:, None]
      hidden = _dense(normalized_w, features, list(map(operator.add, side, bias)))
      for w_layer, b_layer in later_layers:
        hidden = _dense(w_layer, [jax.nn.relu(h) for h in hidden], list(b_layer))
      direction, magnitude = hidden
      return -step_multiplier * direction * jnp.exp(exp_multiplier * magnitude)

    def update_fn(updates, state, params=None, **extra_args):
      del extra_args
      if params is None:
        raise ValueError("the Adafactor MLP optimizer needs the parameters: call update(gradients, state, params)")
      updates = jax.tree.map(lambda g: gradient_scale * g, updates)
      time = jnp.tanh(state.count / jnp.array(time_scales, jnp.float32) - 1.0)
      bias = time @ w["time"] + first_b
      momenta = jax.tree.map(lambda g, m: accumulate(m, g, momentum_gains), updates, state.momenta)
      second_moment = jax.tree.map(
        lambda g, v: (1 - second_gain) * v + second_gain * jnp.square(g), updates, state.second_moment
      )
      factored = jax.tree.map(
        lambda g, averages: tuple(
          accumulate(average, x, factored_gains)
          for average, x in zip(averages, summaries.mean_squares(g), strict=True)
        ),
        updates,
        state.factored,
      )
      steps = jax.tree.map(functools.partial(step, bias=bias), updates, params, momenta, second_moment, factored)
      return steps, AdafactorMLPState(state.count + 1, momenta, second_moment, factored)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)

  return base.LearnedOptimizer(init, transform)
