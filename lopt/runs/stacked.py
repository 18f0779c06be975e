"""Networks whose layers are stacked, for `hk.layer_stack`, `flax.nnx.scan` or `jax.lax.scan` over layers."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lopt.architectures import sharding
from lopt.base import PyTree, name_of


def layer_by_layer(
  tx: optax.GradientTransformation, stacked: tuple[str, ...]
) -> optax.GradientTransformationExtraArgs:
  """`tx` as it would be if each layer of a stack were a tensor of its own.

  Layers are mapped over by `jax.vmap`, so that a stack of a hundred is compiled as one. All stacks of as many layers
  are one network to `tx`, and so are the other tensors.

  Args:
    tx: What takes each tensor by itself.
    stacked: Parts of the names of stacks: tensors whose first axis counts layers.

  Returns:
    The transformation; its state is a dictionary of those of `tx`, by the number of layers.
  """
  tx = optax.with_extra_args_support(tx)

  def init(params: PyTree) -> PyTree:
    with sharding.within_mesh(params):
      return {
        _key(size): jax.vmap(tx.init)(part) if size else tx.init(part)
        for size, part in _by_size(params, stacked).items()
      }

  def update(
    updates: PyTree, state: PyTree, params: PyTree | None = None, **extra_args: Any
  ) -> tuple[PyTree, PyTree]:
    def step(updates, state, params):
      return tx.update(updates, state, params, **extra_args)

    parts = _by_size(updates, stacked)
    if not parts:
      return updates, state
    params_of = dict.fromkeys(parts) if params is None else _by_size(params, stacked)
    results = {
      size: (jax.vmap(step) if size else step)(part, state[_key(size)], params_of[size])
      for size, part in parts.items()
    }
    columns = [jax.tree.leaves(updates, is_leaf=_is_none) for updates, _ in results.values()]
    leaves = [next((x for x in row if x is not None), None) for row in zip(*columns, strict=True)]
    structure = jax.tree.structure(updates, is_leaf=_is_none)
    return structure.unflatten(leaves), {_key(size): state for size, (_, state) in results.items()}

  return optax.GradientTransformationExtraArgs(init, update)


def unstacked(params: PyTree, stacked: tuple[str, ...]) -> PyTree:
  """The tree of the parameters' shapes, with a tuple of its layers in place of each stack."""

  def leaf(path: Any, x: Any) -> Any:
    shape = jnp.shape(x)
    if not _is_stack(path, shape, stacked):
      return jax.ShapeDtypeStruct(shape, jnp.float32)
    return (jax.ShapeDtypeStruct(shape[1:], jnp.float32),) * shape[0]

  return jax.tree_util.tree_map_with_path(leaf, params)


def _key(size: int) -> str:
  """In the state; a string, since checkpoints have no other keys."""
  return f"stacks_of_{size}" if size else "others"


def _by_size(tree: PyTree, stacked: tuple[str, ...]) -> dict[int, PyTree]:
  """For each number of layers, and 0 for what is no stack, the tree with None in place of all other tensors."""

  def size_of(path: Any, x: Any) -> int:
    return jnp.shape(x)[0] if _is_stack(path, jnp.shape(x), stacked) else 0

  sizes = jax.tree_util.tree_map_with_path(size_of, tree)
  return {
    size: jax.tree.map(lambda x, own, size=size: x if own == size else None, tree, sizes)
    for size in sorted(set(jax.tree.leaves(sizes)))
  }


def check_stacks(params: PyTree, stacked: tuple[str, ...]) -> None:
  """That all tensors that a part of a name stands for are stacks of as many layers.

  Raises:
    ValueError: They are not.
  """
  shapes = [(path, jnp.shape(x)) for path, x in jax.tree_util.tree_leaves_with_path(params)]
  for part in stacked:
    sizes = {shape[0]: name_of(path) for path, shape in shapes if _is_stack(path, shape, (part,))}
    if len(sizes) > 1:
      (one, first), (other, second) = list(sizes.items())[:2]
      raise ValueError(
        f"stacked: {part!r} is in the names of {first}, of {one} layers, and {second}, of {other}; "
        "give a part of a name for each number of layers"
      )


def _is_stack(path: Any, shape: tuple[int, ...], stacked: tuple[str, ...]) -> bool:
  return len(shape) > 0 and any(part in name_of(path) for part in stacked)


def _is_none(x: Any) -> bool:
  return x is None
