"""Held-out suites: tasks that meta-training never touches, by the axis along which an optimizer has to generalise.

    python experiments/evaluate.py --optimizer=runs/mixture --suite=architecture,horizon

The axes are seen from `FRESH`, on which the shipped optimizers are trained, for 50 to 400 steps. A suite is
`{member: task section}`; `num_steps` in a section is the length of its runs, `num_tasks` how many are drawn.
"""

from typing import Any, NamedTuple

from lopt import base, configuration

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
REPARAMETRIZED = {"augmentation": {"reparametrization": (1e-3, 1e3)}}

DEFAULTS = {"seed": 0, "num_tasks": 8, "num_seeds": 5, "num_steps": 200}

ALL: dict[str, dict[str, dict[str, Any]]] = {
  "fresh": FRESH,
  "data": {
    "mnist": {**MLP, "dataset": "mnist"},
    "fashion_mnist": {**MLP, "dataset": "fashion_mnist"},
    "fashion_mnist_14": {**MLP, "dataset": "fashion_mnist", "resolution": 14},
  },
  "size": {
    "wider": {**MLP, "hidden_sizes": (128,)},
    "wider_and_deeper": {**MLP, "hidden_sizes": (128, 128)},
    "deeper": {**MLP, "hidden_sizes": (32, 32, 32, 32)},
  },
  "horizon": {
    "5_times": {**MLP, "num_steps": 1_000},
    "25_times": {**MLP, "num_steps": 5_000},
  },
  "architecture": {
    "resnet": {"name": "resnet_classifier", **FEWER},
    "transformer": {"name": "vision_transformer", **FEWER},
  },
  "loss": {
    "vae": {"name": "mlp_vae", **FEWER},
    "transformer_language": {"name": "transformer_language_model", **FEWER},
  },
  "reparametrized": {
    "mlp": {**MLP, **REPARAMETRIZED},
    "cnn": {"name": "cnn_classifier", **REPARAMETRIZED, **FEWER},
  },
}


class Member(NamedTuple):
  """Tasks to compare on."""

  family: base.TaskFamily
  options: dict[str, Any]  # of `held_out.compare`: how many tasks and seeds, how many steps


def build(name: str) -> dict[str, Member]:
  """The members of a suite.

  Raises:
    ConfigError: There is no such suite.
  """
  if name not in ALL:
    raise configuration.ConfigError(f"suite: no {name!r}; there are: {', '.join(ALL)}")
  members = {}
  for member, section in ALL[name].items():
    own = {option: section[option] for option in ("num_steps", "num_tasks") if option in section}
    task = {option: value for option, value in section.items() if option not in own}
    family = configuration.build("tasks", task, where=f"suites.{name}.{member}")
    members[member] = Member(family, {**DEFAULTS, **own})
  return members
