"""Meta-training and evaluation from Python, as in a notebook, with a task of one's own."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lopt
from lopt import base, configuration, experiment, running
from lopt.architectures import direction, step_sizes, tensor_mlp
from lopt.evaluation import held_out
from lopt.runs import interruption, trained
from lopt.tasks import contract

ROOT = Path(__file__).parent.parent
SMALL = {
  "num_outer_steps": 4,
  "log_every": 2,
  "estimator": {"name": "pes", "num_pairs": 2, "unroll_length": 5},
  "horizon": {"minimum": 5, "maximum": 10},
  "outer_optimizer": {"warmup_steps": 1},
  "periodic_evaluation": {"every": 4, "num_tasks": 1, "num_seeds": 1, "num_steps": 5},
  "evaluation": {"num_tasks": 2, "num_seeds": 1, "num_steps": 5},
  "checkpoint": {"every": 2, "keep": 3},
}


def regression(**changes):
  """Linear regression: a tree of two arrays."""

  def batch(key, task_params, split):
    x = jax.random.normal(key, (8, 3))
    return x, x @ task_params + 0.5

  def loss(params, key, batch, task_params):
    x, y = batch
    return jnp.mean(jnp.square(x @ params["w"] + params["b"] - y)), {}

  family = base.TaskFamily(
    sample=lambda key: jax.random.normal(key, (3,)),
    init=lambda key, task_params: {"w": jnp.zeros(3), "b": jnp.zeros(())},
    batch=batch,
    loss=loss,
  )
  return family._replace(**changes)


@pytest.mark.slow
def test_meta_train_interrupt_go_on_evaluate(tmp_path):
  """An interrupted run ends with the θ of one that was not, and its file is the optimizer that it returns."""
  whole = lopt.meta_train(regression(), workdir=tmp_path / "whole", **SMALL)
  seen = []

  def stop(step, metrics):
    seen.append(step)
    if step == 2:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    lopt.meta_train(regression(), workdir=tmp_path / "cut", on_step=stop, **SMALL)
  cut = lopt.meta_train(regression(), workdir=tmp_path / "cut", on_step=lambda step, _: seen.append(step), **SMALL)
  assert seen[:2] == [2, 2] or seen == [2, 2, 4]  # once more where the checkpoint was not written yet
  jax.tree.map(np.testing.assert_array_equal, cut.optimizer.theta, whole.optimizer.theta)
  jax.tree.map(np.testing.assert_array_equal, lopt.load(tmp_path / "cut").theta, whole.optimizer.theta)
  assert {"learned", "AdamW"} <= set(whole.comparisons["family"].roles)
  kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "whole" / "cache").iterdir()}
  again = lopt.meta_train(regression(), workdir=tmp_path / "whole", **SMALL)
  jax.tree.map(np.testing.assert_array_equal, again.optimizer.theta, whole.optimizer.theta)
  assert kept == {path: path.stat().st_mtime_ns for path in (tmp_path / "whole" / "cache").iterdir()} != {}
  params = {"w": jnp.ones(3)}
  tx = cut.optimizer(learning_rate=optax.constant_schedule(0.1))
  updates, _ = tx.update(params, tx.init(params), params)
  assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(updates))

  result = lopt.evaluate(
    {"mine": whole.optimizer},
    [regression()],
    num_tasks=2,
    num_seeds=1,
    num_steps=5,
    baselines=("adamw",),
    progress=None,
  )
  assert "mine" in result.table()
  records = result.records()
  assert {r["optimizer"] for r in records} == {"mine", "θ = 0", "AdamW"}
  assert all(math.isfinite(r["final_loss"]) and r["task"] in (0, 1) for r in records)
  assert len(result.plot().axes) >= 1
  (tmp_path / "page").mkdir()
  (tmp_path / "page" / "report.html").write_text("of the user")
  page = result.report(tmp_path / "page" / "mine.html")
  assert "mine" in page.read_text("utf-8")
  assert sorted(path.name for path in page.parent.iterdir()) == ["mine.html", "report.html"]
  assert (tmp_path / "page" / "report.html").read_text() == "of the user"
  assert result.report(tmp_path / "folder") == tmp_path / "folder" / "report.html"
  assert max(map(len, map(repr, (whole, whole.optimizer, result)))) < 300


@pytest.mark.long
def test_an_architecture_of_ones_own_is_passed_when_it_is_loaded(tmp_path):
  own = tensor_mlp.build(hidden_size=2)._replace(origin=None)
  run = lopt.meta_train({"a": regression(), "b": regression()}, own, workdir=tmp_path, **SMALL)
  assert set(run.comparisons) == {"a", "b"}
  assert json.loads((tmp_path / "config.json").read_text())["task"]["families"] == ["a", "b"]
  with pytest.raises(trained.LoadError, match="architecture="):
    lopt.load(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, lopt.load(tmp_path, own).theta, run.optimizer.theta)


def test_what_python_builds_has_the_section_that_builds_it():
  """For each architecture and around it; none where no section says the same."""
  for name in configuration.choices("architectures"):
    built = configuration.build("architectures", {"name": name}, where="architecture")
    section = json.loads(built.origin)
    assert (
      section == experiment.complete({"architecture": {"name": name}, "task": {"name": "quadratic"}})["architecture"]
    )
    again = configuration.build("architectures", section, where="architecture")
    assert jax.eval_shape(again.init, jax.random.key(0)) == jax.eval_shape(built.init, jax.random.key(0))
  wrapped = direction.wrap(tensor_mlp.build(hidden_size=2), learning_rate=0.1)
  section = json.loads(wrapped.origin or "")
  assert (section["name"], section["hidden_size"], section["direction"]["learning_rate"]) == ("tensor_mlp", 2, 0.1)
  assert configuration.build("architectures", section, where="architecture").learning_rate == 0.1
  assert step_sizes.wrap(wrapped, relative_floor=0.1).origin is None
  assert direction.wrap(tensor_mlp.build()._replace(origin=None)).origin is None


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"loss": lambda params, key, batch, task: (batch[1], {})}, r"loss: must be a float scalar, not float32\[8\]"),
    ({"loss": lambda params, key, batch, task: jnp.mean(batch[1])}, r"loss: must return \(loss, metrics\)"),
    ({"loss": lambda params, key, batch, task: ({"mse": jnp.mean(batch[1])}, {})}, "float scalar, not {mse: float32"),
    (
      {"loss": lambda params, key, batch, task: (jnp.mean(batch[1]), batch[1])},
      r"metrics must be a dict.*float32\[8\]",
    ),
    ({"loss": lambda params, key, batch, task: (float(jnp.mean(batch[1])), {})}, "loss.*inside compiled code"),
    ({"loss": lambda params, key, batch, task: (1.0, {})}, r"result\[0\] is the Python number 1\.0"),
    ({"loss": lambda params, batch: (jnp.mean(batch[1]), {})}, "loss: TypeError.*positional arguments"),
    ({"init": lambda key, task: {"w": jnp.zeros(3), "b": 0.0}}, r"init.*result\['b'\] is the Python number 0\.0"),
    ({"init": lambda key, task: {}}, "init: has no parameters to train"),
    (
      {"loss": lambda params, key, batch, task: (jnp.mean(batch[1]), {"acc": batch[1]})},
      r"loss: the metric 'acc' must be a scalar, not float32\[8\]",
    ),
    ({"init": lambda key, task: {"w": jnp.zeros(3, jnp.int32)}}, r"init: the parameter \['w'\] is of type int32"),
    ({"batch": lambda key, task, split: np.asarray(task)}, "batch.*inside compiled code"),
    ({"batch": lambda key, task, split: (task[0], task) if task[0] > 0 else task}, "batch.*inside compiled code"),
    (
      {"batch": lambda key, task, split: (jnp.ones((n := 8 if split == "train" else 4, 3)), jnp.ones(n))},
      r"batch: splits differ in shape, \(float32\[8, 3\], float32\[8\]\) of train and .* of validation",
    ),
    ({"sample": lambda key: jnp.zeros(int(jax.random.key_data(key)[-1]) % 3 + 1)}, "two draws differ in shape"),
    ({"sample": lambda key: np.asarray(jax.random.normal(key, (3,)))}, "sample.*inside compiled code"),
    ({"normalize": lambda loss, task: loss * task}, r"normalize: must return a float scalar, not float32\[3\]"),
    ({"normalize": lambda loss: loss}, "normalize: TypeError.*positional argument"),
    ({"loss_cap": "10"}, "loss_cap: must be a number above 0, not '10'"),
    (
      {"loss": lambda params, key, batch, task: (jnp.nan * jnp.mean(params["w"]), {})},
      "loss: is NaN at the first parameters, for 100% of tasks",
    ),
    (
      {"normalize": lambda loss, task: 1e4 * loss},
      r"loss: is .*e\+04 at the first parameters .*, and from 10 it counts as diverged; give the family a",
    ),
  ],
)
def test_a_family_with_a_mistake_is_refused_before_anything_is_compiled(tmp_path, changes, message):
  with pytest.raises(ValueError, match=message) as error:
    lopt.meta_train({"mine": regression(**changes)}, workdir=tmp_path / "run", **SMALL)
  assert "task family 'mine'" in str(error.value)
  assert "\n" not in str(error.value)
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"num_outer_step": 4}, "config.num_outer_step: unknown field; did you mean 'num_outer_steps'"),
    ({"estimator": {"name": "pes", "sigmma": 0.1}}, r"config\.estimator\.sigmma: unknown field"),
    ({"estimator": {"name": "pse"}}, r"config\.estimator\.name"),
    ({"task": {"name": "quadratic"}}, "task: is given as the first argument, families"),
    ({"max_dead_steps": 0}, "max_dead_steps: must be at least 1, not 0"),
  ],
)
def test_a_setting_with_a_mistake_is_refused(tmp_path, settings, message):
  with pytest.raises(ValueError, match=message):
    lopt.meta_train(regression(), workdir=tmp_path / "run", **settings)


@pytest.mark.parametrize("name", configuration.choices("architectures"))
def test_a_name_alone_is_a_learned_direction(name):
  built = configuration.build("architectures", running.direction_of(name), where="architecture")
  assert built.learning_rate == 0.02


def test_losses_count_alike_where_the_objective_is_the_final_one():
  config = {"architecture": {"name": "mlp"}, "task": {"name": "quadratic"}}
  assert experiment.complete({**config, "objective": "final_loss"})["late_power"] == 0
  assert experiment.complete(config)["late_power"] == 2
  with pytest.raises(ValueError, match="late_power: must be 0"):
    lopt.meta_train(regression(), workdir="unused", objective="final_loss", late_power=1.0)


def test_a_run_from_python_is_that_of_the_script(tmp_path):
  """The same configuration is stored, so that each continues what the other began."""
  config = configuration.load(ROOT / "experiments/configs/quadratics.py").get_config("")
  config.architecture.hidden_size, config.task.dimension = 4, 3
  config.num_outer_steps, config.log_every = 4, 2
  config.periodic_evaluation.every, config.checkpoint.every = 4, 2
  of_script = experiment.complete(configuration.plain(config))
  of_python = experiment.complete(
    {
      "architecture": {"name": "tensor_mlp", "hidden_size": 4, **running.direction_of("tensor_mlp")},
      "task": {"name": "quadratic", "dimension": 3},
      "num_outer_steps": 4,
      "log_every": 2,
      "periodic_evaluation": {**experiment.SECTIONS["periodic_evaluation"], "every": 4},
      "checkpoint": {"every": 2, "keep": 3},
    }
  )
  assert configuration.difference(of_script, of_python) == []
  assert experiment.complete(of_python) == of_python


def test_suites_bring_their_own_lengths_and_numbers_of_tasks(monkeypatch):
  class AskedError(Exception):
    pass

  def ask(family, optimizers, **options):
    raise AskedError(tuple(options[name] for name in ("num_steps", "num_tasks", "num_seeds")))

  monkeypatch.setattr(held_out, "compare", ask)
  optimizer = {"mine": trained.TrainedOptimizer({}, tensor_mlp.build(), {})}
  with pytest.raises(AskedError, match=r"1000, 1, 2"):
    lopt.evaluate(optimizer, "horizon", num_tasks=1)
  with pytest.raises(AskedError, match=r"200, 4, 3"):
    lopt.evaluate(optimizer, regression())


def test_no_family_is_refused(tmp_path):
  for none in ([], {}):
    with pytest.raises(ValueError, match="families: is empty"):
      lopt.meta_train(none, workdir=tmp_path / "run", **SMALL)


def test_what_is_no_family_is_refused():
  cases: list[tuple[Any, str]] = [
    (regression, "families: must be a lopt.base.TaskFamily or several, not function"),
    ([regression(), regression], "task family 'tasks 2': must be a lopt.base.TaskFamily, not function"),
    ({"mine": {"name": "quadratic"}}, "task family 'mine': must be a lopt.base.TaskFamily, not dict"),
  ]
  for families, message in cases:
    with pytest.raises(ValueError, match=message):
      contract.named(families, "tasks")


def test_evaluation_of_nothing_or_with_what_is_not_there_is_refused():
  optimizer = trained.TrainedOptimizer({}, tensor_mlp.build(), {})
  with pytest.raises(ValueError, match="optimizers: give them by name, such as"):
    lopt.evaluate({}, regression())
  with pytest.raises(ValueError, match=r"baselines: no 'adamm'; there are: adamw"):
    lopt.evaluate({"mine": optimizer}, regression(), baselines=("adamm",))
  with pytest.raises(ValueError, match=r"suite: no 'fersh'; there are: fresh"):
    lopt.evaluate({"mine": optimizer}, "fersh")
  with pytest.raises(ValueError, match="task family 'tasks': loss: must return"):
    lopt.evaluate({"mine": optimizer}, regression(loss=lambda params, key, batch, task: jnp.zeros(())))


MISTAKES = """
import lopt, optax
from lopt.runs.trained import LoadError
family, shipped = lopt.tasks.quadratic.build(), lopt.load("tensor_mlp")
for call in (
  lambda: lopt.meta_train(family, workdir="run", estimator="es"),
  lambda: lopt.meta_train(family, workdir="run", horizon=100),
  lambda: lopt.meta_train(family, None, workdir="run"),
  lambda: lopt.meta_train(family, workdir="run", on_step=3),
  lambda: lopt.meta_train(family, shipped, workdir="run"),
  lambda: lopt.meta_train(family, workdir=None),
  lambda: lopt.meta_train("mlp_classifier", workdir="run"),
  lambda: lopt.load(3),
  lambda: lopt.load("tensor_mpl"),
  lambda: shipped(1e-2),
  lambda: shipped(learning_rate="0.1"),
  lambda: shipped(9, weight_decay="0.1"),
  lambda: shipped(9, input_axes=("w",)),
  lambda: shipped(9, elementwise=3),
  lambda: shipped(9, elementwise=(3,)),
  lambda: lopt.evaluate(shipped, family),
  lambda: lopt.evaluate([shipped], family),
  lambda: lopt.evaluate({"mine": "tensor_mlp"}, family),
  lambda: lopt.evaluate({"mine": optax.adam(1e-3)}, family),
  lambda: lopt.evaluate({"mine": shipped}, family, num_tasks="3"),
  lambda: lopt.evaluate({"mine": shipped}, family, num_steps=1.5),
  lambda: lopt.evaluate({"mine": shipped}, family, seed=-1),
  lambda: lopt.evaluate({"mine": shipped}, family, baselines="adamm"),
):
  try:
    call()
  except (ValueError, LoadError) as error:
    print(error)
"""


def test_arguments_of_other_types_are_refused_in_one_line(tmp_path, environment):
  """In a process of its own, as users have it: here, types are checked before lopt sees anything."""
  result = subprocess.run(
    [sys.executable, "-c", MISTAKES], env=environment, cwd=tmp_path, capture_output=True, text=True
  )
  assert result.returncode == 0, result.stderr
  expected = [
    "config.estimator: 'es' is not a section, such as {'name': 'pes'",
    "config.horizon: 100 is not a section, such as {'minimum': 50",
    "architecture: None is not an architecture; give a name such as 'mlp'",
    "on_step: 3 is not a function of (step, metrics)",
    "architecture: TrainedOptimizer(tensor_mlp, 228 meta-parameters, learning_rate=0.02) is not an architecture",
    "workdir: None is not the path of a folder",
    "families: must be a lopt.base.TaskFamily or several, not 'mlp_classifier'",
    "3: is neither a path nor the name",
    "tensor_mpl: no such file; did you mean 'tensor_mlp'? expected",
    "num_steps: 0.01 is not a number of training steps; it must be at least 1; did you mean learning_rate=0.01?",
    "learning_rate: a number or an Optax schedule, not '0.1'",
    "weight_decay: a number or an Optax schedule, not '0.1'",
    "input_axes: a dictionary of parts of names and numbers of axes, not ('w',)",
    "elementwise: a tuple of parts of names, not 3",
    "elementwise: parts of names, such as 'embed', not (3,)",
    *["optimizers: give them by name, such as"] * 2,
    "optimizers: 'mine' is of type str, no trained optimizer",
    "optimizers: 'mine' is of type GradientTransformationExtraArgs, no trained optimizer",
    "num_tasks: must be a whole number of at least 1, not '3'",
    "num_steps: must be a whole number of at least 1, not 1.5",
    "seed: must be a whole number of at least 0, not -1",
    "baselines: no 'adamm'; there are: adamw",
  ]
  lines = result.stdout.splitlines()
  assert [line[: len(start)] for line, start in zip(lines, expected, strict=True)] == expected
  assert not list(tmp_path.iterdir())


def test_an_initial_optimizer_of_another_architecture_is_refused_with_its_own():
  optimizer = configuration.build("architectures", {"name": "tensor_mlp"}, where="architecture")
  with pytest.raises(
    configuration.ConfigError, match=r"config.initial: tensor_mlp: .*; the file is of .*hidden_size="
  ):
    experiment.first_theta(optimizer, "tensor_mlp", seed=0)


def test_interruptions_are_keyboard_interrupts():
  assert issubclass(interruption.InterruptedRun, KeyboardInterrupt)
