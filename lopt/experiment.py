"""An experiment: a configuration of meta-training with all that it names built and checked, ready to run."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeGuard

import ml_collections

from lopt import base, checks, configuration, inner_training
from lopt.architectures import meta_parameters
from lopt.outer import final_loss, late_losses, meta_training, mixture, parallel
from lopt.runs import trained
from lopt.tasks import contract

Section = Mapping[str, Any]
Families = Mapping[str, tuple[base.TaskFamily, float]]
"""Task families by name, with their weights in the meta-objective."""

# What the fields of a configuration are that nobody sets; `experiments/configs/digits.py` says what they mean.
SECTIONS: dict[str, Section] = {
  "horizon": {"minimum": 50, "maximum": 200},
  "estimator": {"name": "pes", "num_pairs": 32, "sigma": 0.1, "noise_period": 200},
  "outer_optimizer": {"learning_rate": 1e-2},
  "periodic_evaluation": {"every": 200, "num_tasks": 8, "num_seeds": 2, "num_steps": 200},
  "evaluation": {"num_tasks": 16, "num_seeds": 3, "num_steps": 200},
  "checkpoint": {"every": 100, "keep": 3},
}


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
  architecture: Section | base.LearnedOptimizer,
  task: Section | Families,
  seed: int = 0,
  num_outer_steps: int = 1_200,
  log_every: int = 10,
  meta_loss: Literal["train", "validation"] = "train",
  objective: Literal["mean_loss", "final_loss"] = "mean_loss",
  horizon: Section = SECTIONS["horizon"],
  estimator: Section = SECTIONS["estimator"],
  outer_optimizer: Section = SECTIONS["outer_optimizer"],
  periodic_evaluation: Section = SECTIONS["periodic_evaluation"],
  evaluation: Section = SECTIONS["evaluation"],
  checkpoint: Section = SECTIONS["checkpoint"],
  initial: str | None = None,
  trainable: tuple[str, ...] = (),
  late_power: float | None = None,
  precision: inner_training.Precision = "float32",
  loss_cap: float | None = 10.0,
  log_floor: float | None = 1e-3,
  step_spread: float = 2.0,
  balance: bool = False,
) -> Experiment:
  """Makes of a configuration all that it names, so that whatever is wrong with it shows before any work starts.

  The fields are those of `experiments/configs/digits.py`, which says what they are.

  Raises:
    ConfigError, ValueError: A field is unknown or out of its range, or a family cannot be trained.
  """
  horizon, estimator, outer_optimizer, periodic_evaluation, evaluation, checkpoint = (
    _filled(name, section)
    for name, section in (
      ("horizon", horizon),
      ("estimator", estimator),
      ("outer_optimizer", outer_optimizer),
      ("periodic_evaluation", periodic_evaluation),
      ("evaluation", evaluation),
      ("checkpoint", checkpoint),
    )
  )
  checks.counts(num_outer_steps=num_outer_steps, log_every=log_every)
  if not 0 <= seed < 2**32:
    raise ValueError(f"seed: must be in 0..{2**32 - 1}, not {seed}")
  late_power = _late_power(late_power, objective)
  if late_power and objective == "final_loss":  # which is a sum of differences that weights would spoil
    raise ValueError(f"late_power: must be 0 where objective is 'final_loss', not {late_power}")
  sections = {
    "periodic_evaluation": configuration.call(_periodic, periodic_evaluation, where="config.periodic_evaluation"),
    "evaluation": configuration.call(_comparison, evaluation, where="config.evaluation"),
    "checkpoint": configuration.call(_checkpoint, checkpoint, where="config.checkpoint"),
  }
  # One program takes as many outer steps as there are between any two moments at which something is to be done.
  steps_per_call = math.gcd(
    log_every, num_outer_steps, sections["periodic_evaluation"]["every"], sections["checkpoint"]["every"]
  )
  updates = configuration.call(
    meta_training.outer_optimizer, outer_optimizer, num_outer_steps, where="config.outer_optimizer"
  )
  horizons = configuration.call(inner_training.log_uniform_horizon, horizon, where="config.horizon")
  optimizer = architecture
  if not isinstance(optimizer, base.LearnedOptimizer):
    optimizer = configuration.build("architectures", optimizer, where="config.architecture")
  full = optimizer
  whole = lambda theta: theta
  if initial is not None or trainable:
    optimizer, whole = meta_parameters.start_from(optimizer, first_theta(optimizer, initial, seed), trainable)
  families = dict(task) if _is_built(task) else configuration.task_families(task, where="config.task")
  for name, (family, _) in families.items():
    contract.check(family, name)
    if _is_built(task):  # by someone whose losses nobody knows
      contract.check_start(family, name, loss_cap)

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
  trainer = meta_training.build(gradients, optimizer.init, updates, seed=seed, steps_per_call=steps_per_call)
  return Experiment(families, full, optimizer, whole, trainer, seed, num_outer_steps, **sections)


def complete(config: Section) -> dict[str, Any]:
  """A configuration with every field, as work directories keep it: what is left out is at its default.

  Raises:
    ConfigError: A section names no module, or has an option that this does not take.
  """
  full = {**configuration.defaults(build), **config}
  full |= {name: _filled(name, full[name]) for name in SECTIONS}
  full["late_power"] = _late_power(full["late_power"], full["objective"])
  for field, package in configuration.PACKAGES.items():
    section, where = full[field], f"config.{field}"
    if section["name"] == configuration.MIXTURE:
      families = {}
      for label, member in section["families"].items():
        options = {option: value for option, value in member.items() if option != "weight"}
        options = configuration.complete(package, options, where=f"{where}.families.{label}")
        families[label] = {**options, "weight": float(member.get("weight", 1.0))}
      full[field] = {"name": configuration.MIXTURE, "families": families}
    elif section["name"] != configuration.OWN:
      full[field] = configuration.complete(package, section, where=where)
  for field, function in {
    "outer_optimizer": meta_training.outer_optimizer,
    "horizon": inner_training.log_uniform_horizon,
  }.items():
    full[field] = {**configuration.defaults(function), **full[field]}
  return configuration.plain(full)


def _late_power(given: float | None, objective: str) -> float:
  """The power of the losses' weights: what is given, else what suits the objective."""
  return given if given is not None else 0.0 if objective == "final_loss" else 2.0


def _filled(name: str, section: Any) -> Section:
  """A section with the defaults of what it leaves out, unless it is about another module than they are.

  Raises:
    ConfigError: It is no section.
  """
  section = section.to_dict() if isinstance(section, ml_collections.ConfigDict) else section
  if not isinstance(section, Mapping):
    raise configuration.ConfigError(f"config.{name}: {section!r} is not a section, such as {SECTIONS[name]}")
  default = SECTIONS[name]
  return {**default, **section} if section.get("name", default.get("name")) == default.get("name") else section


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
    raise configuration.ConfigError(f"config.initial: {error}{_own_architecture(initial)}") from error


def _own_architecture(initial: str) -> str:
  """What a trained optimizer is of, as the end of a sentence; nothing where the file does not say."""
  try:
    section = trained.load(initial).config["architecture"]
  except (trained.LoadError, KeyError):
    return ""
  options = ", ".join(f"{name}={value}" for name, value in section.items() if name not in ("name", "direction"))
  return f"; the file is of config.architecture: name={section.get('name')}, {options}"


def _periodic(*, every: int, num_tasks: int, num_seeds: int, num_steps: int) -> dict[str, int]:
  return _at_least_one(every=every, num_tasks=num_tasks, num_seeds=num_seeds, num_steps=num_steps)


def _comparison(*, num_tasks: int, num_seeds: int, num_steps: int) -> dict[str, int]:
  return _at_least_one(num_tasks=num_tasks, num_seeds=num_seeds, num_steps=num_steps)


def _checkpoint(*, every: int, keep: int) -> dict[str, int]:
  return _at_least_one(every=every, keep=keep)


def _at_least_one(**counts: int) -> dict[str, int]:
  checks.counts(**counts)
  return counts


def _is_built(task: Section | Families) -> TypeGuard[Families]:
  return all(isinstance(x, tuple) and isinstance(x[0], base.TaskFamily) for x in task.values())
