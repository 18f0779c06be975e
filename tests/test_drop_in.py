"""The optimizers that come with lopt in all the places where one uses an Optax optimizer."""

import importlib.util
import re
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from jax.sharding import Mesh, PartitionSpec

import lopt
from lopt import base, configuration, experiment
from lopt.architectures import direction
from lopt.runs import trained

ROOT = Path(__file__).parent.parent
NAMES = ("adafactor_mlp", "tensor_mlp")
X = jnp.stack([jnp.linspace(-1.0, 1.0, 16) ** i for i in range(4)], axis=1)
Y = jnp.sin(3 * X[:, 1])
STEPS = 12


def test_these_come_with_lopt():
  assert tuple(trained.pretrained()) == NAMES
  for name in NAMES:
    assert lopt.load(name).config["estimator"]["name"] == "pes"
    assert (ROOT / "lopt" / "pretrained" / f"{name}.safetensors").stat().st_size < 100_000
  with pytest.raises(trained.LoadError, match=re.escape("comes with lopt: adafactor_mlp, tensor_mlp")):
    lopt.load("mpl")


def test_their_configurations_are_those_of_the_command_that_trains_them_again():
  pretrained = configuration.load(ROOT / "experiments" / "configs" / "pretrained.py")
  for name in NAMES:
    config = lopt.load(name).config
    command = configuration.plain(pretrained.get_config(f"architecture={name}"))
    # What was trained before an option was there has it at its default; how often one looks changes nothing.
    there, here = ({**experiment.complete(x), "periodic_evaluation": None} for x in (config, command))
    assert configuration.difference(there, here) == []
  with pytest.raises(configuration.ConfigError, match="architecture=celo: is not pretrained"):
    pretrained.get_config("architecture=celo")


@pytest.mark.slow_but_for("tensor_mlp")
@pytest.mark.parametrize("name", NAMES)
def test_each_is_a_learned_direction(name):
  """The zero θ is the hand-made direction of the architecture alone; the file names its learning rate."""
  optimizer = lopt.load(name)
  assert optimizer.learning_rate == optimizer.config["architecture"]["direction"]["learning_rate"] > 0
  nothing = base.LearnedOptimizer(
    lambda key: {},
    lambda theta, num_steps: optax.with_extra_args_support(
      optax.stateless(lambda updates, params: optax.tree.zeros_like(updates))
    ),
  )
  section = optimizer.config["architecture"]["direction"]
  hand_made = configuration.call(direction.wrap, section, nothing, where="direction").direction
  assert hand_made is not None
  zero = optimizer._replace(theta=optax.tree.zeros_like(optimizer.theta))
  params = start()
  for scale in (1e-30, 1.0, 1e30):
    one, other, learned = zero.direction(), hand_made({}, None), optimizer.direction()
    states = [tx.init(params) for tx in (one, other, learned)]
    for seed in range(3):
      g = jax.tree.map(lambda x, scale=scale: scale * (x + 0.3), start(seed + 1))
      u, states[0] = one.update(g, states[0], params)
      expected, states[1] = other.update(g, states[1], params)
      v, states[2] = learned.update(g, states[2], params)
      jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), u, expected)
      for leaf in jax.tree.leaves(v):
        np.testing.assert_allclose(np.sqrt(np.mean(np.square(leaf))), 1.0, rtol=1e-5)
  schedule = optax.cosine_decay_schedule(0.3, 10)
  tx = optimizer(learning_rate=schedule)
  step, _ = tx.update(start(1), tx.init(params), params)
  u, _ = optimizer.direction().update(start(1), optimizer.direction().init(params), params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, -0.3 * b, rtol=1e-5, atol=1e-7), step, u)


@pytest.mark.parametrize("name", ["tensor_mlp", "adafactor_mlp"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_shows_in_the_updates_of_its_tensor(name, bad):
  """So that `optax.apply_if_finite` can skip it; bounds on gradients must not hide it."""
  params = {"w": jnp.ones((4, 3))}
  tx = lopt.load(name).direction(10)
  updates, _ = jax.jit(tx.update)({"w": jnp.ones((4, 3)).at[1, 2].set(bad)}, tx.init(params), params)
  assert not np.any(np.isfinite(updates["w"]))


def test_recommended_steps_are_those_for_the_network_and_the_length():
  """80 inputs have half of what 20 have, 1,600 steps half of what 200 have, one matrix three times as much as six."""
  optimizer = lopt.load("tensor_mlp")
  params = {"w": jnp.ones((80, 64))}
  gradients = {"w": jax.random.normal(jax.random.key(0), (80, 64))}

  def first(tx) -> Any:
    return tx.update(gradients, tx.init(params), params)[0]["w"]

  u = first(optimizer.direction())
  for steps, share in ((200, 1 / 2), (1_600, 1 / 4)):
    rate = 3 * 0.02 * share / (0.05 * steps)  # the first step of the warm-up
    close(jax.jit(lambda n: first(optimizer(n)))(steps), -rate * u, rtol=1e-3)
    np.testing.assert_allclose(optimizer.schedule(steps, params)(0), rate, rtol=1e-5)
    np.testing.assert_allclose(optimizer.schedule(steps)(0), rate * 2 / 3, rtol=1e-5)


@pytest.mark.parametrize(
  "options",
  [
    {"learning_rate": 0.01},
    {"learning_rate": optax.linear_schedule(0.01, 0.0, 8), "weight_decay": 0.1},
    {"num_steps": 8, "weight_decay": optax.linear_schedule(0.1, 0.0, 8)},
  ],
)
def test_hyperparameters_can_be_injected(options):
  """Under jit, where all numbers are traced: as without."""
  optimizer, params = lopt.load("tensor_mlp"), {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}
  plain, injected = optimizer(**options), optax.inject_hyperparams(optimizer)(**options)
  states = [tx.init(params) for tx in (plain, injected)]
  for seed in range(2):
    gradients = jax.tree.map(lambda p, seed=seed: jax.random.normal(jax.random.key(seed), p.shape), params)
    updates = []
    for i, tx in enumerate((plain, injected)):
      update, states[i] = jax.jit(tx.update)(gradients, states[i], params)
      updates.append(update)
    close(*updates, rtol=1e-4)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda tx: tx(optax.constant_schedule(0.1)),
      "num_steps: a function is no number of training steps; a schedule ",
    ),
    (lambda tx: tx([100]), "num_steps: [100] is not a number of training steps; it must be at least 1"),
    (lambda tx: tx(jnp.array([1, 2])), "num_steps: Array([1, 2], dtype=int32) is not a number of training steps"),
    (lambda tx: tx.direction(num_steps=0), "num_steps: 0 is not a number of training steps"),
    (lambda tx: tx.schedule(0), "num_steps: 0 is not a number of training steps"),
    (lambda tx: tx(9, state_dtype="half"), "state_dtype: must be float32 or bfloat16, not float16"),
    (lambda tx: tx(9, state_dtype="foo"), "state_dtype: must be float32 or bfloat16, not 'foo'"),
    (lambda tx: tx(9, state_dtype=None), "state_dtype: must be float32 or bfloat16, not None"),
  ],
)
def test_arguments_that_are_none_are_refused_in_one_line(call, message):
  with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
    call(lopt.load("tensor_mlp"))


def test_names_choose_what_is_not_orthogonalised():
  """The rest is as without them; an embedding's direction is v / rms(v), which θ = 0 has from Nesterov Adam."""
  params = {"embed": {"w": jnp.ones((6, 3))}, "out": {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}}
  gradients = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape), params)
  trained = lopt.load("tensor_mlp")
  zero = trained._replace(theta=jax.tree.map(jnp.zeros_like, trained.theta))

  def first(tx) -> Any:
    return tx.update(gradients, tx.init(params), params)[0]

  plain, chosen = first(zero.direction()), first(zero.direction(elementwise=("embed",)))
  close(chosen["out"], plain["out"], rtol=1e-6)
  np.testing.assert_allclose(chosen["embed"]["w"], jnp.sign(gradients["embed"]["w"]), rtol=1e-4)
  assert np.max(np.abs(plain["embed"]["w"] - chosen["embed"]["w"])) > 0.1
  steps = first(trained(learning_rate=0.5, elementwise=["embed"]))
  close(steps, jax.tree.map(lambda u: -0.5 * u, first(trained.direction(elementwise=("embed",)))), rtol=1e-5)
  trained(learning_rate=0.5, elementwise=("out/b",)).init(params)  # a vector anyway
  with pytest.raises(ValueError, match=re.escape("'bias' is in the name of no tensor; there are: out/b, out/w")):
    trained(learning_rate=0.5, elementwise=("bias",)).init({"out": params["out"]})
  with pytest.raises(ValueError, match=re.escape("such as ('embed',), not 'embed'")):
    trained(learning_rate=0.5, elementwise="embed")


def test_a_file_from_before_directions_loads_and_says_that_it_takes_no_learning_rate():
  """Format version 1, as lopt had written it; used with its number of steps."""
  optimizer = lopt.load(ROOT / "tests" / "data" / "format_version_1.safetensors")
  params = start()
  tx = optimizer(num_steps=10)
  updates, _ = tx.update(start(1), tx.init(params), params)
  assert all(np.all(np.isfinite(x)) and np.any(x != 0) for x in jax.tree.leaves(updates))
  with pytest.raises(
    ValueError, match="learning_rate: this optimizer was trained to decide on the size of its steps"
  ):
    optimizer(learning_rate=0.1)


@pytest.fixture(params=NAMES)
def tx(request) -> Any:
  return lopt.load(request.param)(num_steps=STEPS)


def start(seed=0, dtype=jnp.float32):
  key = jax.random.key(seed)
  return {"w": jax.random.normal(key, (4, 3), dtype), "v": jnp.ones((3, 1), dtype), "b": jnp.zeros((), dtype)}


def loss_of(params, x=X, y=Y):
  x = x.astype(params["w"].dtype)
  return jnp.mean(jnp.square((jnp.tanh(x @ params["w"]) @ params["v"])[:, 0] + params["b"] - y)).astype(jnp.float32)


def step(tx, params, state, x=X, y=Y) -> Any:
  loss, gradients = jax.value_and_grad(loss_of)(params, x, y)
  updates, state = tx.update(gradients, state, params, value=loss)
  return optax.apply_updates(params, updates), state


def train(tx, params, steps=STEPS):
  """A plain loop, compiled step by step."""
  state, compiled = tx.init(params), jax.jit(partial(step, tx))
  for _ in range(steps):
    params, state = compiled(params, state)
  return params, state


def close(a, b, rtol=1e-4):
  jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=1e-6), a, b)


@pytest.mark.slow_but_for("tensor_mlp")
def test_scan_and_vmap(tx):
  """Two models in one compiled program are those of two loops."""

  @jax.jit
  @jax.vmap
  def run(params):
    carry = (params, tx.init(params))
    return jax.lax.scan(lambda carry, _: (step(tx, *carry), None), carry, length=STEPS)[0][0]

  both = run(jax.tree.map(lambda *x: jnp.stack(x), start(0), start(1)))
  for i in range(2):
    expected, _ = train(tx, start(i))
    close(jax.tree.map(lambda x, i=i: x[i], both), expected)
    assert loss_of(expected) < loss_of(start(i))


@pytest.mark.slow_but_for("tensor_mlp-shard_map")
@pytest.mark.parametrize("how", ["pmap", "shard_map"])
def test_data_parallel(tx, how):
  """Eight devices with an eighth of the batch each are one with all of it."""

  def parallel_step(params, state, x, y):
    mean: Any = jax.lax.pmean(jax.value_and_grad(loss_of)(params, x, y), "devices")
    loss, gradients = mean
    updates, state = tx.update(gradients, state, params, value=loss)
    return optax.apply_updates(params, updates), state

  params, devices = start(), jax.local_devices()
  expected, _ = train(tx, params, 3)
  state = tx.init(params)
  if how == "pmap":
    compiled = jax.pmap(parallel_step, "devices")
    params, state = jax.tree.map(lambda x: jnp.stack([x] * len(devices)), (params, state))
    x, y = X.reshape(len(devices), -1, 4), Y.reshape(len(devices), -1)
  else:
    everywhere, divided = PartitionSpec(), PartitionSpec("devices")
    mesh = Mesh(np.array(devices), ("devices",))
    specs = (everywhere, everywhere, divided, divided)
    # Unchecked, or else the gradients of replicated parameters would be sums over devices already.
    mapped = jax.shard_map(parallel_step, mesh=mesh, in_specs=specs, out_specs=everywhere, check_vma=False)
    compiled = jax.jit(mapped)
    x, y = X, Y
  for _ in range(3):
    params, state = compiled(params, state, x, y)
  close(jax.tree.map(lambda x: x[0], params) if how == "pmap" else params, expected)


@pytest.mark.slow_but_for("tensor_mlp")
def test_chain_and_multi_steps(tx):
  """Two halves of a batch accumulated are one step with all of it."""
  params = start()
  chain = optax.chain(optax.clip_by_global_norm(0.5), tx, optax.add_decayed_weights(-0.1))
  whole, _ = jax.jit(partial(step, chain))(params, chain.init(params))
  halves: Any = optax.MultiSteps(chain, 2)
  compiled = jax.jit(partial(step, halves))
  accumulated, state = compiled(params, halves.init(params), X[:8], Y[:8])
  close(accumulated, params)
  accumulated, state = compiled(accumulated, state, X[8:], Y[8:])
  close(accumulated, whole)
  assert loss_of(whole) != loss_of(params)


@pytest.mark.slow_but_for("tensor_mlp")
def test_mixed_precision(tx):
  """bfloat16 parameters have bfloat16 updates, those of the float32 computation; the state is float32."""
  params = start(dtype=jnp.bfloat16)
  state = tx.init(params)
  assert all(x.dtype != jnp.bfloat16 for x in jax.tree.leaves(state))
  gradients = jax.grad(loss_of)(params)
  update = jax.jit(tx.update)
  updates, after = update(gradients, state, params, value=jnp.float32(1.0))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
  gradients, params = (optax.tree.cast(x, jnp.float32) for x in (gradients, params))
  expected, _ = update(gradients, state, params, value=jnp.float32(1.0))
  assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(updates))
  close(optax.tree.cast(updates, jnp.float32), expected, rtol=1e-2)


@pytest.mark.slow
def test_orbax_saves_the_state(tx, tmp_path):
  params, state = train(tx, start(), 3)
  with orbax.checkpoint.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "state", (params, state))
    checkpointer.wait_until_finished()
    like = jax.tree.map(jnp.zeros_like, (params, state))
    restored = checkpointer.restore(tmp_path / "state", like)
  compiled = jax.jit(partial(step, tx))
  jax.tree.map(np.testing.assert_array_equal, compiled(*restored), compiled(params, state))


def test_orbax_saves_the_state_of_stacks(tmp_path):
  params = {"w": jnp.ones((2, 3, 4)), "b": jnp.ones(4)}
  state = lopt.load("tensor_mlp").direction(stacked=("w",)).init(params)
  with orbax.checkpoint.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "state", state)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / "state", jax.tree.map(jnp.ones_like, state))
  jax.tree.map(np.testing.assert_array_equal, restored, state)


@pytest.mark.slow_but_for("tensor_mlp")
def test_equinox(tx):
  model = eqx.nn.MLP(4, "scalar", 8, 1, key=jax.random.key(0))

  @eqx.filter_value_and_grad
  def loss_of(model):
    return jnp.mean(jnp.square(jax.vmap(model)(X) - Y))

  @eqx.filter_jit
  def step(model, state):
    loss, gradients = loss_of(model)
    updates, state = tx.update(gradients, state, eqx.filter(model, eqx.is_array), value=loss)
    return eqx.apply_updates(model, updates), state, loss

  state, losses = tx.init(eqx.filter(model, eqx.is_array)), []
  for _ in range(STEPS):
    model, state, loss = step(model, state)
    losses.append(loss)
  assert losses[-1] < losses[0]


def example(name) -> Any:
  spec = importlib.util.spec_from_file_location(name, ROOT / "experiments" / "examples" / f"{name}.py")
  assert spec is not None
  assert spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.slow_but_for("tensor_mlp")
@pytest.mark.parametrize("name", NAMES)
def test_a_state_of_bfloat16_is_that_of_float32_rounded_between_steps(name):
  optimizer = lopt.load(name)
  tx, rounding = optimizer(num_steps=STEPS), optimizer(num_steps=STEPS, state_dtype=jnp.bfloat16)
  params = rounded = start()
  state, stored = tx.init(params), rounding.init(params)
  for _ in range(3):
    params, state = step(tx, params, state)
    rounded, stored = step(rounding, rounded, stored)
    close(rounded, params)
    state = jax.tree.map(
      lambda x: x.astype(jnp.bfloat16).astype(x.dtype) if x.ndim and x.dtype == jnp.float32 else x, state
    )
  arrays, full = ([x for x in jax.tree.leaves(tree) if x.ndim] for tree in (stored, state))
  assert all(x.dtype == jnp.bfloat16 for x in arrays)
  assert sum(x.nbytes for x in arrays) == 0.5 * sum(x.nbytes for x in full)
  with pytest.raises(ValueError, match="state_dtype: must be float32 or bfloat16, not float16"):
    optimizer(num_steps=STEPS, state_dtype=jnp.float16)


@pytest.mark.parametrize("name", NAMES)
def test_in_programs_of_float64(name):
  """Where `jax_enable_x64` is set, parameters of either precision can be carried through a scan."""
  with jax.enable_x64(True):
    tx = lopt.load(name)(num_steps=STEPS)
    for dtype in (jnp.float32, jnp.float64):
      params = start(dtype=dtype)
      carry = (params, tx.init(params))
      (params, _), _ = jax.lax.scan(lambda carry, _: (step(tx, *carry), None), carry, length=3)
      assert all(x.dtype == dtype and np.all(np.isfinite(x)) for x in params.values())


@pytest.mark.slow_but_for("haiku_loop")
@pytest.mark.parametrize("name", ["haiku_loop", "flax_loop", "fsdp_transformer"])
def test_training_loops(name):
  losses = list(example(name).train("tensor_mlp", 60))
  assert np.mean(losses[-5:]) < 0.5 * losses[0]


@pytest.mark.slow
def test_fine_tuning(tmp_path):
  path = tmp_path / "mine.safetensors"
  before, after = example("fine_tune").fine_tune("tensor_mlp", path, 20)
  assert np.isfinite([before, after]).all()
  mine, theirs = lopt.load(path), lopt.load("tensor_mlp")
  assert mine.config == theirs.config
  assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (mine.theta, theirs.theta)), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_leaves_that_are_not_real_floats_are_refused_by_name(name):
  tx = lopt.load(name)(num_steps=STEPS)
  params = {"w": jnp.ones(3)}
  state = tx.init(params)
  for leaf, dtype in ((jnp.arange(3), "int32"), (jnp.ones(3, complex), "complex64")):
    with pytest.raises(ValueError, match=f"parameters: the leaf b is {dtype}"):
      tx.init({**params, "b": leaf})
  float0: Any = np.zeros(3, jax.dtypes.float0)
  with pytest.raises(ValueError, match="gradients: the leaf w is float0"):
    tx.update({"w": float0}, state, params, value=jnp.float32(1))


@pytest.mark.parametrize("name", NAMES)
def test_python_floats_are_updated_as_scalars(name):
  tx = lopt.load(name)(num_steps=STEPS)

  def step(g: Any, p: Any) -> np.ndarray:
    updates: Any = tx.update({"w": g}, tx.init({"w": p}), {"w": p}, value=jnp.float32(1))[0]
    return np.asarray(updates["w"])

  of_floats = step(0.3, 2.0)
  np.testing.assert_allclose(of_floats, step(jnp.float32(0.3), jnp.float32(2.0)), rtol=1e-6)
  assert of_floats != 0
