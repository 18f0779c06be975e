"""Configurations as flags of a command, with one line where a flag is wrong."""

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from lopt.runs import interruption, lock, trained
from lopt.signatures import ConfigError

flags.disclaim_key_flags()  # a flag defined here is its script's, whose --help lists it


def run(
  main: Callable[[list[str]], None],
  *,
  name: str | None = None,
  again: str = "the same command begins anew",
  errors: tuple[type[Exception], ...] = (),
) -> None:
  """`app.run(main)` that ends with one line and an exit code where something is wrong or it is interrupted.

  Args:
    main: takes the script's path, in a list; more than flags no script takes.
    name: of the command, with which the line begins; None: the script's.
    again: what happens if an interrupted one is called once more.
    errors: of its own, that it says in one line.
  """
  name = name or Path(sys.argv[0]).name

  def checked(argv: list[str]) -> None:
    if len(argv) > 1:
      raise ConfigError(f"unexpected argument: {argv[1]}")
    main(argv)

  try:
    with interruption.immediate("stopped by SIGTERM"):
      app.run(checked, flags_parser=_parse_flags)
  except (ConfigError, trained.LoadError, lock.LockedError, OSError, *errors) as error:
    sys.exit(f"{name}: {error}")
  except KeyboardInterrupt as error:
    print(f"\n{name}: {str(error) or 'interrupted'}; {again}", file=sys.stderr, flush=True)
    sys.exit(error.exit_code if isinstance(error, interruption.InterruptedRun) else 130)


def define_flag(
  name: str, default: str | None, help_string: str, *, folder: Path | None = None
) -> flags.FlagHolder[Any]:
  """`DEFINE_config_file` that takes names, and exits with one line where `--<name>.field=value` is wrong.

  Because ml_collections applies these already here to the default file, and answers with its whole traceback.

  Args:
    name: of the flag.
    default: the path of a configuration, or its name.
    help_string: of the flag.
    folder: where configurations are that have names; None: none has one.
  """
  named = re.compile(rf"(--?{name}=)?(\w+)(:.*)?")

  def path(value: str) -> str:
    found = named.fullmatch(value)
    if folder is None or not found:
      return value
    if not (folder / f"{found[2]}.py").exists():
      there = ", ".join(sorted(x.stem for x in folder.glob("*.py")))
      raise ConfigError(f"--{name}: no configuration {found[2]!r}; there are: {there}; or give the path of a file")
    return f"{found[1] or ''}{folder / found[2]}.py{found[3] or ''}"

  with _exit_with_one_line(sys.argv[0]):
    sys.argv[1:] = [path(x) if x.lstrip("-").startswith(f"{name}=") else x for x in sys.argv[1:]]
    return config_flags.DEFINE_config_file(name, None if default is None else path(default), help_string)


def _parse_flags(argv: list[str]) -> list[str]:
  """The rest of `argv`; exits with one line where a flag or the config file is wrong."""
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
    while isinstance(error.args[-1], Exception):  # ml_collections wraps its own
      error = error.args[-1]
    text = str(error.args[-1]).strip()
    if isinstance(error, (AttributeError, KeyError)):  # how ml_collections says so
      line = f"the configuration has no such field: {' '.join(text.split())}"
    else:
      line = text.splitlines()[-1].strip()  # of an error in the config file: what precedes it is the traceback
    sys.exit(f"{Path(program).name}: {line.removeprefix(f'{ConfigError.__module__}.ConfigError: ')}")
