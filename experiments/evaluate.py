"""Compares trained optimizers with tuned baselines on held-out tasks.

    python experiments/evaluate.py --optimizer=runs/digits

On tasks of the families that the (first) optimizer was trained on; or of those of another configuration, as with
`--config=experiments/configs/mnist.py`; or of held-out suites:

    python experiments/evaluate.py --optimizer=runs/mixture --suite=architecture,horizon

Suites are in experiments/suites.py; `--suite=all` takes them one after the other. Writes comparison.json,
comparison.md and comparison.png to `--output` (for several families into a folder each, with a summary beside them),
which is the folder `evaluation` or `evaluation/<suite>` beside the optimizer unless told otherwise.
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags, logging

from lopt import base, configuration, evaluation, report, trained
from lopt.outer import parallel

OPTIMIZER = flags.DEFINE_list(
  "optimizer", None, "Trained optimizers: files or work directories, by commas.", required=True
)
CONFIG = configuration.define_flag("config", None, "Take the tasks from this configuration instead.")
SUITE = flags.DEFINE_list("suite", None, "Compare on these held-out suites instead, or on all.")
OUTPUT = flags.DEFINE_string("output", None, "Folder of the results.")
NUM_TASKS = flags.DEFINE_integer("num_tasks", None, "Held-out tasks; by default what the configuration says.", 1)
NUM_SEEDS = flags.DEFINE_integer("num_seeds", None, "Runs of each task; likewise.", 1)
NUM_STEPS = flags.DEFINE_integer("num_steps", None, "Inner steps of each run; likewise.", 1)
SEED = flags.DEFINE_integer("seed", None, "Which tasks and runs; likewise.", 0)

SUITES = configuration.plain(configuration.load(Path(__file__).with_name("suites.py")).get_config())


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
  folder = Path(OUTPUT.value) if OUTPUT.value else _folder(paths[0]) / "evaluation"
  pairs = {name: (x.architecture, x.theta) for name, x in zip(names, optimizers, strict=True)}
  if SUITE.value:
    if CONFIG.value:
      raise configuration.ConfigError("--suite: brings its own tasks; leave --config out")
    # All are built before the first runs, so that a missing data set is known at once.
    suites = {name: (members(name), folder / name) for name in chosen_suites(SUITE.value)}
    for name, (suite, into) in suites.items():
      print(f"\nsuite {name}")
      compare(suite, pairs, into)
    return
  config = configuration.plain(CONFIG.value) if CONFIG.value else optimizers[0].config
  if missing := {"task", "evaluation", "seed"} - config.keys():
    raise configuration.ConfigError(
      f"{paths[0]}: its configuration has no {', '.join(sorted(missing))}; say which tasks with --config or --suite"
    )
  families = configuration.task_families(config["task"], where="config.task")
  options = {"seed": config["seed"], **config["evaluation"]}
  compare({name: Member(family, options) for name, (family, _) in families.items()}, pairs, folder)


class Member(NamedTuple):
  """Tasks to compare on."""

  family: base.TaskFamily
  options: dict[str, Any]  # of `evaluation.compare`


def chosen_suites(names: list[str]) -> list[str]:
  """The names that `--suite` has, or all."""
  there = list(SUITES["suites"])
  if names == ["all"]:
    return there
  if unknown := [name for name in names if name not in there]:
    raise configuration.ConfigError(f"--suite: no {unknown[0]!r}; there are: {', '.join(there)}, all")
  return names


def members(suite: str) -> dict[str, Member]:
  """The families of a suite."""
  built = {}
  for name, member in SUITES["suites"][suite].items():
    section = dict(member)
    options = {**SUITES["evaluation"], "num_steps": section.pop("num_steps", SUITES["evaluation"]["num_steps"])}
    built[name] = Member(configuration.build("tasks", section, where=f"suites.{suite}.{name}"), options)
  return built


def compare(suite: dict[str, Member], optimizers: dict[str, Any], folder: Path) -> None:
  """Trains with all optimizers on all members of a suite, and reports."""
  settings = {"num_tasks": NUM_TASKS.value, "num_seeds": NUM_SEEDS.value, "num_steps": NUM_STEPS.value}
  settings = {name: x for name, x in (settings | {"seed": SEED.value}).items() if x is not None}
  folder.mkdir(parents=True, exist_ok=True)
  comparisons = {}
  for name, member in suite.items():
    title = f"{name}: " if len(suite) > 1 else ""
    comparisons[name] = configuration.call(
      evaluation.compare,
      member.options | settings | {"progress": lambda stage, title=title: print(f"{title}{stage}", flush=True)},
      member.family,
      optimizers,
      where="config.evaluation",
    )
  report.write_all(comparisons, folder)
  print(f"\n{report.table_of_all(comparisons)}\n")
  for name in optimizers:
    print(report.verdict_of_all(comparisons, name))
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
