"""The wheel alone, outside of the checkout: what someone has who types `pip install lopt`."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import lopt

ROOT = Path(__file__).parent.parent
TINY = {
  "num_outer_steps": 4,
  "log_every": 2,
  "outer_optimizer.warmup_steps": 1,
  "estimator.num_pairs": 2,
  "periodic_evaluation.every": 4,
  "periodic_evaluation.num_steps": 5,
  "checkpoint.every": 4,
  "evaluation.num_tasks": 1,
  "evaluation.num_seeds": 1,
  "evaluation.num_steps": 5,
}


def test_every_package_is_in_it():
  """The list in pyproject.toml, since two of them have another folder, and nothing finds these."""
  packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
  folders = {path.parent for path in (ROOT / "lopt").rglob("*.py")}
  expected = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
  assert set(packages) == expected | {"lopt.commands", "lopt.commands.configs"}


def test_the_version_is_that_of_the_tag_and_of_the_changelog():
  assert f"\n## {lopt.__version__}\n" in (ROOT / "CHANGELOG.md").read_text("utf-8")
  if not (ROOT / ".git").exists():
    pytest.skip("needs the repository")
  tags = subprocess.run(["git", "tag", "--points-at", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True)
  assert all(tag == f"v{lopt.__version__}" for tag in tags.stdout.split())


def test_a_command_that_is_not_there_is_one_line():
  result = subprocess.run([sys.executable, "-m", "lopt", "train"], cwd=ROOT, capture_output=True, text=True)
  assert result.returncode == 1
  assert result.stderr == "lopt: no command 'train'; there are: meta-train, evaluate\n"


@pytest.mark.slow
def test_in_a_checkout_the_commands_are_the_scripts(tmp_path):
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}

  def run(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lopt", "meta-train", *flags]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

  result = run("--config=nonsense")
  assert result.returncode == 1
  assert result.stderr.startswith("lopt meta-train: --config: no configuration 'nonsense'; there are: digits, ")
  text = run("--help").stdout
  assert all(f"\n  --{flag}: " in text for flag in ("config", "workdir", "wandb"))


@pytest.mark.slow
def test_it_meta_trains_and_evaluates_in_an_empty_folder(tmp_path):
  pip, source = [sys.executable, "-m", "pip"], tmp_path / "source"  # a copy: building leaves files beside the sources
  shutil.copytree(
    ROOT, source, ignore=lambda folder, _: {".git", ".venv", "runs", "tests"} if folder == str(ROOT) else ()
  )
  wheel = [*pip, "wheel", "--no-deps", str(source), "-w", str(tmp_path)]
  built = subprocess.run(wheel, cwd=tmp_path, capture_output=True, text=True)
  if "No matching distribution found for setuptools" in built.stderr:
    pytest.skip("building a wheel needs setuptools from the package index, which cannot be reached")
  assert built.returncode == 0, built.stderr
  [wheel] = tmp_path.glob("*.whl")
  site, empty = tmp_path / "site", tmp_path / "empty"
  empty.mkdir()
  subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True, capture_output=True)
  environment = {**os.environ, "PYTHONPATH": str(site)}

  def run(*arguments: str) -> str:
    command = [sys.executable, *arguments]
    result = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout

  assert str(site) in run("-c", "import lopt; print(lopt.__file__)")
  changed = [f"--config.{name}={value}" for name, value in TINY.items()]
  run("-m", "lopt", "meta-train", "--config=quadratics", "--workdir=runs/tiny", *changed)
  flags = ["--num_tasks=1", "--num_seeds=1", "--num_steps=5", "--notiming", "--baselines=adamw"]
  assert "report.html" in run(str(site / "bin" / "lopt"), "evaluate", "--optimizer=runs/tiny", *flags)
  code = "import lopt; print(lopt.load('runs/tiny')(num_steps=10), lopt.load('tensor_mlp').learning_rate)"
  run("-c", code)
  for code in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S):
    if "import" in code:  # the others are lines to be put into a program
      run("-c", code)
