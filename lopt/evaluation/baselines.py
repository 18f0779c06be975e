"""Hand-designed optimizers of Optax in the slot of a learned one: θ is the logarithm of the learning rate.

The evaluation tunes that one number for each task, over `LEARNING_RATES`; all else is as the papers or Optax have it.
A further baseline is one more function that hands an Optax optimizer to `from_learning_rate`, and a line in `ALL`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from lopt.base import LearnedOptimizer, Params, PRNGKey, Scalar, State, Theta

Step = Int[Array, ""]

WARMUP_SHARE = 0.1
"""The share of the steps over which `adam_warmup_cosine` raises its learning rate."""


def half_decade(index: int) -> float:
  """The half-decade grid …, 0.1, 0.3, 1, 3, 10, …; index 0 is 1, index 1 is 3, index -1 is 0.3."""
  return float(f"{3 if index % 2 else 1}e{index // 2}")


GRID = range(-12, 2)
LEARNING_RATES = tuple(half_decade(index) for index in GRID)
"""1e-6, 3e-6, 1e-5, …, 1, 3: the 14 learning rates among which the evaluation chooses for each task."""


def theta_at(learning_rate: ArrayLike) -> Theta:
  """θ of a baseline at a learning rate; an array of learning rates gives as many θ, stacked."""
  return {"log_learning_rate": jnp.log(jnp.asarray(learning_rate, jnp.float32))}


def from_learning_rate(
  make: Callable[..., optax.GradientTransformation],
  *,
  factor: Callable[[Step, ArrayLike], Scalar] | None = None,
) -> LearnedOptimizer:
  """An Optax optimizer as a `LearnedOptimizer` with θ = {"log_learning_rate": scalar}, at first log(1e-3).

  Args:
    make: `(learning_rate) -> optimizer`; the learning rate is a traced float32 scalar, or with `factor` a schedule.
    factor: `(t, num_steps) -> factor on the learning rate` of step t = 0, …, num_steps - 1; None: it is constant.
  """

  def init(key: PRNGKey) -> Theta:
    del key  # nothing random
    return theta_at(1e-3)

  def transform(theta: Theta, num_steps: ArrayLike) -> optax.GradientTransformationExtraArgs:
    peak = jnp.exp(theta["log_learning_rate"])
    learning_rate = peak if factor is None else lambda t, factor=factor: peak * factor(t, num_steps)
    return optax.with_extra_args_support(make(learning_rate))

  return LearnedOptimizer(init, transform)


def sgd() -> LearnedOptimizer:
  """Stochastic gradient descent: x_t = x_{t-1} - α g_t."""
  return from_learning_rate(optax.sgd)


def sgdm() -> LearnedOptimizer:
  """SGD with heavy-ball momentum 0.9: m_t = g_t + 0.9 m_{t-1}, x_t = x_{t-1} - α m_t."""
  return from_learning_rate(lambda learning_rate: optax.sgd(learning_rate, momentum=0.9))


def nesterov() -> LearnedOptimizer:
  """SGD with Nesterov momentum 0.9: m_t as in `sgdm`, x_t = x_{t-1} - α (g_t + 0.9 m_t) (Sutskever et al. 2013)."""
  return from_learning_rate(lambda learning_rate: optax.sgd(learning_rate, momentum=0.9, nesterov=True))


def rmsprop() -> LearnedOptimizer:
  """RMSProp (Hinton 2012): v_t = 0.9 v_{t-1} + 0.1 g_t², x_t = x_{t-1} - α g_t / √(v_t + 1e-8)."""
  return from_learning_rate(optax.rmsprop)


def adam() -> LearnedOptimizer:
  """Adam (Kingma & Ba 2015, algorithm 1) with β1 = 0.9, β2 = 0.999, ε = 1e-8."""
  return from_learning_rate(optax.adam)


def adamw() -> LearnedOptimizer:
  """`adam` with decoupled weight decay: x_t = x_{t-1} - α (Adam's step + 0.01 x_{t-1}) (Loshchilov & Hutter 2019)."""
  return from_learning_rate(lambda learning_rate: optax.adamw(learning_rate, weight_decay=0.01))


def nadam() -> LearnedOptimizer:
  """`adam` with Nesterov momentum (Dozat 2016)."""
  return from_learning_rate(optax.nadam)


def amsgrad() -> LearnedOptimizer:
  """`adam` whose second moment is the largest so far (Reddi et al. 2018), of the bias-corrected ones."""
  return from_learning_rate(optax.amsgrad)


def lion() -> LearnedOptimizer:
  """Lion: the sign of an interpolated momentum, β1 = 0.9, β2 = 0.99, weight decay 1e-3 (Chen et al. 2023)."""
  return from_learning_rate(optax.lion)


def adafactor() -> LearnedOptimizer:
  """Adafactor (Shazeer & Stern 2018): α relative to tensors' scales; from 128 × 128 on, matrices are factored."""
  return from_learning_rate(optax.adafactor)


def muon() -> LearnedOptimizer:
  """Muon (Jordan et al. 2024): steps of orthogonalised momentum, of Adam's usual size (Liu et al. 2025, eq. 4).

  That is for matrices, and for convolution kernels as the matrices [height · width · inputs, outputs]; all other
  tensors are `nadam`'s, at the same learning rate. Embeddings and last layers, being matrices, are Muon's too.
  """

  def dimensions(params: Params) -> Params:
    kernel = optax.contrib.MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=3)
    by_rank = {2: optax.contrib.MuonDimensionNumbers(), 4: kernel}
    return jax.tree.map(lambda x: by_rank.get(x.ndim), params)

  def make(learning_rate: Scalar) -> optax.GradientTransformation:
    return optax.contrib.muon(learning_rate, muon_weight_dimension_numbers=dimensions, consistent_rms=0.2)

  return from_learning_rate(make)


def schedule_free_adamw() -> LearnedOptimizer:
  """Schedule-free Adam (Defazio et al. 2024) with β1 = 0.9, β2 = 0.999, without warm-up and weight decay.

  Gradients, and so the losses of the training curve, are those of its y. What it would hand over is its x: held-out
  losses are of these, see `evaluation_params`.
  """
  return from_learning_rate(optax.contrib.schedule_free_adamw)


def adam_cosine() -> LearnedOptimizer:
  """`adam` whose learning rate falls to zero: α (1 + cos(π t / T)) / 2 at step t = 0, …, T - 1."""

  def factor(t: Step, num_steps: ArrayLike) -> Scalar:
    return (1 + jnp.cos(jnp.pi * jnp.minimum(t / num_steps, 1.0))) / 2

  return from_learning_rate(optax.adam, factor=factor)


def adam_warmup_cosine() -> LearnedOptimizer:
  """`adam` with a warm-up of w = T/10 steps: α (t + 1) / w while t < w, then α (1 + cos(π (t - w) / (T - w))) / 2."""

  def factor(t: Step, num_steps: ArrayLike) -> Scalar:
    warmup = jnp.maximum(jnp.round(WARMUP_SHARE * jnp.asarray(num_steps)), 1.0)
    progress = jnp.clip((t - warmup) / jnp.maximum(num_steps - warmup, 1.0), 0.0, 1.0)
    return jnp.minimum((t + 1) / warmup, (1 + jnp.cos(jnp.pi * progress)) / 2)

  return from_learning_rate(optax.adam, factor=factor)


ALL: dict[str, Callable[[], LearnedOptimizer]] = {
  "Adam": adam,
  "SGDM": sgdm,
  "Adam + cosine": adam_cosine,
  "Adam + warm-up + cosine": adam_warmup_cosine,
  "AdamW": adamw,
  "NAdam": nadam,
  "AMSGrad": amsgrad,
  "SGD": sgd,
  "Nesterov": nesterov,
  "RMSProp": rmsprop,
  "Lion": lion,
  "Adafactor": adafactor,
  "Muon": muon,
  "Schedule-free AdamW": schedule_free_adamw,
}
"""By their names in tables and legends. On command lines they are called as their functions are."""


def evaluation_params(state: State, params: Params) -> Params:
  """The parameters that an optimizer hands over: x of a schedule-free one, those that it updates of any other."""
  if isinstance(state, optax.contrib.ScheduleFreeState):
    return optax.contrib.schedule_free_eval_params(state, params)
  return params
