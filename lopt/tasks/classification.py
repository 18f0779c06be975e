"""What image classifiers share: everything but the network.

A task is a choice of classes (how many, which, under which labels), an activation, the scales of the initial
weights, of the inputs and of the loss; and, where it is asked for, a loss function, a width, and what is wrong with
the training data. The data set, the network's shapes and the batch size are the family's.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from lopt import base, checks
from lopt.tasks import datasets, examples, images, options, ranges

LOSS_CAP = 10.0
"""In units of the loss of a uniform guess. With the default ranges runs start below 6, so that only diverged runs
feel the cap; and one of these, as bad as ten clueless ones, does not drown the meta-gradient of the others."""

LOSSES = ("cross_entropy", "mean_squared_error")

Network = Callable[[Float[Array, "B height width channels"], images.Activation, int], Float[Array, "B outputs"]]
"""`(inputs, activation, number of outputs) -> logits`, for `hk.transform`."""


class Task(NamedTuple):
  """What distinguishes one task of a family. Fields that can be None are so in families that do not vary them."""

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
  """Factor on the loss."""
  loss: Int[Array, ""] | None = None
  """Index into the family's `losses`."""
  width_fraction: base.Scalar | None = None
  """The fraction of the units behind each activation that are in use."""
  label_noise: examples.LabelNoise | None = None
  input_noise: base.Scalar | None = None
  """Standard deviation of the noise on the pixels of training examples, before the input scale."""
  subset: examples.Subset | None = None


class Examples(NamedTuple):
  """A batch; `labels` are the task's."""

  inputs: Float[Array, "B pixels"]
  labels: Int[Array, " B"]


def family(
  network: Network,
  *,
  dataset: str = "digits",
  resolution: int | None = 8,
  batch_size: int = 32,
  activations: tuple[str, ...] = ("relu", "tanh", "sigmoid", "swish", "gelu"),
  losses: tuple[str, ...] = ("cross_entropy",),
  min_classes: int = 2,
  max_classes: int | None = None,
  weight_scale: tuple[float, float] = (0.25, 2.0),
  input_scale: tuple[float, float] = (0.3, 1.0),
  loss_scale: tuple[float, float] = (0.1, 10.0),
  width_fraction: tuple[float, float] | None = None,
  label_noise: tuple[float, float] | None = None,
  input_noise: tuple[float, float] | None = None,
  data_fraction: tuple[float, float] | None = None,
  data_dir: str | None = None,
) -> base.TaskFamily:
  """Classifiers of a network on an image data set that stays on the device.

  A task has between `min_classes` and `max_classes` of the data set's classes, both included and equally likely.
  A batch has `batch_size` examples drawn with replacement, each of a class drawn uniformly from the task's.
  Inputs are pixels from 0 to the task's input scale, not centred: the ill-conditioning that this brings is part of
  what an optimizer has to cope with. The loss is, over the task's n classes, times the loss scale,

      cross_entropy         -log p_y           p = softmax(logits), y the label;
      mean_squared_error    Σ_j (p_j - δ_jy)²  (Brier, "Verification of forecasts expressed in terms of probability",
                                               1950), which no wrong prediction takes above 2.

  In the family's common unit (`normalize`) 1 is the loss of a uniform guess: log n, and 1 - 1/n. The metric is
  `accuracy`. Validation and test are always clean and whole: noise and fraction are of the training data only.

  Args:
    network: makes logits of images.
    dataset: a name that `lopt.tasks.datasets.load` takes.
    resolution: height and width of the images in pixels; None for the data set's own.
    batch_size: examples per batch.
    activations: those from which tasks draw; out of relu, tanh, sigmoid, swish, gelu.
    losses: those from which tasks draw; out of cross_entropy, mean_squared_error.
    min_classes: classes of the easiest tasks, at least 2.
    max_classes: classes of the hardest tasks; None for all that the data set has.
    weight_scale: lowest and highest factor on the initial weights, drawn log-uniformly.
    input_scale: the same for the inputs.
    loss_scale: the same for the loss.
    width_fraction: None, or lowest and highest fraction of the units behind each activation that are in use, drawn
      log-uniformly; the others give zero. Initial weights are those of the full width.
    label_noise: None, or lowest and highest probability, drawn uniformly, that a training example bears the label
      of one of the task's other classes, each as likely. As in a badly labelled data set, an example's label is the
      same whenever it is drawn.
    input_noise: None, or lowest and highest standard deviation, drawn uniformly, of Gaussian noise on the pixels
      (which are 0 to 1) of training examples, drawn afresh for each batch.
    data_fraction: None, or lowest and highest fraction of each class's training examples that a task uses, at least
      one of them, drawn log-uniformly.
    data_dir: where the data sets are; see `lopt.tasks.datasets.load`.

  Raises:
    ValueError: an argument is out of range; the message starts with its name.
    FileNotFoundError, OSError: the data set cannot be had; see `lopt.tasks.datasets.load`.
  """
  checks.require(batch_size >= 1, "batch_size", batch_size, "at least 1")
  checks.some_of("activations", activations, images.ACTIVATIONS)
  checks.some_of("losses", losses, LOSSES)
  checks.require(min_classes >= 2, "min_classes", min_classes, "at least 2")
  checks.require(
    max_classes is None or max_classes >= min_classes,
    "max_classes",
    max_classes,
    f"at least min_classes={min_classes}, or None for all classes",
  )
  ranges.check(weight_scale=weight_scale, input_scale=input_scale, loss_scale=loss_scale)
  ranges.check(width_fraction=width_fraction, data_fraction=data_fraction)
  for name, bounds in {"width_fraction": width_fraction, "data_fraction": data_fraction}.items():
    checks.require(bounds is None or bounds[1] <= 1, name, bounds, "fractions, at most 1")
  for name, bounds, most in (("label_noise", label_noise, 1.0), ("input_noise", input_noise, math.inf)):
    if bounds is not None:
      low, high = bounds
      ok = 0 <= low <= high <= most and high < math.inf
      checks.require(ok, name, bounds, f"lowest, highest; 0 <= lowest <= highest{' <= 1' if most == 1 else ''}")

  data = datasets.load(dataset, resolution=resolution, data_dir=data_dir)
  most_classes = data.num_classes if max_classes is None else max_classes
  checks.require(
    min_classes <= data.num_classes, "min_classes", min_classes, f"at most {dataset}'s {data.num_classes}"
  )
  checks.require(
    most_classes <= data.num_classes, "max_classes", max_classes, f"at most {dataset}'s {data.num_classes}"
  )
  splits = {name: examples.sort_by_class(data, name, dataset) for name in base.SPLITS}
  image_shape = data.train.images.shape[1:]

  def forward(inputs: Float[Array, "B pixels"], task_params: Task) -> Float[Array, "B classes"]:
    activate = images.choose_activation(activations, task_params.activation, task_params.width_fraction)
    return network(inputs.reshape(-1, *image_shape), activate, data.num_classes)

  net = hk.without_apply_rng(hk.transform(forward))

  # What a family without these options does not draw, each made of two numbers that are uniform in [0, 1).
  optional: dict[str, Callable[[base.Scalar, base.Scalar], Any]] = {}
  if len(losses) > 1:
    optional["loss"] = lambda u, _: (u * len(losses)).astype(jnp.int32)
  if width_fraction is not None:
    optional["width_fraction"] = lambda u, _: ranges.log_uniform(u, width_fraction)
  if label_noise is not None:
    # 2²³ is how many values a uniform float32 has.
    optional["label_noise"] = lambda u, v: examples.LabelNoise(
      ranges.between(u, label_noise), (v * 2**23).astype(jnp.uint32)
    )
  if input_noise is not None:
    optional["input_noise"] = lambda u, _: ranges.between(u, input_noise)
  if data_fraction is not None:
    optional["subset"] = lambda u, v: examples.Subset(ranges.log_uniform(u, data_fraction), v)

  def sample(key: base.PRNGKey) -> Task:
    # One draw for all: tasks are drawn inside of unrolls, where draws take longer than what is made of them.
    uniform = jax.random.uniform(key, (5 + data.num_classes + 2 * len(optional),))
    rest = uniform[5 + data.num_classes :].reshape(-1, 2)
    return Task(
      classes=jnp.argsort(uniform[5 : 5 + data.num_classes]),
      num_classes=min_classes + (uniform[0] * (most_classes + 1 - min_classes)).astype(jnp.int32),
      activation=(uniform[1] * len(activations)).astype(jnp.int32),
      weight_scale=ranges.log_uniform(uniform[2], weight_scale),
      input_scale=ranges.log_uniform(uniform[3], input_scale),
      loss_scale=ranges.log_uniform(uniform[4], loss_scale),
      **{name: make(*rest[i]) for i, (name, make) in enumerate(optional.items())},
    )

  def init(key: base.PRNGKey, task_params: Task) -> base.Params:
    params = net.init(key, jnp.zeros((1, math.prod(image_shape))), task_params)
    return images.scale_weights(params, task_params.weight_scale)

  def batch(key: base.PRNGKey, task_params: Task, split: str) -> Examples:
    checks.one_of("split", split, splits)
    train = split == "train"
    pixels, offsets, counts = splits[split]
    noise = None
    if train and task_params.input_noise is not None:
      key, noise_key = jax.random.split(key)
      noise = task_params.input_noise * jax.random.normal(noise_key, (batch_size, math.prod(image_shape)))
    # One draw serves both choices: its high part is the label, what remains of it is again uniform and picks the
    # example. Of the 2³² values each example gets the same number, give or take one.
    labels, rest = examples.scale_bits(jax.random.bits(key, (batch_size,), jnp.uint32), task_params.num_classes)
    classes = task_params.classes[labels]
    if train and task_params.subset is not None:
      used = jnp.maximum(jnp.rint(task_params.subset.fraction * counts).astype(jnp.int32), 1)
      start = (task_params.subset.start * counts).astype(jnp.int32)
      rows = (start[classes] + examples.scale_bits(rest, used[classes])[0]) % counts[classes]
    else:
      rows, _ = examples.scale_bits(rest, counts[classes])
    rows = offsets[classes] + rows
    if train and task_params.label_noise is not None:
      labels = examples.mislabel(labels, rows, task_params.num_classes, task_params.label_noise)
    inputs = pixels[rows].astype(jnp.float32) * (task_params.input_scale / data.max_value)
    return Examples(inputs if noise is None else inputs + task_params.input_scale * noise, labels)

  def loss(
    params: base.Params, key: base.PRNGKey, batch: Examples, task_params: Task
  ) -> tuple[base.Scalar, base.Metrics]:
    del key  # the loss has no randomness of its own
    logits = net.apply(params, batch.inputs, task_params)
    in_task = jnp.broadcast_to(jnp.arange(data.num_classes) < task_params.num_classes, logits.shape)
    logits = jnp.where(in_task, logits, -jnp.inf)
    functions = [_LOSSES[name] for name in losses]
    value = jax.lax.switch(_index(task_params), functions, logits, batch.labels)
    accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == batch.labels)
    return task_params.loss_scale * value, {"accuracy": accuracy}

  def normalize(loss: base.Scalar, task_params: Task) -> base.Scalar:
    units = [_UNITS[name] for name in losses]
    return loss / (task_params.loss_scale * jax.lax.switch(_index(task_params), units, task_params.num_classes))

  jax.eval_shape(lambda key: init(key, sample(key)), jax.random.key(0))  # a network that cannot be built says so now
  return base.TaskFamily(sample, init, batch, loss, normalize, LOSS_CAP)


def _index(task_params: Task) -> Int[Array, ""]:
  return jnp.int32(0) if task_params.loss is None else task_params.loss


def _cross_entropy(logits: Float[Array, "B classes"], labels: Int[Array, " B"]) -> base.Scalar:
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _brier_score(logits: Float[Array, "B classes"], labels: Int[Array, " B"]) -> base.Scalar:
  return jnp.square(jax.nn.softmax(logits) - jax.nn.one_hot(labels, logits.shape[-1])).sum(axis=-1).mean()


_LOSSES = {"cross_entropy": _cross_entropy, "mean_squared_error": _brier_score}
_UNITS = {"cross_entropy": lambda n: jnp.log(n), "mean_squared_error": lambda n: 1 - 1 / n}


with_options = options.of(family)
