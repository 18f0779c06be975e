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
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from absl import app, flags, logging
from tqdm import tqdm

from lopt import base, checks, configuration, inner_training
from lopt.evaluation import held_out, inner_runs, pictures, report
from lopt.outer import final_loss, late_losses, meta_parameters, meta_training, mixture, parallel
from lopt.runs import checkpoints, files, interruption, lock, tracking, trained

CONFIG = configuration.define_flag("config", str(Path(__file__).parent / "configs" / "digits.py"), "What to run.")
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

Section = Mapping[str, Any]


class Experiment(NamedTuple):
  """A configuration, built."""

  families: dict[str, tuple[base.TaskFamily, float]]  # with their weights in the meta-objective
  architecture: base.LearnedOptimizer  # of the whole θ
  optimizer: base.LearnedOptimizer  # of what is trained of it
  whole: Callable[[base.Theta], base.Theta]  # adds the part of θ that is not trained
  trainer: meta_training.Trainer
  seed: int
  num_outer_steps: int
  periodic_evaluation: dict[str, int]
  evaluation: dict[str, Any]
  checkpoint: dict[str, int]


def build(
  *,
  seed: int,
  num_outer_steps: int,
  log_every: int,
  meta_loss: Literal["train", "validation"],
  objective: Literal["mean_loss", "final_loss"],
  architecture: Section,
  task: Section,
  horizon: Section,
  estimator: Section,
  outer_optimizer: Section,
  periodic_evaluation: Section,
  evaluation: Section,
  checkpoint: Section,
  initial: str | None = None,
  trainable: tuple[str, ...] = (),
  late_power: float = 0.0,
  precision: inner_training.Precision = "float32",
  loss_cap: float | None = None,
  log_floor: float | None = None,
  step_spread: float = 1.0,
  balance: bool = False,
) -> Experiment:
  """Makes of a configuration all that it names, so that whatever is wrong with it shows before any work starts."""
  checks.counts(num_outer_steps=num_outer_steps, log_every=log_every)
  if not 0 <= seed < 2**32:
    raise ValueError(f"seed: must be in 0..{2**32 - 1}, not {seed}")
  if late_power and objective == "final_loss":  # which is a sum of differences that weights would spoil
    raise ValueError(f"late_power: must be 0 where objective is 'final_loss', not {late_power}")
  sections = {
    "periodic_evaluation": configuration.call(_periodic, periodic_evaluation, where="config.periodic_evaluation"),
    "evaluation": configuration.call(_comparison, evaluation, where="config.evaluation"),
    "checkpoint": configuration.call(_checkpoint, checkpoint, where="config.checkpoint"),
  }
  multiples = {
    "num_outer_steps": num_outer_steps,
    "periodic_evaluation.every": sections["periodic_evaluation"]["every"],
    "checkpoint.every": sections["checkpoint"]["every"],
  }
  for name, steps in multiples.items():
    if steps % log_every:
      raise ValueError(f"{name}: must be a multiple of log_every={log_every}, not {steps}")
  updates = configuration.call(
    meta_training.outer_optimizer, outer_optimizer, num_outer_steps, where="config.outer_optimizer"
  )
  horizons = configuration.call(inner_training.log_uniform_horizon, horizon, where="config.horizon")
  optimizer = full = configuration.build("architectures", architecture, where="config.architecture")
  whole = lambda theta: theta
  if initial is not None or trainable:
    optimizer, whole = meta_parameters.start_from(optimizer, first_theta(optimizer, initial, seed), trainable)
  families = configuration.task_families(task, where="config.task")

  def gradients_of(family: base.TaskFamily) -> base.GradientEstimator:
    problem = inner_training.build(
      family,
      optimizer,
      horizon=horizons,
      meta_loss=meta_loss,
      precision=precision,
      loss_cap=loss_cap,
      log_floor=log_floor,
      step_spread=step_spread,
    )
    problem = final_loss.wrap(problem) if objective == "final_loss" else problem
    problem = late_losses.wrap(problem, late_power) if late_power else problem
    return configuration.build("outer", estimator, problem, where="config.estimator")

  estimators = {name: gradients_of(family) for name, (family, _) in families.items()}
  gradients = next(iter(estimators.values()))
  if len(estimators) > 1:
    weights = {name: weight for name, (_, weight) in families.items()}
    gradients = mixture.combine(estimators, weights, balance=parallel.mean if balance else None)
  trainer = meta_training.build(gradients, optimizer.init, updates, seed=seed, steps_per_call=log_every)
  return Experiment(families, full, optimizer, whole, trainer, seed, num_outer_steps, **sections)


def first_theta(optimizer: base.LearnedOptimizer, initial: str | None, seed: int) -> base.Theta:
  """θ of the trained optimizer `initial`, or drawn.

  Raises:
    ConfigError: There is no such trained optimizer, or it is of another architecture.
  """
  if initial is None:
    return optimizer.init(meta_training.keys(seed).theta)
  try:
    return trained.load(initial, optimizer).theta
  except trained.LoadError as error:
    raise configuration.ConfigError(f"config.initial: {error}") from error


def _periodic(*, every: int, num_tasks: int, num_seeds: int, num_steps: int) -> dict[str, int]:
  return _at_least_one(every=every, num_tasks=num_tasks, num_seeds=num_seeds, num_steps=num_steps)


def _comparison(*, num_tasks: int, num_seeds: int, num_steps: int) -> dict[str, int]:
  return _at_least_one(num_tasks=num_tasks, num_seeds=num_seeds, num_steps=num_steps)


def _checkpoint(*, every: int, keep: int) -> dict[str, int]:
  return _at_least_one(every=every, keep=keep)


def _at_least_one(**counts: int) -> dict[str, int]:
  checks.counts(**counts)
  return counts


def claim(workdir: Path, config: Section) -> None:
  """Writes the configuration into a fresh work directory, or checks that the one there is the same.

  Raises:
    ConfigError: The work directory belongs to a run of another configuration.
  """
  path = workdir / "config.json"
  if not path.exists():
    if checkpoints.latest_step(workdir) is not None:
      raise configuration.ConfigError(f"{workdir}: has checkpoints and no config.json; use another --workdir")
    files.write_atomically(path, json.dumps(config, indent=2) + "\n")
    return
  try:
    there = json.loads(path.read_text("utf-8"))
  except ValueError as error:
    raise configuration.ConfigError(f"{path}: not JSON ({error}); use another --workdir") from error
  if different := configuration.difference(there, config):
    more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
    raise configuration.ConfigError(
      f"{workdir}: is the work directory of another configuration: {different[0]}{more}; use another --workdir"
    )


def meta_train(
  experiment: Experiment,
  workdir: Path,
  tracker: tracking.Tracker,
  first_step: int,
  restored: meta_training.MetaState | None,
) -> base.Theta:
  """Runs the outer loop from `first_step` to its end, with a progress bar, and returns θ."""
  trainer = experiment.trainer

  def save(step: int, state: meta_training.MetaState) -> None:
    saved = trainer.save(state)  # with the parts of all processes
    if parallel.is_first():
      checkpoints.save(workdir, step, saved, keep=experiment.checkpoint["keep"])

  options = dict(experiment.periodic_evaluation)
  evaluation_every = options.pop("every")
  metrics_of = {
    name: inner_runs.build_metrics(family, experiment.optimizer, seed=experiment.seed, **options)
    for name, (family, _) in experiment.families.items()
  }
  total_weight = sum(weight for _, weight in experiment.families.values())

  def evaluate(step: int, state: meta_training.MetaState) -> None:
    metrics: dict[str, float] = {}
    for name, (_, weight) in experiment.families.items():
      for measure, value in metrics_of[name](state.theta).items():
        metrics[measure] = metrics.get(measure, 0.0) + weight / total_weight * value
        if len(experiment.families) > 1:
          metrics[f"{measure}/{name}"] = value
    tracker.log(step, {f"evaluation/{name}": value for name, value in metrics.items()})
    if not silent:
      bar.write(
        f"outer step {step}: mean training loss {metrics['mean_loss']:.4f} on evaluation tasks", file=sys.stderr
      )

  total = experiment.num_outer_steps
  silent = not parallel.is_first()
  with tqdm(
    total=total, initial=first_step, unit="step", desc="meta-training", dynamic_ncols=True, disable=silent
  ) as bar:

    def progress(steps: int, metrics: Mapping[str, float]) -> None:
      bar.set_postfix_str(
        f"meta-loss {metrics['meta_loss']:.4f}, {metrics['inner_steps_per_second']:,.0f} inner steps/s"
        + (f", NOTHING LEARNED for {metrics['dead_steps']:.0f} steps" if metrics["dead_steps"] else ""),
        refresh=False,
      )
      bar.update(steps)

    if restored is not None:
      state = trainer.load(restored)
    else:
      state = trainer.init()
      evaluate(0, state)
    state = meta_training.run(
      trainer,
      state,
      first_step,
      total,
      record=tracker.log,
      periodic=[
        meta_training.Every(evaluation_every, evaluate),
        meta_training.Every(experiment.checkpoint["every"], save, when_interrupted=True),
      ],
      progress=progress,
      max_dead_steps=MAX_DEAD_STEPS.value or None,
    )
  return experiment.whole(state.theta)


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
  if len(argv) > 1:
    raise configuration.ConfigError(f"unexpected argument: {argv[1]}")
  logging.set_verbosity(logging.WARNING)
  parallel.setup()
  connect()
  config, workdir = configuration.plain(CONFIG.value), Path(WORKDIR.value)
  if parallel.is_first():
    lock.check(workdir)  # before what takes long
  experiment = configuration.call(build, config, where="config")
  with lock.hold(workdir) if parallel.is_first() else contextlib.nullcontext():
    work(experiment, config, workdir)


def work(experiment: Experiment, config: Section, workdir: Path) -> None:
  """All of a run but its preparation, in a work directory that belongs to this process."""
  saved_like, latest = experiment.trainer.saved_like, None
  if parallel.is_first():
    files.remove_partial(workdir)
    claim(workdir, config)
    # Before tracking begins: a damaged checkpoint should not leave a run behind.
    latest = checkpoints.restore_latest(workdir, saved_like)
  first_step = parallel.of_first(-1 if latest is None else latest[0])
  restored = (
    latest[1] if latest else checkpoints.restore(workdir, saved_like, first_step) if first_step >= 0 else None
  )
  resume_step = first_step if first_step >= 0 else None
  try:
    tracker = tracking.nothing()
    if parallel.is_first():
      tracker = tracking.start(workdir, config, wandb_mode=WANDB.value, resume_step=resume_step)
  except ValueError as error:
    raise configuration.ConfigError(str(error)) from error
  try:
    complete(experiment, config, workdir, tracker, max(first_step, 0), restored)
  finally:
    tracker.finish()


def complete(
  experiment: Experiment,
  config: Section,
  workdir: Path,
  tracker: tracking.Tracker,
  first_step: int,
  restored: meta_training.MetaState | None,
) -> None:
  """Meta-trains, exports, compares and tells."""
  theta = meta_train(experiment, workdir, tracker, first_step, restored)
  if not parallel.is_first():
    return
  path = workdir / trained.FILENAME
  trained.export(path, theta, config, outer_steps=experiment.num_outer_steps)
  options = {"seed": experiment.seed, "progress": lambda stage: print(f"evaluation: {stage}", flush=True)}
  options |= experiment.evaluation
  seeds = inner_runs.seeds_of_families(options.pop("seed"), experiment.families)
  comparisons = {
    name: held_out.compare(family, {"learned": (experiment.architecture, theta)}, seed=seeds[name], **options)
    for name, (family, _) in experiment.families.items()
  }
  picture = report.write_all(comparisons, workdir)
  records = [json.loads(line) for line in (workdir / tracking.METRICS).read_text("utf-8").splitlines()]
  files.write_atomically(workdir / "training.png", pictures.png(pictures.meta_training_curves(records)))
  tracker.log_image(experiment.num_outer_steps, "comparison", picture)
  print(f"\n{report.table_of_all(comparisons)}\n")
  print(f"{report.verdict_of_all(comparisons, 'learned')} Curves: {picture}")
  if gained := tracking.gain(records):
    print(gained)
  print(f'The trained optimizer is {path}; use it with lopt.load("{path}")(num_steps=...).')


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


if __name__ == "__main__":
  AGAIN = "the same command continues from the last checkpoint"
  try:
    with interruption.immediate("stopped by SIGTERM"):
      app.run(run, flags_parser=configuration.parse_flags)
  except (
    configuration.ConfigError,
    checkpoints.CheckpointError,
    FloatingPointError,
    lock.LockedError,
    OSError,
  ) as error:
    sys.exit(f"meta_train.py: {error}")
  except KeyboardInterrupt as error:
    print(f"\nmeta_train.py: {str(error) or 'interrupted'}; {AGAIN}", file=sys.stderr, flush=True)
    sys.exit(error.exit_code if isinstance(error, interruption.InterruptedRun) else 130)
