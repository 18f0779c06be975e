"""Ranges (lowest, highest), from which tasks draw uniformly or, those of positive numbers, log-uniformly."""

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


def log(bounds: Range) -> Range:
  """The range of the logarithms."""
  return math.log(bounds[0]), math.log(bounds[1])


def between(uniform: base.PyTree, bounds: Range) -> base.PyTree:
  """Maps an array of numbers uniform in [0, 1) to the range."""
  low, high = bounds
  return low + (high - low) * uniform


def log_uniform(uniform: base.PyTree, bounds: Range) -> base.PyTree:
  """Maps an array of numbers uniform in [0, 1) to the range, uniform in their logarithm."""
  return jnp.exp(between(uniform, log(bounds)))
