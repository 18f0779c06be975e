"""One process at a time in a folder that it writes to.

The lock belongs to the process (`flock`), so however that ends, the folder is free. Who has it stands in the file.
"""

import contextlib
import errno
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

try:
  import fcntl
except ImportError:  # on Windows, where there is no such lock
  fcntl = None

from lopt.runs import files

FILENAME = ".lock"


class LockedError(Exception):
  """A folder that another process writes to; one line that says which process."""


@contextlib.contextmanager
def hold(folder: str | os.PathLike[str], name: str = FILENAME, *, wait: bool = False) -> Iterator[None]:
  """Keeps other processes out of `folder`, which is made if missing, until the end of the `with` block.

  Where the file system has no locks it says so, and goes on without.

  Args:
    folder: the one to be alone in.
    name: of the lock file, for locks of less than the whole folder.
    wait: for the other process to be done, with a message, rather than to fail.

  Raises:
    LockedError: another process holds it.
    OSError: the folder cannot be written to.
  """
  path = Path(folder) / name
  descriptor = _lock(path, wait)
  try:
    if descriptor is not None:
      os.ftruncate(descriptor, 0)
      os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    yield
  finally:
    if descriptor is not None:
      with contextlib.suppress(OSError):  # the folder may be gone
        path.unlink()  # before the lock ends with the descriptor, so that it is never somebody else's
      os.close(descriptor)


def check(folder: str | os.PathLike[str]) -> None:
  """Raises LockedError if another process holds the folder now; leaves no trace."""
  path = Path(folder) / FILENAME
  with contextlib.suppress(OSError):
    descriptor = os.open(path, os.O_RDWR)
    try:
      _try(descriptor, path)
    finally:
      os.close(descriptor)


def _lock(path: Path, wait: bool) -> int | None:
  """The descriptor of the locked file `path`; None where there are no locks."""
  told = False
  while True:
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
      raise files.explain(error, path) from error
    try:
      if not _try(descriptor, path):
        os.close(descriptor)
        return None
    except LockedError as error:
      if not wait:
        os.close(descriptor)
        raise
      if not told:
        print(f"waiting: {error}", file=sys.stderr, flush=True)
        told = True
      assert fcntl is not None
      fcntl.flock(descriptor, fcntl.LOCK_EX)
    except BaseException:
      os.close(descriptor)
      raise
    # The one that held it may have deleted the file meanwhile; then this is the lock of nothing.
    with contextlib.suppress(OSError):
      if os.path.samestat(os.fstat(descriptor), os.stat(path)):
        return descriptor
    os.close(descriptor)


def _try(descriptor: int, path: Path) -> bool:
  """Whether it is locked now, rather than that this is impossible; raises LockedError if another process has it."""
  try:
    if fcntl is not None:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
      return True
  except OSError as error:
    if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
      holder = os.pread(descriptor, 300, 0).decode(errors="replace").strip() or "another process"
      raise LockedError(
        f"{path.parent}: in use by {holder}; wait for it or stop it, or use another folder"
      ) from error
    if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF):
      raise files.explain(error, path) from error
  print(
    f"{path.parent}: this file system has no locks; see to it that one process at a time uses it", file=sys.stderr
  )
  return False
