"""Meta-trains a learned optimizer, then shows it beside tuned baselines on tasks that it never saw.

    python experiments/meta_train.py --config=experiments/configs/digits.py --workdir=runs/digits

Any architecture, task family and estimator: `--config=FILE:architecture=lstm,task=quadratic,estimator=es`; every
field of the configuration is a flag, such as `--config.estimator.sigma=0.02`. The same command continues a run that
was interrupted, and gives the same θ, bit for bit, as one that was not.

On several machines that share the work directory, the same command on each (under SLURM and on TPU pods JAX finds the
others by itself, with `--coordinator=auto`):

    python experiments/meta_train.py ... --coordinator=HOST:PORT --num_processes=4 --process_id=0  (to 3)

Writes to the work directory: optimizer.safetensors (the trained optimizer, for `lopt.load`), comparison.json,
comparison.md and comparison.png, training.png, metrics.jsonl, config.json, checkpoints/ and, unless disabled, wandb/.
"""

import contextlib
import os
import sys
from pathlib import Path

import jax
from absl import flags, logging

from lopt import command_line, configuration, experiment, running
from lopt.outer import parallel
from lopt.runs import checkpoints, lock

CONFIG = command_line.define_flag(
  "config",
  "digits",
  "What to run: a name in configs/, or the path of a file.",
  folder=Path(__file__).parent / "configs",
)
WORKDIR = flags.DEFINE_string("workdir", "runs/digits", "Where the run is kept, and continued from.")
WANDB = flags.DEFINE_enum(
  "wandb",
  "auto",
  ["auto", "online", "offline", "disabled"],
  "Weights & Biases: online when logged in, else an offline run; or as said.",
)

MAX_DEAD_STEPS = flags.DEFINE_integer(
  "max_dead_steps", 100, "Outer steps in a row without anything to learn from that end the run; 0: go on.", 0
)
COORDINATOR = flags.DEFINE_string("coordinator", None, "Several processes: host:port of process 0, or 'auto'.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many there are, unless 'auto'.", 1)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0, unless 'auto'.", 0)


def connect() -> None:
  """Joins the other processes, where there are any."""
  given = {"num_processes": NUM_PROCESSES.value, "process_id": PROCESS_ID.value}
  if COORDINATOR.value is None:
    if odd := [name for name, value in given.items() if value is not None]:
      raise configuration.ConfigError(f"--{odd[0]}: needs --coordinator=HOST:PORT, the same for all processes")
    return
  automatic = COORDINATOR.value == "auto"
  if not automatic and (missing := [name for name, value in given.items() if value is None]):
    raise configuration.ConfigError(f"--coordinator: needs --{missing[0]} too, unless it is 'auto'")
  try:
    parallel.connect(None if automatic else COORDINATOR.value, **given)
  except (RuntimeError, ValueError) as error:
    reason = " ".join(str(error).split())[:300]
    raise configuration.ConfigError(f"--coordinator={COORDINATOR.value}: no connection ({reason})") from error


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.WARNING)
  parallel.setup()
  connect()
  config, workdir = configuration.plain(CONFIG.value), Path(WORKDIR.value)
  if parallel.is_first():
    lock.check(workdir)  # before what takes long
  built = configuration.call(experiment.build, config, where="config")
  with lock.hold(workdir) if parallel.is_first() else contextlib.nullcontext():
    running.work(
      built, experiment.complete(config), workdir, wandb_mode=WANDB.value, max_dead_steps=MAX_DEAD_STEPS.value or None
    )


def run(argv: list[str]) -> None:
  """`main`, but that the death of another process ends this one, at once and with a clear message."""
  try:
    main(argv)
  except Exception as error:
    if not parallel.has_company():
      raise
    lost = isinstance(error, jax.errors.JaxRuntimeError)
    remedy = "another process is gone; the same commands continue from the last checkpoint" if lost else "stopped"
    print(f"\nmeta_train.py: {remedy} ({' '.join(str(error).split())[:300]})", file=sys.stderr, flush=True)
    os._exit(1)  # an orderly exit would wait for the others


def command() -> None:
  """What `lopt meta-train` and this script run."""
  again = "the same command continues from the last checkpoint"
  command_line.run(run, name="meta_train.py", again=again, errors=(checkpoints.CheckpointError, FloatingPointError))


if __name__ == "__main__":
  command()
