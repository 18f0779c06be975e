"""Trains a transformer whose parameters, gradients and optimizer states are spread over all devices (FSDP).

python experiments/examples/fsdp_transformer.py

It reads handwritten digits row by row. On a CPU the devices are eight virtual ones; on GPUs or TPUs, those.
"""

import sys
from collections.abc import Iterator
from typing import Any

import haiku as hk
import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

import lopt

IMAGES, LABELS = map(np.asarray, load_digits(return_X_y=True))
WIDTH, BATCH = 64, 64


def logits_of(images: jax.Array) -> jax.Array:
  """A pre-norm transformer of two blocks over the eight rows of an image."""
  norm = lambda x: hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
  positions = hk.get_parameter("positions", (8, WIDTH), init=hk.initializers.RandomNormal(0.02))
  h = hk.Linear(WIDTH)(images.reshape(-1, 8, 8) / 16) + positions[None]
  for _ in range(2):
    x = norm(h)
    h += hk.MultiHeadAttention(4, WIDTH // 4, w_init=hk.initializers.VarianceScaling())(x, x, x)
    h += hk.nets.MLP([4 * WIDTH, WIDTH], activation=jax.nn.gelu)(norm(h))
  return hk.Linear(10)(norm(h).mean(axis=1))


def train(optimizer: str, num_steps: int) -> Iterator[float]:
  """The training loss of each step."""
  mesh = jax.make_mesh((jax.device_count(),), ("devices",), (AxisType.Auto,))

  def spread(x: jax.Array) -> NamedSharding:
    """Along the last axis that the devices divide evenly."""
    axes = [axis for axis in range(x.ndim) if x.shape[axis] % mesh.size == 0]
    return NamedSharding(mesh, PartitionSpec(*("devices" if axes[-1:] == [axis] else None for axis in range(x.ndim))))

  model = hk.without_apply_rng(hk.transform(logits_of))
  params = model.init(jax.random.key(0), IMAGES[:1])
  params = jax.device_put(params, jax.tree.map(spread, params))
  tx = lopt.load(optimizer)(num_steps=num_steps)
  state = tx.init(params)  # spread as the parameters are

  def loss_of(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, images), labels).mean()

  @jax.jit
  def step(params: Any, state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, Any, jax.Array]:
    loss, gradients = jax.value_and_grad(loss_of)(params, images, labels)
    updates, state = tx.update(gradients, state, params, value=loss)
    return optax.apply_updates(params, updates), state, loss

  divided = NamedSharding(mesh, PartitionSpec("devices"))  # batches, too
  rng = np.random.default_rng(0)
  for _ in range(num_steps):
    batch = rng.choice(len(IMAGES), BATCH)
    images, labels = jax.device_put((IMAGES[batch], LABELS[batch]), divided)
    params, state, loss = step(params, state, images, labels)
    yield float(loss)


if __name__ == "__main__":
  jax.config.update("jax_num_cpu_devices", 8)
  losses = list(train(*sys.argv[1:] or ["tensor_mlp"], num_steps=200))
  print(f"training loss on {jax.device_count()} devices: {losses[0]:.3f} at first, {losses[-1]:.3f} after 200 steps")
