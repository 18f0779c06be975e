"""Modules that are imported when asked for: after a quick `import lopt`, `lopt.tasks.cnn_classifier` works."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any


def modules_of(package: str) -> Callable[[str], Any]:
  """The `__getattr__` of a package that imports its module of that name."""

  def get(name: str) -> Any:
    path = f"{package}.{name}"
    if name.startswith("_") or importlib.util.find_spec(path) is None:
      raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return importlib.import_module(path)

  return get
