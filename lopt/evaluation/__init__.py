"""Suites, baselines, measures, comparisons and reports."""

from lopt import lazy

__getattr__ = lazy.modules_of(__name__)
