"""Strict surroundings for every test: shapes are checked, ranks never broadcast silently, nothing leaves the
machine, nothing is written outside temporary folders.
"""

import os
import sys
import tempfile

# Before anything imports matplotlib, wandb or tfds, which read these once.
_folder = tempfile.TemporaryDirectory(prefix="lopt-tests-")
os.environ["HOME"] = _folder.name  # no credentials, caches or settings of the user
os.environ["TFDS_DATA_DIR"] = os.path.join(_folder.name, "tensorflow_datasets")
os.environ["MPLBACKEND"] = "Agg"
os.environ["WANDB_MODE"] = "disabled"
for _name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "WANDB_API_KEY", "WANDB_DIR"):
  os.environ.pop(_name, None)
# A cache shared between runs would hide what a test compiles, and belongs to the user.
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)  # virtual devices, so that what depends on their number is tested
jax.config.update("jax_numpy_rank_promotion", "raise")
# Most of the time of these tests is compiling, and this takes 40% off it. Scripts that tests start are as for users.
jax.config.update("jax_disable_most_optimizations", True)

# Every jaxtyping annotation of the package is checked when its function is called. A module imported before the
# hook would go unchecked.
assert not any(name.split(".")[0] == "lopt" for name in sys.modules)
_hook = install_import_hook("lopt", "beartype.beartype")


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_programs():
  """Which would add up to gigabytes."""
  yield
  jax.clear_caches()


@pytest.fixture(autouse=True, scope="session")
def _remove_temporary_folder():
  yield
  _folder.cleanup()
