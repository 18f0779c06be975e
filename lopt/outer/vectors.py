"""θ as a vector, its perturbations, and the gradients that losses of antithetic pairs give."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Key

from lopt import base

Unravel = Callable[[Float[Array, " P"]], base.Theta]


def check_sigma(sigma: float) -> None:
  """Raises ValueError unless the perturbations' standard deviation is positive."""
  if not 0 < sigma < math.inf:
    raise ValueError(f"sigma: must be above 0 and finite, not {sigma}")


def ravel(theta: base.Theta) -> tuple[Float[Array, " P"], Unravel]:
  """θ as one float32 vector, and the way back; raises TypeError for leaves that cannot be perturbed."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(theta):
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
      raise TypeError(f"theta{jax.tree_util.keystr(path)}: {jnp.result_type(leaf)} is not a floating-point type")
  return ravel_pytree(theta)


def perturbations(keys: Key[Array, " groups"], sigma: float, theta: Float[Array, " P"]) -> Float[Array, "groups P"]:
  """ε ~ N(0, σ²I), one a group."""
  return sigma * jax.vmap(lambda key: jax.random.normal(key, theta.shape, theta.dtype))(keys)


def perturbed(
  theta: Float[Array, " P"], epsilon: Float[Array, "groups P"], *, signs: tuple[int, ...]
) -> Float[Array, "groups particles P"]:
  """θ + sign·ε for each particle of each group."""
  return theta[None, None] + jnp.array(signs, theta.dtype)[None, :, None] * epsilon[:, None, :]


def antithetic_gradients(
  weights: Float[Array, "groups P"],
  losses: Float[Array, "groups particles"],
  sigma: float,
  steps: base.Scalar | float | int,
) -> Float[Array, "groups P"]:
  """Each pair's w (L⁺ - L⁻) / (2σ² steps); particles beyond the pair have no part in it."""
  return weights * ((losses[:, :1] - losses[:, 1:2]) / (2 * sigma**2 * steps))
