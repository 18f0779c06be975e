"""What a run reports: always to `<workdir>/metrics.jsonl`, and to Weights & Biases where that is possible.

`metrics.jsonl` has one JSON object a line, such as {"step": 10, "meta_loss": 0.81}. JSON knows no NaN or infinity:
they are written as null.

Weights & Biases is an extra that never stands in the way: without credentials or a network the run is recorded
offline, in `<workdir>/wandb`, to be uploaded by `wandb sync`. It never prompts.
"""

import contextlib
import errno
import json
import math
import os
import re
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lopt.runs.files import explain, write_atomically
from lopt.signatures import ConfigError

METRICS = "metrics.jsonl"
MODES = ("auto", "online", "offline", "disabled")

TELLABLE = 2e-3
"""What the mean loss on a few tasks has to fall by, relatively, for an optimizer to be called better."""

_INIT_TIMEOUT = 20  # seconds to reach the W&B server at the start of a run
_FINISH_TIMEOUT = 60  # seconds to upload what is left at its end


class Tracker(NamedTuple):
  """Where a run's metrics go."""

  log: Callable[[int, Mapping[str, Any]], None]
  """`(step, metrics)`: records scalars, after `step` outer steps. Steps do not decrease."""
  log_image: Callable[[int, str, str | os.PathLike[str]], None]
  """`(step, name, path)`: records the image file `path`; only Weights & Biases keeps it."""
  finish: Callable[[], None]
  """Flushes and closes. Nothing can be logged after."""


def nothing() -> Tracker:
  """Tracks nothing: for all processes of a run but the first."""
  return Tracker(lambda step, metrics: None, lambda step, name, path: None, lambda: None)


def start(
  workdir: str | os.PathLike[str],
  config: Mapping[str, Any],
  *,
  wandb_mode: str = "auto",
  resume_step: int | None = None,
) -> Tracker:
  """Begins or resumes tracking.

  A resumed run continues the same Weights & Biases run (offline, a new folder for `wandb sync` has all of it, and the
  older one is moved to wandb/superseded), and its metrics.jsonl reads as if it had never been
  interrupted: records of steps after `resume_step`, which will be logged again, and a line that was cut off are
  dropped. So log the metrics of a step before its checkpoint is saved.

  Args:
    workdir: of the run.
    config: what to show as the run's configuration; JSON types only.
    wandb_mode: one of `MODES`. 'auto' is what the environment variable WANDB_MODE says; where it is not set, online
      if there are credentials (WANDB_API_KEY, `wandb login`), else offline.
    resume_step: outer step of the checkpoint that the run goes on from; None for a new run.

  Raises:
    ConfigError: unknown mode.
    OSError: metrics.jsonl cannot be written.
  """
  workdir = Path(workdir)
  mode = os.environ.get("WANDB_MODE", "auto") if wandb_mode == "auto" else wandb_mode
  mode = {"dryrun": "offline", "run": "online"}.get(mode, mode)  # W&B's older names
  if mode not in MODES:
    raise ConfigError(f"W&B mode: must be one of {', '.join(MODES)}, not {mode!r}")
  path = workdir / METRICS
  past = "" if resume_step is None else _records_until(path, resume_step)
  write_atomically(path, past)
  # Unbuffered: a line is the operating system's at once, survives the process, and whoever watches sees it.
  file = path.open("ab", buffering=0)
  run = None if mode == "disabled" else _start_wandb(workdir, config, mode, resumed=resume_step is not None)
  # W&B's own step is the number of a record's line. A server that has seen a run before says how many it has; the
  # others are sent again, as far as the run does not go through them again: no gap, and none twice.
  there, count = getattr(run, "step", 0), 0

  def to_wandb(step: int, values: Mapping[str, Any]) -> None:
    nonlocal run
    try:
      if run is not None and count >= there:
        run.log({"outer_step": step, **values}, step=count)
    except Exception as error:  # whatever it is, it is not worth the run
      _warn(f"logging failed, and is off from here on ({_reason(error)})")
      run = None

  for line in past.splitlines():
    record = json.loads(line)
    to_wandb(record.pop("step"), {name: math.nan if value is None else value for name, value in record.items()})
    count += 1

  def log(step: int, metrics: Mapping[str, Any]) -> None:
    nonlocal count
    values = {name: float(value) for name, value in metrics.items()}
    finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
    try:
      if os.fstat(file.fileno()).st_nlink == 0:
        raise OSError(errno.ENOENT, "the file was removed during the run")
      line = json.dumps({"step": int(step), **finite}, allow_nan=False).encode() + b"\n"
      while line:  # a disk that becomes full takes a part, and then raises
        line = line[file.write(line) :]
    except OSError as error:
      raise explain(error, path) from error
    to_wandb(int(step), values)
    count += 1

  def log_image(step: int, name: str, path: str | os.PathLike[str]) -> None:
    if run is not None:
      import wandb  # here, as it is slow to import and often not wanted

      to_wandb(step, {name: wandb.Image(os.fspath(path))})

  def finish() -> None:
    file.close()
    try:
      if run is not None:
        run.finish()
    except Exception as error:
      _warn(f"upload was not completed ({_reason(error)}); what is missing is in {workdir / 'wandb'}")

  return Tracker(log, log_image, finish)


def gain(records: Sequence[Mapping[str, Any]]) -> str:
  """What meta-training came to on the evaluation tasks, in a sentence; nothing if metrics do not say.

  Args:
    records: of metrics.jsonl, with `evaluation/mean_loss` before the first outer step and after the last.
  """
  losses = [record["evaluation/mean_loss"] for record in records if "evaluation/mean_loss" in record]
  if len(losses) < 2 or records[0].get("step") != 0:
    return ""
  first, last = (math.inf if loss is None else loss for loss in (losses[0], losses[-1]))
  dead = next((int(record["dead_steps"]) for record in reversed(records) if record.get("dead_steps") is not None), 0)
  text = (
    f"On the evaluation tasks the mean training loss was {first:.4g} before meta-training and is {last:.4g} after"
  )
  if not last < (1 - TELLABLE) * first:
    text += ": the trained optimizer is NO BETTER than the one it started from"
  if dead:
    text += f"; the last {dead} outer steps had nothing to learn from"
  return f"{text}."


def _records_until(path: Path, step: int) -> str:
  """The lines of a metrics.jsonl up to a step, without one that was cut off or is not such a record."""
  kept = []
  for line in path.read_text("utf-8", errors="replace").splitlines(keepends=True) if path.exists() else ():
    try:
      record = json.loads(line)
      numbers = all(value is None or isinstance(value, (int, float)) for value in record.values())
      if line.endswith("\n") and numbers and record["step"] <= step:
        kept.append(line)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
      continue
  return "".join(kept)


def _start_wandb(workdir: Path, config: Mapping[str, Any], mode: str, *, resumed: bool) -> Any:
  """The W&B run, online or else offline; None if neither can be."""
  try:
    import wandb  # here, as it is slow to import and often not wanted

    wandb.setup(wandb.Settings(silent=True))
    if mode != "offline" and not _has_credentials(wandb):
      if mode == "online":
        _warn("no credentials (run `wandb login`, or set WANDB_API_KEY): recording offline")
      mode = "offline"
    identity = workdir / "wandb_run_id"
    run_id = identity.read_text("utf-8").strip() if resumed and identity.exists() else ""
    if not re.fullmatch(r"[\w-]{1,64}", run_id, re.ASCII):  # a file that may be a stranger's names folders below
      run_id = secrets.token_hex(4)
      write_atomically(identity, run_id)
    for older in workdir.glob(f"wandb/offline-run-*-{run_id}"):  # the new one repeats what it has
      (workdir / "wandb" / "superseded").mkdir(exist_ok=True)
      older.rename(workdir / "wandb" / "superseded" / older.name)
  except Exception as error:
    _warn(f"cannot be used ({_reason(error)}): metrics go to metrics.jsonl only")
    return None
  for attempt in ("offline",) if mode == "offline" else ("online", "offline"):
    try:
      run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "lopt"),
        name=workdir.absolute().name,
        id=run_id,
        resume="allow",
        dir=workdir,
        config=dict(config),
        mode=attempt,
        settings=wandb.Settings(
          silent=True,
          console="off",
          init_timeout=_INIT_TIMEOUT,
          finish_timeout=_FINISH_TIMEOUT,
          finish_timeout_raises=True,
        ),
      )
      # Our own axis, because W&B drops what is logged for a step below its newest, as after a resumption.
      run.define_metric("outer_step")
      run.define_metric("*", step_metric="outer_step")
    except Exception as error:
      rest = "recording offline" if attempt == "online" else "metrics go to metrics.jsonl only"
      _warn(f"cannot start {attempt} ({_reason(error)}): {rest}")
      with contextlib.suppress(Exception):
        wandb.teardown()  # or else the run id stays in use
    else:
      return run
  return None


def _has_credentials(wandb: Any) -> bool:
  try:
    return wandb.login(prompt=False, verify=False)
  except Exception as error:
    _warn(f"credentials are not valid ({_reason(error)})")
    return False


def _warn(message: str) -> None:
  print(f"Weights & Biases: {message}", file=sys.stderr)


def _reason(error: Exception) -> str:
  return str(error).strip().partition("\n")[0] or type(error).__name__
