"""Trains a Haiku network on handwritten digits with an optimizer that comes with lopt.

python experiments/examples/haiku_loop.py
"""

import sys
from collections.abc import Iterator
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import lopt

IMAGES, LABELS = map(jnp.asarray, load_digits(return_X_y=True))


def train(optimizer: str, num_steps: int) -> Iterator[float]:
  """The training loss of each step."""
  model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([64, 10])(x / 16)))
  params = model.init(jax.random.key(0), IMAGES[:1])
  tx = lopt.load(optimizer)(num_steps=num_steps)
  state = tx.init(params)

  def loss_of(params: Any, batch: jax.Array) -> jax.Array:
    logits = model.apply(params, IMAGES[batch])
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS[batch]).mean()

  @jax.jit
  def step(params: Any, state: Any, key: jax.Array) -> tuple[Any, Any, jax.Array]:
    batch = jax.random.choice(key, len(IMAGES), (64,))
    loss, gradients = jax.value_and_grad(loss_of)(params, batch)
    updates, state = tx.update(gradients, state, params, value=loss)
    return optax.apply_updates(params, updates), state, loss

  for key in jax.random.split(jax.random.key(1), num_steps):
    params, state, loss = step(params, state, key)
    yield float(loss)


if __name__ == "__main__":
  losses = list(train(*sys.argv[1:] or ["tensor_mlp"], num_steps=500))
  print(f"training loss: {losses[0]:.3f} at first, {losses[-1]:.3f} after {len(losses)} steps")
