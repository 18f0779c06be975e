"""Measures on numbers made by hand, and summaries against scipy and against brute force."""

import numpy as np
import pytest
from scipy import stats

from lopt.evaluation import measures

LENGTHS = [0.5, 1.0, 2.0, 4.0]
LOSSES = [0.8, 0.4, 0.1, 0.05]


@pytest.mark.parametrize(
  ("goal", "value", "bound"),
  [
    (0.9, 0.5, "≤"),  # already there after half of the steps
    (0.8, 0.5, ""),
    (0.4, 1.0, ""),
    (0.2, 2**0.5, ""),  # half of the way from 0.4 to 0.1 in the logarithm
    (0.1, 2.0, ""),
    (0.05, 4.0, ""),
    (0.05 * (1 - 1e-8), 4.0, ""),  # rounding
    (0.04, 4.0, "≥"),
    (-1.0, 4.0, "≥"),
  ],
)
def test_speed_up_is_the_length_at_which_the_rival_ends_there(goal, value, bound):
  found = measures.speed_up(goal, LENGTHS, LOSSES)
  assert found.value == pytest.approx(value, rel=1e-5)
  assert found.bound == bound


def test_speed_up_over_a_power_law_is_exact():
  """A rival that ends with 3 / length^1.7 needs (3 / loss)^(1/1.7)."""
  losses = [3 / x**1.7 for x in LENGTHS]
  for length in (0.6, 0.99, 1.5, 3.9):
    assert measures.speed_up(3 / length**1.7, LENGTHS, losses).value == pytest.approx(length)


def test_speed_up_takes_the_shortest_run_that_is_there():
  assert measures.speed_up(0.3, LENGTHS, [0.6, 0.3, 0.5, 0.1]).value == 1.0
  assert measures.speed_up(0.2, LENGTHS, [0.6, 0.3, 0.5, 0.1]).value == pytest.approx(
    2 * 2 ** (np.log(2.5) / np.log(5))
  )


def test_losses_that_are_rounding_are_not_told_apart():
  """1e-10 and 0 are the same in float32: after as many steps that is a draw; a rival at 1e-5 is not there yet."""
  for goal in (0.0, 1e-10, 9e-8):
    assert measures.speed_up(goal, LENGTHS, [1e-9, 0.0, 0.0, 0.0]) == measures.SpeedUp(1.0)
    assert measures.speed_up(goal, LENGTHS, [1e-3, 1e-5, 0.0, 0.0]).value == pytest.approx(2.0)
  assert measures.speed_up(1e-5, LENGTHS, [0.0, 0.0, 0.0, 0.0]) == measures.SpeedUp(0.5, "≤")
  np.testing.assert_allclose(measures.regret(np.array([[0.0, 1e-10, 1e-3]])), [0, 0, np.log(1e4)])


def test_cross_fit_takes_for_each_seed_what_is_best_for_the_others():
  losses = np.random.default_rng(1).normal(size=(6, 4))
  expected = [min(range(4), key=lambda k: sum(losses[j, k] for j in range(6) if j != i)) for i in range(6)]
  assert len(set(expected)) > 1
  np.testing.assert_array_equal(measures.cross_fit(losses), expected)
  np.testing.assert_array_equal(measures.cross_fit(losses[:1]), [losses[0].argmin()])


def test_cross_fit_does_not_flatter():
  """Of rates that are all alike, the reported mean is the true one, and the lowest one is not."""
  losses = np.random.default_rng(0).normal(size=(2000, 5, 9))
  tuned = [x[range(5), measures.cross_fit(x)].mean() for x in losses]
  assert abs(np.mean(tuned)) < 4 * np.std(tuned) / 2000**0.5
  assert np.mean([x.mean(axis=0).min() for x in losses]) < -0.5


def test_regret_is_of_ratios():
  losses = np.array([[1.0, 2.0, 4.0], [3e-3, 1e-3, 2e-3]])
  expected = [np.log(3) / 2, np.log(2) / 2, (np.log(4) + np.log(2)) / 2]
  np.testing.assert_allclose(measures.regret(losses), expected)


def test_interquartile_mean_on_known_numbers_and_against_scipy():
  assert measures.interquartile_mean(np.array([100.0, 1.0, 2.0, -50.0])) == 1.5
  assert measures.interquartile_mean(np.array([7.0])) == 7.0
  assert measures.interquartile_mean(np.array([1.0, 2.0, 6.0])) == 3.0  # a quarter of three is none
  values = np.random.default_rng(0).normal(size=(5, 23))
  np.testing.assert_allclose(measures.interquartile_mean(values), stats.trim_mean(values, 0.25, axis=1))
  rows = np.sort(values, axis=1)[:, 5:-5]
  np.testing.assert_allclose(measures.interquartile_mean(values), rows.mean(axis=1))


def test_the_interval_agrees_with_scipys_stratified_bootstrap():
  values = np.random.default_rng(0).normal(size=17)
  families = values[:11], values[11:] + 1
  own = measures.summarize(families)

  def statistic(*families, axis):
    return stats.trim_mean(np.concatenate(families, axis=axis), 0.25, axis=axis)

  theirs = stats.bootstrap(families, statistic, n_resamples=4000, method="percentile", rng=np.random.default_rng(1))
  assert own.value == pytest.approx(stats.trim_mean(np.concatenate(families), 0.25))
  # Of 1000 and 4000 resamples; the standard error of such a bound is about 0.03.
  assert (own.low, own.high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.1)


def test_the_interval_is_about_other_tasks():
  """What two families that tasks are drawn from have, 1.5, is in it in nearly 95% of repetitions."""
  rng = np.random.default_rng(0)
  covered = []
  for _ in range(200):
    tasks = 1.5 + rng.normal(size=(2, 16)) + rng.normal(size=(2, 16, 10)).mean(axis=2)
    interval = measures.summarize(list(tasks))
    covered.append(interval.low <= 1.5 <= interval.high)
  # 16 tasks make it √(15/16) times too narrow: 94%; the standard error is 2%.
  assert 0.87 <= np.mean(covered) <= 0.99


def test_the_only_task_of_a_family_stays_and_alone_has_no_interval():
  assert measures.summarize([np.array([2.0]), np.array([])]).value == 2
  assert np.isnan(measures.summarize([np.array([2.0]), np.array([4.0])])[1:]).all()
  low, high = measures.summarize([np.array([2.0]), np.array([4.0, 6.0])])[1:]
  assert (low, high) == pytest.approx((10 / 3, 14 / 3))  # three tasks are too few for a quarter of them


def test_standard_error():
  assert measures.standard_error(np.array([1.0, 3.0])) == 1.0
  assert np.isnan(measures.standard_error(np.array([1.0])))
