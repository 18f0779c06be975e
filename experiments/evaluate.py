"""Compares trained optimizers with tuned baselines on held-out tasks.

    python experiments/evaluate.py --optimizer=runs/digits

On tasks of the family that the (first) optimizer was trained on, or of another one, as with
`--config=experiments/configs/mnist.py`. Writes comparison.json, comparison.md and comparison.png to `--output`, which
is the folder `evaluation` beside the optimizer unless told otherwise.
"""

import sys
from pathlib import Path

from absl import app, flags, logging

from lopt import configuration, evaluation, report, trained
from lopt.outer import parallel

OPTIMIZER = flags.DEFINE_list(
  "optimizer", None, "Trained optimizers: files or work directories, by commas.", required=True
)
CONFIG = configuration.define_flag("config", None, "Take the tasks from this configuration instead.")
OUTPUT = flags.DEFINE_string("output", None, "Folder of the results.")
NUM_TASKS = flags.DEFINE_integer("num_tasks", None, "Held-out tasks; by default what the configuration says.", 1)
NUM_SEEDS = flags.DEFINE_integer("num_seeds", None, "Runs of each task; likewise.", 1)
NUM_STEPS = flags.DEFINE_integer("num_steps", None, "Inner steps of each run; likewise.", 1)
SEED = flags.DEFINE_integer("seed", None, "Which tasks and runs; likewise.", 0)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument: {argv[1]}")
  logging.set_verbosity(logging.WARNING)
  parallel.setup()
  paths = [Path(path) for path in OPTIMIZER.value]
  optimizers = {_name(path): trained.load(path) for path in paths}
  config = configuration.plain(CONFIG.value) if CONFIG.value else optimizers[_name(paths[0])].config
  given = {"num_tasks": NUM_TASKS.value, "num_seeds": NUM_SEEDS.value, "num_steps": NUM_STEPS.value}
  settings = config["evaluation"] | {name: value for name, value in given.items() if value is not None}
  family = configuration.build("tasks", config["task"], where="config.task")
  comparison = evaluation.compare(
    family,
    {name: (optimizer.architecture, optimizer.theta) for name, optimizer in optimizers.items()},
    seed=config["seed"] if SEED.value is None else SEED.value,
    progress=lambda stage: print(f"evaluation: {stage}", flush=True),
    **settings,
  )
  beside = paths[0] if paths[0].is_dir() else paths[0].parent
  folder = Path(OUTPUT.value) if OUTPUT.value else beside / "evaluation"
  report.write(comparison, folder)
  print(f"\n{report.table(comparison)}\n")
  for name in optimizers:
    print(report.verdict(comparison, name))
  print(f"Table, numbers and curves are in {folder}.")


def _name(path: Path) -> str:
  """What an optimizer is called in tables and legends: its run."""
  return path.name if path.is_dir() or path.name != trained.FILENAME else path.absolute().parent.name


if __name__ == "__main__":
  try:
    app.run(main, flags_parser=configuration.parse_flags)
  except (configuration.ConfigError, trained.LoadError, OSError) as error:
    sys.exit(f"evaluate.py: {error}")
