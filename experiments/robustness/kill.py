"""Kills meta-training, evaluation and export at random moments, and compares what comes out with what was not killed.

    python experiments/robustness/kill.py --kills=200

One run of experiments/meta_train.py on small quadratics and an experiments/evaluate.py of it are left alone. Then the
same commands are killed by -9, again and again, at a moment that is uniform over the time that they work, and started
once more, until they end; then the same in another folder. θ must be the same bit for bit, metrics and measures too,
but for speeds. Ends with exit code 1 where they are not. About 8 seconds a kill on one core.
"""

import collections
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from absl import flags

from lopt import command_line

KILLS = flags.DEFINE_integer("kills", 200, "How many, at least.", 1)
SECONDS = flags.DEFINE_float("seconds", float("inf"), "Stop after this time, with fewer kills.")
FOLDER = flags.DEFINE_string("folder", "runs/kill", "Where the runs are; what is there counts, and is gone on with.")

EXPERIMENTS = Path(__file__).parent.parent
SETTINGS = {
  "num_outer_steps": 200,
  "log_every": 2,
  "task.dimension": 4,
  "architecture.hidden_size": 4,
  "estimator.num_pairs": 4,
  "estimator.unroll_length": 5,
  "horizon.minimum": 10,
  "horizon.maximum": 20,
  "outer_optimizer.warmup_steps": 5,
  "periodic_evaluation.every": 50,
  "periodic_evaluation.num_tasks": 2,
  "periodic_evaluation.num_seeds": 1,
  "periodic_evaluation.num_steps": 10,
  "evaluation.num_tasks": 2,
  "evaluation.num_seeds": 2,
  "evaluation.num_steps": 10,
  "checkpoint.every": 10,
}
SPEEDS = {"inner_steps_per_second", "seconds_per_step", "seconds"}


def train(run: Path) -> list[str]:
  config = EXPERIMENTS / "configs" / "quadratics.py"
  fields = [f"--config.{name}={value}" for name, value in SETTINGS.items()]
  return [sys.executable, f"{EXPERIMENTS}/meta_train.py", f"--config={config}", f"--workdir={run}", *fields]


def evaluate(run: Path) -> list[str]:
  flags = [f"--optimizer={run}", f"--cache={run}/cache", "--notiming", "--baselines=sgdm"]
  return [sys.executable, f"{EXPERIMENTS}/evaluate.py", *flags]


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
  environment = {"JAX_COMPILATION_CACHE_DIR": f"{log.parent}/compiled", **os.environ, "WANDB_MODE": "disabled"}
  with log.open("ab") as file:
    return subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)


def lock(run: Path, command: list[str]) -> Path:
  """What is there once the process is past its imports."""
  return run / "evaluation" / ".lock" if "evaluate.py" in command[1] else run / ".lock"


def wait(process: subprocess.Popen[bytes], run: Path, command: list[str]) -> float:
  """Waits until the process works or has ended, and returns the time."""
  while process.poll() is None and not lock(run, command).exists():
    time.sleep(0.005)
  return time.perf_counter()


def phase(run: Path, command: list[str]) -> str:
  """What a process was at, from what it left."""
  if "evaluate.py" in command[1]:
    return "evaluate.py"
  if not (run / "checkpoints" / str(SETTINGS["num_outer_steps"])).exists():
    return "training" if (run / "checkpoints").exists() else "beginning"
  return "comparison" if (run / "optimizer.safetensors").exists() else "export"


def content(value: Any) -> Any:
  """JSON without speeds and dates."""
  if isinstance(value, dict):
    return {name: content(item) for name, item in value.items() if name not in SPEEDS and name != "about"}
  return [content(item) for item in value] if isinstance(value, list) else value


def results(run: Path) -> dict[str, Any]:
  read = lambda path: content(json.loads(path.read_text("utf-8")))
  lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
  suites = read(run / "evaluation" / "report.json")["suites"]
  return {
    "optimizer.safetensors": (run / "optimizer.safetensors").read_bytes(),
    "metrics.jsonl": [content(json.loads(line)) for line in lines],
    "comparison.json": read(run / "comparison.json"),
    "report.json": json.loads(json.dumps(suites).replace(run.name, "RUN")),
  }


def whole_run(folder: Path) -> tuple[dict[str, Any], dict[str, float]]:
  """Results of a run that is left alone, and the seconds that each of its commands works; kept in the folder."""
  path = folder / "seconds.json"
  if not path.exists():
    seconds = {}
    for name in ("warm", "whole"):  # the first compiles
      for make in (train, evaluate):
        command = make(folder / name)
        process = start(command, folder / f"{name}.log")
        tick = wait(process, folder / name, command)
        if process.wait() != 0:
          sys.exit(f"{' '.join(command)} failed; see {folder / name}.log")
        seconds[make.__name__] = time.perf_counter() - tick
    if results(folder / "whole") != results(folder / "warm"):
      sys.exit("two runs that nobody killed differ")
    path.write_text(json.dumps(seconds))
  return results(folder / "whole"), json.loads(path.read_text("utf-8"))


def main(argv: list[str]) -> None:
  del argv
  folder = Path(FOLDER.value).absolute()
  folder.mkdir(parents=True, exist_ok=True)
  begun = time.monotonic()
  expected, seconds = whole_run(folder)
  rng = random.Random()
  record = folder / "kills.txt"
  record.touch()
  count = lambda: len(record.read_text("utf-8").splitlines())
  over = lambda: count() >= KILLS.value or time.monotonic() - begun > SECONDS.value
  different = 0
  while not over():
    run = folder / f"run{len(list(folder.glob('run*.done')))}"
    for make in (train, evaluate):
      command = make(run)
      while True:
        lock(run, command).unlink(missing_ok=True)  # that a killed one left
        process = start(command, folder / f"{run.name}.log")
        wait(process, run, command)
        if not over():
          try:
            process.wait(rng.uniform(0, seconds[make.__name__]))
          except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            with record.open("a", encoding="utf-8") as file:
              file.write(f"{phase(run, command)}\n")
            continue
        if process.wait() != 0:
          sys.exit(f"{run}: exit code {process.returncode} of {' '.join(command)}; see {run}.log")
        break
    found = results(run)
    wrong = [name for name in expected if expected[name] != found[name]]
    different += bool(wrong)
    (folder / f"{run.name}.done").write_text("differs" if wrong else "the same")
    print(f"{run.name}: {count()} kills so far; {f'DIFFERS in {wrong}' if wrong else 'the same'}", flush=True)
  phases = collections.Counter(record.read_text("utf-8").splitlines())
  where = ", ".join(f"{number} in {name}" for name, number in phases.most_common())
  done = [path.read_text("utf-8") for path in folder.glob("run*.done")]
  print(
    f"{count()} kills ({where}) in {len(done)} runs, {done.count('the same')} of which are as one that was not killed"
  )
  sys.exit(different > 0)


if __name__ == "__main__":
  command_line.run(main)
