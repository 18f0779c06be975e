"""Learned directions against the formula written out in NumPy, and what practitioners rely on."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lopt import configuration
from lopt.architectures import direction
from lopt.runs.trained import TrainedOptimizer

PARAMS = {"conv": (3, 3, 2, 4), "wide": (3, 7), "tall": (9, 2), "bias": (5,), "embed": (6, 4), "gain": ()}
NETWORKS = {name: {"step_multiplier": 1.0} for name in ("mlp", "lstm", "adafactor_mlp", "tensor_mlp")}


def build(name="mlp", zero_output=True, **options):
  section = {
    "name": name,
    "zero_output": zero_output,
    **NETWORKS[name],
    "direction": {"learning_rate": 0.02, **options},
  }
  return configuration.build("architectures", section, where="architecture")


def optimizer(name="mlp", zero_output=False, **options):
  built = build(name, zero_output, **options)
  return TrainedOptimizer(built.init(jax.random.key(0)), built, {})


def params(seed=0):
  rng = np.random.default_rng(seed)
  return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in PARAMS.items()}


def gradients(step, scale=1.0):
  rng = np.random.default_rng(100 + step)
  return {name: jnp.asarray(scale * rng.normal(size=shape), jnp.float32) for name, shape in PARAMS.items()}


def directions(tx, steps=4, scale=1.0):
  state, found = tx.init(params()), []
  update = jax.jit(tx.update)
  for step in range(steps):
    updates, state = update(gradients(step, scale), state, params())
    found.append(updates)
  return found


def numpy_direction(history, orthogonal):
  """Nesterov Adam (Dozat 2016) of one tensor's gradients so far, orthogonalised as in Muon's five steps; float64."""
  m, v = np.zeros(history[0].shape), np.zeros(history[0].shape)
  for g in history:
    m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
  t = len(history)
  ahead = 0.9 * m / (1 - 0.9 ** (t + 1)) + 0.1 * history[-1] / (1 - 0.9**t)
  u = ahead / (np.sqrt(v / (1 - 0.99**t)) + 1e-8)
  if orthogonal:
    x = u.reshape(-1, u.shape[-1]) / np.linalg.norm(u)
    for _ in range(5):
      x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
    u = x.reshape(u.shape)
  return u / np.sqrt(np.mean(u**2))


@pytest.mark.slow_but_for("tensor_mlp")
@pytest.mark.parametrize("name", NETWORKS)
def test_theta_zero_is_nesterov_adam_orthogonalised(name):
  """From the formula, for the zero θ and the first one, whose last layer is zero."""
  built = build(name, elementwise=("embed",))
  first = built.init(jax.random.key(0))
  for theta in (first, jax.tree.map(jnp.zeros_like, first)):
    found = directions(TrainedOptimizer(theta, built, {}).direction())
    for step, updates in enumerate(found):
      for leaf, u in updates.items():
        history = [np.asarray(gradients(t)[leaf], np.float64) for t in range(step + 1)]
        expected = numpy_direction(history, len(PARAMS[leaf]) >= 2 and leaf != "embed")
        np.testing.assert_allclose(u, expected, rtol=2e-4, atol=2e-4, err_msg=f"{leaf}, step {step}")


def test_singular_values_become_alike():
  """Muon's coefficients take them to 0.7 to 1.2, up to the common factor that makes the rms 1."""
  x = np.random.default_rng(0).normal(size=(6, 20)) @ np.diag(np.geomspace(1, 30, 20))
  values = np.linalg.svd(direction.orthogonalise(jnp.float32(x)), compute_uv=False)
  assert 0.6 < values.min() < values.max() < 1.25


@pytest.mark.slow_but_for("tensor_mlp")
@pytest.mark.parametrize("name", NETWORKS)
def test_directions_have_unit_rms_and_no_scale_of_gradients_matters(name):
  tx = optimizer(name).direction()
  plain = directions(tx)
  for scale in (1e-30, 1e-6, 1e6, 1e30):
    for one, other in zip(plain, directions(tx, scale=scale), strict=True):
      for leaf in PARAMS:
        np.testing.assert_allclose(np.sqrt(np.mean(np.square(one[leaf]))), 1.0, rtol=1e-5)
        np.testing.assert_allclose(one[leaf], other[leaf], rtol=1e-3, atol=1e-3)


@pytest.mark.slow_but_for("tensor_mlp")
@pytest.mark.parametrize("name", NETWORKS)
def test_a_tensor_without_a_gradient_stays_where_it_is(name):
  """Never with one, or none in this step: although momenta and a network that sees the parameters go on."""
  tx = optimizer(name).direction()
  state, update = tx.init(params()), jax.jit(tx.update)
  for step, still in enumerate([("wide",), ("wide", "bias", "conv"), ("wide",)]):
    g = {leaf: x * (leaf not in still) for leaf, x in gradients(step).items()}
    u, state = update(g, state, params())
    for leaf in PARAMS:
      np.testing.assert_allclose(np.sqrt(np.mean(np.square(u[leaf]))), float(leaf not in still), rtol=1e-5)


@pytest.mark.slow_but_for("tensor_mlp")
@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_has_a_say(name):
  """A θ whose output is not zero goes elsewhere than θ = 0."""
  zero, other = directions(optimizer(name, zero_output=True).direction()), directions(optimizer(name).direction())
  assert any(np.max(np.abs(zero[3][leaf] - other[3][leaf])) > 1e-3 for leaf in PARAMS)


def test_steps_follow_a_schedule_from_outside():
  schedule = optax.linear_schedule(0.5, 0.1, 4)
  trained = optimizer()
  with jax.disable_jit():  # as two programs, directions would be rounded in two ways
    tx = trained.direction(), trained(learning_rate=schedule)
    each = zip(*(directions(x, steps=2) for x in tx), strict=True)
  for step, (u, updates) in enumerate(each):
    for leaf in PARAMS:
      np.testing.assert_allclose(updates[leaf], -(0.5 - 0.1 * step) * u[leaf], rtol=1e-5, atol=1e-7)


def test_the_recommended_schedule_warms_up_and_ends_at_zero():
  """From its formula; the number of steps may be traced."""
  trained = optimizer(warmup=0.1)
  u = directions(trained.direction(), steps=3)
  updates = jax.jit(
    lambda num_steps: trained(num_steps).update(gradients(0), trained(num_steps).init(params()), params())[0]
  )
  inputs = np.exp(np.average(np.log([18, 3, 9, 6]), weights=[72, 21, 18, 24]))
  assert inputs < 20
  rate = 0.02 * 6 / 4  # of four matrices
  np.testing.assert_allclose(updates(jnp.int32(40))["wide"], -rate / 4 * u[0]["wide"], rtol=1e-5, atol=1e-7)
  rates = np.array([trained.schedule(40)(t) for t in range(42)])
  expected = [0.02 * min(1, (t + 1) / 4) * (1 + np.cos(np.pi * min(t / 40, 1))) / 2 for t in range(42)]
  np.testing.assert_allclose(rates, expected, rtol=1e-5, atol=1e-9)
  assert trained.learning_rate == 0.02


def test_meta_training_is_at_the_rates_that_are_recommended():
  """What `transform` does, which is what meta-training sees, is what a user gets who says how many steps only."""
  trained = optimizer()
  with jax.disable_jit():
    tx = trained.architecture.transform(trained.theta, 1_600), trained(num_steps=1_600)
    each = list(zip(*(directions(x, steps=2) for x in tx), strict=True))
  assert float(direction.recommended_share(params(), 1_600)) != 1
  for ours, theirs in each:
    for leaf in PARAMS:
      np.testing.assert_allclose(ours[leaf], theirs[leaf], rtol=1e-5, atol=1e-9)


def test_what_is_not_orthogonalised_counts_as_no_matrix_where_it_was_so_in_meta_training():
  """Also where a user says nothing of it: the embedding neither lowers the recommended rate nor counts."""
  shapes = {
    "embed": jnp.ones((64, 256)),
    "w": jnp.ones((32, 100)),
    "v": jnp.ones((32, 100)),
    "u": jnp.ones((32, 100)),
  }
  trained = optimizer(elementwise=("embed",))
  rates = [trained.schedule(200, shapes)(100), trained.schedule(200, shapes, elementwise=())(100)]
  share = 64 * 256 / (64 * 256 + 3 * 32 * 100)
  np.testing.assert_allclose(rates[0] / rates[1], 4 / 3 * np.sqrt(64 / 32) ** share, rtol=1e-5)


def test_less_is_recommended_for_wider_networks_and_longer_runs_and_more_for_few_matrices():
  deep = {"w": [jnp.ones((20, 100))] * 6, "b": jnp.zeros(5_000)}
  assert direction.recommended_share(deep, 200) == direction.recommended_share({"b": jnp.zeros(4)}, 10) == 1
  np.testing.assert_allclose(direction.recommended_share(deep, 1_600), 0.5, rtol=1e-6)
  for number, share in ((1, 3), (2, 3), (4, 1.5), (50, 1)):
    few = {"w": [jnp.ones((20, 100))] * number}
    np.testing.assert_allclose(direction.recommended_share(few, 200), share, rtol=1e-6)
  kernels = {"kernel": jnp.ones((3, 3, 8, 64)), "w": jnp.ones((32, 144))}  # of 72 and 32 inputs, of one size
  share = 3 * np.sqrt(20 / np.sqrt(72 * 32))
  np.testing.assert_allclose(direction.recommended_share(kernels, jnp.int32(200)), share, rtol=1e-6)


def test_weight_decay_is_adamws():
  """Δp = -α (u + λ p), where the mask lets it."""
  trained = optimizer()
  mask = {name: len(shape) >= 2 for name, shape in PARAMS.items()}
  decayed = directions(trained(learning_rate=0.1, weight_decay=0.3, mask=mask), steps=1)[0]
  plain = directions(trained(learning_rate=0.1), steps=1)[0]
  for leaf, p in params().items():
    expected = plain[leaf] - (0.1 * 0.3 * p if mask[leaf] else 0.0)
    np.testing.assert_allclose(decayed[leaf], expected, rtol=1e-5, atol=1e-6)


def test_in_a_chain_it_is_what_it_is_alone():
  trained = optimizer()
  chained = optax.chain(trained.direction(), optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(0.05))
  for one, other in zip(directions(chained), directions(trained(learning_rate=0.05, weight_decay=0.1)), strict=True):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_tensors_without_a_gradient_or_a_number_stay_where_they_are():
  trained = optimizer("tensor_mlp", zero_output=True)
  tx = trained(learning_rate=1.0)
  p = {"never": jnp.ones((2, 3)), "empty": jnp.zeros((0, 3)), "used": jnp.ones(3)}
  updates: Any
  updates, state = tx.update({**p, "never": jnp.zeros((2, 3))}, tx.init(p), p)
  assert np.all(updates["never"] == 0)
  assert updates["empty"].shape == (0, 3)
  np.testing.assert_allclose(updates["used"], -1.0, rtol=1e-5)
  updates, _ = tx.update(p, state, p)  # the first gradient that it ever has
  assert np.all(np.isfinite(updates["never"]))


def test_an_optimizer_without_a_direction_says_so():
  built = configuration.build("architectures", {"name": "mlp"}, where="architecture")
  trained = TrainedOptimizer(built.init(jax.random.key(0)), built, {})
  assert trained.learning_rate is None
  for call in (
    lambda: trained(learning_rate=0.1),
    lambda: trained(num_steps=10, weight_decay=0.1),
    trained.direction,
    lambda: trained.schedule(10),
  ):
    with pytest.raises(ValueError, match=r"^(learning_rate|weight_decay|direction|schedule): .*takes neither"):
      call()
  with pytest.raises(ValueError, match="num_steps"):
    trained()
  with pytest.raises(ValueError, match="num_steps"):
    optimizer()()


@pytest.mark.parametrize("options", [{"learning_rate": 0.0}, {"warmup": 1.0}, {"strength": -1.0}])
def test_bad_options_are_refused(options):
  with pytest.raises(configuration.ConfigError, match=rf"architecture\.direction: {next(iter(options))}="):
    build(**options)


@pytest.mark.slow_but_for("tensor_mlp")
@pytest.mark.parametrize("name", ["tensor_mlp", "mlp"])
def test_derivatives_by_theta_are_finite_where_gradients_are_zero(name):
  """As of pixels that are always black, or of a dead layer: truncated backpropagation would drop such windows."""
  optimizer = build(name)
  mask = jnp.array([0.0, 1.0, 1.0])[:, None]

  def last_loss(theta):
    tx = optimizer.transform(theta, 10)
    params = {"w": jnp.ones((3, 2)), "unused": jnp.ones(4)}
    state = tx.init(params)
    loss = lambda p: jnp.sum(jnp.square(mask * p["w"] - jnp.array([[0.3, 2.0]])))
    for _ in range(3):
      value, gradients = jax.value_and_grad(loss)(params)
      updates, state = tx.update(gradients, state, params, value=value)
      params = optax.apply_updates(params, updates)
    return loss(params)

  gradient = jax.jit(jax.grad(last_loss))(optimizer.init(jax.random.key(0)))
  leaves = jax.tree.leaves(gradient)
  assert all(bool(jnp.all(jnp.isfinite(x))) for x in leaves)
  assert any(bool(jnp.any(x != 0)) for x in leaves)
