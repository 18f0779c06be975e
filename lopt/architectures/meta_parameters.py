"""Meta-parameters by name: which part of θ is trained, while the rest stays as it is."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from lopt.base import LearnedOptimizer, Theta, name_of


def named(theta: Theta) -> dict[str, Any]:
  """The leaves of θ by their path in the pytree, such as `mlp/~/linear_0/w`.

  Raises:
    ValueError: Two leaves have the same path.
  """
  leaves = jax.tree_util.tree_leaves_with_path(theta)
  names = [name_of(path) or "theta" for path, _ in leaves]
  if len(set(names)) < len(names):
    raise ValueError(f"two leaves of θ have the same path, one of {', '.join(sorted(names))}")
  return dict(zip(names, (leaf for _, leaf in leaves), strict=True))


def start_from(
  optimizer: LearnedOptimizer, theta: Theta, trainable: Sequence[str] = ()
) -> tuple[LearnedOptimizer, Callable[[Theta], Theta]]:
  """The optimizer with `theta` as its first θ, of which only leaves are trained whose names begin so.

  For what is trained in phases, and for fine-tuning. Whatever sees the new optimizer (estimators, checkpoints, the
  outer optimizer) knows nothing of the frozen part.

  Args:
    optimizer: The architecture.
    theta: Of the whole.
    trainable: Beginnings of the names that `named` gives; () for all.

  Returns:
    The optimizer, whose θ are dicts of leaves by name, and what makes the whole θ of one of them.

  Raises:
    ValueError: A beginning that no leaf has.
  """
  leaves, structure = named(theta), jax.tree.structure(theta)
  if unknown := [start for start in trainable if not any(name.startswith(start) for name in leaves)]:
    raise ValueError(f"trainable: {unknown[0]!r} begins no name of θ, whose leaves are {', '.join(leaves)}")
  part = {name: leaf for name, leaf in leaves.items() if not trainable or name.startswith(tuple(trainable))}

  def whole(trained: Theta) -> Theta:
    return jax.tree.unflatten(structure, [trained.get(name, leaf) for name, leaf in leaves.items()])

  def init(key: Any) -> Theta:
    del key  # nothing random
    return dict(part)

  return LearnedOptimizer(init, lambda trained, num_steps: optimizer.transform(whole(trained), num_steps)), whole
