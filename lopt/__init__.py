"""Meta-train learned optimizers with Persistent Evolution Strategies."""

from typing import TYPE_CHECKING, Any

from lopt import lazy
from lopt.runs.trained import load
from lopt.version import __version__

__all__ = ["__version__", "evaluate", "load", "meta_train"]

if TYPE_CHECKING:
  from lopt import architectures as architectures
  from lopt import base as base
  from lopt import outer as outer
  from lopt import tasks as tasks
  from lopt.evaluation.evaluate import evaluate
  from lopt.running import meta_train

else:
  _module = lazy.modules_of(__name__)

  def __getattr__(name: str) -> Any:
    """What meta-trains and evaluates is imported when asked for: whoever only loads an optimizer need not wait."""
    if name == "meta_train":
      from lopt.running import meta_train

      return meta_train
    if name == "evaluate":
      from lopt.evaluation.evaluate import evaluate

      return evaluate
    return _module(name)
