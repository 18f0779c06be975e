"""What a task family has to be, checked before anything is compiled, so that a mistake has a name."""

from typing import Any

import jax
import jax.numpy as jnp

from lopt import base


def check(family: base.TaskFamily, name: str) -> None:
  """Raises ValueError in one line where the family cannot be meta-trained on.

  Draws two tasks and traces the rest, abstractly: nothing is trained, and nothing of the batches is computed.
  """
  where = f"task family {name!r}"
  keys = [jax.random.key(seed) for seed in range(4)]
  tasks = [_of(where, "sample", lambda key=key: family.sample(key)) for key in keys[:2]]
  if (first := _shapes(tasks[0])) != (second := _shapes(tasks[1])):
    raise ValueError(
      f"{where}: sample: two draws differ in shape, {first} and {second}; all tasks of a family share one"
    )
  params = _of(where, "init", lambda: jax.eval_shape(family.init, keys[2], tasks[0]))
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      raise ValueError(
        f"{where}: init: the parameter {jax.tree_util.keystr(path)} is of type {leaf.dtype}; parameters are trained, "
        "and have to be real floating-point arrays"
      )
  for split in base.SPLITS:
    batch = _of(
      where,
      f"batch, split {split!r}",
      lambda split=split: jax.eval_shape(lambda key, task: family.batch(key, task, split), keys[3], tasks[0]),
    )
    result = _of(where, "loss", lambda batch=batch: jax.eval_shape(family.loss, params, keys[3], batch, tasks[0]))
    if not isinstance(result, tuple) or len(result) != 2:
      raise ValueError(f"{where}: loss: must return (loss, metrics), such as (loss, {{}})")
    loss = result[0]
    if jnp.shape(loss) != () or not jnp.issubdtype(loss.dtype, jnp.floating):
      raise ValueError(f"{where}: loss: must be a float scalar, not {loss.dtype}{list(loss.shape)}; take a mean?")


def _of(where: str, what: str, function: Any) -> Any:
  try:
    return function()
  except Exception as error:  # whatever the user's code raises
    reason = " ".join(str(error).split())[:200]
    hint = ""
    if isinstance(error, (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError)):
      hint = "; it runs inside compiled code, so it cannot use NumPy or Python conditions on arrays"
    raise ValueError(f"{where}: {what}: {type(error).__name__}: {reason}{hint}") from error


def _shapes(tree: base.PyTree) -> str:
  return str(jax.tree.map(lambda x: f"{jnp.result_type(x)}{list(jnp.shape(x))}", tree)).replace("'", "")
