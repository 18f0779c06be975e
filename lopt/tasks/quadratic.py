"""Random convex quadratics: the smallest tasks there are, with a closed form for whatever one wants to check."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lopt import base, checks
from lopt.tasks import ranges

LOSS_CAP = 10.0
"""In units of the expected loss at the start. Starts scatter around 1 (in 10 dimensions one in a thousand is above
3.4), so that only diverged runs feel the cap; and one of these does not drown the meta-gradient of the others."""


class QuadraticTask(NamedTuple):
  """The quadratic ½ (x − c)ᵀ A (x − c)."""

  hessian: Float[Array, "dimension dimension"]
  """A, symmetric and positive definite."""
  minimum: Float[Array, " dimension"]
  """c."""
  start_loss: base.Scalar
  """The loss expected at the start, over starts x_0 ~ N(0, start_scale² I): ½ (start_scale² tr A + cᵀ A c)."""


def build(
  *,
  dimension: int = 10,
  condition_number: tuple[float, float] = (1.0, 100.0),
  curvature: tuple[float, float] = (0.1, 10.0),
  start_scale: float = 1.0,
  gradient_noise: float = 0.0,
) -> base.TaskFamily:
  """Quadratics ½ (x − c)ᵀ A (x − c) with a random spectrum, basis, minimum and start.

  A = Q diag(λ) Qᵀ with Q uniform among the orthogonal matrices. The largest eigenvalue λ_1 is drawn log-uniformly
  from `curvature` and κ = λ_1 / λ_d from `condition_number`; the others are log-uniform between λ_d and λ_1. The
  minimum is c ~ N(0, I), the start x_0 ~ N(0, start_scale² I). `normalize` divides by the loss that is expected
  at the start, so 1 is knowing nothing and 0 the minimum.

  With gradient noise a train batch is ε ~ N(0, gradient_noise² I), and adds εᵀ(x − c) to the loss and so ε to the
  gradient, neither of which it biases. Validation and test are free of noise: they measure the quadratic itself.

  Args:
    dimension: parameters of a task.
    condition_number: lowest and highest condition number κ; has no effect in one dimension.
    curvature: lowest and highest largest eigenvalue; gradient descent is stable for learning rates below 2 / λ_1.
    start_scale: standard deviation of the start, in units of that of the minimum.
    gradient_noise: standard deviation of the noise on each entry of the gradient.

  Raises:
    ValueError: an argument is out of range; the message starts with its name.
  """
  checks.require(dimension >= 1, "dimension", dimension, "at least 1")
  low, high = condition_number
  checks.require(
    1 <= low <= high < math.inf, "condition_number", condition_number, "lowest, highest; 1 <= lowest <= highest"
  )
  ranges.check(curvature=curvature)
  checks.require(0 <= start_scale < math.inf, "start_scale", start_scale, "at least 0")
  checks.require(0 <= gradient_noise < math.inf, "gradient_noise", gradient_noise, "at least 0")

  def sample(key: base.PRNGKey) -> QuadraticTask:
    spectrum_key, basis_key, minimum_key = jax.random.split(key, 3)
    uniform = jax.random.uniform(spectrum_key, (2 + dimension,))
    log_largest = ranges.between(uniform[0], ranges.log(curvature))
    log_condition = ranges.between(uniform[1], ranges.log(condition_number))
    # The first and the last eigenvalue are the ends of the range, whose ratio then is the condition number.
    position = uniform[2:].at[-1].set(1.0).at[0].set(0.0)
    eigenvalues = jnp.exp(log_largest - position * log_condition)
    basis = jax.random.orthogonal(basis_key, dimension)
    hessian = (basis * eigenvalues[None, :]) @ basis.T
    minimum = jax.random.normal(minimum_key, (dimension,))
    start_loss = 0.5 * (start_scale**2 * jnp.trace(hessian) + minimum @ hessian @ minimum)
    return QuadraticTask(hessian, minimum, start_loss)

  def init(key: base.PRNGKey, task_params: QuadraticTask) -> Float[Array, " dimension"]:
    del task_params
    return start_scale * jax.random.normal(key, (dimension,))

  def batch(key: base.PRNGKey, task_params: QuadraticTask, split: str) -> Float[Array, " dimension"]:
    del task_params
    checks.one_of("split", split, base.SPLITS)
    if split != "train" or gradient_noise == 0:
      return jnp.zeros((dimension,))
    return gradient_noise * jax.random.normal(key, (dimension,))

  def loss(
    params: Float[Array, " dimension"],
    key: base.PRNGKey,
    batch: Float[Array, " dimension"],
    task_params: QuadraticTask,
  ) -> tuple[base.Scalar, base.Metrics]:
    del key  # the loss has no randomness of its own
    error = params - task_params.minimum
    return 0.5 * error @ task_params.hessian @ error + batch @ error, {}

  def normalize(loss: base.Scalar, task_params: QuadraticTask) -> base.Scalar:
    return loss / task_params.start_loss

  return base.TaskFamily(sample, init, batch, loss, normalize, LOSS_CAP)
