"""Meta-train learned optimizers with Persistent Evolution Strategies."""

from lopt.runs.trained import load
from lopt.version import __version__

__all__ = ["__version__", "load"]
