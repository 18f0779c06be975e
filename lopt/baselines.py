"""Hand-designed optimizers in the slot of a learned one: θ is the logarithm of the learning rate.

The evaluation tunes that one number for each task, over `LEARNING_RATES`. A further baseline is one more function
that hands an Optax optimizer to `from_learning_rate`.
"""

from collections.abc import Callable

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from lopt.base import LearnedOptimizer, PRNGKey, Scalar, Theta


def half_decade(index: int) -> float:
  """The half-decade grid …, 0.1, 0.3, 1, 3, 10, …; index 0 is 1, index 1 is 3, index -1 is 0.3."""
  return float(f"{3 if index % 2 else 1}e{index // 2}")


GRID = range(-12, 2)
LEARNING_RATES = tuple(half_decade(index) for index in GRID)
"""1e-6, 3e-6, 1e-5, …, 1, 3: the 14 learning rates among which the evaluation chooses for each task."""


def theta_at(learning_rate: ArrayLike) -> Theta:
  """θ of a baseline at a learning rate; an array of learning rates gives as many θ, stacked."""
  return {"log_learning_rate": jnp.log(jnp.asarray(learning_rate, jnp.float32))}


def from_learning_rate(make: Callable[[Scalar], optax.GradientTransformation]) -> LearnedOptimizer:
  """An Optax optimizer as a `LearnedOptimizer` with θ = {"log_learning_rate": scalar}, at first log(1e-3).

  Args:
    make: `(learning_rate) -> optimizer`; the learning rate is a traced float32 scalar.
  """

  def init(key: PRNGKey) -> Theta:
    del key  # nothing random
    return theta_at(1e-3)

  def transform(theta: Theta, num_steps: ArrayLike) -> optax.GradientTransformationExtraArgs:
    del num_steps  # the learning rate is constant
    return optax.with_extra_args_support(make(jnp.exp(theta["log_learning_rate"])))

  return LearnedOptimizer(init, transform)


def adam() -> LearnedOptimizer:
  """Adam (Kingma & Ba 2015, algorithm 1) with β1 = 0.9, β2 = 0.999, ε = 1e-8."""
  return from_learning_rate(optax.adam)


def sgdm() -> LearnedOptimizer:
  """SGD with heavy-ball momentum 0.9: m_t = g_t + 0.9 m_{t-1}, x_t = x_{t-1} - α m_t."""
  return from_learning_rate(lambda learning_rate: optax.sgd(learning_rate, momentum=0.9))
