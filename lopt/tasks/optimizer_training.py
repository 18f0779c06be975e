"""Training a small learned optimizer, as a task: what meta-trains the optimizer of an optimizer.

M. Andrychowicz et al., "Learning to learn by gradient descent by gradient descent", NIPS 2016, trains θ by
backpropagation through the inner runs, on the sum of their losses; here θ are the parameters of the task.
"""

from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lopt import base, checks
from lopt.tasks import ranges

LOSS_CAP = 10.0
"""In units of the loss of an optimizer that does nothing."""


class OptimizerTask(NamedTuple):
  """What distinguishes one task of the family: the quadratics that the optimizer is for, and its parametrisation."""

  curvature: base.Scalar
  """The largest curvature of a quadratic."""
  condition_number: base.Scalar
  """The largest curvature divided by the smallest."""
  step_multiplier: base.Scalar
  """λ."""
  loss_scale: base.Scalar
  """Factor on the loss."""


class Quadratics(NamedTuple):
  """A batch: ½ Σ_i h_i x_i², and where the runs begin."""

  curvatures: Float[Array, "B dimension"]
  starts: Float[Array, "B dimension"]


def build(
  *,
  dimension: int = 5,
  num_steps: int = 10,
  hidden_size: int = 8,
  batch_size: int = 8,
  curvature: tuple[float, float] = (0.1, 10.0),
  condition_number: tuple[float, float] = (1.0, 100.0),
  step_multiplier: tuple[float, float] = (0.03, 0.3),
  loss_scale: tuple[float, float] = (0.1, 10.0),
) -> base.TaskFamily:
  """Learned optimizers that are trained on short runs on random quadratics ½ Σ_i h_i x_i².

  The parameters are the weights of an MLP with one hidden layer that makes the update of each coordinate from its
  gradient and momentum, both in units of the root mean square of the first step's gradient over the coordinates:

      m ← 0.9 m + 0.1 g,   x ← x - λ MLP(g, m).

  The loss is the mean of ½ Σ_i h_i x_i² over the steps 1 ... `num_steps` and a batch of quadratics, each divided by
  its value at the start; its gradient goes through the whole run. 1 is an optimizer that does nothing.

  Args:
    dimension: coordinates of a quadratic.
    num_steps: steps of each run.
    hidden_size: units of the MLP.
    batch_size: quadratics of a batch, of curvatures log-uniform between the task's extremes and normal starts.
    curvature: lowest and highest largest curvature of a task, drawn log-uniformly.
    condition_number: the same for the largest curvature divided by the smallest.
    step_multiplier: the same for λ.
    loss_scale: the same for a factor on the loss.

  Raises:
    ValueError: an argument is out of range; the message starts with its name.
  """
  checks.counts(dimension=dimension, num_steps=num_steps, hidden_size=hidden_size, batch_size=batch_size)
  bounds = {
    "curvature": curvature,
    "condition_number": condition_number,
    "step_multiplier": step_multiplier,
    "loss_scale": loss_scale,
  }
  ranges.check(**bounds)
  checks.require(condition_number[0] >= 1, "condition_number", condition_number, "at least 1")
  network = hk.without_apply_rng(
    hk.transform(lambda x: hk.nets.MLP([hidden_size, 1], activation=jnp.tanh)(x)[..., 0])
  )

  def sample(key: base.PRNGKey) -> OptimizerTask:
    uniform = jax.random.uniform(key, (len(bounds),))
    return OptimizerTask(*(ranges.log_uniform(u, value) for u, value in zip(uniform, bounds.values(), strict=True)))

  def init(key: base.PRNGKey, task_params: OptimizerTask) -> base.Params:
    del task_params
    return network.init(key, jnp.zeros(2))

  def batch(key: base.PRNGKey, task_params: OptimizerTask, split: str) -> Quadratics:
    checks.one_of("split", split, base.SPLITS)
    # Every quadratic is drawn afresh, so the splits need not differ.
    curvature_key, start_key = jax.random.split(key)
    position = jax.random.uniform(curvature_key, (batch_size, dimension))
    curvatures = task_params.curvature * task_params.condition_number ** (-position)
    return Quadratics(curvatures, jax.random.normal(start_key, (batch_size, dimension)))

  def loss(
    params: base.Params, key: base.PRNGKey, batch: Quadratics, task_params: OptimizerTask
  ) -> tuple[base.Scalar, base.Metrics]:
    del key  # the loss has no randomness of its own

    def run(h: Float[Array, " dimension"], start: Float[Array, " dimension"]) -> base.Scalar:
      scale = jnp.sqrt(jnp.mean(jnp.square(h * start)))

      def step(carry, _):
        x, m = carry
        g = h * x / scale
        m = 0.9 * m + 0.1 * g
        x = x - task_params.step_multiplier * network.apply(params, jnp.stack([g, m], axis=-1))
        return (x, m), jnp.sum(h * jnp.square(x))

      _, values = jax.lax.scan(step, (start, jnp.zeros_like(start)), length=num_steps)
      return jnp.mean(values) / jnp.sum(h * jnp.square(start))

    return task_params.loss_scale * jnp.mean(jax.vmap(run)(*batch)), {}

  def normalize(loss: base.Scalar, task_params: OptimizerTask) -> base.Scalar:
    return loss / task_params.loss_scale

  return base.TaskFamily(sample, init, batch, loss, normalize, LOSS_CAP)
