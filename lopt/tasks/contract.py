"""What a task family has to be, checked before anything is compiled, so that a mistake has a name."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lopt import base

_EXAMPLE = "lopt has such as lopt.tasks.mlp_classifier.build(dataset='digits')"


def named(families: Any, word: str) -> dict[str, base.TaskFamily]:
  """Task families by name.

  Args:
    families: One, several, or several by name.
    word: What one without a name is called; several are "<word> 1", "<word> 2", ….

  Raises:
    ValueError: In one line where there is none, or something else among them.
  """
  if isinstance(families, base.TaskFamily):
    return {word: families}
  if not isinstance(families, Iterable) or isinstance(families, str):
    given = repr(families) if isinstance(families, str) else type(families).__name__
    raise ValueError(f"families: must be a lopt.base.TaskFamily or several, not {given}; {_EXAMPLE}")
  by_name = families
  if not isinstance(by_name, Mapping):
    listed = list(families)
    by_name = {f"{word} {i + 1}" if len(listed) > 1 else word: family for i, family in enumerate(listed)}
  if not by_name:
    raise ValueError("families: is empty; give a TaskFamily, several of them, or a section of a configuration")
  for name, family in by_name.items():
    if not isinstance(family, base.TaskFamily):
      raise ValueError(
        f"task family {name!r}: must be a lopt.base.TaskFamily, not {type(family).__name__}; {_EXAMPLE}"
      )
  return {str(name): family for name, family in by_name.items()}


def check(family: base.TaskFamily, name: str) -> None:
  """Raises ValueError in one line where the family cannot be meta-trained on.

  Draws two tasks and traces the rest, abstractly: nothing is trained, and nothing of the batches is computed.
  """
  where = f"task family {name!r}"
  keys = [jax.random.key(seed) for seed in range(4)]
  tasks = [_of(where, "sample", lambda key=key: family.sample(key)) for key in keys[:2]]
  shapes = [_of(where, "sample", lambda task=task: _shapes(task)) for task in tasks]
  if (first := shapes[0]) != (second := shapes[1]):
    raise ValueError(
      f"{where}: sample: two draws differ in shape, {first} and {second}; all tasks of a family share one"
    )
  _of(where, "sample", lambda: jax.eval_shape(family.sample, keys[0]))
  params = _of(where, "init", lambda: jax.eval_shape(_arrays_only(family.init), keys[2], tasks[0]))
  if not jax.tree.leaves(params):
    raise ValueError(f"{where}: init: has no parameters to train")
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      raise ValueError(
        f"{where}: init: the parameter {jax.tree_util.keystr(path)} is of type {leaf.dtype}; parameters are trained, "
        "and have to be real floating-point arrays; what is not trained belongs into the task"
      )
  layout = None  # of the first split's batches
  for split in base.SPLITS:
    batch = _of(
      where,
      f"batch, split {split!r}",
      lambda split=split: jax.eval_shape(lambda key, task: family.batch(key, task, split), keys[3], tasks[0]),
    )
    own = _shapes(batch)
    layout = layout or own
    if own != layout:
      raise ValueError(
        f"{where}: batch: splits differ in shape, {layout} of {base.SPLITS[0]} and {own} of {split}; "
        "all of them have to have batches of one shape"
      )
    result = _of(
      where, "loss", lambda batch=batch: jax.eval_shape(_arrays_only(family.loss), params, keys[3], batch, tasks[0])
    )
    if not isinstance(result, tuple) or len(result) != 2:
      raise ValueError(f"{where}: loss: must return (loss, metrics), such as (loss, {{}})")
    loss, metrics = result
    if not isinstance(metrics, Mapping):
      raise ValueError(f"{where}: loss: metrics must be a dict of arrays by name, not {_shapes(metrics)}")
    for metric, value in metrics.items():
      if getattr(value, "shape", None) != ():
        raise ValueError(f"{where}: loss: the metric {metric!r} must be a scalar, not {_shapes(value)}; take a mean?")
    if not hasattr(loss, "shape"):  # a tree
      raise ValueError(f"{where}: loss: must be a float scalar, not {_shapes(loss)}")
    if loss.shape != () or not jnp.issubdtype(loss.dtype, jnp.floating):
      raise ValueError(f"{where}: loss: must be a float scalar, not {loss.dtype}{list(loss.shape)}; take a mean?")
    normal = _of(where, "normalize", lambda loss=loss: jax.eval_shape(family.normalize, loss, tasks[0]))
    if getattr(normal, "shape", None) != () or not jnp.issubdtype(normal.dtype, jnp.floating):
      raise ValueError(f"{where}: normalize: must return a float scalar, not {_shapes(normal)}")
  cap = family.loss_cap
  if isinstance(cap, bool) or not isinstance(cap, (int, float)) or not cap > 0:
    raise ValueError(f"{where}: loss_cap: must be a number above 0, not {cap!r}")


def check_start(family: base.TaskFamily, name: str, loss_cap: float | None) -> None:
  """Raises ValueError in one line where most tasks of the family have diverged before they begin.

  Computes the first loss of eight tasks.

  Args:
    family: One that `check` passes.
    name: In the error.
    loss_cap: Normalised losses that count as diverged, beside the family's own.
  """
  where = f"task family {name!r}"

  def first_loss(key: base.PRNGKey) -> base.Scalar:
    task_key, params_key, batch_key, loss_key = jax.random.split(key, 4)
    task = family.sample(task_key)
    batch = family.batch(batch_key, task, "train")
    loss, _ = family.loss(family.init(params_key, task), loss_key, batch, task)
    return family.normalize(loss, task)

  keys = jax.random.split(jax.random.key(0), 8)
  losses = np.asarray(_of(where, "loss", lambda: jax.jit(jax.vmap(first_loss))(keys)))
  if np.isnan(losses).any():
    raise ValueError(f"{where}: loss: is NaN at the first parameters, for {np.isnan(losses).mean():.0%} of tasks")
  cap = min(family.loss_cap, math.inf if loss_cap is None else loss_cap)
  if (median := float(np.median(losses))) >= cap:
    raise ValueError(
      f"{where}: loss: is {median:.3g} at the first parameters (median of 8 tasks), and from {cap:g} it "
      "counts as diverged; give the family a `normalize` that makes it about 1, or raise loss_cap"
    )


def _arrays_only(function: Callable[..., Any]) -> Callable[..., Any]:
  """The function, but that a Python number among its results, which JAX would take, is an error that says where."""

  def checked(*args: Any) -> Any:
    result = function(*args)
    for path, leaf in jax.tree_util.tree_leaves_with_path(result):
      if isinstance(leaf, (bool, int, float, complex)):
        where = jax.tree_util.keystr(path)
        raise TypeError(f"result{where} is the Python number {leaf!r}; make it an array, jnp.asarray({leaf!r})")
    return result

  return checked


def _of(where: str, what: str, function: Any) -> Any:
  try:
    return function()
  except Exception as error:  # whatever the user's code raises
    reason, hint = str(error), ""
    if isinstance(error, (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError)):
      reason = reason.partition("\n")[0]  # then JAX's advice, which is longer than the line below
      hint = "; it runs inside compiled code, so it cannot use NumPy or Python conditions on arrays"
    raise ValueError(f"{where}: {what}: {type(error).__name__}: {' '.join(reason.split())[:200]}{hint}") from error


def _shapes(tree: base.PyTree) -> str:
  return str(jax.tree.map(lambda x: f"{jnp.result_type(x)}{list(jnp.shape(x))}", tree)).replace("'", "")
