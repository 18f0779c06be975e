"""The inner problem of experiment 4 against a plain NumPy loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lopt.tasks import mlp_classifier

T, BATCH = 8, 16
START, POWER = 0.3, 2.0


@pytest.fixture(scope="module")
def built(script):
  small = {"dataset": "digits", "resolution": 8, "hidden_sizes": (6, 5), "batch_size": BATCH, "horizon": T}
  return script.build(script.QUICK._replace(**small))


def loss_gradient_accuracy(weights, inputs, labels):
  """Cross-entropy in units of log 10, its gradient as it stands (not in units), and accuracy, of a ReLU network."""
  layers = [inputs]
  for i, (w, b) in enumerate(weights):
    z = layers[-1] @ w + b
    layers.append(np.maximum(z, 0) if i < len(weights) - 1 else z)
  logits = layers[-1] - layers[-1].max(axis=1, keepdims=True)
  p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  loss = -np.mean(np.log(p[np.arange(len(labels)), labels]))
  delta, gradients = (p - np.eye(10)[labels]) / len(labels), []
  for (w, _), x in zip(reversed(weights), reversed(layers[:-1]), strict=True):
    gradients.append((x.T @ delta, delta.sum(axis=0)))
    delta = (delta @ w.T) * (x > 0)
  return loss / np.log(10), gradients[::-1], np.mean(np.argmax(layers[-1], axis=1) == labels)


def numpy_run(init, batches):
  weights = [(np.float64(init[name]["w"]), np.float64(init[name]["b"])) for name in sorted(init)]
  velocity = [(np.zeros_like(w), np.zeros_like(b)) for w, b in weights]
  losses, accuracies = [], []
  for t, (train, validation) in enumerate(batches):
    loss, gradient, _ = loss_gradient_accuracy(weights, *train)
    velocity = [(0.9 * v + g, 0.9 * u + h) for (v, u), (g, h) in zip(velocity, gradient, strict=True)]
    rate = START / (1 + t / T) ** POWER
    weights = [(w - rate * v, b - rate * u) for (w, b), (v, u) in zip(weights, velocity, strict=True)]
    losses.append(loss)
    accuracies.append(loss_gradient_accuracy(weights, *validation)[2])
  return np.array(losses), np.array(accuracies)


def run(problem, step, theta, keys):
  state, losses = problem.init(jax.random.key(1), jnp.int32(T)), []
  for key in keys:
    state, loss = jax.jit(step)(theta, state, key)
    losses.append(loss)
  return losses


@pytest.mark.slow
def test_inner_runs_equal_those_of_a_plain_loop(script, built):
  problem, measure = built
  state = problem.init(jax.random.key(1), jnp.int32(T))
  # The batches, drawn as the script does, from a family that differs in nothing that a batch depends on.
  one = (1.0, 1.0)
  family = mlp_classifier.build(dataset="digits", batch_size=BATCH, min_classes=10, input_scale=one)
  keys, batches = jax.random.split(jax.random.key(2), T), []
  for key in keys:
    step_key, validation_key, _ = jax.random.split(key, 3)
    train_key = jax.random.split(jax.random.split(step_key)[0])[0]
    draws = (("train", train_key), ("validation", validation_key))
    examples = [family.batch(key, state.task_params, split) for split, key in draws]
    batches.append([(np.float64(x.inputs), np.asarray(x.labels)) for x in examples])
  losses, accuracies = numpy_run(state.params, batches)

  theta = script.theta_at((START, POWER))
  measured = run(problem, measure, theta, keys)
  np.testing.assert_allclose([x["training loss"] for x in measured], losses, rtol=1e-4)
  np.testing.assert_allclose([x["validation accuracy"] for x in measured], accuracies, atol=1e-6)
  assert losses[-1] < losses[0]  # it trains

  for objective, expected in (("training loss", losses), ("validation accuracy", -accuracies)):
    tuned = script.with_objective(problem, measure, objective)
    np.testing.assert_allclose(run(tuned, tuned.step, theta, keys), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_point_is_judged_alone_as_among_others(script, built):
  points = np.array([[0.01, 1.0], [0.3, 2.0], [30.0, 0.1]])
  together = script.evaluate(*built, points, num_runs=3, seed=5)
  alone = script.evaluate(*built, points[1:2], num_runs=3, seed=5)
  for objective, values in together.items():
    np.testing.assert_allclose(values[1], alone[objective][0], rtol=1e-5)
  assert together["training loss"][1] < together["training loss"][2] <= script.LOSS_CAP
