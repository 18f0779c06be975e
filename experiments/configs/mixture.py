"""Meta-trains a learned direction by PES on a mixture of task families with arrays of different shapes.

    python experiments/meta_train.py --config=experiments/configs/mixture.py --workdir=runs/mixture

All tiny: classifiers of digits (MLPs, deep ones, with noisy labels and little data, convolutions), autoencoders, and
recurrent language models. What is held out from it, and along which axes: `../suites.py`.
"""

import pathlib

import ml_collections

from lopt import configuration

digits = configuration.load(pathlib.Path(__file__).with_name("digits.py"))

MLP = {"name": "mlp_classifier", "dataset": "digits", "min_classes": 5, "batch_size": 32}
FAMILIES = {
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


def get_config(choices: str = "") -> ml_collections.ConfigDict:
  config = digits.get_config(choices)  # as there, but for:
  families = {name: {**section, "weight": 1.0} for name, section in FAMILIES.items()}
  config.task = ml_collections.ConfigDict({"name": "mixture", "families": families})
  if "num_pairs" in config.estimator:
    config.estimator.num_pairs = 16  # of each family
  config.balance = True
  config.periodic_evaluation.num_tasks = 4
  config.evaluation.num_tasks = 4
  return config
