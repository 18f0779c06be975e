"""A recurrent network for each tensor that conditions an MLP for each parameter.

O. Wichrowska et al., "Learned optimizers that scale and generalize", ICML 2017; L. Metz, N. Maheswaranathan,
C. D. Freeman, B. Poole, J. Sohl-Dickstein, "Tasks, stability, architecture, and compute: training more effective
learned optimizers, and using them to train themselves", 2020 (arXiv:2009.11243); L. Metz et al., "VeLO: Training
versatile learned optimizers by scaling up", 2022 (arXiv:2211.09760).
"""

import math
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from lopt import base, checks
from lopt.architectures import layers, origin, summaries

NUM_FEATURES = 10  # of a parameter
NUM_INPUTS = len(summaries.PROGRESS) + summaries.NUM_LOSS_FEATURES + summaries.NUM_TENSOR_FEATURES


class HierarchicalState(NamedTuple):
  """What the optimizer remembers of an inner run."""

  count: Int[Array, ""]  # inner steps taken
  moments: summaries.Moments
  losses: summaries.LossHistory
  lstm: hk.LSTMState  # a row for each tensor, in the order of jax.tree.leaves


@origin.remembered
def build(
  *,
  lstm_size: int = 16,
  context_size: int = 8,
  hidden_sizes: tuple[int, ...] = (16, 16),
  step_multiplier: float = 1e-3,
  exp_multiplier: float = 1e-3,
  parameter_floor: float = 0.01,
) -> base.LearnedOptimizer:
  """An LSTM a tensor above an MLP a parameter.

  In every step tensor i has inputs x_i: the training fraction, how the loss has been moving, and statistics of its
  parameters, gradients and moments (`lopt.architectures.summaries`). One LSTM, whose weights all tensors share and
  each with a state of its own, sees them together with a mean over the tensors, and makes a context c_i and a log
  step size s_i:

      u_i = A x_i + a + mean_j relu(B x_j + b),   h_i ← LSTM(h_i, u_i),   (c_i, s_i) = C h_i + d

  For each parameter p with gradient g, the MLP's inputs are (g, p, m_β, √v, g/√v, m_β/√v for three β), with
  bias-corrected moments, each divided by its root mean square over the tensor, and the context, which enters the
  first layer as a bias. From its outputs d, a the update is

      Δp = -λ₁ exp(s_i) √(mean p² + floor²) d exp(λ₂ a)

  with the mean over the tensor. C and d start at zero, so an untrained optimizer is the MLP alone. Loss and gradients
  can be multiplied by constants without any effect (gradients of at least about 1e-7, see `summaries.EPSILON`), and
  the order of the tensors has none.

  What is simpler than in the papers: a context instead of a mixture of 64 MLPs (VeLO), no way back from parameters
  to tensors (Metz et al. 2020), no validation loss as an input, no gradient clipping.

  Args:
    lstm_size: Units of the LSTM, and of the projections before it.
    context_size: Length of c.
    hidden_sizes: Widths of the MLP's hidden layers. By default there are 3,579 meta-parameters.
    step_multiplier: λ₁.
    exp_multiplier: λ₂.
    parameter_floor: Scale of a tensor of zeros, such as a fresh bias. VeLO's is 3e-5, with which these start slowly.

  Raises:
    ValueError: For a size below 1, no hidden layer, a multiplier that is not finite, a floor that is not above 0; by
      `update`, without parameters or without `value=loss`.
  """
  checks.require(lstm_size >= 1, "lstm_size", lstm_size, "at least 1")
  checks.require(context_size >= 1, "context_size", context_size, "at least 1")
  checks.require(
    len(hidden_sizes) > 0 and min(hidden_sizes) >= 1, "hidden_sizes", hidden_sizes, "one or more widths of at least 1"
  )
  checks.require(math.isfinite(step_multiplier), "step_multiplier", step_multiplier, "finite")
  checks.require(math.isfinite(exp_multiplier), "exp_multiplier", exp_multiplier, "finite")
  checks.require(0 < parameter_floor < math.inf, "parameter_floor", parameter_floor, "above 0 and finite")

  def control(
    inputs: Float[Array, "tensors inputs"], state: hk.LSTMState
  ) -> tuple[Float[Array, "tensors context"], Float[Array, " tensors"], hk.LSTMState]:
    of_all = jnp.mean(jax.nn.relu(hk.Linear(lstm_size, name="mix")(inputs)), axis=0)
    hidden, state = hk.LSTM(lstm_size)(hk.Linear(lstm_size, name="inputs")(inputs) + of_all[None], state)
    outputs = hk.Linear(context_size + 1, w_init=jnp.zeros, name="controls")(hidden)
    return outputs[:, :-1], outputs[:, -1], state

  def direction(features: tuple[Float[Array, "_ *n"], ...], context: Float[Array, " context"]) -> Float[Array, "*n"]:
    rms = jnp.concatenate([summaries.rms(x) for x in features])
    d, a = layers.mlp(features, rms, context, (*hidden_sizes, 2))
    return d * jnp.exp(exp_multiplier * a)

  controller = hk.without_apply_rng(hk.transform(control))
  network = hk.without_apply_rng(hk.transform(direction))

  def initial_lstm(num_tensors: int) -> hk.LSTMState:
    shape = (num_tensors, lstm_size)
    return hk.LSTMState(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32))

  def init(key: base.PRNGKey) -> base.Theta:
    controller_key, network_key = jax.random.split(key)
    return {
      **controller.init(controller_key, jnp.zeros((1, NUM_INPUTS), jnp.float32), initial_lstm(1)),
      **network.init(network_key, (jnp.ones((NUM_FEATURES, 1)),), jnp.zeros(context_size)),
    }

  def transform(theta: base.Theta, num_steps: Any) -> optax.GradientTransformationExtraArgs:
    def init_fn(params):
      return HierarchicalState(
        jnp.zeros((), jnp.int32),
        summaries.no_moments(params),
        summaries.no_losses(),
        initial_lstm(len(jax.tree.leaves(params))),
      )

    def update_fn(updates, state, params=None, *, value=None, **extra_args):
      del extra_args
      if params is None or value is None:
        missing = "the parameters" if params is None else "the loss"
        raise ValueError(
          f"the hierarchical optimizer needs {missing}: call update(gradients, state, params, value=loss)"
        )
      gradients, structure = jax.tree.flatten(updates)
      parameters = jax.tree.leaves(params)
      moments = summaries.accumulate(state.moments, updates)
      losses, of_loss = summaries.observe(state.losses, jnp.asarray(value, jnp.float32), state.count)
      of_run = jnp.concatenate([summaries.progress(state.count, num_steps), of_loss])
      momenta, second = summaries.corrected(moments, state.count + 1)
      tensors = list(zip(parameters, gradients, momenta, second, strict=True))

      inputs = jnp.stack([jnp.concatenate([of_run, summaries.of_tensor(*tensor)]) for tensor in tensors])
      contexts, log_steps, lstm = controller.apply(theta, inputs, state.lstm)

      def update(p, g, m, v, context, log_step):
        features = _features(p, g, m, v)
        scale = step_multiplier * jnp.exp(log_step) * summaries.parameter_scale(p, parameter_floor)
        return -scale * network.apply(theta, features, context)

      steps = [update(*tensor, contexts[i], log_steps[i]) for i, tensor in enumerate(tensors)]
      return structure.unflatten(steps), HierarchicalState(state.count + 1, moments, losses, lstm)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)

  return base.LearnedOptimizer(init, transform)


def _features(p: Array, g: Array, m: Array, v: Array) -> tuple[Array, ...]:
  """What a parameter's MLP sees, ten rows in all, each array [rows, *shape]."""
  root = summaries.root(v[None])
  g, p = g[None], p[None]
  return p, root, g, m, g / root, m / root
