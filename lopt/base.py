"""The contracts of lopt: four NamedTuples of pure functions.

    tasks ──┐
            ├── inner_training ──► UnrolledProblem ──► gradient estimator ──► Optax ──► θ
    architectures ─┘

Estimators know only `UnrolledProblem`; tasks and architectures know nothing of estimators. Meta-parameters θ,
states, parameters and batches are arbitrary pytrees of arrays. This file imports nothing else of lopt.

Letters used in shape annotations everywhere:

    N  antithetic pairs of particles      P  meta-parameters (scalars in θ)
    K  inner steps of one unroll          T  inner steps of an episode, the horizon
    B  examples of a batch                D  devices

Who receives a key consumes it: no key is used twice.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jaxtyping import Array, Float, Int, Key, UInt32

PRNGKey = UInt32[Array, "2"] | Key[Array, ""]
Scalar = Float[Array, ""]
Horizon = Int[Array, ""]
PyTree = Any
Theta = PyTree  # float32 arrays: the meta-parameters
Params = PyTree  # the inner parameters, that a learned optimizer trains
TaskParams = PyTree  # arrays that say which task of a family this is
Batch = PyTree
State = PyTree
Metrics = dict[str, Scalar]


def name_of(path: jax.tree_util.KeyPath) -> str:
  """The name of a leaf: its path in the pytree, such as `mlp/~/linear_0/w`; "" where the leaf is the tree.

  The value of a variable of Flax NNX has the variable's name: `linear/kernel`, not `linear/kernel/value`.
  """
  if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
    path = path[:-1]
  return jax.tree_util.keystr(path, simple=True, separator="/")


SPLITS = ("train", "validation", "test")


class TaskFamily(NamedTuple):
  """A distribution over inner tasks that share array shapes, so that many are trained in one `vmap`."""

  sample: Callable[[PRNGKey], TaskParams]
  """`(key) -> task_params`: draw one task; the pytree may be empty."""
  init: Callable[[PRNGKey, TaskParams], Params]
  """`(key, task_params) -> params`: initial inner parameters."""
  batch: Callable[[PRNGKey, TaskParams, str], Batch]
  """`(key, task_params, split) -> batch`; split is one of `SPLITS`, static. Runs inside compiled unrolls."""
  loss: Callable[[Params, PRNGKey, Batch, TaskParams], tuple[Scalar, Metrics]]
  """`(params, key, batch, task_params) -> (loss, metrics)`: the loss that the optimizer sees and minimises."""
  normalize: Callable[[Scalar, TaskParams], Scalar] = lambda loss, task_params: loss
  """`(loss, task_params) -> loss` in the family's common unit (1 = knowing nothing), so that one meta-objective
  and one table can average over tasks of different scale."""
  loss_cap: float = math.inf
  """Normalised losses above this (and NaN) count as diverged and enter the meta-objective as this value."""


class LearnedOptimizer(NamedTuple):
  """An architecture: meta-parameters θ -> an Optax transformation."""

  init: Callable[[PRNGKey], Theta]
  """`(key) -> theta`."""
  transform: Callable[[Theta, Any], optax.GradientTransformationExtraArgs]
  """`(theta, num_steps) -> tx`. `num_steps` is the length of the inner run (may be traced); who needs no notion
  of it ignores it. Used as `tx.update(grads, state, params, value=loss)`."""
  direction: Callable[..., optax.GradientTransformationExtraArgs] | None = None
  """`(theta, num_steps, matrices=...) -> tx` whose updates point uphill and have no step size yet, as
  `optax.scale_by_adam`'s; None of an architecture that decides how far to go. What `matrices` says are some
  (`architectures.direction.Matrices`) are orthogonalised."""
  schedule: Callable[[Any, Any], optax.Schedule] | None = None
  """`(learning_rate, num_steps) -> schedule`: how a direction's learning rate rises to this and decays."""
  recommended: Callable[..., Scalar] | None = None
  """`(params, num_steps, matrices=...) -> learning_rate`: the direction's for such parameters, of which only shapes
  are looked at. `transform` is the direction with the schedule of this."""
  learning_rate: float | None = None
  """The recommended one of small networks and short runs: what others are stated by."""
  origin: str | None = None
  """The section of a configuration that builds the same, as JSON; None where no section does: whoever replaces
  another field of an architecture sets it to None."""


class UnrolledProblem(NamedTuple):
  """An unrolled computation graph s_t = f(θ, s_{t-1}, x_t) with a loss L_t at every step."""

  horizon: Callable[[PRNGKey], Horizon]
  """`(key) -> T`, int32, at least 1: the length of an episode, drawn afresh for each."""
  init: Callable[[PRNGKey, Horizon], State]
  """`(key, T) -> s_0`."""
  step: Callable[[Theta, State, PRNGKey], tuple[State, Scalar]]
  """`(theta, state, key) -> (state, loss)`, the loss a float32 scalar."""
  loss_cap: float = math.inf
  """Estimators replace a loss above this, or NaN, by this value, and count it in the metric `diverged`."""


class GradientEstimator(NamedTuple):
  """Estimates ∇_θ E[Σ_t L_t] / E[T], the meta-gradient of the mean loss per inner step.

  Every leaf of `state` has the particles (antithetic pairs, where an estimator has them) on its first axis, and
  both `gradient` and `metrics` are means over that axis. So a state can be split over devices, and results from
  parts of it be averaged, without knowing which estimator it is.
  """

  init: Callable[[PRNGKey, Theta], State]
  """`(key, theta) -> state`."""
  estimate: Callable[[PRNGKey, Theta, State], tuple[Theta, State, Metrics]]
  """`(key, theta, state) -> (gradient, state, metrics)`; gradient has theta's structure.

  Metrics have `meta_loss`, the mean loss per inner step; `inner_steps`, how many this estimate took (per entry of the
  first axis); `diverged`, the share of particles with a capped loss; and, where it can be had,
  `mean_square_gradient`, the mean of |g_i|² over the particles' own estimates, for the variance of their mean.
  """
