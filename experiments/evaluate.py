"""Compares trained optimizers with tuned baselines on held-out tasks, and writes a page about it.

    python experiments/evaluate.py --optimizer=runs/digits

On tasks of the families that the (first) optimizer was trained on, with runs of the usual length and five times that;
or of those of another configuration, as with `--config=experiments/configs/mnist.py`; or of held-out suites:

    python experiments/evaluate.py --optimizer=runs/mixture --suite=architecture,horizon

Suites are in lopt/evaluation/suites.py; `--suite=all` is all of them. Writes report.html, report.json and summary.png
to `--output`, which is the folder `evaluation` beside the optimizer unless told otherwise.

Baselines are tuned for each task, with learning rates that are warmed up and decay to zero as those of learned
directions do; AdamW is always there. Learned directions are tuned likewise, and their θ = 0 too, which shows what was
learned. All runs are kept in `--cache`, so that another optimizer on the same tasks costs its own runs only.
"""

import datetime
import shlex
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from lopt import command_line, configuration
from lopt.evaluation import (
  baselines,
  comparison,
  evaluate,
  held_out,
  inner_runs,
  report,
  report_page,
  suites,
  timing,
)
from lopt.evaluation.suites import Member
from lopt.outer import parallel
from lopt.runs import interruption, lock, tracking, trained

OPTIMIZER = flags.DEFINE_list(
  "optimizer", None, "Trained optimizers: names, files or work directories, by commas.", required=True
)
CONFIG = command_line.define_flag("config", None, "Take the tasks from this configuration instead.")
SUITE = flags.DEFINE_list("suite", None, "Compare on these held-out suites instead, or on all.")
BASELINES = flags.DEFINE_list("baselines", ["adamw", "muon"], "Functions of lopt/evaluation/baselines.py, or all.")
MODULES = flags.DEFINE_list("modules", [], "Modules of your own that the optimizers' files may name.")
OUTPUT = flags.DEFINE_string("output", None, "Folder of the results.")
CACHE = flags.DEFINE_string("cache", "runs/evaluation", "Folder of runs that were done; empty for none.")
TIMING = flags.DEFINE_boolean("timing", True, "Measure the time of a step; nothing else should run then.")
WANDB = flags.DEFINE_enum("wandb", "auto", tracking.MODES, "Weights & Biases, as in meta_train.py.")
NUM_TASKS = flags.DEFINE_integer("num_tasks", None, "Held-out tasks; by default what the configuration says.", 1)
NUM_SEEDS = flags.DEFINE_integer("num_seeds", None, "Runs of each task; likewise.", 1)
NUM_STEPS = flags.DEFINE_integer("num_steps", None, "Inner steps of each run; likewise.", 1)
SEED = flags.DEFINE_integer("seed", None, "Which tasks and runs; likewise.", 0)

BEYOND = 5
"""How many times as long the runs are that show what becomes of an optimizer beyond its training horizon."""


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise configuration.ConfigError(f"unexpected argument: {argv[1]}")
  logging.set_verbosity(logging.WARNING)
  parallel.setup()
  paths = OPTIMIZER.value
  if not paths:
    raise configuration.ConfigError("--optimizer: names none")
  names = [_name(path) for path in paths]
  if len(set(names)) < len(names):
    raise configuration.ConfigError(f"--optimizer: two would have the same name in tables: {', '.join(names)}")
  chosen = _baselines()
  optimizers = {name: trained.load(path, modules=MODULES.value) for name, path in zip(names, paths, strict=True)}
  folder = Path(OUTPUT.value) if OUTPUT.value else _folder(paths[0]) / "evaluation"
  lock.check(folder)
  # All are built before the first runs, so that a missing data set is known at once.
  chosen_suites = held_out_suites(SUITE.value) if SUITE.value else own_tasks(optimizers[names[0]], paths[0])
  about = facts(optimizers)
  pairs = {name: (x.architecture, x.theta) for name, x in optimizers.items()}
  with lock.hold(folder):
    compared = {suite: compare(suite, members, pairs, chosen) for suite, members in chosen_suites.items()}
    path = report_page.write(compared, folder, about)
    track(compared, folder, about)
  everything = {f"{suite}: {name}": c for suite, members in compared.items() for name, c in members.items()}
  print(f"\n{report.table_of_all(everything)}\n")
  for suite, members in compared.items():
    print(*(f"{suite}: {report.verdict_of_all(members, name)}" for name in optimizers), sep="\n")
  print(f"The page is {path}.")


def held_out_suites(names: list[str]) -> dict[str, dict[str, Member]]:
  """The suites that `--suite` names."""
  if CONFIG.value:
    raise configuration.ConfigError("--suite: brings its own tasks; leave --config out")
  built = {name: suites.build(name) for name in (suites.ALL if names == ["all"] else names)}
  return {
    suite: {
      name: Member(members[name].family, {**members[name].options, "seed": seed})
      for name, seed in seeds(suites.DEFAULTS, members).items()
    }
    for suite, members in built.items()
  }


def own_tasks(optimizer: trained.TrainedOptimizer, path: str) -> dict[str, dict[str, Member]]:
  """The families of `--config`, or of what an optimizer was trained on; and these with longer runs."""
  config = configuration.plain(CONFIG.value) if CONFIG.value else optimizer.config
  if missing := {"task", "evaluation", "seed"} - config.keys():
    raise configuration.ConfigError(
      f"{path}: its configuration has no {', '.join(sorted(missing))}; say which tasks with --config or --suite"
    )
  # What --config names is the user's word; what stands in an optimizer's file is not.
  modules = None if CONFIG.value else MODULES.value
  families = configuration.task_families(config["task"], where="config.task", modules=modules)
  options = {"seed": config["seed"], **config["evaluation"]}
  own = {
    name: Member(families[name][0], {**options, "seed": seed}) for name, seed in seeds(options, families).items()
  }
  if NUM_STEPS.value:
    return {"held-out tasks": own}
  longer = {"num_steps": BEYOND * options["num_steps"]}
  beyond = {f"{name}, {BEYOND} times as long": Member(x.family, x.options | longer) for name, x in own.items()}
  return {"held-out tasks": own, "longer runs": beyond}


def seeds(options: dict[str, Any], names: Collection[str]) -> dict[str, int]:
  """Of each family: from what `--seed` says, or else these options."""
  return inner_runs.seeds_of_families(options["seed"] if SEED.value is None else SEED.value, names)


def compare(
  suite: str, members: dict[str, Member], optimizers: dict[str, Any], chosen: list[str]
) -> dict[str, comparison.Comparison]:
  """Trains with all optimizers on all members of a suite."""
  settings = {"num_tasks": NUM_TASKS.value, "num_seeds": NUM_SEEDS.value, "num_steps": NUM_STEPS.value}
  settings = {name: x for name, x in settings.items() if x is not None}
  compared = {}
  for name, member in members.items():

    def say(stage: str, name: str = name) -> None:
      print(f"{suite}: {name}: {stage}", flush=True)

    options = {"progress": say, "baseline_names": chosen, "cache_folder": CACHE.value or None}
    compared[name] = configuration.call(
      held_out.compare, member.options | settings | options, member.family, optimizers, where="config.evaluation"
    )
    if TIMING.value and len(compared) == 1:  # one family stands for its suite
      say("timing")
      compared[name] = timing.with_times(compared[name], member.family, optimizers)
  return compared


def facts(optimizers: dict[str, trained.TrainedOptimizer]) -> report_page.About:
  """What one has to know to repeat this."""
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
  return evaluate.about(optimizers, {"command": shlex.join(["python", *sys.argv]), "date": now})


def track(compared: dict[str, dict[str, comparison.Comparison]], folder: Path, about: report_page.About) -> None:
  """Sends the summaries and their picture to Weights & Biases, and to metrics.jsonl beside the page."""
  try:
    tracker = tracking.start(folder, configuration.plain(about._asdict()), wandb_mode=WANDB.value)
  except ValueError as error:
    raise configuration.ConfigError(str(error)) from error
  numbers = {}
  for suite, members in compared.items():
    for name, by_tuning in report.summaries(comparison.measure(members)).items():
      for tuning, s in by_tuning.items():
        where = f"{suite}/{name}/{tuning}"
        numbers |= {f"{where}/speed_up_over/{rival}": x.value for rival, x in s.speed_up.items()}
        numbers[f"{where}/relative_loss"] = s.relative_loss.value
        numbers |= {f"{where}/{x}": getattr(s, x) for x in ("mean_loss", "final_loss", "test_loss", "diverged")}
  tracker.log(0, numbers)
  tracker.log_image(0, "summary", folder / "summary.png")
  tracker.finish()


def _baselines() -> list[str]:
  try:
    return baselines.named(BASELINES.value)
  except ValueError as error:
    raise configuration.ConfigError(f"--{error}") from error


def _folder(optimizer: str) -> Path:
  """Where what belongs to an optimizer is: its work directory."""
  if optimizer in trained.pretrained():
    return Path("runs") / optimizer
  path = Path(optimizer).absolute()
  return path if path.is_dir() else path.parent


def _name(optimizer: str) -> str:
  """What an optimizer is called in tables and legends: its run."""
  path = Path(optimizer)
  return path.stem if path.is_file() and path.name != trained.FILENAME else _folder(optimizer).name


def command() -> None:
  """What `lopt evaluate` and this script run."""
  try:
    with interruption.immediate("stopped"):
      app.run(main, flags_parser=command_line.parse_flags)
  except (configuration.ConfigError, trained.LoadError, lock.LockedError, OSError) as error:
    sys.exit(f"evaluate.py: {error}")
  except KeyboardInterrupt as error:
    print("\nevaluate.py: interrupted; what baselines did so far is in --cache", file=sys.stderr, flush=True)
    sys.exit(error.exit_code if isinstance(error, interruption.InterruptedRun) else 130)


if __name__ == "__main__":
  command()
