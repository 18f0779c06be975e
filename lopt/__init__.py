"""Meta-train learned optimizers with Persistent Evolution Strategies."""

from lopt.trained import load

__all__ = ["load"]
__version__ = "0.1.0"
