"""Experiment 7: the L2 coefficient of linear regression on UCI Yacht, tuned while it trains.

    python experiments/paper/yacht.py [--scale=full]

Inner: gradient descent on ½|Xw - y|² + ½ exp(θ)|w|² over 246 yachts. Outer: the validation loss ½|X'w - y'|² over the
other 62, by one update of θ after every inner step (K = 1). One inner run lasts all the time, as in the published
scripts, where T is a million. So the optimum is that of ridge regression, which a grid over θ gives.

The data come from $LOPT_MANUAL_DIR/uci_yacht/data.txt, or else are downloaded from the UCI archive once. Takes about
1 minute on 2 cores: these are the paper's sizes. `--scale=full` has more seeds, and takes 5 minutes.

Expected: from each of six starts, PES takes θ to the optimum of the grid, 1.33. Truncated ES, which sees only what θ
does to the next step, does not.
"""

import hashlib
import os
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import paper
from jaxtyping import Array, Float
from matplotlib.figure import Figure

from lopt import base
from lopt.outer import es, pes
from lopt.runs import files

URL = "https://archive.ics.uci.edu/ml/machine-learning-databases/00243/yacht_hydrodynamics.data"
# Of the numbers, as float64: copies of the file differ in their spaces.
SHA256 = "ec08588637fd93582116a1ead33f0c1e787dae755168073608e030e5282a3f4e"
TRAIN = 246  # 80% of 308
METHODS = ("PES", "truncated ES")
RECORDS = 100


class Settings(NamedTuple):
  starts: Sequence[float] = (5.0, 3.0, 1.0, -1.0, -3.0, -5.0)  # θ_0
  horizon: int = 1_000_000  # T: longer than num_steps, so that the first episode does not end
  unroll_length: int = 1  # K
  particles: int = 4  # N: 2 antithetic pairs
  sigma: float = 0.01
  learning_rate: float = 1e-3  # of the inner gradient descent
  outer_learning_rate: float = 3e-3  # of Adam
  num_steps: int = 37_500  # outer, and so inner ones: as far as the paper's figure goes
  num_seeds: int = 4
  seed: int = 0


class Data(NamedTuple):
  """Features and targets, each of mean 0 and variance 1 over all yachts."""

  x: Float[Array, "train 6"]
  y: Float[Array, " train"]
  x_validation: Float[Array, "validation 6"]
  y_validation: Float[Array, " validation"]


def load() -> Data:
  """The yachts in the split of the published scripts.

  Raises:
    OSError: They can neither be found nor downloaded.
    ValueError: The file has other numbers.
  """
  manual = os.environ.get("LOPT_MANUAL_DIR")
  places = [Path(manual).expanduser() / "uci_yacht" / "data.txt"] if manual else []
  cache = Path.home() / ".cache" / "lopt" / "uci_yacht.txt"
  path = next((place for place in (*places, cache) if place.is_file()), None)
  if path is not None:
    rows = parse(path.read_bytes(), path)
  else:
    try:
      with urllib.request.urlopen(URL, timeout=10) as response:
        content = response.read()
    except OSError as error:
      raise OSError(
        f"cannot download {URL} ({error}); connect to the network, or set LOPT_MANUAL_DIR to a folder that has this "
        "file as uci_yacht/data.txt"
      ) from None
    rows = parse(content, URL)
    files.write_atomically(cache, content)
  rows = (rows - rows.mean(axis=0)) / rows.std(axis=0)
  rows = rows[np.random.RandomState(1).permutation(len(rows))]  # the generator that they use
  train, validation = jnp.asarray(rows[:TRAIN], jnp.float32), jnp.asarray(rows[TRAIN:], jnp.float32)
  return Data(train[:, :-1], train[:, -1], validation[:, :-1], validation[:, -1])


def parse(content: bytes, source: object) -> Float[np.ndarray, "308 7"]:
  """The numbers of the file, six features and the target in a row; ValueError if they are not the right ones."""
  try:
    rows = np.array(content.split(), np.float64).reshape(-1, 7)
  except ValueError:
    rows = np.zeros((0, 7))
  if hashlib.sha256(rows.astype("<f8").tobytes()).hexdigest() != SHA256:
    raise ValueError(f"{source}: does not have the numbers of UCI's Yacht Hydrodynamics")
  return rows


def ridge_descent(data: Data, learning_rate: float, horizon: int) -> base.UnrolledProblem:
  """w_0 ~ N(0, I); w_t = w_{t-1} - α (Xᵀ(Xw_{t-1} - y) + exp(θ) w_{t-1}); L_t = ½|X'w_t - y'|²."""

  def init(key: base.PRNGKey, horizon: base.Horizon) -> Float[Array, " 6"]:
    del horizon
    return jax.random.normal(key, data.x.shape[1:])

  def step(theta: base.Scalar, w: Float[Array, " 6"], key: base.PRNGKey) -> tuple[Float[Array, " 6"], base.Scalar]:
    del key
    gradient = data.x.T @ (data.x @ w - data.y) + jnp.exp(theta) * w
    w = w - learning_rate * gradient
    return w, validation_loss(data, w)

  return base.UnrolledProblem(lambda key: jnp.int32(horizon), init, step)


def validation_loss(data: Data, w: Float[Array, " 6"]) -> base.Scalar:
  return 0.5 * jnp.sum((data.x_validation @ w - data.y_validation) ** 2)


def converged_loss(data: Data, theta: base.Scalar) -> base.Scalar:
  """The validation loss of ridge regression, w = (XᵀX + exp(θ) I)⁻¹ Xᵀy, where the descent ends."""
  hessian = data.x.T @ data.x + jnp.exp(theta) * jnp.eye(data.x.shape[1])
  return validation_loss(data, jnp.linalg.solve(hessian, data.x.T @ data.y))


def train(name: str, start: float, data: Data, settings: Settings) -> Float[np.ndarray, "seeds records"]:
  """θ from one start to the end of outer training."""
  build = {"PES": pes.build, "truncated ES": es.build}[name]
  num_pairs = settings.particles // 2
  estimator = build(
    ridge_descent(data, settings.learning_rate, settings.horizon),
    num_pairs=num_pairs,
    sigma=settings.sigma,
    unroll_length=settings.unroll_length,
    stagger=False,
    pairs_per_block=num_pairs,
  )
  return paper.train(
    estimator,
    optax.adam(settings.outer_learning_rate),
    lambda key: jnp.float32(start),
    num_steps=settings.num_steps,
    num_records=RECORDS,
    num_seeds=settings.num_seeds,
    seed=len(settings.starts) * settings.seed + settings.starts.index(start),
    label=f"{name} from {start:+g}",
  ).theta


def run(settings: Settings) -> paper.Finding:
  data = load()
  loss = jax.jit(jnp.vectorize(lambda theta: converged_loss(data, theta)))
  grid = np.arange(-800, 801) / 100
  losses = np.asarray(loss(jnp.asarray(grid, jnp.float32)))
  best, least = float(grid[np.argmin(losses)]), float(np.min(losses))
  # [starts, seeds, records]
  theta = {name: np.stack([train(name, start, data, settings) for start in settings.starts]) for name in METHODS}

  # Where a run ends is the mean of θ over its last tenth: with K = 1 and few particles θ never comes to rest.
  tail = lambda x: np.mean(x[..., -RECORDS // 10 :], axis=-1)
  end = {name: tail(x) for name, x in theta.items()}
  end_loss = {name: np.asarray(loss(jnp.asarray(x, jnp.float32))) for name, x in end.items()}
  # A run has arrived if it loses less than a tenth of what one without regularisation loses.
  tenth = 0.1 * (float(loss(jnp.float32(-np.inf))) - least)
  arrived = {name: int(np.sum(x - least < tenth)) for name, x in end_loss.items()}
  holds = arrived == {"PES": end["PES"].size, "truncated ES": 0} and all(
    paper.lower(by_pes, by_es) for by_pes, by_es in zip(end_loss["PES"], end_loss["truncated ES"], strict=True)
  )
  slow = settings._replace(outer_learning_rate=settings.outer_learning_rate / 3)
  slow_end = tail(train("PES", 1.0, data, slow))
  say = paper.mean_and_error
  summary = [
    f"{name} {say(end[name])} ({say(end_loss[name])}; {arrived[name]} of {end[name].size} runs arrive)"
    for name in METHODS
  ]
  remarks = (
    "In an episode that never ends ξ grows like a random walk, and the noise of PES with it: θ keeps moving about, "
    f"and ends a little above the optimum, at {say(end['PES'][settings.starts.index(1.0)])} from start 1, where the "
    f"validation loss is nearly the same. With a third of the outer learning rate, and so less of that noise, it is "
    f"{say(slow_end)}. Truncated ES has no optimum here: one step after, the validation loss is always lower with a "
    "smaller coefficient. So θ falls, until around -6.5 the losses of a pair differ by less than single precision "
    "resolves."
  )
  header = ["start", *(f"{name}: final θ, validation loss" for name in METHODS)]
  rows = [
    [f"{start:+g}", *(f"{say(end[name][i])}, {say(end_loss[name][i])}" for name in METHODS)]
    for i, start in enumerate(settings.starts)
  ]
  rows.append(["grid", *[f"{best:.2f}, {least:.3f}"] * len(METHODS)])
  verdict = f"final θ (validation loss), optimum {best:.2f} ({least:.3f}): {', '.join(summary)}"
  return paper.Finding(plot(theta, loss, best, least, settings), verdict, holds, [header, *rows], remarks)


def plot(
  theta: Mapping[str, Float[np.ndarray, "starts seeds records"]],
  loss: Callable[[Array], Array],
  best: float,
  least: float,
  settings: Settings,
) -> Figure:
  figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
  steps = np.linspace(0, settings.num_steps, RECORDS + 1)
  for name in METHODS:
    for i in range(len(settings.starts)):
      label = name if i == 0 else "_"
      color = paper.COLORS[name]
      paper.band(left, steps, theta[name][i], label, color=color)
      paper.band(right, steps, np.asarray(loss(jnp.asarray(theta[name][i]))), label, color=color)
  left.axhline(best, color="black", linestyle="--")
  right.axhline(least, color="black", linestyle="--", label="optimum of the grid")
  left.set(ylabel="θ, logarithm of the L2 coefficient")
  right.set(ylabel="validation loss at convergence", ylim=(least - 0.05, least + 0.95))
  for axes in (left, right):
    axes.set(xlabel="outer steps", xlim=(0, settings.num_steps))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:.0f}k" if x else "0")
  right.legend(loc="upper right")
  return figure


EXPERIMENT = paper.Experiment(
  number=7,
  title="L2 coefficient on UCI Yacht",
  paper_says=(
    "From every start, PES with K = 1 takes the L2 coefficient to the optimum that a grid gives; truncated ES with "
    "K = 1 does not."
  ),
  quick=Settings(),
  full=Settings(num_seeds=20),
  run=run,
)

if __name__ == "__main__":
  paper.main(EXPERIMENT)
