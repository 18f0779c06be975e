"""The two scripts as their users run them: in a process of their own, killed, continued, misused."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import lopt

ROOT = Path(__file__).parent.parent


def evaluate(*flags):
  return [sys.executable, str(ROOT / "experiments" / "evaluate.py"), *flags]


def run(arguments, environment, folder):
  return subprocess.run(arguments, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def finished(environment, meta_train, tmp_path_factory):
  """A run from beginning to end."""
  folder = tmp_path_factory.mktemp("run")
  result = run(meta_train(folder / "run"), environment, folder)
  assert result.returncode == 0, result.stderr
  return folder / "run", result.stdout


def test_a_run_leaves_what_it_promises(finished):
  workdir, output = finished
  assert re.search(
    r"learned, (with each task's best learning rate, )?over 2 held-out tasks: to the loss that it ends with, tuned ",
    output,
  )
  assert output.rstrip().endswith(
    f"The trained optimizer is {workdir}/optimizer.safetensors; use it with "
    f'lopt.load("{workdir}/optimizer.safetensors")(num_steps=...).'
  )
  records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert [r["step"] for r in records if "meta_loss" in r] == list(range(2, 61, 2))
  assert [r["step"] for r in records if "evaluation/mean_loss" in r] == [0, 30, 60]
  assert {"gradient_norm", "gradient_standard_error", "update_norm", "diverged", "inner_steps_per_second"} <= set(
    records[-2]
  )
  families = json.loads((workdir / "comparison.json").read_text())["families"]
  assert families["quadratic"]["optimizers"]["learned"]["role"] == "learned"
  assert (workdir / "comparison.png").read_bytes().startswith(b"\x89PNG")
  assert (workdir / "training.png").read_bytes().startswith(b"\x89PNG")
  theta = lopt.load(workdir).theta
  stored = safetensors.numpy.load_file(workdir / "optimizer.safetensors")
  np.testing.assert_array_equal(theta["layer_0"]["w"], stored["layer_0/w"])


@pytest.mark.parametrize("patience", [0.0, 0.4, 1.1])
def test_a_killed_run_continues_bit_for_bit(finished, environment, meta_train, tmp_path, patience):
  """Killed by -9 some time after the first checkpoint, wherever it hits; then the same command again."""
  workdir, _ = finished
  process = subprocess.Popen(
    meta_train(tmp_path / "run"), env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
  )
  deadline = time.monotonic() + 200
  while not (tmp_path / "run" / "checkpoints" / "4").exists():
    assert process.poll() is None
    assert time.monotonic() < deadline
    time.sleep(0.02)
  time.sleep(patience)
  process.send_signal(signal.SIGKILL)
  process.wait()
  result = run(meta_train(tmp_path / "run"), environment, tmp_path)
  assert result.returncode == 0, result.stderr
  expected, theta = (safetensors.numpy.load_file(x / "optimizer.safetensors") for x in (workdir, tmp_path / "run"))
  assert expected.keys() == theta.keys()
  for name, array in expected.items():
    np.testing.assert_array_equal(theta[name], array, err_msg=name)
  steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  expected = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert steps == expected


def test_a_trained_optimizer_is_evaluated_again(finished, environment, tmp_path):
  """With the same settings the numbers are those of the run; with others, other runs."""
  workdir, _ = finished
  flags = [f"--optimizer={workdir}", f"--output={tmp_path}/again"]
  result = run(evaluate(*flags), environment, tmp_path)
  assert result.returncode == 0, result.stderr
  before = json.loads((workdir / "comparison.json").read_text())["families"]["quadratic"]["optimizers"]
  families = json.loads((tmp_path / "again" / "report.json").read_text())["families"]
  after = families["held-out tasks: quadratic"]["optimizers"]
  assert after[workdir.name]["final_losses"] == before["learned"]["final_losses"]
  assert after["AdamW"]["final_losses"] == before["AdamW"]["final_losses"]
  assert after["AdamW"]["seconds_per_step"] > 0
  longer = families["longer runs: quadratic, 5 times as long"]
  assert longer["num_steps"] == 50
  assert f"The page is {tmp_path}/again/report.html" in result.stdout
  page = (tmp_path / "again" / "report.html").read_text("utf-8")
  assert "50 (2.5×)" in page  # beyond the horizon of 20
  assert sum("speed_up" in line for line in (tmp_path / "again" / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_second_evaluation_trains_nothing_again(finished, environment, tmp_path):
  """But a baseline that was not there before; on a suite of one's own choosing, all on one page."""
  workdir, _ = finished
  flags = [
    f"--optimizer={workdir}",
    f"--config={ROOT}/experiments/configs/quadratics.py",
    "--notiming",
    "--num_tasks=1",
  ]
  flags += ["--num_seeds=1", "--num_steps=5"]
  stages = []
  for baselines in ("lion", "lion", "lion,nadamw"):
    result = run(evaluate(*flags, f"--baselines={baselines}", "--output=out"), environment, tmp_path)
    assert result.returncode == 0, result.stderr
    stages.append(re.findall(r"quadratic: ([^:]+): 1 tasks × 1 seeds", result.stdout))
  assert stages == [[workdir.name, "AdamW", "Lion"], [], ["NAdamW"]]
  assert list((tmp_path / "runs" / "evaluation").iterdir())
  assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
    "learning_rates.png",
    "metrics.jsonl",
    "report.html",
    "report.json",
    "summary.png",
  ]


def test_suites_and_baselines_that_are_not_there_are_refused(finished, environment, tmp_path):
  workdir, _ = finished
  flags = [f"--optimizer={workdir}", "--suite=loss,size", "--notiming", "--baselines=adamw", "--cache="]
  result = run(evaluate(*flags, "--suite=nonsense"), environment, tmp_path)
  assert fails_with(result, "--suite: no 'nonsense'; there are: architecture, data, .*, all")
  result = run(evaluate(*flags, "--suite=size", "--baselines=adamm"), environment, tmp_path)
  assert fails_with(result, "--baselines: no 'adamm'; there are: adamw, nadamw, .*, all")
  config = f"--config={ROOT}/experiments/configs/quadratics.py"
  result = run(evaluate(*flags, config), environment, tmp_path)
  assert fails_with(result, "--suite: brings its own tasks; leave --config out")


@pytest.mark.slow
def test_suites_are_on_one_page(finished, environment, tmp_path):
  workdir, _ = finished
  flags = [f"--optimizer={workdir}", "--suite=horizon,reparametrized", "--notiming", "--baselines=adamw", "--cache="]
  flags += ["--num_tasks=1", "--num_seeds=1", "--num_steps=2", "--output=out"]
  result = run(evaluate(*flags), environment, tmp_path)
  assert result.returncode == 0, result.stderr
  content = json.loads((tmp_path / "out" / "report.json").read_text())
  assert {name: sorted(x["families"]) for name, x in content["suites"].items()} == {
    "horizon": ["25_times", "5_times"],
    "reparametrized": ["cnn", "mlp"],
  }
  tasks = [x["tasks"] for x in content["suites"]["horizon"]["families"].values()]
  assert tasks[0] != tasks[1]  # the same family twice, with a seed for each
  assert not (tmp_path / "runs").exists()


def fails_with(result, line):
  """The run ended with this one line, after nothing that looks like a traceback."""
  assert result.returncode != 0
  assert re.search(line, result.stderr.strip().splitlines()[-1]), result.stderr
  assert "Traceback" not in result.stderr
  return True


@pytest.mark.parametrize(
  ("changes", "line"),
  [
    ({"estimator.sigma": "much"}, "sigma"),
    ({"estimator.num_pairs": 0}, r"config\.estimator: num_pairs: must be at least 1, not 0"),
    ({"estimator.unroll_length": -5}, r"config\.estimator: unroll_length: must be at least 1, not -5"),
    ({"horizon.minimum": 0}, r"config\.horizon: .*1 <= minimum <= maximum"),
    ({"meta_loss": "test"}, r"config\.meta_loss: 'test' is not one of 'train', 'validation'"),
    ({"num_outer_steps": 61}, r"num_outer_steps: must be a multiple of log_every=2, not 61"),
    ({"architecture.name": "mpl"}, r"config\.architecture\.name: .*did you mean 'mlp'\?.*lstm, mlp"),
    ({"architecture.name": ".x"}, r"config\.architecture\.name: '\.x' is not the name of a module"),
    (
      {"objective": "final_loss", "late_power": 2.0},
      r"config: late_power: must be 0 where objective is 'final_loss'",
    ),
    ({"seed": 10**23}, r"config: seed: must be in 0\.\.4294967295"),
    ({"outer_optimizer.learning_rate": "inf"}, r"learning_rate: must be above 0 and finite, not inf"),
    ({"sedd": 1}, "sedd"),
    ({"task.dimenson": 1}, "dimenson"),
  ],
)
def test_bad_configurations_are_refused_in_one_line(environment, meta_train, tmp_path, changes, line):
  result = run(meta_train(tmp_path / "run", **changes), environment, tmp_path)
  assert fails_with(result, line)
  assert not (tmp_path / "run").exists()


def test_a_missing_data_set_is_refused_in_one_line(environment, meta_train, tmp_path):
  """As for a user without a network who has no files."""
  isolated = {name: value for name, value in environment.items() if name != "LOPT_MANUAL_DIR"}
  isolated |= {
    "HTTPS_PROXY": "http://127.0.0.1:9",
    "HTTP_PROXY": "http://127.0.0.1:9",
    "ALL_PROXY": "http://127.0.0.1:9",
  }
  begun = time.monotonic()
  result = run(meta_train(tmp_path / "run", config="fashion_mnist.py"), isolated, tmp_path)
  assert fails_with(result, r"LOPT_MANUAL_DIR")
  assert time.monotonic() - begun < 60


def test_a_work_directory_of_another_configuration_is_refused(finished, environment, meta_train, tmp_path):
  workdir, _ = finished
  sigma: dict = {"estimator.sigma": 0.5}
  result = run(meta_train(workdir, **sigma), environment, tmp_path)
  assert fails_with(
    result, r"another configuration: estimator\.sigma: \S+ \(there\) != 0\.5 \(here\); use another --workdir"
  )


def test_checkpoints_without_their_configuration_are_refused(finished, environment, meta_train, tmp_path):
  workdir, _ = finished
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "checkpoints").symlink_to(workdir / "checkpoints")
  result = run(meta_train(tmp_path / "run"), environment, tmp_path)
  assert fails_with(result, r"has checkpoints and no config\.json")


def test_optimizers_of_one_name_and_none_are_refused(finished, environment, tmp_path):
  workdir, _ = finished
  result = run(evaluate(f"--optimizer={workdir},{workdir}"), environment, tmp_path)
  assert fails_with(result, "two would have the same name in tables: run, run")
  result = run(evaluate("--optimizer="), environment, tmp_path)
  assert fails_with(result, "--optimizer: names none")
  result = run(evaluate(f"--optimizer={workdir}", "stray"), environment, tmp_path)
  assert fails_with(result, "unexpected argument: stray")


def test_foreign_optimizers_are_refused(environment, tmp_path):
  result = run(evaluate(f"--optimizer={tmp_path}"), environment, tmp_path)
  assert fails_with(result, "no such file; expected a trained optimizer")
  (tmp_path / "noise.safetensors").write_bytes(bytes(range(256)))
  result = run(evaluate(f"--optimizer={tmp_path}/noise.safetensors"), environment, tmp_path)
  assert fails_with(result, "damaged, or not a safetensors file")
