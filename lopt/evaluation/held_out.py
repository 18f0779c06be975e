"""Trains held-out tasks with learned optimizers and with tuned baselines, and measures who is better by how much.

Keys. Everything random in an inner run (the task, the initial parameters, the minibatches) is a function of
(seed, purpose, task index, run seed, step), never of the optimizer, so that all optimizers get the same runs:

    root = fold_in(key(seed), crc32(purpose))          purpose: HELD_OUT, or PERIODIC for watching meta-training
    sample key, task = split(fold_in(root, task index))
    init key, steps, validation key = split(fold_in(task, run seed), 3)
    batch key, loss key = split(fold_in(steps, step))  (in `inner_training.train_step`)
    keys of the fixed training batches: fold_in(validation key, 0)

Meta-training that splits key(seed), or folds small numbers into it, never meets one of these; and since the two
purposes have different tasks, what was selected while watching does not flatter the comparison. Reported runs have
the run seeds 0, 1, 2, …; learning rates are chosen on the run seeds FIRST_TUNING_SEED, FIRST_TUNING_SEED + 1, ….
"""

import functools
import hashlib
import json
import math
import operator
import time
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from lopt import base, checks, inner_training
from lopt.base import LearnedOptimizer, PRNGKey, PyTree, Scalar, TaskFamily, TaskParams, Theta
from lopt.evaluation import baselines, comparison, measures
from lopt.evaluation.comparison import REFERENCE, UNTUNED, Comparison, Envelope, Runs, TunedFor, Tuning, to_float64
from lopt.outer import parallel, unrolls
from lopt.runs import cache

HELD_OUT = "held-out"
PERIODIC = "periodic"
FIRST_TUNING_SEED = 2**30
MAX_EXTENSIONS = 4
"""By how many half-decades the grid grows at most, while a task's best learning rate is at its end."""
UNTUNED_RATE = 1e-3
REFERENCE_FACTOR = 4
"""How many times the horizon the reference is trained at all learning rates: the largest speed-up to be told."""


class Tasks(NamedTuple):
  """Tasks drawn from a family."""

  params: TaskParams
  """Leaves [tasks, ...]."""
  keys: Key[Array, " tasks"]
  """With a run seed folded in, the key of everything else that is random in a run."""


PerTheta = dict[str, Float[Array, " thetas"]]
Train = Callable[[Theta, Tasks, Int[Array, " seeds"]], Runs]


def compare(
  family: TaskFamily,
  optimizers: Mapping[str, tuple[LearnedOptimizer, Theta]],
  *,
  num_tasks: int,
  num_seeds: int,
  num_steps: int,
  seed: int,
  num_tuning_seeds: int = 3,
  num_held_out_batches: int = 8,
  tuned_for: TunedFor = "mean_loss",
  baseline_names: Sequence[str] = (REFERENCE, "SGDM"),
  cache_folder: str | Path | None = None,
  progress: Callable[[str], None] | None = None,
) -> Comparison:
  """Trains held-out tasks with learned optimizers, and with baselines tuned for each task.

  Args:
    family: The tasks; `num_tasks` are drawn, with keys that meta-training never uses.
    optimizers: `{name: (learned optimizer, θ)}`.
    num_tasks, num_seeds, num_steps: Each optimizer is reported on tasks × seeds runs of that many inner steps.
    seed: Determines the tasks and the runs.
    num_tuning_seeds: Runs for each learning rate and task, with other seeds than the reported ones.
    num_held_out_batches: Over how many batches a final training loss and a test loss are averaged.
    tuned_for: What learning rates are chosen by: the lowest 'mean_loss' or 'final_loss' on training batches.
    baseline_names: Of `baselines.ALL`; Adam is always there, tuned and as it is.
    cache_folder: Where runs of baselines are kept and found again, by the computation that they are; None: nowhere.
    progress: Is told, before each stage, what is about to run.

  Raises:
    ValueError: For a count below 1, another `tuned_for`, a name of a baseline or none of one, or a θ that is not of
      its architecture.
    OSError: The cache cannot be written.
  """
  checks.counts(
    num_tasks=num_tasks,
    num_seeds=num_seeds,
    num_steps=num_steps,
    num_tuning_seeds=num_tuning_seeds,
    num_held_out_batches=num_held_out_batches,
  )
  checks.one_of("tuned_for", tuned_for, get_args(TunedFor))
  for name in baseline_names:
    known = ", ".join(map(repr, baselines.ALL))
    checks.require(name in baselines.ALL, "baseline_names", name, f"among {known}")
  for name, (optimizer, theta) in optimizers.items():
    if name in baselines.ALL or name == UNTUNED:
      raise ValueError(f"optimizers: {name!r} is the name of a baseline; give the learned optimizer another name")
    _check_theta(name, optimizer, theta)
  baseline_names = list(dict.fromkeys([REFERENCE, *baseline_names]))
  say = progress or (lambda message: None)
  tasks = sample_tasks(family, seed, HELD_OUT, num_tasks)
  seeds = jnp.arange(num_seeds)
  build = functools.partial(
    build_train, family, num_steps=num_steps, num_held_out_batches=num_held_out_batches, split="test"
  )
  build_shared = functools.cache(build)  # one program for several θ of one architecture

  def train_learned(name: str, optimizer: LearnedOptimizer, theta: Theta) -> Runs:
    say(f"{name}: training {num_tasks} tasks × {num_seeds} seeds")
    return _only(build_shared(optimizer)(_one(theta), tasks, seeds), 0)

  def train_baseline(name: str) -> cache.Arrays:
    optimizer = baselines.ALL[name]()
    train = build(optimizer, theta_per_task=True)
    tuning_seeds = FIRST_TUNING_SEED + jnp.arange(num_tuning_seeds)

    def losses(learning_rates: Float[np.ndarray, "tasks rates"]) -> Float[np.ndarray, "tasks rates"]:
      runs = train(baselines.theta_at(learning_rates), tasks, tuning_seeds)
      return to_float64(runs.losses if tuned_for == "mean_loss" else runs.train_losses).mean(axis=(1, 3))

    say(f"{name}: choosing the learning rate of each of {num_tasks} tasks")
    tuning = tune(losses, num_tasks)
    best = np.asarray([[t.best] for t in tuning])
    if name != REFERENCE:
      say(f"{name}: training with the best")
      return _pack({name: _only(train(baselines.theta_at(best), tasks, seeds), 0)}, tuning)
    say(f"{name}: training with all, {REFERENCE_FACTOR} times as long")
    rates = np.concatenate([np.tile(baselines.LEARNING_RATES, (num_tasks, 1)), best], axis=1)
    points = measures.points(num_steps, REFERENCE_FACTOR * num_steps)
    train = build(optimizer, theta_per_task=True, points=tuple(points.tolist()))
    runs = train(baselines.theta_at(rates), tasks, seeds)
    envelope = Envelope(points, measures.envelope(np.asarray(runs.train_losses).mean(axis=1)))
    at_horizon = points.tolist().index(num_steps)
    runs = runs._replace(train_losses=runs.train_losses[..., at_horizon : at_horizon + 1])
    columns = {REFERENCE: -1, UNTUNED: baselines.LEARNING_RATES.index(UNTUNED_RATE)}
    packed = _pack({name: _only(runs, index) for name, index in columns.items()}, tuning)
    return packed | {f"envelope/{name}": x for name, x in envelope._asdict().items()}

  learned = {name: train_learned(name, *value) for name, value in optimizers.items()}
  key = {"family": _fingerprint(family) if cache_folder else None, "tasks": num_tasks, "seeds": num_seeds}
  key |= {
    "steps": num_steps,
    "seed": seed,
    "tuned_for": tuned_for,
    "tuning_seeds": num_tuning_seeds,
    "batches": num_held_out_batches,
  }
  key |= {"sources": _sources(), "jax": jax.__version__, "optax": optax.__version__, "on": jax.default_backend()}
  packed = {
    name: cache.remember(cache_folder, {**key, "baseline": name}, functools.partial(train_baseline, name))
    for name in baseline_names
  }
  envelope = Envelope(packed[REFERENCE]["envelope/steps"], packed[REFERENCE]["envelope/losses"])
  runs, tuning = dict(learned), {}
  for name, arrays in packed.items():
    some, tuning[name] = _unpack(arrays)
    runs |= some
  evaluations = comparison.evaluate(runs, tuning, envelope, num_steps)
  return Comparison(
    tasks=tuple(_describe(jax.tree.map(operator.itemgetter(i), tasks.params)) for i in range(num_tasks)),
    num_steps=num_steps,
    num_seeds=num_seeds,
    num_tuning_seeds=num_tuning_seeds,
    tuned_for=tuned_for,
    seed=seed,
    learned={name: evaluations.pop(name) for name in learned},
    baselines=evaluations,
    envelope=envelope,
    seconds_per_step={},
  )


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
  task = jax.tree.map(operator.itemgetter(0), sample_tasks(family, 0, HELD_OUT, 1))
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
  """Adds `seconds_per_step` of all optimizers, one after the other; baselines at the learning rate 1e-3."""
  made = {name: baselines.ALL[name]() for name in comparison.baselines if name != UNTUNED}
  everyone = {**optimizers, **{name: (optimizer, baselines.theta_at(1e-3)) for name, optimizer in made.items()}}
  seconds = {
    name: seconds_per_step(family, optimizer, theta, num_steps=comparison.num_steps)
    for name, (optimizer, theta) in everyone.items()
  }
  return comparison._replace(seconds_per_step=seconds | {UNTUNED: seconds[REFERENCE]})


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

  The tasks are neither meta-training's nor those of `compare`. The metrics `mean_loss`, `final_loss`,
  `validation_loss` and `diverged` are means over tasks and seeds, defined as in `comparison.Measures`, on the
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
  train = build_train(family, optimizer, num_steps=num_steps, num_held_out_batches=num_held_out_batches)
  tasks = sample_tasks(family, seed, PERIODIC, num_tasks)

  def metrics(theta: Theta) -> dict[str, float]:
    runs = train(_one(theta), tasks, jnp.arange(num_seeds))
    losses = to_float64(runs.losses)
    return {
      "mean_loss": float(losses.mean()),
      "final_loss": float(to_float64(runs.train_losses).mean()),
      "validation_loss": float(to_float64(runs.held_out_loss).mean()),
      "diverged": float(to_float64(runs.diverged).mean()),
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

  @jax.jit
  @jax.vmap
  def sample(index: Int[Array, ""]) -> Tasks:
    sample_key, runs_key = jax.random.split(jax.random.fold_in(root, index))
    return Tasks(family.sample(sample_key), runs_key)

  return sample(jnp.arange(num_tasks))


def build_train(
  family: TaskFamily,
  optimizer: LearnedOptimizer,
  *,
  num_steps: int,
  num_held_out_batches: int = 8,
  split: str = "validation",
  theta_per_task: bool = False,
  points: Sequence[int] = (),
) -> Train:
  """One compiled program that trains every task with every seed and every one of several θ, on all local devices.

  Args:
    family, optimizer: What is trained by what.
    num_steps: The length T of each run.
    num_held_out_batches: Over how many batches of `split` the loss after step T is averaged, and over how many
      training batches those at `points`.
    split: 'validation', or 'test', which nothing is meta-trained or chosen on.
    theta_per_task: Whether the tasks have θ of their own: leaves [tasks, thetas, ...] instead of [thetas, ...].
    points: After how many steps the training loss is measured on fixed batches, ascending; training goes on until
      the last of them. By default after step T.

  Returns:
    `(thetas, tasks, seeds) -> Runs`, its arrays [tasks, seeds, thetas, ...].
  """
  points = tuple(points) or (num_steps,)
  measured = np.isin(np.arange(max(num_steps, points[-1]) + 1), points)

  def cap(loss: Scalar, task_params: TaskParams) -> tuple[Scalar, Bool[Array, ""]]:
    return unrolls.bounded(family.normalize(loss, task_params), family.loss_cap)

  def train_run(thetas: Theta, task: Tasks, seed: Int[Array, ""]) -> Runs:
    task_params = task.params
    init_key, steps_key, validation_key = jax.random.split(jax.random.fold_in(task.keys, seed), 3)

    # The keys are not mapped over θ: batches are made once for all of them.
    def mean_loss(params: PyTree, key: PRNGKey, split: str) -> tuple[PerTheta, Bool[Array, " thetas"]]:
      def on_batch(key: PRNGKey) -> tuple[PerTheta, Bool[Array, " thetas"]]:
        batch_key, loss_key = jax.random.split(key)
        batch = family.batch(batch_key, task_params, split)

        def loss_and_metrics(params: PyTree) -> tuple[base.Metrics, Bool[Array, ""]]:
          loss, metrics = family.loss(params, loss_key, batch, task_params)
          loss, bad = cap(loss, task_params)
          return {**{name: jnp.asarray(x, jnp.float32) for name, x in metrics.items()}, "": loss}, bad

        return jax.vmap(loss_and_metrics)(params)

      metrics, bad = jax.lax.map(on_batch, jax.random.split(key, num_held_out_batches))
      return {name: jnp.mean(x, axis=0) for name, x in metrics.items()}, jnp.any(bad, axis=0)

    def train_loss(params: PyTree, state: PyTree) -> Float[Array, " thetas"]:
      params = jax.vmap(baselines.evaluation_params)(state, params)
      return mean_loss(params, jax.random.fold_in(validation_key, 0), "train")[0][""]

    def step(carry: PyTree, t: Int[Array, ""]) -> tuple[PyTree, tuple[Float[Array, " thetas"], ...]]:
      params, state, diverged = carry
      key = jax.random.fold_in(steps_key, t)

      def update(theta: Theta, params: PyTree, state: PyTree) -> tuple[PyTree, PyTree, Scalar, Bool[Array, ""]]:
        tx = optimizer.transform(theta, num_steps)
        params, state, loss = inner_training.train_step(family, tx, key, params, state, task_params)
        return params, state, *cap(loss, task_params)

      params, state, losses, bad = jax.vmap(update)(thetas, params, state)
      unmeasured = lambda params, state: jnp.full(num_thetas, jnp.nan)
      now = jax.lax.cond(jnp.asarray(measured)[t + 1], train_loss, unmeasured, params, state)
      return (params, state, diverged | bad), (losses, now)

    num_thetas = jax.tree.leaves(thetas)[0].shape[0]
    params = family.init(init_key, task_params)
    params = jax.tree.map(lambda x: jnp.broadcast_to(x, (num_thetas, *x.shape)), params)
    state = jax.vmap(lambda theta, params: optimizer.transform(theta, num_steps).init(params))(thetas, params)
    first = train_loss(params, state)
    carry, (losses, then) = jax.lax.scan(step, (params, state, jnp.zeros(num_thetas, bool)), jnp.arange(num_steps))
    params, state, diverged = carry
    metrics, bad = mean_loss(jax.vmap(baselines.evaluation_params)(state, params), validation_key, split)
    train_losses = jnp.concatenate([first[None], then])
    if points[-1] > num_steps:
      _, (_, later) = jax.lax.scan(step, carry, jnp.arange(num_steps, points[-1]))
      train_losses = jnp.concatenate([train_losses, later])
    train_losses = train_losses[np.array(points)]
    return Runs(losses.T, train_losses.T, metrics.pop(""), metrics, diverged | bad)

  def train(thetas: Theta, tasks: Tasks, seeds: Int[Array, " seeds"]) -> Runs:
    num_tasks, num_seeds = len(tasks.keys), len(seeds)
    index = jnp.repeat(jnp.arange(num_tasks), num_seeds)
    each_task, each_seed = _take(tasks, index), jnp.tile(seeds, num_tasks)
    if theta_per_task:
      runs = parallel.map_runs(lambda _, run: train_run(*run), (), (_take(thetas, index), each_task, each_seed))
    else:
      runs = parallel.map_runs(lambda thetas, run: train_run(thetas, *run), thetas, (each_task, each_seed))
    return jax.tree.map(lambda x: x.reshape(num_tasks, num_seeds, *x.shape[1:]), runs)

  return jax.jit(train)


def tune(
  losses_at: Callable[[Float[np.ndarray, "tasks rates"]], Float[np.ndarray, "tasks rates"]], num_tasks: int
) -> list[Tuning]:
  """Chooses for each task the learning rate of lowest loss, of `baselines.LEARNING_RATES`.

  Where the best is the lowest or highest tried, the next half-decade is tried too, at most `MAX_EXTENSIONS` times.

  Args:
    losses_at: `(learning rates) -> losses`, a row for each task.
    num_tasks: The number of rows.
  """
  grid = list(baselines.GRID)
  rates = np.tile([baselines.half_decade(index) for index in grid], (num_tasks, 1))
  # By the half-decade's index; of equal losses the lower learning rate's is taken.
  tried = [dict(zip(grid, row, strict=True)) for row in losses_at(rates).tolist()]

  def best_of(losses: dict[int, float]) -> int:
    return min(sorted(losses), key=lambda index: losses[index])

  def beyond(losses: dict[int, float]) -> int | None:
    return {min(losses): min(losses) - 1, max(losses): max(losses) + 1}.get(best_of(losses))

  for _ in range(MAX_EXTENSIONS):
    following = [beyond(losses) for losses in tried]
    if all(index is None for index in following):
      break
    # One program for all tasks: those that need no more repeat their best, and keep what they had.
    indices = [best_of(losses) if index is None else index for losses, index in zip(tried, following, strict=True)]
    new = losses_at(np.asarray([[baselines.half_decade(index)] for index in indices]))
    for losses, index, loss in zip(tried, indices, new[:, 0].tolist(), strict=True):
      losses.setdefault(index, loss)

  return [
    Tuning(
      learning_rates=tuple(baselines.half_decade(index) for index in sorted(losses)),
      losses=tuple(losses[index] for index in sorted(losses)),
      best=baselines.half_decade(best_of(losses)),
      interior=beyond(losses) is None,
    )
    for losses in tried
  ]


def _pack(runs: Mapping[str, Runs], tuning: Sequence[Tuning]) -> cache.Arrays:
  """Runs by name as arrays by name, for the cache; `_unpack` has them back."""
  packed = {"tuning": np.array(json.dumps([t._asdict() for t in tuning]))}
  for name, x in runs.items():
    metrics = {f"metric/{metric}": value for metric, value in x.held_out_metrics.items()}
    arrays = {
      "losses": x.losses,
      "train_losses": x.train_losses,
      "held_out_loss": x.held_out_loss,
      "diverged": x.diverged,
      **metrics,
    }
    packed |= {f"runs/{name}/{field}": np.asarray(value) for field, value in arrays.items()}
  return packed


def _unpack(packed: cache.Arrays) -> tuple[dict[str, Runs], list[Tuning]]:
  fields: dict[str, dict[str, np.ndarray]] = {}
  for path, array in packed.items():
    if path.startswith("runs/"):
      _, name, field = path.split("/", 2)
      fields.setdefault(name, {})[field] = array
  runs = {
    name: Runs(
      held_out_metrics={x.removeprefix("metric/"): a for x, a in own.items() if x.startswith("metric/")},
      **{x: a for x, a in own.items() if not x.startswith("metric/")},
    )
    for name, own in fields.items()
  }
  tuning = [
    Tuning(tuple(t["learning_rates"]), tuple(t["losses"]), t["best"], t["interior"])
    for t in json.loads(packed["tuning"].item())
  ]
  return runs, tuning


def _fingerprint(family: TaskFamily) -> str:
  """A hash of all that a family computes: its functions as compiled, with the data that they hold."""

  def everything(key: PRNGKey) -> PyTree:
    task_params = family.sample(key)
    params = family.init(key, task_params)
    batches = {split: family.batch(key, task_params, split) for split in ("train", "test")}
    loss_and_gradients = jax.value_and_grad(family.loss, has_aux=True)
    (loss, metrics), gradients = loss_and_gradients(params, key, batches["train"], task_params)
    return task_params, params, batches, metrics, gradients, family.normalize(loss, task_params)

  program = jax.jit(everything).lower(jax.random.key(0)).as_text()
  return hashlib.sha256(f"{family.loss_cap}{program}".encode()).hexdigest()


@functools.cache
def _sources() -> str:
  """A hash of the files that say how baselines are trained."""
  there = [Path(module.__file__ or "") for module in (baselines, inner_training, measures, unrolls, base)]
  return hashlib.sha256(b"".join(path.read_bytes() for path in (Path(__file__), *there))).hexdigest()


def _only(runs: Runs, index: int) -> Runs:
  """[tasks, seeds, thetas, ...] -> [tasks, seeds, ...], of one θ."""
  return jax.tree.map(lambda x: np.asarray(x[:, :, index]), runs)


def _one(theta: Theta) -> Theta:
  """[...] -> [1, ...], on the host, because θ may have been committed to other devices than those used here."""
  return jax.tree.map(lambda x: np.asarray(x)[None], theta)


def _take(tree: PyTree, index: Int[Array, " n"]) -> PyTree:
  return jax.tree.map(lambda x: x[index], tree)


def _describe(task_params: TaskParams) -> str:
  """The small numeric leaves of a task's parameters, as "name value"."""

  def words(path: tuple, leaf: Array) -> str:
    name = jax.tree_util.keystr(path, simple=True, separator=".").replace("_", " ")
    return " ".join([name, *(f"{value:.3g}" for value in np.ravel(leaf).tolist())]).strip()

  def is_small_number(leaf: Array) -> bool:
    return 1 <= leaf.size <= 4 and jnp.issubdtype(leaf.dtype, jnp.number)

  leaves = jax.tree_util.tree_leaves_with_path(task_params)
  return ", ".join(words(path, leaf) for path, leaf in leaves if is_small_number(leaf))


def _check_theta(name: str, optimizer: LearnedOptimizer, theta: Theta) -> None:
  def layout(theta: Theta) -> PyTree:
    return jax.tree.map(jnp.shape, theta)

  expected = layout(jax.eval_shape(optimizer.init, jax.random.key(0)))
  if layout(theta) != expected:
    raise ValueError(f"optimizers[{name!r}]: θ is not of this architecture: {layout(theta)}, not {expected}")
