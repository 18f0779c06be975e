"""Meta-trains a learned direction by PES on a mixture of task families with arrays of different shapes.

    python experiments/meta_train.py --config=experiments/configs/mixture.py --workdir=runs/mixture

All tiny: classifiers of digits (MLPs, deep ones, with noisy labels and little data, convolutions), autoencoders, and
recurrent language models. What is held out from it, and along which axes: `lopt/evaluation/suites.py`.
"""

import pathlib

import ml_collections

from lopt import configuration
from lopt.evaluation import suites

digits = configuration.load(pathlib.Path(__file__).with_name("digits.py"))


def get_config(choices: str = "") -> ml_collections.ConfigDict:
  config = digits.get_config(choices)  # as there, but for:
  families = {name: {**section, "weight": 1.0} for name, section in suites.FRESH.items()}
  config.task = ml_collections.ConfigDict({"name": "mixture", "families": families})
  if "num_pairs" in config.estimator:
    config.estimator.num_pairs = 16  # of each family
  config.balance = True
  config.periodic_evaluation.num_tasks = 4
  config.evaluation.num_tasks = 4
  config.evaluation.num_seeds = 5
  return config
