"""How noisy the meta-gradient of an optimizer that comes with lopt is, by how long PES keeps its noise.

    python experiments/benchmarks/gradient_noise.py --only='^mlp/.*/0.1$'

Cases are FAMILY/NOISE/SIGMA: a family of `adafactor_mlp`'s meta-training; `unroll`, noise that is drawn for each
unroll (PES), or `episode`, noise that is kept to the episode's end (NRES, ES-Single); and σ. θ stays what it is, its
pairs are continued for 280 outer steps, all else as in its configuration. Figures, of the last 240:

- single: the root mean square distance of one estimate from the mean of all;
- block: that of means over 40 estimates in a row, which is what the outer optimizer gets to feel, for estimates in a
  row are not independent;
- signal: the estimate of |E ĝ|² from products of different blocks, so that it may be negative.
"""

import bench

from lopt.evaluation import suites

CASES = [
  f"{family}/{noise}/{sigma}"
  for family in suites.FRESH
  for noise, sigma in (("unroll", 0.1), ("episode", 0.1), ("episode", 0.03))
]
BLOCK, BLOCKS = 40, 6


def measure(case: str) -> bench.Figures:
  import jax
  import numpy as np

  import lopt
  from lopt import configuration, inner_training
  from lopt.outer import late_losses, parallel, pes, vectors

  parallel.setup()
  name, noise, sigma = case.split("/")
  optimizer = lopt.load("adafactor_mlp")
  config = optimizer.config
  task = {"name": "mixture", "families": {name: config["task"]["families"][name]}}  # no need for the others' data
  family, _ = configuration.task_families(task, where="config.task")[name]
  horizon = configuration.call(inner_training.log_uniform_horizon, config["horizon"], where="config.horizon")
  problem = inner_training.build(
    family,
    optimizer.architecture,
    horizon=horizon,
    loss_cap=config["loss_cap"],
    log_floor=config["log_floor"],
    step_spread=config["step_spread"],
  )
  longest = config["horizon"]["maximum"]
  estimator = pes.build(
    late_losses.wrap(problem, config["late_power"]),
    num_pairs=config["estimator"]["num_pairs"],
    sigma=float(sigma),
    noise_period=longest if noise == "episode" else None,
  )

  @jax.jit
  def block(state, keys):
    def outer_step(state, key):
      gradient, state, _ = estimator.estimate(key, optimizer.theta, state)
      return state, vectors.ravel(gradient)[0]

    return jax.lax.scan(outer_step, state, keys)

  state, estimates = estimator.init(jax.random.key(0), optimizer.theta), []
  for key in jax.random.split(jax.random.key(1), 1 + BLOCKS):
    state, gradients = block(state, jax.random.split(key, BLOCK))
    estimates.append(np.asarray(gradients, np.float64))
  estimates = np.stack(estimates[1:])  # the first ones are of particles that have only begun
  means = estimates.mean(axis=1)
  center = means.mean(axis=0)
  spread = lambda x: float(np.sqrt(np.mean(np.sum(np.square(x - center), axis=-1))))
  products = np.sum(np.square(means.sum(axis=0))) - np.sum(np.square(means))
  return {"single": spread(estimates), "block": spread(means), "signal": float(products) / (BLOCKS * (BLOCKS - 1))}


if __name__ == "__main__":
  bench.main(CASES, measure, ["single", "block", "signal"])
