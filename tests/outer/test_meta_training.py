"""The outer loop against a plain one, and what interruptions, calls and devices may not change."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lopt import base
from lopt.outer import meta_training, pes

NUM_PAIRS = 8


def estimator(num_pairs=NUM_PAIRS, broken_after=None):
  """PES on s ← 0.9 s + θ + noise, L = |s - 3|²/2, whose best θ is near 0.3."""

  def init(key, num_steps):
    del num_steps
    return jax.random.normal(key, (2,)), jnp.int32(0)

  def step(theta, state, key):
    s, t = state
    s = 0.9 * s + theta["shift"] + 0.1 * jax.random.normal(key, (2,))
    loss = 0.5 * jnp.sum(jnp.square(s - 3))
    if broken_after is not None:
      loss = jnp.where(t >= broken_after, jnp.nan, loss)
    return (s, t + 1), loss

  problem = base.UnrolledProblem(lambda key: jax.random.randint(key, (), 20, 41), init, step)
  return pes.build(problem, num_pairs=num_pairs, sigma=0.1, unroll_length=5)


def trainer(steps_per_call=1, seed=0, **options):
  return meta_training.build(
    estimator(**options),
    lambda key: {"shift": jnp.zeros(2)},
    optax.adam(0.02),
    seed=seed,
    steps_per_call=steps_per_call,
  )


def run(trained, last_step, first_step=0, state=None, **options):
  records = []
  state = trained.init() if state is None else state
  record = lambda step, metrics: records.append((step, metrics))
  return meta_training.run(trained, state, first_step, last_step, record=record, **options), records


def test_the_loop_equals_a_plain_one():
  """Estimate, Optax, again, without devices, scan or pmap, on the documented keys."""
  state, records = run(trainer(), 6)
  theta_key, particles_key, steps_key = jax.random.split(jax.random.key(0), 3)
  del theta_key
  theta, optimizer = {"shift": jnp.zeros(2)}, optax.adam(0.02)
  optimizer_state, gradients = optimizer.init(theta), estimator()
  particles = gradients.init(particles_key, theta)
  for step in range(6):
    gradient, particles, metrics = gradients.estimate(jax.random.fold_in(steps_key, step), theta, particles)
    updates, optimizer_state = optimizer.update(gradient, optimizer_state, theta)
    theta = optax.apply_updates(theta, updates)
    reported = records[step][1]
    square_norm = float(jnp.sum(jnp.square(gradient["shift"])))
    variance = (float(metrics["mean_square_gradient"]) - square_norm) / (NUM_PAIRS - 1)
    np.testing.assert_allclose(reported["gradient_norm"], square_norm**0.5, rtol=1e-4)
    np.testing.assert_allclose(reported["gradient_standard_error"], variance**0.5, rtol=1e-3)
    np.testing.assert_allclose(reported["meta_loss"], metrics["meta_loss"], rtol=1e-5)
    assert reported["inner_steps"] == 2 * NUM_PAIRS * 5
    assert reported["inner_steps_per_second"] > 0
  np.testing.assert_allclose(state.theta["shift"], jax.tree.leaves(theta)[0], rtol=1e-5)


def test_it_finds_the_optimum():
  """Of the mean loss over horizons 20..40, where E s_t = θ c_t with c_t = 10 (1 - 0.9^t), noise adding a constant."""
  state, records = run(trainer(steps_per_call=50), 400)
  c = np.concatenate([10 * (1 - 0.9 ** np.arange(1, horizon + 1)) for horizon in range(20, 41)])
  best = 3 * np.sum(c) / np.sum(c**2)
  assert records[-1][1]["meta_loss"] < 0.5 * records[0][1]["meta_loss"]
  np.testing.assert_allclose(state.theta["shift"], best, atol=0.04)


def test_calls_do_not_matter():
  one, _ = run(trainer(steps_per_call=1), 6)
  three, records = run(trainer(steps_per_call=3), 6)
  np.testing.assert_allclose(one.theta["shift"], three.theta["shift"], rtol=1e-5)
  assert [step for step, _ in records] == [3, 6]


def test_a_run_that_is_saved_and_continued_is_the_same_bit_for_bit():
  saved = {}
  first = trainer(steps_per_call=2)
  every = meta_training.Every(4, lambda step, state: saved.update({step: first.save(state)}))
  uninterrupted, _ = run(first, 10, periodic=[every])
  assert sorted(saved) == [4, 8, 10]
  second = trainer(steps_per_call=2)
  jax.tree.map(
    lambda like, x: (like.shape, like.dtype) == (x.shape, x.dtype) or pytest.fail("shape"),
    second.saved_like,
    saved[4],
  )
  continued, _ = run(second, 10, first_step=4, state=second.load(saved[4]))
  for a, b in zip(jax.tree.leaves(first.save(uninterrupted)), jax.tree.leaves(second.save(continued)), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("num_devices", [1, 2])
def test_devices_do_not_matter_and_may_change(monkeypatch, num_devices):
  saved = {}
  first = trainer()
  every = meta_training.Every(3, lambda step, state: saved.update({step: first.save(state)}))
  on_eight, _ = run(first, 6, periodic=[every])
  assert jax.tree.leaves(on_eight.particles)[0].sharding.num_devices == 8
  devices = jax.local_devices()
  monkeypatch.setattr(jax, "local_devices", lambda: devices[:num_devices])
  monkeypatch.setattr(jax, "local_device_count", lambda: num_devices)
  fewer = trainer()
  continued, _ = run(fewer, 6, first_step=3, state=fewer.load(saved[3]))
  assert jax.tree.leaves(continued.particles)[0].shape[0] == num_devices
  np.testing.assert_allclose(continued.theta["shift"], on_eight.theta["shift"], rtol=1e-5)


def test_seeds_matter():
  a, _ = run(trainer(seed=0), 2)
  b, _ = run(trainer(seed=1), 2)
  assert not np.allclose(a.theta["shift"], b.theta["shift"])


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_saved():
  saved = {}
  broken = trainer(broken_after=12)
  every = meta_training.Every(1, lambda step, state: saved.update({step: broken.save(state)}))
  with pytest.raises(FloatingPointError, match=r"outer step \d+: the meta-gradient is not finite"):
    run(broken, 30, periodic=[every])
  assert saved
  assert all(np.all(np.isfinite(state.theta["shift"])) for state in saved.values())


def test_a_theta_that_is_not_finite_stops_the_run():
  """Capped losses of both signs are equal, so the meta-gradient alone would look fine."""

  def nan_updates(updates, state, params=None):
    del params
    return jax.tree.map(lambda u: jnp.full_like(u, jnp.nan), updates), state

  broken = meta_training.build(
    estimator(),
    lambda key: {"shift": jnp.zeros(2)},
    optax.GradientTransformation(lambda params: optax.EmptyState(), nan_updates),
    seed=0,
  )
  with pytest.raises(FloatingPointError, match="outer step 0: θ is not finite"):
    run(broken, 3)


def test_the_outer_optimizer_clips_warms_up_and_decays():
  """Its updates against AdamW's equations with the documented schedule, in NumPy."""
  options = {"learning_rate": 0.1, "warmup_steps": 4, "final_fraction": 0.1, "weight_decay": 0.05, "clip_norm": 0.5}
  tx = meta_training.outer_optimizer(20, **options)
  theta = np.array([1.0, -2.0])
  state = tx.init(jnp.float32(theta))
  m, v = np.zeros(2), np.zeros(2)
  rng = np.random.default_rng(0)
  for step in range(20):
    gradient = rng.normal(size=2)
    updates, state = tx.update(jnp.float32(gradient), state, jnp.float32(theta))
    clipped = gradient * min(1.0, 0.5 / np.linalg.norm(gradient))
    m, v = 0.9 * m + 0.1 * clipped, 0.999 * v + 0.001 * clipped**2
    adam = (m / (1 - 0.9 ** (step + 1))) / (np.sqrt(v / (1 - 0.999 ** (step + 1))) + 1e-8)
    cosine = 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * (step - 4) / 16))
    rate = 0.1 * (step / 4 if step < 4 else cosine)
    np.testing.assert_allclose(jax.tree.leaves(updates)[0], -rate * (adam + 0.05 * theta), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
  "options", [{"learning_rate": 0.0}, {"clip_norm": -1.0}, {"weight_decay": -0.1}, {"warmup_steps": 100}]
)
def test_bad_settings_of_the_outer_optimizer_are_named(options):
  with pytest.raises(ValueError, match=next(iter(options))):
    meta_training.outer_optimizer(100, **options)
