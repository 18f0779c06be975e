"""What makes an architecture's transformation one for whatever parameters practitioners have."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from lopt.architectures import sharding
from lopt.base import PyTree, Theta

LARGEST_GRADIENT = 1e12
"""Whose powers, sums and products in features are still finite in float32."""


def wrap(
  build: Callable[[Theta, Any], optax.GradientTransformationExtraArgs],
  theta: Theta,
  num_steps: Any,
  *,
  bounded: bool,
) -> optax.GradientTransformationExtraArgs:
  """`build(theta, num_steps)` for parameters of any floating-point precision, size and layout.

  It computes in float32, and updates have the parameters' precision and layout. What it sees of the trees is what
  `_prepared` makes of them.

  Args:
    build: What an architecture has as `transform` or `direction`.
    theta: The meta-parameters.
    num_steps: Length of the run.
    bounded: Whether gradients of a tensor with any beyond `LARGEST_GRADIENT` are scaled down to it: for architectures
      that do not divide them by their scale themselves.
  """

  def init(params: PyTree) -> PyTree:
    return build(theta, num_steps).init(_prepared(params, "parameters"))

  def compute(theta, num_steps, updates, state, params, extra_args):
    if bounded:
      updates = jax.tree.map(_bounded, updates)
    return build(theta, num_steps).update(updates, state, params, **extra_args)

  def update(
    updates: PyTree, state: PyTree, params: PyTree | None = None, **extra_args: Any
  ) -> tuple[PyTree, PyTree]:
    gradients = _prepared(updates, "gradients")
    prepared = None if params is None else _prepared(params, "parameters")
    like = updates if params is None else params
    if not jax.tree.leaves(gradients):
      return jax.tree.map(jnp.zeros_like, like), state
    out_like = (gradients if prepared is None else prepared, state)
    steps, state = sharding.automatically(compute, out_like, theta, num_steps, gradients, state, prepared, extra_args)
    steps = iter(jax.tree.leaves(steps))

    def finished(x: Any) -> Array:
      x = jnp.asarray(x)
      return next(steps).astype(x.dtype) if x.size else jnp.zeros_like(x)

    return jax.tree.map(finished, like), state

  return optax.GradientTransformationExtraArgs(init, update)


def _prepared(tree: PyTree, what: str) -> PyTree:
  """The tree with leaves in float32, Python numbers as arrays, and None for arrays without elements.

  Raises:
    ValueError: A leaf is not of real floating-point numbers.
  """

  def leaf(path: Any, x: Any) -> Array | None:
    name = jax.tree_util.keystr(path, simple=True, separator="/") or "(the only one)"
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


def _bounded(gradient: Array) -> Array:
  peak = jnp.max(jnp.abs(gradient))
  return gradient * jnp.where(peak > LARGEST_GRADIENT, LARGEST_GRADIENT / peak, 1.0)
