"""Reconstruction of images by small multi-layer perceptrons with a bottleneck.

G. E. Hinton, R. R. Salakhutdinov, "Reducing the dimensionality of data with neural networks", Science 2006.
"""

from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lopt import base, checks
from lopt.tasks import images, ranges

LOSS_CAP = 10.0
"""In units of the loss of the mean image. With the default options runs start below 3, so that only diverged runs
feel the cap; and one of these does not drown the meta-gradient of the others."""

LOSSES = ("mean_squared_error", "cross_entropy")


class AutoencoderTask(NamedTuple):
  """What distinguishes one task of the family."""

  activation: Int[Array, ""]
  """Index into the family's `activations`."""
  loss: Int[Array, ""]
  """Index into the family's `losses`."""
  weight_scale: base.Scalar
  """Factor on the initial weights: N(0, 1/fan_in), cut off at two standard deviations (Haiku's default)."""
  loss_scale: base.Scalar
  """Factor on the loss."""


def build(
  *,
  dataset: str = "digits",
  resolution: int | None = 8,
  hidden_sizes: tuple[int, ...] = (32,),
  latent_size: int = 8,
  batch_size: int = 64,
  activations: tuple[str, ...] = ("relu", "tanh", "sigmoid", "swish", "gelu"),
  losses: tuple[str, ...] = LOSSES,
  weight_scale: tuple[float, float] = (0.25, 2.0),
  loss_scale: tuple[float, float] = (0.1, 10.0),
  data_dir: str | None = None,
) -> base.TaskFamily:
  """MLP autoencoders on an image data set that stays on the device.

  With pixels x from 0 to 1 and their mean x̄ over the training set, the reconstruction is

      p = sigmoid(logit x̄ + decoder(encoder(x))),

  so that a network whose weights are zero predicts the mean image. The loss is, averaged over pixels and examples and
  times the task's loss scale,

      mean_squared_error    (x - p)²
      cross_entropy         -x log p - (1 - x) log(1 - p), less the value that this has at p = x.

  In the family's common unit (`normalize`) 1 is the loss of the mean image on the training set, 0 that of a perfect
  reconstruction.

  Args:
    dataset: a name that `lopt.tasks.datasets.load` takes.
    resolution: height and width of the images in pixels; None for the data set's own.
    hidden_sizes: units of each hidden layer of the encoder; the decoder has them in reverse.
    latent_size: units of the bottleneck between them, which is linear.
    batch_size: examples per batch, drawn with replacement.
    activations: those from which tasks draw; out of relu, tanh, sigmoid, swish, gelu.
    losses: those from which tasks draw; out of mean_squared_error, cross_entropy.
    weight_scale: lowest and highest factor on the initial weights, drawn log-uniformly.
    loss_scale: the same for the loss.
    data_dir: where the data sets are; see `lopt.tasks.datasets.load`.

  Raises:
    ValueError: an argument is out of range; the message starts with its name.
    FileNotFoundError, OSError: the data set cannot be had; see `lopt.tasks.datasets.load`.
  """
  checks.require(all(size >= 1 for size in hidden_sizes), "hidden_sizes", hidden_sizes, "sizes of at least 1")
  checks.counts(latent_size=latent_size, batch_size=batch_size)
  checks.some_of("activations", activations, images.ACTIVATIONS)
  checks.some_of("losses", losses, LOSSES)
  ranges.check(weight_scale=weight_scale, loss_scale=loss_scale)

  data = images.load_pixels(dataset, resolution, data_dir)
  num_pixels = data.mean.size
  mean_logits = images.mean_logits(data)
  know_nothing = {"mean_squared_error": data.squared_error, "cross_entropy": data.divergence}
  units = jnp.array([know_nothing[name] for name in losses])

  def forward(inputs: Float[Array, "B pixels"], activation: Int[Array, ""]) -> Float[Array, "B pixels"]:
    activate = images.choose_activation(activations, activation)
    latent = hk.nets.MLP([*hidden_sizes, latent_size], activation=activate, name="encoder")(inputs)
    outputs = hk.nets.MLP([*reversed(hidden_sizes), num_pixels], activation=activate, name="decoder")(latent)
    return jnp.broadcast_to(mean_logits, outputs.shape) + outputs

  network = hk.without_apply_rng(hk.transform(forward))

  def sample(key: base.PRNGKey) -> AutoencoderTask:
    uniform = jax.random.uniform(key, (4,))
    return AutoencoderTask(
      activation=(uniform[0] * len(activations)).astype(jnp.int32),
      loss=(uniform[1] * len(losses)).astype(jnp.int32),
      weight_scale=ranges.log_uniform(uniform[2], weight_scale),
      loss_scale=ranges.log_uniform(uniform[3], loss_scale),
    )

  def init(key: base.PRNGKey, task_params: AutoencoderTask) -> base.Params:
    params = network.init(key, jnp.zeros((1, num_pixels)), task_params.activation)
    return images.scale_weights(params, task_params.weight_scale)

  def batch(key: base.PRNGKey, task_params: AutoencoderTask, split: str) -> Float[Array, "B pixels"]:
    del task_params
    return images.draw_pixels(key, data, split, batch_size)

  def loss(
    params: base.Params, key: base.PRNGKey, batch: Float[Array, "B pixels"], task_params: AutoencoderTask
  ) -> tuple[base.Scalar, base.Metrics]:
    del key  # the loss has no randomness of its own
    logits = network.apply(params, batch, task_params.activation)
    functions = [_LOSSES[name] for name in losses]
    return task_params.loss_scale * jax.lax.switch(task_params.loss, functions, logits, batch).mean(), {}

  def normalize(loss: base.Scalar, task_params: AutoencoderTask) -> base.Scalar:
    return loss / (task_params.loss_scale * units[task_params.loss])

  return base.TaskFamily(sample, init, batch, loss, normalize, LOSS_CAP)


_LOSSES = {
  "mean_squared_error": lambda logits, pixels: jnp.square(jax.nn.sigmoid(logits) - pixels),
  "cross_entropy": images.pixel_divergence,
}
