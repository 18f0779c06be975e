"""Meta-trains an optimizer that comes with lopt again: every training that it is the average of, and the average.

    python experiments/reproduce_pretrained.py --name=tensor_mlp

Interrupted, the same command goes on. With `--members=A,B` trainings that are there, files or work directories, are
averaged instead.
"""

import sys
from pathlib import Path

from absl import app, flags

import lopt
from lopt import configuration
from lopt.architectures import tensor_mlp
from lopt.runs import interruption, trained

NAME = flags.DEFINE_string("name", "tensor_mlp", "which")
OUTPUT = flags.DEFINE_string("output", None, "folder; runs/pretrained/NAME where not given")
MEMBERS = flags.DEFINE_list("members", [], "trainings that are there")

pretrained = configuration.load(Path(__file__).parent / "configs" / "pretrained.py")


def average(members: list[trained.TrainedOptimizer], path: Path) -> None:
  """Writes the average: a file with the configurations of all members."""
  sections = [member.config["architecture"] for member in members]
  if others := {section.get("name") for section in sections} - {"tensor_mlp"}:
    sys.exit(
      f"reproduce_pretrained.py: --members: only tensor_mlp's are averaged, not {', '.join(map(str, others))}'s"
    )
  theta, scales = tensor_mlp.average(
    [member.theta for member in members],
    [tuple(section.get("time_scales", (10, 100))) for section in sections],  # as before there was a choice
  )
  size = len(theta["hidden"]["b"])
  config = {
    **members[-1].config,
    "architecture": {**sections[-1], "hidden_size": size, "time_scales": scales},
    "members": [member.config for member in members],
  }
  steps = sum(member.config["num_outer_steps"] for member in members)
  trained.export(path, theta, config, outer_steps=steps)


def main(argv):
  if len(argv) > 1 or NAME.value not in pretrained.SETTINGS:
    sys.exit(f"reproduce_pretrained.py: --name must be one of {', '.join(pretrained.SETTINGS)}")
  folder, members = Path(OUTPUT.value or f"runs/pretrained/{NAME.value}"), [lopt.load(x) for x in MEMBERS.value]
  numbers = [] if members else range(1, len(pretrained.SETTINGS[NAME.value]) + 1)
  for i in numbers:
    config = configuration.plain(pretrained.get_config(f"architecture={NAME.value},member={i}"))
    task, architecture = config.pop("task"), config.pop("architecture")
    members.append(lopt.meta_train(task, architecture, workdir=folder / f"member_{i}", **config).optimizer)
  path = folder / trained.FILENAME
  if len(members) == 1:
    trained.export(path, members[0].theta, members[0].config, outer_steps=members[0].config["num_outer_steps"])
  else:
    average(members, path)
  print(f"{path}: the average of {len(members)} trainings" if len(members) > 1 else f"{path}")


if __name__ == "__main__":
  try:
    app.run(main)
  except trained.LoadError as error:
    sys.exit(f"reproduce_pretrained.py: --members: {error}")
  except interruption.InterruptedRun as error:
    print(f"\nreproduce_pretrained.py: {error}; the same command goes on", file=sys.stderr)
    sys.exit(error.exit_code)
