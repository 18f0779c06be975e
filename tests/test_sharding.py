"""Parameters spread over eight devices, against the same on one."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lopt import configuration
from lopt.runs.trained import TrainedOptimizer

NAMES = ("mlp", "lstm", "adafactor_mlp", "tensor_mlp", "celo", "hierarchical_rnn", "neural_adam")
SIZES = {
  "mlp": {"hidden_sizes": (4,), "step_multiplier": 0.5},
  "lstm": {"hidden_sizes": (3,), "step_multiplier": 0.5},
  "adafactor_mlp": {"hidden_sizes": (3,), "step_multiplier": 0.5},
  "neural_adam": {},
}
SHAPES = {"w": (8, 64), "kernel": (3, 3, 4, 16), "b": (64,)}
SPECS = {
  "w": PartitionSpec("x", "y"),
  "kernel": PartitionSpec(None, None, "x", "y"),
  "b": PartitionSpec(("x", "y")),
}
AXES = {"explicit": AxisType.Explicit, "automatic": AxisType.Auto}


def build(name, wrapped, **options):
  section = {"name": name, **SIZES.get(name, {"step_multiplier": 0.5})}
  section |= {"direction": {"learning_rate": 0.02}} if wrapped else {}
  architecture = configuration.build("architectures", section, where="architecture")
  return TrainedOptimizer(architecture.init(jax.random.key(0)), architecture, {})(num_steps=10, **options)


def arrays(seed):
  rng = np.random.default_rng(seed)
  return {name: np.asarray(rng.normal(size=shape), np.float32) for name, shape in SHAPES.items()}


def spread(tree, mesh, specs=SPECS):
  return {name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in tree.items()}


def assert_laid_out_as_parameters(tree):
  """Arrays of a parameter's size have its layout, after axes of their own."""
  checked = 0
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    (name,) = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)] or [None]
    if name is not None and x.ndim > 0 and x.shape[x.ndim - len(SHAPES[name]) :] == SHAPES[name]:
      spec = PartitionSpec(*[None] * (x.ndim - len(SHAPES[name])), *SPECS[name])
      expected = NamedSharding(x.sharding.mesh, spec)
      assert x.sharding.is_equivalent_to(expected, x.ndim), f"{jax.tree_util.keystr(path)}: {x.sharding}"
      checked += 1
  assert checked >= len(SHAPES)


def gathered(text):
  """Sizes of what the collectives of a compiled program, other than sums, bring together on one device."""
  lines = re.findall(r"= \(?(\S+\[[\d,]*\]).* (?:all-gather|all-to-all|collective-permute)(?:-start)?\(", text)
  return [int(np.prod([int(n) for n in re.findall(r"\d+", line.split("[")[1])])) for line in lines]


@pytest.mark.slow_but_for("tensor_mlp-False-explicit")
@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize(
  ("name", "wrapped"),
  [
    *[(name, False) for name in NAMES],
    *[pytest.param(name, True, marks=() if name == "tensor_mlp" else pytest.mark.long) for name in NAMES],
  ],
)
def test_spread_parameters(name, wrapped, axes):
  tx = build(name, wrapped)
  mesh = jax.make_mesh((2, 4), ("x", "y"), (AXES[axes],) * 2)
  params, state = arrays(0), tx.init(jax.tree.map(jnp.asarray, arrays(0)))
  update = jax.jit(lambda gradients, state, params: tx.update(gradients, state, params, value=1.0))
  divided = spread(params, mesh)
  divided_state = tx.init(divided)
  assert_laid_out_as_parameters(divided_state)
  with jax.set_mesh(mesh):  # which JAX asks for where nothing is computed from the arguments
    assert_laid_out_as_parameters(jax.jit(tx.init)(divided))
  compiled = update.lower(spread(arrays(1), mesh), divided_state, divided).compile()
  for step in range(2):
    updates, state = update(arrays(1 + step), state, params)
    divided_updates, divided_state = compiled(spread(arrays(1 + step), mesh), divided_state, divided)
    assert_laid_out_as_parameters(divided_updates)
    assert_laid_out_as_parameters(divided_state)
    for leaf, u in updates.items():
      np.testing.assert_allclose(divided_updates[leaf], u, rtol=1e-3, atol=1e-5, err_msg=leaf)
  # One matrix for its orthogonalisation, but nothing with the axes of a state; the sums of a tensor are small.
  assert max(gathered(compiled.as_text() or ""), default=0) <= (576 if wrapped else 16)


@pytest.mark.slow_but_for("explicit")
@pytest.mark.parametrize("axes", AXES)
def test_spread_stacks_of_layers(axes):
  """A layer's arrays are laid out as the layer; a kernel whose first axis alone are inputs as it was given."""
  specs = {
    "w": PartitionSpec(None, "x", "y"),
    "gain": PartitionSpec(None, "y"),
    "query": PartitionSpec(None, "x", "y", None),
  }
  rng = np.random.default_rng(0)
  shapes = {"w": (3, 8, 64), "gain": (3, 64), "query": (3, 8, 4, 16)}
  params, gradients = ({k: np.asarray(rng.normal(size=v), np.float32) for k, v in shapes.items()} for _ in range(2))
  tx = build("tensor_mlp", True, stacked=tuple(shapes), input_axes={"query": 1})
  mesh = jax.make_mesh((2, 4), ("x", "y"), (AXES[axes],) * 2)
  divided, divided_gradients = (spread(tree, mesh, specs) for tree in (params, gradients))
  state = tx.init(jax.tree.map(jnp.asarray, params))
  expected, _ = jax.jit(tx.update)(gradients, state, params, value=1.0)
  divided_state = tx.init(divided)
  update = jax.jit(lambda gradients, state, params: tx.update(gradients, state, params, value=1.0))
  compiled = update.lower(divided_gradients, divided_state, divided).compile()
  updates, divided_state = compiled(divided_gradients, divided_state, divided)
  for name, u in expected.items():
    np.testing.assert_allclose(updates[name], u, rtol=1e-3, atol=1e-5, err_msg=name)
    assert updates[name].sharding.is_equivalent_to(divided[name].sharding, u.ndim), name
  for path, x in jax.tree_util.tree_leaves_with_path(divided_state):
    (name,) = [key.key for key in path if isinstance(key, jax.tree_util.DictKey) and key.key in shapes] or [None]
    if name is not None and x.ndim >= len(shapes[name]):
      first, *rest = specs[name]
      spec = PartitionSpec(first, *[None] * (x.ndim - len(shapes[name])), *rest)
      assert x.sharding.is_equivalent_to(NamedSharding(x.sharding.mesh, spec), x.ndim), f"{path}: {x.sharding}"
  # The matrices of a stack for their orthogonalisation, but nothing with the axes of a state.
  assert max(gathered(compiled.as_text() or ""), default=0) <= 3 * 8 * 64
