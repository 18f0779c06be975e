"""What a run is, as a hash of all that it computes: runs that were done are found again by it."""

import functools
import hashlib
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from lopt import base, inner_training
from lopt.base import PRNGKey, PyTree, TaskFamily, Theta
from lopt.evaluation import baselines, inner_runs
from lopt.evaluation.inner_runs import Rated
from lopt.outer import parallel, unrolls


def of_family(family: TaskFamily) -> str:
  """A hash of all that a family computes: its functions as compiled, with the data that they hold."""

  def everything(key: PRNGKey) -> PyTree:
    task_params = family.sample(key)
    params = family.init(key, task_params)
    batches = {split: family.batch(key, task_params, split) for split in ("train", "test")}
    loss_and_gradients = jax.value_and_grad(family.loss, has_aux=True)
    (loss, metrics), gradients = loss_and_gradients(params, key, batches["train"], task_params)
    return task_params, params, batches, metrics, gradients, family.normalize(loss, task_params)

  program = jax.jit(everything).lower(jax.random.key(0)).as_text()
  return hashlib.sha256(f"{family.loss_cap}{program}".encode()).hexdigest()


def of_optimizer(family: TaskFamily, rated: Rated, theta: Theta, settings: tuple[float | None, ...]) -> str:
  """A hash of all that an optimizer does to parameters of a family: its update as compiled, θ, and these settings."""

  def update(theta: Theta, rate: base.Scalar, num_steps: Int[Array, ""], key: PRNGKey) -> PyTree:
    params = family.init(key, family.sample(key))
    tx = rated(theta, rate, num_steps)
    state = tx.init(params)
    return tx.update(params, state, params, value=rate), baselines.evaluation_params(state, params)

  lowered = jax.jit(update).lower(theta, jnp.float32(1), jnp.int32(1), jax.random.key(0)).as_text()
  lowered = re.sub(r"group_id\s*=\s*\d+", "", lowered)  # JAX counts what is to be laid out alike, on and on
  digest = hashlib.sha256(f"{settings}{lowered}".encode())
  for leaf in jax.tree.leaves(theta):
    digest.update(np.asarray(leaf).tobytes())
  return digest.hexdigest()


@functools.cache
def of_sources(*files: str) -> str:
  """A hash of the files that say how runs are made, and of these."""
  modules = [module.__file__ or "" for module in (inner_runs, inner_training, unrolls, parallel)]
  return hashlib.sha256(b"".join(Path(path).read_bytes() for path in (*files, *modules))).hexdigest()
