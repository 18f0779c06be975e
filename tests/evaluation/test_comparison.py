"""Measures of comparisons made by hand."""

import numpy as np
import pytest

from lopt.evaluation import comparison, inner_runs, measures
from lopt.evaluation.comparison import BEST, CONTROL, EACH, NONE, ONE, RECOMMENDED, Comparison, Sweep

RATES = (0.01, 0.03, 0.1)


def sweep(final, rates=RATES):
  """Of one task: final losses [seeds, rates]."""
  final = np.asarray(final, float)
  return Sweep(
    rates,
    inner_runs.Runs(
      curve=np.stack([final + 1, final], axis=-1),
      mean_loss=final + 0.5,
      final_loss=final,
      held_out_loss=2 * final,
      held_out_metrics={"accuracy": 1 - final},
      diverged=final > 0.9,
    ),
  )


def ladder(level):
  """1 / length."""
  return {x: np.array([0.5, 1.5]) * level / x for x in (0.5, 1.0, 2.0, 4.0)}


@pytest.fixture
def compared():
  """Two tasks, two seeds: a direction, one that takes no learning rate, θ = 0 and two baselines."""
  return Comparison(
    tasks=("one", "two"),
    num_steps=10,
    num_seeds=2,
    seed=0,
    roles={"mine": "learned", "old": "learned", CONTROL: "control", "AdamW": "baseline", "Muon": "baseline"},
    sweeps={
      "mine": (sweep([[0.1, 0.2, 0.4], [0.3, 0.1, 0.2]]), sweep([[0.8, 0.4, 0.2], [0.8, 0.4, 0.2]])),
      "old": (sweep([[0.5], [0.7]], (1.0,)), sweep([[0.3], [0.95]], (1.0,))),
      CONTROL: (sweep([[0.9, 0.2, 0.9]] * 2), sweep([[0.9, 0.2, 0.9]] * 2)),
      "AdamW": (sweep([[0.9, 0.4, 0.8]] * 2), sweep([[0.5, 0.4, 0.9]] * 2)),
      "Muon": (sweep([[0.2, 0.3, 0.4]] * 2), sweep([[0.9, 0.9, 0.8]] * 2)),
    },
    recommended={"mine": 0.03, "old": None, CONTROL: 0.03},
    ladders={CONTROL: (ladder(0.2), ladder(0.2)), "AdamW": (ladder(0.4), ladder(0.4)), "Muon": (ladder(0.2), {})},
    seconds_per_step={},
  )


def test_tunings(compared):
  rows = comparison.measure({"a": compared})["a"]
  # Seed 0 at the best rate of seed 1, 0.03; seed 1 at that of seed 0, 0.01.
  assert rows["mine", EACH][0].final_loss == pytest.approx((0.2 + 0.3) / 2)
  assert rows["mine", EACH][0].rate == 0.03  # of the lowest mean, 0.15
  assert rows["mine", EACH][0].interior
  assert rows["mine", EACH][1].final_loss == pytest.approx(0.2)
  assert not rows["mine", EACH][1].interior
  # The rate for one task is the one that is best for the other.
  assert [m.rate for m in rows["mine", ONE]] == [0.1, 0.03]
  assert [m.final_loss for m in rows["mine", ONE]] == pytest.approx([0.3, 0.4])
  assert [m.loss_of_tuning for m in rows["mine", ONE]] == pytest.approx([0.3 / 0.25, 2.0])
  assert [m.final_loss for m in rows["mine", RECOMMENDED]] == pytest.approx([0.15, 0.4])
  assert [m.final_loss for m in rows["old", NONE]] == pytest.approx([0.6, 0.625])
  assert {tuning for name, tuning in rows if name == "AdamW"} == {EACH, ONE}


def test_one_rate_of_several_comparisons_is_chosen_on_the_others(compared):
  def with_mine(*tasks):
    return compared._replace(sweeps={**compared.sweeps, "mine": tuple(sweep([own] * 2) for own in tasks)})

  a, b = with_mine([0.1, 0.2, 0.4], [0.1, 0.9, 0.9]), with_mine([0.02, 0.01, 0.03], [0.9, 0.4, 0.2])
  rows = comparison.measure({"a": a, "b": b})
  assert {m.rate for m in rows["a"]["mine", ONE]} == {0.03}  # log 1 + log 2 is less than log 3 and log 2 + log 4.5
  assert {m.rate for m in rows["b"]["mine", ONE]} == {0.01}


def test_measures(compared):
  m = comparison.measure({"a": compared})["a"]["old", NONE][1]
  assert m.final_loss == pytest.approx(0.625)
  assert m.final_loss_error == pytest.approx(0.325)
  assert m.mean_loss == pytest.approx(1.125)
  assert m.test_loss == pytest.approx(1.25)
  assert m.test_metrics == {"accuracy": pytest.approx(0.375)}
  assert m.diverged == 0.5
  assert m.relative_loss == pytest.approx(0.625 / 0.4)
  np.testing.assert_allclose(m.curve, [[1.3, 0.3], [1.95, 0.95]])


def test_speed_ups_are_over_each_tasks_best_baseline(compared):
  assert [compared.best_baseline(i) for i in range(2)] == ["Muon", "AdamW"]
  rows = comparison.measure({"a": compared})["a"]
  first, second = rows["mine", RECOMMENDED]  # 0.15 and 0.4, of rivals that end with 0.4, 0.2 and 0.2 at length 1
  assert {name: x.value for name, x in first.speed_up.items()} == pytest.approx(
    {"AdamW": 0.4 / 0.15, BEST: 0.2 / 0.15, CONTROL: 0.2 / 0.15}
  )
  assert {name: x.value for name, x in second.speed_up.items()} == pytest.approx({"AdamW": 1, BEST: 1, CONTROL: 0.5})
  assert rows["Muon", EACH][0].speed_up[BEST].value == pytest.approx(1)


def test_summary(compared):
  rows = comparison.measure({"a": compared})["a"]
  s = comparison.summarize([rows["mine", RECOMMENDED]])
  values = np.array([0.2 / 0.15, 1.0])
  assert s.speed_up[BEST] == pytest.approx(measures.summarize([values]))
  assert s.speed_up[BEST].value == pytest.approx(values.mean())  # of two, no quarter is cut off
  assert s.slower == {"AdamW": 0.0, BEST: 0.0, CONTROL: 0.5}
  assert (s.num_tasks, s.interior) == (2, 2)
  assert s.final_loss == pytest.approx(0.275)
  assert s.test_accuracy == pytest.approx(0.725)
  assert s.at_least == s.at_most == {"AdamW": 0, BEST: 0, CONTROL: 0}
  bad = comparison.summarize([rows["old", NONE]])  # 0.6 and 0.625
  assert bad.at_most == {"AdamW": 0, BEST: 1, CONTROL: 2}
  assert bad.diverged == 0.25


def test_the_interval_of_several_comparisons_draws_the_tasks_of_each(compared):
  rows = comparison.measure({"a": compared})["a"]
  families = [rows["mine", EACH], rows["AdamW", EACH]]
  values = [np.array([m.speed_up[BEST].value for m in family]) for family in families]
  assert comparison.summarize(families).speed_up[BEST] == measures.summarize(values)
  assert measures.summarize(values) != measures.summarize([np.concatenate(values)])


def test_one_seed_has_no_standard_error_and_chooses_for_itself(compared):
  one = compared._replace(
    num_seeds=1,
    sweeps={
      name: tuple(sweep([own.runs.final_loss[0]], own.rates) for own in s) for name, s in compared.sweeps.items()
    },
    ladders={},
  )
  m = comparison.measure({"a": one})["a"]["mine", EACH][0]
  assert np.isnan(m.final_loss_error)
  assert (m.final_loss, m.speed_up) == (0.1, {})
