"""Configurations: plain nested fields, checked against the signatures of the functions that they are for.

A module that can be chosen (an architecture, a task, an estimator) is a file with one function `build`, whose
keyword-only arguments are its options. Their names, types and defaults are read from the signature, so adding a
file is all there is to adding a choice:

    section = {"name": "mlp", "hidden_size": 32}
    architecture = build("architectures", section, where="config.architecture")

What is there for every architecture or every task alike is a section within, for a function `wrap` of `WRAPPERS`:

    section = {"name": "quadratic", "augmentation": {"reparametrization": [1e-3, 1e3]}}

An empty section is the wrapper with its defaults; None, or no section, is none.

Every problem is a `ConfigError` of one line that starts with the field.
"""

import importlib
import importlib.util
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_collections
from ml_collections import config_dict

from lopt import checks, signatures
from lopt.signatures import WRAPPERS, ConfigError, call, defaults

__all__ = ["WRAPPERS", "ConfigError", "call", "defaults"]  # and what follows

PACKAGES = {"architecture": "architectures", "task": "tasks", "estimator": "outer"}
"""Where the module that a section of a configuration names is found: lopt/<package>/<name>.py."""

MIXTURE = "mixture"
"""The name of a task section that has several families."""

OWN = "passed.in.Python"
"""The name in a section where a program has handed over an object that no configuration names."""
_REMEDIES = {
  "architectures": "pass it again: lopt.load(path, architecture=...)",
  "tasks": "say on which tasks: --suite or --config, or in Python lopt.evaluate(optimizers, family)",
}

_CONTRACTS = {"architectures": "LearnedOptimizer", "tasks": "TaskFamily", "outer": "GradientEstimator"}


def module(package: str, name: str, *, where: str, modules: Collection[str] | None = None) -> types.ModuleType:
  """The module `lopt.<package>.<name>`, or `name` itself where it has dots (a module outside of lopt).

  Args:
    package: "architectures", "tasks" or "outer".
    name: of the module.
    where: the field that names it.
    modules: which modules outside of lopt may be imported; None: any. A name that stands in a file must not choose
      what runs here, so whoever reads one gives what the user has allowed, or ().

  Raises:
    ConfigError: there is no such module, it may not be imported, or it has no function `build`.
  """
  if name == OWN:
    raise ConfigError(f"{where}: was passed in Python, where no configuration names it; {_REMEDIES[package]}")
  if not all(part.isidentifier() for part in name.split(".")):
    raise ConfigError(f"{where}: {name!r} is not the name of a module; there are: {', '.join(choices(package))}")
  path = name if "." in name else f"lopt.{package}.{name}"
  if modules is not None and "." in name and name not in modules:
    raise ConfigError(
      f"{where}: {name!r} is not one of lopt's own ({', '.join(choices(package))}), and a file does not choose what "
      "is imported here"
    )
  try:
    if modules is not None and "." not in name and name not in choices(package):
      raise ModuleNotFoundError(name=path)  # the helpers of a package are not for a file to import either
    found = importlib.import_module(path)
  except ModuleNotFoundError as error:
    if not f"{path}.".startswith(f"{error.name}."):
      raise  # The module is there, and something that it imports is not.
    if "." in name:
      reason = f"no module {name!r}; is the folder that contains it on PYTHONPATH?"
    else:
      reason = f"no {path.replace('.', '/')}.py; {signatures.did_you_mean(name, choices(package))}there are: "
      reason += f"{', '.join(choices(package))}; or give the dotted path of a module of your own"
    raise ConfigError(f"{where}: {reason}") from None
  if not callable(getattr(found, "build", None)):
    raise ConfigError(f"{where}: {path} has no function `build`; there are: {', '.join(choices(package))}")
  return found


def choices(package: str) -> list[str]:
  """The modules of lopt/<package> that can be named; found by their text, so that none has to be imported."""
  build_of_contract = re.compile(rf"^def build\(.*?\) -> (base\.)?{_CONTRACTS[package]}:", re.M | re.S)
  folder = Path(__file__).parent / package
  return sorted(path.stem for path in folder.glob("*.py") if build_of_contract.search(path.read_text("utf-8")))


def build(
  package: str,
  section: Mapping[str, Any] | ml_collections.ConfigDict,
  *args: Any,
  where: str,
  modules: Collection[str] | None = None,
) -> Any:
  """What `build(*args, **options)` of a module returns, for a section `{"name": <module>, **options}`.

  Raises:
    ConfigError: no such module, one that `modules` does not allow (see `module`), or options that it does not take.
  """
  options = plain(section, where)
  name = options.pop("name", None)
  if not isinstance(name, str):
    raise ConfigError(f"{where}.name: {name!r} names no module; there are: {', '.join(choices(package))}")
  wrappings = {wrapper: options.pop(wrapper, None) for wrapper in WRAPPERS.get(package, ())}
  chosen = module(package, name, where=f"{where}.name", modules=modules)
  built = call(chosen.build, options, *args, where=where)
  for wrapper, wrapping in wrappings.items():
    if wrapping is None:
      continue
    if not isinstance(wrapping, Mapping):
      raise ConfigError(f"{where}.{wrapper}: {wrapping!r} is not a section of options")
    built = call(_wrap(package, wrapper), wrapping, built, where=f"{where}.{wrapper}")
  return built


def complete(package: str, section: Mapping[str, Any], *, where: str) -> dict[str, Any]:
  """The section with all options of the module that it names, and of sections within: defaults where none is given.

  Raises:
    ConfigError: as `build` does.
  """
  values = plain(section, where)
  name = values.pop("name", None)
  wrappings = {wrapper: values.pop(wrapper, None) for wrapper in WRAPPERS.get(package, ())}
  found = {
    "name": name,
    **signatures.all_options(module(package, str(name), where=f"{where}.name").build, values, where),
  }
  for wrapper, wrapping in wrappings.items():
    if wrapping is not None:
      found[wrapper] = signatures.all_options(_wrap(package, wrapper), wrapping, f"{where}.{wrapper}")
  return found


def task_families(
  section: Mapping[str, Any], *, where: str, modules: Collection[str] | None = None
) -> dict[str, tuple[Any, float]]:
  """The task families of a section and their weights, by name: one, or those of a mixture.

      {"name": "mlp_classifier", **options}
      {"name": "mixture", "families": {"small": {"name": ..., "weight": 2.0, **options}, "sparse": ...}}

  Weights are 1 where not given.

  Raises:
    ConfigError: no such module, one that `modules` does not allow (see `module`), options that it does not take, or
      a mixture of nothing.
  """
  section = plain(section, where)
  if section.get("name") != MIXTURE:
    return {str(section.get("name")).rpartition(".")[2]: (build("tasks", section, where=where, modules=modules), 1.0)}
  if unknown := section.keys() - {"name", "families"}:
    raise ConfigError(f"{where}.{min(unknown)}: unknown field; a mixture takes: families")
  members = section.get("families")
  if not isinstance(members, dict) or not members or not all(isinstance(x, dict) for x in members.values()):
    raise ConfigError(f"{where}.families: needs one section or more, each with the name of a task family")
  families = {}
  for label, member in members.items():
    weight = member.pop("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
      raise ConfigError(f"{where}.families.{label}.weight: must be a number above 0, not {weight!r}")
    built = build("tasks", member, where=f"{where}.families.{label}", modules=modules)
    families[label] = (built, float(weight))
  return families


def choose(picks: str, **sections: Mapping[str, Mapping[str, Any]]) -> ml_collections.ConfigDict:
  """The sections of a configuration that name a module, filled with all options of those modules.

      choose("estimator=es", task={"mlp_classifier": {"width": 8}}, estimator={"pes": {"sigma": 0.1}})

  returns a `task` section with the options of mlp_classifier, width 8 and the rest at its default, and an
  `estimator` section with the defaults of es. The first name in a section is chosen unless `picks` says other.

  Args:
    picks: comma-separated section=name, or nothing.
    **sections: section -> name -> the values that are to differ from the module's defaults. With a section of
      `WRAPPERS` among them, be it empty, all options of that are there too.

  Raises:
    ConfigError: unknown section, unknown module, or values that its `build` does not take.
  """
  names = {section: next(iter(values)) for section, values in sections.items()}
  for pick in filter(None, picks.split(",")):
    section, _, name = pick.partition("=")
    if section not in sections or not name:
      raise ConfigError(f"{pick}: not a choice; write section=name, where section is: {', '.join(sections)}")
    names[section] = name
  config = {}
  for section, name in names.items():
    package = PACKAGES[section]
    values = dict(sections[section].get(name, {}))
    wrappings = {wrapper: values.pop(wrapper) for wrapper in WRAPPERS.get(package, ()) if wrapper in values}
    function = module(package, name, where=f"{section}={name}").build
    config[section] = {"name": name, **_fields(function, values, section)}
    for wrapper, wrapping in wrappings.items():
      config[section][wrapper] = _fields(_wrap(package, wrapper), wrapping, f"{section}.{wrapper}")
  return ml_collections.ConfigDict(config)


def _fields(function: Callable[..., Any], values: Mapping[str, Any], where: str) -> dict[str, Any]:
  """All options of a function, those without a value as a field that still has a type."""
  values = signatures.all_options(function, values, where)
  annotations = signatures.annotations_of(function)
  return {o: _placeholder(annotations[o]) if value is None else value for o, value in values.items()}


def _wrap(package: str, wrapper: str) -> Callable[..., Any]:
  return importlib.import_module(f"lopt.{package}.{wrapper}").wrap


def load(path: str | Path, *, as_main: bool = False) -> types.ModuleType:
  """The config file `path` as a module, whose `get_config(choices)` returns a configuration.

  With it one config file builds on another wherever both lie, without a change of sys.path.

  Args:
    path: of the file.
    as_main: whether it is run as Python runs a script: as the module `__main__`, which absl's --help looks at.
  """
  spec = importlib.util.spec_from_file_location("__main__" if as_main else Path(path).stem, path)
  assert spec is not None
  assert spec.loader is not None
  found = importlib.util.module_from_spec(spec)
  if as_main:
    sys.modules["__main__"] = found
  spec.loader.exec_module(found)
  return found


def plain(config: Any, where: str = "config") -> Any:
  """A configuration as JSON has it: dicts with string keys, lists for tuples, numbers, strings and None.

  Raises:
    ConfigError: a field that JSON has no form for.
  """
  if isinstance(config, (Mapping, ml_collections.ConfigDict)):
    return {str(name): plain(value, f"{where}.{name}") for name, value in config.items()}
  if isinstance(config, (list, tuple)):
    return [plain(value, f"{where}[{i}]") for i, value in enumerate(config)]
  if config is None or isinstance(config, (bool, int, float, str)):
    return config
  raise ConfigError(f"{where}: {type(config).__name__} {config!r} cannot be stored in a configuration")


def difference(a: Any, b: Any) -> list[str]:
  """The fields in which two configurations differ, as "estimator.sigma: 0.01 (there) != 0.02 (here)".

  Args:
    a: the configuration "there", such as one read from a file; tuples and lists are the same.
    b: the configuration "here".
  """
  there, here = dict(_leaves(plain(a))), dict(_leaves(plain(b)))
  return [
    checks.printable(f"{name}: {there.get(name, 'absent')!s} (there) != {here.get(name, 'absent')!s} (here)")
    for name in {**there, **here}
    if there.get(name, "absent") != here.get(name, "absent")
  ]


def _placeholder(annotation: Any) -> Any:
  """A field without a value that still has a type, so that a flag can set it."""
  kinds = [kind for kind in typing.get_args(annotation) or (annotation,) if kind is not types.NoneType]
  kind = typing.get_origin(kinds[0]) or kinds[0]
  return config_dict.placeholder(kind if isinstance(kind, type) else object)


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
  if isinstance(value, dict):
    for key, item in value.items():
      yield from _leaves(item, f"{name}.{key}" if name else key)
  else:
    yield name, value
