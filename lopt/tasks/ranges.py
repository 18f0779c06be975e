"""Ranges (lowest, highest) of positive numbers, from which tasks draw log-uniformly."""

import math

import jax.numpy as jnp

from lopt import base, checks

Range = tuple[float, float]


def check(**ranges: Range | None) -> None:
  """Raises ValueError that names the first range that is not 0 < lowest <= highest < ∞; None passes."""
  for name, bounds in ranges.items():
    if bounds is not None:
      low, high = bounds
      checks.require(0 < low <= high < math.inf, name, bounds, "lowest, highest; 0 < lowest <= highest")


def log_uniform(uniform: base.PyTree, bounds: Range) -> base.PyTree:
  """Maps an array of numbers uniform in [0, 1) to the range, uniform in their logarithm."""
  low, high = math.log(bounds[0]), math.log(bounds[1])
  return jnp.exp(low + (high - low) * uniform)
