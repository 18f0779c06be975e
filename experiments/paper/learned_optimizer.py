"""Experiment 8 of the PES paper: meta-training a learned optimizer, by PES, truncated ES and truncated BPTT.

    python experiments/paper/learned_optimizer.py
    python experiments/paper/learned_optimizer.py --scale=full

θ are the weights of the per-parameter MLP of Metz et al. (2019). An episode trains one MLP classifier of images from
new initial weights for T steps, and the meta-loss is the mean of its T training losses. All three estimators see
windows of K steps and take the same number of inner steps in all. Once trained, each recorded θ is evaluated
unperturbed on whole fresh episodes; that is the curve.

Time on 2 CPU cores: 5 minutes, on two threads of a slow one more than 10; most of it for TBPTT. The full scale is
for a GPU.

Expected: PES ends with a lower meta-loss than truncated ES, whose windows do not tell it what an update is good for
after their end. TBPTT, clipped and with a decaying outer learning rate of its own, comes nearly as far as PES at this
scale (0.150 against 0.140); in trials without decay it got worse again.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import paper
from jaxtyping import Float
from matplotlib.figure import Figure

from lopt import base, inner_training
from lopt.architectures import mlp
from lopt.evaluation import baselines
from lopt.outer import backprop, es, parallel, pes, unrolls
from lopt.tasks import mlp_classifier


class Settings(NamedTuple):
  """Particles are inner runs: PES makes pairs of them, truncated ES pairs and the run under the mean θ."""

  dataset: str
  hidden_sizes: tuple[int, ...]  # of the classifier; its images have 8×8 pixels
  batch_size: int
  horizon: int  # T
  unroll_length: int  # K
  particles: int
  particles_per_block: int
  sigma: float
  step_multiplier: float  # λ₁ of the learned optimizer
  learning_rates: dict[str, float]  # of the outer Adam, by estimator; decays along a cosine to 0
  clip_norm: float  # of the meta-gradient, whole
  outer_steps: int
  records: int
  seeds: int
  evaluation_runs: int  # episodes for each θ
  seed: int = 0


QUICK = Settings(
  dataset="digits",
  hidden_sizes=(16,),
  batch_size=16,
  horizon=300,
  unroll_length=5,
  particles=48,
  particles_per_block=1,
  sigma=0.1,
  step_multiplier=1e-3,
  # Chosen for each by trials on two seeds, by the meta-loss at the end: of PES and truncated ES the highest at which
  # no seed diverged (3e-2 does), of TBPTT the better of 1e-3 and 3e-3.
  learning_rates={"PES": 1e-2, "truncated ES": 1e-2, "TBPTT": 3e-3},
  clip_norm=1.0,
  outer_steps=500,
  records=10,
  seeds=4,
  evaluation_runs=8,
)
FULL = Settings(
  dataset="fashion_mnist",
  hidden_sizes=(32, 32, 32),
  batch_size=128,
  horizon=1000,
  unroll_length=10,
  particles=100,
  particles_per_block=100,
  sigma=0.01,
  step_multiplier=1e-3,
  learning_rates={"PES": 3e-4, "truncated ES": 3e-4, "TBPTT": 3e-4},
  clip_norm=1.0,
  outer_steps=20_000,
  records=40,
  seeds=4,
  evaluation_runs=16,
)


def build_problem(settings: Settings, optimizer: base.LearnedOptimizer) -> base.UnrolledProblem:
  """One task, T steps: only initial weights, batches and the numbering of the classes are drawn."""
  family = mlp_classifier.build(
    dataset=settings.dataset,
    resolution=8,
    hidden_sizes=settings.hidden_sizes,
    batch_size=settings.batch_size,
    activations=("relu",),
    min_classes=10,
    weight_scale=(1.0, 1.0),
    input_scale=(1.0, 1.0),
    loss_scale=(1.0, 1.0),
  )
  return inner_training.build(family, optimizer, horizon=lambda key: jnp.int32(settings.horizon))


def build_estimators(settings: Settings, problem: base.UnrolledProblem) -> dict[str, base.GradientEstimator]:
  """The three, as many groups of each as the particles suffice for, so that an outer step costs the same."""
  n, block = settings.particles, settings.particles_per_block
  evolution = {"sigma": settings.sigma, "unroll_length": settings.unroll_length}
  return {
    "PES": pes.build(problem, num_pairs=n // 2, pairs_per_block=math.ceil(block / 2), **evolution),
    "truncated ES": es.build(problem, num_pairs=n // 3, pairs_per_block=math.ceil(block / 3), **evolution),
    "TBPTT": backprop.build(problem, num_runs=n, unroll_length=settings.unroll_length, runs_per_block=block),
  }


def mean_losses(
  problem: base.UnrolledProblem, thetas: base.Theta, horizon: int, runs: int
) -> Float[np.ndarray, " thetas"]:
  """The mean loss over fresh episodes of T steps; the same `runs` episodes for every θ (leaves [thetas, ...])."""

  def evaluate(key: base.PRNGKey, theta: base.Theta) -> base.Scalar:
    def episode(key: base.PRNGKey) -> base.Scalar:
      init_key, steps_key = jax.random.split(key)

      def step(state: base.State, key: base.PRNGKey):
        state, loss = problem.step(theta, state, key)
        return state, unrolls.bounded(loss, problem.loss_cap)[0]

      state = problem.init(init_key, jnp.int32(horizon))
      return jnp.mean(jax.lax.scan(step, state, jax.random.split(steps_key, horizon))[1])

    return jnp.mean(jax.lax.map(episode, jax.random.split(key, runs)))

  program = jax.jit(lambda thetas: parallel.map_runs(evaluate, jax.random.key(1), thetas))
  return np.asarray(program(thetas))


def whole_gradients(
  settings: Settings, problem: base.UnrolledProblem, thetas: base.Theta
) -> Float[np.ndarray, " thetas"]:
  """Norm of one whole episode's gradient by backpropagation, root mean square over episodes, at each θ."""
  runs = math.ceil(settings.evaluation_runs / 4)
  estimator = backprop.build(problem, num_runs=runs, unroll_length=None, max_horizon=settings.horizon)

  def evaluate(key: base.PRNGKey, theta: base.Theta) -> base.Scalar:
    init_key, key = jax.random.split(key)
    _, _, metrics = estimator.estimate(key, theta, estimator.init(init_key, theta))
    return jnp.sqrt(metrics["mean_square_gradient"])

  return np.asarray(jax.jit(lambda thetas: parallel.map_runs(evaluate, jax.random.key(2), thetas))(thetas))


def run(settings: Settings) -> paper.Finding:
  """Meta-trains by each estimator, evaluates every recorded θ, and compares the last ones."""
  architecture = mlp.build(step_multiplier=settings.step_multiplier)
  problem = build_problem(settings, architecture)
  trainings, curves = {}, {}
  for name, estimator in build_estimators(settings, problem).items():
    trainings[name] = paper.train(
      estimator,
      optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adam(optax.cosine_decay_schedule(settings.learning_rates[name], settings.outer_steps)),
      ),
      architecture.init,
      num_steps=settings.outer_steps,
      num_records=settings.records,
      num_seeds=settings.seeds,
      seed=settings.seed,
      label=name,
    )
    thetas = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), trainings[name].theta)
    losses = mean_losses(problem, thetas, settings.horizon, settings.evaluation_runs)
    curves[name] = losses.reshape(settings.seeds, -1)
  rates = np.asarray(baselines.LEARNING_RATES)
  adam_problem = build_problem(settings, baselines.adam())
  adam = mean_losses(adam_problem, baselines.theta_at(rates), settings.horizon, settings.evaluation_runs)

  # The meta-loss of one θ scatters: a seed's result is the mean over its last quarter.
  final = {name: curve[:, -math.ceil(settings.records / 4) :].mean(axis=1) for name, curve in curves.items()}
  others = {name: x for name, x in final.items() if name != "PES"}
  holds = all(paper.lower(final["PES"], x) for x in others.values())
  sign = lambda x: "<" if final["PES"].mean() < x.mean() else "≥"
  verdict = f"meta-loss: PES {paper.mean_and_error(final['PES'])}" + "".join(
    f" {sign(x)} {name} {paper.mean_and_error(x)}," for name, x in others.items()
  ).rstrip(",")
  table = [("estimator", "outer learning rate", "inner steps", "meta-loss, last quarter", "best θ on the way")]
  table += [
    (
      name,
      f"{settings.learning_rates[name]:g}",
      f"{trainings[name].inner_steps[0, -1]:,.0f}",
      paper.mean_and_error(x),
      paper.mean_and_error(curves[name].min(axis=1)),
    )
    for name, x in final.items()
  ]
  table.append((f"Adam, learning rate {rates[adam.argmin()]:g}", "", "", f"{adam.min():.4f}", ""))
  some = slice(None, None, math.ceil(settings.records / 4))
  thetas = jax.tree.map(lambda x: x[:, some].reshape(-1, *x.shape[2:]), trainings["PES"].theta)
  whole = whole_gradients(settings, problem, thetas).reshape(settings.seeds, -1)
  truncated = gradient_sizes(trainings["TBPTT"])
  remarks = (
    f"The gradients that TBPTT takes through K = {settings.unroll_length} steps have norms of {truncated.min():.2g} "
    f"to {truncated.max():.2g} (root mean square over runs); backpropagated through whole episodes, T = "
    f"{settings.horizon}, at θ along the way of PES, {whole.min():.2g} to {whole.max():.2g}. "
    f"The meta-loss of TBPTT minus that of PES is {paper.mean_and_error(final['TBPTT'] - final['PES'])}. "
    f"Meta-gradients are clipped to norm {settings.clip_norm:g} and outer learning rates decay to 0, for all three."
  )
  figure = draw(trainings, curves, adam.min(), (some, whole))
  return paper.Finding(figure, verdict, holds, table, remarks)


def gradient_sizes(training: paper.Training) -> Float[np.ndarray, "seeds R"]:
  """Norm of the gradient estimate that one run or group of particles makes: root mean square over all."""
  return np.sqrt(training.metrics["mean_square_gradient"])


def draw(
  trainings: dict[str, paper.Training],
  curves: dict[str, Float[np.ndarray, "seeds n"]],
  adam: float,
  whole: tuple[slice, Float[np.ndarray, "seeds m"]],
) -> Figure:
  """Meta-loss, and the size of gradients, against total inner steps."""
  figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
  thousands = {name: np.concatenate([[0], x.inner_steps[0] / 1e3]) for name, x in trainings.items()}
  for name, curve in curves.items():
    paper.band(left, thousands[name], curve, name)
  left.axhline(adam, color="black", linestyle=":", label="Adam, best learning rate")
  left.set(xlabel="inner steps, thousands", ylabel="meta-loss: mean training loss of a run", yscale="log")
  left.legend()
  some, norms = whole
  label, color = "full BPTT, at the θ of PES", paper.COLORS["full BPTT"]
  paper.band(right, thousands["PES"][some], norms, label, color=color, marker="o")
  paper.band(right, thousands["TBPTT"][1:], gradient_sizes(trainings["TBPTT"]), "TBPTT")
  right.set(xlabel="inner steps, thousands", ylabel="norm of one run's gradient", yscale="log")
  right.legend()
  return figure


EXPERIMENT = paper.Experiment(
  number=8,
  title="Meta-training a learned optimizer",
  paper_says="PES reaches a lower meta-loss than truncated ES and TBPTT at the same unroll length and the same "
  "number of inner steps, and trains stably where TBPTT's gradients explode.",
  quick=QUICK,
  full=FULL,
  run=run,
)

if __name__ == "__main__":
  paper.main(EXPERIMENT)
