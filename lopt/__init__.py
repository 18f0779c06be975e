"""Meta-train learned optimizers with Persistent Evolution Strategies."""

__version__ = "0.1.0"
