"""The outer loop against a plain one, and what interruptions, calls and devices may not change."""

import functools
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lopt import base
from lopt.outer import meta_training, parallel, pes
from lopt.runs import interruption

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


shared = functools.cache(trainer)  # compiled once for the tests that change nothing about it


def run(trained, last_step, first_step=0, state=None, **options):
  records = []
  state = trained.init() if state is None else state
  record = lambda step, metrics: records.append((step, metrics))
  return meta_training.run(trained, state, first_step, last_step, record=record, **options), records


def test_the_program_is_compiled_once(caplog):
  """Also where the first call has a state that was saved."""
  trained = shared()
  state, _ = trained.advance(0, trained.load(trained.save(trained.init())))
  with jax.log_compiles():
    trained.advance(1, state)
    assert "Compiling" not in caplog.text
    jax.jit(lambda x: x + 1)(0)
    assert "Compiling" in caplog.text


def test_the_compiler_takes_our_options(monkeypatch):
  """Of XLA's names, one that it does not know is refused; the rest of the tests compile without options."""
  monkeypatch.setattr(parallel, "COMPILER_OPTIONS", {"cpu": {"xla_no_such_option": 1}})
  jax.config.update("jax_disable_most_optimizations", False)
  try:
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
      parallel.jit(lambda x: x + 1)(1)
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
      run(trainer(), 1)
    monkeypatch.undo()
    (state, _), (expected, _) = run(trainer(), 3), run(shared(), 3)
  finally:
    jax.config.update("jax_disable_most_optimizations", True)
  np.testing.assert_allclose(state.theta["shift"], expected.theta["shift"], rtol=1e-4)


def test_the_loop_equals_a_plain_one():
  """Estimate, Optax, again, without devices, scan or pmap, on the documented keys."""
  state, records = run(shared(), 6)
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
  one, _ = run(shared(), 6)
  three, records = run(trainer(steps_per_call=3), 6)
  np.testing.assert_allclose(one.theta["shift"], three.theta["shift"], rtol=1e-5)
  assert [step for step, _ in records] == [3, 6]


def test_a_run_that_is_saved_and_continued_is_the_same_bit_for_bit():
  saved = {}
  first = shared(steps_per_call=2)
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_program_for_given_devices_computes_what_advance_computes():
  trained = trainer(steps_per_call=2)
  state = trained.init()
  devices = jax.devices()[: jax.tree.leaves(state.particles)[0].shape[0]]
  compiled = trained.lower(devices).compile()
  (theta, _), _, _ = compiled(np.int32(0), state[:2], state.particles)
  np.testing.assert_array_equal(theta["shift"], run(trainer(steps_per_call=2), 2)[0].theta["shift"])
  assert "all-reduce" in str(trained.lower(jax.devices()[:2]).compile().as_text())


def test_seeds_matter():
  a, _ = run(shared(), 2)
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


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_saves_at_the_next_step_and_continues_bit_for_bit(capfd, number, code):
  """As by Ctrl-C in a notebook: no process ends, and handlers are as they were."""
  handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
  first, saved = shared(steps_per_call=2), {}
  whole, all_records = run(first, 10)

  def send(steps, metrics):
    del steps, metrics
    if not saved:
      signal.raise_signal(number)

  save = meta_training.Every(100, lambda step, state: saved.update({step: first.save(state)}), when_interrupted=True)
  other = meta_training.Every(100, lambda step, state: pytest.fail("this is not due"))
  with pytest.raises(
    interruption.InterruptedRun, match=f"stopped by {number.name} after outer step 2 of 10"
  ) as error:
    run(first, 10, periodic=[other, save], progress=send)
  assert isinstance(error.value, KeyboardInterrupt)
  assert error.value.exit_code == code
  assert list(saved) == [2]
  assert "stopping after this outer step; once more to stop at once" in capfd.readouterr().err
  assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
  second = shared(steps_per_call=2)
  continued, records = run(second, 10, first_step=2, state=second.load(saved[2]))
  for a, b in zip(jax.tree.leaves(first.save(whole)), jax.tree.leaves(second.save(continued)), strict=True):
    np.testing.assert_array_equal(a, b)
  assert [step for step, _ in records] == [step for step, _ in all_records[1:]]


def test_a_second_signal_stops_at_once():
  def send(steps, metrics):
    del steps, metrics
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)

  save = meta_training.Every(1, lambda step, state: pytest.fail("it goes on"), when_interrupted=True)
  with pytest.raises(KeyboardInterrupt) as error:
    run(shared(), 10, periodic=[save], progress=send)
  assert not isinstance(error.value, interruption.InterruptedRun)


def far_away(distance, steps_per_call=2):
  """A run on a problem whose loss is cut off beyond |θ| = 1, that starts at some distance."""

  def step(theta, state, key):
    del key
    return state + 1, jnp.minimum(jnp.sum(jnp.square(theta["x"])), 1.0)

  problem = base.UnrolledProblem(lambda key: jnp.int32(10), lambda key, num_steps: jnp.int32(0), step, loss_cap=0.99)
  gradients = pes.build(problem, num_pairs=NUM_PAIRS, sigma=0.01, unroll_length=5)
  start = lambda key: {"x": jnp.full(2, float(distance))}
  return meta_training.build(gradients, start, optax.sgd(0.0), seed=0, steps_per_call=steps_per_call)


def test_a_dead_run_is_counted_and_ends_with_a_message():
  records = []
  message = (
    r"outer step 6: every particle diverged in the last 6 outer steps, .*\|θ\| = 1\.41e\+03.*lower the outer learning"
  )
  with pytest.raises(meta_training.DeadRunError, match=message):
    meta_training.run(
      trained := far_away(1e3),
      trained.init(),
      0,
      20,
      record=lambda step, metrics: records.append((step, metrics["dead_steps"], metrics["gradient_norm"])),
      max_dead_steps=5,
    )
  assert records == [(2, 2.0, 0.0), (4, 4.0, 0.0), (6, 6.0, 0.0)]


def test_a_dead_run_goes_on_if_it_is_told_to_and_one_that_lives_is_never_dead():
  _, dead = run(far_away(1e3), 8, max_dead_steps=None)
  assert [metrics["dead_steps"] for _, metrics in dead] == [2, 4, 6, 8]
  _, alive = run(far_away(0.1), 8, max_dead_steps=1)
  assert [metrics["dead_steps"] for _, metrics in alive] == [0] * 4
  _, alive = run(shared(), 3, max_dead_steps=1)
  assert [metrics["dead_steps"] for _, metrics in alive] == [0] * 3


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
  "options", [{"learning_rate": 0.0}, {"clip_norm": -1.0}, {"weight_decay": -0.1}, {"warmup_steps": -1}]
)
def test_bad_settings_of_the_outer_optimizer_are_named(options):
  with pytest.raises(ValueError, match=next(iter(options))):
    meta_training.outer_optimizer(100, **options)
