"""What the README shows works."""

import os
import re
import subprocess
import sys
import time
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


COMMANDS = [  # with the paragraph that follows, which may say how long they take
  (command.strip(), text)
  for block, text in re.findall(r"\n\n((?:    [^\n]+\n)+)(?=\n(.*?)\n\n)", README, re.S)
  for command in block.replace("\\\n", "").splitlines()
  if command.startswith(("    make ", "    .venv/bin/python "))
]
FEWER_RUNS = "--num_tasks=1 --num_seeds=1 --num_steps=20"
FEWER_STEPS = "--config.num_outer_steps=10 --config.outer_optimizer.warmup_steps=1 "
FEWER_STEPS += "--config.periodic_evaluation.every=10 --config.checkpoint.every=10 "
FEWER_STEPS += FEWER_RUNS.replace("--", "--config.evaluation.")
SMALLER = {  # what takes an hour and more, by a word of the command; the rest runs as it stands
  "make report": "SUITE=fresh TASKS=1 SEEDS=1",
  "configs/fashion_mnist": FEWER_STEPS,
  "configs/mixture": FEWER_STEPS,
  "optimizer=runs/mixture": FEWER_RUNS,
}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
  folder = tmp_path_factory.mktemp("clone")
  subprocess.run(["git", "clone", "-q", str(ROOT), str(folder / "lopt")], check=True)
  environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "LANG": "C.UTF-8"}
  if "LOPT_MANUAL_DIR" in os.environ:
    environment["LOPT_MANUAL_DIR"] = os.environ["LOPT_MANUAL_DIR"]
  install = ["make", f"PYTHON={sys.executable}", ".venv/dev"]
  subprocess.run(install, cwd=folder / "lopt", env=environment, check=True, capture_output=True)
  return folder / "lopt", environment


@pytest.mark.long
@pytest.mark.parametrize(("command", "text"), COMMANDS, ids=[command for command, _ in COMMANDS])
def test_commands_run_in_a_fresh_clone_in_the_time_that_they_claim(clone, command: str, text: str):
  """In their order, in an environment of their own; needs the package index."""
  folder, environment = clone
  fewer = next((flags for word, flags in SMALLER.items() if word in command), "")
  begun = time.monotonic()
  result = subprocess.run(
    f"{command} {fewer}", shell=True, cwd=folder, env=environment, capture_output=True, text=True
  )
  minutes = (time.monotonic() - begun) / 60
  assert result.returncode == 0, result.stderr[-3000:]
  claims = re.findall(r"(\d+) minutes", text)
  if claims and not fewer:
    assert minutes < float(claims[-1]), f"{command} took {minutes:.1f} minutes"


def test_files_and_targets_that_are_named_exist():
  for path in re.findall(r"(?:experiments|lopt)/[\w/]+(?:\.\w+|/)", README) + re.findall(r"\]\(([\w/.]+)\)", README):
    assert (ROOT / path).exists(), path
  targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
  assert set(re.findall(r"(?:^    |`)make ([a-z-]+)", README, re.M)) <= targets


def test_tables_fit_the_page():
  pages = [*ROOT.glob("*.md"), *(ROOT / "experiments").rglob("*.md"), *(ROOT / "lopt").rglob("*.md")]
  rows = [(page.name, row) for page in pages for row in page.read_text("utf-8").splitlines() if row.startswith("|")]
  assert rows
  assert [(page, row) for page, row in rows if len(row) > 120] == []
