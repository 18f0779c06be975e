"""Seconds from the start of Python until the first outer steps of a configuration are done.

    python experiments/benchmarks/first_step.py [--only=mixture]

That is what people wait for before a run of `meta_train.py` shows anything. Cases are configurations, as `--config`
takes them. *Cold*: without what was compiled before; *warm*: the same again, with it.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bench
import jax
from absl import flags

from lopt import configuration, experiment
from lopt.outer import parallel

CONFIGS = Path(__file__).parents[1] / "configs"
CASES = ["digits", "digits:architecture=mlp", "mixture", "mixture:architecture=adafactor_mlp"]
HERE = flags.DEFINE_bool("here", False, "Internal: take the first outer steps of --case, and end.")


def measure(case: str) -> bench.Figures:
  if HERE.value:
    return _first_step(case)
  figures = {}
  with tempfile.TemporaryDirectory() as cache:
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache}
    for name in ("seconds_cold", "seconds_warm"):
      begun = time.perf_counter()
      subprocess.run(
        [sys.executable, __file__, f"--case={case}", "--here"], env=environment, check=True, stdout=subprocess.DEVNULL
      )
      figures[name] = time.perf_counter() - begun
  return figures


def _first_step(case: str) -> bench.Figures:
  parallel.setup()
  name, _, choices = case.partition(":")
  config = configuration.plain(configuration.load(CONFIGS / f"{name}.py").get_config(choices))
  trainer = configuration.call(experiment.build, config, where="config").trainer
  jax.block_until_ready(trainer.advance(0, trainer.init()))
  return {"outer_steps": trainer.steps_per_call}


if __name__ == "__main__":
  bench.main(CASES, measure, ["seconds_cold", "seconds_warm"])
