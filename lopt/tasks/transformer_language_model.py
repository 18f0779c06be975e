"""Small causal transformers that model a text character by character.

Tasks differ in the part of the text that they train on and in the scales of the initial weights and of the loss. The
text, the network's sizes and the batch's are the family's.
"""

import haiku as hk
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lopt import base, checks
from lopt.tasks import text


def build(
  *,
  dataset: str = "tiny_shakespeare",
  path: str | None = None,
  width: int = 32,
  num_layers: int = 2,
  num_heads: int = 2,
  context: int = 16,
  batch_size: int = 16,
  part: tuple[float, float] = (0.01, 1.0),
  weight_scale: tuple[float, float] = (0.5, 2.0),
  loss_scale: tuple[float, float] = (0.1, 10.0),
  data_dir: str | None = None,
) -> base.TaskFamily:
  """Pre-norm transformer decoders that predict a text's next character.

  As GPT-2 (Radford et al. 2019): x = embedding of the character + embedding of its position; for each layer

      x ← x + attention(norm(x)),   x ← x + W₂ gelu(W₁ norm(x) + b₁) + b₂,

  where a position attends to itself and those before it and W₁ has 4 · width units; logits are a linear map of
  norm(x). Weights start as N(0, 1/(num_layers · fan_in)), cut off at two standard deviations, so that all layers
  together add about as much as the embeddings; embeddings as N(0, 1), cut off likewise.

  How batches are drawn, what the loss is and its unit: `lopt.tasks.text.language_model`.

  Args:
    dataset: a name that `lopt.tasks.datasets.load_text` takes; without effect where there is a path.
    path: a UTF-8 file to train on instead.
    width: units of a position, a multiple of `num_heads`.
    num_layers: layers of attention and MLP.
    num_heads: attention heads of a layer, each of width / num_heads units.
    context: characters that the transformer sees at most.
    batch_size: windows per batch.
    part: shortest and longest part of the train split that a task has, as shares of it, drawn log-uniformly.
    weight_scale: lowest and highest factor on the initial weights and embeddings, drawn log-uniformly.
    loss_scale: the same for the loss.
    data_dir: where the data sets are; see `lopt.tasks.datasets.load_text`.

  Raises:
    ValueError: an argument is out of range; the message starts with its name.
    FileNotFoundError, OSError: the text cannot be had; see `lopt.tasks.datasets.load_text`.
  """
  checks.counts(width=width, num_layers=num_layers, num_heads=num_heads)
  checks.require(width % num_heads == 0, "width", width, f"a multiple of num_heads={num_heads}")
  data = text.load(dataset, path, data_dir)
  w_init = hk.initializers.VarianceScaling(1 / num_layers)

  def norm(x: Float[Array, "B context width"]) -> Float[Array, "B context width"]:
    return hk.LayerNorm(axis=-1, create_scale=True, create_offset=True)(x)

  def forward(characters: Int[Array, "B context"]) -> Float[Array, "B context alphabet"]:
    positions = hk.get_parameter("positions", (context, width), init=hk.initializers.TruncatedNormal())
    x = hk.Embed(len(data.alphabet), width)(characters) + positions[None]
    causal = jnp.tril(jnp.ones((1, 1, context, context), bool))
    for _ in range(num_layers):
      attention = hk.MultiHeadAttention(num_heads, width // num_heads, w_init=w_init, model_size=width)
      y = norm(x)
      x += attention(y, y, y, mask=causal)
      y = jax.nn.gelu(hk.Linear(4 * width, w_init=w_init)(norm(x)))
      x += hk.Linear(width, w_init=w_init)(y)
    return hk.Linear(len(data.alphabet))(norm(x))

  return text.language_model(
    data,
    forward,
    context=context,
    batch_size=batch_size,
    part=part,
    weight_scale=weight_scale,
    loss_scale=loss_scale,
  )
