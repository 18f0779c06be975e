"""Data sets that are prepared by tensorflow-datasets (TFDS) without TensorFlow, from original files or a download."""

import contextlib
import difflib
import errno
import io
import logging
import os
import re
import shutil
import tempfile
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

from lopt.runs import files
from lopt.tasks import originals

_log = logging.getLogger(__name__)

# Sets that are prepared here -> free disk space in bytes that this takes, downloads and cache included.
_MB = 1_000_000
IMAGES = {
  "digits": 5 * _MB,
  "mnist": 150 * _MB,
  "fashion_mnist": 180 * _MB,
  "kmnist": 180 * _MB,
  **{f"emnist/{config}": 900 * _MB for config in ("balanced", "digits", "letters", "mnist")},
  **{f"emnist/{config}": 1900 * _MB for config in ("byclass", "bymerge")},
  "cifar10": 600 * _MB,
  "cifar100": 600 * _MB,
  "svhn_cropped": 1000 * _MB,
  "imagenet_resized/8x8": 1500 * _MB,
  "imagenet_resized/16x16": 4500 * _MB,
  "imagenet_resized/32x32": 15_000 * _MB,
  "imagenet_resized/64x64": 60_000 * _MB,
}
TEXTS = {"tiny_shakespeare": 10 * _MB, "lm1b": 12_000 * _MB}

_NETWORK_TIMEOUT = 5.0  # seconds
_DIGITS_TRAIN = 1437  # four fifths of scikit-learn's 1,797


class NeedsTensorFlowError(FileNotFoundError):
  """The set is in the catalogue, but not prepared, and can only be prepared with TensorFlow."""


def prepare(name: str, *, data_dir: str | os.PathLike[str] | None = None) -> Path:
  """Prepares a set where it is not yet; returns the folder of its newest version.

  Raises:
    NeedsTensorFlowError: `lopt.tasks.prepare` has to do it.
    ValueError, FileNotFoundError, OSError: as for `load`.
  """
  root = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
  if not re.fullmatch(r"\w+(/\w[\w.-]*)?", name):
    raise _unknown(name, root)
  directory = newest_version(root / name)
  if directory is None:
    if name not in IMAGES and name not in TEXTS:
      raise _not_prepared(name, root)
    directory = _prepare(name, root)
  return directory


def newest_version(folder: Path) -> Path | None:
  """The prepared `<folder>/<x.y.z>` of the highest version; a version appears there only once it is complete."""
  versions = [path.parent for path in folder.glob("*/dataset_info.json")]
  versions = [path for path in versions if re.fullmatch(r"\d+\.\d+\.\d+", path.name)]
  return max(versions, key=lambda path: [int(number) for number in path.name.split(".")], default=None)


def _unknown(name: str, root: Path) -> ValueError:
  infos = [*root.glob("*/*/dataset_info.json"), *root.glob("*/*/*/dataset_info.json")]
  prepared = {path.parents[1].relative_to(root).as_posix() for path in infos}
  names = sorted({*IMAGES, *prepared} - {*TEXTS})
  close = difflib.get_close_matches(name, names, n=1)
  return ValueError(
    f"dataset={name!r} does not exist; {f'did you mean {close[0]!r}? ' if close else ''}"
    f"There are: {', '.join(names)}, and the TFDS catalogue's image sets once they are prepared in {root}"
  )


def _not_prepared(name: str, root: Path) -> Exception:
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core import registered

  try:
    tfds.builder_cls(name.split("/")[0])
  except registered.DatasetNotFoundError:
    return _unknown(name, root)
  configs = sorted(path.parents[1].name for path in (root / name).glob("*/*/dataset_info.json"))
  if configs:
    return ValueError(f"dataset={name!r} has several forms; prepared in {root}: {name}/{f', {name}/'.join(configs)}")
  forms = [form for form in IMAGES if form.startswith(f"{name.partition('/')[0]}/")]
  if forms:
    return ValueError(f"dataset={name!r} is none of the forms of that set: {', '.join(forms)}")
  return NeedsTensorFlowError(
    f"dataset={name!r} is not prepared in {root / name}; do so once: python -m lopt.tasks.prepare {name} "
    f"--data_dir={root}"
  )


def _prepare(name: str, root: Path) -> Path:
  """Prepares the set in a folder of its own and moves it to its place: of several processes the first one wins."""
  import requests
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

  manual_root = os.environ.get("LOPT_MANUAL_DIR")
  set_name = name.partition("/")[0]
  manual_dir = Path(manual_root).expanduser() / set_name if manual_root else None
  if name != "digits":
    _check_sources(name, root, manual_dir)
  size = {**IMAGES, **TEXTS}[name]
  staging = None
  try:
    root.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f"incomplete.{set_name}.", dir=root))
    if shutil.disk_usage(root).free < size:
      raise OSError(errno.ENOSPC, "full")
    builder = _builder(name, staging)
    _log.info("preparing %s in %s", name, root)
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces itself by print
      builder.download_and_prepare(
        download_dir=root / "downloads",
        download_config=tfds.download.DownloadConfig(manual_dir=manual_dir, try_download_gcs=False),
      )
    directory = root / name / builder.data_path.name
    directory.parent.mkdir(parents=True, exist_ok=True)
    try:
      builder.data_path.rename(directory)
    except OSError:
      if newest_version(root / name) is None:  # Else another process was first, and there is nothing left to do.
        raise
    return directory
  except NonMatchingChecksumError as error:
    what = str(error).partition("\n")[0].rstrip(":")
    raise OSError(f"dataset={name!r}: {what}; the file is corrupt: get the original, or delete it") from None
  except (tfds.download.DownloadError, requests.RequestException) as error:
    what = str(error).partition("\n")[0]
    raise OSError(
      f"dataset={name!r}: download failed ({what}); try again, or set LOPT_MANUAL_DIR to a folder that has the "
      f"original files in {set_name}/"
    ) from error
  except (OSError, RuntimeError) as error:
    if isinstance(error, RuntimeError) and "write() failed" not in str(error):  # that one is array_record's
      raise
    failed = error if isinstance(error, OSError) else OSError(errno.EIO, str(error))
    reason = files.explain(failed, root / name).strerror
    remedy = f"see that {size // 1_000_000} MB are free and writable, or choose another data_dir"
    raise OSError(failed.errno or errno.EIO, f"dataset={name!r}: {reason}; {remedy}") from error
  finally:
    if staging is not None:
      shutil.rmtree(staging, ignore_errors=True)


def _check_sources(name: str, root: Path, manual_dir: Path | None) -> None:
  """Fails at once where TFDS would try for minutes to download what it cannot have."""
  missing = [
    url for url in originals.urls(name) if manual_dir is None or not (manual_dir / originals.file_name(url)).is_file()
  ]
  if not missing:
    return
  try:
    request = urllib.request.Request(missing[0], method="HEAD")
    urllib.request.urlopen(request, timeout=_NETWORK_TIMEOUT).close()
  except OSError as error:
    where = f"in {manual_dir}" if manual_dir else "(LOPT_MANUAL_DIR is not set)"
    host = urllib.parse.urlsplit(missing[0]).netloc
    raise FileNotFoundError(
      f"dataset={name!r} is not prepared in {root / name}, its original files are missing {where}: "
      f"{', '.join(map(originals.file_name, missing))}, and {host} cannot be reached "
      f"({error}); connect to the network, or set LOPT_MANUAL_DIR to a folder that has them in "
      f"{name.partition('/')[0]}/"
    ) from None


def _builder(name: str, data_dir: Path) -> Any:
  """A TFDS builder that needs no TensorFlow."""
  if name == "digits":
    return _digits_builder(data_dir)
  return originals.builder(name, data_dir)


def _digits_builder(data_dir: Path) -> Any:
  """A TFDS builder of scikit-learn's digits (a test set of UCI's optdigits), in the splits of `load`."""
  import sklearn.datasets
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core import registered

  with registered.skip_registration():

    class Digits(tfds.core.GeneratorBasedBuilder):
      VERSION = tfds.core.Version("1.0.0")

      def _info(self):
        return tfds.core.DatasetInfo(
          builder=self,
          description="Handwritten digits of 8x8 pixels with values 0 to 16, from scikit-learn's load_digits.",
          features=tfds.features.FeaturesDict(
            {
              "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
              "label": tfds.features.ClassLabel(num_classes=10),
            }
          ),
          supervised_keys=("image", "label"),
          homepage="https://archive.ics.uci.edu/dataset/80",
        )

      def _split_generators(self, dl_manager):
        digits: Any = sklearn.datasets.load_digits()
        examples = list(enumerate(zip(digits.images, digits.target, strict=True)))
        return {
          "train": self._generate_examples(examples[:_DIGITS_TRAIN]),
          "test": self._generate_examples(examples[_DIGITS_TRAIN:]),
        }

      def _generate_examples(self, examples):
        for index, (image, label) in examples:
          yield index, {"image": image.astype(np.uint8)[..., None], "label": int(label)}

  return Digits(data_dir=data_dir, file_format="array_record")
