"""Files that are whole or absent, never half written."""

import contextlib
import errno
import os
import secrets
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], data: str | bytes) -> None:
  """Replaces the file `path` by `data` (text as UTF-8); a crash at any moment leaves the old file or the new one.

  Missing parent folders are made.

  Raises:
    OSError: the file cannot be written (disk full, no permission, ...); the old file is then still there.
  """
  path = Path(path)
  # In the same folder, because os.replace is atomic only within one file system.
  temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary.open("wb") as file:
      file.write(data.encode() if isinstance(data, str) else data)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)
  except OSError as error:
    raise explain(error, path) from error
  finally:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)


def remove_partial(folder: str | os.PathLike[str]) -> None:
  """Deletes what writes into `folder` left that were killed; only for who knows that nobody writes there now."""
  for path in Path(folder).glob(".*.tmp"):
    with contextlib.suppress(OSError):
      path.unlink()


def explain(error: OSError, path: str | os.PathLike[str]) -> OSError:
  """The same error with a message that says which file could not be written, and why."""
  full = {errno.ENOSPC: "no space left on the disk", errno.EDQUOT: "disk quota exceeded"}
  full[errno.EFBIG] = "larger than the file size limit (ulimit -f)"
  full[errno.EEXIST] = full[errno.ENOTDIR] = "a file is where a folder should be"
  full[errno.EISDIR] = "a folder is where the file should be"
  reason = full.get(error.errno or 0, error.strerror or str(error))
  return OSError(error.errno, f"cannot write {path}: {reason}")


def _sync_folder(folder: Path) -> None:
  """Makes a rename in `folder` survive a power cut."""
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
