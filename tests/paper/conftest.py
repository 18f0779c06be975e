"""What the tests of the paper's experiments share: the script that each is of."""

import sys
from pathlib import Path

import pytest

from lopt import configuration

FOLDER = Path(__file__).parents[2] / "experiments" / "paper"


@pytest.fixture(scope="module")
def script(request):
  """The module of the script that the file of tests is named after."""
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(FOLDER)  # for the module that the scripts share
    yield configuration.load(FOLDER / f"{request.path.stem.removeprefix('test_')}.py")
    sys.modules.pop("paper", None)
