"""The evaluation on quadratics, whose training curves are known in closed form."""

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lopt import baselines, evaluation
from lopt.base import LearnedOptimizer, TaskFamily
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
    return value + SCALE * (noise * batch["z"] + batch["offset"]), {}

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
  tasks = evaluation.sample_tasks(family, 3, evaluation.HELD_OUT, 5)
  seeds = [0, 7, 11]
  with np.errstate(divide="ignore"):
    thetas = {"log_learning_rate": np.log(np.array(rates, np.float32))}
  runs = evaluation.build_train(family, sgd(), num_steps=T)(thetas, tasks, jnp.array(seeds))

  expected = np.zeros((5, 3, 4, T + 1))
  for i, j, k in np.ndindex(5, 3, 4):
    curvature, x0 = task_and_start(family, 3, evaluation.HELD_OUT, i, seeds[j])
    expected[i, j, k] = sgd_curve(curvature, x0, rates[k], T)
  assert len({task_and_start(family, 3, evaluation.HELD_OUT, i, 0)[0] for i in range(5)}) > 1
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
  tasks = evaluation.sample_tasks(family, 0, evaluation.HELD_OUT, 1)
  train = evaluation.build_train(family, sgd(), num_steps=3)
  runs = train(baselines.theta_at(np.array([0.1, 100.0])), tasks, jnp.arange(1))
  np.testing.assert_array_equal(runs.diverged, [[[False, True]]])
  np.testing.assert_allclose(runs.losses[0, 0, 1], [math.log(2.0) / SCALE, CAP, CAP], rtol=1e-6)
  assert runs.held_out_loss[0, 0, 1] == CAP


def test_one_loss_above_the_cap_makes_a_run_a_diverged_one_wherever_it_is():
  family = quadratic_family(noise=25.0)  # a loss is above the cap with probability 2%
  tasks = evaluation.sample_tasks(family, 0, evaluation.HELD_OUT, 2)
  train = evaluation.build_train(family, sgd(), num_steps=10, num_held_out_batches=1)
  runs = train({"log_learning_rate": jnp.full((1,), -jnp.inf)}, tasks, jnp.arange(100))
  training, last = (np.asarray(runs.losses) == CAP).any(axis=-1), np.asarray(runs.losses)[..., -1] == CAP
  validation = np.asarray(runs.held_out_loss) == CAP
  assert (training & ~last & ~validation).any()
  assert (validation & ~training).any()
  assert (~validation & ~training).any()
  np.testing.assert_array_equal(runs.diverged, training | validation)


def test_keys_are_those_documented_and_do_not_depend_on_the_optimizer():
  family = quadratic_family(noise=1.0)
  tasks = evaluation.sample_tasks(family, 5, evaluation.PERIODIC, 2)

  def losses(optimizer):
    frozen = {"log_learning_rate": jnp.full((1,), -jnp.inf)}
    runs = evaluation.build_train(family, optimizer, num_steps=4, num_held_out_batches=3)(
      frozen, tasks, jnp.array([0, 1, evaluation.FIRST_TUNING_SEED])
    )
    return np.asarray(runs.losses)[:, :, 0], np.asarray(runs.held_out_loss)[:, :, 0]

  expected, expected_validation = np.zeros((2, 3, 4)), np.zeros((2, 3))
  for i in range(2):
    for j, seed in enumerate([0, 1, evaluation.FIRST_TUNING_SEED]):
      curvature, x0 = task_and_start(family, 5, evaluation.PERIODIC, i, seed)
      _, _, steps_key, validation_key = documented_keys(5, evaluation.PERIODIC, i, seed)
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
    np.asarray(evaluation.sample_tasks(family, seed, purpose, 50).params)
    for seed in (0, 1)
    for purpose in (evaluation.HELD_OUT, evaluation.PERIODIC)
  ]
  assert len(np.unique(samples)) == 200
  # The first tasks are the same, however many there are.
  np.testing.assert_array_equal(evaluation.sample_tasks(family, 0, evaluation.HELD_OUT, 3).params, samples[0][:3])


def test_theta_per_task_pairs_tasks_with_their_own():
  family = quadratic_family()
  tasks = evaluation.sample_tasks(family, 3, evaluation.HELD_OUT, 3)
  rates = np.array([[0.1], [0.01], [0.3]])
  train = evaluation.build_train(family, sgd(), num_steps=T, theta_per_task=True)
  runs = train(baselines.theta_at(rates), tasks, jnp.arange(2))
  for i, j in np.ndindex(3, 2):
    expected = sgd_curve(*task_and_start(family, 3, evaluation.HELD_OUT, i, j), rates[i, 0], T)[:T]
    np.testing.assert_allclose(runs.losses[i, j, 0], expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(("num_devices", "block"), [(1, 1), (3, 1), (1, 64), (2, 2)])
def test_number_of_devices_and_size_of_blocks_do_not_change_the_numbers(monkeypatch, num_devices, block):
  family = quadratic_family(noise=0.1)
  tasks = evaluation.sample_tasks(family, 0, evaluation.HELD_OUT, 2)
  rates = np.array([0.01, 0.3])
  devices = jax.local_devices()
  assert len(devices) == 8
  monkeypatch.setattr(jax, "local_devices", lambda: devices[:num_devices])
  monkeypatch.setitem(parallel.RUNS_PER_BLOCK, "cpu", block)
  runs = evaluation.build_train(family, sgd(), num_steps=5)(baselines.theta_at(rates), tasks, jnp.arange(5))
  assert runs.losses.sharding.num_devices == num_devices
  for i, j, k in np.ndindex(2, 5, 2):
    x0_curve = sgd_curve(*task_and_start(family, 0, evaluation.HELD_OUT, i, j), rates[k], 5)[:5]
    steps_key = documented_keys(0, evaluation.HELD_OUT, i, j)[2]
    noise = [jax.random.normal(jax.random.split(jax.random.fold_in(steps_key, t))[0]) for t in range(5)]
    np.testing.assert_allclose(runs.losses[i, j, k], x0_curve + 0.1 * np.array(noise), rtol=1e-5, atol=1e-6)


def parabola(best):
  """Mean losses with the minimum at learning rate `best`, a task each, and a record of what was asked for."""
  asked = []

  def mean_losses(rates):
    asked.append(rates)
    return (np.log(rates) - np.log(np.array(best))[:, None]) ** 2

  return mean_losses, asked


def test_tuning_finds_each_tasks_best_learning_rate():
  mean_losses, asked = parabola([2e-6, 1e-3, 0.028, 1.2])
  tuning = evaluation.tune(mean_losses, 4)
  assert [t.best for t in tuning] == [3e-6, 1e-3, 0.03, 1.0]
  assert all(t.interior and t.learning_rates == baselines.LEARNING_RATES for t in tuning)
  assert len(asked) == 1
  for i, t in enumerate(tuning):
    np.testing.assert_array_equal(t.mean_losses, mean_losses(np.array([t.learning_rates] * 4))[i])


def test_tuning_extends_the_grid_of_the_tasks_whose_best_is_at_its_end():
  mean_losses, asked = parabola([3.0, 1e-3, 27.0, 1e-7])
  tuning = evaluation.tune(mean_losses, 4)
  assert [t.best for t in tuning] == [3.0, 1e-3, 30.0, 1e-7]
  assert all(t.interior for t in tuning)
  grid = baselines.LEARNING_RATES
  assert tuning[0].learning_rates == (*grid, 10.0)
  assert tuning[1].learning_rates == grid
  assert tuning[2].learning_rates == (*grid, 10.0, 30.0, 100.0)
  assert tuning[3].learning_rates == (3e-8, 1e-7, 3e-7, *grid)
  assert len(asked) == 4


def test_tuning_says_so_when_the_best_stays_at_the_end():
  mean_losses, asked = parabola([1e6, 1e-12])
  high, low = evaluation.tune(mean_losses, 2)
  assert not high.interior
  assert not low.interior
  assert high.best == 300.0
  assert low.best == 1e-8
  assert len(high.learning_rates) == len(low.learning_rates) == 14 + evaluation.MAX_EXTENSIONS
  assert len(asked) == 1 + evaluation.MAX_EXTENSIONS


def test_smooth_and_steps_to_reach_on_hand_made_curves():
  curve = np.arange(40.0, 0.0, -1.0)  # 40, 39, …, 1; a window of 2
  assert evaluation.window(40) == 2
  np.testing.assert_array_equal(evaluation.smooth(curve)[[0, 1, -1]], [39.5, 38.5, 1.5])
  assert evaluation.smooth(curve).shape == (39,)
  assert evaluation.steps_to_reach(curve, 100.0) == 2  # never before the first window is full
  assert evaluation.steps_to_reach(curve, 39.5) == 2
  assert evaluation.steps_to_reach(curve, 39.4) == 3
  assert evaluation.steps_to_reach(curve, 30.5) == 11  # 31 and 30 are the losses of steps 10 and 11
  assert evaluation.steps_to_reach(curve, 1.5) == 40
  assert evaluation.steps_to_reach(curve, 1.4) is None
  one_dip = np.ones(40)
  one_dip[7] = 0.0
  assert evaluation.steps_to_reach(one_dip, 0.5) == 8
  assert evaluation.steps_to_reach(one_dip, 0.4) is None
  assert evaluation.window(3) == 1
  assert evaluation.steps_to_reach(np.array([3.0, 2.0, np.inf]), 2.0) == 2


@pytest.fixture(scope="module")
def family():
  return quadratic_family()


@pytest.fixture(scope="module")
def comparison(family):
  """Two θ of one architecture, and the baselines."""
  fast, slow = (baselines.theta_at(rate) for rate in (0.2, 1e-4))
  optimizer = sgd()
  messages = []
  result = evaluation.compare(
    family,
    {"fast": (optimizer, fast), "slow": (optimizer, slow)},
    num_tasks=4,
    num_seeds=3,
    num_steps=T,
    seed=1,
    num_tuning_seeds=2,
    progress=messages.append,
  )
  assert len(messages) == 6
  return result


@pytest.mark.parametrize(("name", "reference"), [("Adam", adam_curve), ("SGDM", sgdm_curve)])
def test_compare_tunes_as_brute_force_does_on_seeds_that_are_not_reported(family, comparison, name, reference):
  for i, m in enumerate(comparison.baselines[name].measures):
    tuning_runs = [task_and_start(family, 1, evaluation.HELD_OUT, i, 2**30 + j) for j in range(2)]
    reported_runs = [task_and_start(family, 1, evaluation.HELD_OUT, i, j) for j in range(3)]
    assert not set(tuning_runs) & set(reported_runs)
    rates = m.tuning.learning_rates
    expected = [np.mean([capped(reference(*run, rate, T)) for run in tuning_runs]) for rate in rates]
    np.testing.assert_allclose(m.tuning.mean_losses, expected, rtol=2e-3)
    assert m.tuning.best == rates[np.argmin(expected)]
    assert m.tuning.interior == (0 < np.argmin(expected) < len(rates) - 1)
    curves = [capped(reference(*run, m.tuning.best, T)) for run in reported_runs]
    np.testing.assert_allclose(comparison.baselines[name].curves[i], curves, rtol=1e-2, atol=1e-5)


def test_compare_trains_all_optimizers_from_the_same_starts(family, comparison):
  starts = [e.curves[:, :, 0] for e in (comparison.learned | comparison.baselines).values()]
  for start in starts[1:]:
    np.testing.assert_allclose(start, starts[0], rtol=1e-6)
  for name, rate in (("fast", 0.2), ("slow", 1e-4)):
    for i, j in np.ndindex(4, 3):
      expected = sgd_curve(*task_and_start(family, 1, evaluation.HELD_OUT, i, j), rate, T)[:T]
      np.testing.assert_allclose(comparison.learned[name].curves[i, j], expected, rtol=1e-3, atol=1e-7)


def test_measures_equal_naive_sums_over_the_curves(family, comparison):
  for name, e in (comparison.learned | comparison.baselines).items():
    for i, m in enumerate(e.measures):
      runs = e.curves[i]
      means = [sum(run) / T for run in runs]
      finals = [(run[-1] + run[-2]) / 2 for run in runs]  # 5% of 40 steps
      assert m.mean_loss == pytest.approx(np.mean(means))
      assert m.mean_loss_error == pytest.approx(np.std(means, ddof=1) / math.sqrt(3))
      assert m.final_loss == pytest.approx(np.mean(finals))
      assert m.final_loss_error == pytest.approx(np.std(finals, ddof=1) / math.sqrt(3))
      target = comparison.baselines["Adam"].measures[i].final_loss
      curve, adam = runs.mean(axis=0), comparison.baselines["Adam"].curves[i].mean(axis=0)
      reached, reached_by_adam = (
        [t for t in range(2, T + 1) if (c[t - 2] + c[t - 1]) / 2 <= target] for c in (curve, adam)
      )
      assert m.steps_to_target == (reached[0] if reached else None)
      assert m.speed_up == (reached_by_adam[0] / reached[0] if reached else None)
      assert m.diverged == 0
      if name in comparison.learned:
        assert m.tuning is None
        starts = [task_and_start(family, 1, evaluation.HELD_OUT, i, j) for j in range(3)]
        rate = {"fast": 0.2, "slow": 1e-4}[name]
        test = [sgd_curve(*start, rate, T)[T] + 2 for start in starts]
        assert m.test_loss == pytest.approx(np.mean(test), rel=1e-3)
        assert m.test_loss_error == pytest.approx(np.std(test, ddof=1) / math.sqrt(3), rel=1e-2, abs=1e-6)
  assert all(m.speed_up == 1 for m in comparison.baselines["Adam"].measures)
  assert all(m.steps_to_target is None for m in comparison.learned["slow"].measures)


def test_tasks_are_described_by_their_small_parameters(family, comparison):
  curvatures = [task_and_start(family, 1, evaluation.HELD_OUT, i, 0)[0] for i in range(4)]
  assert comparison.tasks == tuple(f"curvature {curvature:.3g}" for curvature in curvatures)


def test_summary_over_tasks(comparison):
  for name, e in (comparison.learned | comparison.baselines).items():
    summary = evaluation.summarize(comparison, name)
    assert summary.mean_loss == pytest.approx(e.curves.mean())
    # Seeds are independent from task to task.
    task_errors = e.curves.mean(axis=2).std(axis=1, ddof=1) / math.sqrt(3)
    assert summary.mean_loss_error == pytest.approx(math.sqrt((task_errors**2).sum()) / 4)
    for other, o in comparison.baselines.items():
      if other != name:
        wins = e.curves.mean(axis=(1, 2)) < o.curves.mean(axis=(1, 2))
        assert summary.tasks_won[other] == wins.sum()
  slow, adam = (evaluation.summarize(comparison, name) for name in ("slow", "Adam"))
  assert (slow.tasks_reached, slow.median_speed_up, slow.tasks_interior) == (0, None, None)
  assert slow.tasks_won == {"Adam": 0, "SGDM": 0}
  interior = [m.tuning.interior for m in comparison.baselines["Adam"].measures]
  assert (adam.tasks_reached, adam.tasks_interior) == (4, sum(interior))


@pytest.mark.parametrize(
  ("speed_ups", "expected"),
  [([4.0, 2.0, 1.0], 2.0), ([4.0, 2.0, None], 2.0), ([4.0, None, None], None), ([4.0, 2.0, 1.0, None], 1 / 0.75)],
)
def test_median_speed_up_counts_a_never_as_the_slowest(comparison, speed_ups, expected):
  template = comparison.learned["fast"].measures[0]
  measures = tuple(template._replace(speed_up=s) for s in speed_ups)
  fast = comparison.learned["fast"]._replace(measures=measures)
  summary = evaluation.summarize(comparison._replace(learned={"fast": fast}, baselines={}), "fast")
  assert summary.median_speed_up == expected


def test_metrics_of_the_periodic_evaluation_equal_the_closed_form_and_compile_once():
  traces = []
  family = quadratic_family(on_trace=lambda: traces.append(1))
  metrics = evaluation.build_metrics(family, sgd(), num_tasks=3, num_seeds=2, num_steps=T, seed=4)
  assert not traces
  metrics(baselines.theta_at(0.5))
  traces_of_first_call = len(traces)
  assert traces_of_first_call > 0
  for rate in (0.1, 3.0):
    result = metrics(baselines.theta_at(rate))
    starts = [task_and_start(family, 4, evaluation.PERIODIC, i, j) for i in range(3) for j in range(2)]
    curves = np.array([sgd_curve(*start, rate, T) for start in starts])
    validation = capped(curves[:, T] + 1)
    assert set(result) == {"mean_loss", "final_loss", "validation_loss", "diverged"}
    assert result["mean_loss"] == pytest.approx(capped(curves[:, :T]).mean(), rel=1e-3)
    assert result["final_loss"] == pytest.approx(capped(curves[:, T - 2 : T]).mean(), rel=1e-3, abs=1e-7)
    assert result["validation_loss"] == pytest.approx(validation.mean(), rel=1e-3)
    assert result["diverged"] == np.mean((curves >= CAP).any(axis=1) | (validation >= CAP))
    assert (result["diverged"] > 0) == (rate == 3.0)
  assert len(traces) == traces_of_first_call


def test_metrics_take_a_theta_that_lies_on_another_device():
  metrics = evaluation.build_metrics(quadratic_family(), sgd(), num_tasks=2, num_seeds=1, num_steps=3, seed=4)
  theta = baselines.theta_at(0.1)
  assert metrics(jax.device_put(theta, jax.local_devices()[1])) == metrics(theta)


SIZES: dict[str, Any] = {"num_tasks": 1, "num_seeds": 1, "num_steps": 1, "seed": 0}


@pytest.mark.parametrize("name", ["num_tasks", "num_seeds", "num_steps", "num_tuning_seeds", "num_held_out_batches"])
def test_counts_below_one_are_refused(name):
  with pytest.raises(ValueError, match=f"{name}: must be at least 1, not 0"):
    evaluation.compare(quadratic_family(), {}, **{**SIZES, name: 0})
  if name != "num_tuning_seeds":
    with pytest.raises(ValueError, match=f"{name}: must be at least 1, not 0"):
      evaluation.build_metrics(quadratic_family(), sgd(), **{**SIZES, name: 0})


def test_name_of_a_baseline_and_theta_of_another_architecture_are_refused():
  with pytest.raises(ValueError, match="'Adam' is the name of a baseline"):
    evaluation.compare(quadratic_family(), {"Adam": (sgd(), baselines.theta_at(0.1))}, **SIZES)
  other = LearnedOptimizer(lambda key: {"w": jnp.zeros(3)}, sgd().transform)
  with pytest.raises(ValueError, match=r"'mine'.*not of this architecture"):
    evaluation.compare(quadratic_family(), {"mine": (other, {"w": jnp.zeros(2)})}, **SIZES)


def test_one_seed_has_no_standard_error():
  single = [x[:, :1] for x in (np.ones((1, 2, 1, T)), np.ones((1, 2, 1)), np.zeros((1, 2, 1)))]
  (measures,) = evaluation._evaluation(evaluation.Runs(*map(jnp.asarray, single)), [None], [0.0], [T]).measures
  assert (measures.mean_loss, measures.final_loss, measures.test_loss) == (1.0, 1.0, 1.0)
  assert math.isnan(measures.mean_loss_error + measures.final_loss_error + measures.test_loss_error)
