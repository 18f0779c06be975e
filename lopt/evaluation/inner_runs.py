"""Inner training runs on tasks set apart for evaluation: one compiled program for all learning rates, seeds, lengths.

Keys. Everything random in an inner run (the task, the initial parameters, the minibatches) is a function of
(seed, purpose, task index, run seed, step), never of the optimizer, so that all optimizers get the same runs:

    root = fold_in(key(seed), crc32(purpose))          purpose: HELD_OUT, or PERIODIC for watching meta-training
    sample key, task = split(fold_in(root, task index))
    init key, steps, validation key = split(fold_in(task, run seed), 3)
    batch key, loss key = split(fold_in(steps, step))  (in `inner_training.train_step`)
    keys of the fixed training batches: fold_in(validation key, 0)

Meta-training that splits key(seed), or folds small numbers into it, never meets one of these; and since the two
purposes have different tasks, what was selected while watching does not flatter the comparison.
"""

import zlib
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Key

from lopt import base, checks, inner_training
from lopt.base import LearnedOptimizer, Params, PRNGKey, PyTree, Scalar, TaskFamily, TaskParams, Theta
from lopt.evaluation import baselines
from lopt.outer import parallel, unrolls

HELD_OUT = "held-out"
PERIODIC = "periodic"


class Tasks(NamedTuple):
  """Tasks drawn from a family."""

  params: TaskParams
  """Leaves [tasks, ...]."""
  keys: Key[Array, " tasks"]
  """With a run seed folded in, the key of everything else that is random in a run."""


class Runs(NamedTuple):
  """What inner training runs produced: losses in the family's common unit, capped at `family.loss_cap`."""

  curve: Float[np.ndarray, "*runs points"]
  """The training losses of the steps' minibatches, before the updates: means over equal parts of the run. NaN for a
  part without a step, of runs that have fewer steps than points."""
  mean_loss: Float[np.ndarray, "*runs"]
  """Their mean over all steps."""
  final_loss: Float[np.ndarray, "*runs"]
  """After the last step: the mean over fixed training batches, the same ones for all optimizers."""
  held_out_loss: Float[np.ndarray, "*runs"]
  """Likewise over batches of the validation or the test split."""
  held_out_metrics: Mapping[str, Float[np.ndarray, "*runs"]]
  """What else the family's loss function tells of these batches, such as `accuracy`, averaged likewise."""
  diverged: Bool[np.ndarray, "*runs"]
  """Whether any of the training losses, during the run or after it, was NaN or reached the cap. Held-out ones may
  reach it where a network has learned its training data by heart."""


Rated = Callable[[Theta, Scalar, Int[Array, ""]], optax.GradientTransformationExtraArgs]
"""`(theta, learning rate, num_steps) -> tx`: an optimizer whose learning rate is to be tuned."""
PerRate = dict[str, Float[Array, "*splits rates"]]
Train = Callable[[Theta, ArrayLike, Tasks, Int[Array, " runs"], int], Runs]


def as_is(optimizer: LearnedOptimizer) -> Rated:
  """The optimizer with the step sizes that it has on its own, whatever the learning rate."""
  return lambda theta, rate, num_steps: optimizer.transform(theta, num_steps)


def at_rate(optimizer: LearnedOptimizer) -> Rated:
  """An optimizer with a direction at a learning rate: the peak of the schedule that it recommends.

  Raises:
    ValueError: It has no direction.
  """
  direction, schedule = optimizer.direction, optimizer.schedule
  if direction is None or schedule is None:
    raise ValueError("optimizer: it has no direction, and so takes no learning rate")

  def rated(theta: Theta, rate: Scalar, num_steps: Int[Array, ""]) -> optax.GradientTransformationExtraArgs:
    return optax.chain(direction(theta, num_steps), optax.scale_by_learning_rate(schedule(rate, num_steps)))

  return rated


def baseline(optimizer: LearnedOptimizer) -> Rated:
  """A baseline, whose θ is its learning rate; the θ given is not used."""
  return lambda theta, rate, num_steps: optimizer.transform(baselines.theta_at(rate), num_steps)


def build_train(
  family: TaskFamily, *, num_points: int = 50, num_held_out_batches: int = 8, split: str = "validation"
) -> Callable[[Rated], Train]:
  """Makes functions that train many runs on all local devices, each at several learning rates.

  θ, learning rates and the number of steps are arguments of a compiled program: other values of these are no other
  program. The programs that make initial parameters and measure final losses are shared by all optimizers.

  Args:
    family: The tasks.
    num_points: Into how many parts the training curve is divided.
    num_held_out_batches: Over how many batches of `split`, and over how many of the training split, final losses are
      averaged.
    split: 'validation', or 'test', which nothing is meta-trained or chosen on.

  Returns:
    `(optimizer at a learning rate) -> train`, with `train(theta, learning rates [runs, rates], tasks [runs],
    seeds [runs], num_steps) -> Runs`, whose arrays are [runs, rates, ...] on the host.
  """

  def cap(loss: Scalar, task_params: TaskParams) -> tuple[Scalar, Bool[Array, ""]]:
    return unrolls.bounded(family.normalize(loss, task_params), family.loss_cap)

  def keys(task: Tasks, seed: Int[Array, ""]) -> tuple[PRNGKey, PRNGKey, PRNGKey]:
    init_key, steps_key, validation_key = jax.random.split(jax.random.fold_in(task.keys, seed), 3)
    return init_key, steps_key, validation_key

  def start(_: None, run: tuple[Tasks, Int[Array, ""]]) -> Params:
    task, seed = run
    return family.init(keys(task, seed)[0], task.params)

  def measure(_: None, run: tuple[Params, Tasks, Int[Array, ""]]) -> tuple[PerRate, Bool[Array, " rates"]]:
    params, task, seed = run
    key = keys(task, seed)[2]

    def batches(key: PRNGKey, split: str) -> PyTree:  # keys for the loss, batches
      batch_keys, loss_keys = jax.vmap(jax.random.split, out_axes=1)(jax.random.split(key, num_held_out_batches))
      return loss_keys, jax.vmap(lambda key: family.batch(key, task.params, split))(batch_keys)

    def on_batch(batch: PyTree) -> tuple[PerRate, Bool[Array, " rates"]]:
      loss_key, examples = batch

      def loss_and_metrics(params: Params) -> tuple[base.Metrics, Bool[Array, ""]]:
        loss, metrics = family.loss(params, loss_key, examples, task.params)
        loss, bad = cap(loss, task.params)
        return {**{name: jnp.asarray(x, jnp.float32) for name, x in metrics.items()}, "": loss}, bad

      return jax.vmap(loss_and_metrics)(params)

    both = [batches(jax.random.fold_in(key, 0), "train"), batches(key, split)]
    metrics, bad = jax.lax.map(on_batch, jax.tree.map(lambda *x: jnp.concatenate(x), *both))
    means = {name: x.reshape(2, num_held_out_batches, -1).mean(axis=1) for name, x in metrics.items()}
    return means, jnp.any(bad[:num_held_out_batches], axis=0)  # of the training split

  start_all = parallel.jit(lambda *run: parallel.map_runs(start, None, run))
  measure_all = parallel.jit(lambda *run: parallel.map_runs(measure, None, run))

  def build(rated: Rated) -> Train:
    def advance(
      shared: tuple[Theta, Int[Array, ""]], run: tuple[Params, Float[Array, " rates"], Tasks, Int[Array, ""]]
    ) -> tuple[Params, Float[Array, "rates points"], Bool[Array, " rates"]]:
      (theta, num_steps), (params, rates, task, seed) = shared, run
      steps_key = keys(task, seed)[1]

      def step(t: Int[Array, ""], carry: PyTree) -> PyTree:
        params, state, diverged, sums = carry
        key = jax.random.fold_in(steps_key, t)  # not mapped over rates: a batch is made once for all of them

        def update(rate: Scalar, params: Params, state: PyTree) -> tuple[Params, PyTree, Scalar, Bool[Array, ""]]:
          tx = rated(theta, rate, num_steps)
          params, state, loss = inner_training.train_step(family, tx, key, params, state, task.params)
          return params, state, *cap(loss, task.params)

        params, state, losses, bad = jax.vmap(update)(rates, params, state)
        return params, state, diverged | bad, sums.at[:, t * num_points // num_steps].add(losses)

      params = jax.tree.map(lambda x: jnp.broadcast_to(x, (*rates.shape, *x.shape)), params)
      state = jax.vmap(lambda rate, params: rated(theta, rate, num_steps).init(params))(rates, params)
      carry = params, state, jnp.zeros(rates.shape, bool), jnp.zeros((*rates.shape, num_points))
      params, state, diverged, sums = jax.lax.fori_loop(0, num_steps, step, carry)
      return jax.vmap(baselines.evaluation_params)(state, params), sums, diverged

    advance_all = parallel.jit(lambda shared, *run: parallel.map_runs(advance, shared, run))

    def train(theta: Theta, rates: ArrayLike, tasks: Tasks, seeds: Int[Array, " runs"], num_steps: int) -> Runs:
      # On the host, because θ may have been committed to other devices than those used here.
      shared = jax.tree.map(np.asarray, theta), jnp.asarray(num_steps, jnp.int32)
      run = start_all(tasks, seeds), jnp.asarray(rates, jnp.float32), tasks, seeds
      params, sums, diverged = advance_all(shared, *run)
      metrics, bad = measure_all(params, tasks, seeds)
      metrics = {name: np.asarray(x, np.float64) for name, x in metrics.items()}  # [runs, splits, rates]
      losses = metrics.pop("")
      sums = np.asarray(sums, np.float64)
      ends = -(-np.arange(num_points + 1) * num_steps // num_points)  # the first step of each part
      counts = np.where(np.diff(ends) > 0, np.diff(ends), np.nan)
      return Runs(
        curve=(sums / counts).astype(np.float32),
        mean_loss=sums.sum(axis=-1) / num_steps,
        final_loss=losses[:, 0],
        held_out_loss=losses[:, 1],
        held_out_metrics={name: x[:, 1] for name, x in metrics.items()},
        diverged=np.asarray(diverged) | np.asarray(bad),
      )

    return train

  return build


def every_seed(tasks: Tasks, num_seeds: int) -> tuple[Tasks, Int[Array, " runs"]]:
  """The runs of each task with the seeds 0, 1, …: tasks [runs] and seeds [runs], a task's runs in a row."""
  num_tasks = len(tasks.keys)
  index = jnp.repeat(jnp.arange(num_tasks), num_seeds)
  return jax.tree.map(lambda x: x[index], tasks), jnp.tile(jnp.arange(num_seeds), num_tasks)


def build_metrics(
  family: TaskFamily,
  optimizer: LearnedOptimizer,
  *,
  num_tasks: int,
  num_seeds: int,
  num_steps: int,
  seed: int,
  num_held_out_batches: int = 8,
) -> Callable[[Theta], dict[str, float]]:
  """The periodic evaluation while meta-training: `(theta) -> metrics`, on fixed tasks; compiled at the first call.

  The tasks are neither meta-training's nor those of a comparison. The metrics `mean_loss`, `final_loss`,
  `validation_loss` and `diverged` are means over tasks and seeds of what `Runs` has; what is held out is the
  validation split.

  Raises:
    ValueError: For a count below 1.
  """
  checks.counts(
    num_tasks=num_tasks,
    num_seeds=num_seeds,
    num_steps=num_steps,
    num_held_out_batches=num_held_out_batches,
  )
  train = build_train(family, num_held_out_batches=num_held_out_batches)(as_is(optimizer))
  tasks, seeds = every_seed(sample_tasks(family, seed, PERIODIC, num_tasks), num_seeds)

  def metrics(theta: Theta) -> dict[str, float]:
    runs = train(theta, jnp.ones((len(seeds), 1)), tasks, seeds, num_steps)
    return {
      "mean_loss": float(np.mean(runs.mean_loss, dtype=np.float64)),
      "final_loss": float(np.mean(runs.final_loss, dtype=np.float64)),
      "validation_loss": float(np.mean(runs.held_out_loss, dtype=np.float64)),
      "diverged": float(np.mean(runs.diverged, dtype=np.float64)),
    }

  return metrics


def seeds_of_families(seed: int, names: Collection[str]) -> dict[str, int]:
  """One seed for each of the families that are compared together; of a single one `seed` itself.

  With the same one, families that differ in their data or networks only would draw the same activations, scales and
  numbers of classes: fewer independent tasks than it seems.
  """
  return {name: zlib.crc32(name.encode(), seed) if len(names) > 1 else seed for name in names}


def sample_tasks(family: TaskFamily, seed: int, purpose: str, num_tasks: int) -> Tasks:
  """The first `num_tasks` tasks set apart for a purpose."""
  root = jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))

  @parallel.jit
  @jax.vmap
  def sample(index: Int[Array, ""]) -> Tasks:
    sample_key, runs_key = jax.random.split(jax.random.fold_in(root, index))
    return Tasks(family.sample(sample_key), runs_key)

  return sample(jnp.arange(num_tasks))
