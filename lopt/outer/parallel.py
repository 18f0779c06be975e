"""Devices: the only file that knows how many there are.

Every leaf of an estimator's state has the particles on its first axis (see `base.GradientEstimator`), so a state of N
pairs is laid out as [D, N/D, ...] over D devices, each of which runs the same estimator on its share. Random numbers
derive from a pair's index, so results do not depend on D but for the order of floating-point sums.

The devices may be those of several processes, on several machines (`connect`). Each then runs the same program on
the same configuration, holds the part of the particles that its own devices have, and computes the same θ.
"""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec

from lopt import base, checks

Devices = Sequence[Any]  # of `jax.Device`, which type checkers take for a variable
AXIS = "devices"
COMPILER_OPTIONS: dict[str, dict[str, int]] = {"cpu": {"xla_backend_optimization_level": 1}}
"""What programs of an inner training loop are compiled with. LLVM at its default, 3, takes twice the time to compile
and gives a CPU nothing that runs faster (`experiments/notes/compilation.md`)."""
RUNS_PER_BLOCK = {"cpu": 1}
"""How many runs a device trains at once in `map_runs`; 64 where not given. More leave a CPU's caches."""


def setup() -> None:
  """Prepares a process: call it, and `connect` after it where there are several, before anything else of JAX.

  Each CPU core becomes a device (accelerators are unaffected), and compiled programs are kept on disk, in
  `JAX_COMPILATION_CACHE_DIR` or else ~/.cache/lopt, so that the second start is fast.
  """
  # Not every system can say which cores this process may use.
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  jax.config.update("jax_num_cpu_devices", cores)
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "lopt" / "compiled"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def connect(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
  """Joins this process with others. Returns when all are there.

  Args:
    coordinator: `host:port` of process 0, which the others can reach.
    num_processes: How many there are.
    process_id: Which this is, from 0.

  All three are None where JAX can find them out: under SLURM and Open MPI, and on TPU pods.

  Raises:
    ValueError, RuntimeError: They cannot be found out, or not all processes came.
  """
  jax.distributed.initialize(
    coordinator,
    num_processes,
    process_id,
    heartbeat_timeout_seconds=30,  # after which the others of a dead process end
    shutdown_timeout_seconds=24 * 3600,  # for which the others wait at their end while process 0 evaluates
  )


def is_first() -> bool:
  """Whether this is the process that writes files and speaks to the user."""
  return jax.process_index() == 0


def has_company() -> bool:
  """Whether there are other processes."""
  return jax.process_count() > 1


def of_first(number: int) -> int:
  """Process 0's number, in all processes, once all of them ask for it."""
  return int(multihost_utils.broadcast_one_to_all(np.int32(number))) if jax.process_count() > 1 else number


def of_any(number: int) -> int:
  """The largest number of any process, in all processes, once all of them ask for it."""
  return int(np.max(multihost_utils.process_allgather(np.int32(number)))) if jax.process_count() > 1 else number


def num_devices(num_pairs: int) -> int:
  """How many devices to use: all of several processes, else the largest number that divides the pairs evenly.

  Raises:
    ValueError: The pairs cannot be divided among the devices of several processes.
  """
  if jax.process_count() == 1:
    return max(d for d in range(1, jax.local_device_count() + 1) if num_pairs % d == 0)
  checks.require(
    num_pairs % jax.device_count() == 0,
    "num_pairs",
    num_pairs,
    f"a multiple of the {jax.device_count()} devices of {jax.process_count()} processes",
  )
  return jax.device_count()


def averaged(estimator: base.GradientEstimator) -> base.GradientEstimator:
  """The estimator on one device's share of the particles, inside `spread`: results are means over all of them."""

  def estimate(key, theta, state):
    gradient, state, metrics = estimator.estimate(key, theta, state)
    gradient, metrics = mean((gradient, metrics))
    return gradient, state, metrics

  return base.GradientEstimator(estimator.init, estimate)


def mean(x: base.PyTree) -> base.PyTree:
  """Over all devices, inside `spread`."""
  return jax.lax.pmean(x, AXIS)


def spread(function: Callable[..., tuple], devices: int | Devices) -> Any:
  """`function(step, replicated, particles) -> (replicated, particles, outputs)` as one program on all devices.

  `particles` is split over devices by `split`, and its buffers are donated; all else is the same on each. Devices are
  a number of this process's, or given, such as those of a machine that is only described.
  """
  given = None if isinstance(devices, int) else devices
  if isinstance(devices, int) and jax.process_count() == 1:
    given = jax.local_devices()[:devices]
  return jax.pmap(
    function,
    AXIS,
    in_axes=(None, None, 0),
    out_axes=(None, 0, None),
    devices=given,  # None: all of all processes
    donate_argnums=2,
  )


def compiled(program: Any) -> Callable[..., Any]:
  """What `spread` returns, compiled with `COMPILER_OPTIONS` at its first call, for arguments like that call's."""
  if has_company():  # JAX compiles it ahead of the call for the arguments of all processes, and is given those of one
    return program
  executables: list[Callable[..., Any]] = []

  def call(*arguments: Any) -> Any:
    if not executables:
      executables.append(program.lower(*arguments).compile(compiler_options=_compiler_options()))
    return executables[0](*arguments)

  return call


def jit(function: Callable[..., base.PyTree]) -> Callable[..., Any]:
  """`jax.jit` with `COMPILER_OPTIONS`."""
  return jax.jit(function, compiler_options=_compiler_options())


def _compiler_options() -> dict[str, int] | None:
  if jax.config.read("jax_disable_most_optimizations"):  # by someone who wants even less, as tests do
    return None
  return COMPILER_OPTIONS.get(jax.local_devices()[0].platform)


def split(state: base.State, devices: int) -> base.State:
  """[N, ...] -> [D, N/D, ...], of several processes the rows of this one's devices."""
  state = jax.tree.map(lambda x: jnp.reshape(x, (devices, -1, *x.shape[1:])), state)
  if jax.process_count() == 1:
    return state
  first = jax.process_index() * jax.local_device_count()
  return jax.tree.map(lambda x: x[first : first + jax.local_device_count()], state)


def join(state: base.State) -> base.State:
  """[D, N/D, ...] -> [N, ...], whole in every process; of several, all have to call it."""
  if jax.process_count() > 1:
    state = multihost_utils.process_allgather(state, tiled=True)
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
