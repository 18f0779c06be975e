"""Meta-trains every architecture on small classifiers of digits, and shows by how much that makes it better.

    python experiments/architectures.py [--only=mlp,celo]

Takes five minutes on 2 CPU cores. A row for each file of lopt/architectures/: meta-parameters, bytes of state
and floating-point operations of an update for each inner parameter (counted on a 64 × 32 matrix: the operations of
the compiled update, and its state), and the mean training loss over 100 steps of held-out tasks, before meta-training
and after 300 outer steps of PES, with 2 standard errors over tasks. Ends with an error unless each loss has become at
least 4 times smaller (`hyperparameters`, which starts as SGD with momentum: 1.3 times; `published_celo`, whose steps
are small: 1.5 times).
"""

import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from lopt import base, command_line, configuration, inner_training
from lopt.evaluation import inner_runs
from lopt.outer import meta_training, parallel, pes
from lopt.runs import files

ONLY = flags.DEFINE_list("only", None, "These architectures only.")
OUTPUT = flags.DEFINE_string("output", "runs/architectures", "Folder of the table.")

FACTOR = 4.0
# The one starts as SGD with momentum, not as a network that does not train yet; the other is for published weights,
# and has their step sizes of 1e-4.
FACTORS = {"hyperparameters": 1.3, "published_celo": 1.5}
OUTER_STEPS = 300
STEPS_PER_CALL = 10
NUM_STEPS = 100
TASK = {"name": "mlp_classifier", "dataset": "digits", "min_classes": 5, "batch_size": 32, "hidden_sizes": (16,)}
# Standard deviation of the perturbations, and learning rate of θ; by the size of an architecture's weights.
SETTINGS = {"hyperparameters": (0.1, 0.1)}
DEFAULT_SETTING = (0.1, 3e-2)


def meta_train(name: str, learned: base.LearnedOptimizer, family: base.TaskFamily) -> tuple[base.Theta, base.Theta]:
  """θ before and after."""
  sigma, learning_rate = SETTINGS.get(name, DEFAULT_SETTING)
  horizon = inner_training.log_uniform_horizon(minimum=20, maximum=NUM_STEPS)
  problem = inner_training.build(family, learned, horizon=horizon)
  estimator = pes.build(problem, num_pairs=32, sigma=sigma, unroll_length=20)
  updates = meta_training.outer_optimizer(OUTER_STEPS, learning_rate=learning_rate, warmup_steps=20)
  trainer = meta_training.build(estimator, learned.init, updates, seed=0, steps_per_call=STEPS_PER_CALL)
  state = trainer.init()
  before = jax.device_get(state.theta)
  with tqdm(total=OUTER_STEPS, desc=name, unit="step", dynamic_ncols=True) as bar:

    def progress(steps: int, metrics: Any) -> None:
      bar.set_postfix_str(f"meta-loss {metrics['meta_loss']:.4f}", refresh=False)
      bar.update(steps)

    state = meta_training.run(trainer, state, 0, OUTER_STEPS, record=lambda step, metrics: None, progress=progress)
  return before, state.theta


def cost(learned: base.LearnedOptimizer) -> tuple[int, float, float]:
  """Meta-parameters; bytes of state and floating-point operations for each inner parameter."""
  theta, params = learned.init(jax.random.key(0)), jnp.ones((64, 32))
  tx = learned.transform(theta, NUM_STEPS)
  state = tx.init(params)
  update = jax.jit(lambda theta, g, s, p: learned.transform(theta, NUM_STEPS).update(g, s, p, value=jnp.float32(1)))
  analysis: Any = update.lower(theta, params, state, params).compile().cost_analysis()
  size = sum(x.size for x in jax.tree.leaves(theta))
  state_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
  return size, state_bytes / params.size, analysis["flops"] / params.size


def main(argv: list[str]) -> None:
  del argv
  parallel.setup()
  family = configuration.build("tasks", TASK, where="task")
  names = ONLY.value or configuration.choices("architectures")
  built = {name: configuration.build("architectures", {"name": name}, where="--only") for name in names}
  rows = [["architecture", "meta-parameters", "state, bytes", "FLOPs", "loss before", "after", "times", "seconds"]]
  rows.append(["---", *["---:"] * 7])
  failed = []
  for name, learned in built.items():
    begun = time.perf_counter()
    train = inner_runs.build_train(family)(inner_runs.as_is(learned))
    runs = inner_runs.every_seed(inner_runs.sample_tasks(family, 0, inner_runs.HELD_OUT, 16), 2)
    both = [train(theta, np.ones((32, 1)), *runs, NUM_STEPS) for theta in meta_train(name, learned, family)]
    losses = np.stack([x.mean_loss.reshape(16, 2).mean(axis=1) for x in both], axis=1)  # [tasks, before and after]
    ratio = losses[:, 0].mean() / losses[:, 1].mean()
    error = 2 * losses.std(axis=0, ddof=1) / np.sqrt(len(losses))
    size, state_bytes, flops = cost(learned)
    cells = [f"{m:.3f} ± {e:.3f}" for m, e in zip(losses.mean(axis=0), error, strict=True)]
    seconds = time.perf_counter() - begun
    rows.append([name, f"{size:,}", f"{state_bytes:.1f}", f"{flops:,.0f}", *cells, f"{ratio:.2f}", f"{seconds:.0f}"])
    failed += [name] if not ratio >= FACTORS.get(name, FACTOR) else []
  table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
  path = Path(OUTPUT.value) / "table.md"
  files.write_atomically(path, table + "\n")
  print(f"\n{table}\n\nThe table is in {path}.")
  if failed:
    sys.exit(f"architectures.py: not as much better than before meta-training as they should be: {', '.join(failed)}")


if __name__ == "__main__":
  command_line.run(main)
