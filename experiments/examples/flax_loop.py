"""Trains a Flax NNX network on handwritten digits with an optimizer that comes with lopt; needs `pip install flax`.

python experiments/examples/flax_loop.py
"""

import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits

import lopt

IMAGES, LABELS = map(jnp.asarray, load_digits(return_X_y=True))


class MLP(nnx.Module):
  """One hidden layer."""

  def __init__(self, rngs: nnx.Rngs):
    self.hidden = nnx.Linear(64, 64, rngs=rngs)
    self.logits = nnx.Linear(64, 10, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.logits(nnx.relu(self.hidden(x / 16)))


def train(optimizer: str, num_steps: int) -> Iterator[float]:
  """The training loss of each step."""
  model = MLP(nnx.Rngs(0))
  updater = nnx.Optimizer(model, lopt.load(optimizer)(num_steps=num_steps), wrt=nnx.Param)

  @nnx.jit
  def step(model: MLP, updater: nnx.Optimizer, key: jax.Array) -> jax.Array:
    batch = jax.random.choice(key, len(IMAGES), (64,))

    def loss_of(model: MLP) -> jax.Array:
      return optax.softmax_cross_entropy_with_integer_labels(model(IMAGES[batch]), LABELS[batch]).mean()

    loss, gradients = nnx.value_and_grad(loss_of)(model)
    updater.update(model, gradients, value=loss)
    return loss

  for key in jax.random.split(jax.random.key(1), num_steps):
    yield float(step(model, updater, key))


if __name__ == "__main__":
  losses = list(train(*sys.argv[1:] or ["tensor_mlp"], num_steps=500))
  print(f"training loss: {losses[0]:.3f} at first, {losses[-1]:.3f} after {len(losses)} steps")
