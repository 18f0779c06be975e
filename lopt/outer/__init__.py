"""Estimators of the meta-gradient, and the outer loop."""

from lopt import lazy

__getattr__ = lazy.modules_of(__name__)
