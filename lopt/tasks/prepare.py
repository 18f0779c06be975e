"""Prepares data sets of the TFDS catalogue, in a process of its own because many need TensorFlow for that.

    python -m lopt.tasks.prepare stl10 --data_dir=~/tensorflow_datasets

Those that `lopt.tasks.datasets` lists need none, and are prepared when they are first loaded; this does so ahead of
that. Reading a prepared set never needs TensorFlow.
"""

import importlib.util
import os
import sys
from pathlib import Path

from absl import app, flags

from lopt.tasks import preparation


def prepare(name: str, *, data_dir: str | os.PathLike[str] | None = None) -> Path:
  """Prepares a set where it is not yet, in array_record format; returns its folder.

  Args:
    name: a set of the TFDS catalogue, with its configuration where it has several ("stl10", "cmaterdb/bangla").
    data_dir: as for `lopt.tasks.datasets.load`.

  Raises:
    ModuleNotFoundError: TensorFlow is needed and not installed.
    ValueError, OSError: as for `lopt.tasks.datasets.load`, and what TFDS raises.
  """
  try:
    return preparation.prepare(name, data_dir=data_dir)
  except preparation.NeedsTensorFlowError:
    if importlib.util.find_spec("tensorflow") is None:
      raise ModuleNotFoundError(
        f"dataset={name!r} needs TensorFlow to be prepared (not to be used): pip install 'lopt[prepare]'"
      ) from None
  import tensorflow_datasets as tfds

  folder = None if data_dir is None else Path(data_dir).expanduser()
  builder = tfds.builder(name, data_dir=folder, file_format="array_record")
  builder.download_and_prepare()
  return Path(builder.data_path)


def main(argv: list[str]) -> None:
  if len(argv) < 2:
    sys.exit("names no data set: python -m lopt.tasks.prepare NAME ...")
  for name in argv[1:]:
    try:
      print(f"{name} is prepared in {prepare(name, data_dir=flags.FLAGS.data_dir)}")
    except (ModuleNotFoundError, ValueError, OSError) as error:
      sys.exit(str(error))


if __name__ == "__main__":
  flags.DEFINE_string("data_dir", None, "Where TFDS keeps its data; its own default if not given.")
  app.run(main)
