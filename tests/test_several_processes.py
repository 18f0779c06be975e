"""Meta-training in two processes on this machine, as a user starts them on two machines."""

import contextlib
import re
import signal
import socket
import subprocess
import time

import numpy as np
import pytest
import safetensors.numpy

from lopt.runs import checkpoints

CHANGES = {
  "num_outer_steps": 40,
  "estimator.num_pairs": 8,
  "periodic_evaluation.every": 20,
  "periodic_evaluation.num_tasks": 1,
  "evaluation.num_tasks": 1,
  "evaluation.num_seeds": 1,
  "checkpoint.every": 10,
}


@pytest.fixture
def start(environment, meta_train):
  with contextlib.ExitStack() as stack:

    def run(workdir, *flags, **changes):
      command = meta_train(workdir, *flags, **{**CHANGES, **changes})
      process = stack.enter_context(
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
      )
      stack.callback(process.kill)  # before its context waits for it
      return process

    yield run


@pytest.fixture
def start_two(start):
  def run(workdir, **changes):
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = [f"--coordinator={address}", "--num_processes=2"]
    return [start(workdir, *flags, f"--process_id={i}", **changes) for i in range(2)]

  return run


def theta(workdir):
  return safetensors.numpy.load_file(workdir / "optimizer.safetensors")


@pytest.mark.slow
def test_two_processes_find_what_one_does_and_one_continues_what_two_began(start, start_two, tmp_path):
  """The same θ up to the order of sums; only the first process speaks and writes; checkpoints fit any number."""
  alone = start(tmp_path / "alone")
  assert alone.communicate(timeout=300)[1] is not None
  assert alone.returncode == 0
  first, second = start_two(tmp_path / "two")
  output, errors = first.communicate(timeout=300)
  assert first.returncode == 0, errors
  assert output.rstrip().endswith("(num_steps=...).")
  quiet, errors = second.communicate(timeout=300)
  assert second.returncode == 0, errors
  assert "meta-training" not in errors
  assert "held-out" not in quiet
  expected = theta(tmp_path / "alone")
  for name, array in theta(tmp_path / "two").items():
    np.testing.assert_allclose(array, expected[name], rtol=1e-3, atol=1e-4 * np.abs(expected[name]).max())
  lines = [len((tmp_path / run / "metrics.jsonl").read_text().splitlines()) for run in ("alone", "two")]
  assert lines[0] == lines[1]

  # As if interrupted after the checkpoint of step 30, and continued by one process.
  folder = tmp_path / "two" / "checkpoints"
  (folder / "40").rename(tmp_path / "40")
  (tmp_path / "two" / "optimizer.safetensors").unlink()
  continued = start(tmp_path / "two")
  _, errors = continued.communicate(timeout=300)
  assert continued.returncode == 0, errors
  for name, array in theta(tmp_path / "two").items():
    np.testing.assert_allclose(array, expected[name], rtol=1e-3, atol=1e-4 * np.abs(expected[name]).max())


@pytest.mark.slow
@pytest.mark.parametrize("killed", [pytest.param(0, marks=pytest.mark.long), 1])
def test_the_death_of_one_process_ends_the_other_with_a_message(start_two, tmp_path, killed):
  processes = start_two(tmp_path, **{"num_outer_steps": 200_000, "periodic_evaluation.every": 200_000})
  deadline = time.monotonic() + 240
  while checkpoints.latest_step(tmp_path) is None:
    assert time.monotonic() < deadline
    assert all(process.poll() is None for process in processes), processes[0].communicate()[1]
    time.sleep(0.1)
  processes[killed].send_signal(signal.SIGKILL)
  processes[killed].communicate()
  _, errors = processes[1 - killed].communicate(timeout=120)
  assert processes[1 - killed].returncode not in (0, None)
  # Our own line where the collective operation fails, or JAX's where a heartbeat is missed before that.
  assert re.search("another process is gone|another task died|stopped sending heartbeats", errors), errors
  assert checkpoints.latest_step(tmp_path) is not None


@pytest.mark.slow
@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--num_processes=2"], "--num_processes: needs --coordinator=HOST:PORT"),
    (["--coordinator=127.0.0.1:1", "--num_processes=2"], "--coordinator: needs --process_id too"),
  ],
)
def test_half_a_connection_is_said(start, tmp_path, flags, message):
  process = start(tmp_path, *flags)
  _, errors = process.communicate(timeout=120)
  assert process.returncode == 1
  assert errors.strip().splitlines()[-1].startswith(f"meta_train.py: {message}")
