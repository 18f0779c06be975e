"""Meta-trains the optimizers that come with lopt, see `lopt/pretrained/`.

    make reproduce-pretrained NAME=mlp

which is `meta_train.py --config=experiments/configs/pretrained.py:architecture=mlp`: by PES on the mixture of
`mixture.py`, small classifiers of digits (wide, deep, with noisy labels and little data, reparametrised) and
closed-form surfaces. Episodes are of 50 to 1,000 steps; steps of the optimizers are relative to the parameters, and
shrink to zero along half a cosine over the run, so that neither scale nor length is tied to what was seen here. What
is minimised is the logarithm of the loss, so that getting from 0.02 to 0.01 counts as well as getting from 1 to 0.5.

`mlp` has the later settings: late losses count more than early ones, and PES keeps its noise for the whole episode
(NRES, ES-Single), because meta-gradients are then several times less noisy (`../benchmarks/gradient_noise.py`). For
`adafactor_mlp` that made no difference; see WORKSPACE.md, "What the shipped optimizers were chosen from".

The estimators that the paper compares with, at as many inner steps: `:architecture=mlp,estimator=es` is truncated ES,
`:architecture=mlp,estimator=backprop` truncated backpropagation.
"""

import pathlib

import ml_collections

from lopt import configuration

mixture = configuration.load(pathlib.Path(__file__).with_name("mixture.py"))

LONGEST = 1_000
STEP_SIZES = {"relative_floor": 1e-3, "base_steps": 1_000}
ARCHITECTURES = {
  "mlp": {"step_multiplier": 1e-2, "step_sizes": STEP_SIZES},
  "adafactor_mlp": {"step_multiplier": 1e-2, "gradient_scale": 1e3, "step_sizes": STEP_SIZES},
  "lstm": {"step_multiplier": 3e-2, "step_sizes": STEP_SIZES},
}
SETTINGS = {
  "mlp": {"num_outer_steps": 2_000, "log_floor": 1e-3, "late_power": 2.0},
  "adafactor_mlp": {"num_outer_steps": 12_000, "log_floor": 1e-2},
  "lstm": {"num_outer_steps": 500, "log_floor": 1e-2},
}
NOISE_PERIODS = {"mlp": LONGEST, "adafactor_mlp": None, "lstm": None}


def get_config(choices: str = "") -> ml_collections.ConfigDict:
  config = mixture.get_config(choices)  # as there, but for:
  name = config.architecture.name
  if name not in ARCHITECTURES:
    raise configuration.ConfigError(f"architecture={name}: is not pretrained; there are: {', '.join(ARCHITECTURES)}")
  config.architecture = configuration.choose(f"architecture={name}", architecture=ARCHITECTURES).architecture
  config.update(SETTINGS[name])
  config.horizon.maximum = LONGEST
  config.loss_cap = 10.0
  config.outer_optimizer.learning_rate = 3e-3
  estimator = config.estimator
  if "sigma" in estimator:
    estimator.sigma = 0.01
  if estimator.name == "pes":
    estimator.noise_period = NOISE_PERIODS[name]
  if estimator.name == "es":
    estimator.unroll_length = 20
    estimator.num_pairs = 11  # each with a run of its mean: 33 inner runs, where PES has 32
  if estimator.name == "backprop":
    estimator.clip_norm = 1.0  # without, single runs have gradients of 10^19, and θ is lost after 100 outer steps
  return config
