"""Sets made from their original files without TensorFlow, against arrays from which such files are written here, and
against what the catalogue's own code makes of the same files where only its way of opening them is replaced.
"""

import dataclasses
import glob
import gzip
import hashlib
import importlib.util
import io
import subprocess
import sys
import tarfile
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io

from lopt.tasks import datasets, originals, prepare

SIZES = {"train": 60, "test": 20}
CLASSES = {"kmnist": 10, "emnist/letters": 26, "cifar10": 10, "cifar100": 100, "svhn_cropped": 10} | {
  "imagenet_resized/16x16": 1000
}
SENTENCES = {
  "train": [f"Sentence {i} of the news , with an é and a € ." for i in range(60)],
  "test": [f"Held out : {i} ." for i in range(20)],
}


def random_set(name):
  """Images and labels of each split."""
  shape = {"kmnist": (28, 28, 1), "emnist": (28, 28, 1), "imagenet_resized": (16, 16, 3)}.get(
    name.split("/")[0], (32, 32, 3)
  )
  generator = np.random.default_rng(0)
  return {
    split: (generator.integers(0, 256, (n, *shape), np.uint8), generator.integers(0, CLASSES[name], n, np.uint16))
    for split, n in SIZES.items()
  }


def idx(values):
  """The format: two zeros, the type (8: uint8), the number of dimensions, each as four bytes, the values."""
  header = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
  return gzip.compress(header + values.tobytes())


def npz(**arrays):
  buffer = io.BytesIO()
  np.savez(buffer, **arrays)
  return buffer.getvalue()


def pack_zip(members):
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, "w") as archive:
    for member, content in members.items():
      archive.writestr(member, content)
  return buffer.getvalue()


def pack_tar(members):
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
    for member, content in members.items():
      info = tarfile.TarInfo(member)
      info.size = len(content)
      archive.addfile(info, io.BytesIO(content))
  return buffer.getvalue()


def original_files(name):
  """The published files, by their names, of a set with few examples."""
  if name == "lm1b":
    top = "1-billion-word-language-modeling-benchmark-r13output"
    lines = {split: [f" {sentence}\n".encode() for sentence in SENTENCES[split]] for split in SENTENCES}
    folder = f"{top}/training-monolingual.tokenized.shuffled"
    members = {f"{folder}/news.en-00001-of-00100": b"".join(lines["train"][:25])}
    members[f"{folder}/news.en-00002-of-00100"] = b"".join(lines["train"][25:])
    members[f"{top}/heldout-monolingual.tokenized.shuffled/news.en.heldout-00000-of-00050"] = b"".join(lines["test"])
    members[f"{top}/README"] = b"Neither of them"
    return {f"{top}.tar.gz": pack_tar(members)}
  splits = random_set(name)
  set_name = name.split("/")[0]
  if set_name in ("kmnist", "emnist"):
    files = {}
    for split, (images, labels) in splits.items():
      first = set_name == "emnist"  # whose letters are numbered from 1
      prefix = f"gzip/emnist-letters-{split}" if first else {"train": "train", "test": "t10k"}[split]
      files[f"{prefix}-images-idx3-ubyte.gz"] = idx(images[..., 0])
      files[f"{prefix}-labels-idx1-ubyte.gz"] = idx((labels + first).astype(np.uint8))
    return {"gzip.zip": pack_zip(files)} if set_name == "emnist" else files
  if set_name == "svhn_cropped":
    files = {}
    for split, (images, labels) in splits.items():
      buffer = io.BytesIO()
      scipy.io.savemat(buffer, {"X": np.moveaxis(images, 0, -1), "y": np.where(labels == 0, 10, labels)[:, None]})
      files[f"{split}_32x32.mat"] = buffer.getvalue()
    return files
  rows = {split: images.transpose(0, 3, 1, 2).reshape(len(images), -1) for split, (images, _) in splits.items()}
  labels = {split: labels for split, (_, labels) in splits.items()}
  if set_name == "imagenet_resized":
    parts = {"train": (slice(25), slice(25, None)), "test": (slice(None),)}
    files = {}
    for split, short in (("train", "train"), ("test", "val")):
      members = {
        f"{short}_data_batch_{i}.npz": npz(data=rows[split][part], labels=labels[split][part].astype(int) + 1)
        for i, part in enumerate(parts[split])
      }
      files[f"Imagenet16_{short}_npz.zip"] = pack_zip(members)
    return files
  if set_name == "cifar10":
    both = {split: column_stack(labels[split], rows[split]) for split in rows}
    members = {f"data_batch_{i + 1}.bin": both["train"][12 * i : 12 * (i + 1)].tobytes() for i in range(5)}
    members |= {"test_batch.bin": both["test"].tobytes(), "batches.meta.txt": names("class", 10) + b"\n"}
    return {"cifar-10-binary.tar.gz": pack_tar({f"cifar-10-batches-bin/{k}": v for k, v in members.items()})}
  members = {f"{split}.bin": column_stack(labels[split] // 5, labels[split], rows[split]).tobytes() for split in rows}
  members |= {"fine_label_names.txt": names("fine", 100), "coarse_label_names.txt": names("coarse", 20)}
  return {"cifar-100-binary.tar.gz": pack_tar({f"cifar-100-binary/{k}": v for k, v in members.items()})}


def column_stack(*columns):
  return np.column_stack(columns).astype(np.uint8)


def names(kind, n):
  return "".join(f"{kind}{i}\n" for i in range(n)).encode()


@pytest.fixture(params=[*CLASSES, "lm1b"])
def small_set(request, tmp_path, monkeypatch):
  """The name of a set, whose originals are small files with check sums that TFDS accepts."""
  import tensorflow_datasets as tfds

  name = request.param
  folder = tmp_path / "originals" / name.split("/")[0]
  folder.mkdir(parents=True)
  stock: Any = tfds.builder_cls(folder.name)
  url_infos = dict(stock.url_infos)
  for file, content in original_files(name).items():
    (folder / file).write_bytes(content)
    (url,) = (url for url in url_infos if url.endswith(f"/{file}"))
    digest = hashlib.sha256(content).hexdigest()
    url_infos[url] = dataclasses.replace(url_infos[url], size=len(content), checksum=digest)
  monkeypatch.setattr(stock, "url_infos", url_infos)
  monkeypatch.setenv("LOPT_MANUAL_DIR", str(tmp_path / "originals"))
  return name


def multiset(images, labels):
  return sorted((np.asarray(image).tobytes(), int(label)) for image, label in zip(images, labels, strict=True))


def test_loaded_from_original_files(small_set, tmp_path, monkeypatch):
  """Content and sizes; and the unmodified builder reads what was written, in the same order."""
  import tensorflow_datasets as tfds

  data_dir = tmp_path / "data"
  if small_set == "lm1b":
    monkeypatch.setattr(datasets, "_LM1B_CHARACTERS", {"train": 500, "test": 200})
    text = datasets.load_text("lm1b", data_dir=data_dir)
    decode = lambda part: "".join(text.alphabet[i] for i in np.asarray(part))
    train, validation, test = decode(text.train), decode(text.validation), decode(text.test)
    for part, split, least in ((train, "train", 500), (validation + test, "test", 200)):
      prepared: Any = tfds.builder(small_set, data_dir=data_dir, file_format="array_record")
      source = prepared.as_data_source(split)
      sentences = [source[i]["text"].decode() for i in range(len(source))]
      assert part == "".join(f"{sentence}\n" for sentence in sentences[: part.count("\n")])
      assert sorted(sentences) == sorted(SENTENCES[split])
      assert least <= len(part) < least + 60
    assert abs(len(validation) - len(test)) < 60
    return
  dataset = datasets.load(small_set, data_dir=data_dir)
  splits = random_set(small_set)
  assert (dataset.num_classes, dataset.max_value) == (CLASSES[small_set], 255)
  assert [len(split.labels) for split in dataset[:3]] == [54, 6, 20]
  train = [np.concatenate([a, b]) for a, b in zip(dataset.train, dataset.validation, strict=True)]
  assert multiset(*train) == multiset(*splits["train"])
  assert multiset(*dataset.test) == multiset(*splits["test"])
  stock: Any = tfds.builder(small_set, data_dir=data_dir, file_format="array_record")
  assert type(stock).__module__.startswith("tensorflow_datasets.")
  source = stock.as_data_source("train")
  np.testing.assert_array_equal([source[i]["image"] for i in range(54)], dataset.train.images)
  first = int(small_set == "emnist/letters")
  np.testing.assert_array_equal([source[i]["label"] for i in range(54)], np.asarray(dataset.train.labels) + first)
  if small_set == "cifar100":
    assert stock.info.features["label"].int2str(7) == "fine7"
    assert source[0]["coarse_label"] == dataset.train.labels[0] // 5
  assert datasets.load(small_set, resolution=8, data_dir=data_dir).test.images.shape[1:3] == (8, 8)


class Downloads:
  """TFDS's download manager for files that are there."""

  def __init__(self, folder, into):
    self.folder, self.into = folder, into

  def download(self, urls):
    if isinstance(urls, str):
      return str(self.folder / urls.rpartition("/")[2])
    paths = [self.download(url) for url in (urls.values() if isinstance(urls, dict) else urls)]
    return dict(zip(urls, paths, strict=True)) if isinstance(urls, dict) else paths

  def extract(self, paths):
    if isinstance(paths, dict):
      return {key: self.extract(path) for key, path in paths.items()}
    path = Path(paths)
    into = self.into / path.name
    if path.name.endswith("ubyte.gz"):
      into.write_bytes(gzip.decompress(path.read_bytes()))
    elif path.suffix == ".zip":
      zipfile.ZipFile(path).extractall(into)
    else:
      with tarfile.open(path) as archive:
        archive.extractall(into, filter="data")
    return str(into)

  def download_and_extract(self, urls):
    return self.extract(self.download(urls))

  def iter_archive(self, path):
    with zipfile.ZipFile(path) as archive:
      for member in archive.namelist():
        yield member, io.BytesIO(archive.read(member))


def plain(record):
  return {key: value if isinstance(value, str) else np.asarray(value).tolist() for key, value in record.items()}


def test_examples_and_keys_are_those_of_the_catalogues_code(small_set, tmp_path, monkeypatch):
  """The keys decide the order of what is written."""
  import tensorflow_datasets as tfds

  set_name = small_set.split("/")[0]
  stock: Any = tfds.builder(small_set, data_dir=tmp_path / "stock", file_format="array_record")
  gfile = types.SimpleNamespace(GFile=open, glob=glob.glob)
  module = sys.modules[type(stock).__module__]
  if hasattr(module, "tf"):
    monkeypatch.setattr(module, "tf", types.SimpleNamespace(io=types.SimpleNamespace(gfile=gfile)))
  if set_name == "emnist":
    for split, n in SIZES.items():
      monkeypatch.setattr(stock.builder_config, f"{split}_examples", n)
  if set_name == "kmnist":
    monkeypatch.setattr(module, "_TRAIN_EXAMPLES", SIZES["train"])
    monkeypatch.setattr(module, "_TEST_EXAMPLES", SIZES["test"])
  folder = tmp_path / "originals" / set_name
  (tmp_path / "extracted").mkdir()
  generators = stock._split_generators(Downloads(folder, tmp_path / "extracted"))
  if not isinstance(generators, dict):
    generators = {str(g.name): stock._generate_examples(**g.gen_kwargs) for g in generators if str(g.name) != "extra"}
  paths = {path.name: path for path in folder.iterdir()}
  ours = originals.FILES[set_name].read(stock, paths)
  assert {str(split) for split in generators} == set(ours)
  for split, examples in generators.items():
    expected = {key: plain(record) for key, record in examples}
    actual = {key: plain(record) for key, record in ours[str(split)]}
    if set_name in ("kmnist", "emnist"):  # one channel, of which PIL's images have no axis
      actual = {
        key: record | {"image": np.array(record["image"])[..., None].tolist()} for key, record in actual.items()
      }
    assert actual == expected


def test_only_the_files_of_the_form_are_needed():
  files = lambda name: [originals.file_name(url) for url in originals.urls(name)]
  assert sorted(files("imagenet_resized/8x8")) == ["Imagenet8_train_npz.zip", "Imagenet8_val_npz.zip"]
  assert len(files("imagenet_resized/64x64")) == 3
  assert sorted(files("svhn_cropped")) == ["test_32x32.mat", "train_32x32.mat"]
  assert files("emnist/byclass") == ["gzip.zip"]


@pytest.mark.parametrize("name", ["cifar10", "emnist/balanced", "imagenet_resized/32x32"])
def test_missing_files_are_named(tmp_path, monkeypatch, name):
  monkeypatch.setenv("LOPT_MANUAL_DIR", str(tmp_path))

  def unreachable(request, timeout):
    raise OSError("Name or service not known")

  monkeypatch.setattr("urllib.request.urlopen", unreachable)
  with pytest.raises(FileNotFoundError) as error_info:
    datasets.load(name, data_dir=tmp_path / "data")
  message = str(error_info.value)
  assert f"dataset={name!r} is not prepared in {tmp_path / 'data' / name}" in message
  assert f"missing in {tmp_path / name.split('/')[0]}: " in message
  assert all(originals.file_name(url) in message for url in originals.urls(name))
  assert message.endswith(f"a folder that has them in {name.split('/')[0]}/")


@pytest.mark.parametrize("name", ["emnist", "emnist/all", "imagenet_resized/20x20"])
def test_forms_are_named(tmp_path, name):
  with pytest.raises(ValueError, match=f"'{name}' is none of the forms of that set: {name.split('/')[0]}/"):
    datasets.load(name, data_dir=tmp_path)


@pytest.mark.parametrize("name", [*CLASSES, "imagenet_resized/64x64", "emnist/balanced"])
def test_features_of_the_catalogue(name, tmp_path, monkeypatch):
  """TFDS's mock data, which has the shapes and types of the whole set."""
  import tensorflow_datasets as tfds

  class Source(list):
    """What TFDS mocks, whose own batched access fails."""

    def __getitems__(self, indices):
      return [self[i] for i in indices]

  def source(split):
    options = {"file_format": "array_record"}
    examples: Any = tfds.data_source(name, split=split, data_dir=tmp_path, builder_kwargs=options)
    return Source(examples[i] for i in range(len(examples)))

  features = tfds.builder(name, data_dir=tmp_path, file_format="array_record").info.features
  info = types.SimpleNamespace(features=features, splits=("train", "test"))
  mock = types.SimpleNamespace(info=info, as_data_source=source)
  monkeypatch.setattr(datasets, "_open", lambda name, directory: mock)
  with tfds.testing.mock_data(num_examples=5):
    arrays = datasets._decode_images(name, tmp_path)
  declared = 37 if name == "emnist/letters" else {"emnist/balanced": 47}.get(name, CLASSES.get(name, 1000))
  assert arrays["num_classes"] == declared
  size = int(name.partition("/")[2].partition("x")[0]) if "imagenet" in name else 28 if "mnist" in name else 32
  for split in ("train", "test"):
    assert arrays[f"{split}_images"].shape == (5, size, size, 1 if "mnist" in name else 3)
    assert arrays[f"{split}_images"].dtype == np.uint8


# The command that prepares sets


def test_prepare_makes_what_load_reads(tmp_path):
  folder = prepare.prepare("digits", data_dir=tmp_path)
  assert folder == tmp_path / "digits" / "1.0.0"
  assert prepare.prepare("digits", data_dir=tmp_path) == folder


def test_prepare_uses_the_catalogues_builder_where_tensorflow_is_needed(tmp_path, monkeypatch):
  import tensorflow_datasets as tfds

  calls = []

  class Builder:
    data_path = tmp_path / "stl10" / "1.0.0"

    def download_and_prepare(self):
      calls.append("prepared")

  def builder(name, **options):
    calls.append((name, options))
    return Builder()

  monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
  monkeypatch.setattr(tfds, "builder", builder)
  assert prepare.prepare("stl10", data_dir=str(tmp_path)) == Builder.data_path
  assert calls == [("stl10", {"data_dir": tmp_path, "file_format": "array_record"}), "prepared"]


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is not None, reason="TensorFlow is installed")
def test_prepare_says_how_to_get_tensorflow(tmp_path):
  process = subprocess.run(
    [sys.executable, "-m", "lopt.tasks.prepare", "stl10", f"--data_dir={tmp_path}"],
    cwd=Path(__file__).parents[2],
    capture_output=True,
    text=True,
  )
  assert process.returncode == 1
  assert process.stderr == (
    "dataset='stl10' needs TensorFlow to be prepared (not to be used): pip install 'lopt[prepare]'\n"
  )
