"""Ctrl-C and SIGTERM (a scheduler that takes the machine back) as an orderly end: finish the step, save, say so."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any


class InterruptedRun(KeyboardInterrupt):
  """A run that was asked to end and has saved what it needs to go on; the same call continues it.

  A KeyboardInterrupt, so that in a notebook it stops what a KeyboardInterrupt stops.
  """

  def __init__(self, message: str, signal_number: int = signal.SIGINT):
    super().__init__(message)
    self.exit_code = 128 + signal_number
    """As shells have it: 130 after Ctrl-C, 143 after SIGTERM."""


@contextlib.contextmanager
def deferred(message: str) -> Iterator[Callable[[], int]]:
  """Within, the first SIGINT or SIGTERM is only noted, and `message` printed; a second one ends the process as usual.

  Yields:
    A function that returns the number of the signal that has come, or 0.

  In threads other than the first, where Python has no signals, nothing is noted.
  """
  received = 0

  def note(number: int, frame: Any) -> None:
    nonlocal received
    if received:
      restore()
      signal.raise_signal(number)
      return
    received = number
    with contextlib.suppress(RuntimeError, OSError):  # as where the signal comes in the middle of another print
      print(f"\n{message}", file=sys.stderr, flush=True)

  previous = {}
  if threading.current_thread() is threading.main_thread():
    for number in (signal.SIGINT, signal.SIGTERM):
      if signal.getsignal(number) != signal.SIG_IGN:  # as for a job in the background of a script
        previous[number] = signal.signal(number, note)

  def restore() -> None:
    for number, handler in previous.items():
      signal.signal(number, handler)
    previous.clear()

  try:
    yield lambda: received
  finally:
    restore()


@contextlib.contextmanager
def immediate(message: str) -> Iterator[None]:
  """Within, SIGTERM raises `InterruptedRun(message)`, as Ctrl-C raises KeyboardInterrupt."""

  def stop(number: int, frame: Any) -> None:
    raise InterruptedRun(message, number)

  main = threading.current_thread() is threading.main_thread()
  previous = signal.signal(signal.SIGTERM, stop) if main else None
  try:
    yield
  finally:
    if main:
      signal.signal(signal.SIGTERM, previous)
