"""Runs begun from Python go on by the script, and the other way around."""

import json
import shutil
import subprocess
import sys

import pytest
import safetensors.numpy

# What `meta_train` of conftest.py and CHANGES say by flags; the rest is at its default, here and there.
SETTINGS = {
  "families": {"name": "quadratic", "dimension": 4},
  "architecture": {
    "name": "mlp",
    "hidden_sizes": [4],
  },
  "seed": 3,
  "num_outer_steps": 8,
  "log_every": 2,
  "estimator": {"name": "pes", "sigma": 0.1, "num_pairs": 4, "unroll_length": 5, "noise_period": 200},
  "horizon": {"minimum": 10, "maximum": 20},
  "outer_optimizer": {"learning_rate": 1e-2, "warmup_steps": 5},
  "periodic_evaluation": {"every": 8, "num_tasks": 2, "num_seeds": 1, "num_steps": 10},
  "evaluation": {"num_tasks": 2, "num_seeds": 2, "num_steps": 10},
  "checkpoint": {"every": 4, "keep": 3},
}
CHANGES = {"num_outer_steps": 8, "periodic_evaluation.every": 8, "checkpoint.every": 4}
CODE = "import json, sys, lopt; lopt.meta_train(**json.loads(sys.argv[1]))"


@pytest.mark.long
def test_each_goes_on_with_what_the_other_began(tmp_path, environment, meta_train):
  def run(which, workdir):
    command = meta_train(workdir, "--wandb=disabled", **CHANGES)
    if which == "python":
      command = [sys.executable, "-c", CODE, json.dumps({**SETTINGS, "workdir": str(workdir)})]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    steps = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text("utf-8").splitlines()]
    return (
      (workdir / "config.json").read_text("utf-8"),
      safetensors.numpy.load_file(workdir / "optimizer.safetensors"),
      steps,
    )

  runs = {which: run(which, tmp_path / which) for which in ("script", "python")}
  config, theta, steps = runs["script"]
  for first, second in (("script", "python"), ("python", "script")):
    workdir = tmp_path / first
    (workdir / "optimizer.safetensors").unlink()
    shutil.rmtree(workdir / "checkpoints" / "8")  # as if it had been killed after the checkpoint before
    for found in (runs[first], run(second, workdir)):
      assert json.loads(found[0]) == json.loads(config)
      assert {name: x.tobytes() for name, x in found[1].items()} == {name: x.tobytes() for name, x in theta.items()}
      assert found[2] == steps
