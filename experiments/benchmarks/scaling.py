"""One PES outer step on one and on two devices, in one and in two processes.

    python experiments/benchmarks/scaling.py

Cases are strong/D (64 pairs on D devices) and weak/D (32 pairs on each of D), where a device is a CPU core that
nothing else of the benchmark may use; strong/1+1 and weak/1+1 have two processes with a core each, joined by
`jax.distributed`. The inner problem is that of `throughput.py`, mlp/mlp8 with K = 20. Figures: seconds for an outer
step (the median of 15), and inner steps per second.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import time

import bench
from absl import flags

MEMBER = flags.DEFINE_string("member", None, "Internal: coordinator and number of this process of a pair.")
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
COUNTS = [str(2**i) for i in range(len(CORES).bit_length())]
CASES = [f"{kind}/{devices}" for kind in ("strong", "weak") for devices in (*COUNTS, "1+1")]


def measure(case: str) -> bench.Figures:
  kind, devices = case.split("/")
  number = 2 if devices == "1+1" else int(devices)
  num_pairs = 64 if kind == "strong" else 32 * number
  if devices == "1+1" and MEMBER.value is None:
    return _in_two_processes(case)
  first = int(MEMBER.value.split(",")[1]) if MEMBER.value else 0
  count = 1 if MEMBER.value else number
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, CORES[first : first + count])  # before JAX starts its threads

  import jax
  import jax.numpy as jnp
  import optax
  import throughput

  from lopt import configuration, inner_training
  from lopt.outer import meta_training, parallel, pes

  parallel.setup()
  if MEMBER.value:
    parallel.connect(MEMBER.value.split(",")[0], 2, first)
  learned = configuration.build("architectures", {"name": "mlp"}, where="architecture")
  family = configuration.build("tasks", throughput.TASKS["mlp8"], where="task")
  problem = inner_training.build(family, learned, horizon=lambda key: jnp.int32(200))
  estimator = pes.build(problem, num_pairs=num_pairs, sigma=0.01, unroll_length=20)
  trainer = meta_training.build(estimator, learned.init, optax.adam(1e-3), seed=0)
  state, times = trainer.init(), []
  for step in range(18):
    begun = time.perf_counter()
    state, _ = trainer.advance(step, state)
    times.append(time.perf_counter() - begun)
  assert jax.device_count() == number
  seconds = statistics.median(times[3:])
  return {"seconds": seconds, "inner_steps_per_second": 2 * num_pairs * 20 / seconds, "devices": devices}


def _in_two_processes(case: str) -> bench.Figures:
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  command = [sys.executable, __file__, f"--case={case}"]
  members = [
    subprocess.Popen([*command, f"--member={address},{i}"], stdout=subprocess.PIPE, text=True) for i in range(2)
  ]
  outputs = [member.communicate()[0] for member in members]
  figures = json.loads(outputs[0].strip().splitlines()[-1])
  return {name: value for name, value in figures.items() if name != "case"}


if __name__ == "__main__":
  bench.main(CASES, measure, ["seconds", "inner_steps_per_second"])
