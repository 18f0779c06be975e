"""The transformer against a plain NumPy one; `test_text.py` has what all language models share."""

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from lopt.tasks import text, transformer_language_model

OPTIONS: dict[str, Any] = {"width": 6, "num_layers": 2, "num_heads": 3, "context": 7, "batch_size": 3}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  """A text of 6 different characters."""
  file = tmp_path_factory.mktemp("text") / "text.txt"
  file.write_text("".join(np.random.default_rng(0).choice(list("abcde\n"), 400)), "utf-8")
  return str(file)


def norm(p, x):
  centred = x - x.mean(axis=-1, keepdims=True)
  return p["scale"] * centred / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + 1e-5) + p["offset"]


def linear(p, x):
  return x @ p["w"] + p["b"]


def gelu(x):
  """The tanh approximation, as GPT-2 has it."""
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def attention(params, name, x, heads):
  """Position by position: each looks only at the list of those up to itself."""
  query, key, value = (linear(params[f"{name}/{part}"], x) for part in ("query", "key", "value"))
  size = x.shape[-1] // heads
  output = np.zeros_like(x)
  for head in range(heads):
    columns = slice(head * size, (head + 1) * size)
    for t in range(len(x)):
      scores = key[: t + 1, columns] @ query[t, columns] / np.sqrt(size)
      output[t, columns] = scipy.special.softmax(scores) @ value[: t + 1, columns]
  return linear(params[f"{name}/linear"], output)


def logits_of(params, characters, layers, heads):
  def numbered(name, i):
    return params[f"{name}_{i}" if i else name]

  x = params["embed"]["embeddings"][characters] + params["~"]["positions"][: len(characters)]
  for i in range(layers):
    x = x + attention(
      params,
      f"multi_head_attention_{i}" if i else "multi_head_attention",
      norm(numbered("layer_norm", 2 * i), x),
      heads,
    )
    hidden = gelu(linear(numbered("linear", 2 * i), norm(numbered("layer_norm", 2 * i + 1), x)))
    x = x + linear(numbered("linear", 2 * i + 1), hidden)
  return linear(numbered("linear", 2 * layers), norm(numbered("layer_norm", 2 * layers), x))


def test_loss_equals_that_of_a_plain_implementation(path):
  family = transformer_language_model.build(path=path, **OPTIONS)
  task = family.sample(jax.random.key(0))
  params = jax.tree.map(lambda p: p + 0.1, family.init(jax.random.key(1), task))  # so that biases are not zero
  windows = family.batch(jax.random.key(2), task, "train")
  loss, _ = jax.jit(family.loss)(params, jax.random.key(3), windows, task)

  plain = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
  surprise = []
  for window in np.asarray(windows):
    logits = logits_of(plain, window[:-1], layers=2, heads=3)
    surprise.append(scipy.special.logsumexp(logits, axis=1) - logits[np.arange(7), window[1:]])
  np.testing.assert_allclose(loss, float(task.loss_scale) * np.mean(surprise), rtol=1e-5)


def test_no_position_sees_later_ones(path, monkeypatch):
  """Logits up to t stay the same to the last bit when characters after t change; those after t do not."""
  networks = []
  original = text.language_model

  def capture(data, forward, **options):
    networks.append(hk.without_apply_rng(hk.transform(forward)))
    return original(data, forward, **options)

  monkeypatch.setattr(text, "language_model", capture)
  transformer_language_model.build(path=path, **OPTIONS)
  apply = jax.jit(networks[0].apply)
  characters = jnp.array([[0, 1, 2, 3, 4, 5, 0]])
  params = networks[0].init(jax.random.key(0), characters)
  logits = apply(params, characters)
  for t in range(6):
    changed = apply(params, characters.at[:, t + 1 :].set((characters[:, t + 1 :] + 1) % 6))
    np.testing.assert_array_equal(changed[:, : t + 1], logits[:, : t + 1])
    assert np.all(np.any(changed[:, t + 1 :] != logits[:, t + 1 :], axis=-1))


@pytest.mark.parametrize("num_layers", [1, 4])
def test_layers_together_add_about_as_much_as_the_embeddings(path, num_layers):
  """The variance of the weights, 1/(num_layers · fan_in), at the task's scale 1."""
  family = transformer_language_model.build(
    path=path, width=32, num_layers=num_layers, weight_scale=(1.0, 1.0), context=7
  )
  params = family.init(jax.random.key(0), family.sample(jax.random.key(1)))
  for name, fan_in in (("linear", 32), ("linear_1", 128), ("multi_head_attention/linear", 32)):
    weights = np.asarray(params[name]["w"])
    np.testing.assert_allclose(weights.var(), 1 / (num_layers * fan_in), rtol=5 * np.sqrt(2 / weights.size))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"width": 7}, "width=7: must be a multiple of num_heads=2"),
    ({"num_heads": 0}, "num_heads: must be at least 1"),
    ({"num_layers": 0}, "num_layers: must be at least 1"),
    ({"context": 20}, "context=20"),
  ],
)
def test_bad_options(path, options, message):
  with pytest.raises(ValueError, match=f"^{message}"):
    transformer_language_model.build(path=path, **options)
