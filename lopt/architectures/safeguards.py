"""Safeguards for learned optimizers: what bounds steps and scales them with width, decays weights, mixes in Adam.

Each is an Optax transformation of updates, which composes with others under `optax.chain`, and `wrap` puts those that
are chosen around any architecture. None of them repairs an update that is not finite: what comes out is not finite
either, so that a run that has diverged is seen, and counted, as one.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lopt import base, checks
from lopt.architectures import origin


class MixState(NamedTuple):
  """The states of both optimizers of `mix_with_adam`."""

  learned: base.State
  adam: base.State


@origin.remembered
def wrap(
  optimizer: base.LearnedOptimizer,
  *,
  adam_mix: float | None = None,
  adam_learning_rate: float = 1e-3,
  adam_graft: bool = False,
  base_width: int | None = None,
  width_power: float = 1.0,
  input_layers: tuple[str, ...] = (),
  trust_ratio: float | None = None,
  trust_floor: float = 1e-3,
  global_norm: float | None = None,
  weight_decay: float | None = None,
) -> base.LearnedOptimizer:
  """The optimizer with those safeguards that are not None; without any, the optimizer itself.

  They follow each other in the order of the arguments: limits after all that can make a step longer, and decay last,
  which is no step of the optimizer and not to be limited. θ and its initialisation are the optimizer's own.

  Args:
    optimizer: Any architecture.
    adam_mix: Share of Adam in each step, 0 to 1: `mix_with_adam`. This share is not sized by `step_sizes`.
    adam_learning_rate: Adam's.
    adam_graft: Whether each tensor's learned update gets the norm of Adam's before they are mixed.
    base_width: Fan-in at which steps keep their size: `scale_with_width`.
    width_power: The power of the fan-in with which they shrink.
    input_layers: Beginnings of the names of tensors to which that does not apply.
    trust_ratio: Largest norm of a tensor's step, relative to the tensor's: `limit_trust_ratio`.
    trust_floor: The norm that tensors of smaller norm count as.
    global_norm: Largest norm of the whole step: `limit_global_norm`.
    weight_decay: Share of the parameters that each step takes away: `decay_weights`.

  Raises:
    ValueError: For a value out of range; the message starts with its name.
  """
  _check_mix(0.0 if adam_mix is None else adam_mix, adam_learning_rate)
  after = []
  if base_width is not None:
    after.append(scale_with_width(base_width, width_power, input_layers))
  if trust_ratio is not None:
    after.append(limit_trust_ratio(trust_ratio, trust_floor))
  if global_norm is not None:
    after.append(limit_global_norm(global_norm))
  if weight_decay is not None:
    after.append(decay_weights(weight_decay))
  if adam_mix is None and not after:
    return optimizer

  def transform(theta, num_steps):
    tx = optimizer.transform(theta, num_steps)
    if adam_mix is not None:
      tx = mix_with_adam(tx, adam_mix, adam_learning_rate, adam_graft)
    return optax.chain(tx, *after)

  return base.LearnedOptimizer(optimizer.init, transform)


def limit_global_norm(global_norm: float) -> optax.GradientTransformationExtraArgs:
  """Shortens the update u to ‖u‖ ≤ `global_norm`, the norm taken over all tensors.

  `optax.clip_by_global_norm` makes a zero of updates whose squares overflow, so that a diverging run looks like one
  that stands still; here these are limited like others, and NaN if they are not finite.

  Raises:
    ValueError: `global_norm` is not above 0 and finite.
  """
  checks.require(0 < global_norm < math.inf, "global_norm", global_norm, "above 0 and finite")

  def limit(updates: base.Params, params: base.Params | None) -> base.Params:
    del params
    return optax.tree.scale(_shrink(_norm(updates), global_norm), updates)

  return _stateless(limit)


def limit_trust_ratio(trust_ratio: float, trust_floor: float = 1e-3) -> optax.GradientTransformationExtraArgs:
  """Shortens each tensor's update u to ‖u‖ ≤ r max(‖p‖, floor), with p the tensor's parameters.

  A limit in the form of adaptive gradient clipping (Brock et al. 2021, arXiv:2102.06171), on whole tensors; unlike
  LARS and LAMB (`optax.scale_by_trust_ratio`) it leaves shorter updates as they are.

  Args:
    trust_ratio: r.
    trust_floor: Lets tensors grow that start at zero.

  Raises:
    ValueError: A value is not above 0 and finite; by `update`, without parameters.
  """
  checks.require(0 < trust_ratio < math.inf, "trust_ratio", trust_ratio, "above 0 and finite")
  checks.require(0 < trust_floor < math.inf, "trust_floor", trust_floor, "above 0 and finite")

  def limit(updates: base.Params, params: base.Params | None) -> base.Params:
    if params is None:
      raise ValueError("the trust ratio needs the parameters: call update(gradients, state, params)")
    return jax.tree.map(
      lambda u, p: u * _shrink(_norm(u), trust_ratio * jnp.maximum(_norm(p), trust_floor)), updates, params
    )

  return _stateless(limit)


def decay_weights(weight_decay: float) -> optax.GradientTransformationExtraArgs:
  """Decoupled weight decay, p ← (1 - w) p + u (Loshchilov and Hutter 2019), of all tensors.

  A learned optimizer has no learning rate to multiply w by: w is the share that one step takes away. AdamW with
  learning rate α and decay λ has w = α λ. For some tensors only, see `optax.masked`.

  Raises:
    ValueError: `weight_decay` is not from 0 to below 1; by `update`, without parameters.
  """
  checks.require(0 <= weight_decay < 1, "weight_decay", weight_decay, "from 0 to below 1")
  return optax.with_extra_args_support(optax.add_decayed_weights(-weight_decay))


def mix_with_adam(
  learned: optax.GradientTransformation, adam_mix: float, adam_learning_rate: float = 1e-3, adam_graft: bool = False
) -> optax.GradientTransformationExtraArgs:
  """(1 - m) u + m a, with u the learned update and a that of Adam with Optax's other defaults.

  With grafting (Agarwal et al. 2020, arXiv:2002.11803) u is replaced by u ‖a‖ / ‖u‖, tensor by tensor: direction from
  the learned optimizer, size from Adam.

  Args:
    learned: Where u comes from; sees the same gradients as Adam. It stands first in a chain.
    adam_mix: m.
    adam_learning_rate: Adam's.
    adam_graft: Whether to graft. A tensor's learned update of zero stays zero.

  Raises:
    ValueError: m is not from 0 to 1, or the learning rate not above 0 and finite.
  """
  _check_mix(adam_mix, adam_learning_rate)
  learned = optax.with_extra_args_support(learned)
  adam = optax.adam(adam_learning_rate)

  def init_fn(params):
    return MixState(learned.init(params), adam.init(params))

  def update_fn(updates, state, params=None, **extra_args):
    u, learned_state = learned.update(updates, state.learned, params, **extra_args)
    a, adam_state = adam.update(updates, state.adam, params)
    if adam_graft:
      u = jax.tree.map(_with_norm_of, u, a)
    mixed = jax.tree.map(lambda u, a: (1 - adam_mix) * u + adam_mix * a, u, a)
    return mixed, MixState(learned_state, adam_state)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def scale_with_width(
  base_width: int, width_power: float = 1.0, input_layers: tuple[str, ...] = ()
) -> optax.GradientTransformationExtraArgs:
  """Multiplies the update of each matrix by (base_width / fan-in)^power, so that step sizes transfer between widths.

  The rule of µP for Adam (Yang et al. 2022, "Tensor Programs V", arXiv:2203.03466, table 3): learning rates are
  ∝ 1/fan-in for hidden and output weights, and constant for input weights and biases. Fan-in is the axis before the
  last, as in Haiku's linear and convolutional layers, whose kernel sizes do not change with the width; tensors of
  fewer than two axes (biases, gains) are left alone. µP's other half, smaller initial output weights, is the model's
  business.

  Args:
    base_width: The fan-in for which the factor is 1: the width that step sizes were meta-trained or tuned for.
    width_power: 1 for optimizers like Adam, whose updates have entries of a size that does not depend on the width.
      0.5 for those with steps relative to the size of the parameters (`celo`, `hierarchical_rnn`), since initial
      weights ∝ 1/√fan-in are half of the rule.
    input_layers: Tensors that are left alone because their fan-in is no width (first layers, embeddings), by the
      beginnings of their names: their paths in the parameters, joined by `/`, such as `mlp/~/linear_0`.

  Raises:
    ValueError: `base_width` is below 1, or `width_power` not finite and at least 0.
  """
  checks.require(base_width >= 1, "base_width", base_width, "at least 1")
  checks.require(0 <= width_power < math.inf, "width_power", width_power, "at least 0")

  def scale(path, u):
    name = base.name_of(path)
    if u.ndim < 2 or name.startswith(tuple(input_layers)):
      return u
    return u * (base_width / u.shape[-2]) ** width_power

  return _stateless(lambda updates, params: jax.tree_util.tree_map_with_path(scale, updates))


def _check_mix(adam_mix: float, adam_learning_rate: float) -> None:
  checks.require(0 <= adam_mix <= 1, "adam_mix", adam_mix, "from 0 to 1")
  checks.require(0 < adam_learning_rate < math.inf, "adam_learning_rate", adam_learning_rate, "above 0 and finite")


def _stateless(function) -> optax.GradientTransformationExtraArgs:
  return optax.with_extra_args_support(optax.stateless(function))


def _norm(tree: base.PyTree) -> base.Scalar:
  """The Euclidean norm over all tensors, also where squares overflow or vanish; NaN if an entry is not finite."""
  peak = jnp.max(jnp.stack([jnp.max(jnp.abs(x)) for x in jax.tree.leaves(tree)]))
  unit = jnp.where(peak == 0, 1.0, peak)
  squares = sum(jnp.sum(jnp.square(x / unit)) for x in jax.tree.leaves(tree))
  return peak * jnp.sqrt(jnp.where(peak == 0, 1.0, squares))  # the root's slope at 0 would be infinite


def _shrink(norm: base.Scalar, limit: base.Scalar | float) -> base.Scalar:
  """The factor, exactly 1 for norms within the limit."""
  return limit / jnp.maximum(norm, limit)


def _with_norm_of(u: jax.Array, a: jax.Array) -> jax.Array:
  norm = _norm(u)
  return u * (_norm(a) / jnp.where(norm == 0, 1.0, norm))
