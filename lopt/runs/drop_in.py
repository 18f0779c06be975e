"""Trained optimizers in use: Optax transformations for whatever parameters practitioners have."""

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jaxtyping import Array

from lopt.architectures import sharding
from lopt.architectures.direction import Matrices
from lopt.base import LearnedOptimizer, PyTree, Theta, name_of
from lopt.runs.stacked import check_stacks, layer_by_layer, unstacked

LARGEST_GRADIENT, LARGEST_OF_DIRECTIONS = 1e12, 1e36
"""Up to the first, powers and products in features are finite in float32; up to the second the averages of
directions, which divide gradients by their scale."""


class TrainedOptimizer(NamedTuple):
  """A learned optimizer with its θ: `optimizer(num_steps=10_000)` is an Optax transformation.

  What comes of it is used as `tx.update(grads, state, params, value=loss)`, and computes in float32 whatever the
  parameters' precision, which updates have. Parameters may be spread over devices: updates are laid out as they are,
  and states as the parameter that they belong to. Leaves of integers, of complex numbers and with gradients of
  `float0` are refused by name; arrays without elements stay as they are.

  A gradient with a NaN or an infinity makes the updates of its tensor NaN, with some architectures those of all, and
  they stay so, as averages of gradients do. `optax.apply_if_finite(tx, 10)` skips such steps, up to ten in a row.
  Finite gradients, as large or small as float32 has them, give finite updates.
  """

  theta: Theta
  """The trained meta-parameters."""
  architecture: LearnedOptimizer
  """What they are the meta-parameters of."""
  config: dict[str, Any]
  """The configuration of the run that trained them."""

  def __repr__(self) -> str:
    name = self.config.get("architecture", {}).get("name", "of one's own")
    size = sum(x.size for x in jax.tree.leaves(self.theta))
    return f"TrainedOptimizer({name}, {size:,} meta-parameters, learning_rate={self.learning_rate})"

  @property
  def learning_rate(self) -> float | None:
    """The recommended one, for networks of six matrices or more with up to 20 rows, and up to 200 steps; None of an
    optimizer that takes no learning rate, since it decides on steps by itself.
    """
    return self.architecture.learning_rate

  def __call__(
    self,
    num_steps: Any = None,
    *,
    learning_rate: optax.ScalarOrSchedule | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any | Callable[[PyTree], Any] | None = None,
    elementwise: Sequence[str] | None = None,
    input_axes: Mapping[str, int] | None = None,
    stacked: Sequence[str] = (),
    state_dtype: Any = "float32",
  ) -> optax.GradientTransformationExtraArgs:
    """Δp = -α_t (u + λ p) for a run of `num_steps` steps, with the direction u.

    Args:
      num_steps: Length of the run; may be traced. Without `learning_rate`, α_t is the recommended rate for networks
        of this size and as many steps (`direction.recommended_share`), warmed up and decayed to zero by a cosine.
      learning_rate: α_t: a number, or an Optax schedule of the step. It needs no `num_steps`.
      weight_decay: λ, decoupled, per unit of the learning rate; as in `optax.adamw`. May be traced, or a schedule.
      mask: What λ applies to, as in `optax.adamw`.
      elementwise: Parts of the names of tensors that are not orthogonalised, such as `("embed",)`; a name is a
        tensor's path in the parameters, joined by `/`. None: as in meta-training; what ships orthogonalises all
        tensors with two axes or more.
      input_axes: For parts of names, how many of a tensor's axes are inputs, from the first on; the others are
        outputs. `{"query": 1, "key": 1, "value": 1}` for attention with kernels of [inputs, heads, size]. Of other
        tensors all axes but the last are inputs.
      stacked: Parts of the names of tensors whose first axis counts layers (`hk.layer_stack`, `nnx.scan`, a
        `jax.lax.scan` over layers). Each layer then is a tensor of its own, and what stands above is of its axes.
      state_dtype: What the state's arrays are rounded to between steps: float32, or bfloat16, for half the memory.

    Raises:
      ValueError: `num_steps` is below 1; `state_dtype` is neither of the two; neither `num_steps` nor a learning rate
        is given; no tensor has one of the names, once there are parameters; or an optimizer that decides on its steps
        by itself is given a learning rate, weight decay or names.
    """
    _check_count(num_steps)
    _check_rate("learning_rate", learning_rate)
    _check_rate("weight_decay", weight_decay)
    if self.learning_rate is None:
      # A traced one may be the zero of `optax.inject_hyperparams`.
      decay = None if isinstance(weight_decay, Tracer) or _is_zero(weight_decay) else weight_decay
      given = {"learning_rate": learning_rate, "weight_decay": decay, "elementwise": elementwise}
      given |= {"input_axes": input_axes or None, "stacked": stacked or None}
      if refused := [name for name, value in given.items() if value is not None]:
        raise ValueError(f"{refused[0]}: {_NO_DIRECTION}")
      if num_steps is None:
        raise ValueError("num_steps: this optimizer needs the number of training steps: optimizer(num_steps=...)")
      return wrap(self.architecture.transform, self.theta, num_steps, bounded=_scaled_down, state_dtype=state_dtype)
    if learning_rate is None and num_steps is None:
      raise ValueError("num_steps: give it, for the recommended learning rates, or a learning_rate")
    layout = _layout(elementwise, input_axes, stacked)
    tx = self._direction(num_steps, layout, state_dtype)
    sized = (
      self._by_width(num_steps, layout) if learning_rate is None else optax.scale_by_learning_rate(learning_rate)
    )
    decay = optax.identity() if _is_zero(weight_decay) else optax.add_decayed_weights(weight_decay, mask)
    return optax.chain(tx, decay, sized)

  def direction(
    self,
    num_steps: Any = None,
    *,
    elementwise: Sequence[str] | None = None,
    input_axes: Mapping[str, int] | None = None,
    stacked: Sequence[str] = (),
    state_dtype: Any = "float32",
  ) -> optax.GradientTransformationExtraArgs:
    """The direction u alone, uphill as `optax.scale_by_adam`'s and of unit size, to be chained with what sizes steps.

    Args:
      num_steps: Length of the run, for architectures that use it.
      elementwise: As for a call of the optimizer, and likewise:
      input_axes: The rows of matrices.
      stacked: Which tensors are stacks of layers.
      state_dtype: Of the state's arrays.

    Raises:
      ValueError: `state_dtype` is neither float32 nor bfloat16, no tensor has one of the names, or the optimizer
        decides on its steps by itself.
    """
    _check_count(num_steps)
    return self._direction(num_steps, _layout(elementwise, input_axes, stacked), state_dtype)

  def schedule(
    self,
    num_steps: Any,
    params: PyTree | None = None,
    *,
    elementwise: Sequence[str] | None = None,
    input_axes: Mapping[str, int] | None = None,
    stacked: Sequence[str] = (),
  ) -> optax.Schedule:
    """The recommended learning rate at each of `num_steps` steps: warm-up, then a cosine to zero.

    Args:
      num_steps: Length of the run.
      params: Of the network, or arrays of their shapes; None: of one of six matrices of up to 20 rows. Only
        matrices that the optimizer is given count: not those of another group of `optax.partition`.
      elementwise: As for a call of the optimizer, and likewise:
      input_axes: The rows of matrices.
      stacked: Which tensors are stacks of layers.

    Raises:
      ValueError: `num_steps` is below 1, or the optimizer decides on its steps by itself.
    """
    _check_count(num_steps)
    layout = _layout(elementwise, input_axes, stacked)
    return self._schedule(num_steps, None if params is None else unstacked(params, layout.stacked), layout.matrices)

  def _direction(self, num_steps: Any, layout: "_Layout", state_dtype: Any) -> optax.GradientTransformationExtraArgs:
    build = self.architecture.direction
    if build is None:
      raise ValueError(f"direction: {_NO_DIRECTION}")
    build = functools.partial(build, matrices=layout.matrices)
    tx = wrap(build, self.theta, num_steps, bounded=_clipped, state_dtype=state_dtype)
    if layout.stacked:
      tx = layer_by_layer(tx, layout.stacked)

    def init(params: PyTree) -> PyTree:
      state = tx.init(params)  # refuses what has no shape
      _check_names(params, layout)
      return state

    return optax.GradientTransformationExtraArgs(init, tx.update)

  def _schedule(self, num_steps: Any, params: PyTree | None, matrices: Matrices) -> optax.Schedule:
    if self.architecture.schedule is None or self.architecture.recommended is None:
      raise ValueError(f"schedule: {_NO_DIRECTION}")
    return self.architecture.schedule(self.architecture.recommended(params, num_steps, matrices), num_steps)

  def _by_width(self, num_steps: Any, layout: "_Layout") -> optax.GradientTransformation:
    """`optax.scale_by_learning_rate` with the recommended rates for the tensors that it is given."""

    def update(updates: PyTree, state: PyTree, params: PyTree | None = None) -> tuple[PyTree, PyTree]:
      schedule = self._schedule(num_steps, unstacked(updates, layout.stacked), layout.matrices)
      return optax.scale_by_learning_rate(schedule).update(updates, state, params)

    return optax.GradientTransformation(optax.scale_by_learning_rate(self.schedule(num_steps)).init, update)


class _Layout(NamedTuple):
  """What a user says of tensors, by their names."""

  matrices: Matrices
  stacked: tuple[str, ...]


def _layout(
  elementwise: Sequence[str] | None, input_axes: Mapping[str, int] | None, stacked: Sequence[str] | None
) -> _Layout:
  if input_axes is not None and not isinstance(input_axes, Mapping):
    raise ValueError(f"input_axes: a dictionary of parts of names and numbers of axes, not {input_axes!r}")
  axes_of = dict(input_axes or {})
  _parts("input_axes", axes_of)
  for part, axes in axes_of.items():
    if isinstance(axes, bool) or not isinstance(axes, int) or axes < 1:
      raise ValueError(f"input_axes: {part!r} has {axes!r}, and must have a number of axes, at least 1")
  own = None if elementwise is None else _parts("elementwise", elementwise)
  return _Layout(Matrices(own, axes_of), () if stacked is None else _parts("stacked", stacked))


def _parts(option: str, parts: Any) -> tuple[str, ...]:
  if isinstance(parts, str):
    raise ValueError(f"{option}: a tuple of parts of names, such as ({parts!r},), not {parts!r}")
  if not isinstance(parts, Collection):
    raise ValueError(f"{option}: a tuple of parts of names, not {parts!r}")
  parts = tuple(parts)
  if not all(isinstance(part, str) for part in parts):
    raise ValueError(f"{option}: parts of names, such as 'embed', not {parts!r}")
  return parts


def _check_names(params: PyTree, layout: _Layout) -> None:
  """That every part is in a name, and input axes leave some for outputs."""
  check_stacks(params, layout.stacked)
  layers = unstacked(params, layout.stacked)
  axes_of = {name_of(path): len(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(layers)}
  all_names = [name_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  matrices = sorted(name for name, axes in axes_of.items() if axes >= 2)
  for option, parts, names, what in (
    ("elementwise", layout.matrices.elementwise or (), sorted(all_names), "tensor"),
    ("input_axes", tuple(layout.matrices.input_axes), matrices, "matrix"),
    ("stacked", layout.stacked, sorted(all_names), "tensor"),
  ):
    if missing := [part for part in parts if not any(part in name for name in names)]:
      there = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
      raise ValueError(f"{option}: {missing[0]!r} is in the name of no {what}; there are: {there or 'none'}")
  for part, rows in layout.matrices.input_axes.items():
    for name in matrices:
      if part in name and rows >= axes_of[name]:
        raise ValueError(f"input_axes: {part!r} has {rows}, but {name} has {axes_of[name]} axes: no output is left")


def _check_count(num_steps: Any) -> None:
  if num_steps is None or isinstance(num_steps, Tracer):
    return
  if not isinstance(num_steps, bool) and _is_number(num_steps) and 1 <= num_steps < math.inf:
    return
  if callable(num_steps):
    raise ValueError("num_steps: a function is no number of training steps; a schedule is given as learning_rate=...")
  hint = f"; did you mean learning_rate={num_steps!r}?" if isinstance(num_steps, float) and num_steps > 0 else ""
  raise ValueError(f"num_steps: {num_steps!r} is not a number of training steps; it must be at least 1{hint}")


def _check_rate(option: str, x: Any) -> None:
  if x is not None and not callable(x) and not _is_number(x):
    raise ValueError(f"{option}: a number or an Optax schedule, not {x!r}")


def _is_zero(weight_decay: Any) -> bool:
  """Whether it is known to be none: a schedule and a traced number are not."""
  if callable(weight_decay) or isinstance(weight_decay, Tracer):
    return False
  return weight_decay is None or bool(weight_decay == 0)


def _is_number(x: Any) -> bool:
  """Whether it is one number: of Python's, NumPy's, or JAX's, traced or not."""
  return isinstance(x, (int, float)) or (hasattr(x, "dtype") and jnp.ndim(x) == 0)


_NO_DIRECTION = (
  "this optimizer was trained to decide on the size of its steps, and takes neither learning rate nor weight decay; "
  "call it with num_steps=... alone, or load one with a direction"
)


def wrap(
  build: Callable[[Theta, Any], optax.GradientTransformationExtraArgs],
  theta: Theta,
  num_steps: Any,
  *,
  bounded: Callable[[Array], Array],
  state_dtype: Any = "float32",
) -> optax.GradientTransformationExtraArgs:
  """`build(theta, num_steps)` for parameters of any floating-point precision, size and layout.

  It computes in float32, and updates have the parameters' precision and layout. What it sees of the trees is what
  `_prepared` makes of them.

  Args:
    build: What an architecture has as `transform` or `direction`.
    theta: The meta-parameters.
    num_steps: Length of the run.
    bounded: Takes a tensor's gradients; returns them no larger than what `build` can compute with.
    state_dtype: Of the state's arrays between steps.

  Raises:
    ValueError: `state_dtype` is neither float32 nor bfloat16.
  """
  try:
    stored = None if state_dtype is None else jnp.dtype(state_dtype)
  except TypeError:
    stored = None
  if stored not in (jnp.float32, jnp.bfloat16):
    raise ValueError(f"state_dtype: must be float32 or bfloat16, not {stored or repr(state_dtype)}")

  def init(params: PyTree) -> PyTree:
    return _in_precision(build(theta, num_steps).init(_prepared(params, "parameters")), jnp.float32, stored)

  def compute(theta, num_steps, updates, state, params, extra_args):
    updates = jax.tree.map(bounded, updates)
    return build(theta, num_steps).update(updates, state, params, **extra_args)

  def update(
    updates: PyTree, state: PyTree, params: PyTree | None = None, **extra_args: Any
  ) -> tuple[PyTree, PyTree]:
    gradients = _prepared(updates, "gradients")
    prepared = None if params is None else _prepared(params, "parameters")
    like = updates if params is None else params
    if not jax.tree.leaves(gradients):
      return jax.tree.map(jnp.zeros_like, like), state
    state = _in_precision(state, stored, jnp.float32)
    out_like = (gradients if prepared is None else prepared, state)
    steps, state = sharding.automatically(compute, out_like, theta, num_steps, gradients, state, prepared, extra_args)
    steps = iter(jax.tree.leaves(steps))

    def finished(x: Any) -> Array:
      x = jnp.asarray(x)
      return next(steps).astype(x.dtype) if x.size else jnp.zeros_like(x)

    return jax.tree.map(finished, like), _in_precision(state, jnp.float32, stored)

  return optax.GradientTransformationExtraArgs(init, update)


def _prepared(tree: PyTree, what: str) -> PyTree:
  """The tree with leaves in float32, Python numbers as arrays, and None for arrays without elements.

  Raises:
    ValueError: A leaf is not of real floating-point numbers.
  """

  def leaf(path: Any, x: Any) -> Array | None:
    name = name_of(path) or "(the only one)"
    dtype = getattr(x, "dtype", None)
    if dtype is None and not isinstance(x, (bool, int, float, complex)):
      kind = type(x).__name__
    else:
      dtype = jnp.result_type(type(x)) if dtype is None else dtype
      if jnp.issubdtype(dtype, jnp.floating):
        return jnp.asarray(x, jnp.float32) if jnp.size(x) else None
      kind = "float0, of a parameter that is no floating-point number" if dtype == jax.dtypes.float0 else str(dtype)
    raise ValueError(
      f"{what}: the leaf {name} is {kind}, and only real floating-point numbers can be trained; leave it out of the "
      "tree, or wrap the optimizer in optax.masked"
    )

  return jax.tree_util.tree_map_with_path(leaf, tree)


def _in_precision(state: PyTree, of: Any, to: Any) -> PyTree:
  """The state with its arrays of one dtype in another; numbers, such as a tensor's scale, stay as they are."""
  return jax.tree.map(lambda x: x.astype(to) if x.ndim and x.dtype == of else x, state)


def _scaled_down(gradient: Array) -> Array:
  peak = jnp.max(jnp.abs(gradient))
  return gradient * jnp.where(peak > LARGEST_GRADIENT, LARGEST_GRADIENT / peak, 1.0)


def _clipped(gradient: Array) -> Array:
  """Element by element, which needs no pass of its own. Infinities stay, so that updates show them."""
  most = LARGEST_OF_DIRECTIONS
  return jnp.where(jnp.isinf(gradient), gradient, jnp.clip(gradient, -most, most))
