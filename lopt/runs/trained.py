"""Trained optimizers: one safetensors file with θ and, in its header, the configuration that it needs.

    optimizer = lopt.load("adafactor_mlp")  # which comes with lopt; or lopt.load("runs/digits")
    tx = optimizer(num_steps=10_000)  # recommended learning rate, warm-up and cosine to zero
    tx = optimizer(learning_rate=1e-2, weight_decay=0.01)  # or a schedule; as optax.adamw
    tx = optax.chain(optimizer.direction(), optax.scale_by_learning_rate(schedule))

Leaves of θ are named by their path in the pytree, such as `mlp/~/linear_0/w`. The header has the strings

    format          "lopt optimizer"
    format_version  "1"
    lopt_version    of the lopt that wrote the file
    outer_steps     meta-training steps that made θ
    architecture    JSON: {"name": "mlp", **options}, all that is needed to use θ
    config          JSON: the whole configuration of the meta-training run, for the record
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import safetensors
import safetensors.numpy

from lopt import configuration
from lopt.base import LearnedOptimizer, PyTree, Theta
from lopt.outer import meta_parameters
from lopt.runs.files import write_atomically
from lopt.version import __version__

FILENAME = "optimizer.safetensors"
PRETRAINED = Path(__file__).parent.parent / "pretrained"
"""What comes with lopt: `<name>.safetensors`, trained by experiments/configs/pretrained.py."""
_FORMAT = {"format": "lopt optimizer", "format_version": "1"}


class LoadError(Exception):
  """A file that is no trained optimizer, or not one that this lopt can use; one line that says why."""


class TrainedOptimizer(NamedTuple):
  """A learned optimizer with its θ: `optimizer(num_steps=10_000)` is an Optax transformation.

  What comes of it is used as `tx.update(grads, state, params, value=loss)`, and computes in float32 whatever the
  parameters' precision, which updates have.
  """

  theta: Theta
  """The trained meta-parameters."""
  architecture: LearnedOptimizer
  """What they are the meta-parameters of."""
  config: dict[str, Any]
  """The configuration of the run that trained them."""

  @property
  def learning_rate(self) -> float | None:
    """The recommended one; None of an optimizer that takes no learning rate, since it decides on steps by itself."""
    return self.architecture.learning_rate

  def __call__(
    self,
    num_steps: Any = None,
    *,
    learning_rate: optax.ScalarOrSchedule | None = None,
    weight_decay: float = 0.0,
    mask: Any | Callable[[PyTree], Any] | None = None,
  ) -> optax.GradientTransformationExtraArgs:
    """Δp = -α_t (u + λ p) for a run of `num_steps` steps, with the direction u.

    Args:
      num_steps: Length of the run; may be traced. Without `learning_rate`, α_t is the recommended rate, warmed up and
        decayed to zero by a cosine over these steps.
      learning_rate: α_t: a number, or an Optax schedule of the step. It needs no `num_steps`.
      weight_decay: λ, decoupled, per unit of the learning rate; as in `optax.adamw`.
      mask: What λ applies to, as in `optax.adamw`.

    Raises:
      ValueError: `num_steps` is below 1; neither it nor a learning rate is given; or an optimizer that decides on its
        steps by itself is given a learning rate or weight decay.
    """
    if num_steps is not None and not isinstance(num_steps, jax.Array) and num_steps < 1:
      raise ValueError(f"num_steps: {num_steps} is not a number of training steps; it must be at least 1")
    if self.learning_rate is None:
      if learning_rate is not None or weight_decay:
        raise ValueError(f"{'weight_decay' if learning_rate is None else 'learning_rate'}: {_NO_DIRECTION}")
      if num_steps is None:
        raise ValueError("num_steps: this optimizer needs the number of training steps: optimizer(num_steps=...)")
      return _in_float32(self.architecture.transform(self.theta, num_steps))
    if learning_rate is None:
      if num_steps is None:
        raise ValueError("num_steps: give it, for the recommended learning rates, or a learning_rate")
      learning_rate = self.schedule(num_steps)
    decay = optax.add_decayed_weights(weight_decay, mask) if weight_decay else optax.identity()
    return optax.chain(self.direction(num_steps), decay, optax.scale_by_learning_rate(learning_rate))

  def direction(self, num_steps: Any = None) -> optax.GradientTransformationExtraArgs:
    """The direction u alone, uphill as `optax.scale_by_adam`'s and of unit size, to be chained with what sizes steps.

    Args:
      num_steps: Length of the run, for architectures that use it.

    Raises:
      ValueError: The optimizer decides on its steps by itself.
    """
    if self.architecture.direction is None:
      raise ValueError(f"direction: {_NO_DIRECTION}")
    return _in_float32(self.architecture.direction(self.theta, num_steps))

  def schedule(self, num_steps: Any) -> optax.Schedule:
    """The recommended learning rate at each of `num_steps` steps: warm-up, then a cosine to zero."""
    if self.architecture.schedule is None:
      raise ValueError(f"schedule: {_NO_DIRECTION}")
    return self.architecture.schedule(num_steps)


_NO_DIRECTION = (
  "this optimizer was trained to decide on the size of its steps, and takes neither learning rate nor weight decay; "
  "call it with num_steps=... alone, or load one with a direction"
)


def _in_float32(tx: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
  def cast(tree: PyTree) -> PyTree:
    return optax.tree.cast(tree, jnp.float32)

  def update(
    updates: PyTree, state: PyTree, params: PyTree | None = None, **extra_args: Any
  ) -> tuple[PyTree, PyTree]:
    steps, state = tx.update(cast(updates), state, cast(params), **extra_args)
    return jax.tree.map(
      lambda step, like: step.astype(like.dtype), steps, updates if params is None else params
    ), state

  return optax.GradientTransformationExtraArgs(lambda params: tx.init(cast(params)), update)


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
    "architecture": json.dumps(plain["architecture"]),
    "config": json.dumps(plain),
  }
  arrays = {name: np.asarray(leaf, order="C") for name, leaf in meta_parameters.named(theta).items()}
  write_atomically(path, safetensors.numpy.save(arrays, header))


def read(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """The arrays of a trained optimizer, by name, and its header, without building anything.

  Args:
    path: the file, or the folder that has it as `optimizer.safetensors`; or, as a string, one of `pretrained()`. (A
      folder of such a name is "./mlp".)

  Raises:
    LoadError: no such file, not a trained optimizer, damaged, or of a format version unknown here.
  """
  if path in pretrained():
    path = PRETRAINED / f"{path}.safetensors"
  path = Path(path)
  path = path / FILENAME if path.is_dir() else path
  if not path.is_file():
    raise LoadError(
      f"{path}: no such file; expected a trained optimizer, a folder with {FILENAME}, or one that comes with lopt: "
      f"{', '.join(pretrained())}"
    )
  try:
    with safetensors.safe_open(path, framework="np") as file:
      header = file.metadata() or {}
      arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
  except (safetensors.SafetensorError, OSError, TypeError) as error:
    raise LoadError(f"{path}: damaged, or not a safetensors file ({error})") from error
  if header.get("format") != _FORMAT["format"]:
    raise LoadError(f"{path}: a safetensors file, but not one that lopt wrote: its header names no lopt format")
  if header.get("format_version") != _FORMAT["format_version"]:
    raise LoadError(
      f"{path}: format version {header.get('format_version')}, and this lopt {__version__} reads "
      f"{_FORMAT['format_version']}; it was written by lopt {header.get('lopt_version')}"
    )
  if missing := {"architecture", "config"} - header.keys():
    raise LoadError(f"{path}: damaged: its header lacks {', '.join(sorted(missing))}")
  return arrays, header


def pretrained() -> list[str]:
  """The names of the trained optimizers that come with lopt."""
  return sorted(path.stem for path in PRETRAINED.glob("*.safetensors"))


def load(path: str | Path) -> TrainedOptimizer:
  """A trained optimizer, ready for use: `load("mlp")(num_steps=10_000)` is an Optax transformation.

  Args:
    path: one of `pretrained()`, the file, or the folder that has it as `optimizer.safetensors`.

  Raises:
    LoadError: no such file, not a trained optimizer, damaged, or θ does not fit the architecture.
  """
  arrays, header = read(path)
  try:
    section, config = json.loads(header["architecture"]), json.loads(header["config"])
    architecture = configuration.build("architectures", section, where="architecture")
  except ValueError as error:  # which a JSON error and a ConfigError are
    raise LoadError(f"{path}: cannot build the architecture in its header: {error}") from error
  like = jax.eval_shape(architecture.init, jax.random.key(0))
  found = {name: f"{array.dtype}{list(array.shape)}" for name, array in arrays.items()}
  expected = {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in meta_parameters.named(like).items()}
  for name in {**expected, **found}:
    there, here = found.get(name, "absent"), expected.get(name, "absent")
    if there != here:
      title = f"architecture {section['name']!r}"
      raise LoadError(f"{path}: θ does not fit the {title}: {name} is {there} in the file and {here} in the {title}")
  theta = jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(arrays[name]) for name in expected])
  return TrainedOptimizer(theta, architecture, config)
