"""Measures on curves made by hand, and summaries against scipy and against brute force."""

import itertools

import numpy as np
import pytest
from scipy import stats

from lopt import measures


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


def test_resampled_means_are_means_of_seeds_of_the_same_task():
  values = np.array([[1.0, 10.0, 100.0], [2.0, 20.0, 200.0]])
  means = measures.resampled_means(values, 0)
  assert means.shape == (2, measures.NUM_RESAMPLES)
  for task in range(2):
    possible = np.unique([np.mean(draw) for draw in itertools.product(values[task], repeat=3)])
    distance = np.abs(means[task][:, None] - possible).min(axis=1)
    assert distance.max() < 1e-4
    assert len(np.unique(means[task].round(3))) == len(possible)
  # Paired: other values with the same shape are drawn alike, but tasks and rng seeds are not.
  np.testing.assert_allclose(measures.resampled_means(3 * values, 0), 3 * means, rtol=1e-5)
  assert not np.allclose(2 * means[0], means[1])
  assert not np.allclose(measures.resampled_means(values, 1), means)


def test_resampled_means_of_curves_are_those_of_their_points():
  values = np.random.default_rng(0).normal(size=(2, 4, 6))
  means = measures.resampled_means(values, 3)
  assert means.shape == (2, measures.NUM_RESAMPLES, 6)
  for point in range(6):
    np.testing.assert_allclose(
      means[..., point], measures.resampled_means(values[..., point], 3), rtol=1e-5, atol=1e-6
    )


def test_the_interval_agrees_with_scipys_stratified_bootstrap():
  values = np.random.default_rng(0).normal(size=(6, 5))
  own = measures.summarize(values.mean(axis=1), measures.resampled_means(values, 0).T)

  def statistic(*tasks, axis):
    return stats.trim_mean(np.stack([task.mean(axis=axis) for task in tasks], axis=-1), 0.25, axis=-1)

  theirs = stats.bootstrap(
    tuple(values), statistic, n_resamples=4000, method="percentile", rng=np.random.default_rng(1)
  )
  assert own.value == pytest.approx(stats.trim_mean(values.mean(axis=1), 0.25))
  # Of 1000 and 4000 resamples; the standard error of such a bound is about 0.02.
  assert (own.low, own.high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.06)


def test_redrawn_tasks_are_drawn_from_the_same_resample():
  resamples = np.arange(measures.NUM_RESAMPLES)[:, None] + np.array([0.1, 0.2, 0.3])
  drawn = measures.redrawn_tasks(resamples, (0, 1))
  np.testing.assert_array_equal(np.floor(drawn), np.floor(resamples))
  counts = np.unique((drawn % 1).round(1), return_counts=True)[1]
  assert counts == pytest.approx(np.full(3, measures.NUM_RESAMPLES), abs=130)  # 5 standard errors
  assert len(np.unique((drawn % 1).round(1), axis=0)) == 27  # every way to draw three of three
  np.testing.assert_array_equal(measures.redrawn_tasks(-resamples, (0, 1)), -drawn)  # optimizers stay together
  assert (measures.redrawn_tasks(resamples, (0, 2)) != drawn).any()
  assert measures.redrawn_tasks(resamples[:, :0], 0).shape == (measures.NUM_RESAMPLES, 0)


def test_the_interval_over_tasks_agrees_with_scipys_bootstrap():
  values = np.random.default_rng(0).normal(size=11)  # runs without noise: tasks are all that is drawn
  own = measures.summarize(values, measures.redrawn_tasks(np.tile(values, (measures.NUM_RESAMPLES, 1)), 0))
  theirs = stats.bootstrap(
    (values,),
    lambda x, axis: stats.trim_mean(x, 0.25, axis=axis),
    n_resamples=4000,
    method="percentile",
    rng=np.random.default_rng(1),
  )
  # The standard error of such a bound, of 1000 resamples, is about 0.03.
  assert (own.low, own.high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.1)


def test_the_interval_covers_the_family_that_tasks_are_drawn_from():
  """Its interquartile mean of means, 1.5; seeds alone would cover it in a few repetitions only."""
  rng = np.random.default_rng(0)
  covered = {"tasks": [], "seeds": []}
  for repetition in range(200):
    values = 1.5 + rng.normal(size=(20, 1)) + rng.normal(size=(20, 10)) * 0.2
    resamples = measures.resampled_means(values, repetition).T
    for name, x in {"seeds": resamples, "tasks": measures.redrawn_tasks(resamples, repetition)}.items():
      interval = measures.summarize(values.mean(axis=1), x)
      covered[name].append(interval.low <= 1.5 <= interval.high)
  assert 0.87 <= np.mean(covered["tasks"]) <= 0.99
  assert np.mean(covered["seeds"]) < 0.5


def test_the_interval_covers():
  """The truth, the mean over given tasks of a normal distribution's mean, in nearly 95% of repetitions."""
  rng = np.random.default_rng(0)
  truth = np.array([0.0, 1.0, 2.0, 3.0])  # IQM 1.5
  covered = []
  for repetition in range(200):
    values = truth[:, None] + rng.normal(size=(4, 10)) * 0.2
    interval = measures.summarize(values.mean(axis=1), measures.resampled_means(values, repetition).T)
    covered.append(interval.low <= 1.5 <= interval.high)
  # 10 seeds make the percentile interval √0.9 times too narrow: 93%; the standard error is 2%.
  assert 0.87 <= np.mean(covered) <= 0.99


def test_ranks_share_places():
  losses = np.array([[1.0, 5.0], [3.0, 5.0], [2.0, 1.0]])
  np.testing.assert_array_equal(measures.ranks(losses), [[1, 2.5], [3, 2.5], [2, 1]])


def test_standard_error():
  assert measures.standard_error(np.array([1.0, 3.0])) == 1.0
  assert np.isnan(measures.standard_error(np.array([1.0])))
