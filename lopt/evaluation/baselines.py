"""Hand-designed optimizers of Optax in the slot of a learned one: θ is the logarithm of the learning rate.

The evaluation tunes that one number for each task, over the half-decades `GRID` times the optimizer's `UNITS`; all
else is as the papers or Optax have it. Learning rates are warmed up and decay to zero as those of learned directions
do (`lopt.architectures.direction.warmup_cosine`), but for the schedule-free one. A further baseline is one more
function that hands an Optax optimizer to `from_learning_rate`, and a line in `ALL`.
"""

import re
from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from lopt.architectures import direction
from lopt.base import LearnedOptimizer, Params, PRNGKey, State, Theta, name_of

Step = Int[Array, ""]

WARMUP = 0.05
"""The share of the steps in which a learning rate rises to its peak."""


def half_decade(index: int) -> float:
  """The half-decade grid …, 0.1, 0.3, 1, 3, 10, …; index 0 is 1, index 1 is 3, index -1 is 0.3."""
  return float(f"{3 if index % 2 else 1}e{index // 2}")


GRID = range(-8, 1)
"""Half-decades from 1e-4 to 1, in an optimizer's unit; the evaluation goes on where the best is at an end."""
LEARNING_RATES = tuple(half_decade(index) for index in range(-12, 2))
"""1e-6, 3e-6, 1e-5, …, 1, 3: for comparisons with constant learning rates."""


def theta_at(learning_rate: ArrayLike) -> Theta:
  """θ of a baseline at a learning rate; an array of learning rates gives as many θ, stacked."""
  return {"log_learning_rate": jnp.log(jnp.asarray(learning_rate, jnp.float32))}


def from_learning_rate(make: Callable[..., optax.GradientTransformation], *, cosine: bool = True) -> LearnedOptimizer:
  """An Optax optimizer as a `LearnedOptimizer` with θ = {"log_learning_rate": scalar}, at first log(1e-3).

  Args:
    make: `(learning_rate) -> optimizer`; the learning rate is a schedule or, without `cosine`, a traced scalar.
    cosine: Whether the learning rate is warmed up and then decays to zero; else it is constant.
  """

  def init(key: PRNGKey) -> Theta:
    del key  # nothing random
    return theta_at(1e-3)

  def transform(theta: Theta, num_steps: ArrayLike) -> optax.GradientTransformationExtraArgs:
    peak = jnp.exp(theta["log_learning_rate"])
    factor = direction.warmup_cosine(num_steps, WARMUP)
    return optax.with_extra_args_support(make((lambda t: peak * factor(t)) if cosine else peak))

  return LearnedOptimizer(init, transform)


def adam() -> LearnedOptimizer:
  """Adam (Kingma & Ba 2015, algorithm 1) with β1 = 0.9, β2 = 0.999, ε = 1e-8, and a constant learning rate."""
  return from_learning_rate(optax.adam, cosine=False)


def sgdm() -> LearnedOptimizer:
  """SGD with Nesterov momentum 0.9: m_t = g_t + 0.9 m_{t-1}, x_t = x_{t-1} - α (g_t + 0.9 m_t)."""
  return from_learning_rate(lambda learning_rate: optax.sgd(learning_rate, momentum=0.9, nesterov=True))


def adamw() -> LearnedOptimizer:
  """AdamW (Loshchilov & Hutter 2019): β1 = 0.9, β2 = 0.999, ε = 1e-8, decay 1e-4 as in Optax."""
  return from_learning_rate(optax.adamw)


def nadamw() -> LearnedOptimizer:
  """`adamw` with Nesterov momentum (Dozat 2016)."""
  return from_learning_rate(optax.nadamw)


def lion() -> LearnedOptimizer:
  """Lion: the sign of an interpolated momentum, β1 = 0.9, β2 = 0.99, weight decay 1e-3 (Chen et al. 2023)."""
  return from_learning_rate(optax.lion)


def adafactor() -> LearnedOptimizer:
  """Adafactor (Shazeer & Stern 2018): α relative to tensors' scales; from 128 × 128 on, matrices are factored."""
  return from_learning_rate(optax.adafactor)


def prodigy() -> LearnedOptimizer:
  """Prodigy (Mishchenko & Defazio 2023), Adam that estimates its step size; what is tuned is the factor on that."""
  return from_learning_rate(optax.contrib.prodigy)


def muon() -> LearnedOptimizer:
  """Muon (Jordan et al. 2024): steps of orthogonalised momentum, of Adam's usual size (Liu et al. 2025, eq. 4).

  That is for hidden matrices, and for convolution kernels as the matrices [height · width · inputs, outputs]. All
  other tensors (embeddings, the output layer, vectors) are Nesterov Adam's at the same learning rate, as is usual
  with steps of that size.
  """
  return _muon(lambda params: [name != _output(params) and not _EMBEDDING.search(name) for name in _names(params)])


def muon_all() -> LearnedOptimizer:
  """`muon` for every matrix, embeddings and the output layer too."""
  return _muon(lambda params: [True for _ in _names(params)])


def schedule_free_adamw() -> LearnedOptimizer:
  """Schedule-free AdamW (Defazio et al. 2024) with β1 = 0.9, β2 = 0.999, without warm-up, cosine and weight decay.

  Gradients, and so the losses of the training curve, are those of its y. What it would hand over is its x: final
  losses are of these, see `evaluation_params`.
  """
  return from_learning_rate(optax.contrib.schedule_free_adamw, cosine=False)


ALL: dict[str, Callable[[], LearnedOptimizer]] = {
  "AdamW": adamw,
  "NAdamW": nadamw,
  "Muon": muon,
  "Muon, all matrices": muon_all,
  "SGDM": sgdm,
  "Schedule-free AdamW": schedule_free_adamw,
  "Lion": lion,
  "Adafactor": adafactor,
  "Prodigy": prodigy,
}
"""By their names in tables and legends. On command lines they are called as their functions are."""


def named(functions: Collection[str]) -> list[str]:
  """The names in tables of these functions; "all" stands for all of them.

  Raises:
    ValueError: There is no such function.
  """
  there = {make.__name__: title for title, make in ALL.items()}
  if list(functions) == ["all"]:
    return list(ALL)
  if unknown := [name for name in functions if name not in there]:
    raise ValueError(f"baselines: no {unknown[0]!r}; there are: {', '.join(there)}, all")
  return [there[name] for name in functions]


UNITS: dict[str, float] = {"SGDM": 10.0, "Lion": 0.1, "Prodigy": 100.0}
"""Of their learning rates, where it is not 1: so that the best of most tasks is well within the grid."""


def evaluation_params(state: State, params: Params) -> Params:
  """The parameters that an optimizer hands over: x of a schedule-free one, those that it updates of any other."""
  if isinstance(state, optax.contrib.ScheduleFreeState):
    return optax.contrib.schedule_free_eval_params(state, params)
  return params


_EMBEDDING = re.compile(r"embed|position")
_LAYER = re.compile(r"^(?P<module>.*?)(_(?P<number>\d+))?/w$")


def _names(params: Params) -> list[str]:
  return [name_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def _output(params: Params) -> str | None:
  """The name of the output layer's matrix, by how Haiku names modules: `head`; else the last of the layers `linear`,
  of the decoder's, or of the `mlp`'s, whichever there is first.
  """
  layers = [(m["module"], int(m["number"] or 0), name) for name in _names(params) if (m := _LAYER.match(name))]
  for module in ("head", "linear", "decoder/~/linear", "mlp/~/linear"):
    if own := [layer for layer in layers if layer[0] == module]:
      return max(own)[2]
  return None


def _muon(is_muons: Callable[[Params], list[bool]]) -> LearnedOptimizer:
  kernel = optax.contrib.MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=3)
  by_rank = {2: optax.contrib.MuonDimensionNumbers(), 4: kernel}

  def dimensions(params: Params) -> Params:
    leaves, structure = jax.tree.flatten(params)
    is_masked = lambda x: isinstance(x, optax.MaskedNode)
    # Optax asks again for the part of the tree that is Muon's, in which the output layer is masked.
    is_part = any(map(is_masked, jax.tree.leaves(params, is_leaf=is_masked)))
    own = [True] * len(leaves) if is_part else is_muons(params)
    return structure.unflatten([by_rank.get(x.ndim) if mine else None for x, mine in zip(leaves, own, strict=True)])

  return from_learning_rate(
    lambda learning_rate: optax.contrib.muon(
      learning_rate, muon_weight_dimension_numbers=dimensions, consistent_rms=0.2
    )
  )
