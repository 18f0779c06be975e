"""Devices: the only file that knows how many there are.

Every leaf of an estimator's state has the particles on its first axis (see `base.GradientEstimator`), so a state of N
pairs is laid out as [D, N/D, ...] over D devices, each of which runs the same estimator on its share. Random numbers
derive from a pair's index, so results do not depend on D but for the order of floating-point sums.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from lopt import base

AXIS = "devices"
RUNS_PER_BLOCK = {"cpu": 1}
"""How many runs a device trains at once in `map_runs`; 64 where not given. More leave a CPU's caches."""


def setup() -> None:
  """Prepares a process: call it before anything else of JAX.

  Each CPU core becomes a device (accelerators are unaffected), and compiled programs are kept on disk, in
  `JAX_COMPILATION_CACHE_DIR` or else ~/.cache/lopt, so that the second start is fast.
  """
  # Not every system can say which cores this process may use.
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  jax.config.update("jax_num_cpu_devices", cores)
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "lopt" / "compiled"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def num_devices(num_pairs: int) -> int:
  """How many of the local devices to use: the largest number that divides the pairs evenly."""
  return max(d for d in range(1, jax.local_device_count() + 1) if num_pairs % d == 0)


def averaged(estimator: base.GradientEstimator) -> base.GradientEstimator:
  """The estimator on one device's share of the particles, inside `spread`: results are means over all of them."""

  def estimate(key, theta, state):
    gradient, state, metrics = estimator.estimate(key, theta, state)
    gradient, metrics = jax.lax.pmean((gradient, metrics), AXIS)
    return gradient, state, metrics

  return base.GradientEstimator(estimator.init, estimate)


def spread(function: Callable[..., tuple], devices: int) -> Callable[..., tuple]:
  """`function(step, replicated, particles) -> (replicated, particles, outputs)` as one program on all devices.

  `particles` is split over devices by `split`, and its buffers are donated; all else is the same on each.
  """
  return jax.pmap(
    function,
    AXIS,
    in_axes=(None, None, 0),
    out_axes=(None, 0, None),
    devices=jax.local_devices()[:devices],
    donate_argnums=2,
  )


def split(state: base.State, devices: int) -> base.State:
  """[N, ...] -> [D, N/D, ...]."""
  return jax.tree.map(lambda x: jnp.reshape(x, (devices, -1, *x.shape[1:])), state)


def join(state: base.State) -> base.State:
  """[D, N/D, ...] -> [N, ...]."""
  return jax.tree.map(lambda x: jnp.reshape(x, (-1, *x.shape[2:])), state)


def map_runs(function: Callable[..., base.PyTree], shared: base.PyTree, runs: base.PyTree) -> base.PyTree:
  """`function(shared, run)` of every run (leaves [runs, ...]), split over this process's devices.

  For independent work without a state, such as evaluation; any number of runs will do.
  """
  devices = jax.local_devices()
  limit = RUNS_PER_BLOCK.get(devices[0].platform, 64)
  num_runs = len(jax.tree.leaves(runs)[0])
  per_device = math.ceil(num_runs / len(devices))
  num_blocks = math.ceil(per_device / limit)
  block = math.ceil(per_device / num_blocks)
  # The last blocks are filled up with runs that are thrown away.
  order = jnp.arange(len(devices) * num_blocks * block) % num_runs
  blocks = jax.tree.map(lambda x: x[order].reshape(-1, block, *x.shape[1:]), runs)

  def on_one_device(shared: base.PyTree, blocks: base.PyTree) -> base.PyTree:
    if block == 1:  # without a vmap, so that `lax.cond` stays a branch
      one = lambda run: function(shared, jax.tree.map(lambda x: x[0], run))
      return jax.tree.map(lambda x: x[:, None], jax.lax.map(one, blocks))
    return jax.lax.map(lambda runs: jax.vmap(lambda run: function(shared, run))(runs), blocks)

  mesh = Mesh(np.asarray(devices), (AXIS,))
  everywhere, divided = PartitionSpec(), PartitionSpec(AXIS)
  results = jax.shard_map(
    on_one_device, mesh=mesh, in_specs=(everywhere, divided), out_specs=divided, check_vma=False
  )(shared, blocks)
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:num_runs], results)
