"""Meta-trains an MLP optimizer by PES on random quadratics: no data, quick, good for trying things out.

    python experiments/meta_train.py --config=experiments/configs/quadratics.py --workdir=runs/quadratics

Takes: TODO on 2 CPU cores. Result: TODO.
"""

import pathlib

import ml_collections

from lopt import configuration

digits = configuration.load(pathlib.Path(__file__).with_name("digits.py"))


def get_config(choices: str = "") -> ml_collections.ConfigDict:
  config = digits.get_config(f"task=quadratic,{choices}")  # as there, but for:
  config.num_outer_steps = 500
  return config
