"""Learned directions: where to go is learned; how far is an ordinary learning rate, and the user's.

The update of a network is added to the direction of Nesterov Adam, and matrices are orthogonalised as in Muon (Jordan
et al. 2024, kellerjordan.github.io/posts/muon). That small networks learn directions which carry over to large models
once the step size is left to the user is the finding of Celo2 (arXiv:2602.19142); here the network is a residual on a
good hand-made direction, and it may be any architecture.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from lopt import base, checks
from lopt.architectures import origin, sharding

BETAS = (0.9, 0.99)  # of Nesterov Adam
SCALE_DECAY = 0.99
"""Of the moving average that gradients are divided by, tensor by tensor."""
FEW_INPUTS, SHORT_RUN = 20, 200
FEW_MATRICES, MANY_MATRICES = 2, 6
"""Learning rates are recommended as they were found for networks of many matrices, of few inputs, in short runs; less
for wider networks and longer runs, more for fewer matrices, down to two."""
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Muon's coefficients: five steps take every singular value from 0.01 to 1 to somewhere in 0.7 to 1.2."""


class Matrices(NamedTuple):
  """Which tensors are matrices, for orthogonalisation: those with two axes or more, but for what is said here."""

  elementwise: tuple[str, ...] | None = None
  """Parts of the names of tensors that are none; None: the direction's own. A name is a tensor's path in the
  parameters, joined by `/`."""
  input_axes: Mapping[str, int] = MappingProxyType({})
  """For parts of names, how many of a tensor's axes are the rows, from the first on; else all but the last are."""

  def sides(self, name: str, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Rows and columns; None of what is no matrix."""
    if len(shape) < 2 or any(part in name for part in self.elementwise or ()):
      return None
    rows = next((axes for part, axes in self.input_axes.items() if part in name), len(shape) - 1)
    return math.prod(shape[:rows]), math.prod(shape[rows:])


USUAL = Matrices()


class DirectionState(NamedTuple):
  """What a direction remembers of an inner run, beside what its network does: two numbers for each parameter."""

  count: Int[Array, ""]  # inner steps taken
  mean_size: base.PyTree  # of each tensor's |gradients|: moving average from zero, one number for each tensor
  adam: Any  # optax.ScaleByAdamState, of gradients in the unit of their tensor
  network: base.State


@origin.remembered
def wrap(
  optimizer: base.LearnedOptimizer,
  *,
  learning_rate: float = 1e-2,
  warmup: float = 0.05,
  strength: float = 1.0,
  elementwise: tuple[str, ...] = (),
) -> base.LearnedOptimizer:
  """A direction u of unit size for each tensor, with n the optimizer's update and d that of Nesterov Adam, uphill.

      v = d / rms(d) - c n
      u = orthogonalise(v) / rms(orthogonalise(v))     of tensors with two axes or more
      u = v / rms(v)                                   of vectors and scalars, and where `elementwise` says so
      Δp = -α_t u                                      α_t: the recommended rate, warmed up, and a cosine down to zero

  rms(x) = √(mean x²) over the tensor. Kernels of convolutions are matrices of [height · width · in, out]. Where
  n = 0, as for θ = 0, this is Nesterov Adam, orthogonalised.

  Nothing depends on the scale of a tensor's gradients, whatever it is: they are divided by a moving average of their
  mean |g| before Adam and the network see them. A tensor whose newest gradient is zero stays where it is: one that
  the loss does not depend on, or not in this step. A gradient with NaN makes all later directions of its tensor NaN,
  as with Adam; `optax.apply_if_finite` skips such steps.

  Args:
    optimizer: Any architecture. Its updates of the first θ should be zero or small: `zero_output`.
    learning_rate: About the root mean square of a step of each parameter: recommended for six narrow matrices. What
      is recommended for others, and what meta-training is done at, is `recommended_share` times this.
    warmup: Share of the steps in which α_t rises to α.
    strength: c.
    elementwise: Parts of the names of tensors that are not orthogonalised, such as "embed": see `Matrices`.

  Returns:
    The optimizer, with u as its `direction`.

  Raises:
    ValueError: For a value out of range; the message starts with its name.
  """
  checks.require(0 < learning_rate < math.inf, "learning_rate", learning_rate, "above 0 and finite")
  checks.require(0 <= warmup < 1, "warmup", warmup, "from 0 to below 1")
  checks.require(0 <= strength < math.inf, "strength", strength, "at least 0 and finite")

  def usual(matrices: Matrices) -> Matrices:
    return matrices._replace(elementwise=elementwise) if matrices.elementwise is None else matrices

  def direction(
    theta: base.Theta, num_steps: Any, matrices: Matrices = USUAL
  ) -> optax.GradientTransformationExtraArgs:
    return _direction(optimizer.transform(theta, num_steps), strength, usual(matrices))

  def schedule(learning_rate: Any, num_steps: Any) -> optax.Schedule:
    factor = warmup_cosine(num_steps, warmup)
    return lambda count: learning_rate * factor(count)

  def recommended(params: base.Params, num_steps: Any, matrices: Matrices = USUAL) -> base.Scalar:
    return learning_rate * recommended_share(params, num_steps, usual(matrices))

  def transform(theta: base.Theta, num_steps: Any) -> optax.GradientTransformationExtraArgs:
    uphill = direction(theta, num_steps)

    def update_fn(updates, state, params=None, **extra_args):
      u, new_state = uphill.update(updates, state, params, **extra_args)
      step = jnp.asarray(schedule(recommended(params, num_steps), num_steps)(state.count))
      return jax.tree.map(lambda u: -step * u, u), new_state

    return optax.GradientTransformationExtraArgs(uphill.init, update_fn)

  return base.LearnedOptimizer(optimizer.init, transform, direction, schedule, recommended, learning_rate)


def warmup_cosine(num_steps: Any, warmup: float) -> optax.Schedule:
  """The factor min(1, (t + 1) / (w T)) ½ (1 + cos(π t / T)) of step t = 0, 1, … < T = `num_steps`; later 0.

  T may be an array, as in meta-training, which Optax's schedules do not take.
  """

  def factor(count: Any) -> base.Scalar:
    rise = jnp.minimum(1.0, (count + 1) / jnp.maximum(warmup * num_steps, 1.0))
    return rise * 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(count / num_steps, 1.0)))

  return factor


def recommended_share(params: base.Params, num_steps: Any, matrices: Matrices = USUAL) -> Any:
  """The factor of the recommended learning rate that is recommended for such parameters and as many steps.

      6 / L · min(1, √(20 / n)) · min(1, (200 / T)^(1/3))

  L is the number of matrices, at least 2 and at most 6, and n the mean of their rows (the inputs of a unit), in the
  logarithm and weighted by the matrices' sizes. A step of n entries of size 1 changes what a unit gives by up to √n
  times the norm of its inputs, and the changes of layers add up. The exponents, and that all hold, are measured:
  `experiments/notes/directions.md`.
  """
  leaves = jax.tree_util.tree_leaves_with_path(params)
  all_sides = [matrices.sides(base.name_of(path), jnp.shape(x)) for path, x in leaves]
  sides = [pair for pair in all_sides if pair and math.prod(pair) > 0]
  total = sum(rows * columns for rows, columns in sides)
  log_inputs = sum(rows * columns * math.log(rows) for rows, columns in sides) / max(total, 1)
  narrower = min(1.0, math.sqrt(FEW_INPUTS / math.exp(log_inputs)))
  number = min(max(len(sides) or MANY_MATRICES, FEW_MATRICES), MANY_MATRICES)
  return MANY_MATRICES / number * narrower * jnp.minimum(1.0, (SHORT_RUN / num_steps) ** (1 / 3))


def _direction(
  network: optax.GradientTransformationExtraArgs, strength: float, matrices: Matrices
) -> optax.GradientTransformationExtraArgs:
  b1, b2 = BETAS
  # The ε under the root, far below the other: derivatives are finite where gradients are zero (backpropagation).
  adam = optax.scale_by_adam(b1, b2, eps=1e-8, eps_root=1e-20, nesterov=True)

  def init_fn(params):
    mean_size = jax.tree.map(lambda p: jnp.zeros((), jnp.float32), params)
    mu, nu = (jax.tree.map(sharding.zeros_like, params) for _ in range(2))
    moments = optax.ScaleByAdamState(jnp.zeros((), jnp.int32), mu, nu)
    return DirectionState(jnp.zeros((), jnp.int32), mean_size, moments, network.init(params))

  def update_fn(updates, state, params=None, **extra_args):
    count = state.count + 1
    # Each divided on its own, so that the sum is finite where they are.
    size = jax.tree.map(lambda g: jnp.sum(jnp.abs(g) / max(g.size, 1)), updates)
    mean_size = jax.tree.map(lambda mean, new: SCALE_DECAY * mean + (1 - SCALE_DECAY) * new, state.mean_size, size)
    # Moments are kept in the unit of the newest gradient, so that Adam is Adam whatever the unit does.
    unit, last_unit = _unbiased(mean_size, count), _unbiased(state.mean_size, state.count)
    change = jax.tree.map(
      lambda mean, last, new: jnp.where(mean == 0, 0.0, last / new), state.mean_size, last_unit, unit
    )
    moments = state.adam._replace(
      mu=jax.tree.map(jnp.multiply, state.adam.mu, change),
      nu=jax.tree.map(lambda x, c: x * jnp.square(c), state.adam.nu, change),
    )
    gradients = jax.tree.map(jnp.divide, updates, unit)
    d, adam_state = adam.update(gradients, moments, params)
    n, network_state = network.update(gradients, state.network, params, **extra_args)

    def unit_direction(path, d, n, size):
      v = _unit(d) - strength * n
      sides = matrices.sides(base.name_of(path), v.shape)
      u = _unit(v) if sides is None else _unit(orthogonalise(v.reshape(sides)).reshape(v.shape))
      return jnp.where(size == 0, 0.0, u)

    directions = jax.tree_util.tree_map_with_path(unit_direction, d, n, size)
    return directions, DirectionState(count, mean_size, adam_state, network_state)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def orthogonalise(x: Float[Array, "rows columns"]) -> Float[Array, "rows columns"]:
  """The matrix with its singular values replaced by some between 0.7 and 1.2, by Newton-Schulz steps.

  From X / ‖X‖, five times X ← a X + (b X Xᵀ + c (X Xᵀ)²) X; a zero matrix stays zero. Of parameters spread over
  devices, a device may have to hold a whole matrix, one at a time: there alone they are gathered.
  """
  if 0 in x.shape:
    return x
  rows, columns = x.shape
  x = x.T if rows > columns else x
  x = _unit(x) / math.sqrt(x.size)
  a, b, c = NEWTON_SCHULZ

  def step(_, x):
    gram = x @ x.T
    return a * x + (b * gram + c * (gram @ gram)) @ x

  x = jax.lax.fori_loop(0, 5, step, x)  # a loop is compiled once
  return x.T if rows > columns else x


def _unbiased(mean_size: base.PyTree, count: Int[Array, ""]) -> base.PyTree:
  """Averages corrected for having begun at zero; 1 for tensors that have had no gradient yet."""
  weight = 1 - jnp.float32(SCALE_DECAY) ** count
  return jax.tree.map(lambda mean: jnp.where(mean == 0, 1.0, mean / jnp.where(count == 0, 1.0, weight)), mean_size)


def _unit(x: Array) -> Array:
  """The tensor with a root mean square of 1; a zero tensor stays zero."""
  square = jnp.sum(jnp.square(x))
  return x * math.sqrt(x.size) * jax.lax.rsqrt(jnp.where(square == 0, 1.0, square))
