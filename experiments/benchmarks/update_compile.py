"""CPU seconds to trace and to compile an update of tensors of 14 shapes, for every architecture, beside Muon.

    python experiments/benchmarks/update_compile.py [--only=tensor_mlp]

That is what people wait for before the first step of their own training loop. `direction/<name>` is the architecture
as a learned direction. There are 50 tensors, or as many as a case says at its end. On one core (`taskset -c 0`) the
wall clock is the sum; the compilation cache is off.
"""

import time

import bench
import jax
import jax.numpy as jnp
import optax
import update_cost

SHAPES = [(16, 64), (64, 64), (64, 128), (128, 64), (64, 16), (32, 64), (64, 32), (3, 3, 8, 16), (3, 3, 16, 16)]
SHAPES += [(64,), (128,), (16,), (32,), ()]
BASELINES = ("adamw", "muon")
CASES = [*BASELINES, *update_cost.NAMES, *(f"direction/{name}" for name in update_cost.NAMES)]
CASES += [
  f"{name}:{number}" for name in ("adamw", "muon", "direction/tensor_mlp", "direction/mlp") for number in (200, 800)
]


def measure(case: str) -> bench.Figures:
  jax.config.update("jax_enable_compilation_cache", False)
  case, _, number = case.partition(":")
  params = {f"{i:03d}": jnp.ones(SHAPES[i % len(SHAPES)]) for i in range(int(number or 50))}
  if case in BASELINES:
    tx = optax.with_extra_args_support(optax.adamw(1e-3) if case == "adamw" else optax.contrib.muon(1e-3))
  else:
    tx = update_cost.learned(case)
  state = jax.eval_shape(tx.init, params)
  begun = time.process_time()
  lowered = jax.jit(tx.update).lower(params, state, params, value=jnp.float32(1))
  traced = time.process_time()
  lowered.compile()
  return {"seconds_to_trace": traced - begun, "seconds_to_compile": time.process_time() - traced}


if __name__ == "__main__":
  bench.main(CASES, measure, ["seconds_to_trace", "seconds_to_compile"])
