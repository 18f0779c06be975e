"""Special cases of estimators that must equal simpler algorithms, and what may not change their results."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lopt import base
from lopt.outer import backprop, es, final_loss, forward, parallel, pes, unrolls, vectors

THETA = {"w": jnp.array([0.3, -0.2]), "b": jnp.float32(0.1)}


def problem(minimum=5, maximum=5, loss_cap=np.inf):
  """A small nonlinear recurrence with random inputs, whose state remembers its whole past."""

  def horizon(key):
    return jax.random.randint(key, (), minimum, maximum + 1)

  def init(key, num_steps):
    return {"x": jax.random.normal(key, (2,)), "left": num_steps}

  def step(theta, state, key):
    x = jnp.tanh(theta["w"] * state["x"] + theta["b"] + 0.3 * jax.random.normal(key, (2,)))
    return {"x": x, "left": state["left"] - 1}, jnp.sum(jnp.square(x - 0.5))

  return base.UnrolledProblem(horizon, init, step, loss_cap)


def leaves(tree):
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def run(estimator, num_windows, theta=THETA):
  state = estimator.init(jax.random.key(1), theta)
  results, estimate = [], jax.jit(estimator.estimate)
  for i in range(num_windows):
    gradient, state, metrics = estimate(jax.random.key(10 + i), theta, state)
    results.append((leaves(gradient), metrics))
  return results


def test_pes_with_k_equal_to_t_is_full_es():
  lockstep = pes.build(problem(), num_pairs=6, sigma=0.1, unroll_length=5, stagger=False)
  full = es.build(problem(), num_pairs=6, sigma=0.1)
  for (a, a_metrics), (b, b_metrics) in zip(run(lockstep, 3), run(full, 3), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5)
    for name, value in a_metrics.items():
      np.testing.assert_allclose(value, b_metrics[name], rtol=1e-5, err_msg=name)


def test_truncated_es_is_pes_within_the_first_window_and_not_after():
  """In the first window ξ = ε and both depart from fresh states; in the second only PES remembers the first."""
  options = {"num_pairs": 6, "sigma": 0.1, "unroll_length": 3, "stagger": False}
  persistent = run(pes.build(problem(20, 20), **options), 2)
  truncated = run(es.build(problem(20, 20), **options), 2)
  np.testing.assert_allclose(persistent[0][0], truncated[0][0], rtol=1e-5)
  assert not np.allclose(persistent[1][0], truncated[1][0], rtol=0.1)


def test_truncated_es_advances_under_the_mean_theta():
  """A plain loop with θ from the estimator's own first state, same keys, arrives at the same states."""
  estimator = es.build(problem(20, 20), num_pairs=3, sigma=0.5, unroll_length=4, stagger=False)
  state = estimator.init(jax.random.key(1), THETA)
  _, after_one, _ = estimator.estimate(jax.random.key(2), THETA, state)
  _, after_two, _ = estimator.estimate(jax.random.key(3), THETA, after_one)
  for pair in range(3):
    _, key = jax.random.split(jax.random.fold_in(jax.random.key(3), pair))
    inner = jax.tree.map(lambda x, pair=pair: x[pair], after_one.episodes.state)
    for t in range(4):
      _, step_key = jax.random.split(jax.random.fold_in(key, t))
      inner, _ = problem(20, 20).step(THETA, inner, step_key)
    np.testing.assert_allclose(inner["x"], after_two.episodes.state["x"][pair], rtol=1e-5)


class Reference:
  """PES, and with noise that is kept for a period, as one would write it down: loops over pairs, signs and steps."""

  def __init__(self, problem, theta, state, sigma, unroll_length, noise_period):
    self.problem, self.sigma, self.unroll_length, self.noise_period = problem, sigma, unroll_length, noise_period
    flat, self.unravel = vectors.ravel(theta)
    self.xi = np.zeros((len(state.index), flat.size))
    self.epsilon = np.zeros_like(self.xi)
    self.unrolled_with_it = [np.inf] * len(state.index)  # steps' worth of windows since ε was drawn

  def estimate(self, key, theta, state):
    """The gradient of one window that starts from the estimator's own state."""
    estimates = []
    flat, _ = vectors.ravel(theta)
    for pair, index in enumerate(state.index):
      noise_key, key_of_steps = jax.random.split(jax.random.fold_in(key, index))
      fresh = np.asarray(self.sigma * jax.random.normal(noise_key, flat.shape))
      if self.unrolled_with_it[pair] >= self.noise_period:
        self.epsilon[pair], self.unrolled_with_it[pair] = fresh, 0
        self.xi[pair] += fresh
      old, new = {}, {}
      for sign in (0, 1):
        inner = jax.tree.map(lambda x, pair=pair, sign=sign: x[pair, sign], state.episodes.state)
        left, share = int(state.episodes.steps_left[pair]), float(state.episodes.next_share[pair])
        old[sign], new[sign], restarted = 0.0, 0.0, False
        for t in range(self.unroll_length):
          begin_key, step_key = jax.random.split(jax.random.fold_in(key_of_steps, t))
          if left == 0:
            horizon_key, init_key = jax.random.split(begin_key)
            horizon = self.problem.horizon(horizon_key)
            inner = self.problem.init(init_key, horizon)
            left, share, restarted = max(1, int(np.ceil(share * int(horizon)))), 1.0, True
          perturbed = self.unravel(flat + (1 - 2 * sign) * (fresh if restarted else self.epsilon[pair]))
          inner, loss = self.problem.step(perturbed, inner, step_key)
          left -= 1
          (new if restarted else old)[sign] += float(loss)
      estimates.append(self.xi[pair] * (old[0] - old[1]) + fresh * (new[0] - new[1]))
      if restarted:
        self.xi[pair], self.epsilon[pair], self.unrolled_with_it[pair] = fresh, fresh, 0
      self.unrolled_with_it[pair] += self.unroll_length
    return np.mean(estimates, axis=0) / (2 * self.sigma**2 * self.unroll_length)


@pytest.mark.slow_but_for("True-3-pes", "True-3-gpes", "True-3-nres")
@pytest.mark.parametrize("windows", [1, 2, 6], ids=["pes", "gpes", "nres"])
@pytest.mark.parametrize("unroll_length", [1, 3, 12])
@pytest.mark.parametrize("stagger", [False, True])
def test_pes_equals_a_plain_loop(unroll_length, stagger, windows):
  horizons, period = problem(2, 6), windows * unroll_length
  estimator = pes.build(
    horizons, num_pairs=3, sigma=0.2, unroll_length=unroll_length, noise_period=period, stagger=stagger
  )
  state = estimator.init(jax.random.key(0), THETA)
  reference = Reference(horizons, THETA, state, 0.2, unroll_length, period)
  estimate = jax.jit(estimator.estimate)
  for i in range(7):
    key = jax.random.key(100 + i)
    expected = reference.estimate(key, THETA, state)
    gradient, state, _ = estimate(key, THETA, state)
    np.testing.assert_allclose(leaves(gradient), expected, rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(state.xi, reference.xi, rtol=1e-5, atol=1e-7)


def test_noise_kept_for_one_unroll_is_pes():
  a = run(pes.build(problem(2, 9), num_pairs=4, unroll_length=4), 4)
  b = run(pes.build(problem(2, 9), num_pairs=4, unroll_length=4, noise_period=4), 4)
  for (x, _), (y, _) in zip(a, b, strict=True):
    np.testing.assert_array_equal(x, y)


def test_noise_kept_for_an_episode_is_full_es_in_parts():
  """One ε from beginning to end: the windows' estimates add up to ε (L⁺ - L⁻) / 2σ² of the whole episode."""
  steady = problem(12, 12)._replace(
    init=lambda key, num_steps: {"x": jnp.array([0.5, -1.0]), "left": num_steps},
    step=lambda theta, state, key: problem().step(theta, state, jax.random.key(0)),
  )
  estimator = pes.build(steady, num_pairs=1, sigma=0.1, unroll_length=4, noise_period=12, stagger=False)
  windows = run(estimator, 3)
  flat, unravel = vectors.ravel(THETA)
  noise_key, _ = jax.random.split(jax.random.fold_in(jax.random.key(10), 0))
  epsilon = 0.1 * jax.random.normal(noise_key, flat.shape)
  losses = []
  for sign in (1, -1):
    inner, total = steady.init(jax.random.key(0), jnp.int32(12)), 0.0
    for _ in range(12):
      inner, loss = steady.step(unravel(flat + sign * epsilon), inner, jax.random.key(0))
      total += loss
    losses.append(total)
  expected = epsilon * (losses[0] - losses[1]) / (2 * 0.1**2)
  np.testing.assert_allclose(4 * sum(g for g, _ in windows), expected, rtol=1e-4)


RUNS = problem(2, 9)
ESTIMATORS = {
  "pes": lambda block=1: pes.build(RUNS, num_pairs=8, sigma=0.1, unroll_length=4, pairs_per_block=block),
  "nres": lambda block=1: pes.build(
    RUNS, num_pairs=8, sigma=0.1, unroll_length=4, noise_period=12, pairs_per_block=block
  ),
  "pes+analytic": lambda block=1: pes.build(
    RUNS, num_pairs=8, sigma=0.1, unroll_length=4, analytic=True, pairs_per_block=block
  ),
  "truncated es": lambda block=1: es.build(RUNS, num_pairs=8, sigma=0.1, unroll_length=4, pairs_per_block=block),
  "full es": lambda block=1: es.build(RUNS, num_pairs=8, sigma=0.1, pairs_per_block=block),
  "truncated bptt": lambda block=1: backprop.build(RUNS, num_runs=8, unroll_length=4, runs_per_block=block),
  "full bptt": lambda block=1: backprop.build(
    RUNS, num_runs=8, unroll_length=None, max_horizon=9, runs_per_block=block
  ),
  "rtrl": lambda block=1: forward.build(RUNS, method="rtrl", num_runs=8, unroll_length=4, runs_per_block=block),
  "uoro": lambda block=1: forward.build(RUNS, method="uoro", num_runs=8, unroll_length=4, runs_per_block=block),
  "pes of the final loss": lambda block=1: pes.build(
    final_loss.wrap(RUNS), num_pairs=8, sigma=0.1, unroll_length=4, pairs_per_block=block
  ),
}


class Counted(NamedTuple):
  """An estimator whose `estimate` is compiled, and the list of its compilations."""

  init: Callable
  estimate: Callable
  traces: list


@functools.cache  # compiled once for the tests below
def compiled(name):
  estimator, traces = ESTIMATORS[name](8), []

  def estimate(key, theta, state):
    traces.append(key)
    return estimator.estimate(key, theta, state)

  return Counted(jax.jit(estimator.init), jax.jit(estimate), traces)


@pytest.mark.parametrize("name", ESTIMATORS)
class TestEveryEstimator:
  @pytest.mark.slow_but_for("pes", "full bptt")
  def test_blocks_do_not_matter(self, name):
    for (a, _), (b, _) in zip(run(compiled(name), 4), run(ESTIMATORS[name](3), 4), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)

  @pytest.mark.slow_but_for("pes")
  def test_devices_do_not_matter(self, name):
    devices = 4
    averaged = parallel.averaged(ESTIMATORS[name](2))
    program = parallel.spread(
      lambda step, theta, state: averaged.estimate(jax.random.key(step), theta, state), devices
    )
    state = parallel.split(compiled(name).init(jax.random.key(1), THETA), devices)
    for i, (expected, expected_metrics) in enumerate(run(compiled(name), 3)):
      gradient, state, metrics = program(np.uint32(10 + i), THETA, state)
      np.testing.assert_allclose(leaves(gradient), expected, rtol=1e-4, atol=1e-6)
      for metric, value in metrics.items():
        np.testing.assert_allclose(value, expected_metrics[metric], rtol=1e-4, err_msg=metric)

  @pytest.mark.slow_but_for("pes", "uoro")
  def test_order_of_particles_does_not_matter(self, name):
    init, estimate, _ = compiled(name)
    _, state, _ = estimate(jax.random.key(2), THETA, init(jax.random.key(1), THETA))
    shuffled = jax.tree.map(lambda x: x[jnp.array([3, 1, 7, 0, 2, 6, 5, 4])], state)
    expected, *_ = estimate(jax.random.key(3), THETA, state)
    gradient, *_ = estimate(jax.random.key(3), THETA, shuffled)
    np.testing.assert_allclose(leaves(gradient), leaves(expected), rtol=1e-4, atol=1e-6)

  @pytest.mark.slow_but_for("pes", "full bptt")
  def test_a_second_call_does_not_compile(self, name):
    init, estimate, traces = compiled(name)
    theta, state = THETA, init(jax.random.key(1), THETA)
    for i in range(3):
      gradient, state, _ = estimate(jax.random.key(i), theta, state)
      theta = jax.tree.map(lambda t, g: t - 0.01 * g, theta, gradient)
    assert len(traces) == 1


def bytes_needed(estimator):
  state = estimator.init(jax.random.key(1), THETA)
  memory = jax.jit(estimator.estimate).lower(jax.random.key(2), THETA, state).compile().memory_analysis()
  assert memory is not None
  return memory.temp_size_in_bytes + memory.output_size_in_bytes


@pytest.mark.slow_but_for("pes")
@pytest.mark.parametrize(
  "build",
  [
    lambda problem: pes.build(problem, num_pairs=8, unroll_length=4),
    lambda problem: pes.build(problem, num_pairs=8, unroll_length=4, noise_period=200_000),
    lambda problem: pes.build(problem, num_pairs=8, unroll_length=4, analytic=True),
    lambda problem: backprop.build(problem, num_runs=8, unroll_length=4),
    lambda problem: forward.build(problem, method="rtrl", num_runs=8, unroll_length=4),
    lambda problem: forward.build(problem, method="uoro", num_runs=8, unroll_length=4),
  ],
  ids=["pes", "nres", "pes+analytic", "truncated bptt", "rtrl", "uoro"],
)
def test_memory_does_not_grow_with_the_horizon(build):
  assert bytes_needed(build(problem(100_000, 100_000))) == bytes_needed(build(problem(10, 10)))


def test_memory_of_full_backpropagation_grows_with_the_root_of_the_horizon(monkeypatch):
  monkeypatch.setattr(backprop, "KEPT_BYTES", 2**10)
  small, large = (
    bytes_needed(backprop.build(problem(n, n), num_runs=1, unroll_length=None, max_horizon=n))
    for n in (10_000, 1_000_000)
  )
  assert large < 12 * small


def test_diverged_runs_are_capped_and_counted():
  """Losses of 1e30 and NaN after step 3, for pairs with odd keys, enter as the cap and show in the metrics."""

  def init(key, num_steps):
    del num_steps
    return jax.random.bernoulli(key), jnp.int32(0)

  def step(theta, state, key):
    del key
    broken, t = state
    bad = jnp.where(t % 2 == 0, jnp.nan, 1e30)
    return (broken, t + 1), jnp.where(broken & (t >= 3), bad, 1.0 + 0.0 * theta)

  runs = base.UnrolledProblem(lambda key: jnp.int32(5), init, step, loss_cap=7.0)
  estimator = es.build(runs, num_pairs=64, sigma=0.1)
  state = estimator.init(jax.random.key(0), jnp.zeros(()))
  gradient, _, metrics = estimator.estimate(jax.random.key(1), jnp.zeros(()), state)
  share = float(metrics["diverged"])
  assert 0.25 < share < 0.75
  np.testing.assert_allclose(metrics["meta_loss"], 1.0 + share * 2 * 6.0 / 5, rtol=1e-5)
  np.testing.assert_allclose(gradient, 0.0, atol=1e-4)


def test_gradients_of_capped_runs_are_zero_and_others_stay_nan():
  """√x at 0 has no derivative; where its loss is above the cap it is a constant, else it has to show."""

  def step(theta, state, key):
    del key
    return state, jnp.where(state, 1e30, 1.0) + jnp.sqrt(0.0 * theta)

  for broken, expected in ((True, 0.0), (False, np.nan)):
    init = lambda key, num_steps, broken=broken: jnp.array(broken)
    runs = base.UnrolledProblem(lambda key: jnp.int32(4), init, step, loss_cap=7.0)
    for estimator in (
      backprop.build(runs, num_runs=2, unroll_length=2),
      backprop.build(runs, num_runs=2, unroll_length=None, max_horizon=4),
    ):
      state = estimator.init(jax.random.key(0), jnp.ones(()))
      gradient, _, metrics = estimator.estimate(jax.random.key(1), jnp.ones(()), state)
      np.testing.assert_array_equal(gradient, expected)
      assert metrics["diverged"] == float(broken)


def test_staggered_pairs_are_at_every_age():
  """After the first episodes, ages are uniform over the horizon: mean and variance of U{0..T-1} within 5 errors."""
  horizon, pairs = 40, 4000
  estimator = pes.build(problem(horizon, horizon), num_pairs=pairs, unroll_length=20, pairs_per_block=pairs)
  state = estimator.init(jax.random.key(0), THETA)
  for i in range(3):
    _, state, _ = jax.jit(estimator.estimate)(jax.random.key(i), THETA, state)
  left = np.asarray(state.episodes.steps_left)
  counts = np.bincount(left, minlength=horizon)
  assert len(counts) == horizon  # 0..T-1 steps left
  chi_square = np.sum((counts - pairs / horizon) ** 2 / (pairs / horizon))
  assert chi_square < (horizon - 1) + 5 * np.sqrt(2 * (horizon - 1))


@pytest.mark.parametrize(
  ("build", "message"),
  [
    (lambda: pes.build(problem(), num_pairs=0), "num_pairs: must be at least 1, not 0"),
    (lambda: pes.build(problem(), unroll_length=-1), "unroll_length: must be at least 1, not -1"),
    (lambda: pes.build(problem(), sigma=0.0), "sigma: must be above 0 and finite, not 0.0"),
    (
      lambda: pes.build(problem(), unroll_length=20, noise_period=50),
      "noise_period: must be a multiple of unroll_length=20, such as 60, not 50",
    ),
    (
      lambda: pes.build(problem(), unroll_length=20, noise_period=40, analytic=True),
      "noise_period: must be unroll_length=20 where analytic is set, not 40",
    ),
    (lambda: backprop.build(problem(), unroll_length=None), "unroll_length: give it alone"),
    (lambda: backprop.build(problem(), unroll_length=5, max_horizon=9), "unroll_length: give it alone"),
    (lambda: backprop.build(problem(), num_runs=0), "num_runs: must be at least 1, not 0"),
    (lambda: forward.build(problem(), runs_per_block=0), "runs_per_block: must be at least 1, not 0"),
    (lambda: es.build(problem(), unroll_length=0), "unroll_length: must be at least 1, not 0"),
    (lambda: es.build(problem(), pairs_per_block=0), "pairs_per_block: must be at least 1, not 0"),
  ],
)
def test_bad_settings_are_named(build, message):
  with pytest.raises(ValueError, match=message):
    build()


def test_integer_theta_is_refused():
  estimator = pes.build(problem())
  with pytest.raises(TypeError, match=r"theta\['n'\]: int32"):
    estimator.init(jax.random.key(0), {"n": jnp.array(3)})


@pytest.mark.parametrize(
  ("bytes_of_a_step", "groups", "expected"),
  [(4, 16, 8), (unrolls.CACHED_BYTES // 4, 16, 4), (unrolls.CACHED_BYTES // 3, 16, 2), (2**21, 16, 1), (4, 3, 3)],
)
def test_blocks_are_what_fits_the_cache(bytes_of_a_step, groups, expected):
  """The largest array of a step decides, wherever it is computed: here in a branch of a loop."""
  count = bytes_of_a_step // 4

  def step(theta, state, key):
    inside = lambda _, x: jax.lax.cond(x > 0, lambda: x, lambda: jnp.sum(jax.random.normal(key, (count,))))
    return state, jax.lax.fori_loop(0, 2, inside, theta["b"])

  seen = []

  def function(x):
    seen.append(len(x))
    return x

  x = jnp.arange(groups)
  result = unrolls.in_blocks(function, problem()._replace(step=step), THETA, None, x)
  assert seen == [expected]
  np.testing.assert_array_equal(result, x)
