"""Inner training as an unrolled computation graph: TaskFamily × LearnedOptimizer -> UnrolledProblem."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import haiku as hk
import jax
import jax.numpy as jnp
import jmp
import optax

from lopt import base, checks

Split = Literal["train", "validation"]
Precision = Literal["float32", "bfloat16"]
Per = Literal["episode", "step"]  # over what horizons are log-uniform


class InnerState(NamedTuple):
  """An inner run between two steps."""

  params: base.Params
  optimizer_state: base.State
  task_params: base.TaskParams
  num_steps: base.Horizon  # T of this run, for optimizers that use it
  step_factor: base.Scalar | None = None  # by which this run's updates are multiplied


def build(
  family: base.TaskFamily,
  optimizer: base.LearnedOptimizer,
  *,
  horizon: Callable[[base.PRNGKey], base.Horizon],
  meta_loss: Split = "train",
  precision: Precision = "float32",
  loss_cap: float | None = None,
  log_floor: float | None = None,
  step_spread: float = 1.0,
) -> base.UnrolledProblem:
  """Trains a freshly drawn task of the family in every episode.

  A step draws a training batch, and updates the inner parameters by the optimizer that θ makes. Its loss L_t is, by
  `meta_loss`, the normalised loss of

  - 'train': that batch, before the update: the training curve that one would look at;
  - 'validation': a validation batch, after the update.

  Args:
    family: Where tasks come from.
    optimizer: What is meta-trained. Its initial state must not depend on θ's values (NaN if it does: an episode
      outlives many θ).
    horizon: Draws the number of inner steps of an episode.
    meta_loss: Whose loss the outer problem minimises.
    precision: Of the matrix products of the family's networks; see `in_precision`.
    loss_cap: Larger losses count as this much and as diverged, if it is below the family's own cap. The lower, the
      less noise of runs that diverge is in gradients.
    log_floor: f, for the meta-loss log(1 + L_t / f) / log(1 + 1 / f) instead of L_t, still 1 for a task of which
      nothing is known: a tenth of the loss is then worth about the same anywhere above f.
    step_spread: S, for updates that are multiplied by a factor drawn log-uniformly from 1/S to S for each episode: so
      that a direction becomes good at learning rates around the recommended one, and not only at that.

  Raises:
    ValueError: For another `meta_loss` or `precision`, a `loss_cap` that is not a number, a `log_floor` that is not
      above 0 and finite, or a `step_spread` that is not at least 1 and finite.
  """
  checks.one_of("meta_loss", meta_loss, get_args(Split))
  if loss_cap is not None and math.isnan(loss_cap):
    raise ValueError("loss_cap: must be a number")
  if log_floor is not None:
    checks.require(0 < log_floor < math.inf, "log_floor", log_floor, "above 0 and finite")
  checks.require(1 <= step_spread < math.inf, "step_spread", step_spread, "at least 1 and finite")
  family = in_precision(family, precision)
  cap = min(family.loss_cap, math.inf if loss_cap is None else loss_cap)

  if log_floor is not None:
    cap = math.log1p(max(cap, 0.0) / log_floor) / math.log1p(1 / log_floor)

  def scale(loss: base.Scalar) -> base.Scalar:
    return loss if log_floor is None else jnp.log1p(jnp.maximum(loss, 0.0) / log_floor) / math.log1p(1 / log_floor)

  def init(key: base.PRNGKey, num_steps: base.Horizon) -> InnerState:
    task_key, params_key, theta_key = jax.random.split(key, 3)
    task_params = family.sample(task_key)
    params = family.init(params_key, task_params)
    no_theta = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), jax.eval_shape(optimizer.init, theta_key))
    tx = optimizer.transform(no_theta, num_steps)
    optimizer_state = (tx if step_spread == 1 else optax.chain(tx, optax.identity())).init(params)
    factor = None
    if step_spread > 1:
      exponent = jax.random.uniform(jax.random.fold_in(key, 0), minval=-1.0)
      factor = jnp.float32(step_spread) ** exponent
    return InnerState(params, optimizer_state, task_params, num_steps, factor)

  def step(theta: base.Theta, state: InnerState, key: base.PRNGKey) -> tuple[InnerState, base.Scalar]:
    train_key, validation_key = jax.random.split(key)
    tx = optimizer.transform(theta, state.num_steps)
    if state.step_factor is not None:
      tx = optax.chain(tx, optax.scale(state.step_factor))
    params, optimizer_state, loss = train_step(
      family,
      tx,
      train_key,
      state.params,
      state.optimizer_state,
      state.task_params,
    )
    if meta_loss == "validation":
      batch_key, loss_key = jax.random.split(validation_key)
      batch = family.batch(batch_key, state.task_params, "validation")
      loss, _ = family.loss(params, loss_key, batch, state.task_params)
    normalized = scale(family.normalize(loss, state.task_params))
    return state._replace(params=params, optimizer_state=optimizer_state), normalized

  return base.UnrolledProblem(horizon, init, step, cap)


def in_precision(family: base.TaskFamily, precision: Precision) -> base.TaskFamily:
  """The family with the linear layers of its Haiku networks in another precision, as accelerators have it faster.

  Weights, activations and gradients of a layer are rounded to it, and its outputs are float32 again. Parameters,
  all else of the loss, and the optimizer stay float32.

  Raises:
    ValueError: For another `precision`.
  """
  checks.one_of("precision", precision, get_args(Precision))
  if precision == "float32":
    return family
  policy = jmp.Policy(param_dtype=jnp.float32, compute_dtype=jnp.bfloat16, output_dtype=jnp.float32)

  def loss(params, key, batch, task_params):
    with hk.mixed_precision.push_policy(hk.Linear, policy):
      return family.loss(params, key, batch, task_params)

  return family._replace(loss=loss)


def train_step(
  family: base.TaskFamily,
  tx: optax.GradientTransformationExtraArgs,
  key: base.PRNGKey,
  params: base.Params,
  optimizer_state: base.State,
  task_params: base.TaskParams,
) -> tuple[base.Params, base.State, base.Scalar]:
  """One inner step on one training batch: new parameters, new optimizer state, the loss before the update."""
  batch_key, loss_key = jax.random.split(key)
  batch = family.batch(batch_key, task_params, "train")
  (loss, _), gradients = jax.value_and_grad(family.loss, has_aux=True)(params, loss_key, batch, task_params)
  updates, optimizer_state = tx.update(gradients, optimizer_state, params, value=loss)
  return optax.apply_updates(params, updates), optimizer_state, loss


def log_uniform_horizon(
  *, minimum: int, maximum: int, per: Per = "episode"
) -> Callable[[base.PRNGKey], base.Horizon]:
  """Horizons T rounded down to whole steps in minimum..maximum (both included), log T uniform.

  Args:
    minimum, maximum: Inner steps.
    per: Whether uniform over episodes, of which long ones then have most of the steps, and so most of the weight in
      the mean loss per step; or over the inner steps, with episodes that have a density ∝ 1/T².

  Raises:
    ValueError: Unless 1 ≤ minimum ≤ maximum, or `per` is neither.
  """
  checks.one_of("per", per, get_args(Per))
  if not 1 <= minimum <= maximum:
    raise ValueError(f"needs 1 <= minimum <= maximum, not {minimum} and {maximum}")

  def horizon(key: base.PRNGKey) -> base.Horizon:
    if minimum == maximum:
      return jnp.int32(minimum)
    if per == "episode":
      log_t = jax.random.uniform(key, (), minval=jnp.log(float(minimum)), maxval=jnp.log(maximum + 1.0))
      t = jnp.exp(log_t)
    else:
      t = 1 / jax.random.uniform(key, (), minval=1 / (maximum + 1.0), maxval=1 / minimum)
    return jnp.clip(t.astype(jnp.int32), minimum, maximum)

  return horizon
