"""Held-out suites: tasks that meta-training never touches, by the axis along which an optimizer has to generalise.

    python experiments/evaluate.py --optimizer=runs/mixture --suite=architecture,horizon

The axes are seen from `FRESH`, on which the shipped optimizers are trained. A suite is `{member: task section}`;
`num_steps` in a section is the length of its runs, `num_tasks` how many are drawn, `num_seeds` how often each is run.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from lopt import base, checks, configuration
from lopt.evaluation import inner_runs

MLP = {"name": "mlp_classifier", "dataset": "digits", "min_classes": 5, "batch_size": 32}
FRESH = {
  "mlp": {**MLP, "hidden_sizes": (16, 16)},
  "deep_mlp": {**MLP, "hidden_sizes": (12, 12, 12, 12)},
  "noisy_mlp": {**MLP, "hidden_sizes": (16,), "label_noise": (0.0, 0.3), "data_fraction": (0.1, 1.0)},
  "cnn": {"name": "cnn_classifier", "dataset": "digits", "channels": (4, 8), "batch_size": 16},
  "autoencoder": {
    "name": "mlp_autoencoder",
    "dataset": "digits",
    "hidden_sizes": (16,),
    "latent_size": 4,
    "batch_size": 32,
  },
  "rnn_language": {"name": "rnn_language_model", "width": 16, "context": 8, "batch_size": 8},
}
"""The families of meta-training (`experiments/configs/mixture.py`), with fresh tasks and seeds."""

FEWER = {"num_tasks": 4}  # where a run takes long
FEWEST = {"num_tasks": 3}  # of the largest networks and the longest runs
# all of the data, initial weights and losses as people have them
USUAL = {"weight_scale": (1.0, 1.0), "loss_scale": (1.0, 1.0), "num_tasks": 1, "num_steps": 500}
IMAGES = {"dataset": "fashion_mnist", "resolution": None, "batch_size": 64, "activations": ("relu",), **USUAL}
CLASSES = {**IMAGES, "min_classes": 10, "input_scale": (1.0, 1.0)}
REAL = {"num_steps": 2_000}  # 0.8 and 0.3 million parameters: for an accelerator
TEXT = {"name": "transformer_language_model", "num_heads": 4, "part": (1.0, 1.0), **USUAL}
RESNET = {"name": "resnet_classifier", **CLASSES}
REPARAMETRIZED = {"augmentation": {"reparametrization": (1e-3, 1e3)}}

DEFAULTS = {"seed": 0, "num_tasks": 8, "num_seeds": 5, "num_steps": 200}
BEYOND = 5
"""How many times as long the runs are that show what becomes of an optimizer beyond its training horizon."""

ALL: dict[str, dict[str, dict[str, Any]]] = {
  "fresh": FRESH,
  "data": {
    "mnist": {**MLP, "dataset": "mnist"},
    "fashion_mnist": {**MLP, "dataset": "fashion_mnist"},
    "fashion_mnist_14": {**MLP, "dataset": "fashion_mnist", "resolution": 14},
  },
  "size": {
    "wider": {**MLP, "hidden_sizes": (128,), **FEWEST},
    "wider_and_deeper": {**MLP, "hidden_sizes": (128, 128), **FEWEST},
    "deeper": {**MLP, "hidden_sizes": (32, 32, 32, 32), **FEWEST},
  },
  "horizon": {
    "5_times": {**MLP, "num_steps": 1_000, **FEWEST, "num_seeds": 2},
    "25_times": {**MLP, "num_steps": 5_000, **FEWEST, "num_seeds": 2},
  },
  "architecture": {
    "resnet": {"name": "resnet_classifier", **FEWER},
    "transformer": {"name": "vision_transformer", **FEWER},
  },
  "loss": {
    "vae": {"name": "mlp_vae", **FEWER},
    "transformer_language": {"name": "transformer_language_model", **FEWER},
  },
  "middle_size": {  # transformers of 31,000 and 113,000 parameters
    "width_32": {**TEXT, "width": 32, "context": 32, "batch_size": 16, "num_steps": 1_000},
    "width_64": {**TEXT, "width": 64, "context": 64, "batch_size": 32, "num_steps": 1_000},
  },
  "practical": {  # 50,000 to 270,000 parameters, full resolution, usual batches
    "mlp": {"name": "mlp_classifier", "hidden_sizes": (256, 256), **CLASSES, "batch_size": 128},
    "cnn": {"name": "cnn_classifier", "channels": (32, 64), **CLASSES},
    "resnet": {**RESNET, "resolution": 14, "channels": (16, 32, 64)},
    "vision_transformer": {
      "name": "vision_transformer",
      "patch_size": 4,
      "width": 64,
      "layers": 2,
      "heads": 4,
      **CLASSES,
    },
    "autoencoder": {"name": "mlp_autoencoder", "hidden_sizes": (128,), "latent_size": 16, **IMAGES},
    "rnn_language": {
      "name": "rnn_language_model",
      "width": 128,
      "context": 32,
      "batch_size": 32,
      "part": (1.0, 1.0),
      **USUAL,
    },
  },
  "real_size": {
    "transformer_language": {**TEXT, "width": 128, "num_layers": 4, "context": 64, "batch_size": 32, **REAL},
    "resnet": {**RESNET, "dataset": "cifar10", "channels": (32, 64, 128), **REAL},
  },
  "reparametrized": {
    "mlp": {**MLP, **REPARAMETRIZED},
    "cnn": {"name": "cnn_classifier", **REPARAMETRIZED, **FEWER},
  },
}

LARGE = ("middle_size", "practical", "real_size")
"""Suites that take hours without an accelerator: not among `--suite=all`."""


class Member(NamedTuple):
  """Tasks to compare on."""

  family: base.TaskFamily
  options: dict[str, Any]  # of `held_out.compare`: how many tasks and seeds, how many steps


def build(name: str, *, seed: int | None = None, only: Collection[str] = ()) -> dict[str, Member]:
  """The members of a suite, or `only` some, each with a seed of its own that comes from `seed`.

  Args:
    name: Of `ALL`.
    seed: None: the suites' default.
    only: Names of members; none: all.

  Raises:
    ConfigError: There is no such suite, or it has no such member.
  """
  if name not in ALL:
    raise configuration.ConfigError(f"suite: no {name!r}; there are: {', '.join(ALL)}")
  seeds = inner_runs.seeds_of_families(DEFAULTS["seed"] if seed is None else seed, ALL[name])
  if unknown := [member for member in only if member not in ALL[name]]:
    raise configuration.ConfigError(f"suite {name}: no {unknown[0]!r}; there are: {', '.join(ALL[name])}")
  members = {}
  for member in only or ALL[name]:
    section = ALL[name][member]
    own = {option: section[option] for option in ("num_steps", "num_tasks", "num_seeds") if option in section}
    task = {option: value for option, value in section.items() if option not in own}
    family = configuration.build("tasks", task, where=f"suites.{name}.{member}")
    members[member] = Member(family, {**DEFAULTS, **own, "seed": seeds[member]})
  return members


def of_configuration(
  config: Mapping[str, Any], *, seed: int | None = None, modules: Collection[str] | None = None
) -> dict[str, dict[str, Member]]:
  """Two suites of the families that a run is meta-trained on: as its comparison has them, and with longer runs.

  Args:
    config: Of the run.
    seed: In place of the configuration's.
    modules: Which modules outside of lopt it may name; None: any. See `configuration.module`.

  Raises:
    ConfigError: It cannot be used.
  """
  if missing := {"task", "evaluation", "seed"} - config.keys():
    lacking = ", ".join(sorted(missing))
    raise configuration.ConfigError(f"the configuration has no {lacking}; say which tasks with --config or --suite")
  families = configuration.task_families(config["task"], where="config.task", modules=modules)
  options = configuration.call(_options, config["evaluation"], where="config.evaluation")
  seeds = inner_runs.seeds_of_families(config["seed"] if seed is None else seed, families)
  own = {name: Member(family, {**options, "seed": seeds[name]}) for name, (family, _) in families.items()}
  longer = {"num_steps": BEYOND * options["num_steps"]}
  beyond = {f"{name}, {BEYOND} times as long": Member(x.family, x.options | longer) for name, x in own.items()}
  return {"held-out tasks": own, "longer runs": beyond}


def _options(*, num_tasks: int, num_seeds: int, num_steps: int) -> dict[str, int]:
  options = {"num_tasks": num_tasks, "num_seeds": num_seeds, "num_steps": num_steps}
  checks.counts(**options)
  return options
