import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lopt.runs.files import remove_partial, write_atomically

ROOT = Path(__file__).parent.parent.parent


def test_text_and_bytes_are_written_and_replaced(tmp_path):
  path = tmp_path / "new" / "file.txt"
  write_atomically(path, "θ\n")
  assert path.read_bytes() == b"\xce\xb8\n"
  write_atomically(path, b"\x00\xff")
  assert path.read_bytes() == b"\x00\xff"
  assert os.listdir(path.parent) == ["file.txt"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
  path = tmp_path / "file.txt"
  write_atomically(path, "old")
  # A limit on the size of files stands in for a full disk.
  code = textwrap.dedent(f"""
    import resource
    from lopt.runs.files import write_atomically
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    write_atomically({str(path)!r}, "x" * 100_000)
  """)
  result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
  assert f"cannot write {path}: larger than the file size limit" in result.stderr
  assert path.read_text() == "old"
  assert os.listdir(tmp_path) == ["file.txt"]


def test_a_full_disk_is_named(tmp_path, monkeypatch):
  def full(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(OSError, match=r"cannot write .*file\.txt: no space left on the disk") as error:
    write_atomically(tmp_path / "file.txt", "x")
  assert error.value.errno == errno.ENOSPC
  assert os.listdir(tmp_path) == []


def test_a_reader_never_sees_half_a_file(tmp_path):
  """A writer is killed at arbitrary moments; what is left is one whole version."""
  path = tmp_path / "file.txt"
  code = textwrap.dedent(f"""
    from lopt.runs.files import write_atomically
    for i in range(10**6):
      write_atomically({str(path)!r}, f"{{i % 10}}" * 200_000)
      print(i, flush=True)
  """)
  for delay in range(4):
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as process:
      assert process.stdout is not None
      for _ in range(delay + 2):
        process.stdout.readline()
      process.kill()
    text = path.read_text()
    assert len(text) == 200_000
    assert len(set(text)) == 1
  remove_partial(tmp_path)  # what the killed ones left
  assert os.listdir(tmp_path) == ["file.txt"]


def test_a_file_where_a_folder_should_be_is_named_and_the_other_way_round(tmp_path):
  (tmp_path / "file").write_text("old")
  for path in (tmp_path / "file" / "a", tmp_path / "file" / "b" / "a"):
    with pytest.raises(OSError, match=r"cannot write .*/a: a file is where a folder should be"):
      write_atomically(path, "x")
  (tmp_path / "folder").mkdir()
  with pytest.raises(OSError, match=r"cannot write .*/folder: a folder is where the file should be"):
    write_atomically(tmp_path / "folder", "x")
  assert (tmp_path / "file").read_text() == "old"
  assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
