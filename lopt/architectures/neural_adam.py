"""Neural Adam (NNAdam): Adam, whose hyperparameters a recurrent network moves for each tensor.

After the authors' code, `nn_adam.py` of L. Metz et al.'s github.com/google/learned_optimization, whose arithmetic,
constants and features these are.
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
from lopt.architectures import origin, sharding

# Controls are (log α, log(1 - β₁), log(1 - β₂), log ε) / 10; these are what they are clipped to.
BOUNDS = (
  np.array([(math.log(1e-8), -10, -10, math.log(1e-11)), (math.log(1e3), 0, 0, math.log(1e4))], np.float32) / 10
)
NUM_FEATURES = 19


class NeuralAdamState(NamedTuple):
  """What the optimizer remembers of an inner run of n tensors.

  Hidden state, cell and controls are zeros until the first step, which takes their initial values from θ.
  """

  count: Int[Array, ""]  # inner steps taken
  momentum: base.PyTree  # like the parameters
  second_moment: base.PyTree  # like the parameters
  hidden: Float[Array, "n units"]
  cell: Float[Array, "n units"]
  controls: Float[Array, "n 4"]


def _clip(controls: Float[Array, "n 4"]) -> Float[Array, "n 4"]:
  return jnp.clip(controls, BOUNDS[:1], BOUNDS[1:])


def _magnitude(x: base.Scalar) -> base.Scalar:
  return jnp.clip(jnp.log(1e-8 + jnp.abs(x)), -5, 5) / 2


def _features(p: Array, g: Array, m: Array, v: Array, controls: Float[Array, " 4"]) -> Float[Array, " 19"]:
  """What the network sees of one tensor."""
  mean = {"p": p.mean(), "g": g.mean(), "m": m.mean(), "v": v.mean()}
  var = {"p": p.var(), "g": g.var(), "m": m.var(), "v": v.var()}
  log_alpha, log_gain1, log_gain2, log_epsilon = jnp.clip(controls, -5, 5) / 5
  return jnp.stack(
    [
      log_gain1,
      log_gain2,
      log_epsilon,
      jnp.float32(1 if p.ndim == 1 else -1),
      jnp.float32(1 if p.ndim == 0 else -1),
      log_alpha,
      _magnitude(mean["g"]),
      jnp.sign(mean["g"]),
      _magnitude(jnp.abs(g).mean()),
      _magnitude(mean["m"]),
      jnp.sign(mean["m"]),
      _magnitude(mean["p"]),
      jnp.sign(mean["p"]),
      _magnitude(mean["v"]),
      jnp.sign(mean["v"]),
      *(_magnitude(var[name]) for name in ("g", "m", "p", "v")),
    ]
  )


@origin.remembered
def build(
  *,
  hidden_size: int = 32,
  output_multiplier: float = 0.01,
  learning_rate: float = 1e-4,
  beta1: float = 0.9,
  beta2: float = 0.999,
  epsilon: float = 1e-8,
  decay_strength: float = 0.0,
) -> base.LearnedOptimizer:
  """An LSTM that sees statistics of a tensor and moves the tensor's own α, β₁, β₂ and ε.

  With gradients g cut off at ±1000, for each tensor with controls c = (log α, log(1-β₁), log(1-β₂), log ε) / 10,

      m ← β₁ m + (1-β₁) g,   v ← β₂ v + (1-β₂) g²
      Δp = -α (1+ε) m / (ε + √(v + 1e-10))
      c ← c + λ (W · LSTM(statistics of p, g, m, v; c) + b),   then   c ← c - δ (c - c_0)

  within fixed bounds. There is no bias correction. Thanks to the factor 1+ε, a large ε alone leads to momentum SGD.
  θ holds the network, and where controls (c_0) and LSTM start, the same for all tensors. As W and b start at 0, an
  untrained one is Adam with the hyperparameters below.

  Args:
    hidden_size: Units of the LSTM.
    output_multiplier: λ.
    learning_rate: Initial α, from 1e-8 to 1e3.
    beta1: Initial β₁, from 0 to 1 - exp(-10).
    beta2: Initial β₂, from 0 to 1 - exp(-10).
    epsilon: Initial ε, from 1e-11 to 1e4.
    decay_strength: δ.

  Raises:
    ValueError: For an option out of its range.
  """
  checks.counts(hidden_size=hidden_size)
  initial = {"learning_rate": learning_rate, "beta1": beta1, "beta2": beta2, "epsilon": epsilon}
  checks.require(1e-8 <= learning_rate <= 1e3, "learning_rate", learning_rate, "from 1e-8 to 1e3")
  for name in ("beta1", "beta2"):
    checks.require(0 <= initial[name] <= 1 - math.exp(-10), name, initial[name], "from 0 to 1 - exp(-10)")
  checks.require(1e-11 <= epsilon <= 1e4, "epsilon", epsilon, "from 1e-11 to 1e4")
  checks.require(0 <= decay_strength <= 1, "decay_strength", decay_strength, "from 0 to 1")
  logs = [math.log(x) / 10 for x in (learning_rate, 1 - beta1, 1 - beta2, epsilon)]

  def network(features: Float[Array, "n features"], state: hk.LSTMState) -> tuple[Float[Array, "n 4"], hk.LSTMState]:
    output, state = hk.LSTM(hidden_size)(features, state)
    return hk.Linear(4, w_init=jnp.zeros, name="controls")(output), state

  net = hk.without_apply_rng(hk.transform(network))

  def init(key: base.PRNGKey) -> base.Theta:
    zeros = jnp.zeros(hidden_size, jnp.float32)
    params = net.init(key, jnp.zeros((1, NUM_FEATURES), jnp.float32), hk.LSTMState(zeros[None], zeros[None]))
    return {"network": params, "hidden": zeros, "cell": zeros, "controls": jnp.array(logs, jnp.float32)}

  def transform(theta: base.Theta, num_steps: Any) -> optax.GradientTransformationExtraArgs:
    del num_steps

    def init_fn(params):
      n = len(jax.tree.leaves(params))
      # Not one array twice: such a state could not be donated.
      m, v = (jax.tree.map(sharding.zeros_like, params) for _ in range(2))
      hidden, cell = (jnp.zeros((n, hidden_size), jnp.float32) for _ in range(2))
      return NeuralAdamState(jnp.zeros((), jnp.int32), m, v, hidden, cell, jnp.zeros((n, 4), jnp.float32))

    def update_fn(updates, state, params=None, **extra_args):
      del extra_args
      if params is None:
        raise ValueError("Neural Adam needs the parameters: call update(gradients, state, params)")
      # A state's first values must not depend on θ, so these are put in place by the first step.
      hidden, cell, controls = (
        jnp.where(state.count == 0, theta[name][None], getattr(state, name))
        for name in ("hidden", "cell", "controls")
      )

      structure = jax.tree.structure(params)
      of_tensors = structure.flatten_up_to
      gradients = [jnp.clip(g, -1000.0, 1000.0) for g in of_tensors(updates)]
      alpha, gain1, gain2, eps = jnp.exp(10 * _clip(controls)).T
      momentum = [
        (1 - gain1[i]) * m + gain1[i] * g
        for i, (m, g) in enumerate(zip(of_tensors(state.momentum), gradients, strict=True))
      ]
      second_moment = [
        (1 - gain2[i]) * v + gain2[i] * jnp.square(g)
        for i, (v, g) in enumerate(zip(of_tensors(state.second_moment), gradients, strict=True))
      ]
      steps = [
        -alpha[i] * (1 + eps[i]) / (eps[i] + jnp.sqrt(v + 1e-10)) * m
        for i, (m, v) in enumerate(zip(momentum, second_moment, strict=True))
      ]

      tensors = zip(of_tensors(params), gradients, momentum, second_moment, controls, strict=True)
      features = jnp.stack([_features(*tensor) for tensor in tensors])
      deltas, lstm = net.apply(theta["network"], features, hk.LSTMState(hidden, cell))
      controls += output_multiplier * deltas
      controls -= decay_strength * (controls - theta["controls"][None])
      controls = _clip(controls)

      unflatten = structure.unflatten
      state = NeuralAdamState(
        state.count + 1, unflatten(momentum), unflatten(second_moment), lstm.hidden, lstm.cell, controls
      )
      return unflatten(steps), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)

  return base.LearnedOptimizer(init, transform)
