"""Recurrent language models of characters: vanilla RNNs, GRUs and LSTMs.

Tasks differ in the part of the text that they train on and in the scales of the initial weights and of the loss. The
text, the network's sizes and the batch's are the family's.
"""

from typing import Any, Literal, get_args

import haiku as hk
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lopt import base, checks
from lopt.tasks import text

Core = Literal["vanilla", "gru", "lstm"]


class ElmanRNN(hk.VanillaRNN):
  """h ← tanh(W [x, h] + b). Haiku's has a relu, with which large initial weights grow over the steps of a window."""

  def __call__(
    self, inputs: Float[Array, "B features"], prev_state: Float[Array, "B width"]
  ) -> tuple[Float[Array, "B width"], Float[Array, "B width"]]:
    state = jnp.tanh(hk.Linear(self.hidden_size)(jnp.concatenate([inputs, prev_state], axis=-1)))
    return state, state


_CORES = {"vanilla": ElmanRNN, "gru": hk.GRU, "lstm": hk.LSTM}


@text.with_options
def build(
  *,
  core: Core = "gru",
  width: int = 32,
  num_layers: int = 1,
  **options: Any,
) -> base.TaskFamily:
  """Recurrent networks that predict a text's next character.

  An embedding of the character, `num_layers` recurrent layers that start at zero in each window, a linear map to the
  logits of the next character. With x the input and h the state of a layer (σ the logistic function):

      vanilla  h ← tanh(W x + U h + b)                                                            (Elman 1990)
      gru      z, r = σ(W_zr x + U_zr h + b_zr)                                            (Chung et al. 2014)
               h ← (1 − z) h + z tanh(W_a x + U_a (r h) + b_a)
      lstm     i, g, f, o = W x + U h + b                                               (Zaremba et al. 2014)
               c ← σ(f + 1) c + σ(i) tanh(g),  h ← σ(o) tanh(c)

  Args:
    core: the recurrent layer.
    width: units of a layer, and of the embedding.
    num_layers: recurrent layers.

  The other options are those of `text.family`. Batches, the loss and its unit: `text.language_model`.

  Raises:
    ValueError: an argument is out of range; the message starts with its name.
    FileNotFoundError, OSError: the text cannot be had; see `lopt.tasks.datasets.load_text`.
  """
  checks.one_of("core", core, get_args(Core))
  checks.counts(width=width, num_layers=num_layers)

  def network(characters: Int[Array, "B context"], alphabet: int) -> Float[Array, "B context alphabet"]:
    stack = hk.DeepRNN([_CORES[core](width) for _ in range(num_layers)])
    embedded = hk.Embed(alphabet, width)(characters)
    hidden, _ = hk.dynamic_unroll(stack, embedded, stack.initial_state(len(characters)), time_major=False)
    return hk.Linear(alphabet)(hidden)

  return text.family(network, **options)
