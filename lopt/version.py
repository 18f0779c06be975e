"""The version of lopt, which trained optimizers record."""

__version__ = "0.3.0"
