"""Image classification by small multi-layer perceptrons, varied in what decides how hard they are to train.

A task of the family is a choice of classes (how many, which, under which labels), an activation, the scales of
the initial weights, of the inputs and of the loss. Its data set, layer sizes and batch size are the family's.
"""

import math
from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, UInt32

from lopt import base, checks
from lopt.tasks import datasets

LOSS_CAP = 10.0
"""In units of the loss of a uniform guess. With the default ranges runs start below 6, so that only diverged runs
feel the cap; and one of these, as bad as ten clueless ones, does not drown the meta-gradient of the others."""

_ACTIVATIONS = {
  "relu": jax.nn.relu,
  "tanh": jnp.tanh,
  "sigmoid": jax.nn.sigmoid,
  "swish": jax.nn.swish,
  "gelu": jax.nn.gelu,
}


class MLPTask(NamedTuple):
  """What distinguishes one task of the family."""

  classes: Int[Array, " classes"]
  """A permutation of the data set's classes; label j of the task, j < num_classes, is class classes[j]."""
  num_classes: Int[Array, ""]
  activation: Int[Array, ""]
  """Index into the family's `activations`."""
  weight_scale: base.Scalar
  """Factor on the initial weights: N(0, 1/fan_in), cut off at two standard deviations (Haiku's default)."""
  input_scale: base.Scalar
  """Factor on the pixels, which are 0 to 1."""
  loss_scale: base.Scalar
  """Factor on the cross-entropy."""


class Examples(NamedTuple):
  """A batch; `labels` are the task's."""

  inputs: Float[Array, "B pixels"]
  labels: Int[Array, " B"]


class _Split(NamedTuple):
  """Examples sorted by class: those of class c are rows offsets[c] ... offsets[c] + counts[c] - 1."""

  images: Array
  offsets: Array
  counts: Array


def build(
  *,
  dataset: str = "digits",
  resolution: int | None = 8,
  hidden_sizes: tuple[int, ...] = (32,),
  batch_size: int = 64,
  activations: tuple[str, ...] = ("relu", "tanh", "sigmoid", "swish", "gelu"),
  min_classes: int = 2,
  max_classes: int | None = None,
  weight_scale: tuple[float, float] = (0.25, 2.0),
  input_scale: tuple[float, float] = (0.3, 1.0),
  loss_scale: tuple[float, float] = (0.1, 10.0),
  data_dir: str | None = None,
) -> base.TaskFamily:
  """MLP classifiers on an image data set that stays on the device.

  A task has between `min_classes` and `max_classes` of the data set's classes, both included and equally likely.
  A batch has `batch_size` examples drawn with replacement, each of a class drawn uniformly from the task's.
  Inputs are pixels from 0 to the task's input scale, not centred: the ill-conditioning that this brings is part of
  what an optimizer has to cope with. The loss is the softmax cross-entropy over the task's classes times its loss
  scale; in the family's common unit (`normalize`) 1 is the loss of a uniform guess. The metric is `accuracy`.

  Args:
    dataset: a name that `lopt.tasks.datasets.load` takes.
    resolution: height and width of the images in pixels; None for the data set's own.
    hidden_sizes: units of each hidden layer; () for a linear classifier.
    batch_size: examples per batch.
    activations: those from which tasks draw; out of relu, tanh, sigmoid, swish, gelu.
    min_classes: classes of the easiest tasks, at least 2.
    max_classes: classes of the hardest tasks; None for all that the data set has.
    weight_scale: lowest and highest factor on the initial weights, drawn log-uniformly.
    input_scale: the same for the inputs.
    loss_scale: the same for the loss.
    data_dir: where the data sets are; see `lopt.tasks.datasets.load`.

  Raises:
    ValueError: an argument is out of range; the message starts with its name.
    FileNotFoundError, OSError: the data set cannot be had; see `lopt.tasks.datasets.load`.
  """
  checks.require(all(size >= 1 for size in hidden_sizes), "hidden_sizes", hidden_sizes, "sizes of at least 1")
  checks.require(batch_size >= 1, "batch_size", batch_size, "at least 1")
  checks.require(
    len(activations) > 0 and set(activations) <= set(_ACTIVATIONS),
    "activations",
    activations,
    f"one or more of {', '.join(_ACTIVATIONS)}",
  )
  checks.require(min_classes >= 2, "min_classes", min_classes, "at least 2")
  checks.require(
    max_classes is None or max_classes >= min_classes,
    "max_classes",
    max_classes,
    f"at least min_classes={min_classes}, or None for all classes",
  )
  ranges = {"weight_scale": weight_scale, "input_scale": input_scale, "loss_scale": loss_scale}
  for name, (low, high) in ranges.items():
    checks.require(0 < low <= high < math.inf, name, (low, high), "lowest and highest factor, 0 < lowest <= highest")

  data = datasets.load(dataset, resolution=resolution, data_dir=data_dir)
  most_classes = data.num_classes if max_classes is None else max_classes
  checks.require(
    min_classes <= data.num_classes, "min_classes", min_classes, f"at most {dataset}'s {data.num_classes}"
  )
  checks.require(
    most_classes <= data.num_classes, "max_classes", max_classes, f"at most {dataset}'s {data.num_classes}"
  )
  splits = {name: _sort_by_class(data, name, dataset) for name in base.SPLITS}
  functions = [_ACTIVATIONS[name] for name in activations]

  def forward(inputs, activation):
    # Under `vmap` over tasks, all branches are evaluated; next to the matrix products that is little.
    mlp = hk.nets.MLP(
      [*hidden_sizes, data.num_classes], activation=lambda x: jax.lax.switch(activation, functions, x)
    )
    return mlp(inputs)

  network = hk.without_apply_rng(hk.transform(forward))

  def sample(key: base.PRNGKey) -> MLPTask:
    # One draw for all: tasks are drawn inside of unrolls, where draws take longer than what is made of them.
    uniform = jax.random.uniform(key, (5 + data.num_classes,))
    return MLPTask(
      classes=jnp.argsort(uniform[5:]),
      num_classes=min_classes + (uniform[0] * (most_classes + 1 - min_classes)).astype(jnp.int32),
      activation=(uniform[1] * len(activations)).astype(jnp.int32),
      weight_scale=_log_uniform(uniform[2], weight_scale),
      input_scale=_log_uniform(uniform[3], input_scale),
      loss_scale=_log_uniform(uniform[4], loss_scale),
    )

  def init(key: base.PRNGKey, task_params: MLPTask) -> base.Params:
    params = network.init(key, jnp.zeros((1, splits["train"].images.shape[1])), task_params.activation)
    return jax.tree.map(lambda x: task_params.weight_scale * x, params)  # biases are zero anyway

  def batch(key: base.PRNGKey, task_params: MLPTask, split: str) -> Examples:
    if split not in splits:
      raise ValueError(f"split={split!r}: must be one of {', '.join(splits)}")
    images, offsets, counts = splits[split]
    # One draw serves both choices: its high part is the label, what remains of it is again uniform and picks the
    # example. Of the 2³² values each example gets the same number, give or take one.
    labels, rest = _scale_bits(jax.random.bits(key, (batch_size,), jnp.uint32), task_params.num_classes)
    classes = task_params.classes[labels]
    rows, _ = _scale_bits(rest, counts[classes])
    scale = task_params.input_scale / data.max_value
    inputs = images[offsets[classes] + rows].astype(jnp.float32) * scale
    return Examples(inputs, labels)

  def loss(
    params: base.Params, key: base.PRNGKey, batch: Examples, task_params: MLPTask
  ) -> tuple[base.Scalar, base.Metrics]:
    del key  # the loss has no randomness of its own
    logits = network.apply(params, batch.inputs, task_params.activation)
    in_task = jnp.broadcast_to(jnp.arange(data.num_classes) < task_params.num_classes, logits.shape)
    logits = jnp.where(in_task, logits, -jnp.inf)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()
    accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == batch.labels)
    return task_params.loss_scale * cross_entropy, {"accuracy": accuracy}

  def normalize(loss: base.Scalar, task_params: MLPTask) -> base.Scalar:
    return loss / (task_params.loss_scale * jnp.log(task_params.num_classes))

  return base.TaskFamily(sample, init, batch, loss, normalize, LOSS_CAP)


def _sort_by_class(data: datasets.Dataset, split: str, dataset: str) -> _Split:
  images, labels = (np.asarray(x) for x in getattr(data, split))
  counts = np.bincount(labels, minlength=data.num_classes)
  if counts.min() < 1 or counts.max() >= 2**16:
    raise ValueError(
      f"dataset={dataset!r}: must have 1 to 65535 examples of each class, and has {counts.min()} to "
      f"{counts.max()} in split {split!r}"
    )
  order = np.argsort(labels, kind="stable")
  return _Split(
    images=jnp.asarray(images[order].reshape(len(images), -1)),
    offsets=jnp.asarray(np.cumsum(counts) - counts, jnp.int32),
    counts=jnp.asarray(counts, jnp.int32),
  )


def _log_uniform(uniform: base.Scalar, bounds: tuple[float, float]) -> base.Scalar:
  low, high = math.log(bounds[0]), math.log(bounds[1])
  return jnp.exp(low + (high - low) * uniform)


def _scale_bits(bits: UInt32[Array, " B"], n: Int[Array, "..."]) -> tuple[Int[Array, " B"], UInt32[Array, " B"]]:
  """⌊u·n⌋ and the bits of the fraction u·n − ⌊u·n⌋, for u = bits / 2³² in [0, 1) and n < 2¹⁶."""
  n = jnp.broadcast_to(n.astype(jnp.uint32), bits.shape)
  high = ((bits >> 16) * n + ((bits & 0xFFFF) * n >> 16)) >> 16  # of the 48 bits of bits·n, those above 2³²
  return high.astype(jnp.int32), bits * n
