"""Options that families share, in one place: the signature of the function that builds what they share."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from lopt import base

Build = Callable[..., base.TaskFamily]


def of(family: Build) -> Callable[[Build], Build]:
  """Makes a decorator of a `build(..., **options)`, which hands these on to `family`: its options become build's own.

  With their types and defaults, a configuration finds them in the signature. Positional arguments of `build` stay.
  """

  def with_options(build: Build) -> Build:
    own, shared = (dict(inspect.signature(function).parameters) for function in (build, family))
    positional = [p for p in own.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    keywords = {name: p for name, p in {**shared, **own}.items() if p.kind is p.KEYWORD_ONLY}
    types = {name: p.annotation for name, p in shared.items() if name in keywords}

    @functools.wraps(build)
    def with_all(*args: Any, **options: Any) -> base.TaskFamily:
      return build(*args, **options)

    with_all.__annotations__ = {**types, **build.__annotations__}
    with_all.__signature__ = inspect.Signature([*positional, *keywords.values()])  # pyright: ignore[reportAttributeAccessIssue]
    return with_all

  return with_options
