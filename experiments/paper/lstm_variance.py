"""Experiment 3: how the variance of PES depends on the number of unrolls.

    python experiments/paper/lstm_variance.py [--scale=full] [--text=FILE]

An LSTM reads T = 1000 characters, one a step; the loss is the log loss of the next one, and θ are all weights. With θ
fixed, PES estimates the gradient of the loss of the whole text as the sum of its estimates over the T/K windows of K
steps. The more windows, the more perturbations enter an episode: what does that do to the variance?

The text is from tiny_shakespeare, because the paper's, the Penn Treebank, may not be redistributed: who has it names
its training file by `--text`. Takes about 2.5 minutes on 2 cores; `--scale=full`, with the paper's 50 repeats, about
2 hours.

Expected: on real text the variance dips a little below that of full ES (K = T) and then grows in proportion to the
number of unrolls. On random characters, whose gradients in different windows have nothing in common, it grows from
the start; on one repeated character, whose gradients are all alike, it falls to a half. Real text lies between.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import paper
from absl import flags
from jaxtyping import Array, Float, Int, Key
from matplotlib.figure import Figure
from tqdm import tqdm

from lopt import base
from lopt.outer import es, parallel, pes, vectors
from lopt.tasks import datasets

TEXT = flags.DEFINE_string("text", None, "UTF-8 file to read characters from, instead of tiny_shakespeare.")

SCENARIOS = {"random characters": "#7f7f7f", "real text": paper.COLORS["PES"], "repeated character": "#1f77b4"}
PAIRS_PER_BLOCK = 50  # that one device advances together


class Settings(NamedTuple):
  num_characters: int = 1000  # T
  size: int = 5  # of the embedding and of the hidden state
  sigma: float = 1e-3
  particles: int = 1000  # of the estimate whose variance is shown; half as many antithetic pairs
  unroll_lengths: Sequence[int] = (1000, 500, 200, 100, 50, 10, 1)  # K, from T down
  num_seeds: int = 3  # of initial weights and places in the text
  repeats: int = 1  # of the estimate, for each K, scenario and seed
  truth_particles: int = 5000  # of the full ES that is taken for the true gradient
  seed: int = 0


class State(NamedTuple):
  """The LSTM before it reads character t."""

  t: Int[Array, ""]
  core: hk.LSTMState


def network(alphabet_size: int, size: int) -> hk.Transformed:
  """`apply(theta, character, state) -> (logits of the next one, state)`: embedding, LSTM, linear layer."""

  def forward(character: Int[Array, ""], state: hk.LSTMState) -> tuple[Float[Array, " alphabet"], hk.LSTMState]:
    embed = hk.Embed(alphabet_size, size, w_init=hk.initializers.RandomUniform(-0.1, 0.1))
    hidden, state = hk.LSTM(size)(embed(character), state)
    return hk.Linear(alphabet_size)(hidden), state

  return hk.without_apply_rng(hk.transform(forward))


def reading(net: hk.Transformed, size: int, text: Int[Array, " T+1"]) -> base.UnrolledProblem:
  """Step t reads character t of the text; its loss is -log p(character t + 1), in nats."""

  def init(key: base.PRNGKey, horizon: base.Horizon) -> State:
    del key, horizon
    return State(jnp.int32(0), hk.LSTMState(jnp.zeros(size), jnp.zeros(size)))

  def step(theta: base.Theta, state: State, key: base.PRNGKey) -> tuple[State, base.Scalar]:
    del key
    logits, core = net.apply(theta, text[state.t], state.core)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, text[state.t + 1])
    return State(state.t + 1, core), loss

  return base.UnrolledProblem(lambda key: jnp.int32(len(text) - 1), init, step)


def total_gradients(
  estimator: base.GradientEstimator,
  theta: base.Theta,
  keys: Key[Array, " pairs"],
  *,
  num_windows: int,
  window_length: int,
) -> Float[Array, "pairs P"]:
  """Each pair's own estimate of ∇ Σ_t L_t: the sum over the windows of one episode, with θ fixed.

  Args:
    estimator: Of one pair, not staggered.
    theta: Where.
    keys: One a pair.
    num_windows: Of an episode.
    window_length: K; estimators give means over K steps.
  """

  def one_pair(key: base.PRNGKey) -> Float[Array, " P"]:
    def window(carry, i):
      total, state = carry
      gradient, state, _ = estimator.estimate(jax.random.fold_in(key, i), theta, state)
      return (total + window_length * vectors.ravel(gradient)[0], state), None

    start = jnp.zeros_like(vectors.ravel(theta)[0]), estimator.init(key, theta)
    (total, _), _ = jax.lax.scan(window, start, jnp.arange(num_windows))
    return total

  return jax.vmap(one_pair)(keys)


def linear_variance(
  problem: base.UnrolledProblem, theta: base.Theta, *, num_windows: int, window_length: int
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """The variance (tr Cov) of one pair's PES estimate of ∇ Σ_t L_t for σ → 0, and |∇ Σ_t L_t|², by backpropagation.

  Let A_rs = Σ_{τ ≥ max(r, s)} dL_τ/dθ_s, θ_s being the θ of window s, L_τ the loss of window τ. For σ → 0 the losses
  are linear in the perturbations and a pair estimates Σ_rs ε_r (ε_s·A_rs) / σ². Its mean is Σ_s A_ss = ∇ Σ_t L_t, and
  by the fourth moments of ε ~ N(0, σ²I) the trace of its covariance is

      Σ_rs (P |A_rs|² + A_rs·A_sr).

  One window gives (P + 1) |∇L|², as full ES. Of n windows that do not influence each other, equal gradients give
  about ½ P |∇L|² and independent ones ½ n P |∇L|².
  """
  flat, unravel = vectors.ravel(theta)
  windows = jnp.arange(num_windows)
  key = jax.random.key(0)  # of a problem that uses none

  def window_losses(thetas: Float[Array, "windows P"]) -> Float[Array, " windows"]:
    def window(state, theta):
      def step(carry, _):
        state, loss = carry
        state, loss_now = problem.step(unravel(theta), state, key)
        return (state, loss + loss_now), None

      (state, loss), _ = jax.lax.scan(step, (state, jnp.float32(0)), length=window_length)
      return state, loss

    return jax.lax.scan(window, problem.init(key, problem.horizon(key)), thetas)[1]

  _, pull_back = jax.vjp(window_losses, jnp.tile(flat, (num_windows, 1)))

  def terms(r: Int[Array, ""]) -> tuple[Float[Array, ""], Float[Array, " P"]]:
    (a,) = pull_back((windows >= r).astype(flat.dtype))  # A_rs for every s
    twice = jnp.where(windows < r, 2.0, jnp.where(windows == r, 1.0, 0.0))  # A_sr = A_rr for s < r
    return flat.size * jnp.sum(a**2) + jnp.sum(twice * (a @ a[r])), a[r]

  variances, own = jax.lax.map(terms, windows, batch_size=20)
  return jnp.sum(variances), jnp.sum(jnp.sum(own, axis=0) ** 2)


class Case(NamedTuple):
  """What is read, and with which weights; leaves [cases, ...] where there are several."""

  theta: base.Theta
  text: Int[Array, " T+1"]


def draw(key: base.PRNGKey, net: hk.Transformed, text: datasets.Text, settings: Settings) -> Case:
  """Cases [scenario · seed, ...]: random characters; a piece of the text; its first character again and again."""
  length = settings.num_characters + 1

  def one_seed(key: base.PRNGKey) -> Case:
    theta_key, place_key, random_key = jax.random.split(key, 3)
    place = jax.random.randint(place_key, (), 0, len(text.train) - length + 1)
    real = jax.lax.dynamic_slice(text.train, (place,), (length,))
    random = jax.random.randint(random_key, (length,), 0, len(text.alphabet))
    zeros = jnp.zeros(settings.size)
    theta = net.init(theta_key, real[0], hk.LSTMState(zeros, zeros))
    thetas = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(SCENARIOS), *x.shape)), theta)
    return Case(thetas, jnp.stack([random, real, jnp.full_like(real, real[0])]))

  by_scenario = jax.jit(jax.vmap(one_seed, out_axes=1))(jax.random.split(key, settings.num_seeds))
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), by_scenario)


def sample(
  kind: str,
  unroll_length: int,
  key: base.PRNGKey,
  num_pairs: int,
  cases: Case,
  centers: Float[Array, "cases P"],
  read: Callable[[Int[Array, " T+1"]], base.UnrolledProblem],
  sigma: float,
) -> tuple[Float[np.ndarray, "cases P"], Float[np.ndarray, "cases pairs"]]:
  """For each case the mean of the pairs' estimates of ∇ Σ_t L_t, and their squared distances from the center."""
  T = cases.text.shape[1] - 1

  def build(problem: base.UnrolledProblem) -> base.GradientEstimator:
    if kind == "full ES":
      return es.build(problem, num_pairs=1, sigma=sigma)
    period = {"PES": unroll_length, "NRES": T}[kind]
    return pes.build(
      problem, num_pairs=1, sigma=sigma, unroll_length=unroll_length, noise_period=period, stagger=False
    )

  def block(_: None, run):
    case, center, keys = run
    gradients = total_gradients(
      build(read(case.text)), case.theta, keys, num_windows=T // unroll_length, window_length=unroll_length
    )
    return jnp.mean(gradients, axis=0), jnp.sum((gradients - center[None]) ** 2, axis=1)

  def all_blocks(cases, centers, key):
    num_cases, num_blocks = len(cases.text), num_pairs // PAIRS_PER_BLOCK
    runs = jax.tree.map(lambda x: jnp.repeat(x, num_blocks, axis=0), (cases, centers))
    keys = jax.random.split(key, (num_cases * num_blocks, PAIRS_PER_BLOCK))
    means, squares = parallel.map_runs(block, None, (*runs, keys))
    return jnp.mean(means.reshape(num_cases, num_blocks, -1), axis=1), squares.reshape(num_cases, -1)

  means, squares = jax.device_get(jax.jit(all_blocks)(cases, centers, key))
  return means.astype(np.float64), squares.astype(np.float64)


class Variances(NamedTuple):
  """Variances (tr Cov) of N particles' estimate of ∇ Σ_t L_t, divided by |∇ Σ_t L_t|²."""

  pes: Float[np.ndarray, "lengths scenarios seeds"]
  error: Float[np.ndarray, "lengths scenarios seeds"]  # standard errors of `pes`, from the scatter of the pairs
  exact: Float[np.ndarray, "lengths scenarios seeds"]  # of PES for σ → 0
  nres: Float[np.ndarray, "lengths seeds"]  # on real text
  es: Float[np.ndarray, "scenarios seeds"]
  es_difference: float  # largest relative difference of a pair's |estimate - gradient|² by full ES and PES with K = T
  norm_ratio: Float[np.ndarray, "scenarios seeds"]  # of |∇ Σ_t L_t|² by full ES to the exact one


def measure(settings: Settings, text: datasets.Text) -> Variances:
  T, seeds, sigma = settings.num_characters, settings.num_seeds, settings.sigma
  net = network(len(text.alphabet), settings.size)
  read = functools.partial(reading, net, settings.size)
  cases_key, truth_key, key = jax.random.split(jax.random.key(settings.seed), 3)
  cases = draw(cases_key, net, text, settings)
  per_seed = lambda x: x.reshape(-1, seeds)

  def linear(K: int):
    def one(_: None, case: Case):
      return linear_variance(read(case.text), case.theta, num_windows=T // K, window_length=K)

    return jax.device_get(jax.jit(lambda cases: parallel.map_runs(one, None, cases))(cases))

  # The true gradient by full ES, and its squared norm, exact and by full ES: there the sampling error of the mean has
  # to be subtracted.
  _, norm = linear(T)
  n = settings.truth_particles // 2
  zeros = jnp.zeros((len(cases.text), sum(x[0].size for x in jax.tree.leaves(cases.theta))))
  truth, squares = sample("full ES", T, truth_key, n, cases, zeros, read, sigma)
  es_norm = (n * np.sum(truth**2, axis=1) - np.mean(squares, axis=1)) / (n - 1)

  # The mean of N/2 independent pairs has the variance of one divided by their number. So all pairs of all repeats
  # serve to measure that of one, as their mean squared distance from the true gradient.
  num_pairs = settings.particles // 2

  def relative_squares(kind: str, K: int, which: slice) -> Float[np.ndarray, "cases pairs"]:
    some = jax.tree.map(lambda x: x[which], cases)
    center = jnp.asarray(truth[which], jnp.float32)
    total = settings.repeats * num_pairs
    _, squares = sample(kind, K, jax.random.fold_in(key, K), total, some, center, read, sigma)
    return squares / (num_pairs * norm[which, None])

  everything, real = slice(None), slice(seeds, 2 * seeds)
  pes_squares, nres, exact = [], [], []
  for K in tqdm(settings.unroll_lengths, desc="unroll lengths", dynamic_ncols=True):
    pes_squares.append(relative_squares("PES", K, everything))
    nres.append(np.mean(relative_squares("NRES", K, real), axis=1))
    exact.append(per_seed(linear(K)[0] / (num_pairs * norm)))
  es_squares = relative_squares("full ES", T, everything)
  error = [np.std(x, axis=1) / np.sqrt(x.shape[1]) for x in pes_squares]
  return Variances(
    pes=np.stack([per_seed(np.mean(x, axis=1)) for x in pes_squares]),
    error=np.stack([per_seed(x) for x in error]),
    exact=np.stack(exact),
    nres=np.stack(nres),
    es=per_seed(np.mean(es_squares, axis=1)),
    es_difference=float(np.max(np.abs(pes_squares[0] / es_squares - 1))),
    norm_ratio=per_seed(es_norm / norm),
  )


def run(settings: Settings) -> paper.Finding:
  text = datasets.read_text(TEXT.value) if TEXT.value else datasets.load_text("tiny_shakespeare")
  if len(text.train) <= settings.num_characters:
    raise ValueError(f"--text: 90% of it must be more than {settings.num_characters} characters")
  v = measure(settings, text)
  num_unrolls = settings.num_characters // np.array(settings.unroll_lengths)
  last, tenth = num_unrolls[-1], int(np.argmin(np.abs(num_unrolls - num_unrolls[-1] / 10)))

  # Everything relative to full ES; [lengths, scenarios, seeds]. The exact variance says where to look for the dip, so
  # that it is not the luckiest of many noisy points.
  random, real, repeated = np.moveaxis(v.pes / v.es, 1, 0)
  dip = int(np.argmin(np.mean(v.exact[:, 1], axis=1)))
  slope = np.log(real[-1] / real[tenth]) / np.log(last / num_unrolls[tenth])
  holds = (
    paper.lower(v.pes[dip, 1], v.es[1])
    and paper.lower(v.es[1], v.pes[-1, 1])
    and bool(0.7 < np.mean(slope) < 1.2)
    and paper.lower(np.log(real[-1]), np.log(random[-1]))
    and paper.lower(np.log(repeated[-1]), np.log(real[-1]))
    and v.es_difference < 0.02
  )
  say = paper.mean_and_error
  verdict = (
    f"variance relative to full ES: real text {say(real[dip])} at {num_unrolls[dip]} unrolls, {say(real[-1])} at "
    f"{last} (log-log slope of the last decade {say(slope)}), where random characters have {say(random[-1])} and a "
    f"repeated one {say(repeated[-1])}"
  )
  deviations = (v.pes - v.exact) / v.error
  sampling_error = np.mean(v.es) * settings.particles / settings.truth_particles
  remarks = (
    f"Points are measured; dashed lines are exact for σ → 0, by backpropagation. The {deviations.size} measured "
    f"variances deviate from them by {np.sqrt(np.mean(deviations**2)):.2f} of their standard errors (root mean "
    "square). With K = T and the same perturbations, PES and full ES have the same squared errors (largest relative "
    f"difference {v.es_difference:.2g}). |gradient|² is exact too: the paper's, by full ES with "
    f"{settings.truth_particles} particles, has a sampling error that adds {100 * sampling_error:.0f}% to it; less "
    f"that, it is {say(v.norm_ratio)} of the exact one here. The slope of real text is below 1 because the constant "
    "part of the variance, to which it dips, still counts in that decade."
  )
  header = ["unrolls", "K", *(f"{name}: measured, exact" for name in SCENARIOS), "NRES, real text"]
  rows = [
    [
      str(num_unrolls[i]),
      str(K),
      *(f"{say(v.pes[i, j])}, {np.mean(v.exact[i, j]):.3g}" for j in range(len(SCENARIOS))),
      say(v.nres[i]),
    ]
    for i, K in enumerate(settings.unroll_lengths)
  ]
  return paper.Finding(plot(num_unrolls, v, settings), verdict, holds, [header, *rows], remarks)


def plot(num_unrolls: Int[np.ndarray, " lengths"], v: Variances, settings: Settings) -> Figure:
  figure, axes = plt.subplots(figsize=(6.4, 4.4))
  for j, (name, color) in enumerate(SCENARIOS.items()):
    paper.band(axes, num_unrolls, v.pes[:, j].T, f"PES, {name}", color=color, marker="o", markersize=4)
    axes.plot(num_unrolls, np.mean(v.exact[:, j], axis=1), "--", color="black", linewidth=0.8, zorder=3)
  paper.band(axes, num_unrolls, v.nres.T, "NRES, real text", color=paper.COLORS["NRES"], marker="s", markersize=3)
  axes.plot([], [], "--", color="black", linewidth=0.8, label="PES, exact for σ → 0")
  axes.plot(1, np.mean(v.es), "x", color=paper.COLORS["full ES"], markersize=9, label="full ES", clip_on=False)
  axes.set(
    xscale="log",
    yscale="log",
    xlabel="unrolls of an episode, T/K",
    ylabel=f"variance / |gradient|², N = {settings.particles}",
  )
  axes.legend()
  return figure


EXPERIMENT = paper.Experiment(
  number=3,
  title="Variance on an LSTM",
  paper_says=(
    "The variance of PES, relative to the squared norm of the gradient: on real text it first decreases a little "
    "with the number of unrolls and then grows linearly. Random characters and a repeated one bracket it."
  ),
  quick=Settings(),
  full=Settings(repeats=50, unroll_lengths=(1000, 500, 200, 100, 50, 20, 10, 5, 2, 1)),
  run=run,
)

if __name__ == "__main__":
  paper.main(EXPERIMENT)
