"""Strict surroundings for every test: shapes are checked, ranks never broadcast silently, nothing leaves the
machine, nothing is written outside temporary folders.
"""

import os
import signal
import sys
import tempfile
import threading
from pathlib import Path

# Jobs in the background of a script ignore Ctrl-C; tests of what it does must not.
if threading.current_thread() is threading.main_thread():
  signal.signal(signal.SIGINT, signal.default_int_handler)

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

# XLA's older way to emit loops compiles in two thirds of the time. (An XLA without it ends with a line that says so.)
_flags = os.environ.get("XLA_FLAGS", "")
QUICK_COMPILATION = f"{_flags} --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = QUICK_COMPILATION

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)  # virtual devices, so that what depends on their number is tested
jax.config.update("jax_numpy_rank_promotion", "raise")
# Most of the time of these tests is compiling, and this takes 40% off it. What the README shows runs as for users.
jax.config.update("jax_disable_most_optimizations", True)

jax.devices()  # now XLA has read its flags: processes that a test starts compile as a user's, but with `environment`
os.environ["XLA_FLAGS"] = _flags

# Every jaxtyping annotation of the package is checked when its function is called. A module imported before the
# hook would go unchecked.
assert not any(name.split(".")[0] == "lopt" for name in sys.modules)
_hook = install_import_hook("lopt", "beartype.beartype")


def pytest_itemcollected(item):
  """`slow_but_for("a", "b-3")`: a test's cases are slow, but for those of these names, or with one as a parameter."""
  for mark in item.iter_markers("slow_but_for"):
    name = item.callspec.id
    if not {name, *name.split("-")} & set(mark.args):
      item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_programs():
  """Which would add up to gigabytes."""
  yield
  jax.clear_caches()


@pytest.fixture(autouse=True, scope="session")
def _remove_temporary_folder():
  yield
  _folder.cleanup()


ROOT = Path(__file__).parent.parent
TINY = {
  "seed": 3,
  "num_outer_steps": 60,
  "log_every": 2,
  "task.dimension": 4,
  "architecture.hidden_sizes": (4,),
  "estimator.num_pairs": 4,
  "estimator.unroll_length": 5,
  "horizon.minimum": 10,
  "horizon.maximum": 20,
  "outer_optimizer.warmup_steps": 5,
  "periodic_evaluation.every": 30,
  "periodic_evaluation.num_tasks": 2,
  "periodic_evaluation.num_seeds": 1,
  "periodic_evaluation.num_steps": 10,
  "evaluation.num_tasks": 2,
  "evaluation.num_seeds": 2,
  "evaluation.num_steps": 10,
  "checkpoint.every": 4,
}


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
  """That of a new user, but for quick compilation, and programs compiled by one test that the next can use."""
  cache = tmp_path_factory.mktemp("compiled")
  changes = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": str(ROOT)}
  changes |= {"XLA_FLAGS": QUICK_COMPILATION}
  return {**os.environ, **changes}


@pytest.fixture(scope="session")
def meta_train():
  """Makes the command line of a meta-training; that of quadratics is tiny."""

  def command(workdir, *flags, config="quadratics.py:architecture=mlp", **changes):
    script, path = ROOT / "experiments" / "meta_train.py", ROOT / "experiments" / "configs" / config
    fields = {**(TINY if config.startswith("quadratics.py") else {}), **changes}
    changed = [f"--config.{name}={value}" for name, value in fields.items()]
    return [sys.executable, str(script), f"--config={path}", f"--workdir={workdir}", *flags, *changed]

  return command
