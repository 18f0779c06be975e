"""Celo as published: the same parameters, step by step, as the authors' code.

What that computes is in tests/data/published_celo.safetensors. It was recorded on CPU with celo/optimizers/celo.py of
github.com/amoudgl/celo (commit 66d9761), the modules that it imports from github.com/amoudgl/learned_optimization
(commit 930c3b4, with `summary.summary` made to do nothing), and JAX 0.10.2:

    opt = Celo(lstm_hidden_size=5, param_inits=3, train_phase=2, step_mult=10.0)
    rng = np.random.default_rng(0)
    theta = jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape)), opt.init(jax.random.PRNGKey(0)))
    tx = opt.opt_fn(theta)
    params = {name: np.float32(rng.normal(size=shape)) for name, shape in SHAPES.items()}
    state = tx.init(params, num_steps=12)
    for loss, scale in zip(losses, scales):
      gradients = {name: np.float32(scale * rng.normal(size=shape)) for name, shape in SHAPES.items()}
      state = tx.update(state, gradients, loss=loss)

of which the file has `theta`, `losses`, and, of all steps one below the other, `gradients` and
`tx.get_params(state)`. Nobody trained these weights. `step_mult` is large so that the rounding of parameters does not
hide the updates.
Scales are 1, 0.1, 3000 (beyond the limit of gradients), 0, 1e-6, 1, 1e-3, 1, 10, 1; the losses have an outlier, a
negative one and a rise.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
import safetensors.numpy
from absl import flags
from flax import serialization

from lopt import configuration
from lopt.architectures import published, published_celo

NUM_STEPS = 12
SHAPES = {"b": (5,), "kernel": (2, 3, 4, 3), "scalar": (), "square": (3, 3), "w": (6, 4)}
TESTS = Path(__file__).parent.parent
FILE = TESTS / "data" / "published_celo.safetensors"
OPTIMIZER = published_celo.build(lstm_size=5, num_rules=3, step_multiplier=10.0)


@pytest.fixture(scope="module")
def recorded():
  return safetensors.numpy.load_file(FILE)


def part(arrays, name):
  return {key.removeprefix(f"{name}/"): x for key, x in arrays.items() if key.startswith(f"{name}/")}


@pytest.mark.slow
def test_parameters_are_those_of_the_public_code(recorded):
  theta = published.celo(part(recorded, "theta"))
  params, gradients, losses = part(recorded, "params"), part(recorded, "gradients"), recorded["losses"]
  assert {name: x.shape[1:] for name, x in params.items()} == SHAPES

  @jax.jit
  def update(gradients, state, params, loss):
    return OPTIMIZER.transform(theta, NUM_STEPS).update(gradients, state, params, value=loss)

  state = OPTIMIZER.transform(theta, NUM_STEPS).init({name: jnp.asarray(x[0]) for name, x in params.items()})
  seen = []
  for step, loss in enumerate(losses):
    before = {name: x[step] for name, x in params.items()}
    updates, state = update({name: x[step] for name, x in gradients.items()}, state, before, loss)
    for name, u in updates.items():
      expected = np.float64(params[name][step + 1]) - before[name]
      # Half a unit in the last place of the recorded parameters, and as much for what comes of it.
      rounding = 2e-7 * np.abs(params[name][step : step + 2]).max()
      seen.append(np.abs(expected).max() > 1e4 * rounding)
      np.testing.assert_allclose(
        u, expected, rtol=1e-5, atol=rounding + 1e-6 * np.abs(expected).max(), err_msg=f"{name}, step {step}"
      )
  assert np.mean(seen) > 0.9


@pytest.mark.slow
def test_the_length_of_the_run_can_differ_between_runs_of_one_program(recorded):
  """As when several runs are trained in one `vmap`."""
  theta = published.celo(part(recorded, "theta"))
  params = {name: jnp.asarray(x[0]) for name, x in part(recorded, "params").items()}
  gradients = {name: jnp.asarray(x) for name, x in part(recorded, "gradients").items()}

  def run(num_steps):
    tx = OPTIMIZER.transform(theta, num_steps)

    def step(carry, inputs):
      params, state = carry
      updates, state = tx.update(inputs[0], state, params, value=inputs[1])
      params = jax.tree.map(jnp.add, params, updates)
      return (params, state), params

    return jax.lax.scan(step, (params, tx.init(params)), (gradients, jnp.asarray(recorded["losses"])))[1]

  paths = jax.jit(jax.vmap(run))(jnp.array([NUM_STEPS, 1_000], jnp.int32))
  for name, path in part(recorded, "params").items():
    np.testing.assert_allclose(paths[name][0], path[1:], rtol=1e-4, atol=1e-4 * np.abs(path).max(), err_msg=name)
    assert np.abs(paths[name][1] - path[1:]).max() > 0.01 * np.abs(path).max()


@pytest.mark.slow
def test_all_of_theta_but_the_dropped_layer_matters(recorded):
  theta = published.celo(part(recorded, "theta"))
  params = {name: jnp.asarray(x[0]) for name, x in part(recorded, "params").items()}

  gradients = {name: jnp.asarray(x[0]) for name, x in part(recorded, "gradients").items()}

  def total(theta):
    tx = OPTIMIZER.transform(theta, NUM_STEPS)
    updates, _ = tx.update(gradients, tx.init(params), params, value=jnp.float32(1))
    return sum(jnp.sum(jnp.sin(u)) for u in jax.tree.leaves(updates))

  gradient = jax.jit(jax.grad(total))(theta)
  for path, x in jax.tree_util.tree_leaves_with_path(gradient):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    assert np.any(x != 0) != ("rnn_params/linear/" in name), name


@pytest.mark.slow
def test_theta_of_the_architecture_is_the_published_tree():
  theta = jax.tree.map(np.asarray, published_celo.build().init(jax.random.key(0)))
  jax.tree.map(np.testing.assert_array_equal, published.celo(theta), theta)
  deeper = published_celo.build(lstm_size=3, num_rules=2, hidden_sizes=(5, 3, 4)).init(jax.random.key(0))
  jax.tree.map(np.testing.assert_array_equal, published.celo(deeper), deeper)
  assert sum(x.size for x in jax.tree.leaves(theta)) == 37_089


def test_weights_of_the_first_layer_are_drawn_for_all_of_its_inputs():
  rules = published_celo.build(num_rules=400).init(jax.random.key(0))["ff_mod_stack"]["~"]
  assert np.std(rules["w0__3"]) == pytest.approx(0.88 / np.sqrt(30), rel=0.05)  # of a normal one, cut at 2
  assert np.std(rules["w2"]) == pytest.approx(0.88 / 2, rel=0.05)


def changed(changes):
  flat = {}
  for path, x in jax.tree_util.tree_leaves_with_path(published_celo.build(lstm_size=3).init(jax.random.key(0))):
    flat[jax.tree_util.keystr(path, simple=True, separator="/")] = np.asarray(x)
  flat |= {name: np.zeros(shape) for name, shape in changes.items() if shape is not None}
  return {name: x for name, x in flat.items() if changes.get(name, ()) is not None}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"lstm_init_state/hidden": None}, "lstm_init_state/hidden: missing"),
    ({"lstm_init_state/cell": (1, 4)}, r"lstm_init_state/cell: must have shape \(1, 3\), not \(1, 4\)"),
    ({"ff_mod_stack/~/b0": (4,)}, r"ff_mod_stack/~/b0: must have shape \(any, any\), not \(4,\)"),
    ({"ff_mod_stack/~/w0__3": (1, 1, 4)}, r"ff_mod_stack/~/w0__3: must have shape \(1, 3, 4\)"),
    ({"ff_mod_stack/~/w1": None}, "ff_mod_stack/~/w1: must have|ff_mod_stack/~/w1: missing"),
    ({"ff_mod_stack/~/w2": (1, 4, 2)}, r"ff_mod_stack/~/w2: must have shape \(1, 4, 3\)"),
    ({"ff_mod_stack/~/b2": (2, 3)}, r"ff_mod_stack/~/b2: must have shape \(1, 3\)"),
    ({"rnn_params/linear/w": None}, "rnn_params/linear/w: missing"),
    ({"rnn_params/linear_2/w": (30, 3)}, r"rnn_params/linear_2/w: must have shape \(18, 3\), not \(30, 3\)"),
    ({"rnn_params/rnn/linear/b": (3,)}, r"rnn_params/rnn/linear/b: must have shape \(12\)"),
    ({"rnn_params/rnn_to_controls/b": (2,)}, r"rnn_params/rnn_to_controls/b: must have shape \(1\)"),
    ({"rnn_params/other/w": (1,)}, "rnn_params/other/w: not of this architecture"),
  ],
)
def test_bad_weights(changes, message):
  with pytest.raises(ValueError, match=f"^{message}"):
    published.celo(changed(changes))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"lstm_size": 0}, "lstm_size"),
    ({"num_rules": 0}, "num_rules"),
    ({"hidden_sizes": ()}, "hidden_sizes"),
    ({"step_multiplier": float("nan")}, "step_multiplier"),
    ({"exp_multiplier": float("inf")}, "exp_multiplier"),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match=f"^{message}"):
    published_celo.build(**options)


def test_parameters_and_loss_are_needed():
  optimizer = published_celo.build(lstm_size=2)
  tx, params = optimizer.transform(optimizer.init(jax.random.key(0)), 10), {"w": jnp.ones(2)}
  with pytest.raises(ValueError, match="needs the parameters"):
    tx.update(params, tx.init(params), None, value=jnp.float32(1))
  with pytest.raises(ValueError, match="needs the loss"):
    tx.update(params, tx.init(params), params)


@pytest.fixture(scope="module")
def script():
  """The benchmark that reads the published file, without its flags, of which other scripts have some too."""
  with pytest.MonkeyPatch.context() as patch:
    for define in ("DEFINE_string", "DEFINE_list", "DEFINE_integer"):
      patch.setattr(flags, define, lambda *args, **options: None)
    return configuration.load(TESTS.parent / "experiments" / "benchmarks" / "celo.py")


def test_the_published_file_is_read(script, tmp_path):
  theta = jax.tree.map(np.asarray, published_celo.build(lstm_size=2, num_rules=3).init(jax.random.key(0)))
  (tmp_path / "theta.state").write_bytes(serialization.to_bytes(theta))
  jax.tree.map(np.testing.assert_array_equal, script.read_theta(tmp_path / "theta.state"), theta)


FLOATS: Any = msgpack.packb(((2,), "float32", b"\0" * 8))


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "not a file of arrays as Flax writes it: "),
    (b"\xc1", "not a file of arrays as Flax writes it: "),
    (b"PK\x03\x04 a zip", "not a file of arrays as Flax writes it: "),
    (msgpack.packb([1, 2]), "has no dictionary of arrays"),
    (msgpack.packb({"w": msgpack.ExtType(1, FLOATS)}), "lstm_init_state/hidden: missing; other arrays: w"),
    (msgpack.packb({"w": msgpack.ExtType(2, FLOATS)}), "not a file .*: an extension of type 2"),
    (msgpack.packb({"w": msgpack.ExtType(1, FLOATS.replace(b"float32", b"float64"))}), "not a file .*'float64'"),
    (msgpack.packb({"w": msgpack.ExtType(1, FLOATS[:-1])}), "not a file of arrays"),
    (msgpack.packb({"w": msgpack.ExtType(1, msgpack.packb(((3,), "float32", b"")))}), "not a file of arrays"),
    (msgpack.packb({"w": "text"}), ""),
    (msgpack.packb({1: 2.0}), ""),
  ],
)
def test_files_that_are_not_it(script, tmp_path, content, message):
  path = tmp_path / "theta.state"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=rf"^{path}: {message}"):
    script.read_theta(path)
