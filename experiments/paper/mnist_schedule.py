"""Experiment 4: a learning-rate schedule for MNIST, tuned for a differentiable objective and for another one.

    python experiments/paper/mnist_schedule.py --scale=quick

An MLP learns MNIST by SGD with momentum 0.9 and learning rate α_t = θ₀ / (1 + t/Q)^θ₁, Q = T. PES and truncated ES
tune log θ₀ and log θ₁ so that the run's training loss, or its validation error, summed over all T steps is small.

Takes: 2 minutes on 2 CPU cores. Expected: from the same start, PES walks to the optimum of the map for both
objectives. Truncated ES sees how a smaller learning rate quiets the loss within K steps, but not what it does to the
rest of the run, and ends where the learning rate decays much too fast.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import paper
from jaxtyping import Array, Float
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lopt import base, inner_training
from lopt.architectures import hyperparameters
from lopt.outer import es, parallel, pes, unrolls
from lopt.tasks import mlp_classifier


class Settings(NamedTuple):
  dataset: str
  resolution: int | None
  hidden_sizes: tuple[int, ...]
  batch_size: int
  horizon: int  # T, and Q
  start: tuple[float, float]  # θ₀ and θ₁
  unroll_lengths: tuple[int, ...]  # K
  num_pairs: int  # half of the paper's N particles
  sigma: float
  learning_rate: float  # of outer Adam
  num_outer_steps: int
  num_records: int
  num_seeds: int
  learning_rates: tuple[float, float]  # the map's lowest and highest θ₀
  powers: tuple[float, float]  # the same of θ₁
  grid_size: int  # of the map, in each direction
  grid_runs: int  # inner runs that a point of the map is the mean of
  final_runs: int  # inner runs by which each result is judged
  seed: int = 0


QUICK = Settings(
  dataset="mnist",
  resolution=8,
  hidden_sizes=(16, 16),
  batch_size=32,
  horizon=500,
  start=(0.01, 10.0),
  unroll_lengths=(10,),
  num_pairs=30,
  sigma=0.1,
  learning_rate=0.02,
  num_outer_steps=600,
  num_records=60,
  num_seeds=4,
  learning_rates=(1e-3, 1.0),
  powers=(0.1, 100.0),
  grid_size=13,
  grid_runs=2,
  final_runs=16,
)
FULL = Settings(
  dataset="mnist",
  resolution=None,
  hidden_sizes=(100, 100),
  batch_size=100,
  horizon=5000,
  start=(0.003, 30.0),
  unroll_lengths=(10, 100),
  num_pairs=500,
  sigma=0.1,
  learning_rate=0.01,
  num_outer_steps=5000,
  num_records=100,
  num_seeds=4,
  learning_rates=(1e-3, 1.0),
  powers=(0.1, 100.0),
  grid_size=40,
  grid_runs=1,
  final_runs=16,
)

ESTIMATORS = {"PES": pes.build, "truncated ES": es.build}
OBJECTIVES = {"training loss": 1, "validation accuracy": -1}
"""What is tuned for, and the sign with which it becomes a loss."""
LOSS_CAP = 2.0
"""In units of the loss of a uniform guess. The optimum lies next to learning rates that diverge, and a run that has
diverged keeps its loss for the rest of its episode: uncapped, one such run outweighs all others for that long."""
NEAR = 0.95
"""PES is at the optimum when it has made this share of the way there, in the objective."""
Measure = Callable[[base.Theta, base.State, base.PRNGKey], tuple[base.State, dict[str, base.Scalar]]]


def theta_at(point: Any) -> base.Theta:
  """(θ₀, θ₁), on the last axis, as the meta-parameters that are perturbed: their logarithms."""
  log_point = jnp.log(jnp.asarray(point, jnp.float32))
  return {"log_learning_rate": log_point[..., 0], "log_power": log_point[..., 1]}


def build(s: Settings) -> tuple[base.UnrolledProblem, Measure]:
  """The problem of the training loss, and its step with every objective measured instead."""
  family = mlp_classifier.build(
    dataset=s.dataset,
    resolution=s.resolution,
    hidden_sizes=s.hidden_sizes,
    batch_size=s.batch_size,
    activations=("relu",),
    min_classes=10,
    weight_scale=(1.0, 1.0),
    input_scale=(1.0, 1.0),
    loss_scale=(1.0, 1.0),
  )
  schedule = hyperparameters.build(schedule="inverse_time", momentum=0.9, fixed=("logit_momentum",))
  problem = inner_training.build(family, schedule, horizon=lambda key: jnp.int32(s.horizon))
  problem = problem._replace(loss_cap=LOSS_CAP)

  def measure(theta: base.Theta, state: base.State, key: base.PRNGKey) -> tuple[base.State, dict[str, base.Scalar]]:
    step_key, batch_key, loss_key = jax.random.split(key, 3)
    state, loss = problem.step(theta, state, step_key)
    batch = family.batch(batch_key, state.task_params, "validation")
    _, metrics = family.loss(state.params, loss_key, batch, state.task_params)
    return state, {"training loss": loss, "validation accuracy": metrics["accuracy"]}

  return problem, measure


def with_objective(problem: base.UnrolledProblem, measure: Measure, objective: str) -> base.UnrolledProblem:
  """The problem whose loss is the objective; accuracy, which is to be large, as its negative."""

  def step(theta: base.Theta, state: base.State, key: base.PRNGKey) -> tuple[base.State, base.Scalar]:
    state, measured = measure(theta, state, key)
    return state, OBJECTIVES[objective] * measured[objective]

  return problem._replace(step=step)


def evaluate(
  problem: base.UnrolledProblem, measure: Measure, points: Any, *, num_runs: int, seed: int
) -> dict[str, Float[np.ndarray, " points"]]:
  """Every objective per inner step, a mean over `num_runs` inner runs, the same for all of the points (θ₀, θ₁)."""

  def one_run(_: None, run: tuple[base.Theta, base.PRNGKey]) -> dict[str, base.Scalar]:
    theta, key = run
    horizon_key, init_key, steps_key = jax.random.split(key, 3)
    horizon = problem.horizon(horizon_key)

    def body(t: Array, carry):
      state, total = carry
      state, measured = measure(theta, state, jax.random.fold_in(steps_key, t))
      measured["training loss"], _ = unrolls.bounded(measured["training loss"], problem.loss_cap)
      return state, jax.tree.map(jnp.add, total, measured)

    zeros = {objective: jnp.float32(0) for objective in OBJECTIVES}
    _, total = jax.lax.fori_loop(0, horizon, body, (problem.init(init_key, horizon), zeros))
    return jax.tree.map(lambda x: x / horizon, total)

  points = np.asarray(points)
  thetas = theta_at(np.repeat(points, num_runs, axis=0))
  keys = jnp.tile(jax.random.split(jax.random.key(seed), num_runs), len(points))
  results = jax.jit(lambda runs: parallel.map_runs(one_run, None, runs))((thetas, keys))
  return {name: np.asarray(x).reshape(len(points), num_runs).mean(axis=1) for name, x in results.items()}


def run(s: Settings) -> paper.Finding:
  """Maps both objectives, walks on each map by each estimator, and judges where the walks end."""
  problem, measure = build(s)
  rates, powers = np.geomspace(*s.learning_rates, s.grid_size), np.geomspace(*s.powers, s.grid_size)
  grid = np.stack(np.meshgrid(rates, powers), axis=-1).reshape(-1, 2)
  maps = evaluate(problem, measure, grid, num_runs=s.grid_runs, seed=1)
  judge = lambda points: evaluate(problem, measure, points, num_runs=s.final_runs, seed=2)

  figure = Figure(figsize=(12, 4.8), layout="constrained")
  table = [("objective, per inner step", "tuned by", "θ₀", "θ₁", "reached")]
  verdicts, holds = [], True
  for axes, (objective, sign) in zip(figure.subplots(1, 2), OBJECTIVES.items(), strict=True):
    # One point of the map is the mean of few runs, so that the best ones are measured again.
    candidates = grid[np.argsort(sign * maps[objective])[:5]]
    values = judge(candidates)[objective]
    best, optimum = values[np.argmin(sign * values)], candidates[np.argmin(sign * values)]
    (initial,) = judge([s.start])[objective]
    table += [
      (objective, "the start", *(f"{x:.3g}" for x in s.start), f"{initial:.3g}"),
      (objective, "the map's optimum", *(f"{x:.3g}" for x in optimum), f"{best:.3g}"),
    ]
    paths, reached = {}, {}
    for name, unroll_length in itertools.product(ESTIMATORS, s.unroll_lengths):
      case = name, unroll_length
      paths[case] = train(s, with_objective(problem, measure, objective), name, unroll_length, label=objective)
      reached[case] = judge(paths[case][:, -1])[objective]
      ends = (paper.mean_and_error(paths[case][:, -1, i]) for i in range(2))
      table.append((objective, f"{name}, K = {unroll_length}", *ends, paper.mean_and_error(reached[case])))
    shortest = min(s.unroll_lengths)
    ours, theirs = reached["PES", shortest], reached["truncated ES", shortest]
    holds &= paper.lower(sign * ours, sign * theirs)
    holds &= paper.lower(*(np.log(paths[name, shortest][:, -1, 1]) for name in ESTIMATORS))  # it decays too fast
    holds &= all((np.mean(reached["PES", K]) - initial) / (best - initial) > NEAR for K in s.unroll_lengths)
    verdicts.append(
      f"{objective}, PES {paper.mean_and_error(ours)} (the map's optimum {best:.3g}), truncated ES "
      f"{paper.mean_and_error(theirs)}"
    )
    draw(
      figure,
      axes,
      objective,
      rates,
      powers,
      maps[objective].reshape(len(powers), len(rates)),
      paths,
      s.start,
      optimum,
    )
  return paper.Finding(figure, f"K = {min(s.unroll_lengths)}: {'; '.join(verdicts)}", bool(holds), table, REMARKS)


def train(
  s: Settings, problem: base.UnrolledProblem, name: str, unroll_length: int, label: str
) -> Float[np.ndarray, "seeds records 2"]:
  """The ways of (θ₀, θ₁) from the start."""
  estimator = ESTIMATORS[name](
    problem,
    num_pairs=s.num_pairs,
    sigma=s.sigma,
    unroll_length=unroll_length,
    pairs_per_block=s.num_pairs,
  )
  training = paper.train(
    estimator,
    optax.adam(s.learning_rate),
    lambda key: theta_at(s.start),
    num_steps=s.num_outer_steps,
    num_records=s.num_records,
    num_seeds=s.num_seeds,
    seed=s.seed,
    label=f"{label}, {name}, K = {unroll_length}",
  )
  return np.exp(np.stack([training.theta["log_learning_rate"], training.theta["log_power"]], axis=-1))


def draw(
  figure: Figure,
  axes: Axes,
  objective: str,
  rates: Float[np.ndarray, " n"],
  powers: Float[np.ndarray, " n"],
  heat: Float[np.ndarray, "n n"],
  paths: Mapping[tuple[str, int], Float[np.ndarray, "seeds records 2"]],
  start: tuple[float, float],
  optimum: Float[np.ndarray, "2"],
) -> None:
  """The paper's figure: ways of θ on the map of the objective, dark where it is bad."""
  lower_is_better = OBJECTIVES[objective] > 0
  style: dict[str, Any] = {"cmap": "Greys", "norm": LogNorm()} if lower_is_better else {"cmap": "Greys_r"}
  mesh = axes.pcolormesh(rates, powers, heat, shading="nearest", rasterized=True, **style)
  bar = figure.colorbar(mesh, ax=axes, label=f"mean {objective}")
  if lower_is_better:
    ticks = [tick for tick in (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0) if np.min(heat) <= tick <= np.max(heat)]
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    bar.minorticks_off()
  axes.set(xscale="log", yscale="log", xlabel="θ₀, initial learning rate", ylabel="θ₁, power of its decay")
  axes.grid(False)
  lengths = sorted({unroll_length for _, unroll_length in paths})
  handles = []
  for (name, unroll_length), path in paths.items():
    style = {"color": paper.COLORS[name], "linestyle": "-" if unroll_length == lengths[0] else "--"}
    handles.append(Line2D([], [], label=f"{name}, K = {unroll_length}", **style))
    for way in path:
      axes.plot(*way.T, linewidth=1.2, alpha=0.8, **style)
    axes.plot(*path[:, -1].T, "o", markersize=6, markeredgecolor="white", color=style["color"], zorder=3)
  marks = [("start", "s", start), ("optimum of the map", "*", optimum)]
  for label, marker, point in marks:
    style = {"marker": marker, "color": "#ffd700", "markeredgecolor": "black", "linestyle": "none"}
    handles += axes.plot(*point, markersize=13 if marker == "*" else 8, label=label, zorder=4, **style)
  axes.set_title(f"tuned for {objective}")
  axes.legend(handles=handles, fontsize="small", frameon=True, loc="lower left")


REMARKS = (
  "The loss is capped at twice that of a uniform guess, since the optimum lies next to learning rates that diverge. "
  "PES keeps moving about the optimum along the valley of schedules that are as good: its steps are Adam's, whose "
  "size does not shrink with the gradient."
)

EXPERIMENT = paper.Experiment(
  number=4,
  title="MNIST learning-rate schedule",
  paper_says="From the same start truncated ES drifts to schedules that decay too fast and PES goes to the optimum, "
  "for the sum of training losses as for the sum of validation accuracies, which cannot be differentiated.",
  quick=QUICK,
  full=FULL,
  run=run,
)

if __name__ == "__main__":
  paper.main(EXPERIMENT)
