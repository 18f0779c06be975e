"""Functions called with options that come from outside: names, types and defaults are checked against the signature.

Every problem is a `ConfigError` of one line that starts with the field.
"""

import contextlib
import difflib
import inspect
import numbers
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

WRAPPERS = {"architectures": ("step_sizes", "safeguards", "direction"), "tasks": ("augmentation",)}
"""Sections within those of a package, the innermost first, and the modules lopt/<package>/<name>.py whose `wrap` they
are options of."""


class ConfigError(ValueError):
  """A configuration that cannot be used; the message is one line and starts with the field."""


def defaults(build: Callable[..., Any]) -> dict[str, Any]:
  """The options of a build function: its keyword-only arguments that have a default, with those defaults."""
  return {
    name: parameter.default
    for name, parameter in options_of(build).items()
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
  converted = check(build, options, where)
  for name, parameter in options_of(build).items():
    if name not in converted and parameter.default is inspect.Parameter.empty:
      raise ConfigError(f"{where}.{name}: missing; {_title(build)} has no default for it")
  try:
    return build(*args, **converted)
  except ConfigError:
    raise  # of a section within; it names its field
  except ValueError as error:
    raise ConfigError(f"{where}: {error}") from error


def all_options(function: Callable[..., Any], values: Mapping[str, Any], where: str) -> dict[str, Any]:
  """All options of a function: the values given, else its defaults, else None."""
  values = check(function, {**defaults(function), **values}, where)
  return {option: values.get(option) for option in options_of(function)}


def options_of(build: Callable[..., Any]) -> dict[str, inspect.Parameter]:
  """The keyword-only parameters by name."""
  parameters = inspect.signature(build).parameters.items()
  return {name: p for name, p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def annotations_of(build: Callable[..., Any]) -> dict[str, Any]:
  """The types of the options, `Any` where none is said."""
  annotations = typing.get_type_hints(build)
  return {name: annotations.get(name, Any) for name in options_of(build)}


def check(build: Callable[..., Any], options: Mapping[str, Any], where: str) -> dict[str, Any]:
  """The options with their types as annotated, all known to `build`."""
  annotations = annotations_of(build)
  converted = {}
  for name, value in options.items():
    if name not in annotations:
      takes = f"{_title(build)} takes: {', '.join(annotations) or 'no options'}"
      raise ConfigError(f"{where}.{name}: unknown field; {did_you_mean(name, annotations)}{takes}")
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
    ok = isinstance(value, numbers.Real) and not isinstance(value, bool)
    value = float(value) if ok else value
  elif annotation is int:
    ok = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    value = int(value) if ok else value
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


def did_you_mean(name: str, names: Iterable[str]) -> str:
  """The name among these that is nearest, as a question; nothing if none is near."""
  close = difflib.get_close_matches(name, list(names), n=1)
  return f"did you mean {close[0]!r}? " if close else ""


def _title(build: Callable[..., Any]) -> str:
  module_name = build.__module__.rpartition(".")[2]
  return f"{module_name}.{build.__qualname__}".removeprefix("__main__.")
