"""Learned hyperparameters against a plain NumPy loop with the hyperparameters themselves."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lopt.architectures import hyperparameters

T = 12


def numpy_schedule(name, x, t):
  if name == "log_linear":
    return np.exp((1 - t / T) * x["log_learning_rate"] + t / T * x["log_final_learning_rate"])
  if name == "inverse_time":
    return np.exp(x["log_learning_rate"]) / (1 + t / T) ** np.exp(x["log_power"])
  return np.exp(x["log_learning_rate"])


def numpy_run(optimizer, schedule, x, start, gradients):
  """Where one array gets to, by the textbook."""
  sigmoid = lambda z: 1 / (1 + np.exp(-z))
  p, m, v = np.array(start, np.float64), 0.0, 0.0
  for t, g in enumerate(gradients):
    alpha = numpy_schedule(schedule, x, t)
    if optimizer == "adam":
      b1, b2 = sigmoid(x["logit_beta1"]), sigmoid(x["logit_beta2"])
      m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
      p = p - alpha * (m / (1 - b1 ** (t + 1))) / (np.sqrt(v / (1 - b2 ** (t + 1))) + 1e-8)
    else:
      m = (sigmoid(x["logit_momentum"]) if optimizer == "sgdm" else 0.0) * m + g
      p = p - alpha * m
  return p


def run(learned, theta, start, gradients):
  """As inner training does: a state made without knowing θ, then one compiled update per step."""
  nothing = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), theta)
  params, state = start, learned.transform(nothing, T).init(start)

  @jax.jit
  def step(params, state, gradient):
    updates, state = learned.transform(theta, jnp.int32(T)).update(gradient, state, params, value=jnp.float32(0))
    return optax.apply_updates(params, updates), state

  for gradient in gradients:
    params, state = step(params, state, gradient)
  return params


@pytest.mark.parametrize("num_blocks", [None, 3])
@pytest.mark.parametrize("schedule", ["constant", "log_linear", "inverse_time"])
@pytest.mark.parametrize("optimizer", ["sgd", "sgdm", "adam"])
def test_steps_equal_those_of_a_plain_loop(optimizer, schedule, num_blocks):
  learned = hyperparameters.build(
    optimizer=optimizer, schedule=schedule, num_blocks=num_blocks, final_learning_rate=0.001, power=2.0
  )
  rng = np.random.default_rng(0)
  theta = jax.tree.map(
    lambda x: jnp.float32(x + rng.normal(scale=0.3, size=x.shape)), learned.init(jax.random.key(0))
  )
  start = {"b": {"w": jnp.ones((2, 3))}, "a": [jnp.zeros(4), -jnp.ones(())]}
  gradients = [jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)), start) for _ in range(T)]
  end = run(learned, theta, start, gradients)
  for i, (leaf, first) in enumerate(zip(jax.tree.leaves(end), jax.tree.leaves(start), strict=True)):
    x = {name: np.float64(value if num_blocks is None else value[i]) for name, value in theta.items()}
    expected = numpy_run(optimizer, schedule, x, first, [np.float64(jax.tree.leaves(g)[i]) for g in gradients])
    np.testing.assert_allclose(leaf, expected, rtol=1e-4, atol=1e-6)


def test_initial_theta_stands_for_the_given_hyperparameters():
  learned = hyperparameters.build(learning_rate=0.02, momentum=0.8, num_blocks=2)
  theta = learned.init(jax.random.key(0))
  np.testing.assert_allclose(jnp.exp(theta["log_learning_rate"]), [0.02, 0.02], rtol=1e-5)
  np.testing.assert_allclose(jax.nn.sigmoid(theta["logit_momentum"]), [0.8, 0.8], rtol=1e-5)


def test_fixed_entries_are_no_part_of_theta_but_count():
  options = {"schedule": "inverse_time", "power": 3.0, "time_constant": 5.0, "momentum": 0.7}
  learned = hyperparameters.build(**options, fixed=("logit_momentum", "log_power"))
  whole = hyperparameters.build(**options)
  theta = learned.init(jax.random.key(0))
  assert list(theta) == ["log_learning_rate"]
  gradients = [jnp.ones(2)] * T
  expected = run(whole, whole.init(jax.random.key(0)), jnp.zeros(2), gradients)
  np.testing.assert_array_equal(run(learned, theta, jnp.zeros(2), gradients), expected)


@pytest.mark.parametrize(
  "options",
  [
    {"optimizer": "rmsprop"},
    {"schedule": "cosine"},
    {"num_blocks": 0},
    {"learning_rate": 0.0},
    {"final_learning_rate": -1.0},
    {"power": float("inf")},
    {"time_constant": 0.0},
    {"momentum": 1.0},
    {"beta2": 0.0},
    {"fixed": ("momentum",)},
    {"fixed": ("log_learning_rate", "logit_momentum")},
  ],
)
def test_bad_settings_are_named(options):
  unchecked = inspect.unwrap(hyperparameters.build)  # without the tests' own type check, as users call it
  with pytest.raises(ValueError, match=next(iter(options))):
    unchecked(**options)


def test_parameters_of_another_structure_are_refused():
  learned = hyperparameters.build(num_blocks=2)
  with pytest.raises(ValueError, match="num_blocks=2: must be the parameters' 1 arrays"):
    learned.transform(learned.init(jax.random.key(0)), 1).init({"w": jnp.zeros(3)})
