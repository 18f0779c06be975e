"""Meta-trains a learned direction by PES on small classifiers of handwritten digits; needs no network.

    python experiments/meta_train.py --config=experiments/configs/digits.py --workdir=runs/digits

Takes: 2 to 5 minutes on 2 CPU cores, with the comparison. Result, seeds 0, 1 and 2, each task's best learning rate
(the recommended one): tuned AdamW needs 4.6 (4.6), 4.9 (4.4) and 3.6 (2.4) times as many steps to the same final
training loss, the better of AdamW and Muon 1.6 (1.9), 1.5 (1.4) and 1.4 (1.2) times as many.

Another module is picked after a colon, and every field below is a flag:

    --config=experiments/configs/digits.py:architecture=lstm,estimator=es --config.estimator.sigma=0.02
"""

import ml_collections
from ml_collections import config_dict

from lopt import configuration


def get_config(choices: str = "") -> ml_collections.ConfigDict:
  # First what each section picks by default; its fields are the options of that file's `build`, described there.
  # Listed here is what differs from the defaults, for each name that may be picked.
  config = configuration.choose(
    choices,
    # lopt/architectures/<name>.py: what is learned
    architecture={"tensor_mlp": {"step_multiplier": 0.3, "zero_output": True, "direction": {"learning_rate": 2e-2}}},
    # lopt/tasks/<name>.py: what it learns on
    task={"mlp_classifier": {"dataset": "digits", "min_classes": 5, "batch_size": 32}},
    # lopt/outer/<name>.py: gradients of the meta-loss
    estimator={"pes": {"sigma": 0.1, "num_pairs": 32, "noise_period": 200}, "es": {"sigma": 0.1, "num_pairs": 64}},
  )
  config.initial = config_dict.placeholder(str)  # the trained optimizer to start from; None: a fresh one
  config.trainable = ()  # beginnings of the names of those parts of θ that are trained; (): all
  config.seed = 0  # the only source of randomness
  config.num_outer_steps = 1_200  # updates of θ
  config.meta_loss = "train"  # what the optimizer is to make small: the loss on 'train' or 'validation' batches
  config.objective = "mean_loss"  # of all inner steps, or 'final_loss'
  config.late_power = 2.0  # q of the weights (q + 1) (t/T)^q of the losses; 0: all alike
  config.loss_cap = 10.0  # larger losses count as this in meta-training; None: the task's
  config.log_floor = 1e-3  # f of the meta-loss log(1 + L / f) / log(1 + 1 / f); None: L
  config.step_spread = 2.0  # S: each episode's updates are multiplied by a factor drawn from 1/S to S
  config.balance = False  # whether the families of a mixture get gradients of one size, of like noise
  config.precision = "float32"  # of the inner networks' matrix products; 'bfloat16' is for accelerators

  config.horizon = ml_collections.ConfigDict()  # inner steps of an episode, drawn log-uniformly for each
  config.horizon.minimum = 50
  config.horizon.maximum = 200
  config.horizon.per = "episode"  # or 'step': log-uniform over inner steps, so that no length drowns another

  config.outer_optimizer = ml_collections.ConfigDict()  # AdamW on θ
  config.outer_optimizer.learning_rate = 1e-2  # at its peak; decays along a cosine to the fraction below
  config.outer_optimizer.warmup_steps = 50  # outer steps of linear rise to it
  config.outer_optimizer.final_fraction = 0.03
  config.outer_optimizer.weight_decay = 0.0
  config.outer_optimizer.clip_norm = 1.0  # of the meta-gradient, whole

  config.periodic_evaluation = ml_collections.ConfigDict()  # while meta-training, on tasks of its own
  config.periodic_evaluation.every = 200  # outer steps
  config.periodic_evaluation.num_tasks = 8
  config.periodic_evaluation.num_seeds = 2  # inner runs of each task
  config.periodic_evaluation.num_steps = 200  # of each inner run

  config.evaluation = ml_collections.ConfigDict()  # at the end, on held-out tasks, beside tuned baselines
  config.evaluation.num_tasks = 16  # tasks differ more than runs of one do
  config.evaluation.num_seeds = 3
  config.evaluation.num_steps = 200

  config.checkpoint = ml_collections.ConfigDict()
  config.checkpoint.every = 100  # outer steps
  config.checkpoint.keep = 3  # the newest; older ones are deleted

  config.log_every = 10  # outer steps between two records of the metrics
  return config
