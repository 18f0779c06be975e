"""Networks in the layout that is fast for learned optimizers: features first, parameters last."""

import functools
import itertools
import math
from collections.abc import Callable

import haiku as hk
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lopt import base
from lopt.architectures import fused_mlp, sharding


class LinearWeights(hk.Module):
  """The parameters of an `hk.Linear`, for products in a layout that `hk.Linear` does not have."""

  def __call__(
    self, fan_in: int, size: int, w_init: hk.initializers.Initializer | None = None
  ) -> tuple[Float[Array, "fan_in size"], Float[Array, " size"]]:
    w_init = w_init or hk.initializers.TruncatedNormal(1 / math.sqrt(fan_in))
    w = hk.get_parameter("w", (fan_in, size), init=w_init)
    return w, hk.get_parameter("b", (size,), init=jnp.zeros)


def mlp(
  features: tuple[Float[Array, "_ *n"], ...] | Float[Array, "features *n"],
  rms: Float[Array, " features"],
  shared: Float[Array, " shared"],
  sizes: tuple[int, ...],
  zero_output: bool = False,
  fused: bool = False,
) -> Float[Array, "outputs *n"]:
  """An MLP on each of the n parameters of a tensor: ReLU between the modules `layer_0`, `layer_1`, ...

  Its inputs are a parameter's own features, divided by their root mean squares, and those that all parameters of
  the tensor share. Activations are feature-major, [width, n], and normalisation and shared inputs enter through the
  first layer's weights and bias instead of through n copies: the same arithmetic as a plain MLP on features + shared
  columns, at about 1.3 times its speed.

  Args:
    features: A column for each parameter; of several arrays one below the other.
    rms: What each row of the features is divided by.
    shared: Inputs without a copy for each parameter.
    sizes: Widths of the layers, the number of outputs last.
    zero_output: Whether the last layer's weights begin at zero.
    fused: Whether an NVIDIA GPU computes it in one kernel; not for tensors that may have parts on several devices.
  """
  w, b = LinearWeights("layer_0")(len(rms) + len(shared), sizes[0])
  weights = [(w[: len(rms)] / rms[:, None], shared @ w[len(rms) :] + b)]
  for i, fans in enumerate(itertools.pairwise(sizes), start=1):
    weights.append(LinearWeights(f"layer_{i}")(*fans, jnp.zeros if zero_output and i == len(sizes) - 1 else None))

  def network(weights: fused_mlp.Weights, *features: Float[Array, "_ *n"]) -> Float[Array, "outputs *n"]:
    h = jnp.concatenate(features)
    for i, (w, b) in enumerate(weights):
      h = product(w, jax.nn.relu(h) if i else h)
      h += b.reshape(-1, *[1] * (h.ndim - 1))
    return h

  def plain(weights: fused_mlp.Weights, *features: Float[Array, "_ *n"]) -> Float[Array, "outputs *n"]:
    return by_blocks(functools.partial(network, weights), *features)

  features = features if isinstance(features, tuple) else (features,)
  if not fused or sharding.may_be_divided():
    return plain(weights, *features)
  outputs = fused_mlp.on_gpus(plain)(weights, *(x.reshape(len(x), -1) for x in features))
  return outputs.reshape(len(outputs), *features[0].shape[1:])


def product(w: Float[Array, "inputs outputs"], x: Float[Array, "inputs *n"]) -> Float[Array, "outputs *n"]:
  """wᵀ x. Of a few columns as one fused loop: for many particles at once it would be a library call for each."""
  if x.ndim != 2 or x.shape[1] > FEW_COLUMNS:
    return jnp.tensordot(w, x, (0, 0))
  return jnp.sum(x.T[:, :, None] * w[None], axis=1).T


FEW_COLUMNS = 16

# Of columns: with two hidden layers of 32 for a pair of particles a small block fits a cache of 1 MB. A large one is
# work enough for all cores, where one program has several; it is for tensors of which no more than one is in memory.
SMALL_BLOCK, LARGE_BLOCK, LARGE_TENSOR = 1_024, 8_192, 2**18


def by_blocks(function: Callable[..., base.PyTree], *features: base.PyTree, large: int = LARGE_BLOCK) -> base.PyTree:
  """`function(*features)`, whose columns do not depend on each other, a block of columns at a time.

  What it computes on the way then stays in the caches, where for a tensor of 10⁵ parameters it would not. The last
  block begins early enough to be a whole one. Tensors that may have parts on several devices are not cut into blocks:
  each device would need all of them.

  Args:
    function: Of trees of arrays [rows, *n] to another, with as many columns.
    *features: What it is called with.
    large: Columns in a block of a large tensor.
  """
  if sharding.may_be_divided():
    return function(*features)
  shape = jax.tree.leaves(features)[0].shape[1:]
  outputs = _by_blocks(function, large, *jax.tree.map(lambda x: x.reshape(len(x), -1), features))
  return jax.tree.map(lambda x: x.reshape(len(x), *shape), outputs)


def _by_blocks(function: Callable[..., base.PyTree], large: int, *features: base.PyTree) -> base.PyTree:
  number = jax.tree.leaves(features)[0].shape[1]
  size = SMALL_BLOCK if number < LARGE_TENSOR else large
  if number <= 2 * size:
    return function(*features)

  def body(i, outputs):
    start = jnp.minimum(i * size, number - size)
    block = function(*jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis=1), features))
    return jax.tree.map(lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, start, axis=1), outputs, block)

  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *features))
  return jax.lax.fori_loop(0, math.ceil(number / size), body, zeros)
