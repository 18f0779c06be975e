"""The evaluation on quadratics, whose training curves are known in closed form."""

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lopt.base import LearnedOptimizer, TaskFamily
from lopt.evaluation import baselines, comparison, held_out, measures
from lopt.outer import parallel

T = 40
CAP = 50.0
SCALE = 4.0  # what normalize divides by


def quadratic_family(noise=0.0, on_trace=lambda: None):
  """The loss SCALE a x²/2 + noise z, a of the task, x_0 of the run, z of the batch.

  Validation adds SCALE, test twice that.
  """

  def sample(key):
    return {"curvature": 2.0 ** -jax.random.randint(key, (), 0, 4).astype(jnp.float32)}

  def init(key, task_params):
    return {"x": jax.random.uniform(key, (), minval=1.0, maxval=2.0)}

  def batch(key, task_params, split):
    return {"z": jax.random.normal(key), "offset": jnp.float32({"train": 0, "validation": 1, "test": 2}[split])}

  def loss(params, key, batch, task_params):
    on_trace()
    value = SCALE * task_params["curvature"] * params["x"] ** 2 / 2
    return value + SCALE * (noise * batch["z"] + batch["offset"]), {"distance": jnp.abs(params["x"])}

  return TaskFamily(sample, init, batch, loss, lambda loss, task_params: loss / SCALE, CAP)


def sgd():
  return baselines.from_learning_rate(optax.sgd)


def sgd_curve(curvature, x0, learning_rate, num_steps):
  """Gradient descent: x_t = (1 - α SCALE a)^t x_0. Losses of num_steps + 1 points, normalised, before the cap."""
  t = np.arange(num_steps + 1)
  with np.errstate(over="ignore"):
    return curvature / 2 * (x0 * (1 - learning_rate * SCALE * curvature) ** t) ** 2


def sgdm_curve(curvature, x0, learning_rate, num_steps):
  x, m, losses = x0, 0.0, []
  for _ in range(num_steps):
    losses.append(curvature / 2 * x**2)
    m = 0.9 * m + SCALE * curvature * x
    x = x - learning_rate * m
  return np.array(losses)


def adam_curve(curvature, x0, learning_rate, num_steps):
  x, m, v, losses = x0, 0.0, 0.0, []
  for t in range(1, num_steps + 1):
    losses.append(curvature / 2 * x**2)
    g = SCALE * curvature * x
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
    x = x - learning_rate * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.999**t)) + 1e-8)
  return np.array(losses)


def capped(losses):
  return np.where(losses < CAP, losses, CAP)  # CAP for NaN, too


def documented_keys(seed, purpose, task, run_seed):
  """The key scheme, as the module's docstring has it: (sample, init, steps, validation)."""
  root = jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))
  sample_key, task_key = jax.random.split(jax.random.fold_in(root, task))
  return sample_key, *jax.random.split(jax.random.fold_in(task_key, run_seed), 3)


def task_and_start(family, seed, purpose, task, run_seed):
  """(curvature, x_0) of a run, by the documented keys."""
  sample_key, init_key, _, _ = documented_keys(seed, purpose, task, run_seed)
  task_params = family.sample(sample_key)
  return float(task_params["curvature"]), float(family.init(init_key, task_params)["x"])


def test_runs_equal_the_closed_form_and_diverged_ones_are_capped_and_counted():
  family = quadratic_family()
  rates = [0.0, 0.1, 0.5, 3.0]
  tasks = held_out.sample_tasks(family, 3, held_out.HELD_OUT, 5)
  seeds = [0, 7, 11]
  with np.errstate(divide="ignore"):
    thetas = {"log_learning_rate": np.log(np.array(rates, np.float32))}
  runs = held_out.build_train(family, sgd(), num_steps=T)(thetas, tasks, jnp.array(seeds))

  expected = np.zeros((5, 3, 4, T + 1))
  for i, j, k in np.ndindex(5, 3, 4):
    curvature, x0 = task_and_start(family, 3, held_out.HELD_OUT, i, seeds[j])
    expected[i, j, k] = sgd_curve(curvature, x0, rates[k], T)
  assert len({task_and_start(family, 3, held_out.HELD_OUT, i, 0)[0] for i in range(5)}) > 1
  np.testing.assert_allclose(runs.losses, capped(expected[..., :T]), rtol=1e-3, atol=1e-7)
  np.testing.assert_allclose(runs.held_out_loss, capped(expected[..., T] + 1), rtol=1e-3)
  diverged = (expected >= CAP).any(axis=-1) | (expected[..., T] + 1 >= CAP)
  assert 0 < diverged.mean() < 1
  np.testing.assert_array_equal(runs.diverged, diverged)


def test_a_run_that_becomes_nan_is_capped_and_counted():
  family = quadratic_family()
  family = family._replace(  # NaN below x = 1
    loss=lambda params, key, batch, task_params: (jnp.log(params["x"]), {}),
    batch=lambda key, task_params, split: (),
    init=lambda key, task_params: {"x": jnp.float32(2.0)},
  )
  tasks = held_out.sample_tasks(family, 0, held_out.HELD_OUT, 1)
  train = held_out.build_train(family, sgd(), num_steps=3)
  runs = train(baselines.theta_at(np.array([0.1, 100.0])), tasks, jnp.arange(1))
  np.testing.assert_array_equal(runs.diverged, [[[False, True]]])
  np.testing.assert_allclose(runs.losses[0, 0, 1], [math.log(2.0) / SCALE, CAP, CAP], rtol=1e-6)
  assert runs.held_out_loss[0, 0, 1] == CAP


def test_one_loss_above_the_cap_makes_a_run_a_diverged_one_wherever_it_is():
  family = quadratic_family(noise=25.0)  # a loss is above the cap with probability 2%
  tasks = held_out.sample_tasks(family, 0, held_out.HELD_OUT, 2)
  train = held_out.build_train(family, sgd(), num_steps=10, num_held_out_batches=1)
  runs = train({"log_learning_rate": jnp.full((1,), -jnp.inf)}, tasks, jnp.arange(100))
  training, last = (np.asarray(runs.losses) == CAP).any(axis=-1), np.asarray(runs.losses)[..., -1] == CAP
  validation = np.asarray(runs.held_out_loss) == CAP
  assert (training & ~last & ~validation).any()
  assert (validation & ~training).any()
  assert (~validation & ~training).any()
  np.testing.assert_array_equal(runs.diverged, training | validation)


def test_keys_are_those_documented_and_do_not_depend_on_the_optimizer():
  family = quadratic_family(noise=1.0)
  tasks = held_out.sample_tasks(family, 5, held_out.PERIODIC, 2)

  def losses(optimizer):
    frozen = {"log_learning_rate": jnp.full((1,), -jnp.inf)}
    runs = held_out.build_train(family, optimizer, num_steps=4, num_held_out_batches=3)(
      frozen, tasks, jnp.array([0, 1, held_out.FIRST_TUNING_SEED])
    )
    return np.asarray(runs.losses)[:, :, 0], np.asarray(runs.held_out_loss)[:, :, 0]

  expected, expected_validation = np.zeros((2, 3, 4)), np.zeros((2, 3))
  for i in range(2):
    for j, seed in enumerate([0, 1, held_out.FIRST_TUNING_SEED]):
      curvature, x0 = task_and_start(family, 5, held_out.PERIODIC, i, seed)
      _, _, steps_key, validation_key = documented_keys(5, held_out.PERIODIC, i, seed)
      batch_keys = [jax.random.split(jax.random.fold_in(steps_key, t))[0] for t in range(4)]
      validation_keys = [jax.random.split(key)[0] for key in jax.random.split(validation_key, 3)]
      expected[i, j] = [curvature * x0**2 / 2 + jax.random.normal(key) for key in batch_keys]
      noise = np.mean([jax.random.normal(key) for key in validation_keys])
      expected_validation[i, j] = curvature * x0**2 / 2 + noise + 1
  assert len(np.unique(expected.round(5))) == expected.size
  for optimizer in (sgd(), baselines.adam()):
    training, validation = losses(optimizer)
    np.testing.assert_allclose(training, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(validation, expected_validation, rtol=1e-5, atol=1e-6)


def test_purposes_and_seeds_have_tasks_of_their_own():
  family = quadratic_family()._replace(sample=jax.random.uniform)
  samples = [
    np.asarray(held_out.sample_tasks(family, seed, purpose, 50).params)
    for seed in (0, 1)
    for purpose in (held_out.HELD_OUT, held_out.PERIODIC)
  ]
  assert len(np.unique(samples)) == 200
  # The first tasks are the same, however many there are.
  np.testing.assert_array_equal(held_out.sample_tasks(family, 0, held_out.HELD_OUT, 3).params, samples[0][:3])


def test_theta_per_task_pairs_tasks_with_their_own():
  family = quadratic_family()
  tasks = held_out.sample_tasks(family, 3, held_out.HELD_OUT, 3)
  rates = np.array([[0.1], [0.01], [0.3]])
  train = held_out.build_train(family, sgd(), num_steps=T, theta_per_task=True)
  runs = train(baselines.theta_at(rates), tasks, jnp.arange(2))
  for i, j in np.ndindex(3, 2):
    expected = sgd_curve(*task_and_start(family, 3, held_out.HELD_OUT, i, j), rates[i, 0], T)[:T]
    np.testing.assert_allclose(runs.losses[i, j, 0], expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(("num_devices", "block"), [(1, 1), (3, 1), (1, 64), (2, 2)])
def test_number_of_devices_and_size_of_blocks_do_not_change_the_numbers(monkeypatch, num_devices, block):
  family = quadratic_family(noise=0.1)
  tasks = held_out.sample_tasks(family, 0, held_out.HELD_OUT, 2)
  rates = np.array([0.01, 0.3])
  devices = jax.local_devices()
  assert len(devices) == 8
  monkeypatch.setattr(jax, "local_devices", lambda: devices[:num_devices])
  monkeypatch.setitem(parallel.RUNS_PER_BLOCK, "cpu", block)
  runs = held_out.build_train(family, sgd(), num_steps=5)(baselines.theta_at(rates), tasks, jnp.arange(5))
  assert isinstance(runs.losses, jax.Array)
  assert runs.losses.sharding.num_devices == num_devices
  for i, j, k in np.ndindex(2, 5, 2):
    x0_curve = sgd_curve(*task_and_start(family, 0, held_out.HELD_OUT, i, j), rates[k], 5)[:5]
    steps_key = documented_keys(0, held_out.HELD_OUT, i, j)[2]
    noise = [jax.random.normal(jax.random.split(jax.random.fold_in(steps_key, t))[0]) for t in range(5)]
    np.testing.assert_allclose(runs.losses[i, j, k], x0_curve + 0.1 * np.array(noise), rtol=1e-5, atol=1e-6)


def parabola(best):
  """Mean losses with the minimum at learning rate `best`, a task each, and a record of what was asked for."""
  asked = []

  def losses_at(rates):
    asked.append(rates)
    return (np.log(rates) - np.log(np.array(best))[:, None]) ** 2

  return losses_at, asked


def test_tuning_finds_each_tasks_best_learning_rate():
  losses_at, asked = parabola([2e-6, 1e-3, 0.028, 1.2])
  tuning = held_out.tune(losses_at, 4)
  assert [t.best for t in tuning] == [3e-6, 1e-3, 0.03, 1.0]
  assert all(t.interior and t.learning_rates == baselines.LEARNING_RATES for t in tuning)
  assert len(asked) == 1
  for i, t in enumerate(tuning):
    np.testing.assert_array_equal(t.losses, losses_at(np.array([t.learning_rates] * 4))[i])


def test_tuning_extends_the_grid_of_the_tasks_whose_best_is_at_its_end():
  losses_at, asked = parabola([3.0, 1e-3, 27.0, 1e-7])
  tuning = held_out.tune(losses_at, 4)
  assert [t.best for t in tuning] == [3.0, 1e-3, 30.0, 1e-7]
  assert all(t.interior for t in tuning)
  grid = baselines.LEARNING_RATES
  assert tuning[0].learning_rates == (*grid, 10.0)
  assert tuning[1].learning_rates == grid
  assert tuning[2].learning_rates == (*grid, 10.0, 30.0, 100.0)
  assert tuning[3].learning_rates == (3e-8, 1e-7, 3e-7, *grid)
  assert len(asked) == 4


def test_tuning_says_so_when_the_best_stays_at_the_end():
  losses_at, asked = parabola([1e6, 1e-12])
  high, low = held_out.tune(losses_at, 2)
  assert not high.interior
  assert not low.interior
  assert high.best == 300.0
  assert low.best == 1e-8
  assert len(high.learning_rates) == len(low.learning_rates) == 14 + held_out.MAX_EXTENSIONS
  assert len(asked) == 1 + held_out.MAX_EXTENSIONS


@pytest.fixture(scope="module")
def family():
  return quadratic_family()


@pytest.fixture(scope="module")
def compared(family):
  """Two θ of one architecture, and the baselines."""
  fast, slow = (baselines.theta_at(rate) for rate in (0.2, 1e-4))
  optimizer = sgd()
  messages = []
  result = held_out.compare(
    family,
    {"fast": (optimizer, fast), "slow": (optimizer, slow)},
    num_tasks=4,
    num_seeds=3,
    num_steps=T,
    seed=1,
    num_tuning_seeds=2,
    progress=messages.append,
  )
  assert len(messages) == 2 + 2 + 2
  return result


@pytest.mark.parametrize(("name", "reference"), [("Adam", adam_curve), ("SGDM", sgdm_curve)])
def test_compare_tunes_as_brute_force_does_on_seeds_that_are_not_reported(family, compared, name, reference):
  for i, m in enumerate(compared.baselines[name].measures):
    tuning_runs = [task_and_start(family, 1, held_out.HELD_OUT, i, 2**30 + j) for j in range(2)]
    reported_runs = [task_and_start(family, 1, held_out.HELD_OUT, i, j) for j in range(3)]
    assert not set(tuning_runs) & set(reported_runs)
    rates = m.tuning.learning_rates
    expected = [np.mean([capped(reference(*run, rate, T)) for run in tuning_runs]) for rate in rates]
    np.testing.assert_allclose(m.tuning.losses, expected, rtol=2e-3)
    assert m.tuning.best == rates[np.argmin(expected)]
    assert m.tuning.interior == (0 < np.argmin(expected) < len(rates) - 1)
    curves = [capped(reference(*run, m.tuning.best, T)) for run in reported_runs]
    np.testing.assert_allclose(compared.baselines[name].curves[i], curves, rtol=1e-2, atol=1e-5)


def test_compare_trains_all_optimizers_from_the_same_starts(family, compared):
  starts = [e.curves[:, :, 0] for e in (compared.learned | compared.baselines).values()]
  for start in starts[1:]:
    np.testing.assert_allclose(start, starts[0], rtol=1e-6)
  for name, rate in (("fast", 0.2), ("slow", 1e-4)):
    for i, j in np.ndindex(4, 3):
      expected = sgd_curve(*task_and_start(family, 1, held_out.HELD_OUT, i, j), rate, T)[:T]
      np.testing.assert_allclose(compared.learned[name].curves[i, j], expected, rtol=1e-3, atol=1e-7)


def adam_ladder(family):
  """Adam's losses [tasks, seeds, rates, 2 T + 1] after 0, 2, … 4 T steps on the reported runs, by the recursion."""
  curves = np.zeros((4, 3, 14, 2 * T + 1))
  for i, j, k in np.ndindex(4, 3, 14):
    start = task_and_start(family, 1, held_out.HELD_OUT, i, j)
    curves[i, j, k] = capped(adam_curve(*start, baselines.LEARNING_RATES[k], 4 * T + 1))[::2]
  return curves


def test_the_envelope_is_the_best_of_all_learning_rates_for_four_horizons(family, compared):
  curves = adam_ladder(family).mean(axis=1)
  assert compared.envelope.steps.tolist() == list(range(0, 4 * T + 1, 2))  # twenty points for 40 steps
  for i in range(4):
    assert compared.baselines["Adam"].measures[i].tuning.best in baselines.LEARNING_RATES  # or else one more curve
    lowest = [curves[i, :, : t + 1].min() for t in range(2 * T + 1)]
    np.testing.assert_allclose(compared.envelope.losses[i], lowest, rtol=2e-2, atol=1e-5)


def test_measures_equal_naive_sums_over_the_curves(family, compared):
  everyone = compared.evaluations
  assert list(everyone) == ["fast", "slow", "Adam", "Adam at 1e-3", "SGDM"]
  for name, e in everyone.items():
    for i, m in enumerate(e.measures):
      runs = e.curves[i]
      means = [sum(run) / T for run in runs]
      assert m.mean_loss == pytest.approx(np.mean(means))
      assert m.mean_loss_error == pytest.approx(np.std(means, ddof=1) / math.sqrt(3))
      if name in compared.learned:
        starts = [task_and_start(family, 1, held_out.HELD_OUT, i, j) for j in range(3)]
        finals = [sgd_curve(*start, {"fast": 0.2, "slow": 1e-4}[name], T + 1)[T] for start in starts]
        assert m.final_loss == pytest.approx(np.mean(finals), rel=1e-3, abs=1e-7)
        assert m.final_loss_error == pytest.approx(np.std(finals, ddof=1) / math.sqrt(3), rel=1e-2, abs=1e-7)
      assert m.relative_loss == pytest.approx(m.final_loss / compared.baselines["Adam"].measures[i].final_loss)
      assert m.rank == 1 + sum(other.measures[i].final_loss < m.final_loss for other in everyone.values())
      steps, lowest = compared.envelope.steps, compared.envelope.losses[i]
      enough = [t for t, loss in zip(steps, lowest, strict=True) if loss <= m.final_loss * (1 + 1e-6)]
      assert enough[0] - 2 < m.speed_up * T <= enough[0] if enough else m.speed_up == 4
      assert m.speed_up_is_bound == (not enough)
      assert m.diverged == 0
      if name in compared.learned:
        assert m.tuning is None
        starts = [task_and_start(family, 1, held_out.HELD_OUT, i, j) for j in range(3)]
        rate = {"fast": 0.2, "slow": 1e-4}[name]
        test = [sgd_curve(*start, rate, T)[T] + 2 for start in starts]
        distances = [math.sqrt(2 * (loss - 2) / start[0]) for loss, start in zip(test, starts, strict=True)]
        assert m.test_loss == pytest.approx(np.mean(test), rel=1e-3)
        assert m.test_loss_error == pytest.approx(np.std(test, ddof=1) / math.sqrt(3), rel=1e-2, abs=1e-6)
        assert m.test_metrics == {"distance": pytest.approx(np.mean(distances), rel=1e-3, abs=1e-6)}
  assert all(0 < m.speed_up <= 1 for m in everyone["Adam"].measures)
  assert all(m.speed_up < 0.5 for m in everyone["slow"].measures)


def test_adam_as_it_is_has_the_learning_rate_1e_3(family, compared):
  for i, j in np.ndindex(4, 3):
    start = task_and_start(family, 1, held_out.HELD_OUT, i, j)
    expected = adam_curve(*start, 1e-3, T + 1)
    np.testing.assert_allclose(compared.baselines["Adam at 1e-3"].curves[i, j], expected[:T], rtol=1e-4)
  tests = [m.test_loss for m in compared.baselines["Adam at 1e-3"].measures]
  starts = [[task_and_start(family, 1, held_out.HELD_OUT, i, j) for j in range(3)] for i in range(4)]
  expected = [np.mean([adam_curve(*start, 1e-3, T + 1)[T] + 2 for start in task]) for task in starts]
  np.testing.assert_allclose(tests, expected, rtol=1e-4)  # after T steps, though training goes on


def test_families_compared_together_have_tasks_of_their_own(family):
  assert held_out.seeds_of_families(3, ["one"]) == {"one": 3}
  seeds = held_out.seeds_of_families(3, ["one", "other"])
  keys = [held_out.sample_tasks(family, seed, held_out.HELD_OUT, 4).keys for seed in seeds.values()]
  assert len(np.unique(jax.random.key_data(jnp.concatenate(keys)), axis=0)) == 8
  assert seeds == held_out.seeds_of_families(3, ["other", "one"]) != held_out.seeds_of_families(4, ["one", "other"])


def test_tasks_are_described_by_their_small_parameters(family, compared):
  curvatures = [task_and_start(family, 1, held_out.HELD_OUT, i, 0)[0] for i in range(4)]
  assert compared.tasks == tuple(f"curvature {curvature:.3g}" for curvature in curvatures)


def test_summary_over_tasks(compared):
  for name, e in compared.evaluations.items():
    summary = comparison.summarize([compared], name)
    assert summary.mean_loss == pytest.approx(e.curves.mean())
    # Seeds are independent from task to task.
    task_errors = e.curves.mean(axis=2).std(axis=1, ddof=1) / math.sqrt(3)
    assert summary.mean_loss_error == pytest.approx(math.sqrt((task_errors**2).sum()) / 4)
    for other, o in compared.baselines.items():
      if other != name:
        wins = e.curves.mean(axis=(1, 2)) < o.curves.mean(axis=(1, 2))
        assert summary.tasks_won[other] == wins.sum()
    # Of four values the interquartile mean is that of the two in the middle.
    middle = sorted(m.speed_up for m in e.measures)[1:3]
    assert summary.speed_up.value == summary.median_speed_up == pytest.approx(np.mean(middle))
    assert summary.speed_up.low <= summary.speed_up.high
    assert summary.speed_up == measures.summarize([np.array([m.speed_up for m in e.measures])])
    assert summary.rank == pytest.approx(np.mean([m.rank for m in e.measures]))
    assert (summary.relative_time, summary.wall_clock_speed_up, summary.test_accuracy) == (None, None, None)
  slow, adam, untuned = (comparison.summarize([compared], name) for name in ("slow", "Adam", "Adam at 1e-3"))
  assert slow.tasks_interior is untuned.tasks_interior is None
  assert slow.tasks_won["Adam"] == slow.tasks_won["SGDM"] == 0
  assert adam.relative_loss == measures.Interval(1, 1, 1)
  assert adam.tasks_interior == sum(m.tuning.interior for m in compared.baselines["Adam"].measures)


def test_summary_of_several_comparisons_is_over_all_their_tasks(compared):
  timed = compared._replace(seconds_per_step=dict.fromkeys(compared.evaluations, 1e-3) | {"fast": 2e-3})
  half = timed._replace(seconds_per_step=dict.fromkeys(compared.evaluations, 1e-3) | {"fast": 5e-4})
  one, two = comparison.summarize([timed], "fast"), comparison.summarize([timed, half], "fast")
  assert (one.num_tasks, two.num_tasks) == (4, 8)
  assert two.mean_loss == pytest.approx(one.mean_loss)
  assert two.speed_up.value == pytest.approx(one.speed_up.value)
  assert two.tasks_won["Adam"] == 2 * one.tasks_won["Adam"]
  assert (one.relative_time, two.relative_time) == (2, 1.25)
  assert one.wall_clock_speed_up == pytest.approx(one.speed_up.value / 2)
  speed_ups = [m.speed_up for m in compared.learned["fast"].measures]
  both = sorted([s / 2 for s in speed_ups] + [s / 0.5 for s in speed_ups])
  assert two.wall_clock_speed_up == pytest.approx(np.mean(both[2:6]))


def test_the_interval_of_several_comparisons_draws_the_tasks_of_each(compared):
  slow = compared._replace(learned={"fast": compared.learned["slow"]})
  families = [np.array([m.speed_up for m in c.learned["fast"].measures]) for c in (compared, slow)]
  drawn_together = measures.summarize([np.concatenate(families)])
  assert comparison.summarize([compared, slow], "fast").speed_up == measures.summarize(families) != drawn_together


@pytest.fixture
def trained(monkeypatch):
  """Runs are made up, so that there is nothing to compile; what was trained, by the name of its meta-parameter."""
  names = []

  def build_train(family, optimizer, *, num_steps, points=(), **options):
    def train(thetas, tasks, seeds):
      (name, theta), *_ = thetas.items()
      names.append(name)
      theta = np.asarray(theta).reshape(-1, np.shape(theta)[-1])[:, None] + np.asarray(seeds)[:, None] % 5 / 7
      theta = np.broadcast_to(theta, (len(tasks.keys), *theta.shape[1:]))
      losses = 2 + np.cos(theta)[..., None] + np.exp(-np.arange(1, num_steps + 1))
      train_losses = 2 + np.cos(theta)[..., None] + np.exp(-np.array(points or [num_steps]))
      return held_out.Runs(losses, train_losses, np.sin(theta), {"accuracy": np.abs(np.sin(theta))}, theta > 0)

    return train

  monkeypatch.setattr(held_out, "build_train", build_train)
  return names


def test_a_second_comparison_trains_no_baseline_again(family, trained, tmp_path):
  mine = LearnedOptimizer(lambda key: {"own": jnp.zeros(())}, lambda theta, num_steps: optax.sgd(theta["own"]))
  sizes = {"num_tasks": 2, "num_seeds": 2, "num_steps": 6, "seed": 1, "num_tuning_seeds": 1}

  def compare(family=family, own=0.1, names=("SGDM",), **changes):
    trained.clear()
    pair: Any = (mine, {"own": jnp.float32(own)})
    options: dict[str, Any] = {**sizes, **changes}
    return held_out.compare(family, {"mine": pair}, baseline_names=names, cache_folder=tmp_path, **options)

  first = compare()
  assert len(trained) > 1
  assert len(list(tmp_path.iterdir())) == 2
  second = compare(own=0.2)
  assert trained == ["own"]
  for name, e in first.baselines.items():
    assert [m._replace(rank=0) for m in e.measures] == [m._replace(rank=0) for m in second.baselines[name].measures]
    np.testing.assert_array_equal(e.curves, second.baselines[name].curves)
  np.testing.assert_array_equal(first.envelope.losses, second.envelope.losses)
  assert not np.array_equal(first.learned["mine"].curves, second.learned["mine"].curves)
  compare(names=("SGDM", "Lion"))
  assert len(list(tmp_path.iterdir())) == 3  # Lion's alone
  changes: list[dict] = [{"num_steps": 7}, {"seed": 2}, {"num_seeds": 3}, {"family": quadratic_family(noise=0.5)}]
  for number, changed in enumerate(changes, start=1):
    compare(names=(), **changed)
    assert len(list(tmp_path.iterdir())) == 3 + number
  assert compare().baselines["Adam"].measures[0].test_metrics == first.baselines["Adam"].measures[0].test_metrics


def test_fingerprints_tell_families_and_their_data_apart():
  def with_data(values):
    data = jnp.asarray(values)
    family = quadratic_family()
    return family._replace(batch=lambda key, task_params, split: {"z": data[0], "offset": data[1]})

  families = [quadratic_family(), quadratic_family(noise=0.1), with_data([0.0, 1.0]), with_data([0.0, 2.0])]
  families.append(quadratic_family()._replace(loss_cap=7.0))
  assert len({held_out._fingerprint(family) for family in families}) == 5
  assert held_out._fingerprint(quadratic_family()) == held_out._fingerprint(quadratic_family())
  assert held_out._fingerprint(with_data([0.0, 1.0])) == held_out._fingerprint(with_data([0.0, 1.0]))


def test_schedule_free_is_evaluated_at_its_average(family):
  tasks = held_out.sample_tasks(family, 3, held_out.HELD_OUT, 1)
  optimizer = baselines.schedule_free_adamw()
  runs = held_out.build_train(family, optimizer, num_steps=T)(
    baselines.theta_at(np.array([0.3])), tasks, jnp.arange(1)
  )
  curvature, x0 = task_and_start(family, 3, held_out.HELD_OUT, 0, 0)
  x = y = z = x0
  v = 0.0
  for t in range(1, T + 1):
    g = SCALE * curvature * y
    v = 0.999 * v + 0.001 * g**2
    z = z - 0.3 * g / (math.sqrt(v / (1 - 0.999**t)) + 1e-8)
    x = (1 - 1 / t) * x + z / t
    y = 0.1 * z + 0.9 * x
  np.testing.assert_allclose(runs.held_out_loss, [[[curvature * x**2 / 2 + 1]]], rtol=1e-4)
  assert abs(x**2 - y**2) * curvature / 2 > 1e-4


def test_seconds_per_step_tell_a_slow_step_from_a_fast_one(family):
  def slow_loss(params, key, batch, task_params):
    waste = jax.lax.fori_loop(0, 2000, lambda _, x: jnp.sin(x), jax.lax.stop_gradient(params["x"]))
    return family.loss(params, key, batch, task_params)[0] + 1e-9 * waste, {}

  def time(family):
    return held_out.seconds_per_step(family, sgd(), baselines.theta_at(0.1), num_steps=T, at_least=0.02, repeats=3)

  fast, slow = time(family), time(family._replace(loss=slow_loss))
  assert 0 < fast < 1e-3
  assert slow > 2 * fast


def test_metrics_of_the_periodic_evaluation_equal_the_closed_form_and_compile_once():
  traces = []
  family = quadratic_family(on_trace=lambda: traces.append(1))
  metrics = held_out.build_metrics(family, sgd(), num_tasks=3, num_seeds=2, num_steps=T, seed=4)
  assert not traces
  metrics(baselines.theta_at(0.5))
  traces_of_first_call = len(traces)
  assert traces_of_first_call > 0
  for rate in (0.1, 3.0):
    result = metrics(baselines.theta_at(rate))
    starts = [task_and_start(family, 4, held_out.PERIODIC, i, j) for i in range(3) for j in range(2)]
    curves = np.array([sgd_curve(*start, rate, T) for start in starts])
    validation = capped(curves[:, T] + 1)
    assert set(result) == {"mean_loss", "final_loss", "validation_loss", "diverged"}
    assert result["mean_loss"] == pytest.approx(capped(curves[:, :T]).mean(), rel=1e-3)
    assert result["final_loss"] == pytest.approx(capped(curves[:, T]).mean(), rel=1e-3, abs=1e-7)
    assert result["validation_loss"] == pytest.approx(validation.mean(), rel=1e-3)
    assert result["diverged"] == np.mean((curves >= CAP).any(axis=1) | (validation >= CAP))
    assert (result["diverged"] > 0) == (rate == 3.0)
  assert len(traces) == traces_of_first_call


def test_metrics_take_a_theta_that_lies_on_another_device():
  metrics = held_out.build_metrics(quadratic_family(), sgd(), num_tasks=2, num_seeds=1, num_steps=3, seed=4)
  theta = baselines.theta_at(0.1)
  assert metrics(jax.device_put(theta, jax.local_devices()[1])) == metrics(theta)


SIZES: dict[str, Any] = {"num_tasks": 1, "num_seeds": 1, "num_steps": 1, "seed": 0}


@pytest.mark.parametrize("name", ["num_tasks", "num_seeds", "num_steps", "num_tuning_seeds", "num_held_out_batches"])
def test_counts_below_one_are_refused(name):
  with pytest.raises(ValueError, match=f"{name}: must be at least 1, not 0"):
    held_out.compare(quadratic_family(), {}, **{**SIZES, name: 0})
  if name != "num_tuning_seeds":
    with pytest.raises(ValueError, match=f"{name}: must be at least 1, not 0"):
      held_out.build_metrics(quadratic_family(), sgd(), **{**SIZES, name: 0})


def test_name_of_a_baseline_and_theta_of_another_architecture_are_refused():
  with pytest.raises(ValueError, match="'Adam' is the name of a baseline"):
    held_out.compare(quadratic_family(), {"Adam": (sgd(), baselines.theta_at(0.1))}, **SIZES)
  other = LearnedOptimizer(lambda key: {"w": jnp.zeros(3)}, sgd().transform)
  with pytest.raises(ValueError, match=r"'mine'.*not of this architecture"):
    held_out.compare(quadratic_family(), {"mine": (other, {"w": jnp.zeros(2)})}, **SIZES)
  with pytest.raises(ValueError, match="baseline_names='Adamm'"):
    held_out.compare(quadratic_family(), {}, **SIZES, baseline_names=("Adamm",))


def test_one_seed_has_no_standard_error(family, trained):
  sizes: dict[str, Any] = {**SIZES, "num_tasks": 2, "num_steps": 3}
  one = held_out.compare(family, {}, **sizes, baseline_names=())
  summary = comparison.summarize([one], "Adam")
  m = one.baselines["Adam"].measures[0]
  assert math.isnan(m.mean_loss_error + m.final_loss_error + m.test_loss_error)
  assert math.isfinite(sum(summary.speed_up))
