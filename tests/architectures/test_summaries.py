"""What networks for whole tensors see, against plain NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lopt.architectures import summaries

SHAPES = {"a": (), "b": (3,), "c": (4, 3), "d": (2, 1, 3, 5)}


def draw(seed, scale=1.0):
  rng = np.random.default_rng(seed)
  return {name: np.asarray(scale * rng.normal(size=shape)) for name, shape in SHAPES.items()}


def float32(tree):
  return jax.tree.map(jnp.float32, tree)


def test_corrected_moments_are_weighted_means_of_all_gradients():
  gradients = [draw(seed, 10.0**seed) for seed in range(4)]
  moments = summaries.no_moments(float32(gradients[0]))
  for g in gradients:
    moments = summaries.accumulate(moments, float32(g))
  momenta, second = summaries.corrected(moments, jnp.int32(len(gradients)))
  for i, name in enumerate(SHAPES):
    series = np.stack([g[name] for g in gradients])
    for j, beta in enumerate((0.9, 0.99, 0.999)):
      weights = beta ** np.arange(len(gradients))[::-1]
      np.testing.assert_allclose(momenta[i][j], np.average(series, axis=0, weights=weights), rtol=1e-5)
    weights = 0.999 ** np.arange(len(gradients))[::-1]
    np.testing.assert_allclose(second[i], np.average(series**2, axis=0, weights=weights), rtol=1e-5)


@pytest.mark.parametrize(
  "losses", [[2.0, 1.5, 1.7, 0.1, 0.1], [-1.0, 0.5, -0.5, 3.0, 0.0]], ids=["positive", "any sign"]
)
def test_loss_features_are_contrasts_of_averages(losses):
  history = summaries.no_losses()
  for t, loss in enumerate(losses):
    history, features = summaries.observe(history, jnp.float32(loss), jnp.int32(t))
    means = [np.average(losses[: t + 1], weights=beta ** np.arange(t + 1.0)[::-1]) for beta in (0.9, 0.99, 0.999)]
    levels = [(loss, means[0]), (means[0], means[1]), (means[1], means[2]), (means[0], losses[0])]
    expected = [(a - b) / (abs(a) + abs(b)) for a, b in levels]
    np.testing.assert_allclose(features, expected, rtol=1e-5, atol=2e-6)


def test_contrasts_of_positive_losses_are_squashed_differences_of_logarithms():
  """A loss that falls by a factor of e a step, at the second step: m_0.9 = (0.9 + 1/e) / 1.9 L_0."""
  history, _ = summaries.observe(summaries.no_losses(), jnp.float32(1.0), jnp.int32(0))
  _, features = summaries.observe(history, jnp.float32(np.exp(-1)), jnp.int32(1))
  mean = (0.9 + np.exp(-1)) / 1.9
  np.testing.assert_allclose(features[0], np.tanh(0.5 * (-1 - np.log(mean))), rtol=1e-5)
  np.testing.assert_allclose(features[3], np.tanh(0.5 * np.log(mean)), rtol=1e-5)


def test_losses_of_zero_have_features_of_zero():
  _, features = summaries.observe(summaries.no_losses(), jnp.float32(0.0), jnp.int32(0))
  np.testing.assert_array_equal(features, np.zeros(4))


def test_progress_depends_on_the_fraction_alone():
  half = summaries.progress(jnp.int32(50), 100)
  positions = np.array([0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1])
  np.testing.assert_allclose(half, np.tanh(10 * (0.5 - positions)), rtol=1e-5)
  np.testing.assert_allclose(jax.jit(summaries.progress)(jnp.int32(500), jnp.int32(1000)), half, rtol=1e-6)


@pytest.mark.parametrize("name", SHAPES)
def test_statistics_of_a_tensor(name):
  p, g, v = draw(0, 0.3)[name], draw(1, 20.0)[name], draw(2)[name] ** 2
  m = np.stack([draw(3)[name], draw(4, 0.1)[name], draw(5, 1e-3)[name]])
  features = summaries.of_tensor(*float32((p, g, m, v)))

  def rms(x):
    return np.sqrt(np.mean(x**2))

  s = np.sqrt(np.mean(v))
  expected = [
    p.ndim / 4,
    np.log(p.size) / 10,
    np.log10(rms(p)) / 2,
    np.log10(np.mean(np.sqrt(v)) / s) / 2,
    *(np.log10(rms(x) / s) / 2 for x in (g, *m)),
  ]
  np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-6)


def test_roots_of_entries_without_gradients_are_a_thousandth_of_the_scale():
  np.testing.assert_allclose(
    summaries.root(jnp.array([[0.0, 2e-6], [0.0, 2e6]])), [[1e-6, 1.4142e-3], [1, 1414.2]], rtol=1e-4
  )
