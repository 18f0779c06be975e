"""Augmentations of task families: variants of a family's tasks that ask more of an optimizer.

Rescaled parameters are from L. Metz et al., "VeLO: Training versatile learned optimizers by scaling up", 2022
(arXiv:2211.09760), and A. Moudgil et al., "Celo: Training versatile learned optimizers on a compute diet", 2025
(arXiv:2501.12670).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from lopt import base
from lopt.tasks import ranges


class AugmentedTask(NamedTuple):
  """A task of the family and how it is changed; None where an augmentation is off."""

  task: base.TaskParams
  """The family's own."""
  scales: Float[Array, " tensors"] | None
  """c, one for each tensor in the order of `jax.tree.leaves`."""
  gradient_noise: base.Scalar | None
  weight_decay: base.Scalar | None
  init_scale: base.Scalar | None


class TrainBatch(NamedTuple):
  """A batch of the family's train split, by which `loss` knows what noise and weight decay are for."""

  batch: base.Batch


def wrap(
  family: base.TaskFamily,
  *,
  reparametrization: tuple[float, float] | None = None,
  gradient_noise: tuple[float, float] | None = None,
  weight_decay: tuple[float, float] | None = None,
  init_scale: tuple[float, float] | None = None,
) -> base.TaskFamily:
  """The family with augmented tasks; the family itself where all augmentations are off (None).

  Each option is the lowest and highest value of a number that is drawn log-uniformly for each task (for each tensor
  of each task, in the case of `reparametrization`). With ℓ the family's loss, p its parameters and n their number,
  the loss of parameters q is

      L(q) = ℓ(p) + u λ/2 ‖p‖² + u σ/√n εᵀ(p − stop_gradient(p))   with p_i = c_i q_i for each tensor i,

  and the start is q_i = f p_i / c_i with the family's start p. The two added terms are there on the train split only.
  u is the loss that the family's `normalize` makes 1, so that λ and σ mean the same whatever the scale of the loss.

  Losses stay in the family's unit: 1 is the same loss as without augmentation. The normalised train loss is that
  which is minimised, with the weight decay λ/2 ‖p‖² in it; those of validation and test are the family's own.

  Args:
    family: any family of float parameters whose `normalize` is affine in the loss.
    reparametrization: c. It leaves losses as they are and multiplies the gradient by c, so that updates that
      are right for q are 1/c times those that are right for p; VeLO and Celo have (1e-3, 1e3).
    gradient_noise: σ. Each evaluation of a train loss draws ε ~ N(0, I) afresh. To the gradient of the normalised
      loss with respect to p this adds noise of norm σ (root mean square), spread evenly over all parameters: that
      gradient's own norm is about 1 where a step of length 1 would solve the task. The loss stays as it is.
    weight_decay: λ.
    init_scale: f, one for all tensors.

  Raises:
    ValueError: a range is not 0 < lowest <= highest < ∞; the message starts with its name.
  """
  ranges.check(
    reparametrization=reparametrization,
    gradient_noise=gradient_noise,
    weight_decay=weight_decay,
    init_scale=init_scale,
  )
  if all(bounds is None for bounds in (reparametrization, gradient_noise, weight_decay, init_scale)):
    return family

  def sample(key: base.PRNGKey) -> AugmentedTask:
    task_key, augmentation_key = jax.random.split(key)
    task = family.sample(task_key)
    tensors = len(jax.tree.leaves(jax.eval_shape(family.init, key, task)))  # shapes only: the key draws nothing
    uniform = jax.random.uniform(augmentation_key, (3 + tensors,))
    return AugmentedTask(
      task,
      scales=_draw(uniform[3:], reparametrization),
      gradient_noise=_draw(uniform[0], gradient_noise),
      weight_decay=_draw(uniform[1], weight_decay),
      init_scale=_draw(uniform[2], init_scale),
    )

  def init(key: base.PRNGKey, task_params: AugmentedTask) -> base.Params:
    params = family.init(key, task_params.task)
    if task_params.init_scale is not None:
      params = jax.tree.map(lambda p: task_params.init_scale * p, params)
    return params if task_params.scales is None else _rescale(params, 1 / task_params.scales)

  def batch(key: base.PRNGKey, task_params: AugmentedTask, split: str) -> base.Batch:
    examples = family.batch(key, task_params.task, split)
    regularized = gradient_noise is not None or weight_decay is not None
    return TrainBatch(examples) if split == "train" and regularized else examples

  def loss(
    params: base.Params, key: base.PRNGKey, batch: base.Batch, task_params: AugmentedTask
  ) -> tuple[base.Scalar, base.Metrics]:
    if task_params.scales is not None:
      params = _rescale(params, task_params.scales)
    if not isinstance(batch, TrainBatch):
      return family.loss(params, key, batch, task_params.task)
    noise_key = None
    if task_params.gradient_noise is not None:
      key, noise_key = jax.random.split(key)
    value, metrics = family.loss(params, key, batch.batch, task_params.task)
    unit = 1 / jax.grad(family.normalize)(jnp.zeros_like(value), task_params.task)
    flat, _ = ravel_pytree(params)
    if task_params.weight_decay is not None:
      value += unit * task_params.weight_decay / 2 * jnp.sum(jnp.square(flat))
    if noise_key is not None:
      noise = jax.random.normal(noise_key, flat.shape)
      projection = unit * task_params.gradient_noise * flat.size**-0.5 * (noise @ flat)
      value += projection - jax.lax.stop_gradient(projection)
    return value, metrics

  def normalize(loss: base.Scalar, task_params: AugmentedTask) -> base.Scalar:
    return family.normalize(loss, task_params.task)

  return base.TaskFamily(sample, init, batch, loss, normalize, family.loss_cap)


def _draw(uniform: Float[Array, "*shape"], bounds: tuple[float, float] | None) -> Float[Array, "*shape"] | None:
  return None if bounds is None else ranges.log_uniform(uniform, bounds)


def _rescale(params: base.Params, scales: Float[Array, " tensors"]) -> base.Params:
  leaves, structure = jax.tree.flatten(params)
  return jax.tree.unflatten(structure, [scale * leaf for scale, leaf in zip(scales, leaves, strict=True)])
