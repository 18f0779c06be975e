"""Small causal transformers that model a text character by character.

Tasks differ in the part of the text that they train on and in the scales of the initial weights and of the loss. The
text, the network's sizes and the batch's are the family's.
"""

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lopt import base, checks
from lopt.tasks import text


@text.with_options
def build(
  *,
  width: int = 32,
  num_layers: int = 2,
  num_heads: int = 2,
  **options: Any,
) -> base.TaskFamily:
  """Pre-norm transformer decoders that predict a text's next character.

  As GPT-2 (Radford et al. 2019): x = embedding of the character + embedding of its position; for each layer

      x ← x + attention(norm(x)),   x ← x + W₂ gelu(W₁ norm(x) + b₁) + b₂,

  where a position attends to itself and those before it and W₁ has 4 · width units; logits are a linear map of
  norm(x). Weights start as N(0, 1/(num_layers · fan_in)), cut off at two standard deviations, so that all layers
  together add about as much as the embeddings; embeddings as N(0, 1), cut off likewise.

  Args:
    width: units of a position, a multiple of `num_heads`.
    num_layers: layers of attention and MLP.
    num_heads: attention heads of a layer, each of width / num_heads units.

  The other options are those of `text.family`. Batches, the loss and its unit: `text.language_model`.

  Raises:
    ValueError: an argument is out of range; the message starts with its name.
    FileNotFoundError, OSError: the text cannot be had; see `lopt.tasks.datasets.load_text`.
  """
  checks.counts(width=width, num_layers=num_layers, num_heads=num_heads)
  checks.require(width % num_heads == 0, "width", width, f"a multiple of num_heads={num_heads}")
  w_init = hk.initializers.VarianceScaling(1 / num_layers)

  def norm(x: Float[Array, "B context width"]) -> Float[Array, "B context width"]:
    return hk.LayerNorm(axis=-1, create_scale=True, create_offset=True)(x)

  def network(characters: Int[Array, "B context"], alphabet: int) -> Float[Array, "B context alphabet"]:
    context = characters.shape[-1]
    positions = hk.get_parameter("positions", (context, width), init=hk.initializers.TruncatedNormal())
    x = hk.Embed(alphabet, width)(characters) + positions[None]
    causal = jnp.tril(jnp.ones((1, 1, context, context), bool))
    for _ in range(num_layers):
      attention = hk.MultiHeadAttention(num_heads, width // num_heads, w_init=w_init, model_size=width)
      y = norm(x)
      x += attention(y, y, y, mask=causal)
      y = jax.nn.gelu(hk.Linear(4 * width, w_init=w_init)(norm(x)))
      x += hk.Linear(width, w_init=w_init)(y)
    return hk.Linear(alphabet)(norm(x))

  return text.family(network, **options)
