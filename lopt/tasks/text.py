"""What families of language models share: everything but the network."""

from collections.abc import Callable
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from lopt import base, checks
from lopt.tasks import datasets, options, ranges

LOSS_CAP = 10.0
"""In units of the loss of a uniform guess. Runs start below 1.5 at the default scales, so that only diverged runs
feel the cap; and one of these does not drown the meta-gradient of the others."""


class TextTask(NamedTuple):
  """What distinguishes one task of a family."""

  start: Int[Array, ""]
  """Where in the train split the task's own part of it starts."""
  length: Int[Array, ""]
  """Characters of that part."""
  weight_scale: base.Scalar
  """Factor on the initial matrices (weights and embeddings)."""
  loss_scale: base.Scalar
  """Factor on the cross-entropy."""


Network = Callable[[Int[Array, "B context"], int], Float[Array, "B context alphabet"]]
"""A Haiku function from characters, and how many there are, to the logits of the next ones."""


def language_model(
  text: datasets.Text,
  forward: Callable[[Int[Array, "B context"]], Float[Array, "B context alphabet"]],
  *,
  context: int = 16,
  batch_size: int = 16,
  part: tuple[float, float] = (0.01, 1.0),
  weight_scale: tuple[float, float] = (0.5, 2.0),
  loss_scale: tuple[float, float] = (0.1, 10.0),
) -> base.TaskFamily:
  """Tasks of predicting each character of a text from those before it.

  A batch is `batch_size` windows of `context` + 1 characters that start anywhere (uniformly, with replacement): for
  train in the task's part of the train split, for validation and test in the whole of these. The loss is the mean
  cross-entropy of a window's characters but the first, each given those before it in the window, times the task's
  loss scale; in the family's common unit (`normalize`) 1 is the loss of a uniform guess, log(characters in the
  alphabet). The metric is `accuracy`, the share of characters that are the likeliest ones.

  Args:
    text: what is to be predicted.
    forward: a Haiku function from characters to the logits of the next ones.
    context: characters that the last one of a window is predicted from.
    batch_size: windows per batch.
    part: shortest and longest part of the train split, as shares of it, drawn log-uniformly; its place is uniform.
      It is at least one window.
    weight_scale: lowest and highest factor on the initial matrices, drawn log-uniformly.
    loss_scale: the same for the loss.

  Raises:
    ValueError: an argument is out of range; the message starts with its name.
  """
  checks.counts(context=context, batch_size=batch_size)
  ranges.check(part=part, weight_scale=weight_scale, loss_scale=loss_scale)
  checks.require(part[1] <= 1, "part", part, "shares of the text, at most 1")
  splits = {name: getattr(text, name) for name in base.SPLITS}
  train_size = len(text.train)
  shortest = min(len(getattr(text, name)) for name in base.SPLITS)
  checks.require(
    context < shortest, "context", context, f"below the {shortest} characters of the text's shortest split"
  )
  network = hk.without_apply_rng(hk.transform(forward))

  def sample(key: base.PRNGKey) -> TextTask:
    uniform = jax.random.uniform(key, (4,))
    length = jnp.clip((ranges.log_uniform(uniform[0], part) * train_size).astype(jnp.int32), context + 1, train_size)
    start = (uniform[1] * (train_size - length + 1)).astype(jnp.int32)
    return TextTask(
      start=jnp.minimum(start, train_size - length),  # rounding in long texts
      length=length,
      weight_scale=ranges.log_uniform(uniform[2], weight_scale),
      loss_scale=ranges.log_uniform(uniform[3], loss_scale),
    )

  def init(key: base.PRNGKey, task_params: TextTask) -> base.Params:
    params = network.init(key, jnp.zeros((1, context), jnp.int32))
    return jax.tree.map(lambda p: task_params.weight_scale * p if p.ndim > 1 else p, params)

  def batch(key: base.PRNGKey, task_params: TextTask, split: str) -> Int[Array, "B window"]:
    checks.one_of("split", split, splits)
    characters = splits[split]
    start, length = (task_params.start, task_params.length) if split == "train" else (0, len(characters))
    starts = jax.random.randint(key, (batch_size, 1), start, start + length - context)
    return characters[starts + jnp.arange(context + 1)[None]]

  def loss(
    params: base.Params, key: base.PRNGKey, batch: Int[Array, "B window"], task_params: TextTask
  ) -> tuple[base.Scalar, base.Metrics]:
    del key  # the loss has no randomness of its own
    logits, targets = network.apply(params, batch[:, :-1]), batch[:, 1:]
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()
    accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == targets)
    return task_params.loss_scale * cross_entropy, {"accuracy": accuracy}

  def normalize(loss: base.Scalar, task_params: TextTask) -> base.Scalar:
    return loss / (task_params.loss_scale * jnp.log(len(text.alphabet)))

  return base.TaskFamily(sample, init, batch, loss, normalize, LOSS_CAP)


@options.of(language_model)
def family(
  network: Network,
  *,
  dataset: str = "tiny_shakespeare",
  path: str | None = None,
  data_dir: str | None = None,
  **options: Any,
) -> base.TaskFamily:
  """Language models of a network on a text that stays on the device.

  Args:
    network: what is trained.
    dataset: a name that `lopt.tasks.datasets.load_text` takes; without effect where there is a path.
    path: a UTF-8 file to train on instead.
    data_dir: where the data sets are; see `lopt.tasks.datasets.load_text`.

  The other options are those of `language_model`.

  Raises:
    ValueError: an argument is out of range; the message starts with its name.
    FileNotFoundError, OSError: the text cannot be had; see `lopt.tasks.datasets.load_text`.
  """
  text = datasets.load_text(dataset, data_dir=data_dir) if path is None else datasets.read_text(path)
  return language_model(text, lambda characters: network(characters, len(text.alphabet)), **options)


with_options = options.of(family)
