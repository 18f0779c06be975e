"""The inner problem of experiment 5 against a plain NumPy loop with smaller layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lopt import base
from lopt.tasks import mlp_classifier

T, BATCH, MAX_WIDTH = 6, 16, 8
WIDTHS = [8, 3, 5, 1, 6]


@pytest.fixture(scope="module")
def problem(script):
  small = {"dataset": "digits", "max_width": MAX_WIDTH, "batch_size": BATCH, "horizon": T}
  return script.build(script.QUICK._replace(**small))


def theta_with_widths(script, rng):
  theta = script.at(rng.uniform(-0.5, 0.5, size=29))
  share = (np.array(WIDTHS) - 0.5) / MAX_WIDTH
  return {**theta, "width": jnp.float32(np.log(share / (1 - share)))}


def loss_and_gradient(weights, inputs, labels):
  """Cross-entropy and its gradient, of a ReLU network with one list entry (w, b) a layer."""
  layers = [inputs]
  for i, (w, b) in enumerate(weights):
    z = layers[-1] @ w + b
    layers.append(np.maximum(z, 0) if i < len(weights) - 1 else z)
  logits = layers[-1] - layers[-1].max(axis=1, keepdims=True)
  p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  delta, gradients = (p - np.eye(10)[labels]) / len(labels), []
  for (w, _), x in zip(reversed(weights), reversed(layers[:-1]), strict=True):
    gradients.append((x.T @ delta, delta.sum(axis=0)))
    delta = (delta @ w.T) * (x > 0)
  return -np.mean(np.log(p[np.arange(len(labels)), labels])), gradients[::-1]


@pytest.mark.slow
def test_inner_runs_equal_those_of_a_smaller_network(script, problem):
  theta = theta_with_widths(script, np.random.default_rng(0))
  state = problem.init(jax.random.key(1), jnp.int32(T))
  sizes = [64, *WIDTHS, 10]
  weights = [
    (np.asarray(state.params[name]["w"], np.float64)[:rows, :columns], np.zeros(columns))
    for name, rows, columns in zip(sorted(state.params), sizes[:-1], sizes[1:], strict=True)
  ]
  velocity = [(np.zeros_like(w), np.zeros_like(b)) for w, b in weights]
  # A block is an array of the parameters, in the order of their names: of each layer b, then w.
  rates = np.asarray(np.exp(np.float64(theta["blocks"]["log_learning_rate"]))).reshape(6, 2)
  momenta = np.asarray(1 / (1 + np.exp(-np.float64(theta["blocks"]["logit_momentum"])))).reshape(6, 2)
  # The batches, drawn as inner training does, from a family that differs in nothing that a batch depends on.
  family = mlp_classifier.build(dataset="digits", batch_size=BATCH, min_classes=10, input_scale=(1.0, 1.0))
  losses, expected = [], []
  for key in jax.random.split(jax.random.key(2), T):
    train_key, validation_key = (jax.random.split(key)[0] for key in jax.random.split(key))
    train, validation = (
      family.batch(key, state.task_params, split)
      for split, key in (("train", train_key), ("validation", validation_key))
    )
    _, gradient = loss_and_gradient(weights, np.float64(train.inputs), np.asarray(train.labels))
    velocity = [(m[1] * v + g, m[0] * u + h) for m, (v, u), (g, h) in zip(momenta, velocity, gradient, strict=True)]
    weights = [(w - a[1] * v, b - a[0] * u) for a, (w, b), (v, u) in zip(rates, weights, velocity, strict=True)]
    loss, _ = loss_and_gradient(weights, np.float64(validation.inputs), np.asarray(validation.labels))
    expected.append(loss / np.log(10))
    state, loss = jax.jit(problem.step)(theta, state, key)
    losses.append(loss)
  np.testing.assert_allclose(losses, expected, rtol=1e-4)
  for (w, b), name in zip(weights, sorted(state.params), strict=True):
    np.testing.assert_allclose(state.params[name]["w"][: w.shape[0], : w.shape[1]], w, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(state.params[name]["b"][: len(b)], b, rtol=1e-3, atol=1e-5)


def test_widths_span_all_units(script):
  x = jnp.array([-100.0, -2.0, 0.0, 0.1, 100.0])
  np.testing.assert_array_equal(script.widths(x, 32), [1, 4, 16, 17, 32])


def test_theta_has_the_29_of_the_paper_in_their_ranges(script):
  low, high = script.at(-1.0), script.at(1.0)
  assert sum(x.size for x in jax.tree.leaves(low)) == 29
  np.testing.assert_allclose(jnp.exp(low["blocks"]["log_learning_rate"]), 1e-4, rtol=1e-4)
  np.testing.assert_allclose(jnp.exp(high["blocks"]["log_learning_rate"]), 1.0, rtol=1e-4)


def toy():
  """A run's loss is its first meta-parameter's size, and noise."""

  def step(theta, state, key):
    return state, jnp.abs(theta["width"][0]) + 0.1 * jax.random.normal(key)

  return base.UnrolledProblem(lambda key: jnp.int32(T), lambda key, horizon: jnp.float32(0), step, 2.0)


def test_random_search_keeps_the_best_that_it_has_seen(script):
  settings = script.QUICK._replace(budget=8 * T, horizon=T, num_seeds=2, num_records=4)
  thetas, steps = script.by_random_search(toy(), settings)
  np.testing.assert_array_equal(steps, T * np.array([1, 2, 4, 8]))
  draw_key, run_key = jax.random.split(jax.random.fold_in(jax.random.key(2), settings.seed))
  candidates = script.at(jax.random.uniform(draw_key, (16, 29), minval=-1.0, maxval=1.0))
  losses = script.evaluate(toy(), candidates, jax.random.split(run_key, 16)).reshape(2, 8)
  best = [[8 * seed + np.argmin(losses[seed, :n]) for n in (1, 2, 4, 8)] for seed in range(2)]
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, np.asarray(y)[np.array(best)]), thetas, candidates)


def test_meta_parameters_are_judged_by_the_same_runs(script):
  thetas = jax.tree.map(lambda *x: jnp.stack(x)[None], *map(script.at, (0.1, 0.1, -0.2, 1.0)))
  values = script.judge(toy(), thetas, 3)[0]
  # The first entry of a width is 3 times the offset; 3 is above the cap.
  np.testing.assert_allclose(values - values[0], [0.0, 0.0, 0.3, 2.0 - values[0]], atol=1e-5)
  assert abs(values[0] - 0.3) < 5 * 0.1 / np.sqrt(3 * T)
