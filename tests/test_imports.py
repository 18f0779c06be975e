"""Imports run one way. Found by reading the sources, so that imports inside functions count too."""

import ast
import graphlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A module imports from the layers before its own only. A package stands for all of its files, so a new task,
# architecture or estimator needs no line here; a new module at the top of lopt does.
LAYERS = (
  ("base", "checks", "lazy", "signatures", "version", "runs.files"),
  ("configuration", "architectures", "tasks", "outer", "runs", "evaluation.measures"),
  ("inner_training", "evaluation.baselines", "runs.trained", "runs.drop_in", "runs.stacked", "runs.cache"),
  ("outer.meta_training",),
  ("experiment", "command_line"),
  ("evaluation.inner_runs",),
  ("evaluation.comparison",),
  ("evaluation.identity",),
  ("evaluation.held_out",),
  ("evaluation",),
  ("evaluation.report",),
  ("evaluation.report_page",),
  ("running", "evaluation.evaluate"),
  ("", "__main__"),  # lopt/__init__.py
)
DEVICES = {"pmap", "devices", "local_devices", "device_count", "local_device_count"}
MAY_USE_DEVICES = {"outer.parallel", "architectures.sharding"}


def violations(root: Path) -> list[str]:
  """What is wrong with the imports of `root`/lopt, one line each."""
  sources = {_module_name(path, root): path.read_text("utf-8") for path in sorted((root / "lopt").rglob("*.py"))}
  packages = {_module_name(path, root) for path in (root / "lopt").rglob("__init__.py")}
  # What a configuration can choose: siblings, where they are in one package. Its other files are their helpers.
  chosen = {name for name, source in sources.items() if "." in name and re.search(r"^def build\(", source, re.M)}
  found, packages_used = [], {}
  for name, source in sources.items():
    tree = ast.parse(source)
    layer = _layer(name)
    if layer is None:
      found.append(f"{name}: has no layer; give it one in {Path(__file__).name}")
      continue
    for other in _imports(tree, name, packages, sources):
      other_layer = _layer(other)
      package, other_package = name.split(".")[0], other.split(".")[0]
      if name and package != other_package:
        packages_used.setdefault(package, set()).add(other_package)
      same_package = "." in name and package == other_package
      helper = same_package and other_layer == layer and other not in chosen
      if other_layer is not None and other_layer >= layer and not helper:
        found.append(f"{name} imports {other}")
    if name not in MAY_USE_DEVICES:
      found += [f"{name} uses {use}" for use in sorted(DEVICES & _uses_of_jax(tree))]
  try:
    graphlib.TopologicalSorter(packages_used).prepare()
  except graphlib.CycleError as error:
    found = found or [f"packages import each other: {', '.join(sorted(set(error.args[1])))}"]
  return found


def _module_name(path: Path, root: Path) -> str:
  parts = path.relative_to(root / "lopt").with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _layer(name: str) -> int | None:
  for candidate in (name, name.split(".")[0]):  # a file's own layer, or that of its package
    for layer, names in enumerate(LAYERS):
      if candidate in names:
        return layer
  return None


def _uses_of_jax(tree: ast.AST) -> set[str]:
  """The names that a module uses as `jax.name`, or imports from jax."""
  names = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "jax":
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "jax":
      names.add(node.attr)
  return names


def _imports(tree: ast.AST, name: str, packages: set[str], modules: dict[str, str]) -> set[str]:
  """The modules of lopt that a module imports, as names below lopt; "" is lopt itself."""
  inside = f"lopt.{name}".rstrip(".") if name in packages else f"lopt.{name}".rpartition(".")[0]
  paths = []
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      paths += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      base = importlib.util.resolve_name("." * node.level + (node.module or ""), inside)
      submodules = [f"{base}.{alias.name}" for alias in node.names]
      submodules = [path for path in submodules if path.removeprefix("lopt.") in modules]
      paths += submodules or [base]
  return {path.removeprefix("lopt").removeprefix(".") for path in paths if f"{path}.".startswith("lopt.")}


def test_imports_run_one_way():
  assert violations(ROOT) == []


def test_package_init_files_import_nothing_by_themselves():
  lines = ["from lopt import lazy", "__getattr__ = lazy.modules_of(__name__)"]
  for package in ("architectures", "tasks", "outer", "evaluation", "runs"):
    text = (ROOT / "lopt" / package / "__init__.py").read_text("utf-8")
    assert [line for line in text.splitlines() if line and not line.startswith('"')] in (lines, [])


FINE = {
  "base.py": "import jax\n",
  "runs/files.py": "",
  "runs/__init__.py": "",
  "evaluation/__init__.py": "",
  "runs/tracking.py": "from lopt.runs.files import write_atomically\n",
  "tasks/__init__.py": "",
  "tasks/datasets.py": "from lopt import base\nfrom lopt.runs import files\n",
  "tasks/one.py": "from lopt import base\nfrom lopt.tasks import datasets\ndef build(): pass\n",
  "tasks/two.py": "from lopt.tasks.datasets import load\ndef build(): pass\n",
  "architectures/__init__.py": "",
  "architectures/mlp.py": "from lopt import base\ndef build(): pass\n",
  "outer/__init__.py": "",
  "outer/es.py": "def build(devices): return devices\n",
  "outer/parallel.py": "import jax\njax.pmap(None, devices=jax.devices())\n",
  "outer/meta_training.py": "from lopt.outer import parallel\nfrom lopt import inner_training, runs\n",
  "runs/trained.py": "from lopt import architectures\n",
  "inner_training.py": "from lopt import base\n",
  "evaluation/held_out.py": "from lopt.outer import meta_training\nimport lopt.tasks.one\n",
  "evaluation/report.py": "from lopt.evaluation import held_out\n",
  "__init__.py": "from lopt.runs.tracking import load\n",
}


@pytest.mark.parametrize(
  ("file", "code", "message"),
  [
    ("base.py", "from lopt.runs import files", "base imports runs.files"),
    ("runs/files.py", "import lopt.base", "runs.files imports base"),
    ("runs/tracking.py", "from lopt import tasks", "runs.tracking imports tasks"),
    ("runs/tracking.py", "from lopt.tasks.one import build", "runs.tracking imports tasks.one"),
    ("tasks/one.py", "from lopt.tasks import two", "tasks.one imports tasks.two"),
    ("tasks/one.py", "from .two import build", "tasks.one imports tasks.two"),
    ("tasks/one.py", "def f():\n  import lopt.tasks.two as t", "tasks.one imports tasks.two"),
    ("tasks/datasets.py", "from lopt.tasks import two", "tasks.datasets imports tasks.two"),
    ("tasks/one.py", "from lopt.architectures import mlp", "tasks.one imports architectures.mlp"),
    ("tasks/one.py", "import lopt", "tasks.one imports "),
    ("outer/es.py", "from lopt import inner_training", "outer.es imports inner_training"),
    ("outer/es.py", "from lopt.outer import meta_training", "outer.es imports outer.meta_training"),
    ("inner_training.py", "from lopt.evaluation import held_out", "inner_training imports evaluation.held_out"),
    ("inner_training.py", "from lopt.outer import meta_training", "inner_training imports outer.meta_training"),
    (
      "outer/meta_training.py",
      "from lopt.evaluation import held_out",
      "outer.meta_training imports evaluation.held_out",
    ),
    (
      "evaluation/held_out.py",
      "from lopt.evaluation.report import table",
      "evaluation.held_out imports evaluation.report",
    ),
    ("evaluation/held_out.py", "import jax\njax.pmap(f)", "evaluation.held_out uses pmap"),
    ("outer/es.py", "from jax import devices", "outer.es uses devices"),
    ("runs/trained.py", "from lopt.outer import es", "packages import each other: outer, runs"),
    ("surprise.py", "", "surprise: has no layer; give it one in test_imports.py"),
  ],
)
def test_a_planted_violation_is_found(tmp_path, file, code, message):
  for name, source in FINE.items():
    path = tmp_path / "lopt" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
  assert violations(tmp_path) == []
  path = tmp_path / "lopt" / file
  path.write_text(f"{FINE.get(file, '')}{code}\n")
  assert violations(tmp_path) == [message]


def test_modules_are_there_after_import_lopt_alone():
  code = (
    "import lopt; assert lopt.tasks.quadratic.build and lopt.architectures.celo.build and lopt.outer.pes.build; "
    "assert lopt.base.TaskFamily and not hasattr(lopt.tasks, 'nonsense') and not hasattr(lopt, 'nonsense')"
  )
  subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
