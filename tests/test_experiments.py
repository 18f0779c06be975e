"""The two scripts as their users run them: in a process of their own, killed, continued, misused."""

import json
import os
import re
import shutil
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


@pytest.mark.slow
@pytest.mark.parametrize("patience", [pytest.param(0.0, marks=pytest.mark.long), 0.4, 1.1])
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


@pytest.mark.slow
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
  result = run(evaluate(f"--optimizer={workdir}", f"--output={workdir}"), environment, tmp_path)
  assert fails_with(result, f"--output: {workdir} is a work directory")


@pytest.mark.slow
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


@pytest.mark.slow
def test_suites_and_baselines_that_are_not_there_are_refused(finished, environment, tmp_path):
  workdir, _ = finished
  flags = [f"--optimizer={workdir}", "--suite=loss,size", "--notiming", "--baselines=adamw", "--cache="]
  result = run(evaluate(*flags, "--suite=nonsense"), environment, tmp_path)
  assert fails_with(result, "suite: no 'nonsense'; there are: fresh, data, ")
  result = run(evaluate(*flags, "--suite=size", "--baselines=adamm"), environment, tmp_path)
  assert fails_with(result, "--baselines: no 'adamm'; there are: adamw, nadamw, .*, all")
  config = f"--config={ROOT}/experiments/configs/quadratics.py"
  result = run(evaluate(*flags, config), environment, tmp_path)
  assert fails_with(result, "--suite: brings its own tasks; leave --config out")


@pytest.mark.long
def test_suites_are_on_one_page(finished, environment, tmp_path):
  workdir, _ = finished
  flags = [f"--optimizer={workdir}", "--suite=horizon,reparametrized", "--notiming", "--baselines=adamw", "--cache="]
  flags += ["--num_tasks=1", "--num_seeds=1", "--num_steps=2", "--output=out"]
  result = run(evaluate(*flags), environment, tmp_path)
  assert result.returncode == 0, result.stderr
  content = json.loads((tmp_path / "out" / "report.json").read_text())
  families = content["families"]
  names = ["horizon: 25_times", "horizon: 5_times", "reparametrized: cnn", "reparametrized: mlp"]
  assert sorted(families) == names
  tasks = [families[name]["tasks"] for name in names[:2]]
  assert tasks[0] != tasks[1]  # the same family twice, with a seed for each
  assert not (tmp_path / "runs").exists()


def fails_with(result, line):
  """The run ended with this one line, after nothing that looks like a traceback."""
  assert result.returncode != 0
  assert re.search(line, result.stderr.strip().splitlines()[-1]), result.stderr
  assert "Traceback" not in result.stderr
  return True


@pytest.mark.slow_but_for("changes0", "changes5", "changes8")
@pytest.mark.parametrize(
  ("changes", "line"),
  [
    ({"estimator.sigma": "much"}, "sigma"),
    ({"estimator.num_pairs": 0}, r"config\.estimator: num_pairs: must be at least 1, not 0"),
    ({"estimator.unroll_length": -5}, r"config\.estimator: unroll_length: must be at least 1, not -5"),
    ({"horizon.minimum": 0}, r"config\.horizon: .*1 <= minimum <= maximum"),
    ({"meta_loss": "test"}, r"config\.meta_loss: 'test' is not one of 'train', 'validation'"),
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


@pytest.mark.slow
def test_a_work_directory_of_another_configuration_is_refused(finished, environment, meta_train, tmp_path):
  workdir, _ = finished
  sigma: dict = {"estimator.sigma": 0.5}
  result = run(meta_train(workdir, **sigma), environment, tmp_path)
  assert fails_with(
    result, r"another configuration: estimator\.sigma: \S+ \(there\) != 0\.5 \(here\); use another workdir"
  )


@pytest.mark.slow
def test_checkpoints_without_their_configuration_are_refused(finished, environment, meta_train, tmp_path):
  workdir, _ = finished
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "checkpoints").symlink_to(workdir / "checkpoints")
  result = run(meta_train(tmp_path / "run"), environment, tmp_path)
  assert fails_with(result, r"has checkpoints and no config\.json")


@pytest.mark.slow
def test_optimizers_of_one_name_and_none_are_refused(finished, environment, tmp_path):
  workdir, _ = finished
  result = run(evaluate(f"--optimizer={workdir},{workdir}"), environment, tmp_path)
  assert fails_with(result, "two would have the same name in tables: run, run")
  result = run(evaluate("--optimizer="), environment, tmp_path)
  assert fails_with(result, "--optimizer: names none")
  result = run(evaluate(f"--optimizer={workdir}", "stray"), environment, tmp_path)
  assert fails_with(result, "unexpected argument: stray")


@pytest.mark.slow
def test_foreign_optimizers_are_refused(environment, tmp_path):
  result = run(evaluate(f"--optimizer={tmp_path}"), environment, tmp_path)
  assert fails_with(result, "no such file; expected a trained optimizer")
  (tmp_path / "noise.safetensors").write_bytes(bytes(range(256)))
  result = run(evaluate(f"--optimizer={tmp_path}/noise.safetensors"), environment, tmp_path)
  assert fails_with(result, "damaged, or not a safetensors file")


def start_and_wait_for(path, command, environment, folder):
  """A process that has written `path`."""
  process = subprocess.Popen(command, env=environment, cwd=folder, stderr=subprocess.PIPE, text=True)
  deadline = time.monotonic() + 200
  while not path.exists():
    assert process.poll() is None, process.communicate()[1]
    assert time.monotonic() < deadline
    time.sleep(0.02)
  return process


def assert_the_same(workdir, other):
  """θ bit for bit, and the metrics of the same steps."""
  expected, theta = (safetensors.numpy.load_file(x / "optimizer.safetensors") for x in (workdir, other))
  assert expected.keys() == theta.keys()
  for name, array in expected.items():
    np.testing.assert_array_equal(theta[name], array, err_msg=name)
  lines = [
    [json.loads(line) | {"inner_steps_per_second": 0} for line in (x / "metrics.jsonl").read_text().splitlines()]
    for x in (workdir, other)
  ]
  assert lines[0] == lines[1]


@pytest.mark.slow
def test_a_run_is_alone_stops_on_sigterm_and_goes_on_past_a_damaged_checkpoint(
  finished, environment, meta_train, tmp_path
):
  workdir, _ = finished
  here = tmp_path / "run"
  process = start_and_wait_for(here / "checkpoints" / "8", meta_train(here), environment, tmp_path)
  process.send_signal(signal.SIGSTOP)  # so that it cannot end before the second looks
  before = (here / "metrics.jsonl").read_bytes()
  result = run(meta_train(here), environment, tmp_path)
  assert fails_with(result, rf"run: in use by process {process.pid} on \S+; wait for it or stop it")
  assert (here / "metrics.jsonl").read_bytes() == before
  process.send_signal(signal.SIGCONT)
  process.send_signal(signal.SIGTERM)
  _, errors = process.communicate(timeout=60)
  assert process.returncode == 143, errors
  (line,) = re.findall(r"^meta_train\.py: stopped by SIGTERM.*$", errors, re.M)
  assert line.endswith("; the same command continues from the last checkpoint")
  assert "Traceback" not in errors
  steps = sorted(int(path.name) for path in (here / "checkpoints").iterdir())
  if found := re.search(r"after outer step (\d+) of 60", line):
    assert steps[-1] == int(found[1])

  for path in [path for path in (here / "checkpoints" / str(steps[-1])).rglob("*") if path.is_file()]:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  result = run(meta_train(here), environment, tmp_path)
  assert result.returncode == 0, result.stderr
  assert f"going on from step {steps[-2]}" in result.stderr
  assert_the_same(workdir, here)


def test_a_run_that_ended_says_whether_anything_was_gained(finished):
  _, output = finished
  assert re.search(r"On the evaluation tasks the mean training loss was [\d.]+ before meta-training and is", output)


@pytest.mark.slow
def test_a_dead_run_stops_with_one_line(environment, meta_train, tmp_path):
  changes: dict = {"outer_optimizer.learning_rate": 1e4, "outer_optimizer.warmup_steps": 0, "estimator.sigma": 50.0}
  result = run(meta_train(tmp_path / "run", "--max_dead_steps=20", **changes), environment, tmp_path)
  assert fails_with(result, r"outer step \d+: every .* in the last 2[01] outer steps, and nothing is learned")
  assert result.returncode == 1
  assert not (tmp_path / "run" / "optimizer.safetensors").exists()
  records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert records[-1]["dead_steps"] in (20, 21)  # of two outer steps at a time
  assert re.search(r"NOTHING LEARNED for \d+ steps", result.stderr)


@pytest.mark.long
def test_a_dead_run_that_goes_on_says_that_nothing_was_gained(environment, meta_train, tmp_path):
  changes: dict = {"outer_optimizer.learning_rate": 1e4, "outer_optimizer.warmup_steps": 0, "estimator.sigma": 50.0}
  result = run(meta_train(tmp_path / "run", "--max_dead_steps=0", **changes), environment, tmp_path)
  assert result.returncode == 0, result.stderr
  assert re.search(r"the last \d+ outer steps had nothing to learn from", result.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["limit", "full"])
def test_a_full_disk_ends_a_run_with_one_line_and_nothing_is_lost(finished, environment, meta_train, tmp_path, kind):
  """By a limit on the size of files, and on a small file system that is really full (in a mount namespace)."""
  workdir, _ = finished
  here = tmp_path / "run"
  process = start_and_wait_for(here / "checkpoints" / "4", meta_train(here), environment, tmp_path)
  process.kill()
  process.communicate()
  if kind == "limit":
    size = (here / "metrics.jsonl").stat().st_size + 2000  # a few lines
    limit = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, 2 * (int(sys.argv[1]),)); "
    command = [sys.executable, "-c", limit + "os.execv(sys.argv[2], sys.argv[2:])", str(size), *meta_train(here)]
  else:
    size = sum(path.stat().st_size + 4096 for path in here.rglob("*") if path.is_file()) + 120_000
    script = f'mount -t tmpfs -o size={size} tmpfs "$0" && cp -r "$1" "$0/run" && shift && "$@"; code=$?; '
    script += 'rm -rf "$KEEP" && cp -r "$0/run" "$KEEP"; exit $code'
    (tmp_path / "small").mkdir()
    command = ["unshare", "-Urm", "sh", "-c", script, "small", str(here), *meta_train("small/run")]
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode:
      pytest.skip("this system has no mount namespaces for its users")
  result = subprocess.run(
    command,
    env={**environment, "KEEP": str(here)},
    cwd=tmp_path,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert result.returncode == 1, result.stderr
  line = [line for line in result.stderr.splitlines() if line.startswith("meta_train.py: ")][-1]
  assert re.search("cannot (be )?writ(e|ten).*(no space left on the disk|file size limit|too large)", line), line
  assert "Traceback" not in result.stderr
  result = run(meta_train(here), environment, tmp_path)  # with space again
  assert result.returncode == 0, result.stderr
  assert_the_same(workdir, here)


@pytest.mark.slow_but_for("file")
@pytest.mark.parametrize("kind", ["file", "above", "checkpoints", "read-only"])
def test_a_work_directory_that_cannot_be_is_refused_in_one_line(environment, meta_train, tmp_path, kind):
  here, prefix = tmp_path / "run", []
  if kind == "file":
    here.write_text("mine")
  elif kind == "above":
    here.write_text("mine")
    here = here / "inside"
  elif kind == "checkpoints":
    here.mkdir()
    (here / "checkpoints").write_text("mine")
  else:
    here.mkdir(mode=0o555)
    if os.geteuid() == 0:  # who may write everywhere, unless this is taken away
      if shutil.which("setpriv") is None:
        pytest.skip("as root it needs setpriv, of util-linux")
      prefix = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"]
  result = subprocess.run(
    [*prefix, *meta_train(here)], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
  )
  expected = "Permission denied" if kind == "read-only" else "a file is where .* should be"
  assert fails_with(result, expected)
  assert len(result.stderr.strip().splitlines()) == 1
  if kind in ("file", "above"):
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.long
def test_a_work_directory_removed_during_the_run_and_an_empty_metrics_file(
  finished, environment, meta_train, tmp_path
):
  here = tmp_path / "run"
  process = start_and_wait_for(here / "checkpoints" / "4", meta_train(here), environment, tmp_path)
  process.send_signal(signal.SIGSTOP)
  shutil.copytree(here, tmp_path / "copy")
  shutil.rmtree(here)
  process.send_signal(signal.SIGCONT)
  _, errors = process.communicate(timeout=60)
  assert process.returncode == 1
  assert re.search(r"^meta_train\.py: .*cannot (write|be written).*run/", errors, re.M), errors
  (tmp_path / "copy" / "metrics.jsonl").write_text("")
  result = run(meta_train(tmp_path / "copy"), environment, tmp_path)
  assert result.returncode == 0, result.stderr
  expected, theta = (
    safetensors.numpy.load_file(x / "optimizer.safetensors") for x in (finished[0], tmp_path / "copy")
  )
  for name, array in expected.items():
    np.testing.assert_array_equal(theta[name], array, err_msg=name)
