"""Comparisons of made-up runs, whose final losses are a known function of learning rate, length, task and seed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lopt.architectures import direction, mlp
from lopt.base import LearnedOptimizer, TaskFamily
from lopt.evaluation import baselines, comparison, held_out, identity, inner_runs
from lopt.evaluation.comparison import CONTROL, EACH, NONE, ONE, RECOMMENDED

STEPS = 20


def family(offset=0.0):
  def loss(params, key, batch, task_params):
    return task_params["curvature"] * jnp.sum((params["x"] + offset) ** 2), {}

  return TaskFamily(
    lambda key: {"curvature": jax.random.uniform(key)},
    lambda key, task_params: {"x": jnp.ones(2)},
    lambda key, task_params, split: {},
    loss,
  )


def plain(step=0.1):
  """An optimizer that takes no learning rate."""
  return LearnedOptimizer(lambda key: {"w": jnp.zeros(2)}, lambda theta, num_steps: optax.sgd(step))


def losses(best, level, power, rates, seeds, length):
  """A parabola in the logarithm of the learning rate around `best`, and a power of the run's length."""
  return level * (1 + np.log10(rates / best) ** 2 + 0.01 * np.sin(np.arange(seeds))[:, None]) * length**-power


@pytest.fixture
def trained(monkeypatch):
  """Nothing is compiled: final losses are those of SETTINGS. The calls: (who, number of steps, learning rates)."""
  asked = []

  def build_train(fam, **options):
    def build(rated):
      def train(theta, rates, tasks, seeds, num_steps):
        number = len(jnp.unique(seeds))
        state = str(rated(theta, jnp.float32(1), jnp.int32(1)).init({"mlp/~/linear_0": {"w": jnp.ones((2, 2))}}))
        who = next(name for mark, name in MARKS.items() if mark in state)
        if who == "θ" and not any(np.any(x) for x in jax.tree.leaves(theta)):
          who = CONTROL
        asked.append((who, num_steps, np.asarray(rates)))
        best, level, power = SETTINGS[who]
        num_tasks = len(seeds) // number
        rows = np.asarray(rates).reshape(num_tasks, number, -1)
        final = np.concatenate([losses(best, level, power, row[:1], number, num_steps / STEPS) for row in rows])
        return inner_runs.Runs(
          curve=np.repeat(final[..., None], 4, axis=-1).astype(np.float32),
          mean_loss=2 * final,
          final_loss=final,
          held_out_loss=3 * final,
          held_out_metrics={"accuracy": 1 - final},
          diverged=final > 1,
        )

      return train

    return build

  monkeypatch.setattr(inner_runs, "build_train", build_train)
  return asked


SETTINGS = {
  "plain": (1.0, 0.2, 0.0),
  "θ": (0.1, 0.05, 1.0),
  CONTROL: (0.03, 0.1, 1.0),
  "AdamW": (0.03, 0.2, 1.0),
  "Muon": (0.01, 0.1, 0.5),
  "SGDM": (1e-9, 0.5, 1.0),
}
MARKS = {
  "DirectionState": "θ",
  "MuonState": "Muon",
  "TraceState": "SGDM",
  "ScaleByAdamState": "AdamW",
  "EmptyState": "plain",
}
"""What tells optimizers from each other: their states."""


def compare(fam=None, cache_folder=None, names=("Muon", "SGDM"), theta=1.0, **changes):
  directed = direction.wrap(mlp.build(), learning_rate=0.02)
  own = jax.tree.map(lambda x: jnp.full_like(x, theta), directed.init(jax.random.key(0)))
  options: dict[str, Any] = {"num_tasks": 2, "num_seeds": 3, "num_steps": STEPS, "seed": 1, **changes}
  return held_out.compare(
    fam or family(),
    {"plain": (plain(), {"w": jnp.zeros(2)}), "mine": (directed, own)},
    baseline_names=names,
    cache_folder=cache_folder,
    **options,
  )


def test_the_recommended_rate_is_that_for_the_length_of_the_run(trained):
  c = compare(num_steps=200 * 2**3)
  assert c.recommended["plain"] is None
  assert [c.recommended[name] for name in ("mine", CONTROL)] == pytest.approx([0.02 / 2] * 2, rel=1e-6)
  assert any(rate == pytest.approx(0.02 / 2) for rate in c.sweeps["mine"][0].rates)


def test_roles_grids_and_the_best_rates(trained):
  c = compare()
  assert c.roles == {
    "plain": "learned",
    "mine": "learned",
    CONTROL: "control",
    "AdamW": "baseline",
    "Muon": "baseline",
    "SGDM": "baseline",
  }
  grid = [baselines.half_decade(index) for index in baselines.GRID]
  assert c.sweeps["AdamW"][0].rates == pytest.approx(grid)
  assert c.sweeps["plain"][1].rates == (1.0,)
  assert c.sweeps["mine"][0].rates == pytest.approx(sorted([*grid, 0.02]))  # and the recommended one
  for name, (best, *_) in SETTINGS.items():
    sweep = c.sweeps[{"θ": "mine"}.get(name, name)][1]
    if name != "SGDM":
      assert sweep.rates[sweep.best] == pytest.approx(best)
  # SGDM's grid begins at 1e-3, and goes on for three times three half-decades: not beyond its best.
  assert c.sweeps["SGDM"][0].rates == pytest.approx([10 * baselines.half_decade(k) for k in range(-17, 1)])
  rows = comparison.measure({"a": c})["a"]
  assert {tuning for name, tuning in rows if name == "mine"} == {EACH, ONE, RECOMMENDED}
  assert {tuning for name, tuning in rows if name == "plain"} == {NONE}
  assert {tuning for name, tuning in rows if name == "Muon"} == {EACH, ONE}


def test_one_compiled_shape(trained):
  """Whatever is asked for, the arrays have the same shape: rates, runs."""
  compare()
  assert {rates.shape for who, _, rates in trained if who != "plain"} == {(3, held_out.RATES_AT_ONCE)}


def test_rivals_are_trained_at_other_lengths_until_all_losses_are_reached(trained):
  """The direction ends at 0.05. θ = 0 has 0.1 / length and AdamW 0.2 / length; Muon, the best, 0.1 / √length."""
  c = compare()
  lengths = {name: sorted(c.ladders[name][0]) for name in c.ladders}
  assert lengths == {CONTROL: [0.5, 1, 2], "AdamW": [0.5, 1, 2, 4], "Muon": [0.5, 1, 2, 4], "SGDM": []}
  for length, found in c.ladders["AdamW"][1].items():
    expected = 0.2 * (1 + 0.01 * np.sin(np.arange(3))) / length
    np.testing.assert_allclose(found, expected, rtol=1e-3)
  speed_ups = comparison.measure({"a": c})["a"]["mine", EACH][0].speed_up
  assert {name: x.value for name, x in speed_ups.items()} == pytest.approx(
    {"AdamW": 4, comparison.BEST: 4, CONTROL: 2}, rel=1e-2
  )
  short = compare(lengths=(1.0, 2.0))
  speed_up = comparison.measure({"a": short})["a"]["mine", EACH][0].speed_up["AdamW"]
  assert speed_up == (2.0, "≥")


def test_longer_runs_have_rates_around_the_best_of_shorter_ones(trained):
  compare()
  asked = {steps: rates[0] for who, steps, rates in trained if who == "AdamW" and steps != STEPS}
  for steps in (10, 40, 80):
    np.testing.assert_allclose(asked[steps], [0.03 / 10**0.5, 0.03, 0.03 * 10**0.5], rtol=1e-5)


@pytest.mark.slow
def test_a_second_comparison_trains_nothing_again(trained, tmp_path):
  first = compare(cache_folder=tmp_path)
  assert len(trained) > 10
  trained.clear()
  again = compare(cache_folder=tmp_path)
  assert trained == []
  jax.tree.map(np.testing.assert_array_equal, first.sweeps, again.sweeps)
  jax.tree.map(np.testing.assert_array_equal, first.ladders, again.ladders)
  compare(cache_folder=tmp_path, theta=2.0)
  assert {who for who, *_ in trained} == {"θ"}
  changes: list[dict[str, Any]] = [{"num_steps": 10}, {"seed": 2}, {"num_seeds": 2}, {"fam": family(0.1)}]
  for changed in changes:
    trained.clear()
    compare(cache_folder=tmp_path, **changed)
    assert {who for who, *_ in trained} >= {"plain", "θ", CONTROL, "AdamW", "Muon", "SGDM"}


def test_fingerprints_tell_families_and_their_data_apart():
  def with_data(values):
    data = jnp.asarray(values)
    return family()._replace(batch=lambda key, task_params, split: {"z": data})

  families = [family(), family(0.1), with_data([0.0, 1.0]), with_data([0.0, 2.0]), family()._replace(loss_cap=7.0)]
  assert len({identity.of_family(x) for x in families}) == 5
  assert identity.of_family(family()) == identity.of_family(family())
  assert identity.of_family(with_data([0.0, 1.0])) == identity.of_family(with_data([0.0, 1.0]))


def test_tuning_extends_the_grid_of_the_tasks_whose_best_is_at_its_end():
  asked = []
  best = np.array([0.03, 10.0, 1e-9])

  def train(tasks, rates):
    asked.append(tasks)
    sweeps = []
    for task, row in zip(tasks, rates, strict=True):
      final = np.log(row / (2 * best[task]))[None] ** 2
      zero = np.zeros_like(final)
      runs = inner_runs.Runs(zero[..., None], zero, final, zero, {}, zero > 0)
      sweeps.append(comparison.Sweep(tuple(row.tolist()), runs))
    return sweeps

  inside, above, below = held_out.tune(train, 3, unit=2.0)
  assert asked == [(0, 1, 2)] * 3 + [(1, 2), (2,), (2,)]
  assert inside.rates == pytest.approx([2 * baselines.half_decade(k) for k in baselines.GRID])
  assert above.rates == pytest.approx([*inside.rates, 6.0, 20.0, 60.0])
  assert above.rates[above.best] == 20.0
  assert len(below.rates) == 9 + 3 * held_out.MAX_EXTENSIONS
  assert below.best == 0


SIZES: dict[str, Any] = {"num_tasks": 1, "num_seeds": 1, "num_steps": 1, "seed": 0}


@pytest.mark.parametrize("name", ["num_tasks", "num_seeds", "num_steps", "num_held_out_batches"])
def test_counts_below_one_are_refused(name):
  with pytest.raises(ValueError, match=f"{name}: must be at least 1, not 0"):
    held_out.compare(family(), {}, **{**SIZES, name: 0})
  with pytest.raises(ValueError, match=f"{name}: must be at least 1, not 0"):
    inner_runs.build_metrics(family(), plain(), **{**SIZES, name: 0})


def test_bad_names_lengths_and_theta_are_refused():
  for name in ("AdamW", CONTROL):
    with pytest.raises(ValueError, match=f"'{name}' is the name of a baseline"):
      held_out.compare(family(), {name: (plain(), {"w": jnp.zeros(2)})}, **SIZES)
  with pytest.raises(ValueError, match=r"'mine'.*not of this architecture"):
    held_out.compare(family(), {"mine": (plain(), {"w": jnp.zeros(3)})}, **SIZES)
  with pytest.raises(ValueError, match="baseline_names='Adamm'"):
    held_out.compare(family(), {}, **SIZES, baseline_names=("Adamm",))
  for lengths in ((0.5, 2.0), (1.0, 0.5), (0.0, 1.0)):
    with pytest.raises(ValueError, match="lengths"):
      held_out.compare(family(), {}, **SIZES, lengths=lengths)
