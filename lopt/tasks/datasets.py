"""Image-classification sets and texts as device arrays, prepared and read by tensorflow-datasets (TFDS).

`load` and `load_text` prepare a set once (array_record files, laid out as TFDS does), decode it once (a `.npz` beside
those files), and from then on only read that one file: TensorFlow is never imported, TFDS only for the first start.

    digits                  1,797 digits of 8x8 pixels; comes with scikit-learn, needs no network
    mnist, fashion_mnist,   70,000 images of 28x28 pixels each
      kmnist
    emnist/<form>           letters and digits of 28x28 pixels, transposed; balanced, byclass, bymerge, digits,
                            letters or mnist
    cifar10, cifar100       60,000 images of 32x32 pixels in colour each
    svhn_cropped            99,289 house numbers of 32x32 pixels in colour (the 531,131 of 'extra' are left out)
    imagenet_resized/<form> 1,331,167 images in colour; 8x8, 16x16, 32x32 or 64x64
    tiny_shakespeare        1,115,394 characters of Shakespeare's plays
    lm1b                    11 million characters of the One Billion Word Benchmark's news
    any other name          of the TFDS catalogue of images, where it stands prepared in the data directory in
                            array_record format; `python -m lopt.tasks.prepare <name>` does that with TensorFlow

Except for digits, original files are downloaded, or taken from $LOPT_MANUAL_DIR/<name without form>/ where they are.

`read_text` reads a text from a file instead.
"""

import contextlib
import io
import json
import logging
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, UInt8

from lopt.runs import files
from lopt.tasks import originals, preparation, resizing

_log = logging.getLogger(__name__)

_LM1B_CHARACTERS = {"train": 10_000_000, "test": 1_000_000}  # at least these are read, in whole sentences
_CACHE = "lopt_arrays.npz"
_IMAGE_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels", "num_classes")


class Split(NamedTuple):
  """The examples of one split, in the order that TFDS shuffled them into when it prepared the set."""

  images: UInt8[Array, "examples height width channels"]
  labels: Int32[Array, " examples"]


class Dataset(NamedTuple):
  """A data set on the device. Pixels are 0 ... `max_value`, labels 0 ... `num_classes` - 1."""

  train: Split
  validation: Split
  test: Split
  num_classes: int
  max_value: int


class Text(NamedTuple):
  """A text on the device, each character as its index in `alphabet`."""

  train: Int32[Array, " characters"]
  validation: Int32[Array, " characters"]
  test: Int32[Array, " characters"]
  alphabet: str  # all characters of the three, in the order of their code points


def load(name: str, *, resolution: int | None = None, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
  """Loads an image-classification set as device arrays; prepares it first where that is needed.

  The test split is the official one; it is 'validation' for sets that publish no 'test', and the last 360 images
  in scikit-learn's order for digits, which come as one. Validation is the last tenth (of digits: the last fifth)
  of the official train split, and train the rest of that.

  Args:
    name: a set of images in the list above, or one of the TFDS catalogue that was prepared before.
    resolution: images are resized to resolution x resolution pixels, each the mean of the area that it covers,
      rounded; None keeps the native size.
    data_dir: where TFDS keeps its data; None is TFDS's own default, $TFDS_DATA_DIR or ~/tensorflow_datasets.

  The environment variable LOPT_MANUAL_DIR names a folder whose subfolders (mnist/, emnist/, …) hold the original
  files, for machines without a network.

  Raises:
    ValueError: no such name, a bad resolution, or not an image-classification set.
    FileNotFoundError: the set is not prepared, and what it is prepared from cannot be had.
    OSError: corrupt original files, a full disk, or a directory that cannot be written.
  """
  if resolution is not None and resolution < 1:
    raise ValueError(f"resolution={resolution}: must be at least 1 pixel, or None for the native size")
  if name in preparation.TEXTS:
    there = ", ".join(preparation.IMAGES)
    raise ValueError(f"dataset={name!r} is a text, not for image classification; there are: {there}")
  directory = preparation.prepare(name, data_dir=data_dir)
  arrays = _arrays(directory, _IMAGE_ARRAYS, lambda: _decode_images(name, directory))

  if name == "emnist/letters":  # TFDS declares 37 classes; the labels are 1 to 26.
    arrays |= {
      "train_labels": arrays["train_labels"] - 1,
      "test_labels": arrays["test_labels"] - 1,
      "num_classes": 26,
    }
  images, labels = resizing.resize(arrays["train_images"], resolution), arrays["train_labels"]
  cut = len(labels) - len(labels) // (5 if name == "digits" else 10)
  return Dataset(
    train=Split(jnp.asarray(images[:cut]), jnp.asarray(labels[:cut])),
    validation=Split(jnp.asarray(images[cut:]), jnp.asarray(labels[cut:])),
    test=Split(jnp.asarray(resizing.resize(arrays["test_images"], resolution)), jnp.asarray(arrays["test_labels"])),
    num_classes=int(arrays["num_classes"]),
    max_value=16 if name == "digits" else 255,
  )


def load_text(name: str, *, data_dir: str | os.PathLike[str] | None = None) -> Text:
  """Loads a text as device arrays in its official splits; prepares it first where that is needed.

  Of lm1b, which is prepared as a whole (30 million sentences: that takes long), it takes the first sentences in the
  order that TFDS shuffled them into, one a line: 10 million characters for training, and of the held-out part half a
  million each for validation and test.

  Args:
    name: `tiny_shakespeare` or `lm1b`.
    data_dir: as for `load`.

  On machines without a network, $LOPT_MANUAL_DIR/<name>/ holds the original file.

  Raises:
    ValueError: no such text.
    FileNotFoundError, OSError: as for `load`.
  """
  if name not in preparation.TEXTS:
    raise ValueError(f"dataset={name!r} is no text that this library has; there are: {', '.join(preparation.TEXTS)}")
  directory = preparation.prepare(name, data_dir=data_dir)
  arrays = _arrays(directory, originals.TEXT_SPLITS, lambda: _decode_text(name, directory))
  return _encode(*(arrays[split].tobytes().decode() for split in originals.TEXT_SPLITS))


def read_text(path: str | os.PathLike[str]) -> Text:
  """Reads a UTF-8 file as device arrays: its first 90% are for training, and 5% each for validation and testing.

  Raises:
    OSError: the file cannot be read.
    ValueError: it is not UTF-8, or has less than 20 characters.
  """
  try:
    text = Path(path).expanduser().read_text("utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from None
  if len(text) < 20:
    raise ValueError(f"{path}: has {len(text)} characters, too few to be split")
  return _encode(*originals.cut_text(text))


def _encode(train: str, validation: str, test: str) -> Text:
  parts = [np.frombuffer(part.encode("utf-32-le"), np.uint32) for part in (train, validation, test)]
  code_points, indices = np.unique(np.concatenate(parts), return_inverse=True)
  cuts = np.cumsum([len(part) for part in parts[:-1]])
  return Text(
    *(jnp.asarray(part, jnp.int32) for part in np.split(indices, cuts)),
    alphabet="".join(map(chr, code_points)),
  )


def _arrays(directory: Path, names: tuple[str, ...], decode: Callable[[], dict[str, np.ndarray]]) -> dict[str, Any]:
  """The decoded set, from its cache where that can be read."""
  arrays = _read_cache(directory, names)
  if arrays is None:
    arrays = decode()
    _write_cache(directory, arrays)
  return arrays


def _check_features(name: str, directory: Path) -> None:
  """Raises ValueError for a set with features that are not TFDS's own: TFDS would import the module that it names."""
  path = directory / "features.json"
  try:
    todo = [json.loads(path.read_text("utf-8"))]
  except (OSError, ValueError, RecursionError) as error:
    raise ValueError(f"dataset={name!r}: {path} cannot be read ({error}); prepare the set again") from error
  while todo:
    value = todo.pop()
    if isinstance(value, dict):
      for key in ("pythonClassName", "type"):
        title = value.get(key)
        if isinstance(title, str) and "." in title and not title.startswith("tensorflow_datasets.core.features."):
          raise ValueError(f"dataset={name!r}: {path} names the class {title!r}, which is not of TFDS; not imported")
    if isinstance(value, (dict, list)):
      todo += value.values() if isinstance(value, dict) else value


def _open(name: str, directory: Path) -> Any:
  """The builder of a prepared set."""
  import tensorflow_datasets as tfds

  _check_features(name, directory)
  builder: Any = tfds.builder_from_directory(directory)
  file_format = getattr(builder.info.file_format, "value", "an unknown")
  if file_format != "array_record":
    raise ValueError(
      f"dataset={name!r} in {directory} is in {file_format} format, which needs TensorFlow; prepare it again with "
      "file_format='array_record'"
    )
  return builder


def _decode_text(name: str, directory: Path) -> dict[str, np.ndarray]:
  """Reads the splits of a prepared text, as their UTF-8 bytes."""
  builder = _open(name, directory)
  if name == "lm1b":
    train, held_out = (_first_lines(builder, split) for split in ("train", "test"))
    middle = held_out.index(b"\n", len(held_out) // 2) + 1
    texts = {"train": train, "validation": held_out[:middle], "test": held_out[middle:]}
  else:
    texts = {split: builder.as_data_source(split)[0]["text"] for split in originals.TEXT_SPLITS}
  return {split: np.frombuffer(text, np.uint8) for split, text in texts.items()}


def _first_lines(builder: Any, split: str) -> bytes:
  """Sentences of lm1b, one a line, up to the number of characters that is used of this split."""
  source, lines, length = builder.as_data_source(split), [], 0
  for start in range(0, len(source), 1024):
    for example in source.__getitems__(range(start, min(start + 1024, len(source)))):
      if length >= _LM1B_CHARACTERS[split]:
        return b"".join(lines)
      lines.append(example["text"] + b"\n")
      length += len(lines[-1].decode())
  return b"".join(lines)


def _decode_images(name: str, directory: Path) -> dict[str, np.ndarray]:
  """Reads all examples of a prepared set of images."""
  builder = _open(name, directory)
  features, splits = builder.info.features, builder.info.splits
  test = "test" if "test" in splits else "validation"
  if not {"image", "label"} <= set(features) or not {"train", test} <= set(splits):
    raise ValueError(
      f"dataset={name!r} in {directory} is not for image classification: that takes features image and label (it "
      f"has {', '.join(features)}) and splits train and test or validation (it has {', '.join(splits)})"
    )
  arrays: dict[str, np.ndarray] = {"num_classes": np.array(features["label"].num_classes)}
  for split, source_split in (("train", "train"), ("test", test)):
    source = builder.as_data_source(source_split)
    with _without_advice():
      examples = [
        example
        for start in range(0, len(source), 1024)  # batched access is twice as fast as iteration
        for example in source.__getitems__(range(start, min(start + 1024, len(source))))
      ]
    shapes = {example["image"].shape for example in examples}
    if len(shapes) != 1 or examples[0]["image"].dtype != np.uint8:
      raise ValueError(f"dataset={name!r} in {directory}: its images are not uint8 of one size, but {shapes}")
    arrays[f"{split}_images"] = np.stack([example["image"] for example in examples])
    arrays[f"{split}_labels"] = np.array([int(example["label"]) for example in examples], np.int32)
  return arrays


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
  """Keeps from the terminal TFDS's advice to install OpenCV, which would hardly help for a set decoded once."""

  def keep(record: logging.LogRecord) -> bool:
    return "OpenCV" not in record.getMessage()

  logger = logging.getLogger("absl")
  logger.addFilter(keep)
  try:
    yield
  finally:
    logger.removeFilter(keep)


def _read_cache(directory: Path, names: tuple[str, ...]) -> dict[str, np.ndarray] | None:
  """The decoded set; None where there is none that can be read whole (the archive has check sums)."""
  try:
    # np.load of a path would leave the file open where it is no archive.
    with (directory / _CACHE).open("rb") as file, np.load(file, allow_pickle=False) as cache:
      return {name: cache[name] for name in names}
  except FileNotFoundError:
    return None
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
    _log.warning("%s is decoded again: cannot read %s (%s)", directory, _CACHE, error)
    return None


def _write_cache(directory: Path, arrays: dict[str, np.ndarray]) -> None:
  buffer = io.BytesIO()
  np.savez(buffer, **arrays)  # pyright: ignore[reportArgumentType]
  try:
    files.write_atomically(directory / _CACHE, buffer.getvalue())
  except OSError as error:  # A set in a directory that others own can be used, only starts slowly.
    _log.warning("%s is decoded again at each start: %s", directory, error.strerror)
