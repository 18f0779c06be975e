"""All that is to be measured on a GPU or TPU, in one go, with a time limit for each part and one JSON file.

    python experiments/benchmarks/accelerator.py [--only=throughput] [--output=runs/accelerator]

Parts: throughput; the kernels of an inner step, also with `mlp`'s network in one of them; `make meta-train`; the two
real-size checks; the report of what ships; tests of that kernel, and of what devices could change. The file,
results.json, is written anew after each part: a machine that is taken away takes nothing with it. At most 32 minutes,
most of it compilation. Without a network, set LOPT_MANUAL_DIR.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags

from lopt import command_line, configuration
from lopt.runs import files

ONLY = flags.DEFINE_string("only", "", "Regular expression: the parts to run.")
OUTPUT = flags.DEFINE_string("output", "runs/accelerator", "Folder of results.json and of what the parts write.")

EXPERIMENTS = Path(__file__).parent.parent
BENCHMARKS = EXPERIMENTS / "benchmarks"
PROFILED = "mlp8/64/20"  # task, pairs, inner steps in an outer step


class Part(NamedTuple):
  """Something to run."""

  seconds: int  # at most
  command: Sequence[str | Path]
  read: Callable[[str], Any] = lambda output: None  # its figures, from its standard output


def parts(folder: Path) -> dict[str, Part]:
  evaluate = EXPERIMENTS / "evaluate.py"
  options = ["--wandb=disabled", "--optimizer=tensor_mlp", "--num_seeds=2"]
  tests = EXPERIMENTS.parent / "tests"
  throughput = [BENCHMARKS / "throughput.py", f"--output={folder / 'throughput'}"]
  digits = ["--config=digits", f"--workdir={folder / 'digits'}", "--wandb=disabled"]
  report = ["--suite=fresh,data,size,architecture,loss", "--num_tasks=3", f"--output={folder / 'report'}"]
  real_size = ["--suite=real_size", f"--output={folder / 'real_size'}"]
  return {
    "devices": Part(60, ["-c", "import jax; print(jax.__version__, jax.devices())"]),
    "throughput": Part(300, [*throughput, "--only=^(mlp|fused_mlp|tensor_mlp|adafactor_mlp)/mlp8/64/20$"], _lines),
    **{
      f"kernels of {x}": Part(90, [BENCHMARKS / "throughput.py", f"--case={x}/{PROFILED}", "--profile"], _kernels)
      for x in ("mlp", "fused_mlp")
    },
    "meta-train": Part(240, [EXPERIMENTS / "meta_train.py", *digits]),
    "real size": Part(400, [evaluate, *options, *real_size]),
    "report": Part(300, [evaluate, *options, *report]),
    "tests of fused_mlp": Part(120, ["-m", "pytest", "-q", tests / "architectures/test_fused_mlp.py"]),
    "tests": Part(240, ["-m", "pytest", "-q", tests / "outer/test_identities.py", tests / "test_drop_in.py"]),
  }


def _lines(output: str) -> list[Any]:
  """What a benchmark printed: one JSON object a line."""
  return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def _kernels(output: str) -> dict[str, Any]:
  """Kernels of an inner step, and for what share of the time they run, from the trace of an outer step."""
  (figures,) = _lines(output)
  newest = max(Path(figures["trace"]).rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
  planes = [x for x in jax.profiler.ProfileData.from_file(str(newest)).planes if x.name.startswith("/device:")]
  spans = [
    (event.start_ns, event.start_ns + event.duration_ns)
    for plane in planes
    for line in plane.lines
    if line.name.startswith("Stream")  # of a GPU; other lines tell of the same kernels again
    for event in line.events
  ]
  if not spans:
    return {**figures, "kernels": "none in the trace: no GPU"}
  steps = int(PROFILED.split("/")[-1])
  whole = max(end for _, end in spans) - min(start for start, _ in spans)
  busy, last = 0.0, 0.0
  for start, end in sorted(spans):
    busy += max(0.0, end - max(start, last))
    last = max(last, end)
  return {**figures, "kernels_per_inner_step": len(spans) / steps, "busy": busy / whole}


def run(part: Part, folder: Path) -> dict[str, Any]:
  """Runs a part in a process of its own; what went wrong is part of the result."""
  begun = time.perf_counter()
  environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONUNBUFFERED": "1"}
  with (folder / "errors.log").open("a") as errors:
    process = subprocess.Popen(
      [sys.executable, *part.command], stdout=subprocess.PIPE, stderr=errors, env=environment
    )
    try:
      output, _ = process.communicate(timeout=part.seconds)
      code: int | str = process.returncode
    except subprocess.TimeoutExpired:
      process.terminate()  # meta-training saves a checkpoint, benchmarks end
      output, _ = process.communicate()
      code = f"stopped after {part.seconds} s"
  text = output.decode(errors="replace")
  result = {"exit": code, "seconds": round(time.perf_counter() - begun, 1), "end_of_output": text[-4000:]}
  try:
    return {**result, "figures": part.read(text)}
  except Exception as error:  # of a part that did not come far
    return {**result, "unread": f"{type(error).__name__}: {error}"}


def main(argv: list[str]) -> None:
  del argv
  folder = Path(OUTPUT.value)
  chosen = {name: part for name, part in parts(folder).items() if re.search(ONLY.value, name)}
  if not chosen:
    raise configuration.ConfigError(f"--only: {ONLY.value!r} is in no part; there are: {', '.join(parts(folder))}")
  folder.mkdir(parents=True, exist_ok=True)
  results = {}
  for name, part in chosen.items():
    print(f"{name}: at most {part.seconds} s", flush=True)
    results[name] = run(part, folder)
    files.write_atomically(folder / "results.json", json.dumps(results, indent=1))
    print(f"{name}: exit {results[name]['exit']}, {results[name]['seconds']} s", flush=True)
  print(
    f"{sum(x['exit'] == 0 for x in results.values())} of {len(results)} parts ended well: {folder / 'results.json'}"
  )


if __name__ == "__main__":
  command_line.run(main)
