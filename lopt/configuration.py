"""Configurations: plain nested fields, checked against the signatures of the functions that they are for.

A module that can be chosen (an architecture, a task, an estimator) is a file with one function `build`, whose
keyword-only arguments are its options. Their names, types and defaults are read from the signature, so adding a
file is all there is to adding a choice:

    section = {"name": "mlp", "hidden_size": 32}
    architecture = build("architectures", section, where="config.architecture")

What is there for every architecture or every task alike is a section within, for a function `wrap` of `WRAPPERS`:

    section = {"name": "quadratic", "augmentation": {"reparametrization": [1e-3, 1e3]}}

Every problem is a `ConfigError` of one line that starts with the field.
"""

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import ml_collections
from absl import flags
from ml_collections import config_dict, config_flags

PACKAGES = {"architecture": "architectures", "task": "tasks", "estimator": "outer"}
"""Where the module that a section of a configuration names is found: lopt/<package>/<name>.py."""

WRAPPERS = {"architectures": ("step_sizes", "safeguards", "direction"), "tasks": ("augmentation",)}
"""Sections within those of a package, the innermost first, and the modules lopt/<package>/<name>.py whose `wrap` they
are options of."""

MIXTURE = "mixture"
"""The name of a task section that has several families."""

_CONTRACTS = {"architectures": "LearnedOptimizer", "tasks": "TaskFamily", "outer": "GradientEstimator"}


class ConfigError(ValueError):
  """A configuration that cannot be used; the message is one line and starts with the field."""


def defaults(build: Callable[..., Any]) -> dict[str, Any]:
  """The options of a build function: its keyword-only arguments that have a default, with those defaults."""
  return {
    name: parameter.default
    for name, parameter in _options(build).items()
    if parameter.default is not inspect.Parameter.empty
  }


def call(build: Callable[..., Any], options: Mapping[str, Any], *args: Any, where: str) -> Any:
  """`build(*args, **options)`, once the options' names and types have been checked against the signature.

  Known types are int, float (an int will do), bool, str, None, Literal, tuples and unions of these; an argument
  of any other type, or without annotation, is passed on unchecked. Lists become tuples.

  Args:
    build: a function that takes its options as keyword-only arguments.
    options: their values; options that are left out have their default.
    *args: positional arguments, unchecked.
    where: the path of the options, such as `config.task`, with which error messages start.

  Raises:
    ConfigError: unknown, missing or mistyped option, or a ValueError of `build` itself.
  """
  converted = _check(build, options, where)
  for name, parameter in _options(build).items():
    if name not in converted and parameter.default is inspect.Parameter.empty:
      raise ConfigError(f"{where}.{name}: missing; {_title(build)} has no default for it")
  try:
    return build(*args, **converted)
  except ConfigError:
    raise  # of a section within; it names its field
  except ValueError as error:
    raise ConfigError(f"{where}: {error}") from error


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
      reason = f"no {path.replace('.', '/')}.py; {_did_you_mean(name, choices(package))}there are: "
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
    if not wrapping:
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
  wrappings = {wrapper: values.pop(wrapper) for wrapper in WRAPPERS.get(package, ()) if values.get(wrapper)}
  found = {"name": name, **_all_options(module(package, str(name), where=f"{where}.name").build, values, where)}
  for wrapper, wrapping in wrappings.items():
    found[wrapper] = _all_options(_wrap(package, wrapper), wrapping, f"{where}.{wrapper}")
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
  values = _all_options(function, values, where)
  annotations = _annotations(function)
  return {o: _placeholder(annotations[o]) if value is None else value for o, value in values.items()}


def _all_options(function: Callable[..., Any], values: Mapping[str, Any], where: str) -> dict[str, Any]:
  """All options of a function: the values given, else its defaults, else None."""
  values = _check(function, {**defaults(function), **values}, where)
  return {option: values.get(option) for option in _options(function)}


def _wrap(package: str, wrapper: str) -> Callable[..., Any]:
  return importlib.import_module(f"lopt.{package}.{wrapper}").wrap


def load(path: str | Path) -> types.ModuleType:
  """The config file `path` as a module, whose `get_config(choices)` returns a configuration.

  With it one config file builds on another wherever both lie, without a change of sys.path.
  """
  spec = importlib.util.spec_from_file_location(Path(path).stem, path)
  assert spec is not None
  assert spec.loader is not None
  found = importlib.util.module_from_spec(spec)
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
    f"{name}: {there.get(name, 'absent')!s} (there) != {here.get(name, 'absent')!s} (here)"
    for name in {**there, **here}
    if there.get(name, "absent") != here.get(name, "absent")
  ]


def define_flag(name: str, default: str | None, help_string: str) -> flags.FlagHolder[Any]:
  """`DEFINE_config_file` that takes names, and exits with one line where `--<name>.field=value` is wrong.

  Because ml_collections applies these already here to the default file, and answers with its whole traceback.

  Args:
    name: of the flag.
    default: the path of a configuration, or its name: that of a file in the folder `configs` beside the script.
    help_string: of the flag.
  """
  folder = Path(sys._getframe(1).f_globals["__file__"]).parent / "configs"
  named = re.compile(rf"(--?{name}=)?(\w+)(:.*)?")

  def path(value: str) -> str:
    found = named.fullmatch(value)
    if not found:
      return value
    if not (folder / f"{found[2]}.py").exists():
      there = ", ".join(sorted(x.stem for x in folder.glob("*.py")))
      raise ConfigError(f"--{name}: no configuration {found[2]!r}; there are: {there}; or give the path of a file")
    return f"{found[1] or ''}{folder / found[2]}.py{found[3] or ''}"

  with _exit_with_one_line(sys.argv[0]):
    sys.argv[1:] = [path(x) if x.lstrip("-").startswith(f"{name}=") else x for x in sys.argv[1:]]
    return config_flags.DEFINE_config_file(name, None if default is None else path(default), help_string)


def parse_flags(argv: list[str]) -> list[str]:
  """For `app.run(main, flags_parser=parse_flags)`: exits with one line where a flag or the config file is wrong."""
  with _exit_with_one_line(argv[0]):
    rest = flags.FLAGS(argv)
    for flag in flags.FLAGS:
      getattr(flags.FLAGS[flag].value, "lock", None)  # fails where the config file could not be read
    return rest


@contextlib.contextmanager
def _exit_with_one_line(program: str) -> Iterator[None]:
  try:
    yield
  except (flags.Error, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
    text = str(error.args[-1]).strip()
    if isinstance(error, (AttributeError, KeyError)):  # how ml_collections says so
      line = f"the configuration has no such field: {' '.join(text.split())}"
    else:
      line = text.splitlines()[-1].strip()  # of an error in the config file: what precedes it is the traceback
    sys.exit(f"{Path(program).name}: {line.removeprefix(f'{ConfigError.__module__}.ConfigError: ')}")


def _options(build: Callable[..., Any]) -> dict[str, inspect.Parameter]:
  parameters = inspect.signature(build).parameters.items()
  return {name: p for name, p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _annotations(build: Callable[..., Any]) -> dict[str, Any]:
  annotations = typing.get_type_hints(build)
  return {name: annotations.get(name, Any) for name in _options(build)}


def _check(build: Callable[..., Any], options: Mapping[str, Any], where: str) -> dict[str, Any]:
  """The options with their types as annotated, all known to `build`."""
  annotations = _annotations(build)
  converted = {}
  for name, value in options.items():
    if name not in annotations:
      takes = f"{_title(build)} takes: {', '.join(annotations) or 'no options'}"
      raise ConfigError(f"{where}.{name}: unknown field; {_did_you_mean(name, annotations)}{takes}")
    try:
      converted[name] = _convert(value, annotations[name])
    except TypeError:
      raise ConfigError(f"{where}.{name}: {value!r} is not {_describe(annotations[name])}") from None
  return converted


def _convert(value: Any, annotation: Any) -> Any:
  """`value` as the annotation has it: ints become floats and lists tuples. Raises TypeError if it is no such."""
  origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
  if origin in (typing.Union, types.UnionType):
    for argument in arguments:
      with contextlib.suppress(TypeError):
        return _convert(value, argument)
    raise TypeError
  if origin is Literal:
    ok = any(value == argument and type(value) is type(argument) for argument in arguments)
  elif origin is tuple:
    ok = isinstance(value, (list, tuple))
    if ok and arguments[1:] == (...,):
      return tuple(_convert(item, arguments[0]) for item in value)
    if ok and len(value) == len(arguments):
      return tuple(map(_convert, value, arguments))
    ok = False
  elif annotation is float:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool)
    value = float(value) if ok else value
  elif annotation is int:
    ok = isinstance(value, int) and not isinstance(value, bool)
  elif annotation in (bool, str, types.NoneType):
    ok = isinstance(value, annotation)
  else:
    ok = True
  if not ok:
    raise TypeError
  return value


def _describe(annotation: Any) -> str:
  """The annotation in words, with its article."""
  origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
  if origin in (typing.Union, types.UnionType):
    return " or ".join(map(_describe, arguments))
  if origin is Literal:
    return f"one of {', '.join(map(repr, arguments))}"
  if annotation is types.NoneType:
    return "None"
  name = annotation.__name__ if isinstance(annotation, type) and origin is None else str(annotation)
  return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _placeholder(annotation: Any) -> Any:
  """A field without a value that still has a type, so that a flag can set it."""
  kinds = [kind for kind in typing.get_args(annotation) or (annotation,) if kind is not types.NoneType]
  kind = typing.get_origin(kinds[0]) or kinds[0]
  return config_dict.placeholder(kind if isinstance(kind, type) else object)


def _did_you_mean(name: str, names: Iterable[str]) -> str:
  close = difflib.get_close_matches(name, list(names), n=1)
  return f"did you mean {close[0]!r}? " if close else ""


def _title(build: Callable[..., Any]) -> str:
  module_name = build.__module__.rpartition(".")[2]
  return f"{module_name}.{build.__qualname__}".removeprefix("__main__.")


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
  if isinstance(value, dict):
    for key, item in value.items():
      yield from _leaves(item, f"{name}.{key}" if name else key)
  else:
    yield name, value
