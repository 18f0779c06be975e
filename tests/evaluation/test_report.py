"""Tables, sentences, pictures and the page of a comparison made by hand, read as their readers would."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib import image
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from lopt.evaluation import comparison, inner_runs, pictures, report, report_page, tables
from lopt.evaluation.comparison import CONTROL, EACH, Comparison, Sweep

RATES = (0.01, 0.1, 1.0)
TASKS, SEEDS, POINTS = 3, 2, 20


def sweep(best, rates=RATES):
  """Final losses `best` at 0.1 and 3 times that at the others; the curve falls to it from 1."""
  final = np.array([[best * (1 if rate == 0.1 or len(rates) == 1 else 3) for rate in rates]] * SEEDS)
  final = final * np.array([[0.99], [1.01]])
  curve = np.exp(np.log(final)[..., None] * np.linspace(0, 1, POINTS))
  return Sweep(rates, inner_runs.Runs(curve, final**0.5, final, 2 * final, {"accuracy": 1 - final}, final > 0.9))


def make(mine=0.05, steps=100, timed=True) -> Comparison:
  """AdamW's loss is 0.2 / length, Muon's 0.1 / length and that of θ = 0 0.08 / length."""
  levels = {"mine": mine, "old": 0.4, CONTROL: 0.08, "AdamW": 0.2, "Muon": 0.1, "Lion": 0.3}
  ladders: dict[str, tuple[comparison.Ladder, ...]] = {
    name: tuple({x: np.full(SEEDS, levels[name] / x) for x in (0.5, 1.0, 2.0, 4.0)} for _ in range(TASKS))
    for name in (CONTROL, "AdamW", "Muon")
  }
  names = ["mine", "old", "AdamW", "Muon", comparison.GRADIENT]
  return Comparison(
    tasks=("width 3", "a|b", "<c>"),
    num_steps=steps,
    num_seeds=SEEDS,
    seed=0,
    roles={
      "mine": "learned",
      "old": "learned",
      CONTROL: "control",
      **dict.fromkeys(["AdamW", "Muon", "Lion"], "baseline"),
    },
    sweeps={
      name: tuple(sweep(level, (1.0,) if name == "old" else RATES) for _ in range(TASKS))
      for name, level in levels.items()
    },
    recommended={"mine": 0.1, "old": None, CONTROL: 0.1},
    ladders=ladders,
    seconds_per_step=dict(zip(names, (4e-3, 3e-3, 2e-3, 2e-3, 1e-3), strict=True)) if timed else {},
  )


SUITES = {"fresh": {"mlp": make(), "deep": make(0.025)}, "size": {"wide": make(0.4, steps=500)}}


def cells(markdown):
  lines = [line for line in markdown.splitlines() if line.startswith("|")]
  return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_the_summary_says_what_was_measured():
  header, _, *rows = cells(report.table_of_all({"mlp": make()}, full=True))
  rows = {(row[0], row[1]): dict(zip(header, row, strict=True)) for row in rows}
  mine = rows["mine", EACH]
  assert mine["speed-up over tuned AdamW"] == "4 (4 to 4)"
  assert mine["speed-up over the best baseline"] == "2 (2 to 2)"
  assert mine["speed-up over θ = 0"] == "1.6 (1.6 to 1.6)"
  assert mine["final loss ÷ AdamW's"] == "0.25 (0.25 to 0.25)"
  assert (mine["step time"], mine["update's share"], mine["speed-up in time"]) == ("2.00×", "75%", "2.00×")
  assert rows["old", "none"]["speed-up over tuned AdamW"] == "0.5 (0.5 to 0.5)"
  assert rows["old", "none"]["speed-up over θ = 0"] == "0.5 (0.5 to 0.5), 3 ≤"
  assert rows["old", "none"]["slower than the best"] == "100%"
  assert rows["Lion", EACH]["step time"] == "–"
  assert rows["mine", "recommended"]["÷ at each task's rate"] == "1"
  assert len(rows) == 3 + 1 + 3 + 3 * 2
  assert "step time" not in report.table_of_all({"mlp": make(timed=False)}, full=True)
  assert cells(report.table_of_all({"mlp": make()}))[0] == [
    *("optimizer", "learning rate", "over tuned AdamW", "over the best baseline", "over θ = 0"),
    *("slower than the best", "final loss", "test accuracy", "diverged"),
  ]


def test_several_comparisons_are_told_one_by_one_too():
  text = report.table_of_all(SUITES["fresh"])
  assert "6 held-out tasks, 2 seeds, 100 steps" in text
  second = text.split("\n\n")[2]
  header, _, *rows = cells(second)
  assert header[:4] == ["suite", "tasks", "optimizer", "learning rate"]
  tuned = [row for row in rows if row[2:4] == ["mine", EACH]]
  assert [row[0] for row in tuned] == ["mlp", "deep"]
  assert [row[5] for row in tuned] == ["2 (2 to 2)", "4 (4 to 4)"]
  assert {row[2] for row in rows} == {"mine", "old", CONTROL}


def test_one_sentence():
  text = report.verdict_of_all({"mlp": make()}, "mine")
  assert "tuned AdamW takes 4 (4 to 4) times as many steps" in text
  assert "the best baseline takes 2 (2 to 2) times as many steps" in text
  assert "θ = 0 takes 1.6 (1.6 to 1.6) times as many steps" in text
  old = report.verdict_of_all({"mlp": make()}, "old")
  assert old.startswith("old, over 3 held-out tasks")
  assert "θ = 0 takes at most 0.5 (0.5 to 0.5) times as many steps" in old


def test_single_tasks_escape_bars_and_mark_ends_of_the_grid():
  c = make()
  ends = Sweep(RATES, sweep(0.05).runs._replace(final_loss=np.array([[0.9, 0.5, 0.1]] * SEEDS)))
  c = c._replace(sweeps={**c.sweeps, "mine": (ends, *c.sweeps["mine"][1:])})
  rows = tables.task_table(c, comparison.measure({"a": c})["a"])
  assert rows[1][1] == "0.1 (1*)"
  assert rows[2][1] == "0.05 (0.1)"
  assert rows[1][rows[0].index("mine: speed-up")] == "2.00×"
  assert r"2: a\|b" in "\n".join(tables.markdown(rows))


def test_files(tmp_path):
  path = report.write_all({"mlp": make()}, tmp_path)
  assert path == tmp_path / "comparison.png"
  content = json.loads((tmp_path / "comparison.json").read_text())
  assert content["summary"]["AdamW"][EACH]["final_loss"] == pytest.approx(0.2)
  own = content["families"]["mlp"]["optimizers"]
  assert own["mine"]["measures"][EACH][0]["final_loss"] == pytest.approx(0.05)
  assert own["mine"]["role"] == "learned"
  assert own["AdamW"]["ladders"][0] == pytest.approx({"0.5": 0.4, "1.0": 0.2, "2.0": 0.1, "4.0": 0.05})
  assert (tmp_path / "comparison.md").read_text() == report.table_of_all({"mlp": make()}, full=True) + "\n"
  for name in ("comparison.png", "learning_rates.png"):
    assert image.imread(tmp_path / name).shape[1] > 500
  assert report.write_all(SUITES["fresh"], tmp_path).exists()


def test_json_has_null_for_what_is_no_number():
  assert report.plain({"a": (float("nan"), 1.0, [float("inf")])}) == {"a": [None, 1.0, [None]]}


def lines(axes, color):
  return [line for line in axes.lines if to_rgb(line.get_color()) == to_rgb(color)]


def test_curves_are_where_the_numbers_are():
  c = make()
  figure = pictures.training_curves(c, comparison.measure({"a": c})["a"])
  (mine,) = lines(figure.axes[0], "#D55E00")
  assert np.asarray(mine.get_ydata())[-1] == pytest.approx(0.05, rel=0.01)
  assert np.asarray(mine.get_xdata())[-1] == pytest.approx(97.5)  # the middle of the last of 20 parts
  legend = figure.axes[0].get_legend()
  assert legend is not None
  labels = [text.get_text() for text in legend.get_texts()]
  assert labels == ["mine", "old", CONTROL, "AdamW", "Muon", "other baselines"]
  assert [axes.get_title() for axes in figure.axes[1:]] == ["Task 1", "Task 2", "Task 3"]


def test_rates_are_drawn_relative_to_adamw():
  figure = pictures.rate_curves({"a": make(), "b": make(0.4)})
  curve, dot = lines(figure.axes[0], "#D55E00")
  np.testing.assert_allclose(np.asarray(curve.get_xdata()), RATES)
  np.testing.assert_allclose(np.asarray(curve.get_ydata()), [0.75, 0.25, 0.75], rtol=1e-3)
  assert (np.asarray(dot.get_xdata())[0], np.asarray(dot.get_ydata())[0]) == pytest.approx((0.1, 0.25), rel=1e-3)
  (adam,) = lines(figure.axes[1], "#0072B2")
  assert np.asarray(adam.get_ydata()).min() == pytest.approx(1, rel=1e-3)


def test_speed_ups_are_drawn_by_suite_and_rival():
  by_suite = {suite: comparison.measure(members) for suite, members in SUITES.items()}
  figure = pictures.speed_ups(by_suite, SUITES["fresh"]["mlp"])
  assert [axes.get_title() for axes in figure.axes] == ["over tuned AdamW", "over the best baseline", "over θ = 0"]
  assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["fresh", "size"]
  dots = [line for line in lines(figure.axes[1], "#D55E00") if line.get_marker() == "o"]
  values = [float(np.asarray(line.get_xdata())[0]) for line in dots]
  assert values == pytest.approx([3.0, 0.5], rel=0.02)  # 2 and 4 on three tasks each; below the shortest run
  one = pictures.speed_ups({"fresh": by_suite["fresh"]}, SUITES["fresh"]["mlp"])
  assert [text.get_text() for text in one.axes[0].get_yticklabels()] == ["mlp", "deep"]


def test_meta_training_curves_have_a_line_for_each_family():
  records = [
    {"step": k, "meta_loss": 1.0 / k, "meta_loss/a": 2.0 / k, "meta_loss/b": None if k == 2 else 1.0}
    for k in range(1, 9)
  ]
  records += [{"step": 4, "evaluation/mean_loss": 0.5}]
  figure = pictures.meta_training_curves(records)
  assert isinstance(figure, Figure)
  assert len(figure.axes[0].lines) == 3
  np.testing.assert_array_equal(np.asarray(figure.axes[1].lines[0].get_ydata()), [0.5])


class Page(HTMLParser):
  """Texts, images and the cells of tables."""

  def __init__(self, text):
    super().__init__()
    self.tables, self.images, self.references = [], [], []
    self.cell = None
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    if tag == "table":
      self.tables.append([])
    elif tag == "tr":
      self.tables[-1].append([])
    elif tag in ("td", "th"):
      self.tables[-1][-1].append("")
      self.cell = self.tables[-1][-1]
    elif tag == "img":
      self.images.append(dict(attrs)["src"])
    self.references += [value for name, value in attrs if name in ("href", "src")]

  def handle_data(self, data):
    if self.cell:
      self.cell[-1] += data.strip()

  def handle_endtag(self, tag):
    if tag == "table":
      self.cell = None


def test_the_page_is_whole_and_says_the_same(tmp_path):
  about = report_page.About({"command": "evaluate <now>"}, {"mine": 200}, {"mine": {"seed": 1}})
  path = report_page.write(SUITES, tmp_path, about)
  text = path.read_text("utf-8")
  page = Page(text)
  assert all(reference.startswith("data:") for reference in page.references)
  for source in page.images:
    picture = image.imread(io.BytesIO(base64.b64decode(source.partition(",")[2])))
    assert picture.std() > 0.01
  assert len(page.images) == 2 + 3
  suites = page.tables[0]
  assert suites[0][:4] == ["suite", "tasks", "optimizer", "learning rate"]
  assert [row[4] for row in suites[1:] if row[2:4] == ["mine", EACH]] == ["4 (4 to 4)", "0.5 (0.5 to 0.5)"]
  assert "evaluate &lt;now&gt;" in text
  assert "3: &lt;c&gt;" in text
  beyond = next(table for table in page.tables if table[0][1:3] == ["tasks", "trained on up to"])
  assert beyond[1][:4] == ["mine", "size: wide", "200", "500 (2.5×)"]
  assert "old: of 9 tasks it diverges on 0, slower than tuned AdamW on 9" in text
  content = json.loads((tmp_path / "report.json").read_text())
  assert content["suites"]["size"]["mine"][EACH]["speed_up"]["AdamW"]["value"] == pytest.approx(0.5)
  assert content["about"]["horizons"] == {"mine": 200}
  assert sorted(x.name for x in tmp_path.iterdir()) == [
    "learning_rates.png",
    "report.html",
    "report.json",
    "summary.png",
  ]
