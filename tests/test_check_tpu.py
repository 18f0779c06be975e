"""`make check-tpu` needs a compiler that tests do not have; what can be said of it without."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "experiments" / "check_tpu.py"


def test_without_the_compiler_it_says_how_to_get_it(tmp_path):
  environment = {k: v for k, v in os.environ.items() if k != "TPU_LIBRARY_PATH"} | {"JAX_PLATFORMS": "cpu"}
  command = [sys.executable, SCRIPT, f"--output={tmp_path}"]
  result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
  if not result.returncode:
    pytest.skip("this environment has libtpu")
  assert "make check-tpu" in result.stderr.splitlines()[-1]
  assert not list(tmp_path.iterdir())
