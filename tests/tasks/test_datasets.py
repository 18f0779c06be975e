"""Data sets against their sources, parsed here without TFDS."""

import collections
import dataclasses
import errno
import gzip
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import sklearn.datasets

from lopt.tasks import datasets, preparation

MANUAL_DIR = os.environ.get("LOPT_MANUAL_DIR")
IDX_FILES = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  """A data directory that tests may read and prepare sets in, but not otherwise change."""
  return tmp_path_factory.mktemp("data")


@pytest.fixture
def digits_dir(data_dir, tmp_path):
  """A data directory of its own, with digits prepared."""
  datasets.load("digits", data_dir=data_dir)
  shutil.copytree(data_dir / "digits", tmp_path / "digits")
  return tmp_path


def examples(*splits):
  """The multiset of (pixels, label), in which the order that TFDS shuffles into does not matter."""
  return collections.Counter(
    (image.tobytes(), int(label))
    for images, labels in splits
    for image, label in zip(np.asarray(images), np.asarray(labels), strict=True)
  )


def assert_equal(actual, expected):
  assert actual[3:] == expected[3:]
  for actual_split, expected_split in zip(actual[:3], expected[:3], strict=True):
    np.testing.assert_array_equal(actual_split.images, expected_split.images)
    np.testing.assert_array_equal(actual_split.labels, expected_split.labels)


def run_python(code, *args):
  """A start of its own, in which nothing has been imported yet."""
  return subprocess.Popen(
    [sys.executable, "-W", "error", "-c", code, *map(str, args)],
    cwd=Path(__file__).parents[2],
    env={**os.environ, "PYTHONPATH": "."},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def test_digits_are_scikit_learns(data_dir):
  dataset = datasets.load("digits", data_dir=data_dir)
  images, labels = sklearn.datasets.load_digits(return_X_y=True)
  images = images.astype(np.uint8)

  assert (dataset.num_classes, dataset.max_value) == (10, int(images.max()))
  assert [len(split.labels) for split in dataset[:3]] == [1150, 287, 360]
  assert dataset.train.images.shape[1:] == (8, 8, 1)
  assert dataset.train.images.dtype == np.uint8
  assert dataset.train.labels.dtype == np.int32
  assert examples(dataset.train, dataset.validation) == examples((images[:1437], labels[:1437]))
  assert examples(dataset.test) == examples((images[1437:], labels[1437:]))
  # There are no two equal digits, so equal multisets also mean that the splits share none.
  assert max(examples(*dataset[:3]).values()) == 1


def write_idx(path, values):
  """The format: two zeros, the type (8: uint8), the number of dimensions, each as four bytes, the values."""
  header = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
  path.write_bytes(gzip.compress(header + values.tobytes()))


def read_idx(path):
  content = gzip.decompress(path.read_bytes())
  dimensions = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(content[3])]
  return np.frombuffer(content[4 + 4 * len(dimensions) :], np.uint8).reshape(dimensions)


def register(folder, monkeypatch):
  """Makes the files in the folder the originals of the set that has its name, by their sizes and check sums."""
  import tensorflow_datasets as tfds

  stock: Any = tfds.builder_cls(folder.name)
  url_infos = dict(stock.url_infos)
  for path in folder.iterdir():
    (url,) = (url for url in url_infos if url.endswith(f"/{path.name}"))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    url_infos[url] = dataclasses.replace(url_infos[url], size=path.stat().st_size, checksum=digest)
  monkeypatch.setattr(stock, "url_infos", url_infos)
  monkeypatch.setenv("LOPT_MANUAL_DIR", str(folder.parent))


@pytest.fixture
def small_mnist(tmp_path, monkeypatch):
  """Makes mnist a set of 120 and 30 random images: the original files take long, and not everyone has them."""
  folder = tmp_path / "originals" / "mnist"
  folder.mkdir(parents=True)
  generator = np.random.default_rng(0)
  arrays = []
  for name in IDX_FILES:
    shape = (120 if "train" in name else 30, 28, 28)
    arrays.append(generator.integers(0, *((256, shape) if "images" in name else (10, shape[:1])), dtype=np.uint8))
    write_idx(folder / name, arrays[-1])
  register(folder, monkeypatch)
  return arrays


def check_idx_set(name, data_dir, train_images, train_labels, test_images, test_labels):
  """Compares with the original arrays, and reads what was written through the catalogue's own builder."""
  import tensorflow_datasets as tfds

  dataset = datasets.load(name, data_dir=data_dir)
  n = len(train_labels)
  assert (dataset.num_classes, dataset.max_value) == (10, 255)
  sizes = (n * 9 // 10, n // 10, len(test_labels))
  assert [split.images.shape for split in dataset[:3]] == [(size, 28, 28, 1) for size in sizes]
  assert examples(dataset.train, dataset.validation) == examples((train_images, train_labels))
  assert examples(dataset.test) == examples((test_images, test_labels))

  stock: Any = tfds.builder(name, data_dir=data_dir, file_format="array_record")
  assert type(stock).__module__ == "tensorflow_datasets.image_classification.mnist"
  source = stock.as_data_source("train[90%:]")
  for i in (0, 1, n // 10 - 1):
    np.testing.assert_array_equal(source[i]["image"], dataset.validation.images[i])
    assert source[i]["label"] == dataset.validation.labels[i]


def test_mnist_is_read_from_idx_files(small_mnist, tmp_path):
  check_idx_set("mnist", tmp_path / "data", *small_mnist)


def test_resized_by_block_averages(small_mnist, tmp_path):
  native = datasets.load("mnist", data_dir=tmp_path)
  pixels = np.asarray(native.test.images, np.float64)
  for resolution, block in ((14, 2), (7, 4)):
    blocks = pixels.reshape(-1, resolution, block, resolution, block, 1)
    resized = datasets.load("mnist", resolution=resolution, data_dir=tmp_path)
    np.testing.assert_array_equal(resized.test.images, np.rint(blocks.mean(axis=(2, 4))))
    np.testing.assert_array_equal(resized.test.labels, native.test.labels)


@pytest.mark.long
@pytest.mark.skipif(MANUAL_DIR is None, reason="LOPT_MANUAL_DIR is not set to a folder with the original files")
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_the_originals(name, data_dir):
  assert MANUAL_DIR is not None
  check_idx_set(name, data_dir, *(read_idx(Path(MANUAL_DIR, name, file)) for file in IDX_FILES))


@pytest.mark.parametrize("resolution", [1, 3, 4, 8, 12])
def test_resize_is_the_mean_over_the_covered_area(data_dir, resolution):
  """Against block averages of images magnified so that blocks and pixels align."""
  native = np.asarray(datasets.load("digits", data_dir=data_dir).train.images, np.float64)
  magnified = native.repeat(resolution, axis=1).repeat(resolution, axis=2)
  expected = magnified.reshape(-1, resolution, 8, resolution, 8, 1).mean(axis=(2, 4))
  resized = datasets.load("digits", resolution=resolution, data_dir=data_dir).train.images
  # 0.5 is what rounding to whole numbers may change
  np.testing.assert_allclose(resized, expected, rtol=0, atol=0.5 + 1e-5)


def write_set(data_dir, name, *, splits, features, example, file_format="array_record"):
  """Writes what a catalogue builder would have prepared."""
  import tensorflow_datasets as tfds

  class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("2.3.4")

    def _info(self):
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
      return {split: self._generate_examples(split) for split in splits}

    def _generate_examples(self, split):
      for i in range(20):
        yield i, example(split, i)

  Builder.name = name
  Builder(data_dir=data_dir, file_format=file_format).download_and_prepare()


def colour_image(split, i):
  return np.random.default_rng([len(split), i]).integers(0, 256, (5, 7, 3), np.uint8)


def test_a_prepared_catalogue_set(tmp_path):
  import tensorflow_datasets as tfds

  write_set(
    tmp_path,
    "cifar10",
    splits=("train", "validation"),
    features={"image": tfds.features.Image(shape=(5, 7, 3)), "label": tfds.features.ClassLabel(num_classes=4)},
    # PIL, because TFDS encodes arrays by TensorFlow
    example=lambda split, i: {"image": PIL.Image.fromarray(colour_image(split, i)), "label": i % 4},
  )
  dataset = datasets.load("cifar10", data_dir=tmp_path)
  assert (dataset.num_classes, dataset.max_value) == (4, 255)
  assert [len(split.labels) for split in dataset[:3]] == [18, 2, 20]
  labels = np.arange(20) % 4
  train, test = ([colour_image(split, i) for i in range(20)] for split in ("train", "validation"))
  assert examples(dataset.train, dataset.validation) == examples((train, labels))
  assert examples(dataset.test) == examples((test, labels))
  assert datasets.load("cifar10", resolution=3, data_dir=tmp_path).train.images.shape == (18, 3, 3, 3)


def test_a_prepared_set_that_is_no_image_classification(tmp_path):
  import tensorflow_datasets as tfds

  write_set(
    tmp_path, "words", splits=("train",), features={"text": tfds.features.Text()}, example=lambda s, i: {"text": s}
  )
  with pytest.raises(ValueError, match=r"'words'.*not for image classification.*has text.*has train"):
    datasets.load("words", data_dir=tmp_path)


def test_a_set_does_not_choose_what_is_imported(tmp_path, monkeypatch):
  """TFDS imports the module of a feature that it does not know; ours are TFDS's own."""
  import tensorflow_datasets as tfds

  write_set(
    tmp_path, "words", splits=("train",), features={"text": tfds.features.Text()}, example=lambda s, i: {"text": s}
  )
  (tmp_path / "stranger.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w').close()\n")
  monkeypatch.syspath_prepend(tmp_path)
  (path,) = tmp_path.glob("words/*/features.json")
  good = path.read_text()
  path.write_text(good.replace("tensorflow_datasets.core.features.text_feature.Text", "stranger.Text"))
  assert path.read_text() != good
  with pytest.raises(ValueError, match=r"features\.json names the class 'stranger\.Text', which is not of TFDS"):
    datasets.load("words", data_dir=tmp_path)
  path.write_text(good[:-9])
  with pytest.raises(ValueError, match=r"features\.json cannot be read .*; prepare the set again"):
    datasets.load("words", data_dir=tmp_path)
  assert not (tmp_path / "imported").exists()


@pytest.fixture
def small_shakespeare(tmp_path, monkeypatch):
  """Makes tiny_shakespeare a text of 1,003 characters, some of them of several bytes."""
  text = "".join(np.random.default_rng(0).choice(list("ab Zß€\n"), 1003))
  path = tmp_path / "originals" / "tiny_shakespeare" / "input.txt"
  path.parent.mkdir(parents=True)
  path.write_bytes(text.encode())
  register(path.parent, monkeypatch)
  return text


def characters(text):
  return ["".join(text.alphabet[i] for i in np.asarray(part)) for part in text[:3]]


def test_a_text_in_the_catalogues_splits(small_shakespeare, tmp_path):
  import tensorflow_datasets as tfds

  data_dir = tmp_path / "data"
  text = datasets.load_text("tiny_shakespeare", data_dir=data_dir)
  assert text.alphabet == "\n Zabß€"
  assert "".join(characters(text)) == small_shakespeare
  assert [len(part) for part in text[:3]] == [902, 50, 51]  # ⌊0.9 · 1003⌋, and half of the rest, rounded down
  stock: Any = tfds.builder("tiny_shakespeare", data_dir=data_dir, file_format="array_record")
  assert type(stock).__module__.startswith("tensorflow_datasets.datasets.tiny_shakespeare")
  written = [stock.as_data_source(split)[0]["text"].decode() for split in ("train", "validation", "test")]
  assert written == characters(text)
  for path in data_dir.glob("*/*/*array_record*"):
    path.unlink()
  again = datasets.load_text("tiny_shakespeare", data_dir=data_dir)
  assert (characters(again), again.alphabet) == (characters(text), text.alphabet)
  own = datasets.read_text(tmp_path / "originals" / "tiny_shakespeare" / "input.txt")
  assert (characters(own), own.alphabet) == (characters(text), text.alphabet)


@pytest.mark.skipif(MANUAL_DIR is None, reason="LOPT_MANUAL_DIR is not set to a folder with the original files")
def test_the_original_text(data_dir):
  assert MANUAL_DIR is not None
  text = datasets.load_text("tiny_shakespeare", data_dir=data_dir)
  assert "".join(characters(text)) == Path(MANUAL_DIR, "tiny_shakespeare", "input.txt").read_text("utf-8")
  assert len(text.alphabet) == 65


def test_the_second_start_imports_neither_tfds_nor_tensorflow(digits_dir):
  code = "import sys; from lopt.tasks import datasets; datasets.load('digits', data_dir=sys.argv[1]);"
  code += "print([m for m in ('tensorflow', 'tensorflow_datasets', 'sklearn') if m in sys.modules])"
  process = run_python(code, digits_dir)
  out, err = process.communicate(timeout=60)
  assert (out.strip(), err) == ("[]", "")


def test_preparing_is_quiet_and_needs_no_tensorflow(tmp_path):
  code = "import sys; from lopt.tasks import datasets; datasets.load('digits', data_dir=sys.argv[1]);"
  code += "print('tensorflow' in sys.modules)"
  out, err = run_python(code, tmp_path).communicate(timeout=60)
  assert (out.strip(), err) == ("False", "")


@pytest.mark.slow
def test_processes_that_prepare_the_same_set_at_once(data_dir, tmp_path):
  # They wait for each other just before TFDS starts, so that both of them prepare.
  code = """
import pathlib, sys, time
from lopt.tasks import datasets, preparation
original = preparation._digits_builder
def builder(folder):
  pathlib.Path(sys.argv[1], sys.argv[2]).touch()
  while len(list(pathlib.Path(sys.argv[1]).glob("ready*"))) < 2:
    time.sleep(0.01)
  return original(folder)
preparation._digits_builder = builder
print(datasets.load("digits", data_dir=sys.argv[1]).train.images.sum())
"""
  processes = [run_python(code, tmp_path, f"ready{i}") for i in range(2)]
  results = [process.communicate(timeout=60) for process in processes]
  expected = datasets.load("digits", data_dir=data_dir)
  assert results == [(f"{expected.train.images.sum()}\n", "")] * 2
  assert_equal(datasets.load("digits", data_dir=tmp_path), expected)
  assert sorted(path.name for path in tmp_path.iterdir() if "ready" not in path.name) == ["digits", "downloads"]


def test_the_cache_is_enough(digits_dir, data_dir):
  version = digits_dir / "digits" / "1.0.0"
  for path in version.glob("*array_record*"):
    path.unlink()
  assert_equal(datasets.load("digits", data_dir=digits_dir), datasets.load("digits", data_dir=data_dir))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "another"])
def test_a_damaged_cache_is_made_anew(digits_dir, data_dir, damage, caplog):
  cache = digits_dir / "digits" / "1.0.0" / "lopt_arrays.npz"
  content = bytearray(cache.read_bytes())
  content[len(content) // 2] ^= 1
  if damage == "another":
    np.savez(cache, something=np.zeros(3))
  else:
    cache.write_bytes({"truncated": content[:1000], "flipped": content, "empty": b""}[damage])
  expected = datasets.load("digits", data_dir=data_dir)
  assert_equal(datasets.load("digits", data_dir=digits_dir), expected)
  assert "decoded again" in caplog.text
  caplog.clear()
  assert_equal(datasets.load("digits", data_dir=digits_dir), expected)
  assert not caplog.text


def test_a_cache_that_cannot_be_written_is_done_without(digits_dir, data_dir, monkeypatch, caplog):
  version = digits_dir / "digits" / "1.0.0"
  (version / "lopt_arrays.npz").unlink()
  before = sorted(version.iterdir())

  def fail(*args):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(os, "replace", fail)
  assert_equal(datasets.load("digits", data_dir=digits_dir), datasets.load("digits", data_dir=data_dir))
  assert "no space left" in caplog.text
  assert sorted(version.iterdir()) == before


def test_the_highest_version_is_taken(digits_dir):
  versions = digits_dir / "digits"
  shutil.copytree(versions / "1.0.0", versions / "10.0.0")
  shutil.copytree(versions / "1.0.0", versions / "9.0.0")
  (versions / "11.0.0").mkdir()  # incomplete
  assert preparation.newest_version(versions) == versions / "10.0.0"


def test_the_default_directory_is_tfds_own(digits_dir, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(digits_dir))
  assert len(datasets.load("digits").test.labels) == 360


# Errors: one line that says what, where, and how to mend it


def one_line(error_info):
  message = str(error_info.value)
  assert "\n" not in message
  return message


@pytest.mark.parametrize("name", ["digitz", "", "../digits", "/etc", "digits/1.0.0/x", "no_such_set"])
def test_unknown_name(digits_dir, name):
  with pytest.raises(ValueError, match="does not exist") as error_info:
    datasets.load(name, data_dir=digits_dir)
  message = one_line(error_info)
  assert "There are: cifar10, cifar100, digits, emnist/balanced" in message
  assert str(digits_dir) in message
  assert ("did you mean 'digits'?" in message) == ("digit" in name)


def test_a_catalogue_set_that_is_not_prepared(tmp_path):
  with pytest.raises(FileNotFoundError, match="'stl10' is not prepared in ") as error_info:
    datasets.load("stl10", data_dir=tmp_path)
  assert f"python -m lopt.tasks.prepare stl10 --data_dir={tmp_path}" in one_line(error_info)


def test_a_set_with_configurations(digits_dir):
  shutil.move(digits_dir / "digits", digits_dir / "imagenet_resized" / "8x8")
  assert len(datasets.load("imagenet_resized/8x8", data_dir=digits_dir).test.labels) == 360
  with pytest.raises(ValueError, match="several forms") as error_info:
    datasets.load("imagenet_resized", data_dir=digits_dir)
  assert one_line(error_info).endswith("imagenet_resized/8x8")


def test_missing_files_without_network_fail_at_once(tmp_path, monkeypatch):
  monkeypatch.setenv("LOPT_MANUAL_DIR", str(tmp_path / "originals"))
  (tmp_path / "originals" / "mnist").mkdir(parents=True)
  (tmp_path / "originals" / "mnist" / IDX_FILES[0]).touch()

  def unreachable(request, timeout):
    assert request.full_url.startswith("https://storage.googleapis.com/")
    assert timeout < 10
    raise urllib.error.URLError("Name or service not known")

  monkeypatch.setattr("urllib.request.urlopen", unreachable)
  start = time.monotonic()
  with pytest.raises(FileNotFoundError, match="'mnist' is not prepared") as error_info:
    datasets.load("mnist", data_dir=tmp_path)
  assert time.monotonic() - start < 5
  message = one_line(error_info)
  assert str(tmp_path / "originals" / "mnist") in message
  assert "set LOPT_MANUAL_DIR" in message
  assert [file in message for file in IDX_FILES] == [False, True, True, True]
  assert [path.name for path in tmp_path.iterdir()] == ["originals"]


def test_a_download_that_breaks_off(tmp_path, monkeypatch):
  import requests
  import tensorflow_datasets as tfds

  def fail(self, urls):
    raise requests.ConnectionError("Connection reset by peer")

  monkeypatch.delenv("LOPT_MANUAL_DIR", raising=False)
  monkeypatch.setattr(preparation, "_check_sources", lambda *args: None)
  monkeypatch.setattr(tfds.download.DownloadManager, "download", fail)
  with pytest.raises(OSError, match="download failed") as error_info:
    datasets.load("mnist", data_dir=tmp_path)
  assert "Connection reset by peer" in one_line(error_info)
  assert not list(tmp_path.glob("*mnist*"))


def test_a_corrupt_original_is_named(small_mnist, tmp_path):
  corrupt = tmp_path / "originals" / "mnist" / "t10k-images-idx3-ubyte.gz"
  content = bytearray(corrupt.read_bytes())
  content[len(content) // 2] ^= 1
  corrupt.write_bytes(content)
  with pytest.raises(OSError, match="corrupt") as error_info:
    datasets.load("mnist", data_dir=tmp_path / "data")
  assert str(corrupt) in one_line(error_info)
  assert not list((tmp_path / "data").glob("*mnist*"))


def test_a_directory_that_cannot_be_made(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(OSError, match=r"cannot write .*choose another data_dir") as error_info:
    datasets.load("digits", data_dir=tmp_path / "file" / "data")
  assert str(tmp_path / "file" / "data" / "digits") in one_line(error_info)


def test_a_full_disk(tmp_path, monkeypatch):
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4_000_000))
  with pytest.raises(OSError, match="no space left on the disk; see that 5 MB are free") as error_info:
    datasets.load("digits", data_dir=tmp_path)
  assert error_info.value.errno == errno.ENOSPC
  assert str(tmp_path) in one_line(error_info)
  assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_while_writing(tmp_path, monkeypatch):
  """array_record then raises a RuntimeError like this (seen on a file system of 1 MB)."""

  def fail(folder):
    raise RuntimeError("write() failed: No space left on device; writing x; at byte 4096")

  monkeypatch.setattr(preparation, "_digits_builder", fail)
  with pytest.raises(OSError, match=r"No space left on device.*5 MB") as error_info:
    datasets.load("digits", data_dir=tmp_path)
  assert str(tmp_path) in one_line(error_info)
  assert not list(tmp_path.iterdir())


def test_a_corrupt_original_text(small_shakespeare, tmp_path):
  corrupt = tmp_path / "originals" / "tiny_shakespeare" / "input.txt"
  corrupt.write_text(small_shakespeare.replace("Z", "z"), "utf-8")
  with pytest.raises(OSError, match="corrupt") as error_info:
    datasets.load_text("tiny_shakespeare", data_dir=tmp_path / "data")
  assert str(corrupt) in one_line(error_info)


def test_images_and_texts_are_told_apart(tmp_path):
  with pytest.raises(ValueError, match=r"'tiny_shakespeare' is a text.*there are: digits"):
    datasets.load("tiny_shakespeare", data_dir=tmp_path)
  with pytest.raises(ValueError, match=r"'mnist' is no text.*there are: tiny_shakespeare"):
    datasets.load_text("mnist", data_dir=tmp_path)


def test_texts_that_cannot_be_read(tmp_path):
  with pytest.raises(FileNotFoundError, match="no_such_file"):
    datasets.read_text(tmp_path / "no_such_file")
  (tmp_path / "latin").write_bytes("Straße und Weg, noch und noch".encode("latin-1"))
  with pytest.raises(ValueError, match=r"latin: is not UTF-8 text .* at byte 4"):
    datasets.read_text(tmp_path / "latin")
  (tmp_path / "short").write_text("short")
  with pytest.raises(ValueError, match="short: has 5 characters"):
    datasets.read_text(tmp_path / "short")


@pytest.mark.parametrize("resolution", [0, -8])
def test_bad_resolution(tmp_path, resolution):
  with pytest.raises(ValueError, match=f"^resolution={resolution}: must be at least 1"):
    datasets.load("digits", resolution=resolution, data_dir=tmp_path)


def test_tfrecord_needs_another_format(digits_dir):
  info = digits_dir / "digits" / "1.0.0" / "dataset_info.json"
  info.write_text(info.read_text().replace("array_record", "tfrecord"))
  (info.parent / "lopt_arrays.npz").unlink()
  with pytest.raises(ValueError, match="tfrecord format, which needs TensorFlow") as error_info:
    datasets.load("digits", data_dir=digits_dir)
  assert "file_format='array_record'" in one_line(error_info)


def test_tensorflow_is_not_imported():
  if importlib.util.find_spec("tensorflow"):
    pytest.skip("TensorFlow is installed, so another test may have imported it")
  assert "tensorflow" not in sys.modules
