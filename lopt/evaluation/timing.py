"""The time of an inner step, and the share of it that is the optimizer's."""

import math
import operator
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from lopt import inner_training
from lopt.base import LearnedOptimizer, PyTree, TaskFamily, Theta
from lopt.evaluation import baselines, inner_runs
from lopt.evaluation.comparison import GRADIENT, REFERENCE, Comparison


def seconds_per_step(
  family: TaskFamily,
  optimizer: LearnedOptimizer,
  theta: Theta,
  *,
  num_steps: int,
  at_least: float = 0.2,
  repeats: int = 5,
) -> float:
  """The time of one inner step (batch, gradient, update) of one run that has the machine to itself.

  Compiled steps follow each other without a return to Python, on one device, for `at_least` seconds after compiling
  and a first call that are not counted; the median of that many repeats. For it to mean anything, nothing else may
  run meanwhile.

  Args:
    family, optimizer, theta: What is trained by what; on the first held-out task of seed 0.
    num_steps: What the optimizer is told that the run's length is.
    at_least: Seconds of a repeat.
    repeats: Their number.
  """
  task = jax.tree.map(operator.itemgetter(0), inner_runs.sample_tasks(family, 0, inner_runs.HELD_OUT, 1))
  init_key, steps_key = jax.random.split(task.keys)

  @jax.jit
  def start(theta: Theta) -> PyTree:
    params = family.init(init_key, task.params)
    return params, optimizer.transform(theta, num_steps).init(params), jnp.float32(0)

  @jax.jit
  def run(theta: Theta, state: PyTree, steps: Int[Array, ""]) -> PyTree:
    def step(t: Int[Array, ""], state: PyTree) -> PyTree:
      params, optimizer_state, losses = state
      tx, key = optimizer.transform(theta, num_steps), jax.random.fold_in(steps_key, t)
      *state, loss = inner_training.train_step(family, tx, key, params, optimizer_state, task.params)
      return *state, losses + loss  # used, or else XLA would leave it out

    return jax.lax.fori_loop(0, steps, step, state)

  def measure(steps: int) -> float:
    begun = time.perf_counter()
    jax.block_until_ready(run(theta, state, jnp.int32(steps)))
    return time.perf_counter() - begun

  theta = jax.tree.map(np.asarray, theta)  # it may have been committed to several devices
  state = start(theta)
  steps = 10
  measure(steps)
  while (seconds := measure(steps)) < at_least:
    steps = math.ceil(steps * min(1.2 * at_least / seconds, 10.0))
  return float(np.median([measure(steps) / steps for _ in range(repeats)]))


def with_times(
  comparison: Comparison, family: TaskFamily, optimizers: Mapping[str, tuple[LearnedOptimizer, Theta]]
) -> Comparison:
  """Adds `seconds_per_step` of learned optimizers, of AdamW and Muon, and of plain SGD, for the gradient."""
  # Parameters have to change, or else the compiler would take the gradient once for all steps, or not at all.
  least = baselines.from_learning_rate(optax.sgd, cosine=False)
  made = {name: baselines.ALL[name]() for name in (REFERENCE, "Muon") if name in comparison.baselines}
  everyone = {**optimizers, **{name: (optimizer, baselines.theta_at(1e-3)) for name, optimizer in made.items()}}
  seconds = {
    name: seconds_per_step(family, optimizer, theta, num_steps=comparison.num_steps)
    for name, (optimizer, theta) in {**everyone, GRADIENT: (least, baselines.theta_at(1e-6))}.items()
  }
  return comparison._replace(seconds_per_step=seconds)
