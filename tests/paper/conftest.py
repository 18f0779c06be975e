"""What the tests of the paper's experiments share: the script that each is of."""

import functools
import sys
from pathlib import Path

import pytest

from lopt import configuration

FOLDER = Path(__file__).parents[2] / "experiments" / "paper"


load = functools.cache(configuration.load)
"""Once in a process: a script's flags cannot be defined twice, and workers may come back to a file of tests."""


@pytest.fixture(scope="module")
def script(request):
  """The module of the script that the file of tests is named after."""
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(FOLDER)  # for the module that the scripts share
    yield load(FOLDER / f"{request.path.stem.removeprefix('test_')}.py")
    sys.modules.pop("paper", None)
