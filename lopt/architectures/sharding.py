"""Parameters spread over devices: states are laid out as the parameter that they belong to, and nothing is gathered.

The arithmetic of an architecture is written without reshaping what has a parameter's size, so that the compiler can
divide it as the parameters are divided. Meshes with explicit axes, where every operation would have to say how its
result is laid out, become ones with automatic axes while an optimizer computes.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.experimental.shard_alike import shard_alike
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from lopt import base


def may_be_divided() -> bool:
  """Whether an array may have parts on several devices, here where a function is being traced.

  With automatic axes nothing says whether it does; with one device, or within `shard_map` and `pmap`, it does not.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return jax.device_count() > 1 and not (mesh.axis_names and mesh.are_all_axes_manual)


def zeros_like(x: Array, *leading: int, averaged: int | None = None) -> Array:
  """Zeros laid out as `x`, with further axes in front.

  Args:
    x: A parameter.
    *leading: Sizes of the further axes, which no device has a part of.
    averaged: An axis of `x` that has size 1 in the result.
  """
  shape = [*leading, *x.shape]
  if averaged is not None:
    shape[len(leading) + averaged] = 1
  sharding = jax.typeof(x).sharding if isinstance(x, Tracer) else getattr(x, "sharding", None)
  if isinstance(sharding, NamedSharding) and not _is_automatic(x):
    spec = [None] * len(leading) + [*sharding.spec] + [None] * (x.ndim - len(sharding.spec))
    if averaged is not None:
      spec[len(leading) + averaged] = None
    return jnp.zeros(shape, x.dtype, device=NamedSharding(sharding.mesh, PartitionSpec(*spec)))
  zeros = jnp.zeros(shape, x.dtype)
  if _is_automatic(x) and averaged is None and may_be_divided():
    zeros, _ = shard_alike(zeros, jax.lax.broadcast(x, leading))
  return zeros


def within_mesh(tree: base.PyTree) -> contextlib.AbstractContextManager[Any]:
  """A context in which the arrays' mesh of explicit axes is the current one: for `jax.vmap` outside of `jit`."""
  layouts = [x.sharding for x in jax.tree.leaves(tree) if isinstance(x, jax.Array) and not isinstance(x, Tracer)]
  meshes = [
    x.mesh for x in layouts if isinstance(x, NamedSharding) and isinstance(x.mesh, Mesh) and x.mesh.explicit_axes
  ]
  return jax.set_mesh(meshes[0]) if meshes else contextlib.nullcontext()


def _is_automatic(x: Array) -> bool:
  """Whether `x` is being traced without a type that says how it is laid out."""
  return isinstance(x, Tracer) and not jax.typeof(x).sharding.mesh.explicit_axes


def _alike(x: Any, like: Any) -> Any:
  """`x`, laid out as `like` where the compiler decides on that."""
  if isinstance(x, Tracer) and isinstance(like, Tracer) and jnp.ndim(x) and may_be_divided():
    return shard_alike(x, like)[0]
  return x


def automatically(function: Callable[..., Any], out_like: base.PyTree, *args: Any) -> Any:
  """`function(*args)` with automatic axes, and its results laid out as `out_like`.

  Args:
    function: of pytrees; all arrays that it uses are among its arguments.
    out_like: A pytree of arrays, as what it returns.
    *args: What it is called with; leaves that are no arrays reach it as they are.
  """
  leaves, structure = jax.tree.flatten(args)
  is_array = [isinstance(x, jax.Array) for x in leaves]
  meshes = [jax.typeof(x).sharding.mesh for x, is_one in zip(leaves, is_array, strict=True) if is_one]
  mesh = next((mesh for mesh in meshes if mesh.explicit_axes), None)
  if mesh is None:
    return jax.tree.map(_alike, function(*args), out_like)

  def of_arrays(arrays):
    arrays = iter(arrays)
    filled = [next(arrays) if is_one else x for x, is_one in zip(leaves, is_array, strict=True)]
    return function(*structure.unflatten(filled))

  layout = jax.tree.map(lambda x: NamedSharding(mesh, jax.typeof(x).sharding.spec), out_like)
  inside = jax.sharding.auto_axes(of_arrays, axes=mesh.explicit_axes, out_sharding=layout)
  return inside([x for x, is_one in zip(leaves, is_array, strict=True) if is_one])
