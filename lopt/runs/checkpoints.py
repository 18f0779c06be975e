"""Checkpoints of a meta-training run: everything that it needs to go on as if it had never stopped.

One folder per checkpoint, `<workdir>/checkpoints/<outer step>`, written by Orbax under another name and renamed
when complete, so that a checkpoint is whole or absent whenever the process dies.
"""

import contextlib
import logging
import math
import shutil
import sys
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from lopt.base import PyTree


class CheckpointError(Exception):
  """A checkpoint that cannot be written or used; one line that says which, what is wrong, and the remedy."""


class DamagedError(CheckpointError):
  """A checkpoint that is not what was saved."""


def latest_step(workdir: str | Path) -> int | None:
  """The outer step of the newest complete checkpoint; None if there is none."""
  return max(_steps(workdir), default=None)


def save(workdir: str | Path, step: int, state: PyTree, *, keep: int = 3) -> None:
  """Writes `<workdir>/checkpoints/<step>`, then deletes all but the newest `keep` checkpoints.

  It is complete when the function returns.

  Args:
    workdir: of the run.
    step: outer steps taken, at least 0 and beyond every earlier checkpoint's.
    state: pytree of numpy or JAX arrays, which are copied to the host.
    keep: number of checkpoints kept, at least 1.

  Raises:
    CheckpointError: it could not be written (disk full, ...); the earlier checkpoints are intact.
  """
  path = _path(workdir, step)
  if (latest := latest_step(workdir)) is not None and step <= latest:
    raise CheckpointError(f"{path}: {_path(workdir, latest)} is as new or newer; delete it, or use another workdir")
  arrays = {name: np.asarray(leaf) for name, leaf in _named_leaves(state).items()}
  # Orbax neither stores arrays of size zero nor notices a flipped bit: the manifest sees to both.
  manifest = {name: {**_describe(array), "crc32": _checksum(array)} for name, array in arrays.items()}
  items: dict[str, Any] = {"manifest": ocp.args.JsonSave(manifest)}
  # As one array: of many that are written side by side, all would complain after the first failure.
  stored = np.concatenate([_bytes(array) for array in arrays.values()] or [np.zeros(0, np.uint8)])
  if stored.size:
    items["state"] = ocp.args.StandardSave({"bytes": stored})
  try:
    with _manager(workdir, max_to_keep=keep, cleanup_tmp_directories=True) as manager:
      manager.save(step, args=ocp.args.Composite(**items), force=True)
  except Exception as error:  # Orbax and TensorStore have no error type of their own
    for partial in path.parent.glob(f"{step}.orbax-checkpoint-tmp*"):
      shutil.rmtree(partial, ignore_errors=True)  # it may fill the disk; the next save tries again
    raise CheckpointError(f"{path}: cannot be written: {_reason(error)}; earlier checkpoints are intact") from error


def restore(workdir: str | Path, like: PyTree, step: int | None = None) -> PyTree:
  """The state of a checkpoint, bit for bit, as numpy arrays in the structure of `like`.

  Args:
    workdir: of the run.
    like: a state, or `jax.ShapeDtypeStruct`s, of the structure, shapes and dtypes that are expected.
    step: which checkpoint; the newest by default.

  Raises:
    DamagedError: it is not what was saved.
    CheckpointError: there is none, or it is of a state of other structure, shapes or dtypes.
  """
  step = latest_step(workdir) if step is None else step
  if step is None or step not in _steps(workdir):
    raise CheckpointError(f"{Path(workdir) / 'checkpoints'}: no checkpoint {'' if step is None else step}".rstrip())
  path = _path(workdir, step)
  expected = {name: _describe(leaf) for name, leaf in _named_leaves(like).items()}
  try:
    with _manager(workdir) as manager:
      manifest = manager.restore(step, args=ocp.args.Composite(manifest=ocp.args.JsonRestore()))["manifest"]
      found = {name: {"shape": leaf["shape"], "dtype": leaf["dtype"]} for name, leaf in manifest.items()}
      if found != expected:
        raise CheckpointError(f"{path}: {_difference(found, expected)}; {_FOREIGN}")
      stored = np.zeros(0, np.uint8)
      if any(math.prod(leaf["shape"]) for leaf in found.values()):
        one = {"bytes": ocp.RestoreArgs(restore_type=np.ndarray)}
        arguments = ocp.args.PyTreeRestore(item=one, restore_args=one)
        stored = manager.restore(step, args=ocp.args.Composite(state=arguments))["state"]["bytes"]
      arrays = _cut(stored, found)
  except CheckpointError:
    raise
  except Exception as error:  # as above
    raise DamagedError(f"{path}: damaged: {_reason(error)}; {_remedy(workdir, step)}") from error
  for name, array in arrays.items():
    if _describe(array) != expected[name] or _checksum(array) != manifest[name]["crc32"]:
      raise DamagedError(f"{path}: damaged: {name} is not what was saved; {_remedy(workdir, step)}")
  return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in expected])


def restore_latest(workdir: str | Path, like: PyTree) -> tuple[int, PyTree] | None:
  """The newest checkpoint that is whole: its step, and what `restore` gives; None if there has been none.

  A damaged one is moved to `<workdir>/damaged/`, with a message, and the run goes on from the one before.

  Raises:
    CheckpointError: all that there are are damaged, or one is of another state.
  """
  folder = Path(workdir) / "checkpoints"
  if folder.exists() and not folder.is_dir():
    raise CheckpointError(f"{folder}: a file is where the folder of checkpoints should be")
  damage = None
  while (step := latest_step(workdir)) is not None:
    try:
      return step, restore(workdir, like, step)
    except DamagedError as error:
      damage = error
      earlier = [s for s in _steps(workdir) if s < step]
      if not earlier:
        break  # and stays where it is, so that the run is not begun anew unasked
      aside = Path(workdir) / "damaged" / str(step)
      try:
        aside.parent.mkdir(exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        _path(workdir, step).rename(aside)
      except OSError as failure:
        raise CheckpointError(f"{error} (it cannot be moved to {aside}: {failure.strerror})") from failure
      print(f"{error} (moved to {aside}; going on from step {earlier[-1]})", file=sys.stderr)
  if damage is not None:
    raise damage
  return None


_FOREIGN = "use the configuration that it was made with, or another workdir"


def _path(workdir: str | Path, step: int) -> Path:
  return Path(workdir) / "checkpoints" / str(step)


def _steps(workdir: str | Path) -> list[int]:
  folder = Path(workdir) / "checkpoints"
  return sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal() and path.is_dir())


@contextlib.contextmanager
def _manager(workdir: str | Path, **options: Any) -> Iterator[ocp.CheckpointManager]:
  folder = (Path(workdir) / "checkpoints").absolute()
  if jax.process_count() > 1:  # each acts on its own
    folder.mkdir(parents=True, exist_ok=True)
    here = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(here, {here}, barrier_sync_key_prefix=str(here))
    options |= {"multiprocessing_options": alone, "create": False}
  # Synchronous, so that nothing is under way when `save` returns.
  manager_options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False, **options)
  logger = logging.getLogger("absl")
  level = logger.level
  logger.setLevel(logging.CRITICAL)  # what Orbax logs, with a traceback for each thread, it raises too
  try:
    with ocp.CheckpointManager(folder, options=manager_options) as manager:
      yield manager
  finally:
    # Where one item fails, the thread that writes another goes on, and complains once its folder is gone.
    for thread in threading.enumerate():
      if type(thread).__module__.startswith("orbax."):
        threading.Thread.join(thread, timeout=60)  # their own raises their error, in place of the first one
    logger.setLevel(level)


def _named_leaves(tree: PyTree) -> dict[str, Any]:
  return {f"state{jax.tree_util.keystr(path)}": leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _describe(array: Any) -> dict[str, Any]:
  return {"shape": list(np.shape(array)), "dtype": str(array.dtype)}


def _bytes(array: np.ndarray) -> np.ndarray:
  return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _cut(stored: np.ndarray, described: dict[str, Any]) -> dict[str, np.ndarray]:
  """The arrays whose bytes follow each other; raises ValueError if they are not as many as these have."""
  arrays, start = {}, 0
  for name, leaf in described.items():
    end = start + math.prod(leaf["shape"]) * np.dtype(leaf["dtype"]).itemsize
    arrays[name] = stored[start:end].copy().view(leaf["dtype"]).reshape(leaf["shape"])  # a copy is aligned
    start = end
  if start != stored.size:
    raise ValueError(f"{stored.size} bytes, not {start}")
  return arrays


def _checksum(array: np.ndarray) -> int:
  return zlib.crc32(_bytes(array).data)


def _difference(found: dict[str, Any], expected: dict[str, Any]) -> str:
  """The first leaf that differs, in words."""
  for name in {**expected, **found}:
    if found.get(name) != expected.get(name):
      there, here = (
        f"{leaf['dtype']}{leaf['shape']}" if leaf else "absent" for leaf in (found.get(name), expected.get(name))
      )
      return f"{name} is {there} in the checkpoint and {here} in this run"
  return "its arrays are in another order than this run's"


def _remedy(workdir: str | Path, step: int) -> str:
  earlier = [s for s in _steps(workdir) if s < step]
  return f"delete it to go on from {f'step {earlier[-1]}' if earlier else 'the start'}"


def _reason(error: Exception) -> str:
  """What an exception says, in one line without its type's stack of contexts."""
  text = " ".join(str(error).split()) or type(error).__name__
  if "No space left" in text or "ENOSPC" in text:
    return "no space left on the disk"
  if "File too large" in text or "EFBIG" in text:
    return "too large for the file size limit"
  return text if len(text) <= 200 else f"{text[:200]}..."
