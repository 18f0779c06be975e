"""Where an architecture comes from: what is built in Python can be built again from the file of its θ."""

import functools
import json
from collections.abc import Callable
from typing import Any, TypeVar, cast

from lopt import base, signatures

Build = TypeVar("Build", bound=Callable[..., base.LearnedOptimizer])
WRAPPERS = signatures.WRAPPERS["architectures"]


def remembered(build: Build) -> Build:
  """The `build` or `wrap` of a module, with the section of a configuration that says the same as `origin`.

  Without one stays what is wrapped in an order that a section cannot say, or is no architecture of lopt's own.
  """
  name = build.__module__.rpartition(".")[2]

  @functools.wraps(build)
  def with_origin(*args: Any, **options: Any) -> base.LearnedOptimizer:
    built = build(*args, **options)
    if any(built is x for x in args):  # with nothing to wrap it in
      return built
    section = signatures.all_options(build, options, name)
    if not args:
      return built._replace(origin=json.dumps({"name": name, **section}))
    inner = json.loads(args[0].origin or "{}")
    if not inner or inner.keys() & set(WRAPPERS[WRAPPERS.index(name) :]):
      return built._replace(origin=None)
    return built._replace(origin=json.dumps({**inner, name: section}))

  return cast(Build, with_origin)
