"""Meta-trains an MLP optimizer by PES on a mixture of task families with arrays of different shapes.

    python experiments/meta_train.py --config=experiments/configs/mixture.py --workdir=runs/mixture

Small classifiers of digits (wide, deep, with noisy labels and little data), some reparametrised, and closed-form
surfaces; needs no network. What is held out from it, and along which axes: `../suites.py`.

Takes: about a quarter of an hour on 2 CPU cores (estimated from 300 outer steps, which took two and a half minutes,
and a minute and a half for the comparison). Result of these 300 outer steps, on 2 held-out tasks a family: as good as
tuned Adam on the plain and the noisy classifiers, worse on the deep ones and on surfaces, and all runs diverge on the
reparametrised ones, for which this architecture's steps have one size for all tensors.
"""

import pathlib

import ml_collections

from lopt import configuration

digits = configuration.load(pathlib.Path(__file__).with_name("digits.py"))

MLP = {"name": "mlp_classifier", "dataset": "digits", "min_classes": 5, "batch_size": 32}
FAMILIES = {
  "mlp": MLP,
  "deep_mlp": {**MLP, "hidden_sizes": (16, 16, 16)},
  "noisy_mlp": {**MLP, "label_noise": (0.0, 0.3), "data_fraction": (0.1, 1.0)},
  "reparametrized_mlp": {**MLP, "augmentation": {"reparametrization": (1e-3, 1e3)}},
  "surfaces": {"name": "surfaces"},
}
WEIGHTS = {"mlp": 2.0, "deep_mlp": 1.0, "noisy_mlp": 1.0, "reparametrized_mlp": 1.0, "surfaces": 1.0}


def get_config(choices: str = "") -> ml_collections.ConfigDict:
  config = digits.get_config(choices)  # as there, but for:
  families = {name: {**section, "weight": WEIGHTS[name]} for name, section in FAMILIES.items()}
  config.task = ml_collections.ConfigDict({"name": "mixture", "families": families})
  if "num_pairs" in config.estimator:
    config.estimator.num_pairs = 16  # of each family
  config.periodic_evaluation.num_tasks = 4
  config.evaluation.num_tasks = 4
  return config
