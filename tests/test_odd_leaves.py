"""Leaves that practitioners' parameters and gradients may have, for all architectures and what comes with lopt."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lopt
from lopt import configuration
from lopt.runs import trained

ARCHITECTURES = configuration.choices("architectures")
PARAMS = {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}
LOSS = jnp.float32(1.0)


def build(name, **section):
  architecture = configuration.build("architectures", {"name": name, **section}, where="architecture")
  return trained.TrainedOptimizer(architecture.init(jax.random.key(0)), architecture, {})(num_steps=10)


@pytest.fixture(scope="module")
def tx():
  return build("mlp", direction={})


@pytest.mark.parametrize(
  ("leaf", "kind"),
  [(7, "int32"), (True, "bool"), (1j, "complex64"), (jnp.zeros(2, jnp.int32), "int32"), ("relu", "str")],
)
def test_other_leaves_are_refused_by_name_in_one_line(tx, leaf, kind):
  with pytest.raises(ValueError, match=rf"^parameters: the leaf net/odd is {kind}, .*optax\.masked") as error:
    tx.init({"net": {"w": jnp.ones(3), "odd": leaf}})
  assert "\n" not in str(error.value)


def test_masked_leaves_are_left_alone(tx):
  """The remedy that the message gives."""
  params = {"w": jnp.ones(3), "steps": jnp.zeros((), jnp.int32)}
  masked = optax.masked(tx, {"w": True, "steps": False})
  updates: Any = masked.update(params, masked.init(params), params)[0]
  assert updates["steps"] == 0
  assert np.all(updates["w"] != 0)


@pytest.mark.slow_but_for("tensor_mlp", "mlp", "lstm", "hyperparameters")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_arrays_without_elements_and_a_step_with_nan(name):
  """The former change nothing of the other leaves' updates; the latter is seen, and can be skipped."""
  tx = optax.apply_if_finite(build(name), 10)
  odd = {**PARAMS, "empty": jnp.zeros((0, 3), jnp.bfloat16), "none": None, "z": jnp.zeros(0)}
  state: Any = tx.init(odd)
  update = jax.jit(tx.update)
  updates: Any
  updates, skipped = update({**odd, "w": PARAMS["w"].at[0, 1].set(jnp.nan)}, state, odd, value=LOSS)
  assert int(skipped.total_notfinite) == 1  # so the updates were not finite
  assert all(np.all(u == 0) for u in jax.tree.leaves(updates))
  updates, _ = update(odd, skipped, odd, value=LOSS)
  assert updates["empty"].shape == (0, 3)
  assert updates["empty"].dtype == jnp.bfloat16
  assert updates["z"].shape == (0,)
  assert updates["none"] is None
  expected: Any = update(odd, state, odd, value=LOSS)[0]
  if name in ("hierarchical_rnn", "celo", "neural_adam"):  # where tensors have something to do with each other
    expected |= jax.jit(build(name).update)(PARAMS, build(name).init(PARAMS), PARAMS, value=LOSS)[0]
  for leaf in PARAMS:
    assert np.all(np.isfinite(updates[leaf]))
    np.testing.assert_allclose(updates[leaf], expected[leaf], rtol=1e-5, atol=1e-8)


def test_nothing_to_train(tx):
  params = {"z": jnp.zeros(0)}
  updates: Any = tx.update(params, tx.init(params), params)[0]
  assert updates["z"].shape == (0,)
  assert tx.update({}, tx.init({}), {})[0] == {}


@pytest.mark.parametrize(
  "name", [*trained.pretrained(), "format_version_1", "untrained mlp", "untrained adafactor_mlp"]
)
def test_gradients_of_any_size_give_bounded_updates(name):
  """Up to those of ordinary gradients, a few times over."""
  if name.startswith("untrained "):
    tx = build(name.removeprefix("untrained "))
  else:
    file = name if name in trained.pretrained() else Path(__file__).parent / "data" / f"{name}.safetensors"
    tx = lopt.load(file)(num_steps=10)
  update = jax.jit(tx.update)

  def largest(scales):
    """The largest update of steps with gradients of these sizes, at random signs."""
    state, found = tx.init(PARAMS), 0.0
    for step, scale in enumerate(scales):
      rng = np.random.default_rng(step)
      gradients = jax.tree.map(lambda p: jnp.asarray(scale * rng.choice([-1, 1], p.shape), jnp.float32), PARAMS)  # noqa: B023
      updates, state = update(gradients, state, PARAMS, value=LOSS)
      assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((updates, state)))
      found = max(found, *(float(np.max(np.abs(u))) for u in jax.tree.leaves(updates)))
    return found

  limit = 10 * largest([1.0, 0.1, 1.0, 0.1])
  top = float(np.finfo(np.float32).max)
  for scales in ([1e30] * 3, [top] * 3, [1e-40] * 3, [1.0, 1e30, 1.0, 1e-40], [1e-40, 1.0, top]):
    assert largest(scales) < limit
