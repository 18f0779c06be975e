"""Meta-trains the optimizers that come with lopt, see `lopt/pretrained/`.

    make reproduce-pretrained NAME=tensor_mlp

which is `meta_train.py --config=experiments/configs/pretrained.py:architecture=tensor_mlp`. All are learned
directions, by PES on the mixture of `mixture.py`, `tensor_mlp` with larger batches, too. Learning rates are drawn
around the recommended one for each episode; what is minimised is the logarithm of the loss, late losses more than
early ones, so that getting from 0.02 to 0.01 counts as well as getting from 1 to 0.5. PES keeps its noise for the
whole episode (NRES, ES-Single), which makes meta-gradients less noisy (`../benchmarks/gradient_noise.py`).

The estimators that the paper compares with, at as many inner steps: `:architecture=mlp,estimator=es` is truncated ES,
`:architecture=mlp,estimator=backprop` truncated backpropagation.
"""

import pathlib
from typing import NamedTuple

import ml_collections

from lopt import configuration, inner_training

mixture = configuration.load(pathlib.Path(__file__).with_name("mixture.py"))

NETWORK = {"step_multiplier": 1.0, "zero_output": True}
TIME_SCALES = (1, 3, 10, 30, 100)
ARCHITECTURES = {
  "tensor_mlp": {**NETWORK, "step_multiplier": 0.3, "time_scales": (10, 100, 1_000)},
  "adafactor_mlp": {**NETWORK, "time_scales": TIME_SCALES},
  "mlp": {**NETWORK, "time_scales": TIME_SCALES, "hidden_sizes": (16, 16)},
  "lstm": {**NETWORK, "hidden_sizes": (16,)},
}
LARGER_BATCHES = {
  "mlp_large": ("mlp", 128),
  "cnn_large": ("cnn", 64),
  "autoencoder_large": ("autoencoder", 128),
  "rnn_large": ("rnn_language", 64),
}
"""Families with gradients of as little noise as networks of usual size have: whose, and how large."""


class Settings(NamedTuple):
  """What differs between them."""

  num_outer_steps: int
  shortest: int = 50  # inner steps
  longest: int = 800
  per: inner_training.Per = "episode"
  learning_rate: float = 2e-2
  step_spread: float = 2.5
  late_power: float = 4.0
  larger_batches: bool = False
  seed: int = 0


SETTINGS = {
  "tensor_mlp": Settings(
    2_600, shortest=100, longest=2_000, per="step", step_spread=1.8, larger_batches=True, seed=21
  ),
  "adafactor_mlp": Settings(600, longest=400, learning_rate=1e-2, step_spread=3.0, late_power=2.0),  # the first
  "mlp": Settings(400),
  "lstm": Settings(1_600),
}
"""By architecture."""


def get_config(choices: str = "") -> ml_collections.ConfigDict:
  config = mixture.get_config(choices)  # but for:
  name = config.architecture.name
  if name not in ARCHITECTURES:
    raise configuration.ConfigError(f"architecture={name}: is not pretrained; there are: {', '.join(ARCHITECTURES)}")
  settings = SETTINGS[name]
  architecture = {**ARCHITECTURES[name], "direction": {"learning_rate": settings.learning_rate}}
  config.architecture = configuration.choose(f"architecture={name}", architecture={name: architecture}).architecture
  if settings.larger_batches:
    for family, (like, batch_size) in LARGER_BATCHES.items():
      config.task.families[family] = {**config.task.families[like].to_dict(), "batch_size": batch_size}
  config.seed = settings.seed
  config.num_outer_steps = settings.num_outer_steps
  config.horizon = {"minimum": settings.shortest, "maximum": settings.longest, "per": settings.per}
  config.step_spread = settings.step_spread
  config.late_power = settings.late_power
  estimator = config.estimator
  if "sigma" in estimator:
    estimator.sigma = 0.1
  if estimator.name == "pes":
    estimator.noise_period = settings.longest
  if estimator.name == "es":
    estimator.unroll_length = 20
    estimator.num_pairs = 11  # each with a run of its mean: 33 inner runs, where PES has 32
  if estimator.name == "backprop":
    estimator.clip_norm = 1.0  # without, single runs have gradients of 10^19, and θ is lost after 100 outer steps
  return config
