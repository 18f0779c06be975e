import asyncio
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint import future

from lopt.runs import checkpoints
from lopt.runs.checkpoints import CheckpointError

ROOT = Path(__file__).parent.parent.parent


def make_state(seed: int = 0) -> dict[str, Any]:
  """Like that of a meta-training run: θ, the outer optimizer's and an estimator's state."""
  rng = np.random.default_rng(seed)
  theta = {"mlp/~/linear_0": {"w": rng.normal(size=(19, 32)).astype(np.float32), "b": jnp.zeros(32)}}
  return {
    "theta": theta,
    "optimizer": optax.adamw(1e-3).init(theta),
    "particles": (jnp.arange(12, dtype=jnp.int32).reshape(4, 3), np.uint32(2**32 - 1)),
    "odd": np.array([np.nan, -np.nan, -0.0, np.inf, 1e-45], np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "step": np.int32(seed),
  }


def assert_identical(actual: Any, expected: Any) -> None:
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert type(a) is np.ndarray
    assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, np.asarray(b).tobytes())


def test_a_state_comes_back_bit_for_bit(tmp_path):
  state = make_state()
  checkpoints.save(tmp_path, 7, state)
  assert checkpoints.latest_step(tmp_path) == 7
  assert_identical(checkpoints.restore(tmp_path, state), state)
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
  assert_identical(checkpoints.restore(tmp_path, like), state)


def test_a_state_of_a_single_array_comes_back(tmp_path):
  checkpoints.save(tmp_path, 0, np.arange(3))
  assert_identical(checkpoints.restore(tmp_path, np.zeros(3, int)), np.arange(3))


def test_arrays_spread_over_devices_come_back_on_the_host(tmp_path):
  mesh = jax.make_mesh((4,), ("particles",), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("particles"))
  state = {"xi": jax.device_put(jnp.arange(8.0).reshape(8, 1), sharding)}
  checkpoints.save(tmp_path, 0, state)
  assert_identical(checkpoints.restore(tmp_path, state), state)


def test_the_newest_are_kept(tmp_path):
  assert checkpoints.latest_step(tmp_path) is None
  for step in (0, 5, 10, 100):
    checkpoints.save(tmp_path, step, make_state(step), keep=2)
  assert sorted(os.listdir(tmp_path / "checkpoints")) == ["10", "100"]
  assert checkpoints.latest_step(tmp_path) == 100
  assert_identical(checkpoints.restore(tmp_path, make_state()), make_state(100))
  assert_identical(checkpoints.restore(tmp_path, make_state(), step=10), make_state(10))
  with pytest.raises(CheckpointError, match=r"checkpoints/50: .*checkpoints/100 is as new or newer"):
    checkpoints.save(tmp_path, 50, make_state())


def test_no_checkpoint(tmp_path):
  with pytest.raises(CheckpointError, match=r"checkpoints: no checkpoint$"):
    checkpoints.restore(tmp_path, make_state())
  checkpoints.save(tmp_path, 1, make_state())
  with pytest.raises(CheckpointError, match=r"checkpoints: no checkpoint 2$"):
    checkpoints.restore(tmp_path, make_state(), step=2)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"more": np.zeros(2, np.float32)}, r"state\['more'\] is absent in the checkpoint and float32\[2\] in this run"),
    ({"step": np.zeros(2, np.int32)}, r"state\['step'\] is int32\[\] in the checkpoint and int32\[2\] in this run"),
    ({"step": np.float32(0)}, r"state\['step'\] is int32\[\] in the checkpoint and float32\[\] in this run"),
    (
      {"theta": {"lstm": {"w": np.zeros(3)}}},
      r"state\['theta'\]\['lstm'\]\['w'\] is absent in the checkpoint and float64\[3\] in this run",
    ),
    ({"optimizer": ()}, r"state\['optimizer'\]\[0\]\.count is int32\[\] in the checkpoint and absent in this run"),
  ],
)
def test_a_foreign_checkpoint_is_refused(tmp_path, change, message):
  checkpoints.save(tmp_path, 3, make_state())
  with pytest.raises(CheckpointError, match=f"checkpoints/3: {message}; use the configuration") as error:
    checkpoints.restore(tmp_path, {**make_state(), **change})
  assert "\n" not in str(error.value)


def test_every_kind_of_damage_is_noticed_or_harmless(tmp_path, capfd):
  """Every file of a checkpoint is truncated, emptied, deleted, and has a bit flipped."""
  state = {"w": np.arange(100, dtype=np.float32), "empty": np.zeros((0, 3), np.float32)}
  checkpoints.save(tmp_path, 1, state)
  checkpoints.save(tmp_path, 2, state)
  noticed = 0
  for path in [path for path in (tmp_path / "checkpoints" / "2").rglob("*") if path.is_file()]:
    data = path.read_bytes()
    middle = len(data) // 2
    for damaged in (data[:middle], b"", None, data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]):
      path.unlink(missing_ok=True)
      if damaged is not None:
        path.write_bytes(damaged)
      try:
        restored, message = checkpoints.restore(tmp_path, state), None
      except CheckpointError as error:
        restored, message = None, str(error)
      if message is None:
        assert_identical(restored, state)
      else:
        noticed += 1
        assert re.fullmatch(r".*checkpoints/2: damaged: .*; delete it to go on from step 1", message)
    path.write_bytes(data)
  assert noticed >= 12  # four of each: the manifest, Orbax's metadata, TensorStore's index and data
  assert capfd.readouterr().err == ""
  assert_identical(checkpoints.restore(tmp_path, state), state)
  shutil.rmtree(tmp_path / "checkpoints" / "2")  # the remedy
  assert_identical(checkpoints.restore(tmp_path, state), state)


SAVE_IN_A_LOOP = """
  import sys
  import numpy as np
  from lopt.runs import checkpoints
  workdir, size = sys.argv[1], int(sys.argv[2])
  first = (checkpoints.latest_step(workdir) or 0) + 1
  for step in range(first, 10**6):
    print(step, flush=True)
    checkpoints.save(workdir, step, {"a": np.full((size,), step, np.int32), "b": np.int32(step)}, keep=2)
"""


def save_in_a_loop(workdir: Path, size: int) -> subprocess.Popen[str]:
  code = textwrap.dedent(SAVE_IN_A_LOOP)
  command = [sys.executable, "-c", code, str(workdir), str(size)]
  return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_kill_at_any_time_leaves_the_last_checkpoint(tmp_path):
  size = 300_000
  like = {"a": np.zeros(size, np.int32), "b": np.int32(0)}
  partial = latest = 0
  for attempt in range(5):
    with save_in_a_loop(tmp_path, size) as process:
      assert process.stdout is not None
      step = [int(process.stdout.readline()) for _ in range(3)][-1]
      # From the start of a save to its end and beyond.
      with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.02 * attempt + 0.005)
      os.kill(process.pid, signal.SIGKILL)
    found = checkpoints.latest_step(tmp_path)
    assert found is not None
    assert found >= step - 1 > latest
    latest = found
    partial += any(not path.name.isdecimal() for path in (tmp_path / "checkpoints").iterdir())
    assert_identical(
      checkpoints.restore(tmp_path, like), {"a": np.full(size, latest, np.int32), "b": np.array(latest, np.int32)}
    )
  assert partial > 0  # or else this tested nothing
  checkpoints.save(tmp_path, latest + 1, like, keep=2)
  assert sorted(os.listdir(tmp_path / "checkpoints")) == sorted([str(latest), str(latest + 1)])


def test_a_full_disk_is_named_and_leaves_earlier_checkpoints(tmp_path):
  """A limit on the size of files stands in for a full disk."""
  small = {"a": np.zeros(10, np.int32), "b": np.int32(0)}
  checkpoints.save(tmp_path, 1, small)
  code = textwrap.dedent("""
    import resource, sys
    import numpy as np
    from lopt.runs import checkpoints
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
    noise = np.random.default_rng(0).integers(2**31, size=300_000, dtype=np.int32)
    checkpoints.save(sys.argv[1], 2, {"a": noise, "b": np.int32(2)})
  """)
  command = [sys.executable, "-c", code, str(tmp_path)]
  result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert result.stderr.startswith("Traceback")  # of Python, with nothing from Orbax before it
  # Not always the last line: a TensorStore thread that is still writing may complain that the event loop is gone.
  (line,) = (line for line in result.stderr.splitlines() if "CheckpointError: " in line)
  assert f"CheckpointError: {tmp_path}/checkpoints/2: cannot be written: " in line
  assert line.endswith("earlier checkpoints are intact")
  assert_identical(checkpoints.restore(tmp_path, small), {"a": small["a"], "b": np.array(0, np.int32)})
  checkpoints.save(tmp_path, 2, small)
  assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2"]


def test_a_save_that_fails_waits_for_what_it_began(tmp_path, monkeypatch, caplog):
  """A thread of Orbax's that outlives it would complain, with a traceback, that its folder is gone; the error is the
  first one.
  """
  ended = []

  async def write():
    await asyncio.sleep(0.5)
    ended.append(True)
    raise OSError("the folder is gone")

  def save(*args, **options):
    future.CommitFutureAwaitingContractedSignals(write())
    raise OSError("No space left on device")

  monkeypatch.setattr(ocp.CheckpointManager, "save", save)
  with pytest.raises(CheckpointError, match="no space left on the disk"):
    checkpoints.save(tmp_path, 1, {"a": np.zeros(3)})
  assert ended
  assert not caplog.records


def test_a_damaged_checkpoint_imports_nothing(tmp_path):
  """Bits flipped anywhere, and names of classes in Orbax's metadata that are of a stranger."""
  state = {"w": np.arange(100, dtype=np.float32)}
  checkpoints.save(tmp_path, 1, state)
  checkpoints.restore(tmp_path, state)
  rng = np.random.default_rng(0)
  files = [path for path in (tmp_path / "checkpoints" / "1").rglob("*") if path.is_file() and path.stat().st_size]
  before, refused = set(sys.modules), 0
  for i in range(100):
    path = files[i % len(files)]
    good = path.read_bytes()
    bad = bytearray(good)
    bad[rng.integers(len(bad))] ^= 1 << rng.integers(8)
    path.write_bytes(good.replace(b"orbax", b"antigravity").replace(b"np.", b"this.") if i % 5 == 0 else bytes(bad))
    try:
      assert_identical(checkpoints.restore(tmp_path, state), state)
    except CheckpointError:
      refused += 1
    path.write_bytes(good)
  assert refused > 20
  assert set(sys.modules) == before


def cut_in_half(folder: Path) -> None:
  for path in [path for path in folder.rglob("*") if path.is_file()]:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_the_newest_that_is_whole_is_used(tmp_path, capfd):
  """Those that are damaged are put aside with a line each, and their steps can be saved again."""
  assert checkpoints.restore_latest(tmp_path, make_state()) is None
  for step in (1, 2, 3):
    checkpoints.save(tmp_path, step, make_state(step))
  for step in (2, 3):
    cut_in_half(tmp_path / "checkpoints" / str(step))
  found = checkpoints.restore_latest(tmp_path, make_state())
  assert found is not None
  assert found[0] == 1
  assert_identical(found[1], make_state(1))
  lines = capfd.readouterr().err.splitlines()
  assert len(lines) == 2
  assert re.fullmatch(r".*checkpoints/3: damaged: .*moved to .*damaged/3; going on from step 2\)", lines[0])
  assert re.fullmatch(r".*checkpoints/2: damaged: .*moved to .*damaged/2; going on from step 1\)", lines[1])
  assert sorted(os.listdir(tmp_path / "damaged")) == ["2", "3"]
  checkpoints.save(tmp_path, 2, make_state(2))
  assert checkpoints.latest_step(tmp_path) == 2


def test_where_none_is_whole_nothing_is_begun_anew(tmp_path):
  checkpoints.save(tmp_path, 1, make_state())
  cut_in_half(tmp_path / "checkpoints" / "1")
  for _ in range(2):
    with pytest.raises(CheckpointError, match=r"checkpoints/1: damaged: .*; delete it to go on from the start"):
      checkpoints.restore_latest(tmp_path, make_state())
  checkpoints.save(tmp_path, 2, {"x": np.zeros(2)})
  with pytest.raises(CheckpointError, match="is absent in the checkpoint"):  # foreign, and so left alone
    checkpoints.restore_latest(tmp_path, make_state())
  assert checkpoints.latest_step(tmp_path) == 2


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
  (tmp_path / "checkpoints").write_text("")
  with pytest.raises(CheckpointError, match="checkpoints: a file is where the folder of checkpoints should be"):
    checkpoints.restore_latest(tmp_path, make_state())


def test_a_clock_that_jumps_back_changes_nothing(tmp_path, monkeypatch):
  clock = itertools.count(2_000_000_000, -86_400)
  monkeypatch.setattr(time, "time", lambda: float(next(clock)))
  for step in (1, 2, 3):
    checkpoints.save(tmp_path, step, make_state(step), keep=2)
  found = checkpoints.restore_latest(tmp_path, make_state())
  assert found is not None
  assert found[0] == 3
  assert_identical(found[1], make_state(3))
  assert sorted(os.listdir(tmp_path / "checkpoints")) == ["2", "3"]
