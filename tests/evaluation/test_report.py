"""Reports of a comparison made by hand."""

import json
import math
import re

import numpy as np
import pytest
from matplotlib import image
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from lopt.evaluation import report
from lopt.evaluation.comparison import Comparison, Envelope, Evaluation, Measures, Tuning, summarize

T, SEEDS = 100, 3


def make_measures(mean_loss, speed_up, tuning=None, bound=False):
  return Measures(
    mean_loss=mean_loss,
    mean_loss_error=mean_loss / 100,
    final_loss=mean_loss / 2,
    final_loss_error=mean_loss / 200,
    test_loss=mean_loss / 3,
    test_loss_error=math.nan,
    test_metrics={"accuracy": 1 - mean_loss},
    diverged=1 / 3 if mean_loss > 0.7 else 0.0,
    speed_up=speed_up,
    speed_up_is_bound=bound,
    relative_loss=mean_loss / 0.25,
    rank=2.0,
    tuning=tuning,
  )


def make_tuning(best):
  rates = (1e-3, 1e-2, 1e-1)
  return Tuning(rates, tuple(abs(rate - best) for rate in rates), best, interior=best == 1e-2)


def make_curves(last):
  """From about 1 down to `last` in each of two tasks, one seed above and one below the middle one."""
  curve = np.geomspace(1.0, last, T)
  return np.stack([np.stack([spread * curve for spread in (0.7, 1.0, 1.4)])] * 2)


def make_evaluation(measures, curves):
  return Evaluation(tuple(measures), curves)


@pytest.fixture
def comparison():
  learned = (make_measures(0.1234, 4.0, bound=True), make_measures(0.5, 0.5))
  adam = (make_measures(0.25, 1.0, make_tuning(1e-2)), make_measures(0.4, 0.9, make_tuning(1e-1)))
  untuned = (make_measures(0.3, 0.6), make_measures(0.6, 0.3))
  sgdm = (make_measures(0.75, 0.1, make_tuning(1e-2)), make_measures(0.6, 0.2, make_tuning(1e-2)))
  return Comparison(
    tasks=("width 3", "a|b"),
    num_steps=T,
    num_seeds=SEEDS,
    num_tuning_seeds=2,
    tuned_for="mean_loss",
    seed=5,
    learned={"mine": make_evaluation(learned, make_curves(0.01))},
    baselines={
      "Adam": make_evaluation(adam, make_curves(0.03)),
      "Adam at 1e-3": make_evaluation(untuned, make_curves(0.3)),
      "SGDM": make_evaluation(sgdm, make_curves(0.1)),
    },
    envelope=Envelope(np.array([5, 100, 400]), np.ones((2, 3))),
    seconds_per_step={},
  )


def read_tables(text):
  """The rows of each Markdown table as dicts, by a reader that knows nothing of the writer."""
  tables, header = [], None
  for line in text.splitlines():
    if not line.startswith("|"):
      header = None
    elif header is None:
      header = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
      tables.append([])
    elif not set(line) <= set("|-: "):
      cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
      tables[-1].append(dict(zip(header, cells, strict=True)))
  return tables


def test_table_of_tasks(comparison):
  first, second = read_tables(report.table(comparison))[0]
  assert first == {
    "task": "1: width 3",
    "mine": "0.123",
    "Adam (learning rate)": "0.25 (0.01)",
    "Adam at 1e-3": "0.3",
    "SGDM (learning rate)": "0.75 (0.01)",
    "speed-up": "≥ 4.00×",
  }
  assert second == {
    "task": "2: a\\|b",
    "mine": "0.5",
    "Adam (learning rate)": "0.4 (0.1*)",
    "Adam at 1e-3": "0.6",
    "SGDM (learning rate)": "0.6 (0.01)",
    "speed-up": "0.50×",
  }


def test_table_of_means(comparison):
  mine, adam, untuned, sgdm = read_tables(report.table(comparison))[1]
  assert mine == {
    "optimizer": "mine",
    "speed-up": "2.25 (0.5 to 4), 1 of 2 ≥",  # a quarter of all resamples have one of the two tasks twice
    "median": "2.25",
    "final loss ÷ Adam's": "1.25 (0.494 to 2)",
    "training loss": "0.312 ± 0.003",  # of 0.1234 and 0.5; the error is √(0.001234² + 0.005²) / 2
    "final training loss": "0.156",
    "test loss": "0.104",
    "test accuracy": "68.8%",
    "rank": "2.0",
    "diverged": "0%",
    "better than Adam": "1/2",
    "better than Adam at 1e-3": "2/2",
    "learning rate interior": "–",
  }
  assert (adam["better than Adam"], adam["better than Adam at 1e-3"]) == ("–", "2/2")
  assert (adam["speed-up"], sgdm["speed-up"]) == ("0.95 (0.9 to 1)", "0.15 (0.1 to 0.2)")
  assert [row["learning rate interior"] for row in (adam, untuned, sgdm)] == ["1/2", "–", "2/2"]
  assert (sgdm["training loss"], sgdm["diverged"]) == ("0.675 ± 0.005", "16.7%")


def test_times_are_shown_where_they_were_measured(comparison):
  timed = comparison._replace(seconds_per_step={"mine": 3e-4, "Adam": 1e-4, "Adam at 1e-3": 1e-4, "SGDM": 5e-5})
  mine, adam, _, sgdm = read_tables(report.table(timed))[1]
  assert [row["time per step ÷ Adam's"] for row in (mine, adam, sgdm)] == ["3.00×", "1.00×", "0.50×"]
  assert [row["wall-clock speed-up"] for row in (mine, sgdm)] == ["0.75×", "0.30×"]
  assert "time per step" not in report.table(comparison)


def test_table_states_its_settings_and_is_aligned(comparison):
  text = report.table(comparison)
  assert "100 steps and 3 seeds" in text
  assert "2 held-out tasks (seed 5)" in text
  tables = re.split(r"\n\n", text)
  for rows in (tables[1], tables[3]):
    assert len({len(row) for row in rows.splitlines()}) == 1


def test_best_at_the_end_of_the_grid_is_explained_only_where_it_occurs(comparison):
  assert "outside the grid" in report.table(comparison)
  adam = comparison.baselines["Adam"]
  interior = adam._replace(measures=(adam.measures[0],) * 2)
  text = report.table(comparison._replace(baselines=comparison.baselines | {"Adam": interior}))
  assert "outside the grid" not in text
  assert "*" not in text


def test_several_learned_optimizers_have_columns_of_their_own(comparison):
  other = make_evaluation((make_measures(0.2, 2.0), make_measures(0.3, 5.0)), make_curves(0.02))
  tasks, means = read_tables(report.table(comparison._replace(learned=comparison.learned | {"other": other})))
  assert tasks[1]["other"] == "0.3"
  assert tasks[1]["other: speed-up"] == "5.00×"
  assert tasks[1]["mine: speed-up"] == "0.50×"
  assert [row["optimizer"] for row in means] == ["mine", "other", "Adam", "Adam at 1e-3", "SGDM"]


def refuse_constant(name):
  raise AssertionError(f"{name} is not JSON")


def test_json_has_every_number_of_the_comparison(comparison, tmp_path):
  path = tmp_path / "new folder" / "comparison.json"
  report.write_json(comparison, path)
  content = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse_constant)
  assert content["tasks"] == ["width 3", "a|b"]
  settings = [content[name] for name in ("num_steps", "num_seeds", "num_tuning_seeds", "seed")]
  assert settings == [T, SEEDS, 2, 5]
  assert list(content["optimizers"]) == ["mine", "Adam", "Adam at 1e-3", "SGDM"]
  for name, e in comparison.evaluations.items():
    written = content["optimizers"][name]
    assert written["learned"] == (name == "mine")
    summary = summarize([comparison], name)
    assert written["summary"]["mean_loss"] == pytest.approx(summary.mean_loss)
    assert written["summary"]["tasks_won"] == summary.tasks_won
    assert list(written["summary"]["speed_up"].values()) == pytest.approx(list(summary.speed_up))
    for i, m in enumerate(e.measures):
      expected = m._asdict() | {"test_loss_error": None}  # NaN
      if m.tuning:
        t = m.tuning
        expected["tuning"] = {
          "learning_rates": list(t.learning_rates),
          "losses": list(t.losses),
          "best": t.best,
          "interior": t.interior,
        }
      assert written["measures"][i] == expected


def test_plot_shows_every_optimizer_in_every_panel(comparison, tmp_path):
  report.plot(comparison, tmp_path / "curves.png")
  assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
  pixels = image.imread(tmp_path / "curves.png")[:, :, :3]
  height, width = pixels.shape[:2]
  assert width > height > 500
  lines = {name: np.abs(pixels - to_rgb(color)).max(axis=2) < 0.05 for name, color in COLORS.items()}
  large = 2.6 / 3.6  # the share of the large panel, see `width_ratios`
  for name, line in lines.items():
    for part in (line[:, : int(width * large)], line[: height // 2, int(width * large) :]):
      # A line crosses most of its panel's columns, and falls: the same row does not hold it all.
      columns = part.any(axis=0)
      assert columns.sum() > 0.4 * part.shape[1], name
      assert part.any(axis=1).sum() > 0.1 * height, name
  # At its end, the lower the loss the lower the line; the legend is in the upper half.
  right_end = slice(int(width * large * 0.85), int(width * large * 0.95))
  ends = {name: np.nonzero(line[height // 5 :, right_end])[0].mean() for name, line in lines.items()}
  assert ends["SGDM"] < ends["Adam"] < ends["mine"]


COLORS = {"mine": "#D55E00", "Adam": "#0072B2", "SGDM": "#009E73"}


@pytest.mark.parametrize("num_tasks", [1, 3, 9])
def test_plot_has_a_panel_for_each_of_the_first_six_of_several_tasks(comparison, tmp_path, monkeypatch, num_tasks):
  figures = []
  save = Figure.savefig
  monkeypatch.setattr(
    Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure) or save(figure, *args, **kwargs)
  )

  def repeat(e):
    # Each task is flat at its own height.
    curves = np.ones((num_tasks, SEEDS, T)) * np.arange(1.0, num_tasks + 1)[:, None, None]
    return e._replace(measures=(e.measures * num_tasks)[:num_tasks], curves=curves)

  many = comparison._replace(
    tasks=("",) * num_tasks,
    learned={name: repeat(e) for name, e in comparison.learned.items()},
    baselines={name: repeat(e) for name, e in comparison.baselines.items()},
  )
  report.plot(many, tmp_path / "curves.png")
  large, *small = figures[0].axes
  assert len(small) == {1: 0, 3: 3, 9: 6}[num_tasks]
  assert len(large.lines) == 3  # untuned Adam has none
  for line in large.lines:
    np.testing.assert_allclose(line.get_ydata(), (num_tasks + 1) / 2)
  for i, axes in enumerate(small):
    for line in axes.lines:
      np.testing.assert_allclose(line.get_ydata(), i + 1)
  assert large.get_yscale() == "linear"  # as the losses do not span decades


def test_plotted_lines_are_trailing_means_and_bands_the_extremes(comparison, tmp_path, monkeypatch):
  figures = []
  save = Figure.savefig
  monkeypatch.setattr(
    Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure) or save(figure, *args, **kwargs)
  )
  report.plot(comparison, tmp_path / "curves.png")
  large = figures[0].axes[0]
  assert large.get_yscale() == "log"
  curve = np.geomspace(1.0, 0.01, T)
  smooth = [np.mean(curve[t - min(max(t // 10, 1), 5) : t]) for t in range(1, T + 1)]
  line = large.lines[0]
  assert (line.get_label(), line.get_color()) == ("mine", COLORS["mine"])
  np.testing.assert_array_equal(line.get_xdata(), np.arange(1, T + 1))
  np.testing.assert_allclose(line.get_ydata(), np.array(smooth) * (0.7 + 1.0 + 1.4) / 3)
  band = large.collections[0].get_paths()[0].vertices
  for t in (1, 50, T):
    at_t = band[band[:, 0] == t][:, 1]
    assert at_t.min() == pytest.approx(0.7 * smooth[t - 1])
    assert at_t.max() == pytest.approx(1.4 * smooth[t - 1])


def test_a_plot_that_fails_leaves_the_old_file(comparison, tmp_path, monkeypatch):
  path = tmp_path / "curves.png"
  path.write_bytes(b"old")

  def fail(figure, file, **kwargs):
    file.write(b"half a pict")
    raise OSError("disk full")

  monkeypatch.setattr(Figure, "savefig", fail)
  with pytest.raises(OSError, match="disk full"):
    report.plot(comparison, path)
  assert path.read_bytes() == b"old"
  assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_named(comparison, tmp_path):
  (tmp_path / "file").write_text("not a folder")
  for write in (report.plot, report.write_json):
    with pytest.raises(OSError, match="file"):
      write(comparison, tmp_path / "file" / "out")


def test_meta_training_curves_show_every_family_and_their_mean():
  records = [{"step": 0, "evaluation/mean_loss": 1.0, "evaluation/mean_loss/a": 1.0, "evaluation/mean_loss/b": 1.0}]
  records += [
    {"step": 10 * i, "meta_loss": 1 / i, "meta_loss/a": 0.5 / i, "meta_loss/b": 1.5 / i} for i in range(1, 41)
  ]
  records += [
    {"step": 400, "evaluation/mean_loss": 0.5, "evaluation/mean_loss/a": 0.25, "evaluation/mean_loss/b": None}
  ]
  training, periodic = report.meta_training_curves(records).axes
  lines = {str(line.get_label()): np.asarray(line.get_xydata()).T for line in periodic.lines}
  assert list(lines) == ["a", "b", "all"]
  np.testing.assert_array_equal(lines["a"][0], [0, 400])
  np.testing.assert_array_equal(lines["all"][1], [1.0, 0.5])
  np.testing.assert_array_equal(lines["b"][1], [1.0, math.nan])
  assert [len(np.asarray(line.get_xydata())) for line in training.lines] == [40, 40, 40]
  smoothed = np.asarray(training.lines[2].get_xydata())[:, 1]  # over a tenth of the steps so far, at most 5% of all
  assert smoothed[0] == 1.0
  assert smoothed[39] == pytest.approx((1 / 39 + 1 / 40) / 2)
