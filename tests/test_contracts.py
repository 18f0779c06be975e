"""Every architecture on every task family, found by their files: what each must do to be usable with all others."""

import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lopt import base, configuration, inner_training
from lopt.architectures import meta_parameters
from lopt.outer import pes

ARCHITECTURES = configuration.choices("architectures")
FAMILIES = configuration.choices("tasks")
STEPS = 200
STEEP = {"surfaces", "mlp_vae"}  # where an optimizer that is not trained yet may well diverge
BOLD = {"tensor_mlp"}  # may well do so anywhere: steps of one size that add up, since it is made for a direction
NEEDS_FILES = {"rnn_language_model", "transformer_language_model"}  # a text, that does not come with a package


def architecture(name):
  return configuration.build("architectures", {"name": name}, where="architecture")


@pytest.fixture(scope="module")
def family():
  """`(name) -> TaskFamily` with default options, each built once."""
  built = {}

  def build(name):
    if name in NEEDS_FILES and "LOPT_MANUAL_DIR" not in os.environ:
      pytest.skip("needs the original text: set LOPT_MANUAL_DIR to a folder that has tiny_shakespeare/input.txt")
    if name not in built:
      built[name] = configuration.build("tasks", {"name": name}, where="task")
    return built[name]

  return build


def every_pair():
  """Architectures and families. An optimizer sees only the arrays of a family, so most pairs are marked long."""
  for optimizer in ARCHITECTURES:
    for task in FAMILIES:
      quick = task == "quadratic" or optimizer == "mlp"
      yield pytest.param(optimizer, task, marks=[] if quick else [pytest.mark.long], id=f"{optimizer}-{task}")


@pytest.mark.slow_but_for("mlp-quadratic", "tensor_mlp-quadratic", "mlp-mlp_classifier")
@pytest.mark.parametrize(("optimizer", "task"), list(every_pair()))
def test_any_architecture_trains_any_family(optimizer, task, family):
  """A pair of runs of 200 inner steps that do not diverge, and their meta-gradient."""
  learned = architecture(optimizer)
  horizon = inner_training.log_uniform_horizon(minimum=STEPS, maximum=STEPS)
  problem = inner_training.build(family(task), learned, horizon=horizon)
  estimator = pes.build(problem, num_pairs=1, sigma=0.1, unroll_length=STEPS, stagger=False)

  @jax.jit
  def outer_step(key):
    keys = jax.random.split(key, 3)
    theta = learned.init(keys[0])
    gradient, _, metrics = estimator.estimate(keys[1], theta, estimator.init(keys[2], theta))
    return theta, gradient, metrics

  theta, gradient, metrics = outer_step(jax.random.key(0))
  assert metrics["inner_steps"] == 2 * STEPS
  assert metrics["diverged"] == 0 or task in STEEP or optimizer in BOLD
  assert np.isfinite(metrics["meta_loss"])
  assert jax.tree.structure(gradient) == jax.tree.structure(theta)
  leaves = jax.tree.leaves(gradient)
  assert all(np.all(np.isfinite(x)) for x in leaves)
  # Of nothing it would be exactly 0, as it is where all losses are capped.
  assert any(np.any(x != 0) for x in leaves) or metrics["diverged"]


@pytest.mark.slow_but_for("mlp_classifier", "quadratic", "rnn_language_model")
@pytest.mark.parametrize("task", FAMILIES)
def test_families(task, family):
  """Shapes that do not depend on the task, randomness from keys alone, a start near 1, a gradient."""
  tasks = family(task)
  assert 1 < tasks.loss_cap < np.inf

  @jax.jit
  @jax.vmap
  def first(key):
    keys = jax.random.split(key, 4)
    task_params = tasks.sample(keys[0])
    params = tasks.init(keys[1], task_params)
    losses, gradient = [], None
    for i, split in enumerate(base.SPLITS):
      batch = tasks.batch(jax.random.fold_in(keys[2], i), task_params, split)
      (loss, metrics), gradient = jax.value_and_grad(tasks.loss, has_aux=True)(params, keys[3], batch, task_params)
      assert loss.shape == ()
      assert loss.dtype == jnp.float32
      assert all(x.shape == () for x in metrics.values())
      losses.append(tasks.normalize(loss, task_params))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
    return jnp.stack(losses), params, gradient

  keys = jax.random.split(jax.random.key(1), 64)
  losses, params, gradient = first(keys)
  again, _, _ = first(keys)
  np.testing.assert_array_equal(losses, again)
  assert np.all(np.isfinite(losses))
  assert np.all(losses < tasks.loss_cap)
  assert 0.5 < np.median(losses) < 2.5  # in the common unit, 1 is knowing nothing
  assert len(np.unique(losses[:, 0])) > 32
  assert any(np.any(x != 0) for x in jax.tree.leaves(gradient))
  assert jax.tree.structure(gradient) == jax.tree.structure(params)
  with pytest.raises(ValueError, match="split='eval'"):
    tasks.batch(keys[0], tasks.sample(keys[1]), "eval")


PARAMS = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2), "scale": jnp.float32(1.5), "filters": jnp.full((2, 2, 1, 3), 0.3)}


@pytest.mark.slow_but_for("tensor_mlp", "mlp")
@pytest.mark.parametrize("optimizer", ARCHITECTURES)
def test_architectures(optimizer):
  """Any tree of parameters; a first state without θ, that can be donated; names for all of θ; the same updates under
  jit and vmap.
  """
  learned = architecture(optimizer)
  theta = learned.init(jax.random.key(0))
  assert len(meta_parameters.named(theta)) == len(jax.tree.leaves(theta))
  nothing = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan), theta)
  state = learned.transform(nothing, 100).init(PARAMS)
  for x in jax.tree.leaves(state):
    assert np.all(np.isfinite(np.asarray(x, np.float32)))
  jax.jit(lambda state: jax.tree.map(jnp.square, state), donate_argnums=0)(state)

  def two_steps(theta, params, num_steps):
    tx = learned.transform(theta, num_steps)
    state = tx.init(params)
    gradient = jax.tree.map(lambda p: jnp.cos(3 * p + jnp.arange(p.size).reshape(p.shape)), params)
    for scale in (1.0, 0.5):
      updates, new_state = tx.update(optax.tree.scale(scale, gradient), state, params, value=jnp.float32(scale))
      assert jax.tree.structure(new_state) == jax.tree.structure(state)
      assert [x.shape for x in jax.tree.leaves(new_state)] == [x.shape for x in jax.tree.leaves(state)]
      state = new_state
    return updates

  updates = jax.jit(two_steps)(theta, PARAMS, jnp.int32(100))
  assert jax.tree.structure(updates) == jax.tree.structure(PARAMS)
  assert [x.shape for x in jax.tree.leaves(updates)] == [x.shape for x in jax.tree.leaves(PARAMS)]
  assert all(np.any(x != 0) for x in jax.tree.leaves(updates))
  stack = lambda tree: jax.tree.map(lambda x: jnp.stack([x, x]), tree)
  mapped = jax.jit(jax.vmap(two_steps, in_axes=(0, 0, None)))(stack(theta), stack(PARAMS), jnp.int32(100))
  for one, two in zip(jax.tree.leaves(updates), jax.tree.leaves(mapped), strict=True):
    np.testing.assert_allclose(two, np.stack([one, one]), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("optimizer", ARCHITECTURES)
def test_architectures_compute_in_float32_where_jax_has_float64(optimizer):
  """With `jax_enable_x64`: the same θ, states and updates, and no array of float64 on the way."""
  learned = architecture(optimizer)
  like = jax.eval_shape(learned.init, jax.random.key(0))
  params = jax.tree.map(lambda x: x.astype(jnp.float32), PARAMS)  # whatever Python numbers they were made of
  with jax.enable_x64(True):
    assert jax.eval_shape(learned.init, jax.random.key(0)) == like

    def update(theta, params, loss):
      tx = learned.transform(theta, 100)
      return tx.update(params, tx.init(params), params, value=loss), tx.init(params)

    program, results = jax.make_jaxpr(update, return_shape=True)(like, params, jnp.float64(1.0))
    (updates, state), before = results
    types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert types(state) == types(before)
    assert types(updates) == types(PARAMS)
    assert not re.search(r":f64\[\d+", str(program))
