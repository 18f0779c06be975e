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
import functools
import shlex
import sys
from pathlib import Path

from absl import flags, logging

from lopt import command_line, configuration
from lopt.evaluation import baselines, evaluate, report, report_page, suites
from lopt.outer import parallel
from lopt.runs import lock, tracking, trained

OPTIMIZER = flags.DEFINE_list(
  "optimizer", None, "Trained optimizers: names, files or work directories, by commas.", required=True
)
CONFIG = command_line.define_flag(
  "config", None, "Take the tasks from this configuration instead.", folder=Path(__file__).parent / "configs"
)
SUITE = flags.DEFINE_list("suite", None, "Compare on these held-out suites instead, or on all but the large ones.")
BASELINES = flags.DEFINE_list("baselines", ["adamw", "muon"], "Functions of lopt/evaluation/baselines.py, or all.")
MODULES = flags.DEFINE_list("modules", [], "Modules of your own that the optimizers' files may name.")
OUTPUT = flags.DEFINE_string("output", None, "Folder of the results.")
CACHE = flags.DEFINE_string("cache", "runs/evaluation", "Folder of runs that were done; empty for none.")
TIMING = flags.DEFINE_boolean("timing", True, "Measure the time of a step; nothing else should run then.")
WANDB = flags.DEFINE_enum("wandb", "auto", tracking.MODES, "Weights & Biases, as in meta_train.py.")
NUM_TASKS = flags.DEFINE_integer("num_tasks", None, "Held-out tasks; by default what the configuration says.", 1)
NUM_SEEDS = flags.DEFINE_integer("num_seeds", None, "Runs of each task; by default what the configuration says.", 1)
NUM_STEPS = flags.DEFINE_integer(
  "num_steps", None, "Inner steps of each run; by default what the configuration says.", 1
)
SEED = flags.DEFINE_integer("seed", None, "Which tasks and runs; by default what the configuration says.", 0)


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.WARNING)
  parallel.setup()
  paths = OPTIMIZER.value
  if not paths:
    raise configuration.ConfigError("--optimizer: names none")
  names = [trained.name_of(path) for path in paths]
  if len(set(names)) < len(names):
    raise configuration.ConfigError(f"--optimizer: two would have the same name in tables: {', '.join(names)}")
  try:
    chosen = baselines.named(BASELINES.value)
  except ValueError as error:
    raise configuration.ConfigError(f"--{error}") from error
  optimizers = {name: trained.load(path, modules=MODULES.value) for name, path in zip(names, paths, strict=True)}
  folder = Path(OUTPUT.value) if OUTPUT.value else trained.folder_of(paths[0]) / "evaluation"
  if (folder / "checkpoints").exists():
    raise configuration.ConfigError(f"--output: {folder} is a work directory, whose metrics.jsonl it would replace")
  lock.check(folder)
  # All are built before the first runs, so that a missing data set is known at once.
  members = tasks(optimizers[names[0]])
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
  about = evaluate.about(optimizers, {"command": shlex.join(["python", *sys.argv]), "date": now})
  settings = {"num_tasks": NUM_TASKS.value, "num_seeds": NUM_SEEDS.value, "num_steps": NUM_STEPS.value}
  options = {"settings": {name: x for name, x in settings.items() if x is not None}, "baselines": chosen}
  options |= {"cache_folder": CACHE.value or None, "times": TIMING.value}
  options["progress"] = functools.partial(print, flush=True)
  pairs = {name: (x.architecture, x.theta) for name, x in optimizers.items()}
  with lock.hold(folder):
    compared = configuration.call(evaluate.compare, options, members, pairs, where="evaluation")
    path = report_page.write(compared, folder, about)
    tracker = tracking.start(folder, configuration.plain(about._asdict()), wandb_mode=WANDB.value)
    tracker.log(0, report.numbers(compared))
    tracker.log_image(0, "summary", folder / "summary.png")
    tracker.finish()
  everything = {f"{suite}: {name}": c for suite, found in compared.items() for name, c in found.items()}
  print(f"\n{report.table_of_all(everything)}\n")
  for suite, found in compared.items():
    print(*(f"{suite}: {report.verdict_of_all(found, name)}" for name in optimizers), sep="\n")
  print(f"The page is {path}.")


def tasks(optimizer: trained.TrainedOptimizer) -> dict[str, dict[str, suites.Member]]:
  """What to compare on, by suite and family."""
  if SUITE.value:
    if CONFIG.value:
      raise configuration.ConfigError("--suite: brings its own tasks; leave --config out")
    names = [x for x in suites.ALL if x not in suites.LARGE] if SUITE.value == ["all"] else SUITE.value
    return {name: suites.build(name, seed=SEED.value) for name in names}
  if CONFIG.value:  # which modules it names is the user's word; what stands in an optimizer's file is not
    chosen = suites.of_configuration(configuration.plain(CONFIG.value), seed=SEED.value)
  else:
    chosen = suites.of_configuration(optimizer.config, seed=SEED.value, modules=MODULES.value)
  return dict(list(chosen.items())[:1]) if NUM_STEPS.value else chosen  # one length, where it is given


def command() -> None:
  """What `lopt evaluate` and this script run."""
  command_line.run(main, name="evaluate.py", again="what baselines did so far is in --cache")


if __name__ == "__main__":
  command()
