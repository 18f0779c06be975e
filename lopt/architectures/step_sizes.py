"""Step sizes of whole tensors, around any learned optimizer: relative to the parameters, learned, annealed.

Optimizers that look at each parameter on its own, with all features normalised, see neither how large a step is for
its tensor nor how noisy gradients are. What is learned here sees that: the scheduler of A. Moudgil et al., "Celo:
Training versatile learned optimizers on a compute diet", TMLR 2025 (arXiv:2501.12670), without its recurrence and
with inputs of other kinds.
"""

import functools
import math
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from lopt import base, checks
from lopt.architectures import layers, origin, summaries

DECAY = 0.95
"""Of the moving averages of squared norms and of alignments: some twenty steps."""

SQUARE_FLOOR = 1e-12
"""Added to squares before their logarithms."""
LARGEST = 2_048
"""Tensors with more parameters count as such: meta-training on small networks sees none, and nothing is to depend on
how what it learned goes on beyond."""

NUM_INPUTS = 9 + len(summaries.PROGRESS) + summaries.NUM_LOSS_FEATURES + 1


class LearnedState(NamedTuple):
  """What `learned` remembers of an inner run: a few numbers for each tensor, in the order of `jax.tree.leaves`."""

  optimizer: base.State
  count: Int[Array, ""]  # inner steps taken
  losses: summaries.LossHistory
  square_norms: Float[Array, " tensors"]
  """Moving average of ‖g‖², from zero; likewise the next."""
  alignments: Float[Array, " tensors"]


@origin.remembered
def wrap(
  optimizer: base.LearnedOptimizer,
  *,
  relative_floor: float | None = None,
  hidden_size: int | None = None,
  base_steps: int | None = None,
) -> base.LearnedOptimizer:
  """The optimizer with its steps sized by those of the following that are not None, in their order.

  Args:
    optimizer: Any architecture.
    relative_floor: The least root mean square that a tensor counts as; its update is multiplied by its root mean
      square (`optax.scale_by_param_block_rms`), so that steps are relative to the parameters'.
    hidden_size: Units of the network that multiplies each tensor's update by a factor of its own: `learned`.
    base_steps: Length of runs whose steps begin with their own size, and then shrink to zero: `anneal`.

  Raises:
    ValueError: For a value out of range; the message starts with its name.
  """
  if relative_floor is not None:
    checks.require(0 < relative_floor < math.inf, "relative_floor", relative_floor, "above 0 and finite")
    relative = optax.scale_by_param_block_rms(relative_floor)
    optimizer = _followed_by(optimizer, lambda num_steps: relative)
  if hidden_size is not None:
    optimizer = learned(optimizer, hidden_size)
  if base_steps is not None:
    checks.require(base_steps >= 1, "base_steps", base_steps, "at least 1")
    optimizer = _followed_by(optimizer, lambda num_steps: anneal(num_steps, base_steps))
  return optimizer


def learned(optimizer: base.LearnedOptimizer, hidden_size: int) -> base.LearnedOptimizer:
  """The optimizer with its update u of each tensor multiplied by exp(s), s from a network shared by all tensors.

  With gradient g, parameters p, loss L, moving averages ⟨·⟩ and Euclidean norms over the tensor, its inputs are

      log ‖g‖ ‖p‖ / |⟨L⟩|      by how much a relative change of the tensor changes the loss, relatively;
                               and that of all tensors together
      log ‖g‖ ‖u‖ / |⟨L⟩|      by how much, at most, this step would
      -gᵀu / ‖g‖ ‖u‖           whether it goes down the slope of this batch; and a moving average of that
      log ‖g‖ / √⟨‖g‖²⟩        whether this gradient is larger than usual
      log RMS(p), rank, size   what kind of tensor it is: a larger rank than 2 counts as 2, a larger size as 2048

  and, the same for all tensors, the training fraction t/T, how the loss has been moving
  (`lopt.architectures.summaries`), and log T. A constant factor on the loss changes none of them. The last layer
  starts at zero, so that an untrained network changes nothing.

  θ is `{"optimizer": θ of the optimizer, "step_sizes": the network's weights}`.

  Args:
    optimizer: What makes u.
    hidden_size: Units of the network's one hidden layer.

  Raises:
    ValueError: For a size below 1; by `update`, without parameters or without `value=loss`.
  """
  checks.require(hidden_size >= 1, "hidden_size", hidden_size, "at least 1")

  def log_factors(inputs: Float[Array, "inputs tensors"]) -> Float[Array, " tensors"]:
    w, b = layers.LinearWeights("hidden")(NUM_INPUTS, hidden_size)
    hidden = jnp.tanh(layers.product(w, inputs) + b[:, None])
    w, b = layers.LinearWeights("log_factor")(hidden_size, 1, jnp.zeros)
    return layers.product(w, hidden)[0] + b

  net = hk.without_apply_rng(hk.transform(log_factors))

  def init(key: base.PRNGKey) -> base.Theta:
    optimizer_key, net_key = jax.random.split(key)
    return {"optimizer": optimizer.init(optimizer_key), "step_sizes": net.init(net_key, jnp.zeros((NUM_INPUTS, 1)))}

  def transform(theta: base.Theta, num_steps: Any) -> optax.GradientTransformationExtraArgs:
    tx = optimizer.transform(theta["optimizer"], num_steps)

    def init_fn(params):
      zeros = jnp.zeros(len(jax.tree.leaves(params)), jnp.float32)
      return LearnedState(tx.init(params), jnp.zeros((), jnp.int32), summaries.no_losses(), zeros, zeros)

    def update_fn(updates, state, params=None, *, value=None, **extra_args):
      if params is None or value is None:
        missing = "the parameters" if params is None else "the loss"
        raise ValueError(f"learned step sizes need {missing}: call update(gradients, state, params, value=loss)")
      steps, optimizer_state = tx.update(updates, state.optimizer, params, value=value, **extra_args)
      g, p, (u, structure) = jax.tree.leaves(updates), jax.tree.leaves(params), jax.tree.flatten(steps)
      gg, pp, uu, gu = _dots(g, g), _dots(p, p), _dots(u, u), _dots(g, u)
      alignment = -gu / jnp.sqrt(gg * uu + summaries.EPSILON**2)
      square_norms = DECAY * state.square_norms + (1 - DECAY) * gg
      alignments = DECAY * state.alignments + (1 - DECAY) * alignment
      losses, of_loss = summaries.observe(state.losses, jnp.asarray(value, jnp.float32), state.count)
      # Averages from zero, and what corrects them for their beginning.
      loss_weights = summaries.total_weights(summaries.LOSS_DECAYS, state.count + 1)
      (weight,) = summaries.total_weights((DECAY,), state.count + 1)
      log10_root = functools.partial(summaries.log10_root, epsilon=SQUARE_FLOOR)
      sizes = np.array([x.size for x in p])
      square_loss = jnp.square(losses.means[0] / loss_weights[0]) + summaries.EPSILON
      of_tensors = [
        log10_root(gg * pp / square_loss),
        jnp.broadcast_to(log10_root(jnp.sum(gg * pp) / square_loss), gg.shape),
        log10_root(gg * uu / square_loss),
        alignment,
        alignments / weight,
        log10_root(gg) - log10_root(square_norms / weight),
        log10_root(pp / sizes) / 2,
        jnp.array([min(x.ndim, 2) / 4 for x in p], jnp.float32),
        jnp.asarray(np.log(np.minimum(sizes, LARGEST)) / 10, jnp.float32),
      ]
      log_horizon = jnp.log10(jnp.asarray(num_steps, jnp.float32) / 1_000)
      of_run = jnp.concatenate([summaries.progress(state.count, num_steps), of_loss, log_horizon[None]])
      inputs = [jnp.stack(of_tensors), jnp.broadcast_to(of_run[:, None], (len(of_run), len(p)))]
      factors = jnp.exp(net.apply(theta["step_sizes"], jnp.concatenate(inputs)))
      scaled = structure.unflatten([factors[i] * x for i, x in enumerate(u)])
      return scaled, LearnedState(optimizer_state, state.count + 1, losses, square_norms, alignments)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)

  return base.LearnedOptimizer(init, transform)


def anneal(num_steps: Any, base_steps: int) -> optax.GradientTransformationExtraArgs:
  """Multiplies the update of step t = 0, 1, … < T = `num_steps` by

      min(√(base / T), base / T) ½ (1 + cos(π t / T)),

  and by 0 from then on. The cosine is that of Loshchilov and Hutter 2017 (arXiv:1608.03983), without restarts. With
  the root, T steps of random direction go equally far for every T; in runs longer than `base`, the longest of
  meta-training, steps that all have one direction do, since in those relative steps might compound for longer than in
  any run that was seen. T may be an array, as in meta-training, which `optax.cosine_decay_schedule` does not take.
  """

  def factor(count: Any) -> base.Scalar:
    size = jnp.minimum(jnp.sqrt(base_steps / num_steps), base_steps / num_steps)
    return 0.5 * size * (1 + jnp.cos(jnp.pi * jnp.minimum(count / num_steps, 1.0)))

  return optax.with_extra_args_support(optax.scale_by_schedule(factor))


def _followed_by(optimizer: base.LearnedOptimizer, make: Any) -> base.LearnedOptimizer:
  """The optimizer in a chain with what `make(num_steps)` is."""

  def transform(theta: base.Theta, num_steps: Any) -> optax.GradientTransformationExtraArgs:
    return optax.chain(optimizer.transform(theta, num_steps), make(num_steps))

  return base.LearnedOptimizer(optimizer.init, transform)


def _dots(a: list[Array], b: list[Array]) -> Float[Array, " tensors"]:
  return jnp.stack([jnp.sum(x * y) for x, y in zip(a, b, strict=True)])
