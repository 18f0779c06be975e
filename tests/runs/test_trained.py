import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

import lopt
from lopt import configuration
from lopt.base import LearnedOptimizer
from lopt.runs import trained
from lopt.runs.trained import LoadError

ROOT = Path(__file__).parent.parent.parent

CONFIG = {"architecture": {"name": "mlp", "hidden_sizes": (8, 4)}, "seed": 3, "estimator": {"name": "pes"}}


def architecture() -> LearnedOptimizer:
  return configuration.build("architectures", CONFIG["architecture"], where="architecture")


def theta() -> Any:
  return architecture().init(jax.random.key(0))


def contents(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  with safetensors.safe_open(path, framework="np") as file:
    return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.fixture
def path(tmp_path):
  path = tmp_path / "run" / "optimizer.safetensors"
  trained.export(path, theta(), CONFIG, outer_steps=17)
  return path


def rewrite(path: Path, arrays: dict[str, np.ndarray] | None = None, **header: str | None) -> None:
  """Changes the file's arrays, or strings of its header (None removes one)."""
  old_arrays, old_header = contents(path)
  changed = {name: value for name, value in {**old_header, **header}.items() if value is not None}
  path.write_bytes(safetensors.numpy.save(old_arrays if arrays is None else arrays, changed))


@pytest.mark.slow_but_for("tensor_mlp", "mlp", "lstm")
@pytest.mark.parametrize("name", configuration.choices("architectures"))
def test_every_architecture_comes_back_and_updates_alike(tmp_path, name):
  """The update of a loaded optimizer is, bit for bit, that of the one exported."""
  built = configuration.build("architectures", {"name": name}, where="a")
  theta = jax.tree.map(lambda x: x + 0.01, built.init(jax.random.key(1)))
  trained.export(tmp_path / "x.safetensors", theta, {"architecture": {"name": name}}, outer_steps=1)
  loaded = lopt.load(tmp_path / "x.safetensors")
  assert jax.tree.structure(loaded.theta) == jax.tree.structure(theta)
  jax.tree.map(np.testing.assert_array_equal, loaded.theta, theta)

  params = {"w": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4), "b": jnp.ones(4)}
  updates = []
  for tx in (loaded(num_steps=10), built.transform(theta, 10)):
    state = tx.init(params)
    _, state = tx.update(params, state, params, value=jnp.float32(1.5))
    updates.append(tx.update(params, state, params, value=jnp.float32(0.5))[0])
  jax.tree.map(np.testing.assert_array_equal, *updates)
  assert any(jnp.any(leaf != 0) for leaf in jax.tree.leaves(updates[0]))


def test_a_loaded_optimizer_trains_in_a_compiled_optax_loop(path):
  optimizer = lopt.load(path.parent)  # the folder will do
  tx = optax.chain(optax.clip_by_global_norm(1.0), optimizer(num_steps=100))
  params = {"w": jnp.ones(3)}

  @jax.jit
  def step(params, state):
    loss, gradients = jax.value_and_grad(lambda params: jnp.sum(params["w"] ** 2))(params)
    updates, state = tx.update(gradients, state, params, value=loss)
    return optax.apply_updates(params, updates), state

  state = tx.init(params)
  for _ in range(2):
    params, state = step(params, state)
  assert not np.array_equal(params["w"], jnp.ones(3))


def test_what_is_exposed(path):
  optimizer = lopt.load(str(path))
  assert optimizer.config == json.loads(json.dumps(CONFIG))
  assert isinstance(optimizer.architecture, LearnedOptimizer)
  jax.tree.map(np.testing.assert_array_equal, optimizer.theta, theta())
  for num_steps in (0, -1):
    with pytest.raises(ValueError, match=f"num_steps: {num_steps} is not"):
      optimizer(num_steps=num_steps)


def test_the_file_is_plain_safetensors(path):
  arrays, header = contents(path)
  flat = {f"{module}/{name}": array for module, leaves in theta().items() for name, array in leaves.items()}
  assert arrays.keys() == flat.keys()
  for name, array in flat.items():
    np.testing.assert_array_equal(arrays[name], array)
  assert header == {
    "format": "lopt optimizer",
    "format_version": "1",
    "lopt_version": lopt.__version__,
    "outer_steps": "17",
    "architecture": json.dumps({"hidden_sizes": [8, 4], "name": "mlp"}),
    "config": json.dumps(configuration.plain(CONFIG), sort_keys=True),
  }
  read_arrays, read_header = trained.read(path)
  assert read_header == header
  assert read_arrays.keys() == flat.keys()


def test_a_file_that_is_no_trained_optimizer_is_refused(path, tmp_path):
  def assert_refused(message: str, path: Path = path) -> None:
    with pytest.raises(LoadError, match=message) as error:
      lopt.load(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)

  good = path.read_bytes()
  assert_refused("no such file; expected a trained optimizer", tmp_path / "nowhere")
  (tmp_path / "folder").mkdir()
  assert_refused("no such file", tmp_path / "folder")
  for length in (0, 4, 8, 100, len(good) // 2, len(good) - 1):
    path.write_bytes(good[:length])
    assert_refused("damaged, or not a safetensors file")
  path.write_bytes(b"\x93NUMPY" + good)
  assert_refused("damaged, or not a safetensors file")
  path.write_bytes(safetensors.numpy.save({"w": np.zeros(3)}))
  assert_refused("a safetensors file, but not one that lopt wrote")
  path.write_bytes(good)
  rewrite(path, format_version="2", lopt_version="9.0")
  assert_refused(f"format version 2, and this lopt {lopt.__version__} reads 1; it was written by lopt 9.0")
  path.write_bytes(good)
  rewrite(path, architecture=None)
  assert_refused("damaged: its header lacks architecture")
  path.write_bytes(good)
  rewrite(path, architecture="{")
  assert_refused("damaged: its header's architecture is not JSON")
  rewrite(path, architecture="[]")
  assert_refused("damaged: its header's architecture is not a JSON object")
  rewrite(path, architecture='{"name": "mpl"}')
  assert_refused(r"architecture\.name: no lopt/architectures/mpl\.py; did you mean 'mlp'\?")
  rewrite(path, architecture='{"name": "mlp", "hidden_sizes": "x"}')
  assert_refused(r"architecture\.hidden_sizes: 'x' is not a tuple")


def test_theta_of_another_architecture_is_refused(path):
  good = path.read_bytes()
  arrays, _ = contents(path)
  name, array = max(arrays.items(), key=lambda item: item[1].size)
  shape = list(array.shape)
  for changed, there in [
    ({**arrays, name: array[:-1]}, f"float32{[shape[0] - 1, *shape[1:]]}"),
    ({**arrays, name: array.astype(np.float64)}, f"float64{shape}"),
    ({key: value for key, value in arrays.items() if key != name}, "absent"),
  ]:
    path.write_bytes(good)
    rewrite(path, changed)
    with pytest.raises(LoadError) as error:
      lopt.load(path)
    assert f"{name} is {there} in the file and float32{shape} in the architecture 'mlp'" in str(error.value)
  rewrite(path, {**arrays, "more": array})
  with pytest.raises(LoadError, match=r"more is float32.* in the file and absent in the architecture"):
    lopt.load(path)


def test_names_of_leaves_must_differ(tmp_path):
  with pytest.raises(ValueError, match="two leaves of θ have the same path"):
    trained.export(tmp_path / "x", {"a/b": np.zeros(1), "a": {"b": np.zeros(1)}}, CONFIG, outer_steps=0)


def test_importing_lopt_imports_nothing_that_only_meta_training_needs():
  code = "import sys, lopt; print(*{name.split('.')[0] for name in sys.modules})"
  result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
  heavy = {"tensorflow_datasets", "tensorflow", "wandb", "orbax", "matplotlib", "sklearn", "torch"}
  assert heavy & set(result.stdout.split()) == set()


def decoy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
  """A module `stranger`, where Python finds it, that leaves this file behind when it is imported."""
  mark = folder / "imported"
  architecture = "from lopt.architectures.mlp import build  # noqa\n"
  (folder / "stranger.py").write_text(f"open({str(mark)!r}, 'w').close()\n{architecture}")
  monkeypatch.syspath_prepend(folder)
  monkeypatch.delitem(sys.modules, "stranger", raising=False)
  return mark


def test_a_file_does_not_choose_what_is_imported(path, tmp_path, monkeypatch):
  """Unless the user allows the module by its name; or passes the architecture."""
  mark = decoy(tmp_path, monkeypatch)
  rewrite(path, architecture='{"name": "stranger.x", "hidden_sizes": [8, 4]}')
  remedy = r"'stranger\.x' is not one of lopt's own \(.*mlp.*\).*pass it: lopt\.load\(path, architecture=\.\.\.\)"
  with pytest.raises(LoadError, match=remedy):
    lopt.load(path)
  rewrite(path, architecture='{"name": "prepare"}')
  with pytest.raises(LoadError, match=r"no lopt/architectures/prepare\.py"):
    lopt.load(path)
  assert not mark.exists()
  jax.tree.map(np.testing.assert_array_equal, lopt.load(path, architecture=architecture()).theta, theta())
  assert not mark.exists()

  (tmp_path / "package").mkdir()
  (tmp_path / "package" / "own.py").write_text("from stranger import build\n")
  rewrite(path, architecture='{"name": "package.own", "hidden_sizes": [8, 4]}')
  with pytest.raises(LoadError, match=r"or modules=\['package\.own'\]"):
    lopt.load(path, modules=["package"])
  assert not mark.exists()
  jax.tree.map(np.testing.assert_array_equal, lopt.load(path, modules=["package.own"]).theta, theta())
  assert mark.exists()


def test_a_run_that_has_not_ended_is_called_so(tmp_path):
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(trained.LoadError, match="its run has not ended"):
    trained.load(tmp_path)


def test_a_given_architecture_must_fit(path):
  other = configuration.build("architectures", {"name": "mlp", "hidden_sizes": [3]}, where="a")
  with pytest.raises(LoadError, match="θ does not fit the given architecture: layer_0/b is"):
    lopt.load(path, other)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_theta_that_is_not_finite_is_refused(path, bad):
  arrays, _ = contents(path)
  arrays = {name: array.copy() for name, array in arrays.items()}
  arrays["layer_1/w"][2, 1] = bad
  rewrite(path, arrays)
  with pytest.raises(LoadError, match="θ is not finite: layer_1/w has NaN or infinite values"):
    lopt.load(path)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"hidden_sizes": [10**9]}, r"θ does not fit .* is float32\[8\] in the file and float32\[1000000000\] in"),
    ({"hidden_sizes": [10**12]}, "an integer of more than 31 bits"),
    ({"hidden_sizes": [4] * 1000}, "more than 500 options"),
    ({"step_multiplier": float("nan")}, "an option is NaN"),
    ({"name": "m\x1b[2J\nlp"}, r"'m\\x1b\[2J\\nlp' is not the name of a module"),
    ({"name": "x" * 10**5}, r"\.\.\.$"),
  ],
)
def test_absurd_options_cost_nothing(path, options, message):
  """Neither memory nor time, and what a terminal sees is one short line."""
  rewrite(path, architecture=json.dumps({**configuration.plain(CONFIG["architecture"]), **options}))
  before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
  with pytest.raises(LoadError, match=message) as error:
    lopt.load(path)
  assert time.monotonic() - begun < 10
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024  # KiB
  text = str(error.value).removeprefix(str(path))
  assert len(text) < 700
  assert text.isprintable()


def test_absurd_files_are_not_read(path):
  rewrite(path, note="x" * 2**20)
  with pytest.raises(LoadError, match=r"not a safetensors file \(a header of 1,049,\d\d\d bytes\)"):
    lopt.load(path)
  with path.open("wb") as file:
    file.truncate(2**40)  # a hole, that takes no space on the disk
  with pytest.raises(LoadError, match="has 1,099,511,627,776 bytes, and a trained optimizer at most 268,435,456"):
    lopt.load(path)


def test_the_same_optimizer_gives_the_same_bytes(path, tmp_path):
  """In another process, and with the fields of the configuration in another order."""
  code = f"""
import jax
from lopt import configuration
from lopt.runs import trained
config = {dict(reversed(CONFIG.items()))!r}
config["architecture"] = dict(reversed(config["architecture"].items()))
theta = configuration.build("architectures", config["architecture"], where="a").init(jax.random.key(0))
trained.export("again.safetensors", theta, config, outer_steps=17)
"""
  environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "1"}
  subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
  assert contents(tmp_path / "again.safetensors")[1] == contents(path)[1]
  header, again = (
    file.read_bytes()[: 8 + int.from_bytes(file.read_bytes()[:8], "little")]
    for file in (path, tmp_path / "again.safetensors")
  )
  assert header == again
  assert len(header) % 8 == 0
  names = list(json.loads(header[8:])["__metadata__"])
  assert names == sorted(names)


@pytest.mark.slow
@pytest.mark.parametrize("files", [200, pytest.param(10_000, marks=pytest.mark.long)])
def test_mutated_files_do_no_harm(tmp_path, files):
  script = ROOT / "experiments" / "robustness" / "fuzz_load.py"
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  command = [sys.executable, str(script), f"--files={files}", f"--keep={tmp_path}"]
  result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
  assert result.returncode == 0, result.stdout + result.stderr
  assert re.search(rf"{files} mutated files .*: [1-9]\d* loaded, 0 did harm", result.stdout)
  assert "cannot build the architecture" in result.stdout
