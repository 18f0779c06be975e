"""Runs of meta-training in a work directory: checkpoints, tracking, progress, and the comparison at the end.

A run that was interrupted goes on where it was when it is asked for again, from Python or by the script, and gives
the same θ, bit for bit, as one that was not.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from lopt import base, checks, configuration, experiment, signatures
from lopt.evaluation import comparison, held_out, inner_runs, pictures, report
from lopt.experiment import Experiment, Section
from lopt.outer import meta_training, parallel
from lopt.runs import checkpoints, files, lock, tracking, trained
from lopt.tasks import contract

OnStep = Callable[[int, Mapping[str, float]], None]


class Run(NamedTuple):
  """What meta-training made."""

  optimizer: trained.TrainedOptimizer
  """As `lopt.load(workdir)` gives it."""
  comparisons: dict[str, comparison.Comparison]
  """With tuned baselines on held-out tasks, by family."""
  workdir: Path

  def __repr__(self) -> str:
    return f"Run({self.optimizer}, in {self.workdir})"

  def _repr_markdown_(self) -> str:
    """What a notebook shows."""
    return report.table_of_all(self.comparisons)


def meta_train(
  families: base.TaskFamily | Sequence[base.TaskFamily] | Mapping[str, base.TaskFamily] | Section,
  architecture: base.LearnedOptimizer | Section | str = "tensor_mlp",
  *,
  workdir: str | Path,
  wandb: str = "disabled",
  max_dead_steps: int | None = 100,
  on_step: OnStep | None = None,
  **settings: Any,
) -> Run:
  """Meta-trains an optimizer and compares it with tuned baselines on held-out tasks.

      run = lopt.meta_train(family, "tensor_mlp", num_outer_steps=500, workdir="runs/mine")
      tx = run.optimizer(learning_rate=1e-2)

  Ctrl-C (or a notebook's stop button) saves a checkpoint and raises a KeyboardInterrupt; the same call goes on from
  there.

  Args:
    families: Of the tasks: one; several (a mixture), with names or without; or the section of a configuration.
    architecture: A name, which stands for the learned direction of that architecture; a section such as
      `{"name": "mlp", "hidden_sizes": (16,)}` or a LearnedOptimizer such as `lopt.architectures.mlp.build()`, which
      are taken as they are: without a direction, they decide on their step sizes themselves. The file of one that is
      not lopt's own is read by `lopt.load(workdir, architecture=...)`.
    workdir: Where the run is kept, and continued from. A configuration is compared with the one kept there. Families
      and architectures that are objects cannot be: one that you have changed, with arrays of the same shapes, goes
      on as if it were the old one. Give it another work directory.
    wandb: Weights & Biases: 'online', 'offline', 'disabled', or 'auto', which is online when logged in.
    max_dead_steps: Outer steps in a row without anything to learn from that end the run; None: go on.
    on_step: Called with `(outer steps taken, metrics)` at each record of the metrics: after every outer step with
      `log_every=1`.
    **settings: Fields of the configuration, such as `num_outer_steps`, `estimator={"name": "es"}` or `seed`; see
      `experiments/configs/digits.py`. What is left out is as there, also within a section.

  Returns:
    The trained optimizer and its comparison. The work directory has both, with curves and the metrics of training.

  Raises:
    ConfigError, ValueError: A setting or a family cannot be used; before anything is compiled.
    LockedError: Another process is at work in the directory.
    CheckpointError, FloatingPointError, DeadRunError, InterruptedRun, OSError: As those say.
  """
  with contextlib.suppress(RuntimeError):  # JAX has begun already, with the devices that it has
    parallel.setup()
  if isinstance(architecture, str):
    architecture = direction_of(architecture)
  stored = {**settings, "architecture": architecture, "task": families}  # what stands in config.json
  if isinstance(architecture, base.LearnedOptimizer):
    stored["architecture"] = json.loads(architecture.origin or "null") or {"name": configuration.OWN}
  elif not isinstance(architecture, Mapping):
    raise configuration.ConfigError(
      f"architecture: {checks.printable(repr(architecture))} is not an architecture; give a name such as 'mlp', a "
      "section such as {'name': 'mlp'}, or a LearnedOptimizer such as lopt.architectures.mlp.build(); to start from "
      "a trained optimizer, initial=<its file>"
    )
  if "task" in settings:
    raise configuration.ConfigError("task: is given as the first argument, families")
  if on_step is not None and not callable(on_step):
    raise configuration.ConfigError(f"on_step: {on_step!r} is not a function of (step, metrics)")
  if max_dead_steps is not None:
    checks.counts(max_dead_steps=max_dead_steps)
  if not isinstance(workdir, (str, os.PathLike)):
    raise configuration.ConfigError(f"workdir: {workdir!r} is not the path of a folder")
  task: Any = families
  if not (isinstance(families, Mapping) and isinstance(families.get("name"), str)):
    task = {name: (family, 1.0) for name, family in contract.named(families, "family").items()}
    stored["task"] = {"name": configuration.OWN, "families": sorted(task)}
  built = configuration.call(
    experiment.build, {"architecture": architecture, "task": task, **settings}, where="config"
  )
  workdir = Path(workdir)
  lock.check(workdir)
  with lock.hold(workdir):
    comparisons = work(
      built,
      experiment.complete(stored),
      workdir,
      wandb_mode=wandb,
      max_dead_steps=max_dead_steps,
      on_step=on_step,
    )
  return Run(trained.load(workdir, architecture=built.architecture), comparisons or {}, workdir)


def direction_of(name: str) -> dict[str, Any]:
  """The section of the learned direction of one of lopt's architectures.

  Raises:
    ConfigError: There is no such architecture.
  """
  build = configuration.module("architectures", name, where="architecture").build
  options = {"step_multiplier": 0.3, "zero_output": True}
  own = {option: value for option, value in options.items() if option in signatures.options_of(build)}
  return {"name": name, **own, "direction": {"learning_rate": 2e-2}}


def claim(workdir: Path, config: Section) -> None:
  """Writes the configuration into a fresh work directory, or checks that the one there is the same.

  Raises:
    ConfigError: The work directory belongs to a run of another configuration.
  """
  path = workdir / "config.json"
  if not path.exists():
    if checkpoints.latest_step(workdir) is not None:
      raise configuration.ConfigError(f"{workdir}: has checkpoints and no config.json; use another workdir")
    files.write_atomically(path, json.dumps(config, indent=2) + "\n")
    return
  try:
    there = json.loads(path.read_text("utf-8"))
  except (ValueError, RecursionError) as error:
    raise configuration.ConfigError(f"{path}: not JSON ({error}); use another workdir") from error
  if different := configuration.difference(there, config):
    more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
    raise configuration.ConfigError(
      f"{workdir}: is the work directory of another configuration: {different[0]}{more}; use another workdir"
    )


def work(
  experiment: Experiment,
  config: Section,
  workdir: Path,
  *,
  wandb_mode: str = "auto",
  max_dead_steps: int | None = 100,
  on_step: OnStep | None = None,
) -> dict[str, comparison.Comparison] | None:
  """Runs an experiment, or what is left of it, in a work directory that belongs to this process.

  Returns:
    What the comparison with tuned baselines found, by family; None in all but the first of several processes.

  Raises:
    ConfigError: The work directory is another experiment's, or the W&B mode unknown.
    CheckpointError, FloatingPointError, DeadRunError, InterruptedRun, OSError: As those say.
  """
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
  tracker = tracking.nothing()
  if parallel.is_first():
    tracker = tracking.start(workdir, config, wandb_mode=wandb_mode, resume_step=resume_step)
  try:
    theta = _train(
      experiment,
      workdir,
      tracker,
      max(first_step, 0),
      restored,
      max_dead_steps=max_dead_steps,
      on_step=on_step,
    )
    return _complete(experiment, config, workdir, tracker, theta) if parallel.is_first() else None
  finally:
    tracker.finish()


def _complete(
  experiment: Experiment, config: Section, workdir: Path, tracker: tracking.Tracker, theta: base.Theta
) -> dict[str, comparison.Comparison]:
  """Exports, compares and tells."""
  path = workdir / trained.FILENAME
  trained.export(path, theta, config, outer_steps=experiment.num_outer_steps)
  options = {"seed": experiment.seed, "progress": lambda stage: print(f"evaluation: {stage}", flush=True)}
  options |= {**experiment.evaluation, "cache_folder": workdir / "cache"}
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
  own = ", architecture=..." if config["architecture"]["name"] == configuration.OWN else ""
  print(f'The trained optimizer is {path}; use it with lopt.load("{path}"{own})(num_steps=...).')
  return comparisons


def _train(
  experiment: Experiment,
  workdir: Path,
  tracker: tracking.Tracker,
  first_step: int,
  restored: meta_training.MetaState | None,
  *,
  max_dead_steps: int | None,
  on_step: OnStep | None,
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

  def record(step: int, metrics: dict[str, float]) -> None:
    tracker.log(step, metrics)
    if on_step is not None:
      on_step(step, metrics)

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
      record=record,
      periodic=[
        meta_training.Every(evaluation_every, evaluate),
        meta_training.Every(experiment.checkpoint["every"], save, when_interrupted=True),
      ],
      progress=progress,
      max_dead_steps=max_dead_steps,
    )
  return experiment.whole(state.theta)
