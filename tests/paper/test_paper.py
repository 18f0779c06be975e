"""What the paper's experiments share: training from several seeds, the record, the page, the script that runs all."""

import html.parser
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import optax
import pytest

from lopt import base, configuration
from lopt.outer import pes

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "experiments" / "paper"


paper = configuration.load(FOLDER / "paper.py")


# train


def linear_problem():
  def step(theta, state, key):
    state = 0.9 * state + theta["a"] + 0.1 * jax.random.normal(key, (2,))
    return state, jnp.sum(jnp.square(state - 1)) + jnp.sum(jnp.square(theta["b"]))

  horizon = lambda key: jax.random.randint(key, (), 3, 9)
  return base.UnrolledProblem(horizon, lambda key, horizon: jax.random.normal(key, (2,)), step)


def init_theta(key) -> base.Theta:
  return {"a": jax.random.normal(key, (2,)), "b": jnp.ones(())}


@pytest.mark.slow
def test_train_equals_a_plain_loop():
  estimator = pes.build(linear_problem(), num_pairs=3, sigma=0.1, unroll_length=4)
  optimizer = optax.adam(0.05)
  trained = paper.train(estimator, optimizer, init_theta, num_steps=12, num_records=3, num_seeds=2, seed=5)
  assert trained.theta["a"].shape == (2, 4, 2)

  for i, key in enumerate(jax.random.split(jax.random.key(5), 2)):
    theta_key, particles_key, key = jax.random.split(key, 3)
    theta = init_theta(theta_key)
    optimizer_state, particles = optimizer.init(theta), estimator.init(particles_key, theta)
    estimate = jax.jit(estimator.estimate)
    thetas, gradients, metrics = [theta], [], []
    for outer_step in range(12):
      gradient, particles, measured = estimate(jax.random.fold_in(key, outer_step), theta, particles)
      updates, optimizer_state = optimizer.update(gradient, optimizer_state, theta)
      theta = optax.apply_updates(theta, updates)
      thetas.append(theta)
      gradients.append(gradient)
      metrics.append(measured)
    for name in ("a", "b"):
      expected = [thetas[n][name] for n in (0, 4, 8, 12)]
      np.testing.assert_allclose(trained.theta[name][i], expected, rtol=1e-4, atol=1e-6)
      expected = [np.mean([g[name] for g in gradients[n : n + 4]], axis=0) for n in (0, 4, 8)]
      np.testing.assert_allclose(trained.gradient[name][i], expected, rtol=1e-4, atol=1e-5)
    for name, recorded in trained.metrics.items():
      expected = [np.mean([m[name] for m in metrics[n : n + 4]]) for n in (0, 4, 8)]
      np.testing.assert_allclose(recorded[i], expected, rtol=1e-4)
    np.testing.assert_array_equal(trained.meta_loss[i], trained.metrics["meta_loss"][i])
    # 3 pairs × 2 particles × 4 steps a window, 4 windows a record.
    np.testing.assert_array_equal(trained.inner_steps[i], [96, 192, 288])


@pytest.mark.parametrize(
  ("counts", "message"),
  [
    ({"num_steps": 10, "num_records": 4, "num_seeds": 1}, "num_steps=10: must be a multiple of num_records=4"),
    ({"num_steps": 4, "num_records": 4, "num_seeds": 0}, "num_seeds: must be at least 1, not 0"),
  ],
)
def test_train_names_the_count_that_is_wrong(counts, message):
  estimator = pes.build(linear_problem(), num_pairs=1)
  with pytest.raises(ValueError, match=message):
    paper.train(estimator, optax.sgd(0.1), init_theta, **counts)


# Numbers


def test_mean_and_error_has_two_digits_of_the_error():
  # Standard deviation 1, √4 values: 0.5.
  assert paper.mean_and_error(10 + np.sqrt(3) / 2 * np.array([1, -1, 1, -1])) == "10.00 ± 0.50"
  assert paper.mean_and_error([1000.0, 1200.0, 1100.0]) == "1100 ± 58"
  assert paper.mean_and_error([1e-8, 2e-8, 3e-8]) == "(2.00 ± 0.58)e-8"
  assert paper.mean_and_error([0.5]) == "0.5"
  assert paper.mean_and_error([2.0, 2.0]) == "2"
  assert paper.mean_and_error([1.0, np.nan]) == "nan"


def test_lower_wants_two_standard_errors_of_the_difference():
  a = np.array([-1.0, 1.0, -1.0, 1.0])  # variance 4/3, of the mean 1/3; of a difference of two such means 2/3
  error = np.sqrt(2 / 3)
  assert paper.lower(a, a + 2.01 * error)
  assert not paper.lower(a, a + 1.99 * error)
  assert not paper.lower(a + 2.01 * error, a)
  assert not paper.lower(a, a * np.nan)


# The page


class Validator(html.parser.HTMLParser):
  """Every element is closed, in order, but for those that HTML has no end tags for, or lets one omit."""

  def __init__(self):
    super().__init__()
    self.open, self.text, self.ids, self.links, self.images = [], [], [], [], []

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    self.ids += [attrs["id"]] if "id" in attrs else []
    self.links += [attrs["href"]] if "href" in attrs else []
    self.images += [attrs["src"]] if tag == "img" else []
    if tag not in ("meta", "img", "br"):
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text.append(data)


def read_page(path):
  validator = Validator()
  validator.feed(path.read_text("utf-8"))
  validator.close()
  assert validator.open == []
  return validator


def result(number, *, holds, **changes):
  return {
    "number": number,
    "title": f"Title {number} <&>",
    "paper_says": "PES < ES",
    "command": "python experiments/paper/a.py",
    "scale": "quick",
    "settings": {"sigma": 0.1, "sizes": [1, 2]},
    "verdict": "PES 1 < ES 2",
    "holds": holds,
    "table": [["estimator", "loss"], ["PES", "<1"]],
    "remarks": "",
    "seconds": 61,
    "machine": "2 × cpu",
    "date": "2021-07-18 12:00",
    **changes,
  }


def test_page_has_all_results_in_order(tmp_path):
  for name, x in {"b": result(1, holds=True), "a": result(2, holds=False, remarks="Not <b>quite</b>.")}.items():
    (tmp_path / name).mkdir()
    (tmp_path / name / "result.json").write_text(json.dumps(x))
  page = read_page(paper.write_page(tmp_path))
  text = "".join(page.text)
  assert [x for x in page.ids if x in "ab"] == ["b", "a"]
  assert [x for x in page.links if x.startswith("#")] == ["#b", "#a"]
  assert page.images == ["b/figure.png", "a/figure.png"]
  assert "Title 1 <&>" in text
  assert "Not <b>quite</b>." in text
  assert "2 experiments" in text
  assert "1 of them as in the paper" in text
  assert "sigma" in text


def test_page_without_results_is_a_page(tmp_path):
  assert "0 experiments" in "".join(read_page(paper.write_page(tmp_path)).text)


# Scripts

SCRIPT = """
from typing import NamedTuple
import matplotlib.pyplot as plt
import paper

class Settings(NamedTuple):
  holds: bool
  names: tuple = ("<a>", "b")
  seed: int = 0

def run(settings):
  if settings.holds is None:
    raise ValueError("names: must be others")
  figure, axes = plt.subplots(figsize=(4, 3))
  axes.plot([0, 1])
  return paper.Finding(figure, "1 < 2", settings.holds, [("x", "y"), ("1", "2")])

paper.main(paper.Experiment(3, "A script", "1 < 2", Settings(HOLDS), Settings(True), run))
"""


@pytest.fixture
def run(tmp_path):
  """Runs a file of `tmp_path` as its user would."""
  environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{FOLDER}", "PYTHONWARNINGS": "error"}

  def run(name, *arguments):
    command = [sys.executable, name, *arguments]
    return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)

  return run


@pytest.mark.parametrize(("holds", "code", "mark"), [(True, 0, "as in the paper"), (False, 1, "NOT as in the paper")])
def test_a_script_leaves_its_result_and_its_verdict(tmp_path, run, holds, code, mark):
  (tmp_path / "script.py").write_text(SCRIPT.replace("HOLDS", str(holds)))
  process = run("script.py", "--workdir=out", "--seed=5")
  assert process.returncode == code, process.stderr
  assert f"1 < 2: {mark}\n" in process.stdout
  written = json.loads((tmp_path / "out" / "script" / "result.json").read_text())
  assert written["holds"] is holds
  assert written["settings"] == {"holds": holds, "names": ["<a>", "b"], "seed": 5}
  assert written["command"] == "python script.py --workdir=out --seed=5"
  height, width, _ = matplotlib.image.imread(tmp_path / "out" / "script" / "figure.png").shape
  assert min(height, width) > 100
  assert read_page(tmp_path / "out" / "index.html").images == ["script/figure.png"]


def test_a_script_that_fails_leaves_nothing_and_says_why(tmp_path, run):
  (tmp_path / "script.py").write_text(SCRIPT.replace("HOLDS", "None"))
  process = run("script.py")
  assert process.returncode == 1
  assert process.stderr.rstrip().endswith("script.py: names: must be others")
  assert not list(tmp_path.rglob("result.json"))


# All of them

FAKE = """
import json, sys
from pathlib import Path
workdir = Path(sys.argv[2].removeprefix("--workdir="))
assert sys.argv[1] == "--scale=full"
if "NAME" == "broken":
  raise SystemExit(1)
(workdir / "NAME").mkdir(parents=True, exist_ok=True)
(workdir / "NAME" / "result.json").write_text(json.dumps({"holds": HOLDS, "verdict": "NAME is so"}))
sys.exit(0 if HOLDS else 1)
"""


def run_all(folder, workdir, names, capfd, monkeypatch):
  for name in names:
    (folder / f"{name}.py").write_text(FAKE.replace("NAME", name).replace("HOLDS", str(name != "refuted")))
  module = configuration.load(FOLDER / "run_all.py")
  monkeypatch.setattr(module, "SCRIPTS", names)
  code = module.run_all(folder, "full", workdir)
  return code, capfd.readouterr().out


def test_run_all_goes_on_after_failures_and_counts_them(tmp_path, capfd, monkeypatch):
  names = ("seen", "broken", "refuted", "last")
  # An old result does not stand for one that the script failed to give.
  (tmp_path / "out" / "broken").mkdir(parents=True)
  (tmp_path / "out" / "broken" / "result.json").write_text('{"holds": true, "verdict": "old"}')
  code, output = run_all(tmp_path, tmp_path / "out", names, capfd, monkeypatch)
  assert code == 1
  summary = output.split("experiment ")[1].splitlines()
  assert [line.split()[:2] for line in summary[1:5]] == [
    ["seen", "yes"],
    ["broken", "FAILED"],
    ["refuted", "NO"],
    ["last", "yes"],
  ]
  assert "last is so" in summary[4]
  assert "old" not in output
  assert output.rstrip().endswith(str(tmp_path / "out" / "index.html"))


def test_run_all_succeeds_if_all_end_whatever_they_find(tmp_path, capfd, monkeypatch):
  code, output = run_all(tmp_path, tmp_path / "out", ("seen", "refuted"), capfd, monkeypatch)
  assert code == 0
  assert re.search(r"^refuted +NO ", output, re.M)


def test_run_all_runs_every_script_in_the_order_of_the_numbers():
  scripts = configuration.load(FOLDER / "run_all.py").SCRIPTS
  others = {"paper", "run_all"}
  assert set(scripts) == {path.stem for path in FOLDER.glob("*.py")} - others
  for number, name in enumerate(scripts, start=1):
    assert f"  number={number},\n" in (FOLDER / f"{name}.py").read_text("utf-8")
