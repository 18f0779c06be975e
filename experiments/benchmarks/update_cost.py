"""Cost of one optimizer update on large parameter trees, for every architecture, beside Optax's Adam and Muon.

    python experiments/benchmarks/update_cost.py [--only=mlp/.*/6]

Cases are architecture/tree/n for 10ⁿ parameters: an MLP, a residual network (3 × 3 filters, with scales and biases),
a transformer (embedding, attention and feed-forward matrices). `direction/<name>` is the architecture as a learned
direction, which orthogonalises matrices. One program on one device that may use all cores; the state is donated, as
in a training loop. Figures: seconds for an update, seconds for Adam's in the same process, for directions also for
Muon's, state in bytes per parameter, and what the update needs of memory for the time being.
"""

import math
import statistics
import time
from typing import Any

import bench
import jax
import jax.numpy as jnp
import optax
import throughput

from lopt import configuration

TREES = ("mlp", "resnet", "transformer")
NAMES = configuration.choices("architectures")
RIVALS = {"adam": optax.adam, "muon": optax.contrib.muon}
CASES = [
  f"{architecture}/{tree}/{n}"
  for architecture in ("adam", "muon", *NAMES, *(f"direction/{name}" for name in NAMES))
  for tree in TREES
  for n in (4, 5, 6, 7, 8)
]


def shapes(tree: str, size: int) -> list[tuple[int, ...]]:
  """The arrays of a network with about `size` parameters."""
  if tree == "mlp":  # three equal hidden layers
    width = round((math.sqrt(74**2 + 12 * size) - 74) / 6)
    layers = [(64, width), (width, width), (width, width), (width, width), (width, 10)]
    return [shape for w in layers for shape in (w, w[1:])]
  if tree == "resnet":  # four stages of two blocks, widths doubling
    width = max(1, round(math.sqrt(size / (9 * 4 * 85))))
    stages = [width * 2**i for i in range(4)]
    filters = [(3, 3, c, c) for c in stages for _ in range(4)]
    return [(3, 3, 3, width), *(shape for f in filters for shape in (f, f[3:], f[3:]))]
  width = max(8, round((math.sqrt(1000**2 + 48 * size) - 1000) / 24))  # 12 w² in one layer, 1,000 tokens
  matrices = [(width, width)] * 4 + [(width, 4 * width), (4 * width, width)]
  return [(1_000, width), *(shape for m in matrices for shape in (m, m[1:]))]


def measure(case: str) -> bench.Figures:
  architecture, tree, exponent = case.rsplit("/", 2)
  keys = jax.random.split(jax.random.key(0), 64)
  params = [0.1 * jax.random.normal(k, s) for k, s in zip(keys, shapes(tree, 10 ** int(exponent)), strict=False)]
  gradients = [jnp.sin(100 * p) for p in params]
  size = sum(p.size for p in params)
  rivals = {name: optax.with_extra_args_support(rival(1e-3)) for name, rival in RIVALS.items()}
  tx = rivals[architecture] if architecture in rivals else learned(architecture)
  seconds, memory, state = time_updates(tx, gradients, params)
  beside = rivals if "/" in architecture else {"adam": rivals["adam"]}
  others = {f"seconds_of_{name}": time_updates(rival, gradients, params)[0] for name, rival in beside.items()}
  return {
    "seconds": seconds,
    **others,
    "parameters": size,
    "state_bytes_per_parameter": throughput.bytes_of(state) / size,
    "temporary_bytes_per_parameter": memory / size,
    "matmul_gflops": throughput.matmul_rate() / 1e9,
  }


def learned(case: str) -> optax.GradientTransformationExtraArgs:
  """An untrained optimizer: of an architecture, or `direction/<name>` of one as a direction."""
  wrapped, _, name = case.rpartition("/")
  section = {"name": name, **({"direction": {}} if wrapped else {})}
  built = configuration.build("architectures", section, where="architecture")
  return built.transform(built.init(jax.random.key(1)), 1_000)


def time_updates(tx: optax.GradientTransformationExtraArgs, gradients: Any, params: Any) -> tuple[float, int, Any]:
  """The median time of an update, its temporary memory in bytes, and the state."""
  update = lambda g, s, p: tx.update(g, s, p, value=jnp.float32(1))
  state = tx.init(params)
  compiled = jax.jit(update, donate_argnums=1).lower(gradients, state, params).compile()
  times = []
  for _ in range(13):
    begun = time.perf_counter()
    updates, state = compiled(gradients, state, params)
    jax.block_until_ready((updates, state))
    times.append(time.perf_counter() - begun)
    if sum(times) > 20:
      break
  memory = compiled.memory_analysis()
  return statistics.median(times[3:] or times), memory.temp_size_in_bytes if memory else 0, state


if __name__ == "__main__":
  bench.main(
    CASES,
    measure,
    [
      "seconds",
      "seconds_of_adam",
      "seconds_of_muon",
      "parameters",
      "state_bytes_per_parameter",
      "temporary_bytes_per_parameter",
    ],
  )
