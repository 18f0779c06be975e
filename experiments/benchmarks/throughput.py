"""Speed of one outer step of PES, for every architecture on three tasks.

    python experiments/benchmarks/throughput.py [--only='mlp/mlp8/64/20'] [--profile]

Cases are architecture/task/pairs/K: quad is quadratics in 10 dimensions; mlp8 images of 8 × 8, one hidden layer of
32, batches of 64 (2,410 parameters); mlp28 images of 28 × 28, hidden layers of 128 and 128, batches of 128 (118,282
parameters). σ = 0.01, horizon 200, Adam outside, one compiled program for each outer step on all cores.

Figures: seconds for an outer step (the median after three that warm up), inner steps and parameter updates a second,
the arithmetic that this needs as a share of the matrix-multiply rate measured in the same process, seconds until the
first outer step is done, peak memory. `--profile` adds where the time goes, and writes a trace for `xprof`.
"""

import functools
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench
import jax
import jax.numpy as jnp
import optax
from absl import flags

from lopt import base, configuration, inner_training
from lopt.outer import meta_training, parallel, pes, vectors

PROFILE = flags.DEFINE_bool("profile", False, "With --case: time the parts of an inner step, and write a trace.")
REPEATS = flags.DEFINE_integer("repeats", 15, "Outer steps that are timed.", 1)
BLOCK = flags.DEFINE_integer("pairs_per_block", None, "See lopt/outer/pes.py.", 1)

IMAGES = {"name": "mlp_classifier", "dataset": "digits", "weight_scale": (1.0, 1.0), "activations": ("relu",)}
TASKS = {
  "quad": {"name": "quadratic", "dimension": 10},
  "mlp8": {**IMAGES, "resolution": 8, "hidden_sizes": (32,), "batch_size": 64},
  # Digits enlarged: the arithmetic is that of real images of this size.
  "mlp28": {**IMAGES, "resolution": 28, "hidden_sizes": (128, 128), "batch_size": 128},
}
ARCHITECTURES: dict[str, dict[str, Any]] = {name: {"name": name} for name in configuration.choices("architectures")}
ARCHITECTURES["fused_mlp"] = {"name": "mlp", "fused": True}  # other than mlp on NVIDIA GPUs only
CASES = [
  f"{architecture}/{task}/{pairs}/{unroll_length}"
  for architecture in ARCHITECTURES
  for task in TASKS
  for pairs in (8, 64, 256)
  for unroll_length in (20, 50)
]


def measure(case: str) -> bench.Figures:
  architecture, task, pairs, unroll_length = case.split("/")
  num_pairs, length = int(pairs), int(unroll_length)
  parallel.setup()
  jax.config.update("jax_enable_compilation_cache", False)  # compiling is measured
  begun = time.perf_counter()
  learned = configuration.build("architectures", ARCHITECTURES[architecture], where="architecture")
  family = configuration.build("tasks", TASKS[task], where="task")
  problem = inner_training.build(family, learned, horizon=lambda key: jnp.int32(200))
  estimator = pes.build(problem, num_pairs=num_pairs, sigma=0.01, unroll_length=length, pairs_per_block=BLOCK.value)
  trainer = meta_training.build(estimator, learned.init, optax.adam(1e-3), seed=0)
  state, _ = trainer.advance(0, trainer.init())
  first = time.perf_counter() - begun
  seconds = []
  for step in range(1, 4 + REPEATS.value):
    begun = time.perf_counter()
    state, _ = trainer.advance(step, state)
    seconds.append(time.perf_counter() - begun)
    if sum(seconds) > 40:
      break
  outer_step = statistics.median(seconds[3:] or seconds)
  inner_steps = 2 * num_pairs * length
  plain = {"name": ARCHITECTURES[architecture]["name"]}  # XLA does not count what is in a kernel
  flops, num_params = arithmetic(family, configuration.build("architectures", plain, where="architecture"))
  rate = matmul_rate()
  figures = {
    "seconds": outer_step,
    "inner_steps_per_second": inner_steps / outer_step,
    "parameter_updates_per_second": inner_steps * num_params / outer_step,
    "gflops": flops * inner_steps / outer_step / 1e9,
    "matmul_gflops": rate / 1e9,
    "share_of_matmul_rate": flops * inner_steps / outer_step / rate,
    "seconds_to_first_step": first,
    "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    "bytes_per_particle": bytes_of(state.particles) / (2 * num_pairs),
  }
  if PROFILE.value:
    folder = Path("runs/benchmarks/traces") / case.replace("/", "_")
    with jax.profiler.trace(str(folder)):
      trainer.advance(len(seconds) + 1, state)
    figures |= profile(family, learned, outer_step * jax.local_device_count() / inner_steps)
    figures["trace"] = str(folder)
  return figures


def arithmetic(family: base.TaskFamily, learned: base.LearnedOptimizer) -> tuple[float, int]:
  """Floating-point operations that an inner step of one particle needs, and the number of parameters.

  By XLA's count for the gradient of the task, and for an update of 2,048 parameters in a matrix, in proportion: so no
  loop that makes it fast counts.
  """
  params, task_params = _example(family)
  batch = family.batch(jax.random.key(2), task_params, "train")
  gradient = jax.jit(jax.grad(lambda p: family.loss(p, jax.random.key(3), batch, task_params)[0]))
  num_params = sum(x.size for x in jax.tree.leaves(params))
  theta = learned.init(jax.random.key(0))
  small = jnp.ones((64, 32))
  tx = learned.transform(theta, 200)
  update = jax.jit(lambda g, s, p: tx.update(g, s, p, value=jnp.float32(1)))
  per_parameter = _flops(update, small, tx.init(small), small) / small.size
  return _flops(gradient, params) + per_parameter * num_params, num_params


def _flops(function: Any, *args: Any) -> float:
  lowered = function.lower(*args)
  # Some backends, GPUs among them, count only once the program is compiled.
  cost = lowered.cost_analysis() or lowered.compile().cost_analysis()
  return float(cost["flops"])


def matmul_rate() -> float:
  """Floating-point operations per second of float32 matrix products, on all cores."""
  size = 2048
  a = jnp.ones((size, size))
  product = jax.jit(lambda a: a @ a)
  return 2 * size**3 / seconds_of(lambda: product(a), repeats=7)


def seconds_of(call: Callable[[], Any], *, repeats: int) -> float:
  """The median time of a call, after one that warms up."""
  jax.block_until_ready(call())
  times = []
  for _ in range(repeats):
    begun = time.perf_counter()
    jax.block_until_ready(call())
    times.append(time.perf_counter() - begun)
  return statistics.median(times)


def bytes_of(tree: base.PyTree) -> int:
  return sum(x.nbytes for x in jax.tree.leaves(tree))


def profile(family: base.TaskFamily, learned: base.LearnedOptimizer, whole: float) -> dict[str, float]:
  """Microseconds of one core for one inner step of one particle, by parts that are timed alone.

  A part is run for a pair (two θ and parameters, one key), as in an unroll, 100 times in a loop.
  """
  params, task_params = _example(family)
  theta = learned.init(jax.random.key(0))
  pair = functools.partial(jax.tree.map, lambda x: jnp.stack([x, 1.01 * x]))
  pairs, thetas = pair(params), pair(theta)
  state = jax.tree.map(lambda x: jnp.stack([x, x]), learned.transform(theta, 200).init(params))
  draw = lambda key: family.batch(key, task_params, "train")
  batch = draw(jax.random.key(2))

  def gradient(params):
    return jax.grad(lambda p: family.loss(p, jax.random.key(3), batch, task_params)[0])(params)

  def update(theta, gradients, state, params):
    return learned.transform(theta, 200).update(gradients, state, params, value=jnp.float32(1))

  def loop(body, carry):
    run = jax.jit(lambda carry: jax.lax.fori_loop(0, 100, body, carry))
    return 1e6 * seconds_of(lambda: run(carry), repeats=5) / 100 / 2

  gradients = jax.vmap(gradient)(pairs)
  total = lambda tree: sum(jnp.sum(x).astype(jnp.float32) for x in jax.tree.leaves(tree))
  parts = {
    "random numbers and batch": loop(
      lambda i, c: c + total(draw(jax.random.fold_in(jax.random.key(4), i + c.astype(jnp.int32)))), jnp.float32(0)
    ),
    "task gradient": loop(lambda i, p: jax.tree.map(lambda a, b: a - 1e-9 * b, p, jax.vmap(gradient)(p)), pairs),
    "update (features and network)": loop(
      lambda i, c: jax.vmap(update)(thetas, jax.tree.map(lambda g, u: g + 1e-9 * u, gradients, c[0]), c[1], pairs),
      (gradients, state),
    ),
  }
  flat, _ = vectors.ravel(theta)
  keys = jax.random.split(jax.random.key(5), 8)
  drawn = jax.jit(lambda keys: vectors.perturbations(keys, 0.01, flat))
  parts["perturbation, of one unroll of 20"] = 1e6 * seconds_of(lambda: drawn(keys), repeats=20) / 8 / 20 / 2
  parts["resets, estimator and rest"] = 1e6 * whole - sum(parts.values())
  return {f"microseconds: {name}": value for name, value in parts.items()}


def _example(family: base.TaskFamily) -> tuple[base.Params, base.TaskParams]:
  task_params = family.sample(jax.random.key(0))
  return family.init(jax.random.key(1), task_params), task_params


if __name__ == "__main__":
  bench.main(
    CASES,
    measure,
    ["seconds", "inner_steps_per_second", "share_of_matmul_rate", "seconds_to_first_step", "peak_megabytes"],
  )
