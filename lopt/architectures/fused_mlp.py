"""The network of `layers.mlp` as one kernel of a GPU, written in Pallas.

Layer by layer, features and hidden units of every parameter go through the GPU's memory: about 1,800 bytes for an
update of `mlp`. Here a program of the kernel takes `BLOCK` parameters through all layers in registers, and what goes
through memory are a parameter's features and outputs: 40 bytes.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

BLOCK = 128
"""Parameters that a program of the kernel takes; a power of two."""
NARROWEST = 16
"""Rows that a matrix product of Triton has at least."""

Weights = Sequence[tuple[Array, Array]]
"""Of each layer: [inputs, outputs] and [outputs]."""
Plain = Callable[..., Float[Array, "outputs n"]]


def on_gpus(plain: Plain, *, interpret: bool = False) -> Plain:
  """The network `plain`, as one kernel where it runs on an NVIDIA GPU.

  Args:
    plain: `plain(weights, *features)` is the network, with the weights of two layers or more, ReLU between them, and
      features [_, n] one below the other. Other devices run it as it is, and derivatives are its derivatives.
    interpret: Run the kernel step by step on any device, for tests.
  """

  def network(weights: Weights, *features: Float[Array, "_ n"]) -> Float[Array, "outputs n"]:
    if interpret:
      return _kernel_call(weights, features, interpret=True)
    return jax.lax.platform_dependent(
      weights,
      *features,
      cuda=lambda weights, *features: _kernel_call(weights, features, interpret=False),
      default=plain,
    )

  with_derivatives = jax.custom_jvp(network)
  with_derivatives.defjvp(lambda primals, tangents: jax.jvp(plain, primals, tangents))
  return with_derivatives


def _kernel_call(
  weights: Weights, features: Sequence[Float[Array, "_ n"]], *, interpret: bool
) -> Float[Array, "outputs n"]:
  """Pads the hidden layers to powers of two, by units that are zero, and calls the kernel."""
  sizes = [max(NARROWEST, pl.next_power_of_2(w.shape[1])) for w, _ in weights[:-1]]
  sizes.append(weights[-1][0].shape[1])
  fans = [weights[0][0].shape[0], *sizes[:-1]]
  padded = []
  for (w, b), fan_in, size in zip(weights, fans, sizes, strict=True):
    w = jnp.pad(w, ((0, fan_in - w.shape[0]), (0, size - w.shape[1])))
    padded += [w.T, jnp.pad(b, (0, size - len(b)))[:, None]]
  padded[-2] = padded[-2].T  # of the last layer an output's weights are a column, as its hidden units are
  number = features[0].shape[1]
  return pl.pallas_call(
    functools.partial(_kernel, number, len(weights)),
    out_shape=jax.ShapeDtypeStruct((sizes[-1], number), features[0].dtype),
    grid=(pl.cdiv(number, BLOCK),),
    interpret=interpret,
    compiler_params=triton.CompilerParams(num_warps=4),
    name="fused_mlp",
  )(*padded, *features)


def _kernel(number: int, num_layers: int, *refs: Any) -> None:
  """A block of parameters. Of `refs` come first the layers' weights and biases, then features, then the outputs."""
  layers, features, outputs = refs[: 2 * num_layers], refs[2 * num_layers : -1], refs[-1]
  start = pl.program_id(0) * BLOCK
  columns = pl.ds(start, BLOCK)
  inside = start + jax.lax.broadcasted_iota(jnp.int32, (1, BLOCK), 1) < number
  w, h = layers[0], layers[1][:, :]
  row = 0
  for x in features:
    for i in range(x.shape[0]):
      h = h + w[:, row : row + 1] * triton.load(x.at[i : i + 1, columns], mask=inside, other=0.0)
      row += 1
  for w, b in zip(layers[2:-2:2], layers[3:-2:2], strict=True):
    h = triton.dot(w[:, :], jnp.maximum(h, 0.0)) + b[:, :]
  h = jnp.maximum(h, 0.0)
  w, b = layers[-2:]
  for i in range(outputs.shape[0]):
    y = jnp.sum(w[:, i : i + 1] * h, axis=0, keepdims=True) + b[i : i + 1, :]
    triton.store(outputs.at[i : i + 1, columns], y, mask=inside)
