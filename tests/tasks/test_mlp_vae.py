"""Variational autoencoders against quadrature: of the bound, the divergence, and the likelihood that it bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats

from lopt.tasks import datasets, mlp_vae


def linear(x, layer):
  return x @ np.asarray(layer["w"], np.float64) + np.asarray(layer["b"], np.float64)


@pytest.fixture
def vae(colour_images):
  """A VAE with one latent dimension and tanh, some random parameters, a batch of three images."""
  family = mlp_vae.build(hidden_sizes=(5,), latent_size=1, batch_size=3, activations=("tanh",))
  task_params = family.sample(jax.random.key(0))
  # Not those of `init`, whose biases are zero and gains one, so that errors in them would go unnoticed.
  generator = np.random.default_rng(0)
  shapes = jax.eval_shape(family.init, jax.random.key(1), task_params)
  params = jax.tree.map(lambda x: jnp.asarray(0.5 * generator.standard_normal(x.shape), jnp.float32), shapes)
  return family, task_params, params, family.batch(jax.random.key(2), task_params, "train")


def posterior(params, x):
  """μ and σ of q(z|x)."""
  hidden = np.tanh(linear(x, params["encoder/~/linear_0"]))
  mean, log_variance = linear(hidden, params["encoder/~/linear_1"]).T
  return mean, np.exp(log_variance / 2)


def log_likelihood(params, x, z, images):
  """Σ_pixels x log p(z) + (1 - x) log(1 - p(z)) for each x and each of its z, [images, points]."""
  train = np.asarray(images.train.images, np.float64).reshape(90, -1) / 255
  mean_logits = scipy.special.logit((train.sum(axis=0) + 0.5) / 91)
  hidden = np.tanh(linear(z[..., None], params["decoder/~/linear_0"]))
  logits = mean_logits + linear(hidden, params["decoder/~/linear_1"])
  log_p, log_q = scipy.special.log_expit(logits), scipy.special.log_expit(-logits)
  return np.sum(x[:, None] * log_p + (1 - x[:, None]) * log_q, axis=-1)


def kl_from_the_prior(q):
  """∫ q log(q/p) for the standard normal p."""
  integrand = lambda z: q.pdf(z) * (q.logpdf(z) - scipy.stats.norm.logpdf(z))
  return scipy.integrate.quad(integrand, q.mean() - 12 * q.std(), q.mean() + 12 * q.std())[0]


def draws(vae, n):
  """The loss and the metrics under n keys."""
  family, task_params, params, batch = vae
  loss = jax.jit(jax.vmap(lambda key: family.loss(params, key, batch, task_params)))
  return loss(jax.random.split(jax.random.key(3), n))


def test_the_bound(vae, colour_images):
  """Its mean over noise is that of Gauss-Hermite quadrature, and it is below the log-likelihood."""
  _, task_params, params, batch = vae
  x = np.asarray(batch, np.float64)
  losses, metrics = draws(vae, 20_000)
  mean, sigma = posterior(params, x)
  points, weights = scipy.special.roots_hermitenorm(60)
  weights = weights / weights.sum()
  z = mean[:, None] + sigma[:, None] * points
  divergence = [kl_from_the_prior(scipy.stats.norm(m, s)) for m, s in zip(mean, sigma, strict=True)]
  np.testing.assert_allclose(metrics["divergence"], np.mean(divergence), rtol=1e-4)
  elbo = log_likelihood(params, x, z, colour_images) @ weights - divergence
  sampled = np.asarray(metrics["negative_elbo"], np.float64)
  assert abs(sampled.mean() + elbo.mean()) < 4 * sampled.std() / np.sqrt(len(sampled)) + 1e-4 * abs(elbo.mean())

  entropy = np.mean(np.sum(scipy.special.entr(x) + scipy.special.entr(1 - x), axis=1))
  np.testing.assert_allclose(losses, task_params.loss_scale * (sampled - entropy) / 72, rtol=1e-3)

  points, weights = scipy.special.roots_hermitenorm(180)
  z = np.broadcast_to(points, (3, 180))
  evidence = scipy.special.logsumexp(log_likelihood(params, x, z, colour_images), axis=1, b=weights / weights.sum())
  assert np.all(elbo < evidence)


def test_the_bound_is_tight_without_information(vae, colour_images):
  """A decoder that ignores z, with q the prior: no divergence, no scatter; and 1 if it predicts the mean image."""
  family, task_params, params, batch = vae
  params = dict(params)
  for name in ("encoder/~/linear_1", "decoder/~/linear_1"):
    params[name] = {**params[name], "w": jnp.zeros_like(params[name]["w"])}
  params["encoder/~/linear_1"]["b"] = jnp.zeros(2)
  _, metrics = draws((family, task_params, params, batch), 10)
  assert np.all(metrics["divergence"] == 0)
  x = np.asarray(batch, np.float64)
  evidence = log_likelihood(params, x, np.zeros((3, 1)), colour_images)
  np.testing.assert_allclose(metrics["negative_elbo"], -evidence.mean(), rtol=1e-5)

  train = jnp.asarray(colour_images.train.images.reshape(90, -1) / 255, jnp.float32)
  loss, _ = family.loss(jax.tree.map(jnp.zeros_like, params), jax.random.key(4), train, task_params)
  np.testing.assert_allclose(family.normalize(loss, task_params), 1.0, rtol=1e-5)


def test_gradients_pass_through_the_noise(vae):
  """The encoder's gradient is that of the loss at fixed noise, by finite differences."""
  family, task_params, params, batch = vae
  loss = jax.jit(lambda params: family.loss(params, jax.random.key(5), batch, task_params)[0])
  gradient = jax.grad(loss)(params)["encoder/~/linear_1"]["b"]
  for i, direction in enumerate(np.eye(2, dtype=np.float32)):
    at = [
      float(loss({**params, "encoder/~/linear_1": {**params["encoder/~/linear_1"], "b": bias}}))
      for bias in (params["encoder/~/linear_1"]["b"] + s * direction for s in (0.01, -0.01))
    ]
    np.testing.assert_allclose(
      gradient[i], (at[0] - at[1]) / 0.02, rtol=2e-2, atol=1e-4 * float(task_params.loss_scale)
    )


def test_tasks_are_drawn_as_documented(colour_images):
  family = mlp_vae.build(hidden_sizes=(), latent_size=2)
  tasks = jax.jit(jax.vmap(family.sample))(jax.random.split(jax.random.key(0), 1000))
  assert scipy.stats.chisquare(np.bincount(tasks.activation)).pvalue > 1e-3
  for values, low, high in ((tasks.weight_scale, 0.25, 2.0), (tasks.loss_scale, 0.1, 10.0)):
    log_uniform = scipy.stats.uniform(np.log(low), np.log(high / low))
    assert scipy.stats.kstest(np.log(np.asarray(values, np.float64)), log_uniform.cdf).pvalue > 1e-3


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"hidden_sizes": (0,)}, "hidden_sizes="),
    ({"latent_size": 0}, "latent_size: must be at least 1, not 0"),
    ({"batch_size": 0}, "batch_size: must be at least 1, not 0"),
    ({"activations": ("step",)}, "activations="),
    ({"loss_scale": (2.0, 1.0)}, "loss_scale="),
  ],
)
def test_bad_options(options, message, monkeypatch):
  monkeypatch.setattr(datasets, "load", None)
  with pytest.raises(ValueError, match=f"^{message}"):
    mlp_vae.build(**options)
