"""Meta-training and evaluation from Python, as in a notebook, with a task of one's own."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lopt
from lopt import base, configuration, experiment, running
from lopt.architectures import tensor_mlp
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
  page = result.report(tmp_path / "page" / "mine.html")
  assert page.name == "mine.html"
  assert "mine" in page.read_text("utf-8")


@pytest.mark.long
def test_an_architecture_of_ones_own_is_passed_when_it_is_loaded(tmp_path):
  own = tensor_mlp.build(hidden_size=2)
  run = lopt.meta_train({"a": regression(), "b": regression()}, own, workdir=tmp_path, **SMALL)
  assert set(run.comparisons) == {"a", "b"}
  assert json.loads((tmp_path / "config.json").read_text())["task"]["families"] == ["a", "b"]
  with pytest.raises(trained.LoadError, match="architecture="):
    lopt.load(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, lopt.load(tmp_path, own).theta, run.optimizer.theta)


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
    ({"init": lambda key, task: {"w": jnp.zeros(3, jnp.int32)}}, r"init: the parameter \['w'\] is of type int32"),
    ({"batch": lambda key, task, split: np.asarray(task)}, "batch.*inside compiled code"),
    ({"batch": lambda key, task, split: (task[0], task) if task[0] > 0 else task}, "batch.*inside compiled code"),
    (
      {"batch": lambda key, task, split: (jnp.ones((n := 8 if split == "train" else 4, 3)), jnp.ones(n))},
      r"batch: splits differ in shape, \(float32\[8, 3\], float32\[8\]\) of train and .* of validation",
    ),
    ({"sample": lambda key: jnp.zeros(int(jax.random.key_data(key)[-1]) % 3 + 1)}, "two draws differ in shape"),
    ({"sample": lambda key: np.asarray(jax.random.normal(key, (3,)))}, "sample.*inside compiled code"),
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
  ],
)
def test_a_setting_with_a_mistake_is_refused(tmp_path, settings, message):
  with pytest.raises(ValueError, match=message):
    lopt.meta_train(regression(), workdir=tmp_path / "run", **settings)


def test_a_run_from_python_is_that_of_the_script(tmp_path):
  """The same configuration is stored, so that each continues what the other began."""
  config = configuration.load(ROOT / "experiments/configs/quadratics.py").get_config("")
  config.architecture.hidden_size, config.task.dimension = 4, 3
  config.num_outer_steps, config.log_every = 4, 2
  config.periodic_evaluation.every, config.checkpoint.every = 4, 2
  of_script = experiment.complete(configuration.plain(config))
  of_python = experiment.complete(
    {
      "architecture": {"name": "tensor_mlp", "hidden_size": 4, **running.DIRECTION},
      "task": {"name": "quadratic", "dimension": 3},
      "num_outer_steps": 4,
      "log_every": 2,
      "periodic_evaluation": {**experiment.PERIODIC_EVALUATION, "every": 4},
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
  with pytest.raises(AskedError, match=r"1000, 1, 5"):
    lopt.evaluate(optimizer, "horizon", num_tasks=1)
  with pytest.raises(AskedError, match=r"200, 4, 3"):
    lopt.evaluate(optimizer, regression())


def test_no_family_is_refused(tmp_path):
  for none in ([], {}):
    with pytest.raises(ValueError, match="families: names none"):
      lopt.meta_train(none, workdir=tmp_path / "run", **SMALL)


def test_what_is_no_family_is_refused():
  cases: list[tuple[Any, str]] = [
    (regression, "families: function is no lopt.base.TaskFamily"),
    ([regression(), regression], "task family 'tasks 2': is of type function, not lopt.base.TaskFamily"),
    ({"mine": {"name": "quadratic"}}, "task family 'mine': is of type dict"),
  ]
  for families, message in cases:
    with pytest.raises(ValueError, match=message):
      contract.named(families, "tasks")


def test_evaluation_of_nothing_or_with_what_is_not_there_is_refused():
  optimizer = trained.TrainedOptimizer({}, tensor_mlp.build(), {})
  with pytest.raises(ValueError, match="optimizers: names none"):
    lopt.evaluate({}, regression())
  with pytest.raises(ValueError, match=r"baselines: no 'adamm'; there are: adamw"):
    lopt.evaluate({"mine": optimizer}, regression(), baselines=("adamm",))
  with pytest.raises(ValueError, match=r"suite: no 'fersh'; there are: fresh"):
    lopt.evaluate({"mine": optimizer}, "fersh")
  with pytest.raises(ValueError, match="task family 'tasks': loss: must return"):
    lopt.evaluate({"mine": optimizer}, regression(loss=lambda params, key, batch, task: jnp.zeros(())))


def test_interruptions_are_keyboard_interrupts():
  assert issubclass(interruption.InterruptedRun, KeyboardInterrupt)
