"""Checks of settings, whose errors name the field, its value and what it must be."""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp


def counts(**values: int | None) -> None:
  """Raises ValueError that names the first count below 1; None is left to be chosen."""
  for name, value in values.items():
    if value is not None and value < 1:
      raise ValueError(f"{name}: must be at least 1, not {value}")


def require(condition: bool, name: str, value: object, what: str) -> None:
  """Raises ValueError that says what `name` must be, unless the condition holds."""
  if not condition:
    raise ValueError(f"{name}={value!r}: must be {what}")


def one_of(name: str, value: object, known: Collection[str]) -> None:
  """Raises ValueError that lists what is known, unless the value is one of it."""
  require(value in known, name, value, f"one of {', '.join(known)}")


def some_of(name: str, chosen: Collection[str], known: Collection[str]) -> None:
  """Raises ValueError that lists what is known, unless there is a choice and all of it is known."""
  require(len(chosen) > 0 and set(chosen) <= set(known), name, chosen, f"one or more of {', '.join(known)}")


def real_floating(name: str, tree: Any) -> None:
  """Raises TypeError that names the first leaf of `tree` whose entries are not real floating-point numbers.

  Python floats are. Integers, `float0` and complex numbers are not: casting them would drop what they mean.
  """
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    dtype = jax.dtypes.result_type(leaf) if not hasattr(leaf, "dtype") else leaf.dtype
    if not jnp.issubdtype(dtype, jnp.floating):
      raise TypeError(
        f"{name}{jax.tree_util.keystr(path)} is {dtype}: learned optimizers update real floating-point arrays only; "
        "leave other leaves out with optax.masked or optax.partition, and split complex ones into real and imaginary"
      )
