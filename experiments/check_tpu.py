"""Compiles the outer step for four TPU chips, on a machine that has none: every architecture and every estimator.

    make check-tpu

libtpu's compiler is told of a v5e of 2 × 2 chips. Each case is the program that `lopt meta-train` would run there, of
quadratics, over all chips. It must compile, fit the chip's memory, and have nothing in it that a TPU is bad at:
64-bit numbers, shapes that are known at run time only, calls of the host, and gathers in the inner loop. The last
case, a learned direction on digits, has to gather its batches. Ends with exit code 1 where one fails. Takes about 90
seconds on one core.
"""

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import jax
import optax
from absl import flags
from jax.experimental import topologies

from lopt import base, command_line, configuration, inner_training
from lopt.outer import meta_training, parallel
from lopt.runs import files

TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x2", "As libtpu calls it; all of its chips are used.")
ONLY = flags.DEFINE_string("only", "", "Regular expression: the cases to compile.")
OUTPUT = flags.DEFINE_string("output", "runs/check_tpu", "Folder of results.json.")

MEMORY = 16e9  # bytes of a v5e chip
HORIZON = 40
PARTICLES = {"num_pairs": 16}
Section = dict[str, Any]
ESTIMATORS: dict[str, Section] = {
  "pes": {"name": "pes", "unroll_length": 20, **PARTICLES},
  "nres": {"name": "pes", "unroll_length": 20, "noise_period": HORIZON, **PARTICLES},
  "pes+analytic": {"name": "pes", "unroll_length": 20, "analytic": True, **PARTICLES},
  "truncated es": {"name": "es", "unroll_length": 20, **PARTICLES},
  "full es": {"name": "es", "unroll_length": None, **PARTICLES},
  "truncated bptt": {"name": "backprop", "unroll_length": 20},
  "full bptt": {"name": "backprop", "unroll_length": None, "max_horizon": HORIZON},
  "rtrl": {"name": "forward"},
  "uoro": {"name": "forward", "method": "uoro"},
}
QUADRATIC = {"name": "quadratic", "dimension": 10}
DIGITS = {"name": "mlp_classifier", "dataset": "digits"}
BAD = {
  "64-bit numbers": r"\b[fsuc](64|128)\[",
  "dynamic shapes": r"\[<=",
  "calls of the host": r" (infeed|outfeed|send|recv)\(|custom_call_target=\"[^\"]*[cC]allback",
}
# Drawing a quadratic takes one, in the branch of a `cond` that begins an episode.
GATHERS = r" (?:gather|scatter)\((?!.*(?:cond/branch_|_orthogonal))"


def cases() -> dict[str, tuple[Section, Section, Section]]:
  """`{name: (architecture, estimator, task)}`."""
  pes = ESTIMATORS["pes"]
  found = {f"{name}, pes": ({"name": name}, pes, QUADRATIC) for name in configuration.choices("architectures")}
  found |= {f"mlp, {name}": ({"name": "mlp"}, estimator, QUADRATIC) for name, estimator in ESTIMATORS.items()}
  return {**found, "direction of tensor_mlp, pes, digits": ({"name": "tensor_mlp", "direction": {}}, pes, DIGITS)}


def check(architecture: Section, estimator: Section, task: Section, devices: parallel.Devices) -> dict[str, Any]:
  """Compiles one case; figures of one chip, and what is wrong with it."""
  learned = configuration.build("architectures", architecture, where="architecture")
  family = configuration.build("tasks", task, where="task")
  problem = inner_training.build(family, learned, horizon=lambda key: jax.numpy.int32(HORIZON))
  gradients: base.GradientEstimator = configuration.build("outer", estimator, problem, where="estimator")
  trainer = meta_training.build(gradients, learned.init, optax.adam(1e-3), seed=0)
  lowered = trainer.lower(devices)
  begun = time.perf_counter()
  compiled = lowered.compile()
  seconds = time.perf_counter() - begun
  text, memory = compiled.as_text() or "", compiled.memory_analysis()
  assert memory is not None  # libtpu has it
  found = {what: len(re.findall(pattern, text)) for what, pattern in BAD.items()}
  gathers = len(re.findall(GATHERS, text))
  size = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
  problems = [f"{count} {what}" for what, count in found.items() if count]
  if gathers and task is not DIGITS:
    problems.append(f"{gathers} gathers")
  if size > MEMORY:
    problems.append(f"{size / 1e9:.1f} GB, of {MEMORY / 1e9:.0f}")
  if "all-reduce" not in text:
    problems.append("no mean over the chips")
  return {
    "seconds_to_compile": round(seconds, 2),
    "megabytes": round(size / 1e6, 2),
    "megaflops": round((compiled.cost_analysis() or {}).get("flops", 0) / 1e6, 2),
    "gathers": gathers,
    "problems": problems,
  }


def main(argv: list[str]) -> None:
  del argv
  parallel.setup()
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_enable_compilation_cache", False)
  try:
    devices = list(topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY.value).devices)
  except Exception as error:  # whatever libtpu raises
    sys.exit(
      f"check_tpu.py: no compiler for {TOPOLOGY.value}: {' '.join(str(error).split())[:300]}; run make check-tpu"
    )
  chosen = {name: case for name, case in cases().items() if re.search(ONLY.value, name)}
  if not chosen:
    raise configuration.ConfigError(f"--only: {ONLY.value!r} is in no case; there are: {'; '.join(cases())}")
  results = {}
  for name, case in chosen.items():
    try:
      results[name] = check(*case, devices)
    except Exception as error:  # the other cases are of interest too
      results[name] = {"problems": [f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"]}
    problems = "; ".join(results[name]["problems"])
    figures = ", ".join(f"{what.replace('_', ' ')} {x}" for what, x in results[name].items() if what != "problems")
    print(f"{name}: {f'FAILED: {problems}' if problems else 'good'}  ({figures})", flush=True)
  path = Path(OUTPUT.value) / "results.json"
  files.write_atomically(path, json.dumps(results, indent=1))
  failed = [name for name, result in results.items() if result["problems"]]
  print(f"{len(results) - len(failed)} of {len(results)} cases compile for {len(devices)} chips: {path}")
  sys.exit(1 if failed else 0)


if __name__ == "__main__":
  # Nothing of this machine is to be asked for: it is no TPU.
  os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", TPU_ACCELERATOR_TYPE="v5litepod-4")
  command_line.run(main)
