# %% [markdown]
# # An optimizer for tasks of one's own
#
# A notebook for VS Code, Spyder and Jupyter (by jupytext), which also runs as it is:
# `python experiments/examples/notebook.py`. It takes one or two minutes on two CPU cores. The tasks are linear
# regressions, whose parameters are a tree of two arrays.

# %%
import signal

import jax
import jax.numpy as jnp

import lopt
from lopt import base

# %% [markdown]
# A task family is four functions. They are compiled, so all randomness comes from their keys, and all tasks of a
# family have arrays of the same shapes. Losses should be about 1 where nothing was learned.


# %%
def sample(key):
  return jax.random.normal(key, (8,)) / 8**0.5  # what distinguishes a task: the weights to be found


def init(key, weights):
  return {"w": jnp.zeros(8), "b": jnp.zeros(())}


def batch(key, weights, split):
  x = jax.random.normal(key, (32, 8))
  return x, x @ weights + 0.5


def loss(params, key, batch, weights):
  x, y = batch
  return jnp.mean(jnp.square(x @ params["w"] + params["b"] - y)), {}


family = base.TaskFamily(sample, init, batch, loss)

# %% [markdown]
# The notebook's stop button, or Ctrl-C, stops meta-training: the outer step under way is finished and saved. Here
# the first run does that to itself.

# %%
settings = {
  "workdir": "runs/notebook",
  "num_outer_steps": 100,
  "periodic_evaluation": {"every": 50, "num_tasks": 4, "num_seeds": 1, "num_steps": 100},
  "evaluation": {"num_tasks": 4, "num_seeds": 2, "num_steps": 100},
}


def stop(step, metrics):
  if step == 50:
    signal.raise_signal(signal.SIGINT)  # as the stop button does


try:
  lopt.meta_train(family, **settings, on_step=stop)
except KeyboardInterrupt as stopped:
  print(stopped)

# %% [markdown]
# The same call goes on where it was, and gives the same weights, bit for bit, as a run that was not stopped.

# %%
run = lopt.meta_train(family, **settings)

# %% [markdown]
# How good is it? On tasks that it never saw, beside what comes with lopt, AdamW and Muon, all
# with tuned learning rates:

# %%
result = lopt.evaluate(
  {"mine": run.optimizer, "shipped": lopt.load("tensor_mlp")},
  family,
  num_tasks=4,
  num_seeds=2,
  num_steps=100,
)
print(result.table())

# %%
result.plot()

# %% [markdown]
# In a training loop it is an Optax transformation, here and, by `lopt.load("runs/notebook")`, anywhere else.

# %%
tx = run.optimizer(num_steps=100)
params = init(jax.random.key(0), None)
state = tx.init(params)
