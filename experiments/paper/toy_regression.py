"""Experiment 2, toy 2D regression: a learning-rate schedule on a rugged meta-objective.

    python experiments/paper/toy_regression.py

Takes about a minute on 2 cores. Expect PES to reach the valley of good schedules, truncated ES to settle elsewhere
(it sees K = 10 of T = 100 steps at a time), and TBPTT, RTRL and UORO to get stuck on the plateau: the meta-objective
has countless small local minima, which derivatives see and smoothing over σ levels.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import paper
from jaxtyping import Array, Float
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from lopt import base
from lopt.outer import backprop, es, forward, pes

START = (1.0, 1.0)
THETA_0 = (-4.0, -4.0)


SHOWN = ((-6.0, 7.0), (-14.0, 5.0))  # θ₀ and θ₁ of the heat map
STYLES = {"TBPTT": "-", "RTRL": "--", "UORO": ":"}  # of three that take almost the same way


class Settings(NamedTuple):
  num_outer_steps: int = 10000
  num_seeds: int = 4
  num_records: int = 200
  horizon: int = 100
  unroll_length: int = 10
  num_particles: int = 100  # N of the ES estimators (N/2 antithetic pairs) and of UORO
  sigma: float = 0.3
  sigma_truncated: float = 1.0  # of truncated ES
  learning_rate: float = 1e-2  # of the outer Adam, whose β₁ is 0.99
  start_spread: float = 0.5  # seeds start from within ± this around (-4, -4), so that all methods have several
  grid: int = 300  # points a side
  seed: int = 0


def inner_loss(x: Float[Array, "2"]) -> base.Scalar:
  """√(x₀² + 5) - √5 + sin²(x₁) exp(-5x₀²) + ¼|x₁ - 100|: a long slope, with a trap every π steps where x₀ is 0."""
  bowl = jnp.sqrt(jnp.square(x[0]) + 5) - jnp.sqrt(5.0)
  return bowl + jnp.square(jnp.sin(x[1])) * jnp.exp(-5 * jnp.square(x[0])) + 0.25 * jnp.abs(x[1] - 100)


def problem(horizon: int) -> base.UnrolledProblem:
  """SGD on the inner loss; its learning rate goes from exp(θ₀) to exp(θ₁), log-linearly in time."""

  def init(key: base.PRNGKey, horizon: base.Horizon) -> base.State:
    del key, horizon
    return jnp.array(START), jnp.int32(0)

  def step(theta: base.Theta, state: base.State, key: base.PRNGKey) -> tuple[base.State, base.Scalar]:
    del key
    x, t = state
    learning_rate = jnp.exp(theta[0] + (theta[1] - theta[0]) * t / (horizon - 1))
    x -= learning_rate * jax.grad(inner_loss)(x)
    return (x, t + 1), inner_loss(x)

  return base.UnrolledProblem(lambda key: jnp.int32(horizon), init, step)


def meta_objective(horizon: int, thetas: Float[Array, "n 2"]) -> Float[Array, " n"]:
  """The mean loss over an episode, for each θ."""
  unrolled = problem(horizon)
  key = jax.random.key(0)  # of a problem in which nothing is random

  def mean_loss(theta: Float[Array, "2"]) -> base.Scalar:
    step = lambda state, _: unrolled.step(theta, state, key)
    return jnp.mean(jax.lax.scan(step, unrolled.init(key, jnp.int32(horizon)), length=horizon)[1])

  return jax.vmap(mean_loss)(thetas)


def slope_and_curvature(horizon: int, theta: Float[np.ndarray, "2"]) -> tuple[float, float]:
  """The meta-objective's gradient norm and its Hessian's lower eigenvalue: about 0, and positive, at a minimum."""
  objective = lambda theta: meta_objective(horizon, theta[None])[0]
  gradient, hessian = jax.jit(lambda theta: (jax.grad(objective)(theta), jax.hessian(objective)(theta)))(theta)
  return float(jnp.linalg.norm(gradient)), float(jnp.linalg.eigvalsh(hessian)[0])


def methods(settings: Settings) -> dict[str, base.GradientEstimator]:
  """All that are compared; as in the paper, particles go through their episodes in lockstep."""
  unrolled, pairs = problem(settings.horizon), settings.num_particles // 2
  common = {"unroll_length": settings.unroll_length, "stagger": False}
  particles = {**common, "num_pairs": pairs, "pairs_per_block": pairs}
  uoro_runs = {"num_runs": settings.num_particles, "runs_per_block": settings.num_particles}
  return {
    "PES": pes.build(unrolled, sigma=settings.sigma, **particles),
    "truncated ES": es.build(unrolled, sigma=settings.sigma_truncated, **particles),
    # Nothing is random in these two: more runs would be the same.
    "TBPTT": backprop.build(unrolled, num_runs=1, **common),
    "RTRL": forward.build(unrolled, method="rtrl", num_runs=1, **common),
    "UORO": forward.build(unrolled, method="uoro", **uoro_runs, **common),
  }


def run(settings: Settings) -> paper.Finding:
  """Trains the schedule by every method and follows the meta-objective along the way."""
  axis_0, axis_1 = (np.linspace(*limits, settings.grid) for limits in SHOWN)
  objective = jax.jit(meta_objective, static_argnums=0)
  grid = np.stack(np.meshgrid(axis_0, axis_1), axis=-1, dtype=np.float32)
  heat = np.asarray(objective(settings.horizon, grid.reshape(-1, 2))).reshape(grid.shape[:2])

  def init_theta(key: base.PRNGKey) -> base.Theta:
    return jnp.array(THETA_0) + settings.start_spread * jax.random.uniform(key, (2,), minval=-1, maxval=1)

  thetas, losses = {}, {}
  for name, estimator in methods(settings).items():
    training = paper.train(
      estimator,
      optax.adam(settings.learning_rate, b1=0.99),
      init_theta,
      num_steps=settings.num_outer_steps,
      num_records=settings.num_records,
      num_seeds=settings.num_seeds,
      seed=settings.seed,
      label=name,
    )
    thetas[name] = np.asarray(training.theta)
    flat = objective(settings.horizon, training.theta.reshape(-1, 2))
    losses[name] = np.asarray(flat).reshape(training.theta.shape[:2])

  # The meta-objective is rugged: a mean over the last tenth of the records says more than its value at the last one.
  last = max(1, settings.num_records // 10)
  final = {name: np.mean(x[:, -last:], axis=1) for name, x in losses.items()}
  start, best = np.mean(losses["PES"][:, 0]), np.min(heat)
  closed = {name: (start - x) / (start - best) for name, x in final.items()}
  others = [name for name in final if name != "PES"]
  reaches = {name: bool(np.all(x > 0.9)) for name, x in closed.items()}
  holds = reaches["PES"] and not any(reaches[name] or not paper.lower(final["PES"], final[name]) for name in others)
  describe = lambda name: f"{name} {paper.mean_and_error(final[name])}"
  verdict = (
    f"mean inner loss {start:.1f} at the start and {best:.2f} at the best point of the grid: {describe('PES')} < "
    + ", ".join(map(describe, others))
  )
  table = [("method", "mean inner loss", "way from the start to the best of the grid", "final θ")]
  table += [
    (
      name,
      paper.mean_and_error(final[name]),
      f"{np.mean(closed[name]):.0%}",
      ", ".join(paper.mean_and_error(thetas[name][:, -1, i]) for i in range(2)),
    )
    for name in final
  ]
  slope, curvature = slope_and_curvature(settings.horizon, thetas["RTRL"][0, -1])
  remarks = (
    "The gradients of RTRL and UORO are unbiased, and it is not their noise that keeps them: they end, and TBPTT "
    "beside them, in a local minimum of the meta-objective itself (where RTRL ends its gradient is "
    f"{slope:.1e} and its Hessian's lower eigenvalue {curvature:+.1e}). ES smooths such minima over σ. The valley "
    "that PES reaches goes on below the picture and falls slowly there, so that PES has not come to its end. "
    f"Seeds start from (-4, -4) ± {settings.start_spread:g}, where the paper has (-4, -4)."
  )
  return paper.Finding(draw(axis_0, axis_1, heat, thetas, losses, settings), verdict, holds, table, remarks)


def draw(
  axis_0: Float[np.ndarray, " n"],
  axis_1: Float[np.ndarray, " n"],
  heat: Float[np.ndarray, "n n"],
  thetas: Mapping[str, Float[np.ndarray, "seeds R 2"]],
  losses: Mapping[str, Float[np.ndarray, "seeds R"]],
  settings: Settings,
) -> Figure:
  """The paper's figure: the ways of all seeds over the meta-objective; beside it, the meta-objective along them."""
  figure = Figure(figsize=(11, 4.6), layout="constrained")
  axes, side = figure.subplots(1, 2, width_ratios=(1.2, 1))
  mesh = axes.pcolormesh(axis_0, axis_1, heat, norm=LogNorm(np.min(heat), 100), cmap="Greys", rasterized=True)
  bar = figure.colorbar(mesh, ax=axes, extend="max", ticks=(3, 5, 10, 20, 50, 100), format="{x:g}")
  bar.minorticks_off()
  axes.set_title("mean inner loss, by schedule", fontsize="medium")
  axes.grid(False)
  for name, theta in thetas.items():
    style = {"color": paper.COLORS[name], "linestyle": STYLES.get(name, "-")}
    for i, way in enumerate(theta):
      axes.plot(*way.T, linewidth=1.3, label=name if i == 0 else None, **style)
    axes.plot(*theta[:, -1].T, "o", markersize=5, markeredgecolor="white", color=style["color"])
    outer_steps = np.linspace(0, settings.num_outer_steps, settings.num_records + 1)
    paper.band(side, outer_steps, losses[name], name, linestyle=style["linestyle"])
  axes.plot(*THETA_0, "k*", markersize=11, markeredgecolor="white", label="start")
  axes.set(xlim=SHOWN[0], ylim=SHOWN[1], xlabel="θ₀, log learning rate at the start", ylabel="θ₁, at the end")
  axes.legend(fontsize="small", loc="lower left", frameon=True)
  side.set(yscale="log", xlabel="outer steps", ylabel="mean inner loss")
  side.yaxis.set_major_locator(FixedLocator((3, 5, 10, 20)))
  side.yaxis.set_major_formatter("{x:g}")
  side.yaxis.set_minor_locator(NullLocator())
  return figure


EXPERIMENT = paper.Experiment(
  number=2,
  title="Toy 2D regression",
  paper_says="PES reaches the region of the optimum; TBPTT, UORO and RTRL fail on the chaotic meta-objective, and "
  "truncated ES converges to a wrong point (short-horizon bias).",
  quick=Settings(),
  full=Settings(num_outer_steps=20000, num_seeds=16, grid=600),
  run=run,
)

if __name__ == "__main__":
  paper.main(EXPERIMENT)
