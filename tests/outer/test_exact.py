"""Deterministic estimators against `jax.grad` of the whole unroll, to 1e-6 in float64, on a nonlinear problem."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lopt import base
from lopt.outer import backprop, es, forward, pes, unrolls, vectors


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def theta():
  return {"w": jnp.array([0.9, -0.6]), "b": jnp.array(0.2)}


def problem(minimum, maximum):
  """A recurrence that remembers its whole past, with an integer, a constant and T in its state."""

  def horizon(key):
    return jax.random.randint(key, (), minimum, maximum + 1, jnp.int32)

  def init(key, num_steps):
    del key
    return {"x": jnp.array([0.3, -0.5]), "t": jnp.int32(0), "scale": jnp.array(1.3), "T": num_steps}

  def step(theta, state, key):
    del key
    x = jnp.tanh(theta["w"] * state["x"][::-1] * state["scale"] + theta["b"])
    loss = (1 + 0.5 * jnp.sin(2.0 * state["t"])) * jnp.sum(jnp.square(x - 0.5))
    return state | {"x": x, "t": state["t"] + 1}, loss

  return base.UnrolledProblem(horizon, init, step)


def flat(tree):
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def exact_sum(horizon):
  """∇ Σ_t L_t of one episode."""

  def total(theta):
    key = jax.random.key(0)
    state, losses = problem(horizon, horizon).init(key, jnp.int32(horizon)), 0.0
    for _ in range(horizon):
      state, loss = problem(horizon, horizon).step(theta, state, key)
      losses += loss
    return losses

  return flat(jax.grad(total)(theta()))


def windows(estimator, number):
  """The gradients of so many windows, and the state after them."""
  state = estimator.init(jax.random.key(1), theta())

  @jax.jit
  def scan(state):
    def body(state, key):
      gradient, state, _ = estimator.estimate(key, theta(), state)
      return state, gradient

    return jax.lax.scan(body, state, jax.random.split(jax.random.key(2), number))

  state, gradients = scan(state)
  return np.concatenate([np.asarray(g).reshape(number, -1) for g in jax.tree.leaves(gradients)], axis=1), state


@pytest.mark.slow_but_for("10-3-staggered", "7-16-lockstep", "1-3-lockstep")
@pytest.mark.parametrize("stagger", [False, True], ids=["lockstep", "staggered"])
@pytest.mark.parametrize("unroll_length", [1, 3, 5, 10, 16])
@pytest.mark.parametrize("horizon", [1, 7, 10])
def test_rtrl_over_whole_cycles_is_exact(horizon, unroll_length, stagger):
  """Whatever age the runs begin at, 70 windows hold whole episodes; 16 before them end the staggered first ones."""
  runs = problem(horizon, horizon)
  estimator = forward.build(
    runs, method="rtrl", num_runs=5, unroll_length=unroll_length, stagger=stagger, runs_per_block=5
  )
  gradients, _ = windows(estimator, 16 + 70)
  np.testing.assert_allclose(gradients[16:].mean(axis=0), exact_sum(horizon) / horizon, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("unroll_length", [1, 3])
def test_uoro_has_the_mean_of_rtrl(unroll_length):
  """The mean over 21 steps, three episodes, is within 4 standard errors of the exact gradient."""
  estimator = forward.build(
    problem(7, 7), method="uoro", num_runs=64, unroll_length=unroll_length, stagger=False, runs_per_block=64
  )

  @jax.jit
  @jax.vmap
  def mean_of_episodes(key):
    keys = jax.random.split(key, 21 // unroll_length)

    def window(state, key):
      gradient, state, _ = estimator.estimate(key, theta(), state)
      return state, gradient

    _, gradients = jax.lax.scan(window, estimator.init(key, theta()), keys)
    return jnp.concatenate([g.reshape(len(keys), -1) for g in jax.tree.leaves(gradients)], axis=1).mean(axis=0)

  means, exact = np.asarray(mean_of_episodes(jax.random.split(jax.random.key(3), 64))), exact_sum(7) / 7
  error = np.std(means, axis=0, ddof=1) / np.sqrt(len(means))
  assert np.linalg.norm(error) < 0.02 * np.linalg.norm(exact)
  assert np.all(np.abs(means.mean(axis=0) - exact) < 4 * error)


@pytest.mark.slow_but_for("13-3-13", "40-7-7")
@pytest.mark.parametrize(("minimum", "maximum"), [(1, 1), (7, 7), (10, 10), (1, 10), (3, 13)])
@pytest.mark.parametrize("max_horizon", [13, 40])
def test_full_backpropagation_is_exact(minimum, maximum, max_horizon, monkeypatch):
  if max_horizon == 40:
    monkeypatch.setattr(backprop, "KEPT_BYTES", 0)  # in segments
  runs = problem(minimum, maximum)
  estimator = backprop.build(runs, num_runs=6, unroll_length=None, max_horizon=max_horizon, runs_per_block=2)
  state = estimator.init(jax.random.key(1), theta())
  key = jax.random.key(2)
  gradient, _, metrics = estimator.estimate(key, theta(), state)
  keys = jax.vmap(jax.random.split)(unrolls.group_keys(key, jnp.arange(6)))[:, 1]
  _, horizons = unrolls.begin(runs, unrolls.split_step_keys(keys, 0)[:, 0], 1)
  mean_horizon = (minimum + maximum) / 2
  np.testing.assert_allclose(state.mean_horizon, mean_horizon, rtol=0.005)
  expected = np.mean([exact_sum(int(t)) for t in horizons], axis=0)
  np.testing.assert_allclose(flat(gradient) * float(state.mean_horizon[0]), expected, rtol=1e-6, atol=1e-9)
  np.testing.assert_allclose(metrics["inner_steps"], np.mean(horizons))


def discounted_sum(horizon, discount):
  """Σ_t ∂L_t of one episode, forwards: ∂s_t = γ A_t ∂s_{t-1} + B_t."""
  runs, key = problem(horizon, horizon), jax.random.key(0)
  vector, unravel = vectors.ravel(theta())
  state, total = runs.init(key, jnp.int32(horizon)), jnp.zeros(vector.size)
  sensitivity = jnp.zeros((2, vector.size))
  for _ in range(horizon):

    def step(vector, x, state=state):
      new, loss = runs.step(unravel(vector), state | {"x": x}, key)
      return new["x"], loss

    (b, b_loss), (a, a_loss) = jax.jacobian(step, 0)(vector, state["x"]), jax.jacobian(step, 1)(vector, state["x"])
    total += discount * a_loss @ sensitivity + b_loss
    sensitivity = discount * a @ sensitivity + b
    state, _ = runs.step(theta(), state, key)
  return flat(unravel(total))


@pytest.mark.slow_but_for("10-0.95")
@pytest.mark.parametrize("discount", [0.3, 0.95, 1.0])
@pytest.mark.parametrize("horizon", [1, 10])
def test_discounted_backpropagation_equals_discounted_sensitivities(horizon, discount):
  runs = problem(horizon, horizon)
  estimator = backprop.build(runs, num_runs=2, unroll_length=None, max_horizon=13, discount=discount)
  state = estimator.init(jax.random.key(1), theta())
  gradient, _, metrics = estimator.estimate(jax.random.key(2), theta(), state)
  expected = discounted_sum(horizon, discount) / horizon
  np.testing.assert_allclose(flat(gradient), expected, rtol=1e-6, atol=1e-9)
  undiscounted = backprop.build(runs, num_runs=2, unroll_length=None, max_horizon=13)
  _, _, plain = undiscounted.estimate(jax.random.key(2), theta(), state)
  np.testing.assert_array_equal(metrics["meta_loss"], plain["meta_loss"])


def test_a_discount_is_for_whole_episodes():
  with pytest.raises(ValueError, match=r"discount=0\.9: must be 1 where unroll_length is given"):
    backprop.build(problem(7, 7), unroll_length=7, discount=0.9)


@pytest.mark.parametrize("unroll_length", [3, 10])
def test_truncated_backpropagation_takes_the_first_state_as_constant(unroll_length):
  runs = problem(25, 25)
  estimator = backprop.build(runs, num_runs=1, unroll_length=unroll_length, stagger=False)
  _, state = windows(estimator, 1)
  gradient, _, _ = estimator.estimate(jax.random.key(3), theta(), state)

  def window(theta):
    inner, total = jax.tree.map(lambda x: x[0, 0], state.episodes.state), 0.0
    for _ in range(unroll_length):
      inner, loss = runs.step(theta, inner, jax.random.key(0))
      total += loss
    return total / unroll_length

  np.testing.assert_allclose(flat(gradient), flat(jax.grad(window)(theta())), rtol=1e-6)


def test_truncated_backpropagation_is_exact_where_windows_are_episodes():
  estimator = backprop.build(problem(7, 7), num_runs=2, unroll_length=7, stagger=False)
  gradients, _ = windows(estimator, 3)
  np.testing.assert_allclose(gradients, np.tile(exact_sum(7) / 7, (3, 1)), rtol=1e-6)


@pytest.mark.parametrize("options", [{"unroll_length": 4}, {"unroll_length": None, "max_horizon": 4}])
def test_clipping_bounds_each_run_by_itself(options):
  """Losses s·Σθ with slopes s of all sizes: also where float32 overflows in the gradient's square, and in itself."""
  slopes = jnp.array([0.0, 1e-30, 0.5, 3.0, 1e25, 2e38], jnp.float32)

  def init(key, num_steps):
    del num_steps
    return slopes[jax.random.randint(key, (), 0, 6)]

  def step(theta, state, key):
    del key
    return state, state * jnp.sum(theta)

  runs = base.UnrolledProblem(lambda key: jnp.int32(4), init, step)
  gradients = {}
  for clip_norm in (None, 2.0):
    estimator = backprop.build(runs, num_runs=1, clip_norm=clip_norm, **options)
    estimate = jax.jit(estimator.estimate)
    for seed in range(40):
      key, vector = jax.random.key(seed), jnp.full(4, 1e-3, jnp.float32)
      gradient, _, _ = estimate(key, vector, estimator.init(key, vector))
      gradients.setdefault(clip_norm, []).append(np.asarray(gradient, np.float64))
  plain, clipped = (np.array(gradients[norm]) for norm in (None, 2.0))
  finite = np.isfinite(plain).all(axis=1)
  norms = np.linalg.norm(plain[finite], axis=1, keepdims=True)
  assert not finite.all()
  assert norms.max() > 1e20
  assert norms.min() < 1
  np.testing.assert_allclose(clipped[finite], plain[finite] * np.minimum(1, 2 / np.maximum(norms, 1e-99)), rtol=1e-5)
  np.testing.assert_array_equal(clipped[~finite], 0.0)


@pytest.mark.slow_but_for("7")
@pytest.mark.parametrize("horizon", [7, 50])  # 7: an episode ends in every second window
def test_truncated_es_tends_to_truncated_backpropagation(horizon):
  """As σ → 0 a pair's estimate is ε (ε·g)/σ², with g the gradient of the same window by backpropagation."""
  sigma, options = 1e-4, {"unroll_length": 5, "stagger": False}
  evolution = es.build(problem(horizon, horizon), num_pairs=1, sigma=sigma, **options)
  backwards = backprop.build(problem(horizon, horizon), num_runs=1, **options)
  a, b = (x.init(jax.random.key(1), theta()) for x in (evolution, backwards))
  vector, _ = vectors.ravel(theta())
  for i in range(4):
    key = jax.random.key(10 + i)
    estimate, a, _ = evolution.estimate(key, theta(), a)
    g, b, _ = backwards.estimate(key, theta(), b)
    noise_key, _ = jax.random.split(jax.random.fold_in(key, 0))
    epsilon = np.asarray(vectors.perturbations(noise_key[None], sigma, vector))[0]
    np.testing.assert_allclose(flat(estimate), epsilon * (epsilon @ flat(g)) / sigma**2, rtol=1e-6)


def test_pes_analytic_tends_to_rtrl():
  """As σ → 0 its mean is the exact gradient, of which this window's part has no noise: for K = T all of it."""
  estimator = pes.build(problem(7, 7), num_pairs=2, sigma=1e-4, unroll_length=7, analytic=True, stagger=False)
  gradients, _ = windows(estimator, 3)
  np.testing.assert_allclose(gradients, np.tile(exact_sum(7) / 7, (3, 1)), rtol=1e-6)


def test_pes_analytic_subtracts_what_the_gradient_explains():
  """Where the state adds up θ, each estimate in closed form: how it depends on ξ decides its variance, not its mean.

  With s_t = s_{t-1} + θ and L_t = s_t, a window's own part of the gradient is g = K(K+1)/2, and the losses that it
  does not explain are those through the state in which the perturbations ξ before it left the pair: 2K·Kξ.
  """
  length, sigma = 3, 0.7
  step = lambda theta, state, key: (state + theta, state + theta)
  sums = base.UnrolledProblem(lambda key: jnp.int32(12), lambda key, horizon: jnp.zeros(()), step)
  estimator = pes.build(sums, num_pairs=1, sigma=sigma, unroll_length=length, analytic=True, stagger=False)
  state = estimator.init(jax.random.key(1), jnp.array(0.4))
  for window in range(5):  # the fifth begins the second episode
    xi = 0.0 if window == 4 else float(state.xi[0, 0])
    gradient, state, _ = estimator.estimate(jax.random.key(10 + window), jnp.array(0.4), state)
    np.testing.assert_allclose(gradient, (length * (length + 1) / 2 + (length * xi / sigma) ** 2) / length, rtol=1e-6)


def test_longer_horizons_than_announced_are_an_error():
  with pytest.raises(ValueError, match="max_horizon: the problem draws horizons of 13 and more, longer than 12"):
    backprop.build(problem(3, 13), unroll_length=None, max_horizon=12)

  @jax.jit
  def estimate(minimum):
    estimator = backprop.build(problem(minimum, 13), unroll_length=None, max_horizon=12, num_runs=1)
    return estimator.estimate(jax.random.key(0), theta(), estimator.init(jax.random.key(0), theta()))[0]

  assert np.all(np.isnan(flat(estimate(13))))
