"""Meta-trains an optimizer that comes with lopt further, on a task family of one's own.

    python experiments/examples/fine_tune.py

The tasks are to fit a sine of random frequency and phase with a small network. Writes runs/fine_tuned.safetensors.
With checkpoints and a comparison it is one call:

    lopt.meta_train(sines(), lopt.load("tensor_mlp").architecture, initial="tensor_mlp")
"""

import sys
from pathlib import Path

import haiku as hk
import jax
import jax.numpy as jnp
from tqdm import tqdm

import lopt
from lopt import base, inner_training
from lopt.evaluation import inner_runs
from lopt.outer import meta_training, parallel, pes
from lopt.runs import trained


def sines(batch_size: int = 32) -> base.TaskFamily:
  """Regression of y = sin(f x + φ), with f and φ drawn for each task."""
  network = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([32, 1])(x[:, None])[:, 0]))

  def sample(key: base.PRNGKey) -> base.TaskParams:
    return {"frequency": jax.random.uniform(key, minval=1.0, maxval=4.0), "phase": 6.3 * jax.random.uniform(key)}

  def init(key: base.PRNGKey, task: base.TaskParams) -> base.Params:
    return network.init(key, jnp.zeros(1))

  def batch(key: base.PRNGKey, task: base.TaskParams, split: str) -> base.Batch:
    x = jax.random.uniform(key, (batch_size,), minval=-2.0, maxval=2.0)
    return x, jnp.sin(task["frequency"] * x + task["phase"])

  def loss(params: base.Params, key: base.PRNGKey, batch: base.Batch, task: base.TaskParams):
    x, y = batch
    return 2 * jnp.mean(jnp.square(network.apply(params, x) - y)), {}  # about 1 for a constant

  return base.TaskFamily(sample, init, batch, loss, loss_cap=2.0)


def fine_tune(optimizer: str, path: Path, outer_steps: int) -> tuple[float, float]:
  """Writes the optimizer with new weights; its mean training loss on held-out sines before and after."""
  there = lopt.load(optimizer)
  family, horizon = sines(), inner_training.log_uniform_horizon(minimum=50, maximum=200)
  gradients = pes.build(inner_training.build(family, there.architecture, horizon=horizon), sigma=0.01)
  updates = meta_training.outer_optimizer(outer_steps, learning_rate=3e-3, warmup_steps=10)
  trainer = meta_training.build(gradients, lambda key: there.theta, updates, seed=0, steps_per_call=10)
  with tqdm(total=outer_steps, unit="step") as bar:

    def progress(steps: int, metrics: dict[str, float]) -> None:
      bar.update(steps)

    state = meta_training.run(
      trainer,
      trainer.init(),
      0,
      outer_steps,
      record=lambda step, metrics: None,
      progress=progress,
    )
  trained.export(path, state.theta, there.config, outer_steps=outer_steps)
  measure = inner_runs.build_metrics(family, there.architecture, num_tasks=8, num_seeds=2, num_steps=200, seed=0)
  return measure(there.theta)["mean_loss"], measure(lopt.load(path).theta)["mean_loss"]


if __name__ == "__main__":
  parallel.setup()
  written = Path("runs/fine_tuned.safetensors")
  before, after = fine_tune(*sys.argv[1:] or ["tensor_mlp"], path=written, outer_steps=300)
  print(f"mean training loss on held-out tasks: {before:.3f} before, {after:.3f} after; {written}")
