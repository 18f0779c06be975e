"""Loads mutated files of trained optimizers: each is either refused by a `LoadError` of one line or used.

    python experiments/robustness/fuzz_load.py --files=10000

No file may hang (`--seconds` each), take more than 1 GiB, import or start anything, open a file for writing, or raise
anything but `LoadError`; θ that loads is finite. Ends with exit code 1 and the files in `--keep` if one does.
About 20 files a second on one core.
"""

import collections
import contextlib
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

import lopt
from lopt import command_line, configuration
from lopt.runs import trained

FILES = flags.DEFINE_integer("files", 10_000, "How many.", 1)
SEED = flags.DEFINE_integer("seed", 0, "Which.")
SECONDS = flags.DEFINE_integer("seconds", 20, "Longest time for one file.", 1)
KEEP = flags.DEFINE_string("keep", "runs/fuzz", "Where files that do harm are kept.")

MEMORY = 2**30
DECOY = "stranger_module"  # a module that says so if it is imported; it lies where Python would find it
NAMES = [
  DECOY,
  "os",
  "this",
  "antigravity",
  f"{DECOY}.sub",
  "lopt.tasks.prepare",
  "prepare",
  "layers",
  "..",
  "",
  "mlp/",
  "a b",
]
NUMBERS = [0, -1, 1, 3, 10**6, 10**9, 2**31, 2**63, 10**30, 1e308, 1e-320, -0.5, float("nan"), float("inf")]
LISTS = [[], [0], [-1], [10**9], [10**9] * 2, [10**9] * 3, [4] * 100, [4] * 450, [4] * 10**5, ["x"], [[1]]]
SECTIONS = [
  {},
  {"name": "mlp"},
  {"x": 1},
  {"relative_floor": 0.0, "hidden_size": 10**9},
  {"global_norm": float("nan")},
]
SECTIONS += [{"learning_rate": 1e300, "elementwise": ["x"] * 400}, {"adam_mix": 10**9}]
VALUES: list[Any] = [*NUMBERS, *LISTS, *SECTIONS, None, True, "", "x", "\x1b[2J", "\ud800", "x" * 5000]
DTYPES = ["F64", "F32", "F16", "BF16", "I8", "U8", "I64", "BOOL", "F8_E4M3", "F4", "X", "", 7]

Parts = tuple[dict[str, Any], bytes]  # a file's header and data


def split(data: bytes) -> Parts:
  end = 8 + int.from_bytes(data[:8], "little")
  return json.loads(data[8:end]), data[end:]


def join(header: dict[str, Any] | str, data: bytes) -> bytes:
  text = (header if isinstance(header, str) else json.dumps(header)).encode(errors="surrogatepass")
  text += b" " * (-len(text) % 8)
  return len(text).to_bytes(8, "little") + text + data


def flip_bits(rng: random.Random, data: bytes) -> bytes:
  changed = bytearray(data)
  end = rng.choice([8, 8 + int.from_bytes(data[:8], "little"), len(data)])
  for _ in range(rng.choice([1, 1, 2, 20])):
    changed[rng.randrange(end)] ^= 1 << rng.randrange(8)
  return bytes(changed)


def cut(rng: random.Random, data: bytes) -> bytes:
  a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
  noise = rng.randbytes(rng.choice([1, 8, 1000]))
  return rng.choice(
    [data[:a], data[a:], data[:a] + data[b:], data[:b] + data[a:], data + noise, data[:a] + noise + data[a:]]
  )


def change_length(rng: random.Random, data: bytes) -> bytes:
  length = rng.choice(
    [0, 1, 2**20, 2**20 + 1, 2**27, 2**32, 2**63, 2**64 - 1, rng.getrandbits(64), rng.randrange(len(data))]
  )
  return length.to_bytes(8, "little") + data[8:]


def change_tensors(rng: random.Random, data: bytes) -> bytes:
  header, rest = split(data)
  name = rng.choice([key for key in header if key != "__metadata__"])
  tensor = dict(header[name])
  size = rng.choice([0, 1, 10**9, 2**62, 2**63, -1, 1.5, "x", None])
  match rng.randrange(8):
    case 0:
      tensor["dtype"] = rng.choice(DTYPES)
    case 1:
      tensor["shape"] = rng.choice([[], [size], [size, size], [*tensor["shape"], 1], tensor["shape"][::-1], size])
    case 2:
      tensor["data_offsets"] = rng.choice(
        [[0, size], [size, 0], [size, size], [], [0], size, tensor["data_offsets"][::-1]]
      )
    case 3:
      del header[name]
      return join(header, rest)
    case 4:
      del header[name]
      name = rng.choice([name + "x", "", "a/b/../c", "\x1b[31m", "x" * 10_000, "__metadata__"])
    case 5:
      del tensor[rng.choice(list(tensor))]
    case 6:  # one more, with bytes of its own
      header["more"] = {"dtype": "F32", "shape": [2], "data_offsets": [len(rest), len(rest) + 8]}
      return join(header, rest + b"\0" * 8)
    case 7:
      text = json.dumps(header)
      return join(text[:-1] + f", {json.dumps(name)}: {json.dumps(tensor)}}}", rest)  # the same name twice
  header[name] = tensor
  return join(header, rest)


def change_theta(rng: random.Random, data: bytes) -> bytes:
  header, rest = split(data)
  theta = np.frombuffer(rest, np.float32).copy()
  where = rng.randrange(theta.size)
  theta[where : where + rng.choice([1, theta.size])] = rng.choice([np.nan, np.inf, -np.inf, 3e38, 1e-45, 0.0])
  return join(header, theta.tobytes())


def change_precision(rng: random.Random, data: bytes) -> bytes:
  header, rest = split(data)
  code, dtype = rng.choice([("F64", np.float64), ("F16", np.float16), ("I32", np.int32), ("U8", np.uint8)])
  changed, end = b"", 0
  for name, tensor in header.items():
    if name != "__metadata__":
      array = np.frombuffer(rest[slice(*tensor["data_offsets"])], np.float32).astype(dtype)
      tensor |= {"dtype": code, "data_offsets": [end, end := end + array.nbytes]}
      changed += array.tobytes()
  return join(header, changed)


def change_options(rng: random.Random, data: bytes) -> bytes:
  """An option of the architecture, its name, or a section of its own, is another."""
  header, rest = split(data)
  section = json.loads(header["__metadata__"]["architecture"])
  for _ in range(rng.choice([1, 1, 2, 4])):
    field = rng.choice(
      [*section, "name", "step_sizes", "safeguards", "direction", "hidden_sizes", "num_blocks", "new"]
    )
    if field == "name":
      section["name"] = rng.choice([*NAMES, *configuration.choices("architectures"), *VALUES])
    elif isinstance(section.get(field), dict) and section[field] and rng.random() < 0.7:
      section[field][rng.choice(list(section[field]))] = rng.choice(VALUES)
    else:
      section[field] = rng.choice(VALUES)
  header["__metadata__"]["architecture"] = json.dumps(section)
  return join(header, rest)


def change_metadata(rng: random.Random, data: bytes) -> bytes:
  header, rest = split(data)
  metadata = header["__metadata__"]
  field = rng.choice(list(metadata))
  deep = 10 ** rng.choice([2, 3, 5])
  match rng.randrange(5):
    case 0:
      del metadata[field]
    case 1:
      metadata[field] = rng.choice(
        ["", "{}", "[]", "null", "1", "NaN", '"x"', "{" * deep, "[" * deep + "]" * deep, "9" * deep]
      )
    case 2:
      text = metadata[field]
      where = rng.randrange(len(text))
      metadata[field] = (
        text[:where] + rng.choice(["", '"', "{", "\\", "\x00", "9" * 400, "1e999", ",", "θ"]) + text[where + 1 :]
      )
    case 3:
      metadata[field] = rng.choice(
        [1, None, [], {}, {"x": 1}, metadata[field] * 2, "x" * rng.choice([10**5, 2**20, 5 * 10**6])]
      )
    case 4:
      header["__metadata__"] = rng.choice([None, [], "x", {}, {str(i): "x" for i in range(50_000)}])
  return join(header, rest)


def many_tensors(rng: random.Random, data: bytes) -> bytes:
  header, rest = split(data)
  count = rng.choice([100, 5000, 100_000])
  header |= {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [len(rest)] * 2} for i in range(count)}
  return join(header, rest)


MUTATIONS: list[tuple[Callable[[random.Random, bytes], bytes], float]] = [
  (flip_bits, 3), (cut, 2), (change_length, 0.5), (change_tensors, 2), (change_theta, 1), (change_precision, 0.5),
  (change_options, 3), (change_metadata, 2), (many_tensors, 0.1),
]  # fmt: skip


class HarmError(Exception):
  """What a file must not be able to do."""


def watch() -> Callable[[bool], list[str]]:
  """Returns `watching(on)`, which turns the record of suspicious events on or off, and returns what there was."""
  events: list[str] = []
  on = False

  def hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not on:
      return
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if writes or event in (
      "import",
      "os.system",
      "os.exec",
      "os.fork",
      "subprocess.Popen",
      "socket.connect",
      "pickle.find_class",
    ):
      name = str(arguments[0])
      if not (event == "import" and (name in sys.modules or name.startswith("lopt."))):
        events.append(f"{event} {name}")

  sys.addaudithook(hook)

  def watching(now: bool) -> list[str]:
    nonlocal on
    on = now
    found = list(events)
    events.clear()
    return found

  return watching


def foreign_modules() -> set[str]:
  return {name for name in sys.modules if not name.startswith("lopt.")}


def use(path: Path, watching: Callable[[bool], list[str]]) -> str:
  """What came of loading the file: "loaded", or the beginning of the refusal; raises `HarmError`."""
  before = foreign_modules()
  signal.alarm(SECONDS.value)
  watching(True)
  try:
    theta, outcome = lopt.load(path).theta, "loaded"
  except trained.LoadError as error:
    theta, outcome = {}, str(error)
    if len(outcome) > 1000 or not outcome.isprintable() or not outcome.startswith(f"{path}: "):
      raise HarmError(f"a message that is no line: {outcome[:200]!r}") from error
    outcome = outcome.removeprefix(f"{path}: ").partition(":")[0].partition("(")[0][:60].strip()
  except BaseException as error:
    raise HarmError(f"{type(error).__name__}: {str(error)[:200]}") from error
  finally:
    signal.alarm(0)
    events = watching(False)
  if events or foreign_modules() - before:
    raise HarmError(f"{', '.join(events[:5])}; new modules: {sorted(foreign_modules() - before)[:5]}")
  if not all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(theta)):
    raise HarmError("θ that is not finite")
  return outcome


def originals(folder: Path) -> list[bytes]:
  """One file of each architecture, and what comes with lopt; all are loaded, so that what they import is there."""
  paths = [trained.PRETRAINED / f"{name}.safetensors" for name in trained.pretrained()]
  for name in configuration.choices("architectures"):
    optimizer = configuration.build("architectures", {"name": name}, where="architecture")
    trained.export(
      path := folder / f"{name}.safetensors",
      optimizer.init(jax.random.key(0)),
      {"architecture": {"name": name, "step_sizes": {}, "safeguards": {}}},
      outer_steps=1,
    )
    paths.append(path)
  for path in paths:
    lopt.load(path)
  return [path.read_bytes() for path in paths]


def main(argv: list[str]) -> None:
  del argv
  rng = random.Random(SEED.value)
  outcomes: collections.Counter[str] = collections.Counter()
  harms, begun, slowest = 0, time.perf_counter(), 0.0
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    (folder / f"{DECOY}.py").write_text(f"open({str(folder / 'imported')!r}, 'w')\n")
    sys.path.insert(0, name)
    sources = originals(folder)
    for source in sources:  # refusals too import something the first time: how to describe types
      path = folder / "warm.safetensors"
      for mutation in (change_options, cut):
        path.write_bytes(mutation(random.Random(0), source))
        with contextlib.suppress(trained.LoadError):
          lopt.load(path)
    watching = watch()
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MEMORY, resource.RLIM_INFINITY))
    functions, weights = zip(*MUTATIONS, strict=True)
    for index in range(FILES.value):
      data = rng.choice(sources)
      (mutation,) = rng.choices(functions, weights)
      data = mutation(rng, data)
      path = folder / "stranger.safetensors"
      path.write_bytes(data)
      tick = time.perf_counter()
      try:
        outcomes[use(path, watching)] += 1
        if (folder / "imported").exists():
          raise HarmError("it was imported")
      except HarmError as harm:
        harms += 1
        kept = Path(KEEP.value) / f"{SEED.value}_{index}.safetensors"
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(data)
        print(f"{kept}: after {mutation.__name__}: {harm}", flush=True)
      slowest = max(slowest, time.perf_counter() - tick)
  for outcome, count in outcomes.most_common():
    print(f"{count:6} {outcome}")
  seconds = time.perf_counter() - begun
  speed = f"in {seconds:.0f} s, the slowest {slowest:.1f} s"
  print(f"{FILES.value} mutated files {speed}: {outcomes['loaded']} loaded, {harms} did harm")
  sys.exit(harms > 0)


def _address_space() -> int:
  return int(Path("/proc/self/statm").read_text("utf-8").split()[0]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
  signal.signal(signal.SIGALRM, signal.default_int_handler)
  command_line.run(main)
