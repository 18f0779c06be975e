"""Results are computed once for a key, and again whenever they cannot be trusted."""

import numpy as np
import pytest

from lopt.runs import cache


class Work:
  """Something to compute, that counts how often it is."""

  def __init__(self):
    self.times = 0

  def __call__(self):
    self.times += 1
    rng = np.random.default_rng(self.times)
    return {"runs/Adam/losses": rng.normal(size=(2, 3)).astype(np.float32), "text": np.array("θ"), "n": np.array(7)}


KEY = {"family": "abc", "steps": 5, "rates": [0.1, 0.2]}


def test_the_second_time_is_the_first_bit_for_bit(tmp_path):
  work = Work()
  first, second = (cache.remember(tmp_path / "new", KEY, work) for _ in range(2))
  assert work.times == 1
  assert first.keys() == second.keys()
  for name, array in first.items():
    assert array.dtype == second[name].dtype
    np.testing.assert_array_equal(array, second[name])
  assert cache.remember(tmp_path / "new", dict(reversed(KEY.items())), work)["n"] == 7
  assert work.times == 1  # the order of a key's fields means nothing


@pytest.mark.parametrize("changed", [{"steps": 6}, {"rates": [0.2, 0.1]}, {"more": None}])
def test_another_key_is_another_result(tmp_path, changed):
  work = Work()
  cache.remember(tmp_path, KEY, work)
  cache.remember(tmp_path, KEY | changed, work)
  assert work.times == 2
  assert len(list(tmp_path.iterdir())) == 2


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  work = Work()
  for _ in range(2):
    cache.remember(None, KEY, work)
  assert work.times == 2
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["cut", "bits", "empty", "foreign", "folder"])
def test_a_damaged_file_is_computed_again_with_a_message(tmp_path, capsys, damage):
  work = Work()
  cache.remember(tmp_path, KEY, work)
  (path,) = tmp_path.iterdir()
  content = path.read_bytes()
  if damage == "cut":
    path.write_bytes(content[: len(content) // 2])
  elif damage == "bits":
    path.write_bytes(bytes(b ^ 0x55 if 40 < i < 200 else b for i, b in enumerate(content)))
  elif damage == "empty":
    path.write_bytes(b"")
  elif damage == "foreign":
    np.savez(path, key=np.array("another"), n=np.array(1))
  else:
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError, match="cannot write"):
      cache.remember(tmp_path, KEY, work)
    return
  result = cache.remember(tmp_path, KEY, work)
  assert work.times == 2
  message = capsys.readouterr().err
  assert str(path) in message
  assert "computed again" in message
  np.testing.assert_array_equal(cache.remember(tmp_path, KEY, work)["runs/Adam/losses"], result["runs/Adam/losses"])
  assert work.times == 2
