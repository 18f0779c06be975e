"""Final losses with the state of an optimizer in bfloat16 between steps, against float32, on the suite `fresh`.

    python experiments/benchmarks/state_precision.py [--optimizer=tensor_mlp] [--num_steps=200]

Both see the same 16 tasks, first parameters and batches, at the recommended learning rate. Printed for each family:
the median of the final losses, means over the last tenth of the steps, and the mean of log((bfloat16 + f) /
(float32 + f)), f = 1e-4, with its standard error.
"""

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import lopt
from lopt import command_line, configuration, inner_training
from lopt.evaluation import suites
from lopt.outer import parallel

OPTIMIZER = flags.DEFINE_string("optimizer", "tensor_mlp", "a trained optimizer: a name, file or work directory")
NUM_STEPS = flags.DEFINE_integer("num_steps", 200, "steps of each run", lower_bound=10)
NUM_TASKS = 16
FLOOR = 1e-4


def final_losses(family, tx, num_steps):
  def run(key):
    task_key, params_key, steps_key = jax.random.split(key, 3)
    task_params = family.sample(task_key)
    params = family.init(params_key, task_params)

    def step(carry, i):
      params, state = carry
      step_key = jax.random.fold_in(steps_key, i)
      params, state, loss = inner_training.train_step(family, tx, step_key, params, state, task_params)
      return (params, state), family.normalize(loss, task_params)

    _, losses = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(num_steps))
    return jnp.mean(losses[-num_steps // 10 :])

  keys = jax.random.split(jax.random.key(0), NUM_TASKS)
  return np.asarray(jax.jit(lambda keys: jax.lax.map(run, keys, batch_size=8))(keys))


def main(argv):
  del argv
  parallel.setup()
  optimizer, num_steps = lopt.load(OPTIMIZER.value), NUM_STEPS.value
  print(f"{'family':14} {'float32':>9} {'bfloat16':>9} {'mean log ratio':>16}")
  for name, section in suites.FRESH.items():
    family = configuration.build("tasks", section, where=name)
    full, half = (
      final_losses(family, optimizer(num_steps=num_steps, state_dtype=dtype), num_steps)
      for dtype in (jnp.float32, jnp.bfloat16)
    )
    ratio = np.log((half + FLOOR) / (full + FLOOR))
    error = np.std(ratio, ddof=1) / len(ratio) ** 0.5
    print(f"{name:14} {np.median(full):9.5f} {np.median(half):9.5f} {np.mean(ratio):8.3f} ± {error:.3f}", flush=True)


if __name__ == "__main__":
  command_line.run(main)
