"""Held-out suites: tasks that meta-training never touches, by the axis along which an optimizer has to generalise.

    python experiments/evaluate.py --optimizer=runs/mixture --suite=architecture,horizon

The axes are seen from `configs/mixture.py`, whose optimizers train small MLP classifiers of digits, and surfaces, for
50 to 200 steps. A suite is `{member: task section}`; `num_steps` in a section is the length of its runs,
`num_tasks` how many are drawn.
"""

import pathlib

import ml_collections

from lopt import configuration

mixture = configuration.load(pathlib.Path(__file__).parent / "configs" / "mixture.py")

MLP = mixture.MLP
FEWER = {"num_tasks": 4}  # where a run takes long
REPARAMETRIZED = {"augmentation": {"reparametrization": (1e-3, 1e3)}}


def get_config() -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.evaluation = {"seed": 0, "num_tasks": 8, "num_seeds": 5, "num_steps": 200}
  config.suites = {
    # The families of meta-training with fresh tasks and seeds.
    "fresh": mixture.FAMILIES,
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
      "cnn": {"name": "cnn_classifier", **FEWER},
      "resnet": {"name": "resnet_classifier", **FEWER},
      "transformer": {"name": "vision_transformer", **FEWER},
    },
    "loss": {
      "autoencoder": {"name": "mlp_autoencoder", **FEWER},
      "vae": {"name": "mlp_vae", **FEWER},
      "rnn_language": {"name": "rnn_language_model", **FEWER},
      "transformer_language": {"name": "transformer_language_model", **FEWER},
    },
    "reparametrized": {
      "mlp": {**MLP, **REPARAMETRIZED},
      "cnn": {"name": "cnn_classifier", **REPARAMETRIZED, **FEWER},
    },
  }
  return config
