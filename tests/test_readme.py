"""What the README shows works."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def test_the_training_loop_runs(tmp_path):
  [code] = re.findall(r"```python\n(.*?)```", README, re.S)
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
