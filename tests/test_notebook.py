"""The notebook runs as it is, without a screen."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lopt.evaluation import pictures

ROOT = Path(__file__).parent.parent


def test_figures_are_shown():
  assert pictures.Shown()._repr_png_().startswith(b"\x89PNG")


@pytest.mark.slow
def test_it_meta_trains_stops_goes_on_and_evaluates(tmp_path):
  script = ROOT / "experiments" / "examples" / "notebook.py"
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  result = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
  assert result.returncode == 0, result.stderr
  assert "stopped by SIGINT after outer step 50 of 100\n" in result.stdout
  assert "| mine" in result.stdout
  assert (tmp_path / "runs" / "notebook" / "optimizer.safetensors").is_file()
