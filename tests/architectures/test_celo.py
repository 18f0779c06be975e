"""The Celo-like optimizer against a plain NumPy one, tensor by tensor, in float64.

The inputs of its scheduler are those of `lopt.architectures.summaries`, which has tests of its own.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lopt.architectures import celo, summaries

OPTIONS = {"hidden_sizes": (4, 3), "lstm_size": 3}
NUM_STEPS = 10
EPSILON = 1e-16
BETAS = (0.9, 0.99, 0.999)
SHAPES = {"b": (3,), "k": (2, 2, 3, 4), "s": (), "w": (3, 3)}
SMALL = ("b", "w")
LARGEST = {"k": (3, 2), "w": (1, 0)}  # the largest axis and the second largest; of equal ones the later is larger


def draw(seed, scale=1.0, names=tuple(SHAPES)):
  rng = np.random.default_rng(seed)
  return {name: np.asarray(scale * rng.normal(size=SHAPES[name])) for name in names}


def float32(tree):
  return jax.tree.map(jnp.float32, tree)


def random_theta(**options):
  """θ without zeros, last layers included."""
  shapes = jax.eval_shape(celo.build(**OPTIONS, **options).init, jax.random.key(0))
  rng = np.random.default_rng(7)
  return jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)), shapes)


@functools.cache
def untrained_theta():
  return jax.jit(celo.build(**OPTIONS).init)(jax.random.key(0))


@functools.cache
def compiled(**options):
  """The update, compiled once for all tests that have the same tensors."""
  optimizer = celo.build(**OPTIONS, **options)
  return optimizer, jax.jit(
    lambda theta, num_steps, g, state, p, loss: optimizer.transform(theta, num_steps).update(g, state, p, value=loss)
  )


def run(theta, params, gradients, losses, num_steps=NUM_STEPS, **options):
  """The updates of successive gradients at the same parameters."""
  optimizer, update = compiled(**options)
  params, updates = float32(params), []
  state = optimizer.transform(theta, num_steps).init(params)
  for g, loss in zip(gradients, losses, strict=True):
    u, state = update(theta, num_steps, float32(g), state, params, jnp.float32(loss))
    updates.append(u)
  return updates


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def linear(weights, x):
  return x @ np.asarray(weights["w"], np.float64) + np.asarray(weights["b"], np.float64)


def average(values, beta):
  """The bias-corrected exponential moving average."""
  return np.average(values, axis=0, weights=beta ** np.arange(len(values), dtype=float)[::-1])


def from_zero(values, beta):
  """The exponential moving average that starts at zero."""
  return average(values, beta) * (1 - beta ** len(values))


def rms(x):
  return np.sqrt(np.mean(x**2) + EPSILON)


def root(x):
  return np.sqrt(x + 1e-6 * np.mean(x) + EPSILON)


def numpy_rule(theta, name, p, gradients, *, normalize=True):
  """The direction u of one tensor, from all its gradients."""
  g, squares = gradients[-1], [g**2 for g in gradients]
  m = [average(gradients, beta) for beta in BETAS]
  v = average(squares, 0.999)
  if p.ndim < 2:
    rows = columns = [from_zero(squares, beta) for beta in BETAS]
    ratios = [1 / root(r) for r in rows]
  else:
    largest, second = LARGEST[name]
    rows = [from_zero([np.mean(s, axis=largest, keepdims=True) for s in squares], beta) for beta in BETAS]
    columns = [from_zero([np.mean(s, axis=second, keepdims=True) for s in squares], beta) for beta in BETAS]
    ratios = [
      np.sqrt(np.mean(root(r) ** 2, axis=second, keepdims=True)) / (root(r) * root(c))
      for r, c in zip(rows, columns, strict=True)
    ]
  features = [g, p, *m, root(v), *(x / root(v) for x in m), 1 / root(v), g / root(v)]
  features += [g * r for r in ratios] + [x * r for x, r in zip(m, ratios, strict=True)]
  for side in (rows, columns):
    features += [*(root(x) for x in side), *(1 / root(x) for x in side)]
  assert len(features) == 29
  h = np.stack([np.broadcast_to(x / rms(x), p.shape).ravel() for x in features], axis=1)
  h = np.maximum(linear(theta["rule/layer_0"], h), 0)
  h = np.maximum(linear(theta["rule/layer_1"], h), 0)
  d, a = linear(theta["rule/layer_2"], h).T
  u = (d * np.exp(1e-3 * a)).reshape(p.shape)
  return u / rms(u) if normalize else u


@jax.jit
def scheduler_inputs(t, history, moments, p, g, loss):
  history, of_loss = summaries.observe(history, loss, jnp.int32(t))
  moments = summaries.accumulate(moments, g)
  (m,), (v,) = summaries.corrected(moments, t + 1)
  x = jnp.concatenate([summaries.progress(t, NUM_STEPS), of_loss, summaries.of_tensor(p, g, m, v)])
  return history, moments, x


def numpy_multipliers(theta, p, gradients, losses):
  """exp(s) of one tensor in every step."""
  history, moments = summaries.no_losses(), summaries.no_moments(jnp.float32(p))
  hidden, cell = np.zeros(OPTIONS["lstm_size"]), np.zeros(OPTIONS["lstm_size"])
  multipliers = []
  for t, g in enumerate(gradients):
    history, moments, x = scheduler_inputs(t, history, moments, *float32((p, g, losses[t])))
    gates = linear(theta["scheduler/lstm/linear"], np.concatenate([x, hidden]))
    i, g, f, o = np.split(gates, 4)
    cell = sigmoid(f + 1) * cell + sigmoid(i) * np.tanh(g)
    hidden = sigmoid(o) * np.tanh(cell)
    multipliers.append(np.exp(linear(theta["scheduler/linear"], hidden)[0]))
  return multipliers


@pytest.mark.parametrize(("names", "options"), [(tuple(SHAPES), {}), (SMALL, {"normalize": False})])
def test_updates_equal_those_of_a_plain_implementation(names, options):
  theta = random_theta()
  params, losses = draw(0, 0.5, names), [2.0, 1.0, 1.5]
  gradients = [draw(seed, scale, names) for seed, scale in [(1, 1.0), (2, 0.1), (3, 3.0)]]
  updates = run(theta, params, gradients, losses, **options)
  for name, p in params.items():
    series = [g[name] for g in gradients]
    multipliers = numpy_multipliers(theta, p, series, losses)
    scale = np.sqrt(np.mean(p**2) + 0.01**2)
    for t in range(3):
      expected = -0.01 * multipliers[t] * scale * numpy_rule(theta, name, p, series[: t + 1], **options)
      np.testing.assert_allclose(updates[t][name], expected, rtol=2e-5, atol=1e-5 * np.max(np.abs(expected)))


def test_an_untrained_scheduler_leaves_the_bare_rule():
  """exp(s) is exactly 1: LSTM, losses and length of the run make no difference to the last bit."""
  random, names = random_theta(), SMALL
  neutral = {**random, "scheduler/linear": untrained_theta()["scheduler/linear"]}
  other = {**neutral, "scheduler/lstm/linear": jax.tree.map(jnp.zeros_like, random["scheduler/lstm/linear"])}
  params, gradients = draw(0, names=names), [draw(1, names=names), draw(2, names=names)]
  updates = run(neutral, params, gradients, [1.0, 2.0])
  for a, b in zip(updates, run(other, params, gradients, [3.0, 0.1], 1000), strict=True):
    jax.tree.map(np.testing.assert_array_equal, a, b)
  for name, p in params.items():
    expected = -0.01 * np.sqrt(np.mean(p**2) + 0.01**2) * numpy_rule(random, name, p, [g[name] for g in gradients])
    np.testing.assert_allclose(updates[-1][name], expected, rtol=2e-5, atol=1e-5 * np.max(np.abs(expected)))


def test_a_step_of_the_rule_has_the_relative_size_that_was_asked_for():
  params = draw(0, 5.0, SMALL)
  theta = untrained_theta()
  (update,) = run(theta, params, [draw(1, names=SMALL)], [1.0])
  for name, p in params.items():
    np.testing.assert_allclose(rms(update[name]), 0.01 * np.sqrt(np.mean(p**2) + 0.01**2), rtol=1e-5)


def test_without_statistics_of_tensors_one_scheduler_is_for_all():
  """The ratio to the bare rule's step is the same for all tensors; with statistics it is not."""
  names = SMALL
  params, gradients = draw(0, names=names), [draw(1, names=names)]
  ratios = {}
  for options in ({"tensor_features": False}, {}):
    (update,) = run(random_theta(**options), params, gradients, [1.0], **options)
    ratios["tensor_features" not in options] = [
      rms(update[n]) / (0.01 * np.sqrt(np.mean(params[n] ** 2) + 0.01**2)) for n in names
    ]
  np.testing.assert_allclose(ratios[False][0], ratios[False][1], rtol=1e-5)
  assert abs(ratios[False][0] - 1) > 0.01
  assert abs(ratios[True][0] / ratios[True][1] - 1) > 0.01


def test_the_order_of_tensors_does_not_matter():
  theta, names = random_theta(), SMALL
  params, gradients = draw(0, names=names), [draw(1, names=names), draw(2, names=names)]
  new_name = {"b": "z", "w": "a"}

  def rename(tree):
    return {new_name[name]: x for name, x in tree.items()}

  updates = run(theta, params, gradients, [1.0, 2.0])
  renamed = run(theta, rename(params), [rename(g) for g in gradients], [1.0, 2.0])
  for a, b in zip(updates, renamed, strict=True):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5), rename(a), b)


@pytest.mark.parametrize(("loss_scale", "gradient_scale"), [(10.0, 1.0), (1.0, 10.0), (1e-4, 1e-4)])
def test_units_of_loss_and_gradient_do_not_matter(loss_scale, gradient_scale):
  theta, names = random_theta(), SMALL
  params, gradients, losses = draw(0, names=names), [draw(1, names=names), draw(2, names=names)], np.array([1.0, 2.0])
  updates = run(theta, params, gradients, losses)
  scaled = [optax.tree.scale(gradient_scale, g) for g in gradients]
  for a, b in zip(updates, run(theta, params, scaled, loss_scale * losses), strict=True):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-7), a, b)


def test_a_tensor_of_zeros_and_gradients_of_zero_give_finite_updates():
  names = SMALL
  zeros = draw(0, 0.0, names)
  for u in run(random_theta(), zeros, [zeros, draw(1, names=names)], [0.0, 0.0]):
    assert all(np.all(np.isfinite(x)) for x in u.values())


def test_meta_parameters():
  """The rule: MLP 29 -> 8 -> 8 -> 2. The scheduler: LSTM (21 + 16) -> 64 and 16 -> 1. All with biases."""
  theta = jax.eval_shape(celo.build().init, jax.random.key(0))
  sizes = {"rule": 0, "scheduler": 0}
  for name, weights in theta.items():
    sizes[name.split("/")[0]] += sum(x.size for x in weights.values())
  assert sizes == {"rule": 29 * 8 + 8 + 8 * 8 + 8 + 8 * 2 + 2, "scheduler": 37 * 64 + 64 + 16 + 1}
  assert sizes == {"rule": 330, "scheduler": 2449}


def test_parameters_and_loss_are_required():
  optimizer = celo.build(**OPTIONS)
  tx = optimizer.transform(random_theta(), NUM_STEPS)
  g = {"w": jnp.ones(3)}
  with pytest.raises(ValueError, match="needs the parameters"):
    tx.update(g, tx.init(g), value=jnp.ones(()))
  with pytest.raises(ValueError, match=r"needs the loss: call update\(gradients, state, params, value=loss\)"):
    tx.update(g, tx.init(g), g)


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("hidden_sizes", ()),
    ("hidden_sizes", (4, 0)),
    ("lstm_size", 0),
    ("step_multiplier", float("inf")),
    ("exp_multiplier", float("nan")),
    ("parameter_floor", 0.0),
  ],
)
def test_bad_options_are_named(name, value):
  with pytest.raises(ValueError, match=f"^{name}="):
    celo.build(**{name: value})
