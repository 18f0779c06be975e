"""Baselines against plain-NumPy recursions of the papers' algorithms."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lopt import configuration
from lopt.evaluation import baselines

LEARNING_RATES = np.array([1e-3, 0.1, 0.5])
CURVATURE = np.array([0.5, 1.0, 4.0])
START = np.array([1.0, -2.0, 0.5])
STEPS = 12


def gradient(x, t):
  """Of a quadratic whose minimum moves, so that no step repeats another."""
  return CURVATURE * (x - np.sin(t))


def trained(step):
  """`(learning rate) -> x` after STEPS steps of `(x, g, t, state, learning rate) -> x`, t from 1."""

  def train(learning_rate):
    x, state = START.copy(), {"m": np.zeros(3), "v": np.zeros(3)}
    for t in range(1, STEPS + 1):
      x = step(x, gradient(x, t), t, state, learning_rate * warmup_cosine(t, STEPS))
    return x

  return train


def moments(g, t, state, b1=0.9, b2=0.999):
  """Adam's two, corrected for their start."""
  state["m"] = b1 * state["m"] + (1 - b1) * g
  state["v"] = b2 * state["v"] + (1 - b2) * g**2
  return state["m"] / (1 - b1**t), state["v"] / (1 - b2**t)


def sgdm(x, g, t, state, rate):
  state["m"] = 0.9 * state["m"] + g
  return x - rate * (g + 0.9 * state["m"])


def adam(x, g, t, state, rate):
  m, v = moments(g, t, state)
  return x - rate * m / (np.sqrt(v) + 1e-8)


def adamw(x, g, t, state, rate):
  return adam(x, g, t, state, rate) - rate * 1e-4 * x


def nadamw(x, g, t, state, rate):
  """As Optax has it: the momentum of the next step, for which the gradient is taken once more."""
  _, v = moments(g, t, state)
  m = 0.9 * state["m"] / (1 - 0.9 ** (t + 1)) + 0.1 * g / (1 - 0.9**t)
  return x - rate * (m / (np.sqrt(v) + 1e-8) + 1e-4 * x)


def lion(x, g, t, state, rate):
  direction = np.sign(0.9 * state["m"] + 0.1 * g)
  state["m"] = 0.99 * state["m"] + 0.01 * g
  return x - rate * (direction + 1e-3 * x)


def adafactor(x, g, t, state, rate):
  """Algorithm 4 of the paper for a vector: steps relative to its root mean square, which are at most that large."""
  decay = 1 - t**-0.8
  state["v"] = decay * state["v"] + (1 - decay) * (g**2 + 1e-30)
  update = g / np.sqrt(state["v"])
  update = update / max(1.0, np.sqrt(np.mean(update**2)))
  return x - rate * max(1e-3, np.sqrt(np.mean(x**2))) * update


REFERENCES = [sgdm, adamw, nadamw, lion, adafactor]


def warmup_cosine(t, num_steps):
  """Of step t = 1, 2, …: a rise over a twentieth of the steps, at least one, and a cosine that ends at zero."""
  return min(1.0, t / max(0.05 * num_steps, 1.0)) * 0.5 * (1 + np.cos(np.pi * (t - 1) / num_steps))


def schedule_free(learning_rate):
  """Defazio et al. 2024, algorithm 1, as written there: y, z and x kept apart. Returns (y, x)."""
  x, z, v = START.copy(), START.copy(), np.zeros(3)
  y = x
  for t in range(1, STEPS + 1):
    g = gradient(y, t)
    v = 0.999 * v + 0.001 * g**2
    z = z - learning_rate * g / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    x = (1 - 1 / t) * x + z / t
    y = 0.1 * z + 0.9 * x
  return y, x


def run(optimizer, shape=(3,)):
  """Parameters and those to evaluate, for each learning rate, under jit and vmap."""

  @jax.jit
  @jax.vmap
  def train(theta):
    tx = optimizer.transform(theta, STEPS)
    x = jnp.asarray(START, jnp.float32).reshape(shape)
    state = tx.init(x)
    for t in range(1, STEPS + 1):
      g = jnp.asarray(CURVATURE, jnp.float32).reshape(shape) * (x - np.float32(np.sin(t)))
      updates, state = tx.update(g, state, x, value=jnp.float32(0))
      x = x + updates
    return x, baselines.evaluation_params(state, x)

  return train(baselines.theta_at(LEARNING_RATES))


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda x: x.__name__)
def test_equals_numpy_reference_under_vmap_over_learning_rates(reference):
  x, to_evaluate = run(getattr(baselines, reference.__name__)())
  expected = np.stack([trained(reference)(learning_rate) for learning_rate in LEARNING_RATES])
  np.testing.assert_allclose(x, expected, rtol=3e-4, atol=1e-5)
  np.testing.assert_array_equal(to_evaluate, x)


def test_schedule_free_adamw_trains_at_y_and_is_evaluated_at_x():
  y, x = run(baselines.schedule_free_adamw())
  expected = [schedule_free(learning_rate) for learning_rate in LEARNING_RATES]
  np.testing.assert_allclose(y, [e[0] for e in expected], rtol=3e-4, atol=1e-5)
  np.testing.assert_allclose(x, [e[1] for e in expected], rtol=3e-4, atol=1e-5)
  assert np.abs(x - y).max() > 0.01


def numpy_muon_step(gradients):
  """The step after these gradients of a matrix, for learning rate 1: Newton-Schulz as Jordan et al. have it."""
  m = u = np.zeros_like(gradients[0])
  for t, g in enumerate(gradients, start=1):
    m = 0.95 * m + 0.05 * g
    u = 0.95 * m / (1 - 0.95 ** (t + 1)) + 0.05 * g / (1 - 0.95**t)
  tall = u.shape[0] > u.shape[1]
  x = u.T if tall else u
  x = x / (np.linalg.norm(x) + 1e-8)
  for _ in range(5):
    a = x @ x.T
    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
  return -0.2 * np.sqrt(max(u.shape)) * (x.T if tall else x)


@pytest.mark.parametrize("shape", [(3, 5), (6, 2), (2, 2, 3, 4)])
def test_muon_steps_of_matrices_and_kernels_are_orthogonalised_momentum(shape):
  rng = np.random.default_rng(0)
  gradients = rng.normal(size=(3, *shape))
  tx = baselines.muon().transform(baselines.theta_at(1.0), 3)
  params = {"w": jnp.zeros(shape), "head": {"w": jnp.zeros((3, 4))}, "b": jnp.zeros(4)}
  state, adam_state = tx.init(params), optax.nadam(1.0).init(params["b"])
  updates: Any = None
  expected_b: Any = None
  for g in gradients:
    b = jnp.asarray(g.ravel()[:4], jnp.float32)
    grads = {"w": jnp.asarray(g, jnp.float32), "head": {"w": jnp.tile(b, (3, 1))}, "b": b}
    updates, state = tx.update(grads, state, params, value=jnp.float32(0))
    expected_b, adam_state = optax.nadam(1.0).update(b, adam_state)
  factor = warmup_cosine(3, 3)
  matrices = [g.reshape(-1, shape[-1]) for g in gradients]
  expected = factor * numpy_muon_step(matrices)
  np.testing.assert_allclose(updates["w"].reshape(matrices[0].shape), expected, rtol=2e-3, atol=1e-4)
  np.testing.assert_allclose(updates["b"], factor * expected_b, rtol=1e-5)
  np.testing.assert_allclose(updates["head"]["w"], factor * np.tile(expected_b, (3, 1)), rtol=1e-5)


@pytest.mark.slow_but_for("rnn_language_model", "cnn_classifier")
@pytest.mark.parametrize(
  ("name", "adams"),
  [
    ("mlp_classifier", {"mlp/~/linear_1/w"}),
    ("cnn_classifier", {"linear/w"}),
    ("resnet_classifier", {"linear/w"}),
    ("mlp_autoencoder", {"decoder/~/linear_1/w"}),
    ("rnn_language_model", {"embed/embeddings", "linear/w"}),
    ("transformer_language_model", {"embed/embeddings", "linear_4/w", "~/positions"}),
    ("vision_transformer", {"embedding/w", "head/w", "~/positions"}),
  ],
)
def test_muon_leaves_embeddings_and_the_output_layer_to_adam(name, adams, tmp_path):
  """Adam's first step has entries of one size; an orthogonalised one does not."""
  text = tmp_path / "text.txt"
  text.write_text("the quick brown fox jumps over the lazy dog. " * 100)
  options = {"path": str(text)} if "language" in name else {"dataset": "digits"}
  family = configuration.build("tasks", {"name": name, **options}, where="task")
  shapes = jax.eval_shape(lambda key: family.init(key, family.sample(key)), jax.random.key(0))
  leaves, structure = jax.tree.flatten(shapes)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  grads = structure.unflatten([jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])
  tx = baselines.muon().transform(baselines.theta_at(1.0), 10)
  updates, _ = jax.jit(lambda g: tx.update(g, tx.init(g), g, value=jnp.float32(0)))(grads)
  matrices = {
    jax.tree_util.keystr(path, simple=True, separator="/"): np.abs(x)
    for path, x in jax.tree_util.tree_leaves_with_path(updates)
    if x.ndim > 1
  }
  assert {x for x, size in matrices.items() if np.ptp(size) < 1e-3 * size.mean()} == adams


def test_learning_rates_rise_and_fall_to_zero_as_those_of_directions():
  def rates(num_steps):
    """Of AdamW's steps, which on a constant gradient and at zero are the learning rate."""
    tx = baselines.adamw().transform(baselines.theta_at(0.1), jnp.int32(num_steps))  # T may be traced

    def step(state, _):
      updates, state = tx.update(jnp.float32(1.0), state, jnp.float32(0.0), value=jnp.float32(0))
      return state, -jnp.asarray(updates)

    return jax.lax.scan(step, tx.init(jnp.float32(0.0)), None, length=num_steps)[1]

  for num_steps in (1, 2, 3, 60):
    expected = [0.1 * warmup_cosine(t, num_steps) for t in range(1, num_steps + 1)]
    np.testing.assert_allclose(rates(num_steps), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", baselines.ALL)
def test_all_begin_at_the_learning_rate_1e_3(name):
  optimizer = baselines.ALL[name]()
  theta = optimizer.init(jax.random.key(0))
  assert set(theta) == {"log_learning_rate"}
  assert theta["log_learning_rate"].shape == ()
  np.testing.assert_allclose(np.exp(theta["log_learning_rate"]), 1e-3, rtol=1e-6)


def test_prodigy_finds_its_step_size():
  """From a factor of 1, and 10 times as close to a distant minimum as Adam is with steps of Prodigy's first size."""
  tx = baselines.prodigy().transform(baselines.theta_at(1.0), 300)

  @jax.jit
  def train(x):
    def step(carry, _):
      x, state = carry
      updates, state = tx.update(x - 50.0, state, x, value=jnp.float32(0))
      return (x + updates, state), None

    return jax.lax.scan(step, (x, tx.init(x)), None, length=300)[0][0]

  assert abs(float(train(jnp.float32(0.0))) - 50.0) < 5.0


def test_grids_are_half_decades():
  expected = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
  assert expected == baselines.LEARNING_RATES
  assert [baselines.half_decade(index) for index in (-13, 2, 3)] == [3e-7, 10.0, 30.0]
  assert [baselines.half_decade(index) for index in baselines.GRID] == list(expected[4:13])
