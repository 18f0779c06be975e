"""Closed-form surfaces that are hard in known ways: curved valleys, saturating slopes, wide spectra; noise, sparsity.

Plain quadratics, with what can be computed of them, are in `quadratic.py`.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lopt import base, checks
from lopt.tasks import ranges

LOSS_CAP = 10.0
"""In units of the loss at the start, which the noise in train losses hardly moves at the default ranges."""

KINDS = ("rosenbrock", "log_sum_exp", "power_law")


class SurfaceTask(NamedTuple):
  """The loss s f(x − c), whose minimum f(0) = 0 is that of the kind; what only other kinds need is None."""

  kind: Int[Array, ""]
  """Index into the family's `kinds`."""
  minimum: Float[Array, " dimension"]
  """c."""
  start: Float[Array, " dimension"]
  loss_scale: base.Scalar
  """s."""
  start_loss: base.Scalar
  valley: base.Scalar | None
  """b of Rosenbrock's function."""
  slopes: Float[Array, "slopes dimension"] | None
  """a_j of log-sum-exp, one a row."""
  root_hessian: Float[Array, "dimension dimension"] | None
  """R of the power law."""
  density: base.Scalar
  gradient_noise: base.Scalar


class Disturbance(NamedTuple):
  """A batch: what keeps this step's gradient from being exact."""

  active: Bool[Array, " dimension"]
  noise: Float[Array, " dimension"]


def build(
  *,
  kinds: tuple[str, ...] = KINDS,
  dimension: int = 10,
  valley: tuple[float, float] = (1.0, 100.0),
  sharpness: tuple[float, float] = (0.3, 3.0),
  exponent: tuple[float, float] = (0.5, 3.0),
  loss_scale: tuple[float, float] = (0.1, 10.0),
  density: tuple[float, float] = (0.2, 1.0),
  gradient_noise: tuple[float, float] | None = (1e-3, 1e-1),
) -> base.TaskFamily:
  """Surfaces s f(z) of z = x − c, with f(0) = 0 the minimum and a start of standard deviation 1 around it.

      rosenbrock   f = Σ_i b (y_{i+1} − y_i²)² + (1 − y_i)²  with y = 1 + z: a curved valley, b times as steep across
                   as along. From four dimensions on it has a second minimum, near y = (−1, 1, …, 1).
      log_sum_exp  f = log(1/m Σ_j exp(a_jᵀ z)) with Σ_j a_j = 0 and m = 2 · dimension: round at the bottom, linear
                   far out, so that the gradient says little of the distance. a_j ~ N(0, sharpness² I), then centred.
      power_law    f = ½ |R z|², its Hessian's eigenvalues k^(−exponent) for k = 1 … dimension in a random basis

  A task draws its kind uniformly, c and the start's distance to it from N(0, I), and each number that has a range
  log-uniformly from that. `normalize` divides by the loss at the start: 1 is the start and 0 the minimum.

  On the train split, a step's gradient is that of a random subset of the coordinates, each in it with probability
  `density`, and zero elsewhere (as that of an embedding is; it is not divided by the density). With gradient noise
  uᵀz is added to the loss and so u to the gradient, active or not: u is normal, and its norm is `gradient_noise`
  (root mean square) in units of the normalised loss. Neither is there on validation and test.

  Args:
    kinds: those that tasks draw from; out of rosenbrock, log_sum_exp and power_law.
    dimension: parameters of a task.
    valley: lowest and highest b; 100 is usual.
    sharpness: lowest and highest sharpness of log_sum_exp.
    exponent: lowest and highest exponent of the power law.
    loss_scale: lowest and highest s.
    density: lowest and highest density, at most 1; (1, 1) for full gradients.
    gradient_noise: lowest and highest gradient noise; None for none.

  Raises:
    ValueError: an argument is out of range; the message starts with its name.
  """
  checks.some_of("kinds", kinds, KINDS)
  checks.require(dimension >= 2, "dimension", dimension, "at least 2")
  ranges.check(
    valley=valley,
    sharpness=sharpness,
    exponent=exponent,
    loss_scale=loss_scale,
    density=density,
    gradient_noise=gradient_noise,
  )
  checks.require(density[1] <= 1, "density", density, "probabilities, at most 1")
  surfaces = [
    {"rosenbrock": _rosenbrock, "log_sum_exp": _log_sum_exp, "power_law": _power_law}[kind] for kind in kinds
  ]

  def height(params: Float[Array, " dimension"], task_params: SurfaceTask) -> base.Scalar:
    """The loss without disturbances. Under `vmap` over tasks all kinds are evaluated, which is little work."""
    z = params - task_params.minimum
    return task_params.loss_scale * jax.lax.switch(task_params.kind, surfaces, z, task_params)

  def sample(key: base.PRNGKey) -> SurfaceTask:
    uniform_key, normal_key, basis_key = jax.random.split(key, 3)
    uniform = jax.random.uniform(uniform_key, (7,))
    normal = jax.random.normal(normal_key, (2 + 2 * dimension, dimension))
    slopes = root_hessian = None
    if "log_sum_exp" in kinds:
      slopes = ranges.log_uniform(uniform[1], sharpness) * normal[2:]
      slopes -= jnp.mean(slopes, axis=0, keepdims=True)
    if "power_law" in kinds:  # QR takes longer than all else
      k = jnp.arange(1, dimension + 1, dtype=jnp.float32)
      root_eigenvalues = k ** (-0.5 * ranges.log_uniform(uniform[2], exponent))
      root_hessian = root_eigenvalues[:, None] * jax.random.orthogonal(basis_key, dimension)
    task = SurfaceTask(
      kind=(uniform[0] * len(kinds)).astype(jnp.int32),
      minimum=normal[0],
      start=normal[0] + normal[1],
      loss_scale=ranges.log_uniform(uniform[3], loss_scale),
      start_loss=jnp.ones(()),
      valley=ranges.log_uniform(uniform[4], valley) if "rosenbrock" in kinds else None,
      slopes=slopes,
      root_hessian=root_hessian,
      density=ranges.log_uniform(uniform[5], density),
      gradient_noise=jnp.zeros(()) if gradient_noise is None else ranges.log_uniform(uniform[6], gradient_noise),
    )
    return task._replace(start_loss=height(task.start, task))

  def init(key: base.PRNGKey, task_params: SurfaceTask) -> Float[Array, " dimension"]:
    del key  # the start is part of the task, so that its loss is known
    return task_params.start

  def batch(key: base.PRNGKey, task_params: SurfaceTask, split: str) -> Disturbance:
    checks.one_of("split", split, base.SPLITS)
    active, noise = jnp.ones((dimension,), bool), jnp.zeros((dimension,))
    if split == "train":
      active_key, noise_key = jax.random.split(key)
      if density != (1, 1):
        active = jax.random.uniform(active_key, (dimension,)) < task_params.density
      if gradient_noise is not None:
        unit = task_params.start_loss * task_params.gradient_noise / math.sqrt(dimension)
        noise = unit * jax.random.normal(noise_key, (dimension,))
    return Disturbance(active, noise)

  def loss(
    params: Float[Array, " dimension"], key: base.PRNGKey, batch: Disturbance, task_params: SurfaceTask
  ) -> tuple[base.Scalar, base.Metrics]:
    del key  # all randomness is in the batch
    seen = jnp.where(batch.active, params, jax.lax.stop_gradient(params))
    return height(seen, task_params) + batch.noise @ (params - task_params.minimum), {}

  def normalize(loss: base.Scalar, task_params: SurfaceTask) -> base.Scalar:
    return loss / task_params.start_loss

  return base.TaskFamily(sample, init, batch, loss, normalize, LOSS_CAP)


def _rosenbrock(z: Float[Array, " dimension"], task: SurfaceTask) -> base.Scalar:
  assert task.valley is not None
  # In z rather than y, so that nothing cancels near the minimum: y_{i+1} − y_i² = z_{i+1} − 2 z_i − z_i².
  this, following = z[:-1], z[1:]
  return jnp.sum(task.valley * jnp.square(following - 2 * this - jnp.square(this)) + jnp.square(this))


def _log_sum_exp(z: Float[Array, " dimension"], task: SurfaceTask) -> base.Scalar:
  assert task.slopes is not None
  return jax.nn.logsumexp(task.slopes @ z) - math.log(len(task.slopes))


def _power_law(z: Float[Array, " dimension"], task: SurfaceTask) -> base.Scalar:
  assert task.root_hessian is not None
  return 0.5 * jnp.sum(jnp.square(task.root_hessian @ z))
