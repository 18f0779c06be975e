"""Results that are found again by what they were computed from."""

import hashlib
import io
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lopt.runs import files, lock

Arrays = dict[str, np.ndarray]


def remember(folder: str | Path | None, key: Mapping[str, Any], compute: Callable[[], Arrays]) -> Arrays:
  """`compute()`, or what it returned when it was called for the same key before.

  A file that is damaged or cannot be read is computed again, with a message. Of processes that need the same
  result at the same time one computes it, and the others wait for it.

  Args:
    folder: Where results are, a .npz file each; None to remember nothing.
    key: All that the result depends on, in JSON's types.
    compute: Makes named arrays of numbers or strings.

  Raises:
    OSError: The result cannot be written.
  """
  if folder is None:
    return compute()
  text = json.dumps(key, sort_keys=True)
  path = Path(folder) / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npz"
  if (found := _find(path, text)) is not None:
    return found
  with lock.hold(folder, f".{path.stem}.lock", wait=True):
    if (found := _find(path, text, silent=True)) is not None:  # another process was computing it
      return found
    result = compute()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, key=np.array(text), **result)
    files.write_atomically(path, buffer.getvalue())
    return result


def _find(path: Path, text: str, silent: bool = False) -> Arrays | None:
  """The result of the key `text`, if it is there and whole."""
  if not path.exists():
    return None
  try:
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
      stored = dict(file)
    if stored.pop("key").item() == text:
      return stored
    raise ValueError("it is of another key")
  except Exception as error:  # zipfile, zlib, NumPy and the system all have their own for a damaged file
    if not silent:
      print(f"{path}: cannot be used, and is computed again ({error})", file=sys.stderr)
    return None
