"""Compares the optimizer that comes with lopt with Celo, as published, on held-out suites.

    python experiments/benchmarks/celo.py --weights=theta.state --suite=fresh,data,architecture,loss

A. Moudgil, B. Knyazev, G. Lajoie, E. Belilovsky, "Celo: Training versatile learned optimizers on a compute diet",
TMLR 2025 (arXiv:2501.12670). The weights do not come with lopt: they are algoperf/submissions/celo/theta.state in
github.com/amoudgl/celo (149 KB; MIT licence), or theta.state in huggingface.co/amoudgl/celo.

`tensor_mlp` is a direction, whose learning rate is tuned for each task as those of AdamW and Muon are; tables also
have it at the rate that it recommends, untuned. Celo decides on its step sizes by itself and is told the number of
steps. Suites are in lopt/evaluation/suites.py. Writes, for each of them, <suite>/table.md and a page
<suite>/report.html to `--output`. `fresh` with --num_tasks=2 --num_seeds=2 takes a quarter of an hour on two CPU
cores. What came out: experiments/notes/celo.md.
"""

import functools
import shlex
import sys
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from absl import flags, logging
from jaxtyping import Float

import lopt
from lopt import base, command_line
from lopt.architectures import published, published_celo
from lopt.evaluation import baselines, evaluate, report, suites
from lopt.outer import parallel
from lopt.runs import files

WEIGHTS = flags.DEFINE_string("weights", None, "The published file theta.state.", required=True)
SUITE = flags.DEFINE_list("suite", ["fresh"], "Held-out suites, by commas.")
BASELINES = flags.DEFINE_list("baselines", ["adamw", "muon"], "Functions of lopt/evaluation/baselines.py.")
NUM_TASKS = flags.DEFINE_integer("num_tasks", 4, "Tasks of each family.", 1)
NUM_SEEDS = flags.DEFINE_integer("num_seeds", 3, "Runs of each task.", 1)
SEED = flags.DEFINE_integer("seed", 0, "Which tasks and runs.", 0)
CACHE = flags.DEFINE_string("cache", "runs/evaluation", "Folder of runs that were done; empty for none.")
OUTPUT = flags.DEFINE_string("output", "runs/benchmarks/celo", "Folder of the tables.")

NDARRAY = 1  # Flax's type of a msgpack extension


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.WARNING)
  parallel.setup()
  optimizers: dict[str, Any] = {
    "tensor_mlp": lopt.load("tensor_mlp"),
    "celo": (published_celo.build(), read_theta(WEIGHTS.value)),
  }
  shipped, folder = optimizers["tensor_mlp"], Path(OUTPUT.value)
  pairs = {**optimizers, "tensor_mlp": (shipped.architecture, shipped.theta)}
  options = {
    "settings": {"num_tasks": NUM_TASKS.value, "num_seeds": NUM_SEEDS.value},
    "baselines": baselines.named(BASELINES.value),
    "cache_folder": CACHE.value or None,
    "progress": functools.partial(print, flush=True),
  }
  about = evaluate.about(optimizers, {"command": shlex.join(["python", *sys.argv])})
  everything = {}
  # All are built before the first runs, so that a missing data set is known at once.
  for suite, members in {name: suites.build(name, seed=SEED.value) for name in SUITE.value}.items():
    result = evaluate.Result(evaluate.compare({suite: members}, pairs, **options)[suite], about)
    result.report(folder / suite)
    table = result.table()
    files.write_atomically(folder / suite / "table.md", table + "\n")
    print(f"\n{suite}\n\n{table}\n", flush=True)
    everything |= {f"{suite}: {name}": compared for name, compared in result.comparisons.items()}
  if len(SUITE.value) > 1:
    print(report.table_of_all(everything), "", sep="\n")
  print(*(report.verdict_of_all(everything, name) for name in optimizers), sep="\n")


def read_theta(path: str | Path) -> base.Theta:
  """θ of `published_celo.build()` from the published file.

  Raises:
    OSError: It cannot be read.
    ValueError: It is not what Flax writes, or not Celo's weights.
  """
  data = Path(path).read_bytes()
  try:
    tree = msgpack.unpackb(data, ext_hook=_array)
  except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
    raise ValueError(f"{path}: not a file of arrays as Flax writes it: {error}") from error
  if not isinstance(tree, dict):
    raise ValueError(f"{path}: has no dictionary of arrays")
  try:
    return published.celo(tree)
  except (ValueError, TypeError) as error:
    raise ValueError(f"{path}: {error}") from error


def _array(code: int, data: bytes) -> Float[np.ndarray, "..."]:
  """An array as Flax packs it: shape, name of the dtype, and bytes in the order of C. Nothing in it is executed."""
  if code != NDARRAY:
    raise ValueError(f"an extension of type {code}, which is not of an array")
  shape, dtype, content = msgpack.unpackb(data)
  if dtype != "float32":
    raise ValueError(f"an array of {dtype!r}, not of float32")
  return np.frombuffer(content, "<f4").reshape(shape)


if __name__ == "__main__":
  command_line.run(main, again="runs that were done are in --cache", errors=(ValueError,))
