"""Inner runs on quadratics, whose training curves are known in closed form."""

import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lopt.architectures import direction, mlp
from lopt.base import TaskFamily
from lopt.evaluation import baselines, inner_runs
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


SGD = baselines.from_learning_rate(optax.sgd, cosine=False)


def sgd():
  return inner_runs.baseline(SGD)


def train_all(build, rates, tasks, seeds, num_steps):
  """Every task with every seed at every rate: `Runs`, its arrays [tasks, seeds, rates, ...]."""
  num_tasks, num_seeds = len(tasks.keys), len(seeds)
  index = jnp.repeat(jnp.arange(num_tasks), num_seeds)
  each = jax.tree.map(lambda x: x[index], tasks)
  runs = build({}, np.tile(rates, (len(index), 1)), each, jnp.tile(jnp.asarray(seeds), num_tasks), num_steps)
  return jax.tree.map(lambda x: x.reshape(num_tasks, num_seeds, *x.shape[1:]), runs)


def sgd_curve(curvature, x0, learning_rate, num_steps):
  """Gradient descent: x_t = (1 - α SCALE a)^t x_0. Losses of num_steps + 1 points, normalised, before the cap."""
  t = np.arange(num_steps + 1)
  with np.errstate(over="ignore"):
    return curvature / 2 * (x0 * (1 - learning_rate * SCALE * curvature) ** t) ** 2


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
  tasks = inner_runs.sample_tasks(family, 3, inner_runs.HELD_OUT, 5)
  seeds = [0, 7, 11]
  build = inner_runs.build_train(family, num_points=T)(sgd())
  runs = train_all(build, np.maximum(rates, 1e-30), tasks, seeds, T)

  expected = np.zeros((5, 3, 4, T + 1))
  for i, j, k in np.ndindex(5, 3, 4):
    curvature, x0 = task_and_start(family, 3, inner_runs.HELD_OUT, i, seeds[j])
    expected[i, j, k] = sgd_curve(curvature, x0, rates[k], T)
  assert len({task_and_start(family, 3, inner_runs.HELD_OUT, i, 0)[0] for i in range(5)}) > 1
  np.testing.assert_allclose(runs.curve, capped(expected[..., :T]), rtol=1e-3, atol=1e-7)
  np.testing.assert_allclose(runs.mean_loss, capped(expected[..., :T]).mean(axis=-1), rtol=1e-3)
  np.testing.assert_allclose(runs.final_loss, capped(expected[..., T]), rtol=1e-3, atol=1e-7)
  np.testing.assert_allclose(runs.held_out_loss, capped(expected[..., T] + 1), rtol=1e-3)
  np.testing.assert_allclose(
    runs.held_out_metrics["distance"][..., 1], np.sqrt(2 * expected[..., 1, T] / curvatures(family)), rtol=1e-3
  )
  diverged = (expected >= CAP).any(axis=-1)
  assert 0 < diverged.mean() < 1
  np.testing.assert_array_equal(runs.diverged, diverged)


def curvatures(family):
  return np.array([[task_and_start(family, 3, inner_runs.HELD_OUT, i, 0)[0]] for i in range(5)])


@pytest.mark.slow_but_for("7-3")
@pytest.mark.parametrize(("num_steps", "num_points"), [(40, 8), (7, 3), (3, 5)])
def test_the_curve_has_means_over_equal_parts_of_the_run(num_steps, num_points):
  family = quadratic_family()
  tasks = inner_runs.sample_tasks(family, 3, inner_runs.HELD_OUT, 1)
  build = inner_runs.build_train(family, num_points=num_points)(sgd())
  curve = train_all(build, [0.1], tasks, [0], num_steps).curve[0, 0, 0]
  losses = sgd_curve(*task_and_start(family, 3, inner_runs.HELD_OUT, 0, 0), 0.1, num_steps)
  part = [[losses[t] for t in range(num_steps) if t * num_points // num_steps == i] for i in range(num_points)]
  np.testing.assert_allclose(curve, np.array([np.mean(x) if x else np.nan for x in part]), rtol=1e-4)


def test_other_lengths_rates_and_theta_are_the_same_program():
  traces = []
  family = quadratic_family(on_trace=lambda: traces.append(1))
  tasks = inner_runs.sample_tasks(family, 3, inner_runs.HELD_OUT, 2)
  train = inner_runs.build_train(family)
  build = train(sgd())
  train_all(build, [0.1, 0.2], tasks, [0, 1], 10)
  first = len(traces)
  long = train_all(build, [0.3, 0.1], tasks, [2, 3], 20)
  assert len(traces) == first
  np.testing.assert_allclose(
    long.final_loss[1, 0, 1],
    sgd_curve(*task_and_start(family, 3, inner_runs.HELD_OUT, 1, 2), 0.1, 20)[20],
    rtol=1e-4,
  )
  train_all(train(inner_runs.baseline(baselines.adam())), [0.3, 0.1], tasks, [2, 3], 20)
  assert len(traces) - first < first  # starts and final losses are not compiled again


def test_a_run_that_becomes_nan_is_capped_and_counted():
  family = quadratic_family()
  family = family._replace(  # NaN below x = 1
    loss=lambda params, key, batch, task_params: (jnp.log(params["x"]), {}),
    batch=lambda key, task_params, split: (),
    init=lambda key, task_params: {"x": jnp.float32(2.0)},
  )
  tasks = inner_runs.sample_tasks(family, 0, inner_runs.HELD_OUT, 1)
  runs = train_all(inner_runs.build_train(family, num_points=3)(sgd()), [0.1, 100.0], tasks, [0], 3)
  np.testing.assert_array_equal(runs.diverged, [[[False, True]]])
  np.testing.assert_allclose(runs.curve[0, 0, 1], [math.log(2.0) / SCALE, CAP, CAP], rtol=1e-6)
  assert runs.held_out_loss[0, 0, 1] == CAP


def test_one_training_loss_above_the_cap_makes_a_run_a_diverged_one_wherever_it_is():
  family = quadratic_family(noise=25.0)  # a loss is above the cap with probability 2%
  tasks = inner_runs.sample_tasks(family, 0, inner_runs.HELD_OUT, 2)
  build = inner_runs.build_train(family, num_points=10, num_held_out_batches=1)(sgd())
  runs = train_all(build, [1e-30], tasks, range(100), 10)
  training, last = (runs.curve == CAP).any(axis=-1), runs.curve[..., -1] == CAP
  after = runs.final_loss == CAP
  assert (training & ~last & ~after).any()
  assert (after & ~training).any()
  assert (~after & ~training & (runs.held_out_loss == CAP)).any()
  np.testing.assert_array_equal(runs.diverged, training | after)


def test_keys_are_those_documented_and_do_not_depend_on_the_optimizer():
  family = quadratic_family(noise=1.0)
  tasks = inner_runs.sample_tasks(family, 5, inner_runs.PERIODIC, 2)

  def losses(rated):
    build = inner_runs.build_train(family, num_points=4, num_held_out_batches=3)(rated)
    runs = train_all(build, [1e-30], tasks, [0, 1, 9], 4)
    return runs.curve[:, :, 0], runs.final_loss[:, :, 0], runs.held_out_loss[:, :, 0]

  expected, expected_final, expected_validation = np.zeros((2, 3, 4)), np.zeros((2, 3)), np.zeros((2, 3))
  for i in range(2):
    for j, seed in enumerate([0, 1, 9]):
      curvature, x0 = task_and_start(family, 5, inner_runs.PERIODIC, i, seed)
      _, _, steps_key, validation_key = documented_keys(5, inner_runs.PERIODIC, i, seed)
      batch_keys = [jax.random.split(jax.random.fold_in(steps_key, t))[0] for t in range(4)]
      expected[i, j] = [curvature * x0**2 / 2 + jax.random.normal(key) for key in batch_keys]
      for key, values, offset in (
        (jax.random.fold_in(validation_key, 0), expected_final, 0),
        (validation_key, expected_validation, 1),
      ):
        noise = np.mean([jax.random.normal(jax.random.split(k)[0]) for k in jax.random.split(key, 3)])
        values[i, j] = curvature * x0**2 / 2 + noise + offset
  assert len(np.unique(expected.round(5))) == expected.size
  for rated in (sgd(), inner_runs.baseline(baselines.adam())):
    for found, own in zip(losses(rated), (expected, expected_final, expected_validation), strict=True):
      np.testing.assert_allclose(found, own, rtol=1e-5, atol=1e-6)


def test_a_direction_at_a_learning_rate_follows_its_own_schedule():
  """At twice the recommended peak, every step is twice as long; at the recommended one, it is `transform`."""
  optimizer = direction.wrap(mlp.build(), learning_rate=0.01, warmup=0.3)
  theta, params = optimizer.init(jax.random.key(0)), {"x": jnp.ones(3)}

  def steps(tx):
    state, found = tx.init(params), []
    for t in range(5):
      updates, state = tx.update({"x": jnp.array([1.0, 2.0, t])}, state, params, value=jnp.float32(1))
      found.append(updates["x"])
    return np.array(found)

  once, twice = (steps(inner_runs.at_rate(optimizer)(theta, jnp.float32(x), jnp.int32(5))) for x in (0.01, 0.02))
  np.testing.assert_allclose(once, steps(optimizer.transform(theta, 5)), rtol=1e-5)
  np.testing.assert_allclose(twice, 2 * once, rtol=1e-5)
  with pytest.raises(ValueError, match="no direction"):
    inner_runs.at_rate(mlp.build())


def test_purposes_and_seeds_have_tasks_of_their_own():
  family = quadratic_family()._replace(sample=jax.random.uniform)
  samples = [
    np.asarray(inner_runs.sample_tasks(family, seed, purpose, 50).params)
    for seed in (0, 1)
    for purpose in (inner_runs.HELD_OUT, inner_runs.PERIODIC)
  ]
  assert len(np.unique(samples)) == 200
  # The first tasks are the same, however many there are.
  np.testing.assert_array_equal(inner_runs.sample_tasks(family, 0, inner_runs.HELD_OUT, 3).params, samples[0][:3])


@pytest.mark.slow_but_for("2-2")
@pytest.mark.parametrize(("num_devices", "block"), [(1, 1), (3, 1), (1, 64), (2, 2)])
def test_number_of_devices_and_size_of_blocks_do_not_change_the_numbers(monkeypatch, num_devices, block):
  family = quadratic_family(noise=0.1)
  tasks = inner_runs.sample_tasks(family, 0, inner_runs.HELD_OUT, 2)
  rates = np.array([0.01, 0.3])
  devices = jax.local_devices()
  assert len(devices) == 8
  monkeypatch.setattr(jax, "local_devices", lambda: devices[:num_devices])
  monkeypatch.setitem(parallel.RUNS_PER_BLOCK, "cpu", block)
  runs = train_all(inner_runs.build_train(family, num_points=5)(sgd()), rates, tasks, range(5), 5)
  for i, j, k in np.ndindex(2, 5, 2):
    x0_curve = sgd_curve(*task_and_start(family, 0, inner_runs.HELD_OUT, i, j), rates[k], 5)[:5]
    steps_key = documented_keys(0, inner_runs.HELD_OUT, i, j)[2]
    noise = [jax.random.normal(jax.random.split(jax.random.fold_in(steps_key, t))[0]) for t in range(5)]
    np.testing.assert_allclose(runs.curve[i, j, k], x0_curve + 0.1 * np.array(noise), rtol=1e-5, atol=1e-6)


def test_families_compared_together_have_tasks_of_their_own():
  family = quadratic_family()
  assert inner_runs.seeds_of_families(3, ["one"]) == {"one": 3}
  seeds = inner_runs.seeds_of_families(3, ["one", "other"])
  keys = [inner_runs.sample_tasks(family, seed, inner_runs.HELD_OUT, 4).keys for seed in seeds.values()]
  assert len(np.unique(jax.random.key_data(jnp.concatenate(keys)), axis=0)) == 8
  assert (
    seeds == inner_runs.seeds_of_families(3, ["other", "one"]) != inner_runs.seeds_of_families(4, ["one", "other"])
  )


def test_metrics_of_the_periodic_evaluation_equal_the_closed_form_and_compile_once():
  traces = []
  family = quadratic_family(on_trace=lambda: traces.append(1))
  metrics = inner_runs.build_metrics(family, SGD, num_tasks=3, num_seeds=2, num_steps=T, seed=4)
  assert not traces
  metrics(baselines.theta_at(0.5))
  traces_of_first_call = len(traces)
  assert traces_of_first_call > 0
  for rate in (0.1, 3.0):
    result = metrics(baselines.theta_at(rate))
    starts = [task_and_start(family, 4, inner_runs.PERIODIC, i, j) for i in range(3) for j in range(2)]
    curves = np.array([sgd_curve(*start, rate, T) for start in starts])
    validation = capped(curves[:, T] + 1)
    assert set(result) == {"mean_loss", "final_loss", "validation_loss", "diverged"}
    assert result["mean_loss"] == pytest.approx(capped(curves[:, :T]).mean(), rel=1e-3)
    assert result["final_loss"] == pytest.approx(capped(curves[:, T]).mean(), rel=1e-3, abs=1e-7)
    assert result["validation_loss"] == pytest.approx(validation.mean(), rel=1e-3)
    assert result["diverged"] == np.mean((curves >= CAP).any(axis=1))
    assert (result["diverged"] > 0) == (rate == 3.0)
  assert len(traces) == traces_of_first_call


def test_metrics_take_a_theta_that_lies_on_another_device():
  metrics = inner_runs.build_metrics(
    quadratic_family(),
    SGD,
    num_tasks=2,
    num_seeds=1,
    num_steps=3,
    seed=4,
  )
  theta = baselines.theta_at(0.1)
  assert metrics(jax.device_put(theta, jax.local_devices()[1])) == metrics(theta)


def test_schedule_free_is_evaluated_at_its_average():
  family = quadratic_family()
  tasks = inner_runs.sample_tasks(family, 3, inner_runs.HELD_OUT, 1)
  build = inner_runs.build_train(family)(inner_runs.baseline(baselines.schedule_free_adamw()))
  runs = train_all(build, [0.3], tasks, [0], T)
  curvature, x0 = task_and_start(family, 3, inner_runs.HELD_OUT, 0, 0)
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
