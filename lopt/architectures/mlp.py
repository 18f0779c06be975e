"""The per-parameter MLP optimizer.

L. Metz, N. Maheswaranathan, J. Nixon, C. D. Freeman, J. Sohl-Dickstein, "Understanding and correcting pathologies in
the training of learned optimizers", ICML 2019.
"""

import functools
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from lopt import base
from lopt.architectures import layers, origin, sharding

MOMENTUM_DECAYS = (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
TIME_SCALES = (1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)  # inner steps


class MLPState(NamedTuple):
  """What the optimizer remembers of an inner run."""

  count: Int[Array, ""]  # inner steps taken
  momenta: base.PyTree  # like the parameters, with the six decays on a leading axis


@origin.remembered
def build(
  *,
  hidden_sizes: tuple[int, ...] = (32, 32),
  step_multiplier: float = 1e-3,
  exp_multiplier: float = 1e-3,
  epsilon: float = 1e-12,
  time_scales: tuple[int, ...] = TIME_SCALES,
  zero_output: bool = False,
  fused: bool = False,
) -> base.LearnedOptimizer:
  """One small MLP, applied to every inner parameter on its own.

  For each parameter p with gradient g and momenta m_β ← β m_β + (1 - β) g, the inputs are (g, p, m_β for six β), each
  divided by its root mean square √(mean x² + ε) over the tensor, and tanh(t/τ - 1) of the step t at several time
  scales τ. From the network's two outputs d, a the update is

      Δp = -λ₁ d exp(λ₂ a).

  Args:
    hidden_sizes: Widths of the hidden layers; 19 inputs and two layers of 32 make 1,762 meta-parameters.
    step_multiplier: λ₁.
    exp_multiplier: λ₂.
    epsilon: ε, below which mean squares are not normalised away. The authors' code has 1e-5, with which tasks whose
      gradients are small look like converged ones.
    time_scales: τ. Those beyond the runs of meta-training go on changing in longer runs, as never seen.
    zero_output: Whether the last layer begins at zero, and with it the updates: for learned directions.

  Raises:
    ValueError: For no hidden layer, or a width below 1.
  """
  if not hidden_sizes or min(hidden_sizes) < 1:
    raise ValueError(f"hidden_sizes: needs one or more widths of at least 1, not {hidden_sizes}")

  net = hk.without_apply_rng(
    hk.transform(functools.partial(layers.mlp, sizes=(*hidden_sizes, 2), zero_output=zero_output, fused=fused))
  )

  def init(key: base.PRNGKey) -> base.Theta:
    return net.init(key, jnp.ones((8, 1)), jnp.ones(8), jnp.ones(len(time_scales)))

  def transform(theta: base.Theta, num_steps: Any) -> optax.GradientTransformationExtraArgs:
    del num_steps
    decays = jnp.array(MOMENTUM_DECAYS, jnp.float32)
    gains = jnp.array([1 - beta for beta in MOMENTUM_DECAYS], jnp.float32)  # 1 - float32(0.9999) is 0.02% wrong

    def init_fn(params):
      momenta = jax.tree.map(lambda p: sharding.zeros_like(p, len(MOMENTUM_DECAYS)), params)
      return MLPState(jnp.zeros((), jnp.int32), momenta)

    def update_fn(updates, state, params=None, **extra_args):
      del extra_args
      if params is None:
        raise ValueError("the MLP optimizer needs the parameters: call update(gradients, state, params)")
      time = jnp.tanh(state.count / jnp.array(time_scales, jnp.float32) - 1.0)

      def accumulate(m, g):
        leading = (-1, *[1] * g.ndim)
        return decays.reshape(leading) * m + gains.reshape(leading) * g[None]

      def update(g, p, m):
        features = (g[None], p[None], m)
        mean_squares = jnp.concatenate([jnp.mean(jnp.square(x), axis=range(1, x.ndim)) for x in features])
        direction, magnitude = net.apply(theta, features, jnp.sqrt(mean_squares + epsilon), time)
        return -step_multiplier * direction * jnp.exp(exp_multiplier * magnitude)

      momenta = jax.tree.map(accumulate, state.momenta, updates)
      return jax.tree.map(update, updates, params, momenta), MLPState(state.count + 1, momenta)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)

  return base.LearnedOptimizer(init, transform)
