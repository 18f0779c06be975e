"""What the README shows works."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lopt

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.mark.long
def test_meta_training_from_python_runs(tmp_path):
  [code] = [block for block in BLOCKS if "lopt.meta_train" in block]
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
  assert result.returncode == 0, result.stderr
  assert "| mine" in result.stdout
  assert (tmp_path / "runs" / "mine" / "optimizer.safetensors").is_file()


def test_one_line_of_an_optax_loop_changes():
  [code] = [block for block in BLOCKS if "schedule" in block]
  names: dict[str, Any] = {"lopt": lopt, "schedule": optax.cosine_decay_schedule(1e-2, 100)}
  exec(code, names)
  params = {"w": jnp.ones((3, 2))}
  updates, _ = names["tx"].update(params, names["tx"].init(params), params)
  assert np.any(updates["w"] != 0)


def test_the_training_loop_runs(tmp_path):
  [code] = [block for block in BLOCKS if "load_digits" in block]
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
  assert result.returncode == 0, result.stderr
  said = re.fullmatch(r"training loss after 200 steps: (\d+\.\d{3})\n", result.stdout)
  assert said
  assert float(said[1]) < 0.3


def test_files_and_targets_that_are_named_exist():
  for path in re.findall(r"(?:experiments|lopt)/[\w/]+(?:\.\w+|/)", README) + re.findall(r"\]\(([\w/.]+)\)", README):
    assert (ROOT / path).exists(), path
  targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
  assert set(re.findall(r"(?:^    |`)make ([a-z-]+)", README, re.M)) <= targets
