"""Learned optimizers, one file each."""

from lopt import lazy

__getattr__ = lazy.modules_of(__name__)
