"""Final losses of runs of several lengths, at several learning rates: trained optimizers, their θ = 0, and rivals.

    python experiments/benchmarks/lengths.py --optimizers=tensor_mlp,runs/mine [--lengths=200,1000,4000]
    python experiments/benchmarks/lengths.py --suite=practical --lengths=500,650 --baselines=muon,adamw --num_tasks=1
    python experiments/benchmarks/lengths.py --suite=real_size --families=transformer_language --lengths=2000 \
      --baselines=muon,adamw --rates=0.001,0.003,0.01,0.03 --num_tasks=1 --num_seeds=1

A quick look at a training that may be worth an evaluation: minutes, where `evaluate.py` takes an hour for long runs.
All see the same tasks, first parameters and batches of a suite. Printed for each family and length: the
geometric mean over tasks of the final training loss at each task's best rate (and of the validation loss at its best
one), that over all tasks at every rate, and at the recommended one, nothing tuned, and the share of runs with a
training loss above the cap at every rate.
"""

import functools
import itertools

import jax
import numpy as np
from absl import flags

import lopt
from lopt import command_line
from lopt.evaluation import baselines, inner_runs, measures, suites
from lopt.outer import parallel
from lopt.runs import trained

OPTIMIZERS = flags.DEFINE_list("optimizers", ["tensor_mlp"], "trained optimizers: names, files or work directories")
LENGTHS = flags.DEFINE_list("lengths", ["200", "1000", "4000"], "inner steps")
SUITE = flags.DEFINE_enum("suite", "fresh", list(suites.ALL), "of the tasks")
FAMILIES = flags.DEFINE_list("families", [], "of the suite; all where none is given")
BASELINES = flags.DEFINE_list("baselines", [], "rivals, as of evaluate.py")
RATES = flags.DEFINE_list("rates", ["0.0025", "0.005", "0.01", "0.02", "0.04", "0.08"], "learning rates")
NUM_TASKS = flags.DEFINE_integer("num_tasks", 4, "tasks of each family", 1)
NUM_SEEDS = flags.DEFINE_integer("num_seeds", 2, "runs of each task", 1)
SEED = 77  # other tasks than those that `evaluate.py` reports


def log_mean(losses):
  """[tasks * seeds, rates] -> log-losses, means over seeds, [tasks, rates]."""
  return np.log(losses + measures.ZERO).reshape(NUM_TASKS.value, NUM_SEEDS.value, -1).mean(axis=1)


def row(runs, recommended):
  """What is printed of runs at all rates, of which the recommended one, if any, is the last."""
  tuned = slice(None if recommended is None else -1)
  final, validation = log_mean(runs.final_loss), log_mean(runs.held_out_loss)
  best, best_validation = (np.exp(x[:, tuned].min(axis=1).mean()) for x in (final, validation))
  means = np.exp(final.mean(axis=0))
  at_rates = ", ".join(f"{x:.3g}" for x in means[tuned])
  untuned = "" if recommended is None else f"{means[-1]:.4g} at {recommended:.2g}"
  capped = ", ".join(f"{x:.2g}" for x in runs.diverged.mean(axis=0)[tuned])
  return f"{best:.4g} | {best_validation:.4g} | {at_rates} | {untuned} | {capped}"


def main(argv):
  del argv
  rates, lengths = [float(x) for x in RATES.value], [int(x) for x in LENGTHS.value]
  parallel.setup()
  optimizers = {trained.name_of(path): lopt.load(path) for path in OPTIMIZERS.value}
  rivals = {name: baselines.ALL[name]() for name in baselines.named(BASELINES.value)}
  members = suites.build(SUITE.value, only=FAMILIES.value)
  print(
    f"| family | steps | optimizer | best | validation | at {', '.join(RATES.value)} | recommended | above the cap |"
  )
  print("|---|---:|---|---:|---:|---|---|---|")
  for name, (family, _) in members.items():
    tasks = inner_runs.sample_tasks(family, SEED, inner_runs.HELD_OUT, NUM_TASKS.value)
    tasks, seeds = inner_runs.every_seed(tasks, NUM_SEEDS.value)
    params = jax.eval_shape(family.init, jax.random.key(0), jax.tree.map(lambda x: x[0], tasks.params))
    build = inner_runs.build_train(family, num_held_out_batches=16)

    runs = []  # what, how it trains, θ, the rate that is recommended for a length
    for label, optimizer in optimizers.items():
      architecture = optimizer.architecture
      train = build(inner_runs.at_rate(architecture))  # one program for all lengths, and for θ = 0
      assert architecture.recommended is not None  # `at_rate` has refused what has no direction
      recommended = functools.partial(architecture.recommended, params)
      zero = jax.tree.map(np.zeros_like, optimizer.theta)
      runs += [(label, train, optimizer.theta, recommended), (f"θ = 0 of {label}", train, zero, recommended)]
    for label, rival in rivals.items():
      runs.append((label, build(inner_runs.baseline(rival)), baselines.theta_at(1.0), None))
    for (label, train, theta, recommended), steps in itertools.product(runs, lengths):
      rate = None if recommended is None else float(recommended(steps))
      tried = [*rates, *([] if rate is None else [rate])]
      outcome = train(theta, np.tile(tried, (len(seeds), 1)), tasks, seeds, steps)
      print(f"| {name} | {steps:,} | {label} | {row(outcome, rate)} |", flush=True)


if __name__ == "__main__":
  command_line.run(main, errors=(ValueError,))
