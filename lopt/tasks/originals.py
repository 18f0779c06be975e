"""Sets of the TFDS catalogue made from their original files without TensorFlow, which the catalogue's code needs."""

import gzip
import io
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

TEXT_SPLITS = ("train", "validation", "test")


class Files(NamedTuple):
  """How a set of the catalogue is made from its original files without TensorFlow."""

  read: Callable[[Any, dict[str, Path]], Mapping[str, Iterator[tuple[Any, dict[str, Any]]]]]
  """`(builder, paths by file name) -> {split: (key, example) pairs}`; keys are the stock builder's, for its order."""
  needed: Callable[[str, str], bool] = lambda file, config: True
  """`(file name, configuration) -> whether this file is read`."""


def builder(name: str, data_dir: Path) -> Any:
  """The catalogue's builder with the steps replaced that need TensorFlow: unpacking, reading, encoding PNG.

  It writes what the unmodified builder would, which can read it.
  """
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core import registered

  set_name, _, config = name.partition("/")
  stock: Any = tfds.builder_cls(set_name)
  with registered.skip_registration():

    class Catalogue(stock):
      name = stock.name
      pkg_dir_path = stock.pkg_dir_path  # where the description and the citation stand
      url_infos = stock.url_infos  # the registered check sums

      def _split_generators(self, dl_manager):
        paths = dl_manager.download({file_name(url): url for url in urls(name)})
        examples = FILES[set_name].read(self, {file: Path(path) for file, path in paths.items()})
        return {split: self._generate_examples(part) for split, part in examples.items()}

      def _generate_examples(self, examples):
        yield from examples

  return Catalogue(data_dir=data_dir, file_format="array_record", config=config or None)


def urls(name: str) -> list[str]:
  """Where the original files of a set are; TFDS has their check sums."""
  import tensorflow_datasets as tfds

  set_name, _, config = name.partition("/")
  return [url for url in tfds.builder_cls(set_name).url_infos or () if FILES[set_name].needed(file_name(url), config)]


def file_name(url: str) -> str:
  return url.rpartition("/")[2]


def cut_text(text: str) -> tuple[str, str, str]:
  """The first 90% and two halves of what remains, as TFDS cuts tiny_shakespeare."""
  train = int(len(text) * 0.9)
  validation = train + int((len(text) - train) * 0.5)
  return text[:train], text[train:validation], text[validation:]


# Readers of original files, whose sha256 TFDS has checked by now


def _read_mnist(builder, paths):
  del builder
  return {
    split: _idx_examples(
      *(paths[f"{prefix}-{kind}-ubyte.gz"].read_bytes() for kind in ("images-idx3", "labels-idx1"))
    )
    for split, prefix in (("train", "train"), ("test", "t10k"))
  }


def _read_emnist(builder, paths):
  with zipfile.ZipFile(paths["gzip.zip"]) as archive:
    prefix = f"gzip/emnist-{builder.builder_config.name}"
    return {
      split: _idx_examples(
        *(archive.read(f"{prefix}-{split}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
      )
      for split in ("train", "test")
    }


def _idx_examples(images_gz, labels_gz):
  # idx format: a header of 4 bytes and 4 more for each dimension, then the values.
  images = np.frombuffer(gzip.decompress(images_gz), np.uint8, offset=16).reshape(-1, 28, 28)
  labels = np.frombuffer(gzip.decompress(labels_gz), np.uint8, offset=8)
  for index, (image, label) in enumerate(zip(images, labels, strict=True)):
    yield index, {"image": _image(image), "label": int(label)}


def _read_cifar(builder, paths):
  """An example is a byte for each label and 3,072 for the image, channels first."""
  info = builder._cifar_info
  (path,) = paths.values()
  with tarfile.open(path) as archive:
    contents = {member.name: _member(archive, member) for member in archive if member.isfile()}
  for label, file in zip(info.label_keys, info.label_files, strict=True):
    builder.info.features[label].names = contents[info.prefix + file].decode().split()

  def examples(split, files):
    values = np.frombuffer(b"".join(contents[info.prefix + file] for file in files), np.uint8)
    for index, row in enumerate(values.reshape(-1, len(info.label_keys) + 3072)):
      labels, pixels = np.split(row, [len(info.label_keys)])
      image = _image(pixels.reshape(3, 32, 32).transpose(1, 2, 0))
      labels = dict(zip(info.label_keys, map(int, labels), strict=True))
      yield index, {"id": f"{split}_{index:05d}", "image": image, **labels}

  return {"train": examples("train", info.train_files), "test": examples("test", info.test_files)}


def _read_svhn(builder, paths):
  del builder

  def examples(split):
    import scipy.io

    arrays = scipy.io.loadmat(paths[f"{split}_32x32.mat"])
    for index, (image, label) in enumerate(zip(np.rollaxis(arrays["X"], -1), arrays["y"].ravel(), strict=True)):
      yield (
        index,
        {"id": f"{split}_{index:06d}", "image": _image(image), "label": int(label) % 10},
      )  # 10 is the digit 0

  return {split: examples(split) for split in ("train", "test")}


def _read_imagenet(builder, paths):
  size = builder.builder_config.size

  def examples(part):
    for file in sorted(file for file in paths if part in file):
      with zipfile.ZipFile(paths[file]) as archive:
        for member in archive.namelist():
          if member.endswith("/"):
            continue
          with np.load(io.BytesIO(archive.read(member)), allow_pickle=False) as arrays:
            images = arrays["data"].reshape(-1, 3, size, size).transpose(0, 2, 3, 1)
            labels = arrays["labels"]
          for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield f"{member}{index}", {"image": _image(image), "label": int(label) - 1}

  return {"train": examples("_train_"), "validation": examples("_val_")}


def _read_shakespeare(builder, paths):
  del builder
  parts = cut_text(paths["input.txt"].read_text("utf-8"))
  return {split: iter([(split, {"text": part})]) for split, part in zip(TEXT_SPLITS, parts, strict=True)}


def _read_lm1b(builder, paths):
  del builder
  (path,) = paths.values()

  def examples(folder):
    with tarfile.open(path) as archive:
      for member in archive:
        if member.isfile() and f"/{folder}/news.en" in member.name:
          lines = io.StringIO(_member(archive, member).decode())
          for index, line in enumerate(lines):
            yield f"{member.name.rpartition('/')[2]}_{index}", {"text": line.strip()}

  return {
    "train": examples("training-monolingual.tokenized.shuffled"),
    "test": examples("heldout-monolingual.tokenized.shuffled"),
  }


def _member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
  file = archive.extractfile(member)
  assert file is not None, member
  return file.read()


def _image(pixels: np.ndarray) -> Any:
  """For TFDS, which encodes arrays by TensorFlow but PIL's images by PIL."""
  import PIL.Image

  return PIL.Image.fromarray(np.ascontiguousarray(pixels))


FILES = {
  "mnist": Files(_read_mnist),
  "fashion_mnist": Files(_read_mnist),
  "kmnist": Files(_read_mnist),
  "emnist": Files(_read_emnist),
  "cifar10": Files(_read_cifar),
  "cifar100": Files(_read_cifar),
  "svhn_cropped": Files(
    _read_svhn, lambda file, config: not file.startswith("extra")
  ),  # a split that has no use here
  "imagenet_resized": Files(_read_imagenet, lambda file, config: file.startswith(f"Imagenet{config.split('x')[0]}_")),
  "tiny_shakespeare": Files(_read_shakespeare),
  "lm1b": Files(_read_lm1b),
}
