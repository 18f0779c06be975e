"""Several problems under one θ: the gradient of the weighted mean of their objectives."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from lopt import base

TINY = 1e-30  # a family whose gradients are all zero keeps them


def combine(
  estimators: Mapping[str, base.GradientEstimator],
  weights: Mapping[str, float],
  *,
  balance: Callable[[base.Scalar], base.Scalar] | None = None,
) -> base.GradientEstimator:
  """Estimates Σ_i w_i ∇ E[Σ_t L_t]_i / E[T]_i, with the weights w scaled to add up to 1.

  For task families whose arrays differ in shape, so that no `vmap` can hold them all. Each has as many particles as
  the others, so that every device has its share of each, and random numbers of its own.

  Args:
    estimators: By a name for each problem. All estimate for the same θ and have the same number of particles.
    weights: By the same names, above 0.
    balance: The mean of a number over all devices (`parallel.mean`, or the identity where there is one). With it,
      each family's gradient is divided by √(mean |g_i|²) over its particles i, so that all have as much noise.
      Without, families whose losses can go to zero drown those where an optimizer gains a few percent at most.

  Returns:
    An estimator with the metrics of all: `meta_loss` is the weighted mean, `meta_loss/<name>` that of each,
    `diverged` the share of all particles, `inner_steps` their sum.

  Raises:
    ValueError: For no estimator, or names or weights that do not fit.
  """
  names = sorted(estimators)  # not the order of a file: random numbers derive from the position
  if not names or set(weights) != set(names):
    raise ValueError(f"weights: must be for {', '.join(names) or 'at least one problem'}, not {', '.join(weights)}")
  for name in names:
    if not 0 < weights[name] < float("inf"):
      raise ValueError(f"weights: must be above 0 and finite, not {weights[name]} for {name}")
  total = sum(weights.values())
  share = {name: weights[name] / total for name in names}

  def keys(key: base.PRNGKey) -> dict[str, base.PRNGKey]:
    return {name: jax.random.fold_in(key, i) for i, name in enumerate(names)}

  def init(key: base.PRNGKey, theta: base.Theta) -> dict[str, base.State]:
    states = {name: estimators[name].init(k, theta) for name, k in keys(key).items()}
    counts = {name: jax.tree.leaves(state)[0].shape[0] for name, state in states.items()}
    if len(set(counts.values())) > 1:
      raise ValueError(f"all problems of a mixture must have as many particles: {counts}")
    return states

  def estimate(
    key: base.PRNGKey, theta: base.Theta, state: dict[str, base.State]
  ) -> tuple[base.Theta, dict[str, base.State], base.Metrics]:
    results = {name: estimators[name].estimate(k, theta, state[name]) for name, k in keys(key).items()}
    gradients = {name: gradient for name, (gradient, _, _) in results.items()}
    metrics = {name: metrics for name, (_, _, metrics) in results.items()}
    # Of single particles' gradients; not every estimator has them.
    squares = {name: x["mean_square_gradient"] for name, x in metrics.items() if "mean_square_gradient" in x}
    if balance is not None:
      factors = {name: jax.lax.rsqrt(balance(square) + TINY) for name, square in squares.items()}
      gradients = {name: optax.tree.scale(factors[name], gradients[name]) for name in names}
      squares = {name: jnp.square(factors[name]) * squares[name] for name in names}
    gradient = jax.tree.map(
      lambda *leaves: sum(share[name] * leaf for name, leaf in zip(names, leaves, strict=True)),
      *(gradients[name] for name in names),
    )
    combined = {
      "meta_loss": sum(share[name] * metrics[name]["meta_loss"] for name in names),
      "diverged": sum(metrics[name]["diverged"] for name in names) / len(names),
      "inner_steps": sum(metrics[name]["inner_steps"] for name in names),
    }
    if len(squares) == len(names):
      # Of the n-th particles' Σ_i w_i g_in: noise of different problems is independent, so only means enter the
      # products of two.
      combined["mean_square_gradient"] = _square(gradient) + sum(
        share[name] ** 2 * (squares[name] - _square(gradients[name])) for name in names
      )
    combined |= {f"meta_loss/{name}": metrics[name]["meta_loss"] for name in names}
    return gradient, {name: state for name, (_, state, _) in results.items()}, combined

  return base.GradientEstimator(init, estimate)


def _square(gradient: base.Theta) -> base.Scalar:
  return jnp.square(optax.tree.norm(gradient))
