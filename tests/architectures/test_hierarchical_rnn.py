"""The hierarchical optimizer against a plain NumPy one, written from its equations, tensor by tensor, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lopt.architectures import hierarchical_rnn

OPTIONS = {"lstm_size": 3, "context_size": 2, "hidden_sizes": (4, 3)}
OPTIMIZER = hierarchical_rnn.build(**OPTIONS)
NUM_STEPS = 10
EPSILON = 1e-16
SHAPES = {"b": (3,), "s": (), "w": (4, 3)}


def draw(seed, scale=1.0):
  rng = np.random.default_rng(seed)
  return {name: np.asarray(scale * rng.normal(size=shape)) for name, shape in SHAPES.items()}


def random_theta():
  """θ without zeros, last layers included."""
  shapes = jax.eval_shape(OPTIMIZER.init, jax.random.key(0))
  rng = np.random.default_rng(7)
  return jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)), shapes)


@jax.jit
def update(theta, num_steps, g, state, params, loss):
  """Compiled once for all tests that have the same tensors."""
  return OPTIMIZER.transform(theta, num_steps).update(g, state, params, value=loss)


def run(theta, params, gradients, losses):
  """The updates of successive gradients at the same parameters."""
  params, updates = jax.tree.map(jnp.float32, params), []
  state = OPTIMIZER.transform(theta, NUM_STEPS).init(params)
  for g, loss in zip(gradients, losses, strict=True):
    u, state = update(theta, NUM_STEPS, jax.tree.map(jnp.float32, g), state, params, jnp.float32(loss))
    updates.append(u)
  return updates


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def linear(weights, x):
  return x @ np.asarray(weights["w"], np.float64) + np.asarray(weights["b"], np.float64)


def average(values, beta):
  """The bias-corrected exponential moving average."""
  return np.average(values, axis=0, weights=beta ** np.arange(len(values), dtype=float)[::-1])


def rms(x):
  return np.sqrt(np.mean(x**2) + EPSILON)


def numpy_updates(theta, params, gradients, losses):
  """Everything from scratch: averages are recomputed from all gradients and losses so far."""
  betas = (0.9, 0.99, 0.999)
  lstm = {name: (np.zeros(OPTIONS["lstm_size"]), np.zeros(OPTIONS["lstm_size"])) for name in params}
  updates = []
  for t in range(len(gradients)):
    positions = np.array([0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1])
    loss, means = losses[t], [average(losses[: t + 1], beta) for beta in betas]
    pairs = [(loss, means[0]), (means[0], means[1]), (means[1], means[2]), (means[0], losses[0])]
    of_run = [*np.tanh(10 * (t / NUM_STEPS - positions)), *((a - b) / (abs(a) + abs(b)) for a, b in pairs)]
    x, mlp_features = {}, {}
    for name, p in params.items():
      g = gradients[t][name]
      m = [average([g[name] for g in gradients[: t + 1]], beta) for beta in betas]
      v = average([g[name] ** 2 for g in gradients[: t + 1]], 0.999)
      s = rms(np.sqrt(v))
      ratios = [rms(p), rms(np.mean(np.sqrt(v))) / s, *(rms(y) / s for y in (g, *m))]
      x[name] = np.array([*of_run, p.ndim / 4, np.log(p.size) / 10, *(np.log10(r) / 2 for r in ratios)])
      root = np.sqrt(v + 1e-6 * np.mean(v) + EPSILON)
      mlp_features[name] = [p, root, g, *m, g / root, *(y / root for y in m)]
    of_all = np.mean([np.maximum(linear(theta["mix"], row), 0) for row in x.values()], axis=0)
    update = {}
    for name, p in params.items():
      hidden, cell = lstm[name]
      u = linear(theta["inputs"], x[name]) + of_all
      i, g, f, o = np.split(linear(theta["lstm/linear"], np.concatenate([u, hidden])), 4)
      cell = sigmoid(f + 1) * cell + sigmoid(i) * np.tanh(g)
      hidden = sigmoid(o) * np.tanh(cell)
      lstm[name] = hidden, cell
      *context, log_step = linear(theta["controls"], hidden)
      columns = [y.ravel() / rms(y) for y in mlp_features[name]] + [np.full(p.size, c) for c in context]
      h = np.stack(columns, axis=1)
      h = np.maximum(linear(theta["layer_0"], h), 0)
      h = np.maximum(linear(theta["layer_1"], h), 0)
      d, a = linear(theta["layer_2"], h).T
      scale = np.sqrt(np.mean(p**2) + 0.01**2)
      update[name] = (-1e-3 * np.exp(log_step) * scale * d * np.exp(1e-3 * a)).reshape(p.shape)
    updates.append(update)
  return updates


def test_updates_equal_those_of_a_plain_implementation():
  theta = random_theta()
  params, losses = draw(0, 0.5), [2.0, 1.0, 1.5]
  gradients = [draw(seed, scale) for seed, scale in [(1, 1.0), (2, 0.1), (3, 3.0)]]
  updates = run(theta, params, gradients, losses)
  for u, expected in zip(updates, numpy_updates(theta, params, gradients, losses), strict=True):
    for name in SHAPES:
      np.testing.assert_allclose(u[name], expected[name], rtol=1e-5, atol=1e-5 * np.max(np.abs(expected[name])))


def test_an_untrained_optimizer_is_the_mlp_alone():
  """Neither loss nor time nor the LSTM's weights change anything as long as the last linear map is zero."""
  theta = jax.jit(OPTIMIZER.init)(jax.random.key(1))
  np.testing.assert_array_equal(theta["controls"]["w"], 0)
  other = {**theta, "lstm/linear": jax.tree.map(lambda x: x + 1, theta["lstm/linear"])}
  params, gradients = draw(0), [draw(1), draw(2)]
  for a, b in zip(run(theta, params, gradients, [1.0, 2.0]), run(other, params, gradients, [3.0, 0.1]), strict=True):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_order_of_tensors_does_not_matter():
  theta = random_theta()
  params, gradients = draw(0), [draw(1), draw(2)]
  new_name = {"b": "z", "s": "a", "w": "c"}  # b, s, w -> s, w, b

  def rename(tree):
    return {new_name[name]: x for name, x in tree.items()}

  updates = run(theta, params, gradients, [1.0, 2.0])
  renamed = run(theta, rename(params), [rename(g) for g in gradients], [1.0, 2.0])
  for a, b in zip(updates, renamed, strict=True):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5), rename(a), b)


@pytest.mark.parametrize(("loss_scale", "gradient_scale"), [(10.0, 1.0), (1.0, 10.0), (1e-4, 1e-4)])
def test_units_of_loss_and_gradient_do_not_matter(loss_scale, gradient_scale):
  theta = random_theta()
  params, gradients, losses = draw(0), [draw(1), draw(2)], np.array([1.0, 2.0])
  scaled = [optax.tree.scale(gradient_scale, g) for g in gradients]
  for a, b in zip(
    run(theta, params, gradients, losses), run(theta, params, scaled, loss_scale * losses), strict=True
  ):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-8), a, b)


def test_a_tensor_of_zeros_and_gradients_of_zero_give_finite_updates():
  zeros = draw(0, 0.0)
  for u in run(random_theta(), zeros, [zeros, draw(1)], [0.0, 0.0]):
    assert all(np.all(np.isfinite(x)) for x in u.values())


def test_number_of_meta_parameters():
  """Two maps 21 -> 16; LSTM (16 + 16) -> 64; controls 16 -> 9; MLP 18 -> 16 -> 16 -> 2; all with biases."""
  theta = jax.eval_shape(hierarchical_rnn.build().init, jax.random.key(0))
  expected = 2 * (21 * 16 + 16) + (32 * 64 + 64) + (16 * 9 + 9) + (18 * 16 + 16) + (16 * 16 + 16) + (16 * 2 + 2)
  assert sum(x.size for x in jax.tree.leaves(theta)) == expected == 3579


def test_parameters_and_loss_are_required():
  tx = OPTIMIZER.transform(random_theta(), NUM_STEPS)
  g = {"w": jnp.ones(3)}
  with pytest.raises(ValueError, match="needs the parameters"):
    tx.update(g, tx.init(g), value=jnp.ones(()))
  with pytest.raises(ValueError, match=r"needs the loss: call update\(gradients, state, params, value=loss\)"):
    tx.update(g, tx.init(g), g)


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("lstm_size", 0),
    ("context_size", 0),
    ("hidden_sizes", ()),
    ("hidden_sizes", (4, 0)),
    ("step_multiplier", float("inf")),
    ("exp_multiplier", float("nan")),
    ("parameter_floor", 0.0),
  ],
)
def test_bad_options_are_named(name, value):
  with pytest.raises(ValueError, match=f"^{name}="):
    hierarchical_rnn.build(**{name: value})
