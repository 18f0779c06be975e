"""Stacks of layers, and kernels whose matrix is not all axes but the last by the last."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lopt

NUM_LAYERS = 3
SHAPES = {"kernel": (40, 90), "query": (4, 2, 3), "bias": (6,), "gain": ()}  # a width beyond 32, where rates fall
ATTENTION = {"query": 1}
REST = {"out": {"w": (6, 40)}, "embed": (5, 4)}


def tree(shapes: Any, seed: int) -> Any:
  leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  return structure.unflatten([jax.random.normal(k, shape) for k, shape in zip(keys, leaves, strict=True)])


def pair(seed: int) -> tuple[Any, Any]:
  """The same numbers with layers one by one, and stacked."""
  layers = [tree(SHAPES, 10 * seed + i) for i in range(NUM_LAYERS)]
  rest = tree(REST, 10 * seed + 9)
  return {"blocks": layers, **rest}, {"blocks": jax.tree.map(lambda *x: jnp.stack(x), *layers), **rest}


@pytest.mark.parametrize("name", ["tensor_mlp", "adafactor_mlp"])
def test_layers_of_a_stack_are_tensors_of_their_own(name):
  """Equal to the same layers one by one, at the recommended rate too; what is stacked is a stack in the state."""
  optimizer = lopt.load(name)
  options = {"num_steps": 300, "input_axes": ATTENTION, "elementwise": ("embed",), "weight_decay": 0.1}
  txs = optimizer(**options), optimizer(**options, stacked=("blocks",))
  params = pair(0)
  states = [tx.init(p) for tx, p in zip(txs, params, strict=True)]
  for seed in range(1, 4):
    updates = []
    for i, (tx, gradients) in enumerate(zip(txs, pair(seed), strict=True)):
      update, states[i] = jax.jit(tx.update)(gradients, states[i], params[i], value=jnp.float32(1))
      updates.append(update)
    plain, stacked = updates
    plain["blocks"] = jax.tree.map(lambda *x: jnp.stack(x), *plain["blocks"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-6), plain, stacked)


def test_a_state_of_bfloat16_of_a_stack():
  """Each layer's scale stays in float32, as one by one."""
  params, stacked = pair(0)
  states = [
    lopt.load("tensor_mlp").direction(state_dtype=jnp.bfloat16, stacked=names).init(p)
    for p, names in ((params, ()), (stacked, ("blocks",)))
  ]
  sizes = [sum(x.nbytes for x in jax.tree.leaves(state)) for state in states]
  counts = 2 * 4 * (NUM_LAYERS - 1) + 4 * (NUM_LAYERS + 1)  # numbers of steps, one for each layer and architecture
  assert abs(sizes[0] - sizes[1]) <= 4 * counts


def test_the_schedule_of_stacks_is_that_of_their_layers():
  params, stacked = pair(0)
  optimizer, options = lopt.load("tensor_mlp"), {"input_axes": ATTENTION, "elementwise": ("embed",)}
  rate = optimizer.schedule(300, stacked, **options, stacked=("blocks",))(7)
  np.testing.assert_allclose(rate, optimizer.schedule(300, params, **options)(7), rtol=1e-6)
  assert rate != optimizer.schedule(300, stacked, **options)(7)


def test_input_axes_are_the_rows():
  """A kernel of [inputs, heads, size] is the matrix of [inputs, heads * size]."""
  gradient = jax.random.normal(jax.random.key(0), (4, 2, 3))
  zero = lopt.load("tensor_mlp")
  zero = zero._replace(theta=jax.tree.map(jnp.zeros_like, zero.theta))

  def first(tx, gradient) -> Any:
    params = {"query": jnp.ones_like(gradient)}
    return tx.update({"query": gradient}, tx.init(params), params)[0]["query"]

  as_matrix = first(zero.direction(), gradient.reshape(4, 6)).reshape(gradient.shape)
  np.testing.assert_allclose(first(zero.direction(input_axes=ATTENTION), gradient), as_matrix, rtol=1e-4, atol=1e-5)
  assert np.max(np.abs(first(zero.direction(), gradient) - as_matrix)) > 0.1


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (
      {"stacked": ("layers",)},
      "stacked: 'layers' is in the name of no tensor; there are: blocks/bias, blocks/gain, ",
    ),
    ({"stacked": ("blocks", "e")}, "stacked: 'e' is in the names of "),
    ({"stacked": "blocks"}, "stacked: a tuple of parts of names, such as ('blocks',), not 'blocks'"),
    ({"input_axes": {"key": 1}}, "input_axes: 'key' is in the name of no matrix; there are: "),
    ({"input_axes": {"query": 0}}, "input_axes: 'query' has 0, and must have a number of axes, at least 1"),
    ({"input_axes": {"query": 3}, "stacked": ("blocks",)}, "input_axes: 'query' has 3, but blocks/query"),
  ],
)
def test_names_that_fit_nothing_are_refused(options, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    lopt.load("tensor_mlp")(learning_rate=0.1, **options).init(pair(0)[1])


def test_layers_of_flax_that_are_scanned():
  """Names are those of the variables; attention's kernels are of [layers, inputs, heads, size]."""
  nnx = pytest.importorskip("flax.nnx")

  @nnx.vmap(in_axes=0, out_axes=0)
  def blocks(key):
    return nnx.MultiHeadAttention(num_heads=2, in_features=8, decode=False, rngs=nnx.Rngs(key))

  params = nnx.state(blocks(jax.random.split(jax.random.key(0), NUM_LAYERS)), nnx.Param)
  names = ["key/kernel", "query/kernel", "value/kernel"]
  options = {"input_axes": dict.fromkeys(names, 1), "elementwise": ("bias",)}
  tx = lopt.load("tensor_mlp").direction(stacked=("kernel", "bias"), **options)
  gradients = jax.tree.map(jnp.sin, params)
  updates, _ = tx.update(gradients, tx.init(params), params)
  assert jax.tree.structure(updates) == jax.tree.structure(params)
  layer, of_layer = (jax.tree.map(lambda x: x[1], tree) for tree in (params, gradients))
  one = lopt.load("tensor_mlp").direction(**options)
  expected, _ = one.update(of_layer, one.init(layer), layer)
  jax.tree.map(lambda u, e: np.testing.assert_allclose(u[1], e, rtol=1e-3, atol=1e-5), updates, expected)
