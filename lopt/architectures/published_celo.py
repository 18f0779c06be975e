"""Celo as its authors' code computes it, for its published weights: a rival to compare with.

A. Moudgil, B. Knyazev, G. Lajoie, E. Belilovsky, "Celo: Training versatile learned optimizers on a compute diet",
TMLR 2025 (arXiv:2501.12670); `celo/optimizers/celo.py` in github.com/amoudgl/celo. To train such an optimizer rather
take `lopt.architectures.celo`, which does not have this one's oddities.
"""

import math
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from lopt import base, checks
from lopt.architectures import layers, origin, published, sharding, summaries

LARGEST_GRADIENT = 1000.0
# Momentum and factored second moments share the decays. Gains are 1 - β in float32, wrong in the fifth digit, because
# those are what the weights were trained with.
DECAYS = np.array([0.9, 0.99, 0.999], np.float32)
GAINS = np.float32(1) - DECAYS
SECOND_MOMENT_DECAY = np.float32(0.999)
SECOND_MOMENT_GAIN = np.float32(1) - SECOND_MOMENT_DECAY
NUM_LOSS_DECAYS = 10
NO_MINIMUM = 999_999_999_999.0
NUM_OUTPUTS = 3  # of which the authors' code uses two
NUM_INPUTS = len(summaries.PROGRESS) + NUM_LOSS_DECAYS - 1  # of the scheduler


class LossBuffer(NamedTuple):
  """What is remembered of the losses, at ten time scales from 10 steps to the whole run."""

  decays: Float[Array, "10"]
  """Kept, as in the authors' code. If they were computed anew, the compiler would merge their exponential with later
  powers, and features, which are quotients of small differences, would differ in the fourth digit."""
  means: Float[Array, "10"]
  """Moving averages, from zero."""
  minima: Float[Array, "10"]
  """The lowest that these have been, corrected for their beginning at zero."""


class PublishedCeloState(NamedTuple):
  """What the optimizer remembers of an inner run. Trees have a leaf for each tensor."""

  count: Int[Array, ""]  # inner steps taken
  momenta: base.PyTree  # like the parameters, with the three decays on a leading axis
  second_moment: base.PyTree  # like the parameters
  factored: base.PyTree
  """For each tensor averages of `summaries.mean_squares`, with the three decays on a leading axis."""
  losses: LossBuffer
  lstm: hk.LSTMState
  """Of one row. The authors' code has a row for each tensor, and nothing in which these could differ."""


@origin.remembered
def build(
  *,
  lstm_size: int = 64,
  num_rules: int = 1,
  hidden_sizes: tuple[int, ...] = (4, 4),
  step_multiplier: float = 1e-3,
  exp_multiplier: float = 1e-3,
) -> base.LearnedOptimizer:
  """A very small MLP for each parameter, and an LSTM that schedules the step size of all.

  The defaults are those of the authors' evaluation, with which the published weights go (`get_optimizer("celo")`
  in their `celo/factory.py`: one rule and 64 units, where the defaults of the class are 64 rules and 128 units).
  `transform` needs the true number of steps, and updates the loss:

      theta = published.celo(weights)
      tx = published_celo.build().transform(theta, num_steps)
      updates, state = tx.update(gradients, state, params, value=loss)

  Gradients g are clipped to ±1000, entry by entry. With momenta m_β, second moment v and moving averages R_β, C_β of
  g² averaged along the largest and the second largest axis, none of them corrected for beginning at zero, the rule
  sees the 30 features

      g, clip(g, ±0.1), p, m_β, v, m_β v^-½, v^-½, g ρ γ, g v^-½, R_β, C_β, R_β^-½, C_β^-½, m_β ρ γ

  of a parameter, each divided by √(mean x² + 10⁻⁵) over the tensor, where ρ = (R_β / mean R_β)^-½ and γ = C_β^-½. A
  tensor of fewer than two axes has the plain moving averages V_β for R_β and C_β, and V_β^-½ for ρ γ. (Constants that
  keep roots finite: 1e-6 is added to v, 1e-8 to R_β and C_β as features, 1e-9 to V_β next to g, none next to m_β;
  ρ^-2 and γ^-2 are at least 1e-9, and 1e-30 is added to g².) From the first two outputs d, a, and with an output s of
  the scheduler,

      Δp = -λ₁ 0.1 exp(s) √(mean p² + 10⁻⁹) d exp(λ₂ a).

  The weights of the rule are Σ_i c_i w_i / N for the N = `num_rules` rules w_i in θ, with c the softmax of further
  outputs of the scheduler. (So they are N times smaller than a weighted mean.) For N = 1 they are w_1.

  The scheduler sees only the training fraction (`summaries.progress`) and the losses (`_observe`): never a tensor, so
  that all tensors have the same s and c. Its layers are x → relu(W₁x) + W₂x, an LSTM, and linear outputs; θ has one
  more layer, "linear", which the authors' code computes and drops. The LSTM begins at θ["lstm_init_state"].

  θ is the tree of the authors' checkpoints, with the LSTM's state as a dictionary.

  Args:
    lstm_size: Units of the scheduler's layers.
    num_rules: N.
    hidden_sizes: Widths of the rule's hidden layers.
    step_multiplier: λ₁.
    exp_multiplier: λ₂.

  Raises:
    ValueError: For a size below 1, no hidden layer, or a multiplier that is not finite; by `update`, without
      parameters or without `value=loss`.
  """
  checks.require(lstm_size >= 1, "lstm_size", lstm_size, "at least 1")
  checks.require(num_rules >= 1, "num_rules", num_rules, "at least 1")
  checks.require(
    len(hidden_sizes) > 0 and min(hidden_sizes) >= 1, "hidden_sizes", hidden_sizes, "one or more widths of at least 1"
  )
  checks.require(math.isfinite(step_multiplier), "step_multiplier", step_multiplier, "finite")
  checks.require(math.isfinite(exp_multiplier), "exp_multiplier", exp_multiplier, "finite")
  sizes = (*hidden_sizes, NUM_OUTPUTS)

  def schedule(
    x: Float[Array, "1 inputs"], state: hk.LSTMState
  ) -> tuple[Float[Array, " rules"], base.Scalar, hk.LSTMState]:
    hk.Linear(lstm_size, name="linear")(x)  # dropped; its weights are in θ
    h = jax.nn.relu(hk.Linear(lstm_size, name="linear_1")(x))
    h = hk.Linear(lstm_size, name="linear_2")(x) + h
    h, state = hk.LSTM(lstm_size, name="rnn")(h, state)
    controls = hk.Linear(num_rules, name="rnn_to_controls")(h)
    s = hk.Linear(1, name="step_size")(h)
    return jax.nn.softmax(controls[0]), 0.1 * jnp.exp(s[0, 0]), state

  scheduler = hk.without_apply_rng(hk.transform(schedule))
  rule = hk.without_apply_rng(
    hk.transform(
      lambda features, rms: layers.mlp(features, rms, jnp.zeros(0, jnp.float32), sizes)
    )  # its weights as `_rule` has them
  )

  def init(key: base.PRNGKey) -> base.Theta:
    keys = iter(jax.random.split(key, 1 + len(published.CELO_FEATURES) + len(hidden_sizes)))
    fans = (sum(published.CELO_FEATURES), *sizes)
    shapes = {f"w0__{i}": (rows, sizes[0]) for i, rows in enumerate(published.CELO_FEATURES)}
    shapes |= {f"w{i}": fans[i : i + 2] for i in range(1, len(sizes))}
    scale = {name: 1 / math.sqrt(fans[0] if name.startswith("w0") else shape[0]) for name, shape in shapes.items()}
    rules = {
      name: scale[name] * jax.random.truncated_normal(next(keys), -2, 2, (num_rules, *shape), jnp.float32)
      for name, shape in shapes.items()
    }
    rules |= {f"b{i}": jnp.zeros((num_rules, size), jnp.float32) for i, size in enumerate(sizes)}
    return {
      "ff_mod_stack": {"~": rules},
      "lstm_init_state": {
        "hidden": jnp.zeros((1, lstm_size), jnp.float32),
        "cell": jnp.zeros((1, lstm_size), jnp.float32),
      },
      "rnn_params": scheduler.init(next(keys), jnp.zeros((1, NUM_INPUTS), jnp.float32), _no_state(lstm_size)),
    }

  def transform(theta: base.Theta, num_steps: Any) -> optax.GradientTransformationExtraArgs:
    def init_fn(params):
      return PublishedCeloState(
        count=jnp.zeros((), jnp.int32),
        momenta=jax.tree.map(lambda p: sharding.zeros_like(p, len(DECAYS)), params),
        second_moment=jax.tree.map(sharding.zeros_like, params),
        factored=jax.tree.map(
          lambda p: tuple(
            sharding.zeros_like(p, len(DECAYS), averaged=axis) for axis in summaries.factored_axes(p.shape) or (None,)
          ),
          params,
        ),
        losses=_no_losses(num_steps),
        lstm=_no_state(lstm_size),
      )

    def update_fn(updates, state, params=None, *, value=None, **extra_args):
      del extra_args
      if params is None or value is None:
        missing = "the parameters" if params is None else "the loss"
        raise ValueError(f"the Celo optimizer needs {missing}: call update(gradients, state, params, value=loss)")
      losses, of_loss = _observe(state.losses, jnp.asarray(value, jnp.float32), state.count)
      inputs = jnp.concatenate([summaries.progress(state.count, num_steps), of_loss])[None]
      # The state cannot begin at θ's, because it outlives θ in meta-training.
      begun = hk.LSTMState(theta["lstm_init_state"]["hidden"], theta["lstm_init_state"]["cell"])
      lstm = jax.tree.map(lambda first, x: jnp.where(state.count == 0, first, x), begun, state.lstm)
      shares, multiplier, lstm = scheduler.apply(theta["rnn_params"], inputs, lstm)
      weights = _rule(theta["ff_mod_stack"]["~"], shares, len(sizes))

      gradients = jax.tree.map(lambda g: jnp.clip(g, -LARGEST_GRADIENT, LARGEST_GRADIENT), updates)
      momenta = jax.tree.map(lambda g, m: _accumulate(m, g), gradients, state.momenta)
      second_moment = jax.tree.map(
        lambda g, v: SECOND_MOMENT_DECAY * v + SECOND_MOMENT_GAIN * jnp.square(g), gradients, state.second_moment
      )
      factored = jax.tree.map(
        lambda g, averages: tuple(
          _accumulate(average, x + 1e-30) for average, x in zip(averages, summaries.mean_squares(g), strict=True)
        ),
        gradients,
        state.factored,
      )

      def step(g, p, m, v, factored):
        features = _features(g, p, m, v, factored)
        mean_squares = [jnp.mean(jnp.square(x), axis=range(1, x.ndim)) for x in features]
        d, a, _ = rule.apply(weights, features, jnp.sqrt(1e-5 + jnp.concatenate(mean_squares)))
        parameter_scale = jnp.sqrt(jnp.mean(jnp.square(p)) + 1e-9)
        return -multiplier * (step_multiplier * (d * (parameter_scale * jnp.exp(exp_multiplier * a))))

      steps = jax.tree.map(step, gradients, params, momenta, second_moment, factored)
      return steps, PublishedCeloState(state.count + 1, momenta, second_moment, factored, losses, lstm)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)

  return base.LearnedOptimizer(init, transform)


def _no_state(size: int) -> hk.LSTMState:
  return hk.LSTMState(jnp.zeros((1, size), jnp.float32), jnp.zeros((1, size), jnp.float32))


def _no_losses(num_steps: Any) -> LossBuffer:
  """The buffer before the first inner step.

  Its half-lives (of which each is really the time to fall to 1/e) go from 10 steps to `num_steps` in equal ratios.
  """
  lives = jnp.logspace(1, jnp.log10(jnp.asarray(num_steps, jnp.float32)), NUM_LOSS_DECAYS, dtype=jnp.float32)
  minima = jnp.full(NUM_LOSS_DECAYS, NO_MINIMUM, jnp.float32)
  return LossBuffer(jnp.exp(-1 / lives), jnp.zeros(NUM_LOSS_DECAYS, jnp.float32), minima)


def _observe(buffer: LossBuffer, loss: base.Scalar, count: Int[Array, ""]) -> tuple[LossBuffer, Float[Array, "9"]]:
  """The buffer with the loss of step `count` (0, 1, ...), and features of it.

  A loss counts for at most twice the largest of the means so far, which are corrected as if there were one loss more.
  A feature is (m_i - l_i) / (m_{i+1} - l_i) - 1, cut to ±1, of the corrected mean m_i and its lowest value l_i: how
  much a mean has grown, next to the slower one. They are 0 in the first two steps.
  """
  decays = buffer.decays
  weight = 1 - decays ** (count + 1)
  largest = jnp.where(count == 0, loss, jnp.max(buffer.means / weight))
  loss = jnp.minimum(2 * jnp.abs(largest), loss)
  means = decays * buffer.means + (1 - decays) * loss
  corrected = means / weight
  minima = jnp.minimum(buffer.minima, corrected)
  rise = (corrected - minima)[:-1] / jnp.maximum(corrected[1:] - minima[:-1], 1e-8)
  features = jnp.clip(rise - 1, -1, 1)
  return LossBuffer(decays, means, minima), jnp.where(count < 2, 0 * features, features)


def _rule(rules: dict[str, Array], shares: Float[Array, " rules"], num_layers: int) -> hk.MutableParams:
  """The weights of the rule in use, named as `layers.mlp` has them."""
  mixed = {name: jnp.mean(x * shares.reshape(-1, *[1] * (x.ndim - 1)), axis=0) for name, x in rules.items()}
  first = jnp.concatenate([mixed[f"w0__{i}"] for i in range(len(published.CELO_FEATURES))])
  ws = [first, *(mixed[f"w{i}"] for i in range(1, num_layers))]
  return {f"layer_{i}": {"w": w, "b": mixed[f"b{i}"]} for i, w in enumerate(ws)}


def _accumulate(averages: Float[Array, "3 *shape"], x: Float[Array, "*shape"]) -> Float[Array, "3 *shape"]:
  columns = (-1, *[1] * x.ndim)
  return jnp.asarray(DECAYS.reshape(columns)) * averages + GAINS.reshape(columns) * x[None]


def _features(
  g: Float[Array, "*shape"],
  p: Float[Array, "*shape"],
  m: Float[Array, "3 *shape"],
  v: Float[Array, "*shape"],
  factored: tuple[Array, ...],
) -> tuple[Float[Array, "_ *shape"], ...]:
  """What the rule sees of each parameter, in the order of `published.CELO_FEATURES`."""
  if len(factored) == 1:
    (second,) = factored
    sides = (second, second)
    g_factored = g[None] * jax.lax.rsqrt(second + 1e-9)
    m_factored = m * second**-0.5
  else:
    sides = row, column = factored
    # `row` has size 1 along the largest axis, so its mean along the second largest is all that is left to take.
    mean_row = jnp.mean(row, axis=1 + summaries.factored_axes(g.shape)[1], keepdims=True)
    rho = jax.lax.rsqrt(jnp.maximum(row / (mean_row + 1e-9), 1e-9))
    gamma = jax.lax.rsqrt(jnp.maximum(column, 1e-9))
    g_factored, m_factored = g[None] * rho * gamma, m * rho * gamma
  row, column = (jnp.broadcast_to(x, m.shape) for x in sides)
  g, p, v = g[None], p[None], v[None]
  root = jax.lax.rsqrt(v + 1e-6)
  of_sides = (row, column, jax.lax.rsqrt(row + 1e-8), jax.lax.rsqrt(column + 1e-8))
  return g, jnp.clip(g, -0.1, 0.1), p, m, v, m * root, root, g_factored, g * root, *of_sides, m_factored
