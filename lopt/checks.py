"""Checks of settings, whose errors name the field, its value and what it must be."""

from collections.abc import Collection


def counts(**values: int | None) -> None:
  """Raises ValueError that names the first count below 1; None is left to be chosen."""
  for name, value in values.items():
    if value is not None and value < 1:
      raise ValueError(f"{name}: must be at least 1, not {value}")


def require(condition: bool, name: str, value: object, what: str) -> None:
  """Raises ValueError that says what `name` must be, unless the condition holds."""
  if not condition:
    raise ValueError(f"{name}={value!r}: must be {what}")


def one_of(name: str, value: object, known: Collection[str]) -> None:
  """Raises ValueError that lists what is known, unless the value is one of it."""
  require(value in known, name, value, f"one of {', '.join(known)}")


def some_of(name: str, chosen: Collection[str], known: Collection[str]) -> None:
  """Raises ValueError that lists what is known, unless there is a choice and all of it is known."""
  require(len(chosen) > 0 and set(chosen) <= set(known), name, chosen, f"one or more of {', '.join(known)}")


def printable(text: str) -> str:
  """The text as one line to print that may quote a stranger's file: nothing that acts on a terminal, no megabytes."""
  line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))
  return line if len(line) <= 600 else f"{line[:600]}..."
