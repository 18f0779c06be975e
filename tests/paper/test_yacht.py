"""The problem of experiment 7 against NumPy and against ridge regression, and where its data come from."""

import hashlib
import io
import os
import urllib.error

import jax
import jax.numpy as jnp
import numpy as np
import pytest

MANUAL_DIR = os.environ.get("LOPT_MANUAL_DIR")


@pytest.fixture
def data(script):
  generator = np.random.default_rng(0)
  x, y = generator.normal(size=(50, 6)), generator.normal(size=50)
  return script.Data(*(jnp.asarray(array, jnp.float32) for array in (x[:40], y[:40], x[40:], y[40:])))


def test_descent_against_numpy_and_its_end_against_ridge(script, data):
  theta, rate = 1.2, 5e-3
  problem = script.ridge_descent(data, rate, 700)
  w = problem.init(jax.random.key(0), jnp.int32(700))
  _, losses = jax.lax.scan(lambda w, _: problem.step(jnp.float32(theta), w, jax.random.key(1)), w, length=700)

  x, y, x_validation, y_validation = (np.asarray(array, np.float64) for array in data)
  expected = []
  w = np.asarray(w, np.float64)
  for _ in range(700):
    w = w - rate * (x.T @ (x @ w - y) + np.exp(theta) * w)
    expected.append(0.5 * np.sum((x_validation @ w - y_validation) ** 2))
  np.testing.assert_allclose(losses, expected, rtol=1e-4)

  # Ridge regression is least squares with √exp(θ) I below X and zeros below y.
  rows = np.concatenate([x, np.exp(theta / 2) * np.eye(6)])
  w = np.linalg.lstsq(rows, np.concatenate([y, np.zeros(6)]))[0]
  ridge = 0.5 * np.sum((x_validation @ w - y_validation) ** 2)
  np.testing.assert_allclose(script.converged_loss(data, jnp.float32(theta)), ridge, rtol=1e-5)
  np.testing.assert_allclose(expected[-1], ridge, rtol=1e-5)


@pytest.mark.skipif(MANUAL_DIR is None, reason="LOPT_MANUAL_DIR is not set to a folder with the original files")
def test_the_optimum_is_the_published_one(script):
  data = script.load()
  assert [len(part) for part in data] == [246, 246, 62, 62]
  whole = np.concatenate([data.x, data.x_validation])
  np.testing.assert_allclose(whole.mean(axis=0), 0, atol=1e-6)
  np.testing.assert_allclose(whole.std(axis=0), 1, rtol=1e-5)
  grid = np.arange(-500, 501) / 100
  losses = jax.vmap(lambda theta: script.converged_loss(data, theta))(jnp.asarray(grid, jnp.float32))
  assert grid[np.argmin(losses)] == pytest.approx(1.33, abs=0.02)  # the authors' plot_uci.py draws a line there


def test_missing_and_wrong_data(script, tmp_path, monkeypatch):
  def unreachable(url, timeout):
    raise urllib.error.URLError("Name or service not known")

  monkeypatch.setattr("urllib.request.urlopen", unreachable)
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.setenv("LOPT_MANUAL_DIR", str(tmp_path / "originals"))
  with pytest.raises(OSError, match=r"cannot download .*set LOPT_MANUAL_DIR"):
    script.load()
  path = tmp_path / "originals" / "uci_yacht" / "data.txt"
  path.parent.mkdir(parents=True)
  for content in ("<html>moved</html>", "1 2 3\n4 5 6\n", ""):
    path.write_text(content)
    with pytest.raises(ValueError, match=r"data.txt: does not have the numbers"):
      script.load()


def test_a_download_is_kept(script, tmp_path, monkeypatch):
  rows = np.random.default_rng(0).normal(size=(308, 7))
  content = "\n".join("  ".join(map(repr, map(float, row))) for row in rows).encode()
  monkeypatch.setattr(script, "SHA256", hashlib.sha256(rows.tobytes()).hexdigest())
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.delenv("LOPT_MANUAL_DIR", raising=False)
  monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: io.BytesIO(content))
  first = script.load()
  monkeypatch.delattr("urllib.request.urlopen")
  for x, y in zip(first, script.load(), strict=True):
    np.testing.assert_array_equal(x, y)
