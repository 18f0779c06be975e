"""SGD, SGD with momentum, and Adam, whose learning rate, schedule and momenta are learned.

The tuned hyperparameters of P. Vicol, L. Metz, J. Sohl-Dickstein, "Unbiased Gradient Estimation in Unrolled
Computation Graphs with Persistent Evolution Strategies", ICML 2021, section 5.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from lopt import base, checks
from lopt.architectures import origin

Optimizer = Literal["sgd", "sgdm", "adam"]
Schedule = Literal["constant", "log_linear", "inverse_time"]


@origin.remembered
def build(
  *,
  optimizer: Optimizer = "sgdm",
  schedule: Schedule = "constant",
  num_blocks: int | None = None,
  fixed: tuple[str, ...] = (),
  learning_rate: float = 0.01,
  final_learning_rate: float = 0.01,
  power: float = 1.0,
  time_constant: float | None = None,
  momentum: float = 0.9,
  beta1: float = 0.9,
  beta2: float = 0.999,
) -> base.LearnedOptimizer:
  """Optax's optimizer with hyperparameters out of θ, each in the coordinate in which it has no bounds.

  θ is a dict with, for each schedule of the learning rate α_t in inner step t = 0 ... T-1,

      constant       log_learning_rate                             α_t = α
      log_linear     log_learning_rate, log_final_learning_rate    log α_t = (1 - t/T) log α + t/T log α_final
      inverse_time   log_learning_rate, log_power                  α_t = α / (1 + t/Q)^power

  and, for each optimizer,

      sgd            (nothing more)
      sgdm           logit_momentum                                m_t = μ m_{t-1} + g_t
      adam           logit_beta1, logit_beta2

  Args:
    optimizer: Which one.
    schedule: How its learning rate changes over the T inner steps.
    num_blocks: None if all inner parameters share scalar hyperparameters. A number if each array of the inner
      parameters has its own: how many arrays there are. θ's leaves are then [num_blocks], in the order of
      `jax.tree.leaves(params)`.
    fixed: Entries that are left out of θ and keep their initial value.
    learning_rate: Initial α.
    final_learning_rate: Initial α_final.
    power: Initial power; the higher, the faster the decay.
    time_constant: Q in inner steps; None for T.
    momentum: Initial μ.
    beta1: Initial β1.
    beta2: Initial β2.

  Raises:
    ValueError: For an unknown name or a value out of range; by the transformation, when parameters do not have
      `num_blocks` arrays.
  """
  checks.one_of("optimizer", optimizer, get_args(Optimizer))
  checks.one_of("schedule", schedule, get_args(Schedule))
  checks.require(num_blocks is None or num_blocks >= 1, "num_blocks", num_blocks, "at least 1, or None")
  positive = {"learning_rate": learning_rate, "final_learning_rate": final_learning_rate, "power": power}
  for name, value in positive.items():
    checks.require(0 < value < math.inf, name, value, "above 0 and finite")
  checks.require(time_constant is None or time_constant > 0, "time_constant", time_constant, "above 0, or None")
  for name, value in {"momentum": momentum, "beta1": beta1, "beta2": beta2}.items():
    checks.require(0 < value < 1, name, value, "between 0 and 1")

  of_schedule = {
    "constant": {},
    "log_linear": {"log_final_learning_rate": math.log(final_learning_rate)},
    "inverse_time": {"log_power": math.log(power)},
  }
  of_optimizer = {
    "sgd": {},
    "sgdm": {"logit_momentum": _logit(momentum)},
    "adam": {"logit_beta1": _logit(beta1), "logit_beta2": _logit(beta2)},
  }
  initial = {"log_learning_rate": math.log(learning_rate), **of_schedule[schedule], **of_optimizer[optimizer]}
  checks.require(set(fixed) < set(initial), "fixed", fixed, f"some, not all, of {', '.join(initial)}")
  shape = () if num_blocks is None else (num_blocks,)

  def init(key: base.PRNGKey) -> base.Theta:
    del key  # nothing random
    return {name: jnp.full(shape, value, jnp.float32) for name, value in initial.items() if name not in fixed}

  def transform(theta: base.Theta, num_steps: Any) -> optax.GradientTransformationExtraArgs:
    constants = {name: jnp.full(shape, initial[name], jnp.float32) for name in fixed}
    x = {**theta, **constants}
    decay_time = num_steps if time_constant is None else time_constant

    def of_block(x: dict[str, base.Scalar]) -> optax.GradientTransformation:
      return _OPTIMIZERS[optimizer](x, _SCHEDULES[schedule](x, num_steps, decay_time))

    if num_blocks is None:
      return optax.with_extra_args_support(of_block(x))
    blocks = {i: of_block({name: values[i] for name, values in x.items()}) for i in range(num_blocks)}
    return optax.partition(blocks, labels)  # pyright: ignore[reportArgumentType]  # an int is hashable

  def labels(params: base.Params) -> base.PyTree:
    leaves, structure = jax.tree.flatten(params)
    checks.require(len(leaves) == num_blocks, "num_blocks", num_blocks, f"the parameters' {len(leaves)} arrays")
    return jax.tree.unflatten(structure, range(len(leaves)))

  return base.LearnedOptimizer(init, transform)


LearningRate = Callable[[Int[Array, ""]], Float[Array, ""]] | Float[Array, ""]


def _constant(x: dict[str, base.Scalar], num_steps: Any, decay_time: Any) -> LearningRate:
  del num_steps, decay_time
  return jnp.exp(x["log_learning_rate"])


def _log_linear(x: dict[str, base.Scalar], num_steps: Any, decay_time: Any) -> LearningRate:
  del decay_time
  first, last = x["log_learning_rate"], x["log_final_learning_rate"]
  return lambda t: jnp.exp(first + t / num_steps * (last - first))


def _inverse_time(x: dict[str, base.Scalar], num_steps: Any, decay_time: Any) -> LearningRate:
  del num_steps
  return lambda t: jnp.exp(x["log_learning_rate"] - jnp.exp(x["log_power"]) * jnp.log1p(t / decay_time))


def _sgd(x: dict[str, base.Scalar], learning_rate: Any) -> optax.GradientTransformation:
  del x
  return optax.sgd(learning_rate)


def _sgdm(x: dict[str, base.Scalar], learning_rate: Any) -> optax.GradientTransformation:
  # Optax's annotation has only a Python number here.
  return optax.sgd(learning_rate, momentum=jax.nn.sigmoid(x["logit_momentum"]))  # pyright: ignore[reportArgumentType]


def _adam(x: dict[str, base.Scalar], learning_rate: Any) -> optax.GradientTransformation:
  return optax.adam(learning_rate, jax.nn.sigmoid(x["logit_beta1"]), jax.nn.sigmoid(x["logit_beta2"]))


_SCHEDULES = {"constant": _constant, "log_linear": _log_linear, "inverse_time": _inverse_time}
_OPTIMIZERS = {"sgd": _sgd, "sgdm": _sgdm, "adam": _adam}


def _logit(p: float) -> float:
  return math.log(p / (1 - p))
