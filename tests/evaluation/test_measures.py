"""Measures on curves made by hand, and summaries against scipy and against brute force."""

import numpy as np
import pytest
from scipy import stats

from lopt.evaluation import measures


def test_points_are_twenty_per_horizon_with_start_horizon_and_end():
  assert measures.points(40, 160).tolist() == list(range(0, 161, 2))
  assert measures.points(7, 9).tolist() == list(range(10))
  points = measures.points(1003, 4001)
  assert {0, 1003, 4001} <= set(points.tolist())
  assert np.diff(points).max() == 50  # 1003 // 20
  assert 80 <= len(points) <= 84


STEPS = np.array([10, 20, 30, 40])
CURVES = np.array([[5.0, 3.0, 2.0, 2.5], [4.0, 3.5, 1.0, 6.0], [9.0, 9.0, 9.0, 0.5]])  # three learning rates


def test_the_envelope_is_the_lowest_so_far_of_all_learning_rates():
  np.testing.assert_array_equal(measures.envelope(CURVES), [4.0, 3.0, 1.0, 0.5])
  np.testing.assert_array_equal(measures.envelope(CURVES[None, :2]), [[4.0, 3.0, 1.0, 1.0]])


@pytest.mark.parametrize(
  ("final_loss", "speed_up", "is_bound"),
  [
    (4.5, 0.5, False),  # Adam is there when it is first measured, after 10 of 20 steps
    (4.0, 0.5, False),
    (3.75, 0.625, False),  # a quarter of the way from 4 to 3
    (3.0, 1.0, False),
    (2.0, 1.25, False),  # halfway from 3 to 1
    (0.5, 2.0, False),
    (0.5 * (1 - 1e-8), 2.0, False),  # rounding
    (0.4, 2.0, True),
    (-1.0, 2.0, True),
  ],
)
def test_speed_up_is_how_much_longer_the_envelope_takes(final_loss, speed_up, is_bound):
  value, bound = measures.speed_up(np.array([final_loss]), measures.envelope(CURVES)[None], STEPS, 20)
  assert value[0] == pytest.approx(speed_up, rel=1e-5)
  assert bound[0] == is_bound


def test_speed_up_of_adam_that_is_its_own_optimizer_is_its_length():
  """A curve that falls at every step reaches its loss of step t at step t."""
  steps = np.arange(1, 401)
  curve = 1 / steps
  for t in (1, 50, 100, 250, 400):
    value, bound = measures.speed_up(np.array([curve[t - 1]]), curve[None], steps, 100)
    assert value[0] == pytest.approx(t / 100, rel=1e-3)
    assert not bound[0]


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


def test_ranks_share_places():
  losses = np.array([[1.0, 5.0], [3.0, 5.0], [2.0, 1.0]])
  np.testing.assert_array_equal(measures.ranks(losses), [[1, 2.5], [3, 2.5], [2, 1]])


def test_standard_error():
  assert measures.standard_error(np.array([1.0, 3.0])) == 1.0
  assert np.isnan(measures.standard_error(np.array([1.0])))
