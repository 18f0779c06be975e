"""One process at a time, whatever becomes of it."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from lopt.runs import cache, lock
from lopt.runs.lock import LockedError

ROOT = Path(__file__).parent.parent.parent
HOLD = """
import sys, time
from lopt.runs import lock
with lock.hold(sys.argv[1]):
  print("held", flush=True)
  time.sleep(float(sys.argv[2]))
"""


def holder(folder: Path, seconds: float) -> subprocess.Popen[str]:
  """A process that has the folder, once this returns."""
  command = [sys.executable, "-c", HOLD, str(folder), str(seconds)]
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
  assert process.stdout is not None
  assert process.stdout.readline() == "held\n"
  return process


def test_the_second_process_is_told_who_has_it_and_a_kill_frees_it(tmp_path):
  folder = tmp_path / "run"
  with holder(folder, 100) as process:
    text = f"{folder}: in use by process {process.pid} on {socket.gethostname()}; wait for it or stop it"
    for use in (lambda: lock.hold(folder).__enter__(), lambda: lock.check(folder)):
      begun = time.monotonic()
      with pytest.raises(LockedError, match=re.escape(text)) as error:
        use()
      assert "\n" not in str(error.value)
      assert time.monotonic() - begun < 1
    process.send_signal(signal.SIGKILL)
  lock.check(folder)
  assert (folder / ".lock").exists()  # left by the killed one, which is no harm
  with lock.hold(folder):
    assert (folder / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
  assert not list(folder.iterdir())


def test_it_is_free_after_an_error_and_not_twice_in_a_process(tmp_path):
  def twice() -> None:
    with lock.hold(tmp_path), lock.hold(tmp_path):
      pass

  for _ in range(2):
    with pytest.raises(LockedError, match=f"process {os.getpid()} on"):
      twice()
  lock.check(tmp_path)
  lock.check(tmp_path / "nowhere")
  assert not list(tmp_path.iterdir())


def test_who_waits_comes_next(tmp_path, capfd):
  with holder(tmp_path, 0.5):
    begun = time.monotonic()
    with lock.hold(tmp_path, wait=True):
      assert time.monotonic() - begun > 0.1
      with pytest.raises(LockedError):
        lock.check(tmp_path)
  assert re.fullmatch(r"waiting: .*: in use by process \d+ on .*\n", capfd.readouterr().err)


def test_many_take_turns(tmp_path):
  """The file is deleted at every release; no two are ever inside, though each finds or makes another file."""
  inside, worst, done = 0, 0, 0
  counting = threading.Lock()

  def work() -> None:
    nonlocal inside, worst, done
    for _ in range(30):
      with lock.hold(tmp_path, wait=True):
        with counting:
          inside += 1
          worst = max(worst, inside)
        time.sleep(0.0005)
        with counting:
          inside -= 1
          done += 1

  threads = [threading.Thread(target=work) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert (worst, done) == (1, 120)


def test_where_there_are_no_locks_it_says_so_and_goes_on(tmp_path, monkeypatch, capfd):
  def refuse(descriptor: int, operation: int) -> None:
    raise OSError(38, "Function not implemented")

  assert lock.fcntl is not None
  monkeypatch.setattr(lock.fcntl, "flock", refuse)
  with lock.hold(tmp_path / "run"):
    pass
  assert "this file system has no locks; see to it that one process at a time uses it" in capfd.readouterr().err


def test_a_result_that_two_need_is_computed_once(tmp_path, capfd):
  times = 0

  def compute() -> cache.Arrays:
    nonlocal times
    times += 1
    time.sleep(0.3)
    return {"x": np.arange(3)}

  results = []
  remember = lambda: results.append(cache.remember(tmp_path, {"a": 1}, compute)["x"].tolist())
  threads = [threading.Thread(target=remember) for _ in range(3)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert (times, results) == (1, [[0, 1, 2]] * 3)
  assert "in use by process" in capfd.readouterr().err
  assert len(list(tmp_path.iterdir())) == 1


def test_a_read_only_cache_can_be_read(tmp_path, monkeypatch):
  cache.remember(tmp_path, {"a": 1}, lambda: {"x": np.arange(3)})
  monkeypatch.setattr(lock, "hold", lambda *args, **options: pytest.fail("wants to write"))
  assert cache.remember(tmp_path, {"a": 1}, dict)["x"].tolist() == [0, 1, 2]
