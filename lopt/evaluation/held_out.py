"""Trains held-out tasks with learned optimizers and with tuned baselines, from the same starts on the same batches.

Everything that takes a learning rate is tuned in the same way: each task, all seeds, half-decades from
`baselines.GRID` on, further where the best is at an end. Each seed is reported at the rate that is best for the other
seeds. Rivals over which speed-ups are told are then trained at several lengths, with schedules that end there.
"""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lopt import checks
from lopt.base import LearnedOptimizer, PyTree, TaskFamily, TaskParams, Theta
from lopt.evaluation import baselines, identity, inner_runs
from lopt.evaluation.comparison import CONTROL, REFERENCE, Comparison, Ladder, Role, Sweep
from lopt.evaluation.inner_runs import Rated, Runs
from lopt.runs import cache

RATES_AT_ONCE = 3
"""Learning rates of a run that one call trains: of a compiled program, so that a grid is a few calls."""
MAX_EXTENSIONS = 3
"""How often that many half-decades are added to a task's grid while its best learning rate is at an end."""
LENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Of the runs of rivals over which speed-ups are told, ascending, in the learned optimizers' numbers of steps."""


class _Entry(NamedTuple):
  """An optimizer of the comparison."""

  role: Role
  rated: Rated
  theta: Theta
  unit: float
  recommended: float | None


def compare(
  family: TaskFamily,
  optimizers: Mapping[str, tuple[LearnedOptimizer, Theta]],
  *,
  num_tasks: int,
  num_seeds: int,
  num_steps: int,
  seed: int,
  num_held_out_batches: int = 8,
  lengths: Sequence[float] = LENGTHS,
  baseline_names: Sequence[str] = (REFERENCE, "Muon"),
  cache_folder: str | Path | None = None,
  progress: Callable[[str], None] | None = None,
) -> Comparison:
  """Trains held-out tasks with learned optimizers, with their untrained direction, and with tuned baselines.

  Args:
    family: The tasks; `num_tasks` are drawn, with keys that meta-training never uses.
    optimizers: `{name: (learned optimizer, θ)}`.
    num_tasks, num_seeds, num_steps: Each optimizer is reported on tasks × seeds runs of that many inner steps.
    seed: Determines the tasks and the runs.
    num_held_out_batches: Over how many batches a final training loss and a test loss are averaged.
    lengths: Of rivals' runs, in `num_steps`; ascending, with 1 among them. The ones above 1 are trained on the tasks
      where a loss was not reached yet.
    baseline_names: Of `baselines.ALL`; AdamW is always there.
    cache_folder: Where runs are kept and found again, by the computation that they are; None: nowhere.
    progress: Is told, before each stage, what is about to run.

  Raises:
    ValueError: For a count below 1, other lengths, a name of a baseline or none of one, or a θ that is not of its
      architecture.
    OSError: The cache cannot be written.
  """
  checks.counts(
    num_tasks=num_tasks, num_seeds=num_seeds, num_steps=num_steps, num_held_out_batches=num_held_out_batches
  )
  good = list(lengths) == sorted(set(lengths)) and 1 in lengths and min(lengths) > 0
  checks.require(good, "lengths", lengths, "ascending, above 0, with 1 among them")
  for name in baseline_names:
    checks.require(name in baselines.ALL, "baseline_names", name, f"among {', '.join(map(repr, baselines.ALL))}")
  for name, (optimizer, theta) in optimizers.items():
    if name in (*baselines.ALL, CONTROL):
      raise ValueError(f"optimizers: {name!r} is the name of a baseline; give the learned optimizer another name")
    _check_theta(name, optimizer, theta)
  say = progress or (lambda message: None)
  tasks = inner_runs.sample_tasks(family, seed, inner_runs.HELD_OUT, num_tasks)
  params = jax.eval_shape(lambda key: family.init(key, family.sample(key)), jax.random.key(0))
  entries = _entries(optimizers, list(dict.fromkeys([REFERENCE, *baseline_names])), params, num_steps)
  build = functools.cache(inner_runs.build_train(family, num_held_out_batches=num_held_out_batches, split="test"))
  at_once = 1 if jax.default_backend() == "cpu" else num_tasks  # tasks in a call
  key = {"seeds": num_seeds, "seed": seed, "batches": num_held_out_batches, "sources": identity.of_sources(__file__)}
  key |= {"jax": jax.__version__, "on": jax.default_backend()}
  key |= {"family": identity.of_family(family) if cache_folder else None}

  def trained(name: str, which: tuple[int, ...], rates: Float[np.ndarray, "tasks rates"], steps: int) -> list[Sweep]:
    """One optimizer on some of the tasks."""
    sweeps = []
    for first in range(0, len(which), at_once):
      some = np.resize(np.arange(first, min(first + at_once, len(which))), at_once)  # always as many: one program
      chosen = jax.tree.map(lambda x, some=some: x[np.array(which)[some]], tasks)
      runs = build(entries[name].rated)(
        entries[name].theta,
        np.repeat(rates[some], num_seeds, axis=0),
        *inner_runs.every_seed(chosen, num_seeds),
        steps,
      )
      each = jax.tree.map(lambda x: x.reshape(at_once, num_seeds, *x.shape[1:]), runs)
      own = [Sweep(tuple(rates[k].tolist()), jax.tree.map(operator.itemgetter(i), each)) for i, k in enumerate(some)]
      sweeps += own[: len(which) - first]
    return sweeps

  @functools.cache
  def fingerprint(name: str) -> str | None:
    entry = entries[name]
    settings = (entry.unit, entry.recommended)
    return identity.of_optimizer(family, entry.rated, entry.theta, settings) if cache_folder else None

  def sweep(name: str) -> tuple[Sweep, ...]:
    """One optimizer at all its learning rates."""
    say(f"{name}: {num_tasks} tasks × {num_seeds} seeds, each at its learning rates")
    entry, train = entries[name], functools.partial(trained, name, steps=num_steps)
    if entry.recommended is None and entry.role != "baseline":
      return tuple(train(tuple(range(num_tasks)), np.ones((num_tasks, 1))))  # it takes no learning rate
    tuned = tune(train, num_tasks, entry.unit)
    if entry.recommended is not None:
      tuned = [_with_rate(s, i, entry.recommended, train) for i, s in enumerate(tuned)]
    return tuple(tuned)

  def remembered(name: str, what: dict[str, object], compute: Callable[[], Sequence[Sweep]]) -> tuple[Sweep, ...]:
    content = {**key, "optimizer": fingerprint(name), "steps": num_steps, **what}
    return _unpack(cache.remember(cache_folder, content, lambda: _pack(compute())))

  sweeps = {name: remembered(name, {"tasks": num_tasks}, functools.partial(sweep, name)) for name in entries}
  found = Comparison(
    tasks=tuple(_describe(jax.tree.map(operator.itemgetter(i), tasks.params)) for i in range(num_tasks)),
    num_steps=num_steps,
    num_seeds=num_seeds,
    seed=seed,
    roles={name: entry.role for name, entry in entries.items()},
    sweeps=sweeps,
    recommended={name: entry.recommended for name, entry in entries.items() if entry.role != "baseline"},
    ladders={},
    seconds_per_step={},
  )

  def goal(rival: str, task: int) -> float:
    """The lowest loss to which steps are to be counted."""
    others = [name for name, role in found.roles.items() if name != rival and role != "baseline"]
    others += [name for name in [found.best_baseline(task)] if name != rival]
    return min((float(sweeps[name][task].tuned_losses.mean()) for name in others), default=np.inf)

  def ladder(rival: str, task: int) -> Ladder:
    """One rival on one task at several lengths."""
    start = sweeps[rival][task]
    losses: dict[float, np.ndarray] = {1.0: start.tuned_losses}
    best = start.rates[start.best]
    for length in [x for x in lengths if x < 1][::-1] + [x for x in lengths if x > 1]:
      if length > 1 and min(float(x.mean()) for x in losses.values()) <= goal(rival, task):
        break
      near = np.asarray([[best / 10**0.5, best, best * 10**0.5]])
      steps = max(1, round(length * num_steps))
      what = {"task": task, "steps": steps, "rates": near.tolist()}
      (longer,) = remembered(rival, what, functools.partial(trained, rival, (task,), near, steps))
      losses[length] = longer.tuned_losses
      best = longer.rates[longer.best] if length > 1 else best  # from which the next length goes on
    return losses

  def ladders(rival: str) -> tuple[Ladder, ...]:
    everywhere = rival in (REFERENCE, CONTROL)
    which = [i for i in range(num_tasks) if everywhere or found.best_baseline(i) == rival]
    if which:
      say(f"{rival}: {len(which)} tasks at other lengths")
    return tuple(ladder(rival, i) if i in which else {} for i in range(num_tasks))

  return found._replace(ladders={name: ladders(name) for name, role in found.roles.items() if role != "learned"})


def tune(
  train: Callable[[tuple[int, ...], Float[np.ndarray, "tasks rates"]], list[Sweep]], num_tasks: int, unit: float = 1.0
) -> list[Sweep]:
  """Trains every task at the learning rates of `baselines.GRID`, and at more of those tasks whose best is at an end.

  Args:
    train: `(tasks, learning rates [tasks, rates]) -> sweeps`, for some of the tasks.
    num_tasks: Their number.
    unit: Factor on the learning rates.
  """
  tried: list[dict[int, Sweep]] = [{} for _ in range(num_tasks)]  # by the half-decade's index

  def add(which: list[int], indices: list[range]) -> None:
    rates = np.array([[unit * baselines.half_decade(k) for k in row] for row in indices])
    for task, row, swept in zip(which, indices, train(tuple(which), rates), strict=True):
      for k, index in enumerate(row):
        tried[task][index] = Sweep(swept.rates[k : k + 1], jax.tree.map(lambda x, k=k: x[:, k : k + 1], swept.runs))

  def beyond(task: int) -> range | None:
    """The half-decades beyond the end where the best is."""
    losses = {index: float(s.runs.final_loss.mean()) for index, s in tried[task].items()}
    best, low, high = min(sorted(losses), key=losses.__getitem__), min(losses), max(losses)
    more = {low: range(low - RATES_AT_ONCE, low), high: range(high + 1, high + 1 + RATES_AT_ONCE)}
    return more.get(best)

  grid = baselines.GRID
  for first in range(grid.start, grid.stop, RATES_AT_ONCE):
    add(list(range(num_tasks)), [range(first, first + RATES_AT_ONCE)] * num_tasks)
  for _ in range(MAX_EXTENSIONS):
    more = {task: indices for task in range(num_tasks) if (indices := beyond(task)) is not None}
    if not more:
      break
    add(list(more), list(more.values()))
  return [_join([own[index] for index in sorted(own)]) for own in tried]


def _entries(
  optimizers: Mapping[str, tuple[LearnedOptimizer, Theta]], names: Sequence[str], params: PyTree, num_steps: int
) -> dict[str, _Entry]:
  """What is compared, by name. Learning rates are recommended for the shapes of the parameters and the length."""
  entries: dict[str, _Entry] = {}
  recommended = lambda optimizer: (
    None if optimizer.recommended is None else float(optimizer.recommended(params, num_steps))
  )
  rated = functools.cache(inner_runs.at_rate)  # one program for several θ of one architecture
  plain = functools.cache(inner_runs.as_is)
  for name, (optimizer, theta) in optimizers.items():
    rate = recommended(optimizer)
    entries[name] = _Entry("learned", (plain if rate is None else rated)(optimizer), theta, 1.0, rate)
  directed = [(optimizer, theta) for optimizer, theta in optimizers.values() if optimizer.direction is not None]
  for optimizer, theta in directed[:1]:
    zero = jax.tree.map(lambda x: np.zeros_like(np.asarray(x)), theta)
    entries[CONTROL] = _Entry("control", rated(optimizer), zero, 1.0, recommended(optimizer))
  for name in names:
    made = inner_runs.baseline(baselines.ALL[name]())
    entries[name] = _Entry("baseline", made, {}, baselines.UNITS.get(name, 1.0), None)
  return entries


def _join(sweeps: Sequence[Sweep]) -> Sweep:
  """The learning rates of several, of one task, in order."""
  rates = [rate for s in sweeps for rate in s.rates]
  order = np.argsort(rates)
  runs = jax.tree.map(lambda *x: np.concatenate(x, axis=1)[:, order], *(s.runs for s in sweeps))
  return Sweep(tuple(rates[i] for i in order), runs)


def _with_rate(
  sweep: Sweep, task: int, rate: float, train: Callable[[tuple[int, ...], Float[np.ndarray, "1 rates"]], list[Sweep]]
) -> Sweep:
  """The sweep with one more learning rate, if it does not have it."""
  if rate in sweep.rates:
    return sweep
  (more,) = train((task,), np.full((1, RATES_AT_ONCE), rate))  # the same compiled program
  return _join([sweep, Sweep((rate,), jax.tree.map(lambda x: x[:, :1], more.runs))])


def _pack(sweeps: Sequence[Sweep]) -> cache.Arrays:
  """Sweeps as arrays by name, for the cache; `_unpack` has them back."""
  packed = {}
  for i, (rates, runs) in enumerate(sweeps):
    fields = {name: x for name, x in runs._asdict().items() if name != "held_out_metrics"}
    fields |= {f"metric/{name}": x for name, x in runs.held_out_metrics.items()}
    packed |= {f"{i}/rates": np.array(rates), **{f"{i}/{name}": np.asarray(x) for name, x in fields.items()}}
  return packed


def _unpack(packed: cache.Arrays) -> tuple[Sweep, ...]:
  fields: dict[int, dict[str, np.ndarray]] = {}
  for path, array in packed.items():
    task, name = path.split("/", 1)
    fields.setdefault(int(task), {})[name] = array
  sweeps = []
  for _, own in sorted(fields.items()):
    rates = tuple(own.pop("rates").tolist())
    metrics = {name.removeprefix("metric/"): own.pop(name) for name in list(own) if name.startswith("metric/")}
    sweeps.append(Sweep(rates, Runs(held_out_metrics=metrics, **own)))
  return tuple(sweeps)


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
