"""Checks of settings, whose errors name the field, its value and what it must be."""


def counts(**values: int) -> None:
  """Raises ValueError that names the first count below 1."""
  for name, value in values.items():
    if value < 1:
      raise ValueError(f"{name}: must be at least 1, not {value}")


def require(condition: bool, name: str, value: object, what: str) -> None:
  """Raises ValueError that says what `name` must be, unless the condition holds."""
  if not condition:
    raise ValueError(f"{name}={value!r}: must be {what}")
