"""What image tasks share, against NumPy and SciPy."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
import scipy.special
import scipy.stats

from lopt.tasks import images


@pytest.mark.parametrize(("size", "stride"), [(1, 1), (3, 1), (3, 2), (1, 2), (5, 3)])
def test_convolution_is_scipys(size, stride):
  generator = np.random.default_rng(size)
  inputs = generator.standard_normal((2, 7, 4, 3), np.float32)
  kernel = generator.standard_normal((size * size * 3, 5), np.float32)
  bias = generator.standard_normal(5, np.float32)
  network = hk.without_apply_rng(hk.transform(lambda x: images.convolve(x, 5, size=size, stride=stride)))
  outputs = network.apply({"convolution": {"w": kernel, "b": bias}}, jnp.asarray(inputs))
  kernel = kernel.reshape(size, size, 3, 5)
  padded = np.pad(inputs, ((0, 0), (size // 2, size // 2), (size // 2, size // 2), (0, 0)))
  for example in range(2):
    for channel in range(5):
      # "valid" sums over the inputs' channels, since the kernel has as many.
      full = scipy.signal.correlate(padded[example], kernel[..., channel], mode="valid")[..., 0]
      np.testing.assert_allclose(
        outputs[example, ..., channel], full[::stride, ::stride] + bias[channel], rtol=1e-4, atol=1e-4
      )


def test_what_the_mean_image_costs(colour_images):
  pixels = images.load_pixels("any", None, None)
  x = np.asarray(colour_images.train.images, np.float64).reshape(90, -1) / 255
  mean = (x.sum(axis=0) + 0.5) / 91
  np.testing.assert_allclose(pixels.mean, mean)
  np.testing.assert_allclose(scipy.special.expit(np.asarray(images.mean_logits(pixels), np.float64)), mean, rtol=1e-6)
  np.testing.assert_allclose(pixels.squared_error, np.mean((x - mean) ** 2))
  divergence = scipy.special.rel_entr(x, mean) + scipy.special.rel_entr(1 - x, 1 - mean)
  np.testing.assert_allclose(pixels.divergence, divergence.mean())


def test_pixel_divergence_is_scipys():
  x = np.linspace(0, 1, 11)
  logits = np.linspace(-8, 8, 7)
  x, logits = (a.ravel() for a in np.meshgrid(x, logits))
  p = scipy.special.expit(logits)
  expected = scipy.special.rel_entr(x, p) + scipy.special.rel_entr(1 - x, 1 - p)
  actual = images.pixel_divergence(jnp.asarray([logits], jnp.float32), jnp.asarray([x], jnp.float32))
  np.testing.assert_allclose(actual[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_pixels_are_drawn_uniformly(colour_images, split):
  pixels = images.load_pixels("any", None, None)
  drawn = images.draw_pixels(jax.random.key(0), pixels, split, 6000)
  own = np.asarray(getattr(colour_images, split).images).reshape(-1, 72)
  found, counts = np.unique(np.rint(np.asarray(drawn) * 255), axis=0, return_counts=True)
  np.testing.assert_array_equal(found, np.unique(own, axis=0))
  assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_a_pixel_that_rounding_makes_brighter_than_white():
  above_one = jnp.nextafter(jnp.ones((1, 1)), jnp.full((1, 1), 2.0))
  np.testing.assert_allclose(images.pixel_divergence(jnp.zeros((1, 1)), above_one), np.log(2), rtol=1e-6)


def test_activations_are_cut_to_a_width():
  x = jnp.linspace(-2, 2, 14).reshape(2, 7)
  for fraction, kept in ((0.01, 1), (0.5, 4), (1.0, 7)):
    for i, (name, function) in enumerate(images.ACTIVATIONS.items()):
      names = tuple(images.ACTIVATIONS)
      y = images.choose_activation(names, jnp.int32(i), jnp.float32(fraction))(x)
      np.testing.assert_allclose(y[:, :kept], function(x)[:, :kept], rtol=1e-6, atol=1e-6, err_msg=name)
      assert np.all(y[:, kept:] == 0)


def test_only_weights_are_scaled():
  params = {
    "norm": {"scale": jnp.ones(2), "offset": jnp.ones(2)},
    "linear": {"w": jnp.ones((2, 2)), "b": jnp.ones(2)},
  }
  scaled = images.scale_weights(params, jnp.float32(3.0))
  values = {f"{module}.{name}": set(np.ravel(x)) for module, name, x in hk.data_structures.traverse(scaled)}
  assert values == {"norm.scale": {1.0}, "norm.offset": {1.0}, "linear.w": {3.0}, "linear.b": {1.0}}
