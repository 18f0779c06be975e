"""The page, read as a browser would, over comparisons whose curves are made by hand."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib import image

from lopt.evaluation import comparison, measures, report_page
from lopt.evaluation.comparison import Comparison, Envelope, Runs, Tuning

T, TASKS, SEEDS = 40, 3, 4


def curves(rate):
  """Losses [tasks, seeds, 4 T] that fall like exp(-rate t), and faster in later tasks."""
  t, task, seed = np.arange(4 * T), np.arange(TASKS)[:, None, None], np.arange(SEEDS)[:, None]
  return np.exp(-rate * (1 + 0.1 * task) * t / T) * (1 + 0.02 * seed)


def compared(rates, timed=True):
  """Learned optimizers with curves of these rates; Adam's is 1 with its best learning rate."""

  def runs(rate, diverged=0.0):
    losses = curves(rate)[..., :T]
    flags = np.full((TASKS, SEEDS), diverged)
    return Runs(losses, losses[..., -1:], 2 * losses[..., -1], {"accuracy": 1 - losses[..., -1]}, flags)

  learned = {name: runs(rate, float(rate < 0)) for name, rate in rates.items()}
  everyone = learned | {"Adam": runs(1.0), "Adam at 1e-3": runs(0.5), "Lion": runs(0.8)}
  of_all_rates = np.stack([curves(1.0), curves(0.5)], axis=2)
  envelope = Envelope(np.arange(1, 4 * T + 1), measures.envelope(of_all_rates.mean(axis=1)))
  tuning = [Tuning((1e-3, 1e-2, 1e-1), (3.0, 1.0, 2.0), 1e-2, True)] * TASKS
  evaluations = comparison.evaluate(everyone, {"Adam": tuning, "Lion": tuning}, envelope, T)
  return Comparison(
    tasks=("a < b", "b", "c"),
    num_steps=T,
    num_seeds=SEEDS,
    num_tuning_seeds=2,
    tuned_for="final_loss",
    seed=0,
    learned={name: evaluations.pop(name) for name in rates},
    baselines=evaluations,
    envelope=envelope,
    seconds_per_step=dict.fromkeys(everyone, 1e-4) | dict.fromkeys(rates, 2e-4) if timed else {},
  )


ABOUT = report_page.About({"command": "x --y=<z>", "machine": "a computer"}, {"fast": T}, {"fast": {"seed": 7}})


class Reader(HTMLParser):
  """Tables as lists of rows, pictures, the text under each heading, and what refers to other places."""

  def __init__(self, text):
    super().__init__()
    self.tables, self.images, self.links, self.sections, self.tags = [], [], [], {}, []
    self.where, self.in_cell = "", False
    self.feed(text)
    self.close()

  def handle_starttag(self, tag, attrs):
    attributes = dict(attrs)
    self.tags.append(tag)
    self.links += [value for name, value in attrs if name in ("src", "href")]
    if tag == "img":
      self.images.append(attributes["src"])
    elif tag == "table":
      self.tables.append((self.where, []))
    elif tag == "tr":
      self.tables[-1][1].append([])
    elif tag in ("td", "th"):
      self.tables[-1][1][-1].append("")
    self.in_cell = tag in ("td", "th")
    if tag == "h2":
      self.where = None

  def handle_endtag(self, tag):
    if tag == "table":
      self.in_cell = False

  def handle_data(self, data):
    if self.where is None:
      self.where = data
    self.sections[self.where] = self.sections.get(self.where, "") + data
    if self.in_cell:
      self.tables[-1][1][-1][-1] += data.strip()

  def rows(self, section, index=0):
    """A table as dicts."""
    header, *rows = [table for where, table in self.tables if where == section][index]
    return [dict(zip(header, row, strict=True)) for row in rows]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  folder = tmp_path_factory.mktemp("page")
  suites = {
    "near": {"plain": compared({"fast": 2.0, "bad": -0.1})},
    "far": {"other": compared({"fast": 0.7, "bad": 0.3}), "faster": compared({"fast": 9.0, "bad": 0.3})},
  }
  path = report_page.write(suites, folder, ABOUT)
  assert path == folder / "report.html"
  return suites, folder, Reader(path.read_text("utf-8"))


def test_the_page_needs_nothing_else(written):
  _, folder, reader = written
  text = (folder / "report.html").read_text("utf-8")
  assert "http" not in text
  assert "script" not in reader.tags
  assert reader.links
  assert all(link.startswith("data:image/png;base64,") for link in reader.links)
  for picture in reader.images:
    pixels = image.imread(io.BytesIO(base64.b64decode(picture.partition(",")[2])))
    assert pixels.shape[1] > 400
    assert pixels[..., :3].std() > 0.01
  assert len(reader.images) == 1 + 3  # the summary, and curves of each family
  assert (folder / "summary.png").read_bytes() == base64.b64decode(reader.images[0].partition(",")[2])


def test_it_has_everybody_and_every_section(written):
  _, folder, reader = written
  assert list(reader.sections)[1:] == [
    "Over all 9 tasks",
    "Beyond the training horizon",
    "Failures",
    "near",
    "far",
    "How this was made",
  ]
  text = (folder / "report.html").read_text("utf-8")
  for words in ("x --y=&lt;z&gt;", "a computer", "1: a &lt; b", "&quot;seed&quot;: 7", "plain", "other", "faster"):
    assert words in text
  names = [row["optimizer"] for row in reader.rows("Over all 9 tasks")]
  assert names == ["fast", "bad", "Adam", "Adam at 1e-3", "Lion"]
  assert [row["optimizer"] for row in reader.rows("far", 1)] == names


def test_its_numbers_are_those_of_the_measures(written):
  suites, _, reader = written
  everything = [c for members in suites.values() for c in members.values()]
  fast = reader.rows("Over all 9 tasks")[0]
  speed_ups = sorted(m.speed_up for c in everything for m in c.learned["fast"].measures)
  assert fast["speed-up"].startswith(f"{np.mean(speed_ups[2:-2]):.3g} (")
  assert fast["median"] == f"{speed_ups[4]:.3g}"
  assert fast["speed-up"].endswith(", 3 of 9 ≥")  # those of `faster`, where Adam takes 9 times as long
  assert fast["time per step ÷ Adam's"] == "2.00×"
  assert fast["wall-clock speed-up"] == f"{np.mean(speed_ups[2:-2]) / 2:.2f}×"
  # exp(-2 r t) against exp(-r t): where smoothing makes no difference, Adam takes twice as long.
  near = reader.rows("near")[0]
  assert float(near["speed-up"].split()[0]) == pytest.approx(2, rel=0.03)
  each = reader.rows("near", 1)
  assert [row["task"] for row in each] == ["1: a < b", "2: b", "3: c"]
  assert each[0]["Adam (learning rate)"].endswith("(0.01)")


def test_failures_are_told(written):
  _, _, reader = written
  text = " ".join(reader.sections["Failures"].split())
  assert (
    "fast: of 9 tasks it diverges on 0, ends worse than tuned Adam on 3, ends worse than Adam at 1e-3 on 0" in text
  )
  assert (
    "bad: of 9 tasks it diverges on 3, ends worse than tuned Adam on 9, ends worse than Adam at 1e-3 on 9" in text
  )
  failures = reader.rows("Failures")
  assert [row["task"] for row in failures] == ["far / other 1: a < b", "far / other 2: b", "far / other 3: c"]
  assert {row["what"] for row in failures} == {"ends worse than tuned Adam"}


def test_without_failures_the_section_says_so():
  page = report_page.page({"near": {"plain": compared({"fast": 2.0}, timed=False)}}, ABOUT, b"")
  text = " ".join(Reader(page).sections["Failures"].split())
  assert text.startswith("Failures fast: of 3 tasks it diverges on 0, ends worse than tuned Adam on 0")
  assert not [table for where, table in Reader(page).tables if where == "Failures"]
  assert "time per step" not in Reader(page).rows("near")[0]


def test_runs_longer_than_those_of_meta_training_have_a_section(written):
  suites, _, reader = written
  assert (
    "Not measured here for fast, which was meta-trained on runs of up to 40 steps"
    in reader.sections["Beyond the training horizon"]
  )
  assert "Not measured here for bad" in reader.sections["Beyond the training horizon"]
  about = ABOUT._replace(horizons={"fast": 16, "bad": T})
  (row,) = Reader(report_page.page({"near": suites["near"]}, about, b"")).rows("Beyond the training horizon")
  assert (row["optimizer"], row["tasks"]) == ("fast", "near / plain")
  assert (row["trained on up to"], row["steps here"]) == ("16", "40 (2.5×)")
  assert row["speed-up"] == reader.rows("near")[0]["speed-up"]


def refuse_constant(name):
  raise AssertionError(f"{name} is not JSON")


def test_the_same_numbers_are_in_json(written):
  suites, folder, _ = written
  content = json.loads((folder / "report.json").read_text("utf-8"), parse_constant=refuse_constant)
  assert content["about"]["facts"] == ABOUT.facts
  assert list(content["suites"]) == ["near", "far"]
  assert list(content["suites"]["far"]["families"]) == ["other", "faster"]
  near = suites["near"]["plain"]
  there = content["suites"]["near"]["families"]["plain"]["optimizers"]["fast"]
  assert [m["speed_up"] for m in there["measures"]] == [m.speed_up for m in near.learned["fast"].measures]
  assert there["seconds_per_step"] == 2e-4
  everything = [c for members in suites.values() for c in members.values()]
  expected = comparison.summarize(everything, "bad").speed_up
  assert content["summary"]["bad"]["speed_up"] == pytest.approx(expected._asdict())


def test_the_summary_plot_shows_means_intervals_and_tasks(written):
  suites, _, _ = written
  (axes,) = report_page.summary_plot(suites).axes
  assert [label.get_text() for label in axes.get_yticklabels()] == ["near", "far"]
  dots = {line.get_label(): line for line in axes.lines if line.get_marker() == "o"}
  assert {"fast", "bad", "Adam, tuned"} <= dots.keys()
  expected = comparison.summarize([suites["near"]["plain"]], "fast").speed_up
  assert np.asarray(dots["fast"].get_xdata()) == pytest.approx([expected.value])
  lines = [np.asarray(line.get_xdata()) for line in axes.lines if line.get_color() == "#D55E00"]
  lines = [x for x in lines if len(x) == 2]
  assert any(list(x) == pytest.approx([expected.low, expected.high]) for x in lines)
  (one,) = report_page.summary_plot({"far": suites["far"]}).axes
  assert [label.get_text() for label in one.get_yticklabels()] == ["other", "faster"]
  assert re.match("speed-up over Adam", axes.get_xlabel())
