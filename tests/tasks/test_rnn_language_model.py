"""Recurrent language models against NumPy loops over time; `test_text.py` has what all language models share."""

import inspect
import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lopt import inner_training
from lopt.tasks import datasets, rnn_language_model

MANUAL_DIR = os.environ.get("LOPT_MANUAL_DIR")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  """A text of 6 different characters."""
  file = tmp_path_factory.mktemp("text") / "text.txt"
  file.write_text("".join(np.random.default_rng(0).choice(list("abcde\n"), 400)), "utf-8")
  return str(file)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def vanilla(params, x, state):
  p = params["elman_rnn/linear"]
  h = np.tanh(np.concatenate([x, state]) @ p["w"] + p["b"])
  return h, h


def gru(params, x, state):
  p, n = params["gru"], len(state)
  z, r = (sigmoid(x @ p["w_i"][:, i] + state @ p["w_h"][:, i] + p["b"][i]) for i in (slice(n), slice(n, 2 * n)))
  a = np.tanh(x @ p["w_i"][:, 2 * n :] + (r * state) @ p["w_h"][:, 2 * n :] + p["b"][2 * n :])
  h = (1 - z) * state + z * a
  return h, h


def lstm(params, x, state):
  p = params["lstm/linear"]
  h, c = state if isinstance(state, tuple) else (state, np.zeros_like(state))
  i, g, f, o = np.split(np.concatenate([x, h]) @ p["w"] + p["b"], 4)
  c = sigmoid(f + 1) * c + sigmoid(i) * np.tanh(g)
  h = sigmoid(o) * np.tanh(c)
  return h, (h, c)


@pytest.mark.slow_but_for("lstm", "gru")
@pytest.mark.parametrize("core", [vanilla, gru, lstm])
def test_loss_equals_that_of_a_plain_loop(path, core):
  family = rnn_language_model.build(path=path, core=core.__name__, width=5, context=7, batch_size=3)
  task = family.sample(jax.random.key(0))
  params = jax.tree.map(lambda p: p + 0.1, family.init(jax.random.key(1), task))  # so that biases are not zero
  windows = family.batch(jax.random.key(2), task, "train")
  loss, _ = jax.jit(family.loss)(params, jax.random.key(3), windows, task)

  plain = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
  surprise = []
  for window in np.asarray(windows):
    state = np.zeros(5)
    for this, following in itertools.pairwise(window):
      h, state = core(plain, plain["embed"]["embeddings"][this], state)
      logits = h @ plain["linear"]["w"] + plain["linear"]["b"]
      surprise.append(np.log(np.sum(np.exp(logits))) - logits[following])
  np.testing.assert_allclose(loss, float(task.loss_scale) * np.mean(surprise), rtol=1e-5)


def test_layers_are_stacked(path):
  family = rnn_language_model.build(path=path, core="vanilla", width=5, num_layers=2, context=7, batch_size=3)
  task = family.sample(jax.random.key(0))
  params = family.init(jax.random.key(1), task)
  windows = family.batch(jax.random.key(2), task, "train")
  loss, _ = jax.jit(family.loss)(params, jax.random.key(3), windows, task)

  plain = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
  second = {"elman_rnn/linear": plain["elman_rnn_1/linear"]}
  surprise = []
  for window in np.asarray(windows):
    low, high = np.zeros(5), np.zeros(5)
    for this, following in itertools.pairwise(window):
      low, _ = vanilla(plain, plain["embed"]["embeddings"][this], low)
      high, _ = vanilla(second, low, high)
      logits = high @ plain["linear"]["w"] + plain["linear"]["b"]
      surprise.append(np.log(np.sum(np.exp(logits))) - logits[following])
  np.testing.assert_allclose(loss, float(task.loss_scale) * np.mean(surprise), rtol=1e-5)


@pytest.mark.skipif(MANUAL_DIR is None, reason="LOPT_MANUAL_DIR is not set to a folder with the original files")
def test_learns_shakespeare(tmp_path):
  """After 300 steps below the entropy of single characters, so from context; on validation text as well."""
  family = rnn_language_model.build(part=(1.0, 1.0), batch_size=32, data_dir=str(tmp_path))
  text = datasets.load_text("tiny_shakespeare", data_dir=tmp_path)
  frequencies = np.bincount(np.asarray(text.train)) / len(text.train)
  frequencies = frequencies[frequencies > 0]
  entropy = -np.sum(frequencies * np.log(frequencies)) / np.log(len(text.alphabet))
  tx = optax.adam(1e-2)

  @jax.jit
  def train(key):
    sample_key, init_key, batch_key, loss_key, scan_key = jax.random.split(key, 5)
    task = family.sample(sample_key)
    params = family.init(init_key, task)

    def step(state, key):
      params, optimizer_state = state
      params, optimizer_state, loss = inner_training.train_step(family, tx, key, params, optimizer_state, task)
      return (params, optimizer_state), loss

    (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), jax.random.split(scan_key, 300))
    batches = jax.vmap(lambda key: family.batch(key, task, "validation"))(jax.random.split(batch_key, 20))
    validation = jax.vmap(lambda batch: family.loss(params, loss_key, batch, task)[0])(batches)
    return family.normalize(losses[0], task), family.normalize(jnp.mean(validation), task)

  first, last = train(jax.random.key(0))
  assert abs(first - 1) < 0.3
  assert last < 0.9 * entropy


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"core": "rnn"}, "core='rnn': must be one of vanilla, gru, lstm"),
    ({"width": 0}, "width: must be at least 1"),
    ({"num_layers": 0}, "num_layers: must be at least 1"),
    ({"context": 20}, "context=20"),
  ],
)
def test_bad_options(path, options, message):
  with pytest.raises(ValueError, match=f"^{message}"):
    inspect.unwrap(rnn_language_model.build)(path=path, **options)  # without the tests' own type check


def test_unknown_text():
  with pytest.raises(ValueError, match="dataset='digits' is no text"):
    rnn_language_model.build(dataset="digits")
