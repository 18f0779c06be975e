"""The picture of the benchmarks, of figures as their scripts write them."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "experiments" / "benchmarks" / "picture.py"


def draw(folder):
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  command = [sys.executable, str(SCRIPT), f"--folder={folder}"]
  return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_picture_is_drawn_of_what_was_measured(tmp_path):
  """Failed cases and those of another program are left out; without any figure it is one clear line."""
  nothing = draw(tmp_path)
  assert nothing.returncode != 0
  assert f"nothing in {tmp_path}" in nothing.stderr
  speed = {"inner_steps_per_second": 100.0, "parameter_updates_per_second": 1e5}
  lines = [{"case": f"mlp/{task}/8/20", "seconds": 0.1, **speed} for task in ("quad", "mlp8", "mlp8")]
  lines += [{}, {"against": "other", "case": "mlp/mlp8/8/20", "seconds": 9.0}]
  (tmp_path / "throughput.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  costs = [
    {"case": f"{name}/mlp/{n}", "seconds": 1e-3 * n, "parameters": 10**n}
    for name in ("adam", "direction/mlp")
    for n in (4, 5)
  ]
  (tmp_path / "update_cost.jsonl").write_text("".join(json.dumps(line) + "\n" for line in costs))
  drawn = draw(tmp_path)
  assert drawn.returncode == 0, drawn.stderr
  assert (tmp_path / "speed.png").stat().st_size > 10_000
