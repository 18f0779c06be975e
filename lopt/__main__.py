"""The command `lopt`: the scripts of `experiments/`, for those who have installed the package alone.

lopt meta-train --config=digits --workdir=runs/digits
lopt evaluate --optimizer=runs/digits
"""

import sys
from pathlib import Path

from lopt import configuration

COMMANDS = {"meta-train": "meta_train.py", "evaluate": "evaluate.py"}
FOLDER = Path(__file__).parent / "commands"  # in a wheel; in a checkout it is another
if not FOLDER.exists():
  FOLDER = Path(__file__).parents[1] / "experiments"


def main() -> None:
  """Runs the command that the first argument names, with the rest as its flags."""
  asked = sys.argv[1] if len(sys.argv) > 1 else "--help"
  if asked in ("--help", "-h", "help"):
    print(f"{(__doc__ or '').strip()}\n\n`lopt COMMAND --help` lists the flags of a command.")
    return
  if asked not in COMMANDS:
    sys.exit(f"lopt: no command {asked!r}; there are: {', '.join(COMMANDS)}")
  sys.argv[:2] = [f"lopt {asked}"]
  configuration.load(FOLDER / COMMANDS[asked], as_main=True)


if __name__ == "__main__":
  main()
