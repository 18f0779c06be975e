"""Trained optimizers: one safetensors file with θ and, in its header, the configuration that it needs.

    optimizer = lopt.load("adafactor_mlp")  # which comes with lopt; or lopt.load("runs/digits")
    tx = optimizer(num_steps=10_000)  # recommended learning rate, warm-up and cosine to zero
    tx = optimizer(learning_rate=1e-2, weight_decay=0.01)  # or a schedule; as optax.adamw

Leaves of θ are named by their path, such as `mlp/~/linear_0/w`. The header has the strings
    format          "lopt optimizer"
    format_version  "1"
    lopt_version    of the lopt that wrote the file
    outer_steps     meta-training steps that made θ
    architecture    JSON: {"name": "mlp", **options}, all that is needed to use θ
    config          JSON: the whole configuration of the meta-training run, for the record

The same θ and configuration give the same bytes. A file may come from anybody: nothing in it chooses what is run, and
it is checked before memory or time is spent on it.
"""

import json
import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import safetensors
import safetensors.numpy

from lopt import checks, configuration, signatures
from lopt.architectures import meta_parameters
from lopt.base import LearnedOptimizer, Theta
from lopt.runs.drop_in import TrainedOptimizer
from lopt.runs.files import write_atomically
from lopt.version import __version__

FILENAME = "optimizer.safetensors"
PRETRAINED = Path(__file__).parent.parent / "pretrained"
"""What comes with lopt: `<name>.safetensors`, trained by experiments/configs/pretrained.py."""
_FORMAT = {"format": "lopt optimizer", "format_version": "1"}
# Far beyond what lopt writes; what a file may cost whoever opens it.
_MAX_BYTES, _MAX_HEADER_BYTES, _MAX_OPTIONS = 2**28, 2**20, 500


class LoadError(Exception):
  """A file that is no trained optimizer, or not one that this lopt can use; one line that says why."""


def _refusal(path: str | Path, problem: str) -> LoadError:
  return LoadError(f"{path}: {checks.printable(problem)}")


def export(
  path: str | Path, theta: Theta, config: Mapping[str, Any] | ml_collections.ConfigDict, *, outer_steps: int
) -> None:
  """Writes the trained optimizer `path`, whole or not at all.

  Args:
    path: of the file, such as `runs/digits/optimizer.safetensors`.
    theta: pytree of arrays.
    config: of the run; its section `architecture` is what `load` builds the optimizer from.
    outer_steps: meta-training steps that made θ.

  Raises:
    OSError: the file cannot be written.
  """
  plain = configuration.plain(config)
  header = {
    **_FORMAT,
    "lopt_version": __version__,
    "outer_steps": str(outer_steps),
    "architecture": json.dumps(plain["architecture"], sort_keys=True),
    "config": json.dumps(plain, sort_keys=True),
  }
  arrays = {name: np.asarray(leaf, order="C") for name, leaf in meta_parameters.named(theta).items()}
  write_atomically(path, _canonical(safetensors.numpy.save(arrays, header)))


def _canonical(data: bytes) -> bytes:
  """A safetensors file with its header in order: safetensors itself writes metadata in any."""
  end = 8 + int.from_bytes(data[:8], "little")
  header = json.loads(data[8:end])
  ordered = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **dict(sorted(header.items()))}
  text = json.dumps(ordered, ensure_ascii=False, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  return len(text).to_bytes(8, "little") + text + data[end:]


def read(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """The arrays of a trained optimizer, by name, and its header, without building anything.

  Args:
    path: the file, or the folder that has it as `optimizer.safetensors`; or, as a string, one of `pretrained()`. (A
      folder of such a name is "./mlp".)

  Raises:
    LoadError: no such file, not a trained optimizer, damaged, or of a format version unknown here.
  """
  if not isinstance(path, (str, os.PathLike)):
    raise LoadError(
      f"{checks.printable(repr(path))}: is neither a path nor the name of an optimizer that comes with lopt"
    )
  if path in pretrained():
    path = PRETRAINED / f"{path}.safetensors"
  path = Path(path)
  try:
    path = path / FILENAME if path.is_dir() else path
    if not path.is_file():
      if (path.parent / "config.json").is_file() and path.name == FILENAME:
        raise _refusal(path, "no such file yet: its run has not ended; the command that began it goes on with it")
      known = f"a trained optimizer, a folder with {FILENAME}, or one that comes with lopt: {', '.join(pretrained())}"
      raise _refusal(path, f"no such file; {signatures.did_you_mean(path.name, pretrained())}expected {known}")
    if (size := path.stat().st_size) > _MAX_BYTES:
      raise _refusal(path, f"has {size:,} bytes, and a trained optimizer at most {_MAX_BYTES:,}")
    with path.open("rb") as file:
      length = int.from_bytes(file.read(8), "little")
    if length > _MAX_HEADER_BYTES:
      raise _refusal(path, f"damaged, or not a safetensors file (a header of {length:,} bytes)")
    with safetensors.safe_open(path, framework="np") as file:
      header = file.metadata() or {}
      arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
  except (safetensors.SafetensorError, OSError, TypeError, ValueError) as error:
    raise _refusal(path, f"damaged, or not a safetensors file ({error})") from error
  if header.get("format") != _FORMAT["format"]:
    raise _refusal(path, "a safetensors file, but not one that lopt wrote: its header names no lopt format")
  if header.get("format_version") != _FORMAT["format_version"]:
    versions = f"format version {header.get('format_version')}, and this lopt {__version__} reads "
    versions += f"{_FORMAT['format_version']}; it was written by lopt {header.get('lopt_version')}"
    raise _refusal(path, versions)
  if missing := {"architecture", "config"} - header.keys():
    raise _refusal(path, f"damaged: its header lacks {', '.join(sorted(missing))}")
  return arrays, header


def pretrained() -> list[str]:
  """The names of the trained optimizers that come with lopt."""
  return sorted(path.stem for path in PRETRAINED.glob("*.safetensors"))


def folder_of(optimizer: str) -> Path:
  """Where what belongs to a trained optimizer is kept: its work directory, or runs/NAME of what comes with lopt."""
  if optimizer in pretrained():
    return Path("runs") / optimizer
  path = Path(optimizer).absolute()
  return path if path.is_dir() else path.parent


def name_of(optimizer: str) -> str:
  """What a trained optimizer is called in tables and legends: its run, or its file's own name."""
  path = Path(optimizer)
  return path.stem if path.is_file() and path.name != FILENAME else folder_of(optimizer).name


def load(
  path: str | Path, architecture: LearnedOptimizer | None = None, *, modules: Collection[str] = ()
) -> TrainedOptimizer:
  """A trained optimizer, ready for use: `load("mlp")(num_steps=10_000)` is an Optax transformation.

  Files from anywhere are safe to load: the file's header chooses among lopt's own architectures, and never what is
  imported.

  Args:
    path: one of `pretrained()`, the file, or the folder that has it as `optimizer.safetensors`.
    architecture: what the file's θ is of, where that is not one of lopt's own; what the header says is then not used.
    modules: dotted names of modules of yours which the header may choose instead.

  Raises:
    LoadError: no such file, not a trained optimizer, damaged, an architecture that is not lopt's own, or θ that is
      not finite or does not fit the architecture.
  """
  arrays, header = read(path)
  section, config = (_parse(path, header, name) for name in ("architecture", "config"))
  if architecture is None:
    title = f"architecture {str(section.get('name'))!r}"
    architecture, like = _build(path, section, modules)
  else:
    title, like = "given architecture", jax.eval_shape(architecture.init, jax.random.key(0))
  found = {name: f"{array.dtype}{list(array.shape)}" for name, array in arrays.items()}
  expected = {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in meta_parameters.named(like).items()}
  for name in {**expected, **found}:
    there, here = found.get(name, "absent"), expected.get(name, "absent")
    if there != here:
      difference = f"{name} is {there} in the file and {here} in the {title}"
      raise _refusal(path, f"θ does not fit the {title}: {difference}")
    if not np.all(np.isfinite(arrays[name])):
      raise _refusal(path, f"θ is not finite: {name} has NaN or infinite values; it cannot be used")
  theta = jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(arrays[name]) for name in expected])
  return TrainedOptimizer(theta, architecture, config)


def _parse(path: str | Path, header: Mapping[str, str], name: str) -> dict[str, Any]:
  """The JSON object in the header's field `name`."""
  try:
    section = json.loads(header[name])
  except (ValueError, RecursionError) as error:
    raise _refusal(path, f"damaged: its header's {name} is not JSON ({error})") from error
  if not isinstance(section, dict):
    raise _refusal(path, f"damaged: its header's {name} is not a JSON object")
  return section


def _build(path: str | Path, section: dict[str, Any], modules: Collection[str]) -> tuple[LearnedOptimizer, Theta]:
  """The architecture of a header, and the shapes of its θ, which take no memory."""
  try:
    _check_size(section)
    architecture = configuration.build("architectures", section, where="architecture", modules=modules)
    like = jax.eval_shape(architecture.init, jax.random.key(0))
    meta_parameters.named(like)
  except Exception as error:  # any, since nobody knows what options a file can have
    own = str(section.get("name"))
    remedy = (
      f"; pass it: lopt.load(path, architecture=...), or modules=[{own!r}]"
      if "." in own and own != configuration.OWN
      else ""
    )
    raise _refusal(path, f"cannot build the architecture in its header: {error}{remedy}") from error
  return architecture, like


def _check_size(section: Any) -> None:
  """Raises ValueError if options are such that they could make a lot of work."""
  todo, seen = [section], 0
  while todo:
    value, seen = todo.pop(), seen + 1
    if seen > _MAX_OPTIONS:
      raise ValueError(f"it has more than {_MAX_OPTIONS} options")
    if isinstance(value, (dict, list)):
      todo += value.values() if isinstance(value, dict) else value
    elif isinstance(value, float) and not math.isfinite(value):
      raise ValueError("an option is NaN or infinite")
    elif isinstance(value, int) and abs(value) >= 2**31:
      raise ValueError("an option is an integer of more than 31 bits")
