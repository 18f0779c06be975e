import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from lopt.runs import tracking

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch, tmp_path):
  """No credentials; W&B as a user has it, where conftest.py has switched it off."""
  import wandb

  wandb.teardown()  # of what another test of this process set up
  monkeypatch.delenv("WANDB_MODE")
  monkeypatch.setenv("HOME", str(tmp_path / "home"))


def records(workdir: Path) -> list[dict[str, Any]]:
  def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")

  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line, parse_constant=refuse) for line in lines]


def test_metrics_are_one_json_object_a_line(tmp_path):
  tracker = tracking.start(tmp_path, {}, wandb_mode="disabled")
  tracker.log(0, {"loss": 0.5, "jax": jnp.float32(2.0), "numpy": np.float64(3.0), "int": 4})
  assert records(tmp_path) == [{"step": 0, "loss": 0.5, "jax": 2.0, "numpy": 3.0, "int": 4.0}]  # flushed
  tracker.log(10, {"nan": float("nan"), "inf": -jnp.inf})
  tracker.finish()
  assert records(tmp_path)[1:] == [{"step": 10, "nan": None, "inf": None}]
  assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_new_run_begins_a_new_file(tmp_path):
  for value in (1, 2):
    tracker = tracking.start(tmp_path, {}, wandb_mode="disabled")
    tracker.log(0, {"x": value})
    tracker.finish()
  assert records(tmp_path) == [{"step": 0, "x": 2.0}]


@pytest.mark.parametrize("torn", ["", '{"step": 5, "x', '{"step": 3}', "\x00\x00\n", '{"ste\n', "[1]\n"])
def test_a_resumed_file_reads_as_if_never_interrupted(tmp_path, torn):
  whole, interrupted = tmp_path / "whole", tmp_path / "interrupted"
  tracker = tracking.start(whole, {}, wandb_mode="disabled")
  for step in range(6):
    tracker.log(step, {"x": step / 3})
  tracker.finish()

  tracker = tracking.start(interrupted, {}, wandb_mode="disabled")
  for step in range(5):  # killed after step 4, with a checkpoint of step 2
    tracker.log(step, {"x": step / 3})
  tracker.finish()
  with (interrupted / "metrics.jsonl").open("a") as file:
    file.write(torn)
  tracker = tracking.start(interrupted, {}, wandb_mode="disabled", resume_step=2)
  for step in range(3, 6):
    tracker.log(step, {"x": step / 3})
  tracker.finish()
  assert (interrupted / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_a_killed_run_loses_no_record(tmp_path):
  code = textwrap.dedent(f"""
    from lopt.runs import tracking
    tracker = tracking.start({str(tmp_path)!r}, {{}}, wandb_mode="disabled")
    for step in range(10**9):
      tracker.log(step, {{"x": step}})
      print(step, flush=True)
  """)
  with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
    assert process.stdout is not None
    for _ in range(100):
      process.stdout.readline()
    process.kill()
  assert [record["step"] for record in records(tmp_path)][:100] == list(range(100))


def test_without_credentials_the_run_is_offline_and_silent(tmp_path, capfd):
  """As on a machine where nobody has logged in; the resumed run has the same id."""
  workdir = tmp_path / "my-run"
  config = {"estimator": {"name": "pes", "sizes": [1, 2]}}
  tracker = tracking.start(workdir, config)
  tracker.log(0, {"x": 1.0, "bad": float("nan")})
  matplotlib.image.imsave(tmp_path / "image.png", np.zeros((4, 4)))
  tracker.log_image(0, "curve", tmp_path / "image.png")
  tracker.finish()
  tracker = tracking.start(workdir, config, resume_step=0)
  tracker.log(0, {"x": 1.0})
  tracker.finish()
  runs = sorted(path.name for path in (workdir / "wandb").glob("offline-run-*"))
  assert len(runs) == 1  # for `wandb sync`
  run_id = (workdir / "wandb_run_id").read_text()
  assert all(run_id in name.split("-") for name in runs), runs  # W&B may number those of one second
  assert list((workdir / "wandb").glob("superseded/*/files/media/images/curve*.png"))
  assert capfd.readouterr() == ("", "")

  tracking.start(workdir, config).finish()  # a new run in the same place
  assert (workdir / "wandb_run_id").read_text() != run_id


@pytest.mark.parametrize(("variable", "folders"), [("disabled", 0), ("offline", 1), ("dryrun", 1)])
def test_the_environment_decides_unless_told_otherwise(tmp_path, monkeypatch, variable, folders):
  monkeypatch.setenv("WANDB_MODE", variable)
  tracking.start(tmp_path / "auto", {}).finish()
  assert len(list(tmp_path.glob("auto/wandb/offline-run-*"))) == folders
  tracking.start(tmp_path / "told", {}, wandb_mode="disabled").finish()
  assert not (tmp_path / "told" / "wandb").exists()


def test_an_unknown_mode_is_an_error(tmp_path, monkeypatch):
  monkeypatch.setenv("WANDB_MODE", "onlin")
  with pytest.raises(ValueError, match="must be one of auto, online, offline, disabled, not 'onlin'"):
    tracking.start(tmp_path, {})


def test_online_without_credentials_does_not_prompt(tmp_path, capfd):
  tracking.start(tmp_path, {}, wandb_mode="online").finish()
  assert list(tmp_path.glob("wandb/offline-run-*"))
  error = capfd.readouterr().err
  assert error == "Weights & Biases: no credentials (run `wandb login`, or set WANDB_API_KEY): recording offline\n"


def test_without_a_network_the_run_goes_offline_soon(tmp_path, monkeypatch, capfd):
  """The server's address is a port of this machine where nothing listens."""
  monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
  monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
  monkeypatch.setattr(tracking, "_INIT_TIMEOUT", 2)
  begin = time.monotonic()
  tracker = tracking.start(tmp_path, {})
  tracker.log(0, {"x": 1.0})
  tracker.finish()
  assert time.monotonic() - begin < 20
  assert list(tmp_path.glob("wandb/offline-run-*"))
  assert records(tmp_path) == [{"step": 0, "x": 1.0}]
  error = capfd.readouterr().err
  assert error.startswith("Weights & Biases: cannot start online (")
  assert error.endswith("): recording offline\n")
  assert error.count("\n") == 1


def test_a_failure_of_wandb_does_not_end_the_run(tmp_path, monkeypatch, capfd):
  import wandb

  monkeypatch.setattr(wandb, "init", lambda **_: (_ for _ in ()).throw(RuntimeError("disk full\nand more")))
  tracker = tracking.start(tmp_path, {}, wandb_mode="offline")
  tracker.log(0, {"x": 1.0})
  tracker.finish()

  class Run:
    def define_metric(self, *_: Any, **__: Any) -> None: ...
    def log(self, _: Any, step: int) -> None:
      raise BrokenPipeError("the service is gone")

  monkeypatch.setattr(wandb, "init", lambda **_: Run())
  tracker = tracking.start(tmp_path, {}, wandb_mode="offline", resume_step=0)
  tracker.log(1, {"x": 2.0})
  tracker.log(2, {"x": 3.0})
  tracker.finish()
  assert [record["step"] for record in records(tmp_path)] == [0, 1, 2]
  assert capfd.readouterr().err.splitlines() == [
    "Weights & Biases: cannot start offline (disk full): metrics go to metrics.jsonl only",
    "Weights & Biases: logging failed, and is off from here on (the service is gone)",
  ]


def test_a_strangers_run_id_names_no_folder(tmp_path):
  workdir, outside = tmp_path / "run", tmp_path / "outside"
  outside.mkdir()
  (workdir / "wandb" / "offline-run-1-x").mkdir(parents=True)
  for stranger in ("x/../../../outside", "*", ""):
    (workdir / "wandb_run_id").write_text(stranger)
    tracking.start(workdir, {}, wandb_mode="offline", resume_step=0).finish()
    assert outside.exists()
    assert re.fullmatch("[0-9a-f]{8}", (workdir / "wandb_run_id").read_text())


@pytest.mark.parametrize("stranger", ["[" * 100_000, '{"step": 1, "meta_loss": "zz"}', "[1]", '{"step": "1"}'])
def test_lines_that_are_no_records_are_dropped(tmp_path, stranger):
  (tmp_path / "metrics.jsonl").write_text(f'{{"step": 0, "x": 1.0}}\n{stranger}\n{{"step": 2, "x": null}}\n')
  tracker = tracking.start(tmp_path, {}, wandb_mode="disabled", resume_step=2)
  tracker.log(3, {"x": 2.0})
  tracker.finish()
  assert [record["step"] for record in records(tmp_path)] == [0, 2, 3]


def test_what_was_gained_is_said_in_words():
  def records(*losses, dead=0.0):
    evaluations = [{"step": 10 * i, "evaluation/mean_loss": loss} for i, loss in enumerate(losses)]
    return [evaluations[0], {"step": 10, "meta_loss": 0.5, "dead_steps": dead}, *evaluations[1:]]

  text = "On the evaluation tasks the mean training loss was 0.9 before meta-training and is 0.5 after"
  assert tracking.gain(records(0.9, 2.0, 0.5)) == f"{text}."
  assert tracking.gain(records(0.5, 0.5)).endswith("is NO BETTER than the one it started from.")
  assert "is NO BETTER" in tracking.gain(records(2.443, 2.44))
  assert "is inf after: the trained optimizer is NO BETTER" in tracking.gain(records(0.5, None))
  assert tracking.gain(records(0.9, 0.5, dead=7.0)) == f"{text}; the last 7 outer steps had nothing to learn from."
  assert tracking.gain([]) == ""
  assert tracking.gain(records(0.9)) == ""
  assert tracking.gain(records(0.9, 0.5)[1:]) == ""


def test_a_folder_removed_during_the_run_is_noticed(tmp_path):
  tracker = tracking.start(tmp_path / "run", {}, wandb_mode="disabled")
  tracker.log(0, {"x": 1.0})
  shutil.rmtree(tmp_path / "run")
  with pytest.raises(OSError, match=r"cannot write .*run/metrics\.jsonl: the file was removed during the run"):
    tracker.log(1, {"x": 1.0})
  tracker.finish()


def offline_records(workdir: Path) -> list[Any]:
  """What `wandb sync` would send, read from W&B's file, which is a log in LevelDB's format."""
  from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

  (path,) = (workdir / "wandb").glob("offline-run-*/*.wandb")
  data, position, parts, found = path.read_bytes(), 7, b"", []  # a header of seven bytes
  while position + 7 <= len(data):
    if 32768 - position % 32768 < 7:  # no record begins at the end of a block
      position += 32768 - position % 32768
      continue
    length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
    parts += data[position + 7 : position + 7 + length]
    position += 7 + length
    if kind in (1, 4):  # whole, or the last part
      found.append(Record.FromString(parts))
      parts = b""
  return found


def offline_history(workdir: Path) -> list[dict[str, Any]]:
  """The metrics in W&B's file, once W&B, which does so in a process of its own, has written all of it."""
  deadline = time.monotonic() + 60
  while not (found := offline_records(workdir)) or found[-1].WhichOneof("record_type") != "exit":
    assert time.monotonic() < deadline
    time.sleep(0.1)
  history = [record.history.item for record in found if record.WhichOneof("record_type") == "history"]
  return [{item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items} for items in history]


def test_wandb_offline_killed_and_resumed_is_one_run_without_gap_or_double(tmp_path):
  """Killed by -9 after step 40 or so, with a checkpoint of step 20; the folder left for `wandb sync` has it all."""
  code = textwrap.dedent(f"""
    import sys
    from lopt.runs import tracking
    tracker = tracking.start({str(tmp_path)!r}, {{}}, wandb_mode="offline")
    for step in range(10**9):
      tracker.log(step, {{"x": step / 7, "bad": float("nan")}})
      print(step, flush=True)
      if step == 40:
        sys.stdin.read()
  """)
  pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
  pipes["env"] = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}  # one of its own
  with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, **pipes) as process:
    assert process.stdout is not None
    for _ in range(41):
      process.stdout.readline()
    process.kill()
  run_id = (tmp_path / "wandb_run_id").read_text()
  tracker = tracking.start(tmp_path, {}, wandb_mode="offline", resume_step=20)
  for step in range(21, 50):
    tracker.log(step, {"x": step / 7})
  tracker.finish()
  assert (tmp_path / "wandb_run_id").read_text() == run_id
  history = offline_history(tmp_path)
  assert [record["outer_step"] for record in history] == list(range(50))
  assert [record["_step"] for record in history] == list(range(50))
  np.testing.assert_allclose([record["x"] for record in history], np.arange(50) / 7)
  assert len(list(tmp_path.glob("wandb/superseded/offline-run-*"))) == 1


@pytest.mark.parametrize("on_server", [0, 3, 5, 8])
def test_wandb_online_gets_what_it_lacks_and_nothing_twice(tmp_path, monkeypatch, on_server):
  """A server that has the first few of the records up to the checkpoint, or some beyond it."""
  import wandb

  sent = []

  class Run:
    step = 0

    def define_metric(self, *_: Any, **__: Any) -> None: ...
    def finish(self) -> None: ...
    def log(self, values: Any, step: int) -> None:
      sent.append((step, values["outer_step"]))

  monkeypatch.setattr(wandb, "init", lambda **_: Run())
  tracker = tracking.start(tmp_path, {}, wandb_mode="offline")
  for step in range(0, 20, 2):
    tracker.log(step, {"x": 0.0})
  tracker.finish()
  assert sent == [(i, 2 * i) for i in range(10)]
  sent.clear()
  Run.step = on_server
  tracker = tracking.start(tmp_path, {}, wandb_mode="offline", resume_step=8)  # five records
  for step in range(10, 20, 2):
    tracker.log(step, {"x": 0.0})
  tracker.finish()
  assert sent == [(i, 2 * i) for i in range(on_server, 10)]


def test_no_key_is_in_any_file(tmp_path, monkeypatch, capfd):
  key = secrets.token_hex(20)
  monkeypatch.setenv("WANDB_API_KEY", key)
  tracker = tracking.start(tmp_path, {"seed": 1}, wandb_mode="offline")
  tracker.log(0, {"x": 1.0})
  tracker.finish()
  files = [path for path in tmp_path.rglob("*") if path.is_file()]
  assert len(files) > 5
  for path in files:
    assert key.encode() not in path.read_bytes(), path
  assert key not in "".join(capfd.readouterr())


@pytest.mark.slow
@pytest.mark.parametrize("comes_back", [True, False])
def test_a_network_that_goes_away_during_an_online_run(tmp_path, monkeypatch, capfd, comes_back):
  """A server of our own, killed while W&B's client sends to it."""
  import wandb

  with socket.create_server(("127.0.0.1", 0)) as probe:
    port = probe.getsockname()[1]
  received = tmp_path / "received.jsonl"
  command = [sys.executable, Path(__file__).with_name("wandb_server.py"), str(port), received]
  monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
  monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
  monkeypatch.setattr(tracking, "_FINISH_TIMEOUT", 60 if comes_back else 3)

  def serve() -> subprocess.Popen:
    server = subprocess.Popen(command)
    until(answers)
    return server

  def answers() -> bool:
    with socket.socket() as client:
      return client.connect_ex(("127.0.0.1", port)) == 0

  def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
      assert time.monotonic() < end
      time.sleep(0.1)

  def there() -> list[int]:
    lines = received.read_text().splitlines() if received.exists() else []
    return [json.loads(line)["outer_step"] for line in lines]

  server = serve()
  try:
    wandb.teardown()  # it reads the environment once
    tracker = tracking.start(tmp_path / "run", {})
    for step in range(4):
      tracker.log(step, {"x": 1.0})
    until(lambda: there() == [0, 1, 2])  # sent every 15 seconds, without the newest
    server.kill()
    server.wait()
    begin = time.monotonic()
    for step in range(4, 6):
      tracker.log(step, {"x": 1.0})
    assert time.monotonic() - begin < 1  # nobody waits for it
    if comes_back:
      time.sleep(1)  # in which it is missed
      server = serve()
    tracker.finish()
  finally:
    server.kill()
    server.wait()
    wandb.teardown()
  assert [record["step"] for record in records(tmp_path / "run")] == list(range(6))
  error = capfd.readouterr().err
  if comes_back:
    assert there() == list(range(6))
    assert error == ""
  else:
    assert error.startswith("Weights & Biases: upload was not completed (Timed out finishing run.); ")
    assert error.endswith(f"{tmp_path}/run/wandb\n")
    assert error.count("\n") == 1
