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
    raise configuration.ConfigError(f"unexpected argument: {argv[1]}")
  logging.set_verbosity(logging.WARNING)
  parallel.setup()
  paths = [Path(path) for path in OPTIMIZER.value]
  if not paths:
    raise configuration.ConfigError("--optimizer: names no file")
  names = [_name(path) for path in paths]
  if len(set(names)) < len(names):
    raise configuration.ConfigError(f"--optimizer: two would have the same name in tables: {', '.join(names)}")
  optimizers = [trained.load(path) for path in paths]
  config = configuration.plain(CONFIG.value) if CONFIG.value else optimizers[0].config
  if missing := {"task", "evaluation", "seed"} - config.keys():
    raise configuration.ConfigError(
      f"{paths[0]}: its configuration has no {', '.join(sorted(missing))}; say which tasks with --config"
    )
  family = configuration.build("tasks", config["task"], where="config.task")
  folder = Path(OUTPUT.value) if OUTPUT.value else _folder(paths[0]) / "evaluation"
  folder.mkdir(parents=True, exist_ok=True)
  settings = {"num_tasks": NUM_TASKS.value, "num_seeds": NUM_SEEDS.value, "num_steps": NUM_STEPS.value}
  settings |= {"seed": SEED.value, "progress": lambda stage: print(f"evaluation: {stage}", flush=True)}
  comparison = configuration.call(
    evaluation.compare,
    {"seed": config["seed"], **config["evaluation"]} | {name: x for name, x in settings.items() if x is not None},
    family,
    {name: (x.architecture, x.theta) for name, x in zip(names, optimizers, strict=True)},
    where="config.evaluation",
  )
  report.write(comparison, folder)
  print(f"\n{report.table(comparison)}\n")
  for name in names:
    print(report.verdict(comparison, name))
  print(f"Table, numbers and curves are in {folder}.")


def _folder(path: Path) -> Path:
  return path.absolute() if path.is_dir() else path.absolute().parent


def _name(path: Path) -> str:
  """What an optimizer is called in tables and legends: its run."""
  return path.stem if path.is_file() and path.name != trained.FILENAME else _folder(path).name


if __name__ == "__main__":
  try:
    app.run(main, flags_parser=configuration.parse_flags)
  except (configuration.ConfigError, trained.LoadError, OSError) as error:
    sys.exit(f"evaluate.py: {error}")
