"""Meta-trains a learned direction by PES on random quadratics: no data, quick, good for trying things out.

    python experiments/meta_train.py --config=experiments/configs/quadratics.py --workdir=runs/quadratics

Takes: two minutes on 2 CPU cores. Result, on 8 held-out tasks: tuned AdamW needs 6.9 (5.2 to 8) times as many steps
to the same final loss, θ = 0 1.6 times as many; but Muon half as many. All converge, to 1e-10 or 1e-14 in 200 steps.
"""

import pathlib

import ml_collections

from lopt import configuration

digits = configuration.load(pathlib.Path(__file__).with_name("digits.py"))


def get_config(choices: str = "") -> ml_collections.ConfigDict:
  config = digits.get_config(f"task=quadratic,{choices}")  # as there, but for:
  config.num_outer_steps = 500
  return config
