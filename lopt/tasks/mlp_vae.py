"""Variational autoencoders of images by small multi-layer perceptrons.

D. P. Kingma, M. Welling, "Auto-encoding variational Bayes", ICLR 2014.
"""

from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from lopt import base, checks
from lopt.tasks import images, ranges

LOSS_CAP = 10.0
"""In units of the loss of the mean image. With the default options one run in a hundred starts above 4 and none
of 2,000 above 6.4, so that only diverged runs feel the cap; and one of these does not drown the meta-gradient of the
others."""


class VAETask(NamedTuple):
  """What distinguishes one task of the family."""

  activation: Int[Array, ""]
  """Index into the family's `activations`."""
  weight_scale: base.Scalar
  """Factor on the initial weights: N(0, 1/fan_in), cut off at two standard deviations (Haiku's default)."""
  loss_scale: base.Scalar
  """Factor on the loss."""


def build(
  *,
  dataset: str = "digits",
  resolution: int | None = 8,
  hidden_sizes: tuple[int, ...] = (32,),
  latent_size: int = 4,
  batch_size: int = 64,
  activations: tuple[str, ...] = ("relu", "tanh", "sigmoid", "swish", "gelu"),
  weight_scale: tuple[float, float] = (0.25, 2.0),
  loss_scale: tuple[float, float] = (0.1, 10.0),
  data_dir: str | None = None,
) -> base.TaskFamily:
  """Variational autoencoders on an image data set that stays on the device.

  Each pixel x, from 0 to 1, is a Bernoulli variable that is on with probability x. The encoder makes of an image the
  mean μ and log σ² of a Gaussian q(z|x), the decoder of z ~ N(0, I) the probabilities

      p(z) = sigmoid(logit x̄ + decoder(z)),    x̄ the mean training image.

  The loss is the negative evidence lower bound in nats, less the entropy of the pixels (a constant, see
  `images.pixel_divergence`). It is a mean over examples, divided by the number D of pixels (of all channels) and
  times the task's loss scale:

      L = (1/D) (Σ_pixels [x log(x/p(z)) + (1 - x) log((1 - x)/(1 - p(z)))] + ½ Σ_latents [μ² + σ² - log σ² - 1]),

  with z = μ + σ ε for one ε ~ N(0, I) per example, from the loss's key. In the family's common unit (`normalize`) 1
  is the loss on the training set of a decoder that ignores z and predicts x̄, which then costs no divergence: what
  the best model without latent variables reaches, and a network whose weights are zero. 0, a perfect reconstruction
  that costs nothing either, is out of reach.

  The metrics are `negative_elbo`, with the entropy, and the second sum, `divergence`; both in nats per image.

  Args:
    dataset: a name that `lopt.tasks.datasets.load` takes.
    resolution: height and width of the images in pixels; None for the data set's own.
    hidden_sizes: units of each hidden layer of the encoder; the decoder has them in reverse.
    latent_size: dimensions of z.
    batch_size: examples per batch, drawn with replacement.
    activations: those from which tasks draw; out of relu, tanh, sigmoid, swish, gelu.
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
  ranges.check(weight_scale=weight_scale, loss_scale=loss_scale)

  data = images.load_pixels(dataset, resolution, data_dir)
  num_pixels = data.mean.size
  mean_logits = images.mean_logits(data)

  def forward(inputs, noise, activation):
    activate = images.choose_activation(activations, activation)
    moments = hk.nets.MLP([*hidden_sizes, 2 * latent_size], activation=activate, name="encoder")(inputs)
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    z = mean + jnp.exp(0.5 * log_variance) * noise
    outputs = hk.nets.MLP([*reversed(hidden_sizes), num_pixels], activation=activate, name="decoder")(z)
    return jnp.broadcast_to(mean_logits, outputs.shape) + outputs, mean, log_variance

  network = hk.without_apply_rng(hk.transform(forward))

  def sample(key: base.PRNGKey) -> VAETask:
    uniform = jax.random.uniform(key, (3,))
    return VAETask(
      activation=(uniform[0] * len(activations)).astype(jnp.int32),
      weight_scale=ranges.log_uniform(uniform[1], weight_scale),
      loss_scale=ranges.log_uniform(uniform[2], loss_scale),
    )

  def init(key: base.PRNGKey, task_params: VAETask) -> base.Params:
    params = network.init(key, jnp.zeros((1, num_pixels)), jnp.zeros((1, latent_size)), task_params.activation)
    return images.scale_weights(params, task_params.weight_scale)

  def batch(key: base.PRNGKey, task_params: VAETask, split: str) -> Float[Array, "B pixels"]:
    del task_params
    return images.draw_pixels(key, data, split, batch_size)

  def loss(
    params: base.Params, key: base.PRNGKey, batch: Float[Array, "B pixels"], task_params: VAETask
  ) -> tuple[base.Scalar, base.Metrics]:
    noise = jax.random.normal(key, (len(batch), latent_size))
    logits, mean, log_variance = network.apply(params, batch, noise, task_params.activation)
    reconstruction = images.pixel_divergence(logits, batch).sum(axis=-1).mean()
    divergence = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - log_variance - 1).sum(axis=-1).mean()
    cross_entropy = optax.sigmoid_binary_cross_entropy(logits, batch).sum(axis=-1).mean()
    metrics = {"negative_elbo": cross_entropy + divergence, "divergence": divergence}
    return task_params.loss_scale * (reconstruction + divergence) / num_pixels, metrics

  def normalize(loss: base.Scalar, task_params: VAETask) -> base.Scalar:
    return loss / (task_params.loss_scale * data.divergence)

  return base.TaskFamily(sample, init, batch, loss, normalize, LOSS_CAP)
