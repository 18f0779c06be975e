"""Trains held-out tasks with learned optimizers and with tuned baselines, and measures who is better by how much.

Keys. Everything random in an inner run (the task, the initial parameters, the minibatches) is a function of
(seed, purpose, task index, run seed, step), never of the optimizer, so that all optimizers get the same runs:

    root = fold_in(key(seed), crc32(purpose))          purpose: HELD_OUT, or PERIODIC for watching meta-training
    sample key, task = split(fold_in(root, task index))
    init key, steps, validation key = split(fold_in(task, run seed), 3)
    batch key, loss key = split(fold_in(steps, step))  (in `inner_training.train_step`)

Meta-training that splits key(seed), or folds small numbers into it, never meets one of these; and since the two
purposes have different tasks, what was selected while watching does not flatter the comparison. Reported runs have
the run seeds 0, 1, 2, …; learning rates are chosen on the run seeds FIRST_TUNING_SEED, FIRST_TUNING_SEED + 1, ….
"""

import functools
import operator
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from lopt import baselines, checks, inner_training
from lopt.base import LearnedOptimizer, PRNGKey, PyTree, Scalar, TaskFamily, TaskParams, Theta
from lopt.outer import parallel, unrolls

HELD_OUT = "held-out"
PERIODIC = "periodic"
FIRST_TUNING_SEED = 2**30
FINAL_SHARE = 0.05
"""The share of the steps over which the final training loss, and each point of a smoothed curve, is a mean."""
MAX_EXTENSIONS = 4
"""By how many half-decades the grid grows at most, while a task's best learning rate is at its end."""
REFERENCE = "Adam"
"""The tuned baseline whose final loss is the target of `steps_to_target`."""


class Tasks(NamedTuple):
  """Tasks drawn from a family."""

  params: TaskParams
  """Leaves [tasks, ...]."""
  keys: Key[Array, " tasks"]
  """With a run seed folded in, the key of everything else that is random in a run."""


class Runs(NamedTuple):
  """What inner training runs produced: losses in the family's common unit, capped at `family.loss_cap`."""

  losses: Float[Array, "*runs T"]
  """The training loss at each step: that of the step's minibatch, before the update."""
  held_out_loss: Float[Array, "*runs"]
  """After the last step, the mean over batches of the validation or the test split."""
  diverged: Bool[Array, "*runs"]
  """Whether any of these losses was NaN or reached the cap."""


class Tuning(NamedTuple):
  """How a baseline's learning rate was chosen for one task."""

  learning_rates: tuple[float, ...]
  """Those tried, ascending."""
  mean_losses: tuple[float, ...]
  """The mean training loss of each, over steps and tuning seeds."""
  best: float
  """The learning rate with the lowest."""
  interior: bool
  """Whether lower and higher ones were tried; if not, a better one may lie outside the grid."""


class Measures(NamedTuple):
  """One optimizer on one task. Losses are in the family's common unit; `_error` is the standard error of the mean
  over seeds (NaN when there is only one).
  """

  mean_loss: float
  """Mean training loss over all steps and seeds: the area under the training curve."""
  mean_loss_error: float
  final_loss: float
  """Mean training loss over the last 5% of the steps and all seeds."""
  final_loss_error: float
  test_loss: float
  """Mean loss on the test split after the last step, over seeds."""
  test_loss_error: float
  diverged: float
  """Share of the runs in which a loss was NaN or reached the cap."""
  steps_to_target: int | None
  """`steps_to_reach` of the seeds' mean curve; the target is tuned Adam's `final_loss` on this task."""
  speed_up: float | None
  """Tuned Adam's own `steps_to_target` divided by this optimizer's: how many times sooner; None when never."""
  tuning: Tuning | None
  """How the learning rate was chosen; None for a learned optimizer, which has none."""


class Evaluation(NamedTuple):
  """One optimizer on all tasks."""

  measures: tuple[Measures, ...]
  """One a task."""
  curves: Float[np.ndarray, "tasks seeds T"]
  """The training losses."""


class Comparison(NamedTuple):
  """Learned optimizers and tuned baselines on the same held-out tasks, with the same seeds."""

  tasks: tuple[str, ...]
  """What tells each task from the others, in a few words."""
  num_steps: int
  num_seeds: int
  num_tuning_seeds: int
  seed: int
  learned: dict[str, Evaluation]
  baselines: dict[str, Evaluation]


class Summary(NamedTuple):
  """One optimizer, over all tasks of a comparison."""

  mean_loss: float
  """The mean over tasks; likewise the next three."""
  final_loss: float
  test_loss: float
  diverged: float
  mean_loss_error: float
  """The standard error of `mean_loss` over seeds; the tasks are taken as given."""
  tasks_won: dict[str, int]
  """For each (other) baseline: the number of tasks on which this optimizer's mean training loss is lower."""
  tasks_reached: int
  """The number of tasks on which it reached tuned Adam's final loss."""
  median_speed_up: float | None
  """The median over all tasks, those never reached being the slowest; None when the median is one of them."""
  tasks_interior: int | None
  """The number of tasks whose best learning rate is interior to the grid; None for a learned optimizer."""


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
  progress: Callable[[str], None] | None = None,
) -> Comparison:
  """Trains held-out tasks with learned optimizers, and with Adam and SGDM tuned for each task.

  Args:
    family: The tasks; `num_tasks` are drawn, with keys that meta-training never uses.
    optimizers: `{name: (learned optimizer, θ)}`.
    num_tasks, num_seeds, num_steps: Each optimizer is reported on tasks × seeds runs of that many inner steps.
    seed: Determines the tasks and the runs.
    num_tuning_seeds: Runs for each learning rate and task, with other seeds than the reported ones.
    num_held_out_batches: Over how many batches a validation or test loss is averaged.
    progress: Is told, before each stage, what is about to run.

  Raises:
    ValueError: For a count below 1, a name of a baseline, or a θ that is not of its architecture.
  """
  tuned = {REFERENCE: baselines.adam(), "SGDM": baselines.sgdm()}
  checks.counts(
    num_tasks=num_tasks,
    num_seeds=num_seeds,
    num_steps=num_steps,
    num_tuning_seeds=num_tuning_seeds,
    num_held_out_batches=num_held_out_batches,
  )
  for name, (optimizer, theta) in optimizers.items():
    if name in tuned:
      raise ValueError(f"optimizers: {name!r} is the name of a baseline; give the learned optimizer another name")
    _check_theta(name, optimizer, theta)
  say = progress or (lambda message: None)
  tasks = sample_tasks(family, seed, HELD_OUT, num_tasks)
  seeds = jnp.arange(num_seeds)

  @functools.cache  # one program for several θ of one architecture
  def build(optimizer: LearnedOptimizer, *, theta_per_task: bool = False) -> Train:
    return build_train(
      family,
      optimizer,
      num_steps=num_steps,
      num_held_out_batches=num_held_out_batches,
      split="test",
      theta_per_task=theta_per_task,
    )

  def tune_and_train(name: str, optimizer: LearnedOptimizer) -> tuple[Runs, list[Tuning]]:
    train = build(optimizer, theta_per_task=True)
    tuning_seeds = FIRST_TUNING_SEED + jnp.arange(num_tuning_seeds)

    def mean_losses(learning_rates: Float[np.ndarray, "tasks rates"]) -> Float[np.ndarray, "tasks rates"]:
      runs = train(baselines.theta_at(learning_rates), tasks, tuning_seeds)
      return _to_numpy(runs.losses).mean(axis=(1, 3))

    say(f"{name}: choosing the learning rate of each of {num_tasks} tasks")
    tuning = tune(mean_losses, num_tasks)
    say(f"{name}: training with the best")
    best = np.asarray([[t.best] for t in tuning])
    return train(baselines.theta_at(best), tasks, seeds), tuning

  def train_learned(name: str, optimizer: LearnedOptimizer, theta: Theta) -> Runs:
    say(f"{name}: training {num_tasks} tasks × {num_seeds} seeds")
    return build(optimizer)(_one(theta), tasks, seeds)

  learned = {name: train_learned(name, *value) for name, value in optimizers.items()}
  tuned = {name: tune_and_train(name, optimizer) for name, optimizer in tuned.items()}
  reference, _ = tuned[REFERENCE]
  reference_curves = _to_numpy(reference.losses)[:, :, 0].mean(axis=1)
  targets = [smooth(curve)[-1] for curve in reference_curves]
  # Adam itself may reach the loss that it ends with before its last step; the same rule for both is fair to it.
  reference_steps = [steps_to_reach(*pair) or num_steps for pair in zip(reference_curves, targets, strict=True)]
  return Comparison(
    tasks=tuple(_describe(jax.tree.map(operator.itemgetter(i), tasks.params)) for i in range(num_tasks)),
    num_steps=num_steps,
    num_seeds=num_seeds,
    num_tuning_seeds=num_tuning_seeds,
    seed=seed,
    learned={name: _evaluation(runs, [None] * num_tasks, targets, reference_steps) for name, runs in learned.items()},
    baselines={name: _evaluation(*value, targets, reference_steps) for name, value in tuned.items()},
  )


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
  `validation_loss` and `diverged` are means over tasks and seeds, defined as in `Measures`, on the validation split.

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
    losses = _to_numpy(runs.losses)
    return {
      "mean_loss": float(losses.mean()),
      "final_loss": float(losses[..., -window(num_steps) :].mean()),
      "validation_loss": float(_to_numpy(runs.held_out_loss).mean()),
      "diverged": float(_to_numpy(runs.diverged).mean()),
    }

  return metrics


def summarize(comparison: Comparison, name: str) -> Summary:
  """One optimizer of a comparison, over all tasks."""
  own = (comparison.learned | comparison.baselines)[name].measures
  # A never takes longer than anything, and must weigh on the median.
  relative_steps = float(np.median([1 / m.speed_up if m.speed_up else np.inf for m in own]))
  return Summary(
    mean_loss=float(np.mean([m.mean_loss for m in own])),
    final_loss=float(np.mean([m.final_loss for m in own])),
    test_loss=float(np.mean([m.test_loss for m in own])),
    diverged=float(np.mean([m.diverged for m in own])),
    mean_loss_error=float(np.sqrt(np.sum(np.square([m.mean_loss_error for m in own]))) / len(own)),
    tasks_won={
      other: sum(m.mean_loss < o.mean_loss for m, o in zip(own, evaluation.measures, strict=True))
      for other, evaluation in comparison.baselines.items()
      if other != name
    },
    tasks_reached=sum(m.steps_to_target is not None for m in own),
    median_speed_up=1 / relative_steps if np.isfinite(relative_steps) else None,
    tasks_interior=sum(m.tuning.interior for m in own if m.tuning) if name in comparison.baselines else None,
  )


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
) -> Train:
  """One compiled program that trains every task with every seed and every one of several θ, on all local devices.

  Args:
    family, optimizer: What is trained by what.
    num_steps: The length of each run.
    num_held_out_batches: Over how many batches of `split` the loss after the last step is averaged.
    split: 'validation', or 'test', which nothing is meta-trained or chosen on.
    theta_per_task: Whether the tasks have θ of their own: leaves [tasks, thetas, ...] instead of [thetas, ...].

  Returns:
    `(thetas, tasks, seeds) -> Runs`, its arrays [tasks, seeds, thetas, ...].
  """

  def cap(loss: Scalar, task_params: TaskParams) -> tuple[Scalar, Bool[Array, ""]]:
    return unrolls.bounded(family.normalize(loss, task_params), family.loss_cap)

  def train_run(thetas: Theta, task: Tasks, seed: Int[Array, ""]) -> Runs:
    task_params = task.params
    init_key, steps_key, validation_key = jax.random.split(jax.random.fold_in(task.keys, seed), 3)

    def step(carry: PyTree, t: Int[Array, ""]) -> tuple[PyTree, Float[Array, " thetas"]]:
      params, state, diverged = carry
      key = jax.random.fold_in(steps_key, t)

      # The key is not mapped over θ: the minibatch is made once for all of them.
      def update(theta: Theta, params: PyTree, state: PyTree) -> tuple[PyTree, PyTree, Scalar, Bool[Array, ""]]:
        tx = optimizer.transform(theta, num_steps)
        params, state, loss = inner_training.train_step(family, tx, key, params, state, task_params)
        return params, state, *cap(loss, task_params)

      params, state, losses, bad = jax.vmap(update)(thetas, params, state)
      return (params, state, diverged | bad), losses

    def validate(params: PyTree, key: PRNGKey) -> tuple[Float[Array, " thetas"], Bool[Array, " thetas"]]:
      batch_key, loss_key = jax.random.split(key)
      batch = family.batch(batch_key, task_params, split)
      return jax.vmap(lambda p: cap(family.loss(p, loss_key, batch, task_params)[0], task_params))(params)

    num_thetas = jax.tree.leaves(thetas)[0].shape[0]
    params = family.init(init_key, task_params)
    params = jax.tree.map(lambda x: jnp.broadcast_to(x, (num_thetas, *x.shape)), params)
    state = jax.vmap(lambda theta, params: optimizer.transform(theta, num_steps).init(params))(thetas, params)
    start = (params, state, jnp.zeros(num_thetas, bool))
    (params, _, diverged), losses = jax.lax.scan(step, start, jnp.arange(num_steps))
    keys = jax.random.split(validation_key, num_held_out_batches)
    held_out_losses, bad = jax.lax.map(lambda key: validate(params, key), keys)
    return Runs(losses.T, jnp.mean(held_out_losses, axis=0), diverged | jnp.any(bad, axis=0))

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
  mean_losses: Callable[[Float[np.ndarray, "tasks rates"]], Float[np.ndarray, "tasks rates"]], num_tasks: int
) -> list[Tuning]:
  """Chooses for each task the learning rate of lowest mean training loss, of `baselines.LEARNING_RATES`.

  Where the best is the lowest or highest tried, the next half-decade is tried too, at most `MAX_EXTENSIONS` times.

  Args:
    mean_losses: `(learning rates) -> mean training losses`, a row for each task.
    num_tasks: The number of rows.
  """
  grid = list(baselines.GRID)
  rates = np.tile([baselines.half_decade(index) for index in grid], (num_tasks, 1))
  # By the half-decade's index; of equal losses the lower learning rate's is taken.
  tried = [dict(zip(grid, row, strict=True)) for row in mean_losses(rates).tolist()]

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
    new = mean_losses(np.asarray([[baselines.half_decade(index)] for index in indices]))
    for losses, index, loss in zip(tried, indices, new[:, 0].tolist(), strict=True):
      losses.setdefault(index, loss)

  return [
    Tuning(
      learning_rates=tuple(baselines.half_decade(index) for index in sorted(losses)),
      mean_losses=tuple(losses[index] for index in sorted(losses)),
      best=baselines.half_decade(best_of(losses)),
      interior=beyond(losses) is None,
    )
    for losses in tried
  ]


def smooth(curve: Float[np.ndarray, "*runs T"]) -> Float[np.ndarray, "*runs steps"]:
  """The trailing mean of a curve over w = `window(T)` steps, along the last axis.

  Only whole windows: entry i is the mean of the losses of steps i+1, …, i+w, as known after step i+w.
  """
  return np.lib.stride_tricks.sliding_window_view(curve, window(curve.shape[-1]), axis=-1).mean(axis=-1)


def steps_to_reach(curve: Float[np.ndarray, " T"], target: float) -> int | None:
  """The first number of steps after which the smoothed curve is at or below the target; None when never.

  Smoothed as in `smooth`, so never before 5% of the steps. A curve reaches its own final loss, at the last step if
  not before.
  """
  reached = np.flatnonzero(smooth(curve) <= target)
  return int(reached[0]) + window(len(curve)) if reached.size else None


def window(num_steps: int) -> int:
  """The length of the window of `smooth`: 5% of the steps, at least one."""
  return max(1, round(FINAL_SHARE * num_steps))


def _evaluation(
  runs: Runs, tuning: Sequence[Tuning | None], targets: Sequence[float], reference_steps: Sequence[int]
) -> Evaluation:
  """Measures of runs [tasks, seeds, 1, ...]; the last two are the reference's final loss and its steps to it."""
  losses, test_loss, diverged = (_to_numpy(x)[:, :, 0] for x in runs)
  return Evaluation(tuple(map(_measures, losses, test_loss, diverged, tuning, targets, reference_steps)), losses)


def _measures(
  losses: Float[np.ndarray, "seeds T"],
  test_loss: Float[np.ndarray, " seeds"],
  diverged: Float[np.ndarray, " seeds"],
  tuning: Tuning | None,
  target: float,
  reference_steps: int,
) -> Measures:
  curve = losses.mean(axis=0)
  steps = steps_to_reach(curve, target)
  return Measures(
    mean_loss=float(losses.mean()),
    mean_loss_error=_standard_error(losses.mean(axis=1)),
    final_loss=float(smooth(curve)[-1]),
    final_loss_error=_standard_error(smooth(losses)[:, -1]),
    test_loss=float(test_loss.mean()),
    test_loss_error=_standard_error(test_loss),
    diverged=float(diverged.mean()),
    steps_to_target=steps,
    speed_up=reference_steps / steps if steps else None,
    tuning=tuning,
  )


def _standard_error(values: Float[np.ndarray, " seeds"]) -> float:
  if len(values) < 2:
    return float("nan")
  return float(values.std(ddof=1) / len(values) ** 0.5)


def _one(theta: Theta) -> Theta:
  """[...] -> [1, ...], on the host, because θ may have been committed to other devices than those used here."""
  return jax.tree.map(lambda x: np.asarray(x)[None], theta)


def _take(tree: PyTree, index: Int[Array, " n"]) -> PyTree:
  return jax.tree.map(lambda x: x[index], tree)


def _to_numpy(x: Array) -> np.ndarray:
  """In float64, so that means of many float32 are exact enough to be compared."""
  return np.asarray(x, np.float64)


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
