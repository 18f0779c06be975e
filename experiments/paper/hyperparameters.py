"""Experiment 5: 29 hyperparameters of an MLP on Fashion-MNIST, some of them discrete, against random search.

    python experiments/paper/hyperparameters.py --scale=quick

An MLP with 5 hidden layers is trained by SGD with momentum. Each of its 6 weight matrices and 6 bias vectors has a
learning rate and a momentum of its own, and each hidden layer a width, the number of its units that take part: 12 +
12 + 5 meta-parameters. PES, truncated ES and random search minimise the sum of validation losses over T inner steps.

Takes: 2 minutes on 2 CPU cores. Expected: at the same number of inner steps in all, PES reaches a lower validation
loss than truncated ES, and than the best that random search has tried.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import paper
from jaxtyping import Array, Float, Int
from matplotlib.figure import Figure

from lopt import base, inner_training
from lopt.architectures import hyperparameters
from lopt.outer import es, parallel, pes, unrolls, vectors
from lopt.tasks import mlp_classifier

ESTIMATORS = {"PES": pes.build, "truncated ES": es.build}
PARTICLES = {"PES": 2, "truncated ES": 3}
"""Inner runs of one antithetic pair; truncated ES has a third one, under the mean θ."""
HIDDEN_LAYERS = 5
NUM_BLOCKS = 2 * (HIDDEN_LAYERS + 1)
NUM_META_PARAMETERS = 2 * NUM_BLOCKS + HIDDEN_LAYERS
LOSS_CAP = 2.0
"""In units of the loss of a uniform guess, so that a run that diverges is bad, but does not outweigh all others."""
MIDDLE = {"log_learning_rate": np.log(0.01), "logit_momentum": 2.2, "width": 0.0}
"""Where PES and truncated ES start, which is the middle of what random search draws from, uniformly in θ: learning
rates of 0.01, momenta of 0.9, half of the units of each layer."""
REACH = {"log_learning_rate": np.log(100.0), "logit_momentum": 2.2, "width": 3.0}
"""How far to both sides: learning rates from 1e-4 to 1, momenta from 0.5 to 0.99, 5% to 95% of the units."""


class Settings(NamedTuple):
  dataset: str
  resolution: int | None
  max_width: int
  batch_size: int
  horizon: int  # T
  unroll_length: int  # K
  num_pairs: int  # half of the paper's N particles
  sigma: float
  learning_rate: float  # of outer Adam
  budget: int  # inner steps that each method may take in all, with each seed
  num_records: int
  num_seeds: int
  num_runs: int  # inner runs by which θ is judged, which do not count
  seed: int = 0


QUICK = Settings(
  dataset="fashion_mnist",
  resolution=8,
  max_width=32,
  batch_size=32,
  horizon=200,
  unroll_length=10,
  num_pairs=5,
  sigma=0.3,
  learning_rate=0.02,
  budget=220_000,
  num_records=12,
  num_seeds=4,
  num_runs=8,
)
FULL = Settings(
  dataset="fashion_mnist",
  resolution=None,
  max_width=100,
  batch_size=100,
  horizon=1000,
  unroll_length=10,
  num_pairs=5,
  sigma=0.3,
  learning_rate=0.01,
  budget=1_000_000,
  num_records=100,
  num_seeds=4,
  num_runs=16,
)


def build(s: Settings) -> base.UnrolledProblem:
  """Inner training under θ = {"blocks": learning rates and momenta [12], "width": [5]}."""
  family = mlp_classifier.build(
    dataset=s.dataset,
    resolution=s.resolution,
    hidden_sizes=(s.max_width,) * HIDDEN_LAYERS,
    batch_size=s.batch_size,
    activations=("relu",),
    min_classes=10,
    weight_scale=(1.0, 1.0),
    input_scale=(1.0, 1.0),
    loss_scale=(1.0, 1.0),
  )
  sgdm = hyperparameters.build(optimizer="sgdm", num_blocks=NUM_BLOCKS)

  def with_widths(theta: base.Theta) -> base.UnrolledProblem:
    def loss(params: base.Params, *args: Any) -> tuple[base.Scalar, base.Metrics]:
      return family.loss(narrowed(params, widths(theta["width"], s.max_width)), *args)

    return inner_training.build(
      family._replace(loss=loss), sgdm, horizon=lambda key: jnp.int32(s.horizon), meta_loss="validation"
    )

  def step(theta: base.Theta, state: base.State, key: base.PRNGKey) -> tuple[base.State, base.Scalar]:
    return with_widths(theta).step(theta["blocks"], state, key)

  # Neither the beginning nor the length of an episode depends on θ.
  return with_widths(at(0.0))._replace(step=step, loss_cap=LOSS_CAP)


def widths(x: Float[Array, " layers"], max_width: int) -> Int[Array, " layers"]:
  """Meta-parameters without bounds -> 1 ... `max_width`."""
  return jnp.clip(jnp.ceil(max_width * jax.nn.sigmoid(x)), 1, max_width).astype(jnp.int32)


def narrowed(params: base.Params, widths: Int[Array, " layers"]) -> base.Params:
  """Parameters of a network whose hidden layers have lost all units but the first `widths`.

  What leaves a lost unit is zero. So is then the gradient of what enters it, and neither changes any more.
  """
  layers = sorted(params)
  kept = {layers[0]: params[layers[0]]}
  for layer, width in zip(layers[1:], widths, strict=True):
    weights = params[layer]["w"]
    present = jnp.arange(weights.shape[0])[:, None] < width
    kept[layer] = {**params[layer], "w": jnp.where(present, weights, 0.0)}
  return kept


def at(offset: Any) -> base.Theta:
  """θ at the middle plus `offset`, in -1 ... 1, times the reach; of offsets [..., 29], or the same for all 29."""
  offset = jnp.broadcast_to(jnp.asarray(offset, jnp.float32), (*jnp.shape(offset)[:-1], NUM_META_PARAMETERS))
  rate, momentum, width = jnp.split(offset, (NUM_BLOCKS, 2 * NUM_BLOCKS), axis=-1)
  place = lambda name, x: MIDDLE[name] + REACH[name] * x
  return {
    "blocks": {
      "log_learning_rate": place("log_learning_rate", rate),
      "logit_momentum": place("logit_momentum", momentum),
    },
    "width": place("width", width),
  }


def evaluate(problem: base.UnrolledProblem, thetas: base.Theta, keys: base.PRNGKey) -> Float[np.ndarray, " n"]:
  """The mean loss per inner step of one whole episode for each θ and key (leaves [n, ...])."""

  def one_run(_: None, run: tuple[base.Theta, base.PRNGKey]) -> base.Scalar:
    theta, key = run
    flat, unravel = vectors.ravel(theta)
    losses = unrolls.unroll_episode(problem, flat[None, None], unravel, key[None])
    return losses.first[0, 0] / losses.steps[0]

  return np.asarray(jax.jit(lambda runs: parallel.map_runs(one_run, None, runs))((thetas, keys)))


def judge(problem: base.UnrolledProblem, thetas: base.Theta, num_runs: int) -> Float[np.ndarray, "seeds n"]:
  """The mean of `evaluate` over the same new runs for every θ (leaves [seeds, n, ...])."""
  seeds, n = jax.tree.leaves(thetas)[0].shape[:2]
  repeated = jax.tree.map(lambda x: np.repeat(np.reshape(x, (seeds * n, *x.shape[2:])), num_runs, axis=0), thetas)
  keys = jnp.tile(jax.random.split(jax.random.key(1), num_runs), seeds * n)
  return evaluate(problem, repeated, keys).reshape(seeds, n, num_runs).mean(axis=2)


def by_estimator(problem: base.UnrolledProblem, s: Settings, name: str) -> tuple[base.Theta, Float[np.ndarray, " n"]]:
  """θ [seeds, n, ...] on its way from the middle, and the inner steps taken until then."""
  estimator = ESTIMATORS[name](
    problem,
    num_pairs=s.num_pairs,
    sigma=s.sigma,
    unroll_length=s.unroll_length,
    pairs_per_block=s.num_pairs,
  )
  steps_per_record = s.num_records * PARTICLES[name] * s.num_pairs * s.unroll_length
  training = paper.train(
    estimator,
    optax.adam(s.learning_rate),
    lambda key: at(0.0),
    num_steps=s.budget // steps_per_record * s.num_records,
    num_records=s.num_records,
    num_seeds=s.num_seeds,
    seed=s.seed,
    label=name,
  )
  return training.theta, np.concatenate([[0], training.inner_steps[0]])


def by_random_search(problem: base.UnrolledProblem, s: Settings) -> tuple[base.Theta, Float[np.ndarray, " n"]]:
  """θ [seeds, n, ...], the best of those drawn so far by the loss of one run of each, and the inner steps taken."""
  num_candidates = s.budget // s.horizon
  draw_key, run_key = jax.random.split(jax.random.fold_in(jax.random.key(2), s.seed))
  offsets = jax.random.uniform(draw_key, (s.num_seeds * num_candidates, NUM_META_PARAMETERS), minval=-1.0, maxval=1.0)
  candidates = at(offsets)
  losses = evaluate(problem, candidates, jax.random.split(run_key, len(offsets)))
  losses = losses.reshape(s.num_seeds, num_candidates)
  tried = np.unique(np.geomspace(1, num_candidates, s.num_records).round().astype(int))
  best = np.stack([np.argmin(losses[:, :n], axis=1) for n in tried], axis=1)
  best += num_candidates * np.arange(s.num_seeds)[:, None]
  return jax.tree.map(lambda x: np.asarray(x)[best], candidates), s.horizon * tried.astype(float)


def run(s: Settings) -> paper.Finding:
  """Lets every method use up the same budget and compares what it has then."""
  problem = build(s)
  figure = Figure(figsize=(7.5, 4.8), layout="constrained")
  axes = figure.subplots()
  final = {}
  table = [("method", "inner steps", "validation loss", "learning rate", "momentum", f"units of {s.max_width}")]
  for name in (*ESTIMATORS, "random search"):
    thetas, steps = by_random_search(problem, s) if name == "random search" else by_estimator(problem, s, name)
    losses = judge(problem, thetas, s.num_runs)
    paper.band(axes, steps, losses, name)
    final[name] = losses[:, -1]
    last = jax.tree.map(lambda x: x[:, -1], thetas)
    rates, momenta = np.exp(last["blocks"]["log_learning_rate"]), jax.nn.sigmoid(last["blocks"]["logit_momentum"])
    table.append(
      (
        name,
        f"{steps[-1]:,.0f}",
        paper.mean_and_error(final[name]),
        _middle_half(rates),
        _middle_half(momenta),
        _middle_half(widths(last["width"], s.max_width)),
      )
    )
  axes.set(xlabel="inner steps of all particles", ylabel="mean validation loss of a run (1 = uniform guess)")
  axes.set(xlim=(0, s.budget))
  axes.legend()
  verdict = "; ".join(f"{name} {paper.mean_and_error(x)}" for name, x in final.items())
  holds = all(paper.lower(final["PES"], final[name]) for name in ("truncated ES", "random search"))
  return paper.Finding(
    figure, f"mean validation loss after {s.budget:,} inner steps: {verdict}", holds, table, REMARKS
  )


def _middle_half(values: Any) -> str:
  low, high = np.quantile(values, (0.25, 0.75))
  return f"{low:.3g} to {high:.3g}"


REMARKS = (
  "All θ are judged by the same new inner runs; of random search, the θ whose own run was the best so far. A loss of "
  "1 is that of a uniform guess; losses are capped at 2. The last three columns of the table are the middle half of "
  "the values, over layers and seeds. Truncated ES takes 3 inner runs a pair and PES 2, so that it makes fewer outer "
  "steps of the same budget."
)

EXPERIMENT = paper.Experiment(
  number=5,
  title="Many hyperparameters",
  paper_says="With 29 hyperparameters of an MLP on Fashion-MNIST (learning rate and momentum of every block of "
  "parameters, widths of the layers) PES reaches a lower validation loss than truncated ES and random search do "
  "by the same number of inner steps.",
  quick=QUICK,
  full=FULL,
  run=run,
)

if __name__ == "__main__":
  paper.main(EXPERIMENT)
