"""Safeguards: the inequalities that they guarantee, and closed forms."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lopt import base
from lopt.architectures import safeguards

SHAPES = {"bias": (3,), "scalar": (), "weights": (4, 3)}


def draw(seed, scale=1.0, batch=()):
  rng = np.random.default_rng(seed)
  return {name: jnp.float32(scale * rng.normal(size=(*batch, *shape))) for name, shape in SHAPES.items()}


def apply(tx, updates, params=None) -> Any:
  return tx.update(updates, tx.init(params), params)[0]


def norm(tree):
  return np.sqrt(sum(np.sum(np.asarray(x, np.float64) ** 2) for x in jax.tree.leaves(tree)))


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def close(a, b):
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), a, b)


def sgd(learning_rate=0.5):
  """An architecture with an update that is known: -α g, α out of θ."""
  return base.LearnedOptimizer(
    lambda key: jnp.float32(learning_rate), lambda theta, num_steps: optax.with_extra_args_support(optax.sgd(theta))
  )


def test_global_norm_holds_for_each_particle():
  """Updates of 10⁻³ to 10³ under vmap: none longer than allowed, short ones untouched, directions kept."""
  scales = 10.0 ** np.arange(-3, 4)
  updates = draw(0, batch=(7,))
  updates = {name: x * jnp.float32(scales).reshape(-1, *[1] * (x.ndim - 1)) for name, x in updates.items()}
  limited = jax.vmap(partial(apply, safeguards.limit_global_norm(2.0)))(updates)
  for i in range(7):
    before, after = (jax.tree.map(lambda x, i=i: x[i], tree) for tree in (updates, limited))
    if norm(before) <= 2.0:
      equal(after, before)
    else:
      close(after, optax.tree.scale(2.0 / norm(before), before))
      assert norm(after) <= 2.0 * (1 + 1e-6)


def test_global_norm_of_updates_whose_squares_overflow():
  limited = apply(safeguards.limit_global_norm(1.0), {"w": jnp.array([3e30, -4e30])})
  np.testing.assert_allclose(limited["w"], [0.6, -0.8], rtol=1e-6)
  np.testing.assert_array_equal(apply(optax.clip_by_global_norm(1.0), {"w": jnp.array([3e30])})["w"], [0.0])


def test_trust_ratio_holds_for_each_tensor_of_each_particle():
  params, updates = draw(0, 0.1, (5,)), draw(1, 0.02, (5,))
  params["bias"] = params["bias"].at[0].set(0.0)
  limited = jax.vmap(partial(apply, safeguards.limit_trust_ratio(0.1, 0.05)))(updates, params)
  was_limited = []
  for name in SHAPES:
    for p, u, after in zip(params[name], updates[name], limited[name], strict=True):
      limit = 0.1 * max(norm(p), 0.05)
      was_limited.append(norm(u) > limit)
      if was_limited[-1]:
        np.testing.assert_allclose(after, u * limit / norm(u), rtol=1e-5)
        assert norm(after) <= limit * (1 + 1e-6)
      else:
        equal(after, u)
  assert 0 < sum(was_limited) < len(was_limited)


def test_updates_of_zero_stay_zero_with_a_gradient():
  """Backpropagation through an unroll meets √0 in the norm of an update of zero."""
  zeros, params = draw(0, 0.0), draw(1)
  for tx in (safeguards.limit_global_norm(1.0), safeguards.limit_trust_ratio(0.1)):
    equal(apply(tx, zeros, params), zeros)
    slope = jax.grad(lambda u, tx=tx: sum(jnp.sum(x) for x in jax.tree.leaves(apply(tx, u, params))))(zeros)
    equal(slope, jax.tree.map(jnp.ones_like, zeros))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(value):
  params = draw(0)
  updates = {**draw(1), "bias": jnp.array([1.0, value, 2.0])}
  mixed = safeguards.mix_with_adam(optax.identity(), 0.5, adam_graft=True)
  pieces = [
    safeguards.limit_global_norm(1.0),
    safeguards.limit_trust_ratio(0.1),
    safeguards.decay_weights(0.1),
    mixed,
  ]
  for tx in [*pieces, safeguards.scale_with_width(2)]:
    assert not np.all(np.isfinite(apply(tx, updates, params)["bias"]))


def test_weights_decay_by_their_share():
  """New parameters are (1 - w) p + u, without a learning rate."""
  params, updates = draw(0), draw(1)
  decayed = optax.apply_updates(params, apply(safeguards.decay_weights(0.1), updates, params))
  close(decayed, jax.tree.map(lambda p, u: 0.9 * p + u, params, updates))


@pytest.mark.parametrize("graft", [False, True])
def test_mixture_with_adam(graft):
  """Adam written out, for two steps: m̂ / (√v̂ + 1e-8)."""
  params, gradients = draw(0), [draw(1), draw(2)]
  tx: Any = safeguards.mix_with_adam(optax.sgd(0.5), 0.3, 0.01, adam_graft=graft)
  state, moments = tx.init(params), {name: (np.zeros(shape), np.zeros(shape)) for name, shape in SHAPES.items()}
  for t, gradient in enumerate(gradients, start=1):
    updates, state = tx.update(gradient, state, params)
    for name, x in gradient.items():
      g = np.asarray(x, np.float64)
      m, v = moments[name]
      m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
      moments[name] = m, v
      adam = -0.01 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
      learned = -0.5 * g
      if graft:
        learned = learned * norm(adam) / norm(learned)
      np.testing.assert_allclose(updates[name], 0.7 * learned + 0.3 * adam, rtol=2e-5)


def test_a_mixture_of_all_adam_is_adam_and_of_none_is_the_learned_optimizer():
  params, gradients = draw(0), draw(1)
  equal(
    apply(safeguards.mix_with_adam(optax.sgd(0.5), 1.0, 0.01), gradients, params),
    apply(optax.adam(0.01), gradients, params),
  )
  equal(
    apply(safeguards.mix_with_adam(optax.sgd(0.5), 0.0, 0.01), gradients, params), apply(optax.sgd(0.5), gradients)
  )


def test_steps_scale_with_fan_in():
  """(base / fan-in)^power for matrices and kernels but the input layer's; µP's table 3 for Adam."""
  updates = {
    "linear_0": {"w": jnp.ones((64, 8)), "b": jnp.ones(8)},
    "linear_1": {"w": jnp.ones((8, 16)), "b": jnp.ones(16)},
    "conv": {"w": jnp.ones((3, 3, 16, 2))},
  }

  def factors(tx):
    return jax.tree.map(lambda x: np.unique(x).item(), apply(tx, updates))

  assert factors(safeguards.scale_with_width(4, input_layers=("linear_0",))) == {
    "linear_0": {"w": 1.0, "b": 1.0},
    "linear_1": {"w": 0.5, "b": 1.0},
    "conv": {"w": 0.25},
  }
  assert factors(safeguards.scale_with_width(4, 0.5))["linear_0"] == {"w": 0.25, "b": 1.0}


def test_wrap_with_everything_off_is_the_optimizer_itself():
  optimizer = sgd()
  assert safeguards.wrap(optimizer) is optimizer


def test_wrap_applies_everything_in_the_order_of_its_arguments():
  """Against the same in NumPy, under jit and vmap over θ."""
  wrapped = safeguards.wrap(
    sgd(),
    adam_mix=0.5,
    adam_learning_rate=0.1,
    base_width=2,
    trust_ratio=0.2,
    trust_floor=0.3,
    global_norm=0.25,
    weight_decay=0.01,
  )
  params, gradients = draw(0), draw(1)
  params["bias"] *= 1e-3
  thetas = jnp.array([1e-3, 0.5])

  def update(theta):
    tx = wrapped.transform(theta, 10)
    return tx.update(gradients, tx.init(params), params, value=jnp.ones(()))[0]

  updates = jax.jit(jax.vmap(update))(thetas)
  for i, theta in enumerate([1e-3, 0.5]):
    expected = {}
    for name, x in gradients.items():
      g, p = np.asarray(x, np.float64), np.asarray(params[name], np.float64)
      u = 0.5 * -theta * g + 0.5 * -0.1 * np.sign(g)  # Adam's first step
      u = u * 2 / 4 if name == "weights" else u
      expected[name] = u * min(1, 0.2 * max(norm(p), 0.3) / norm(u))
    expected = {
      name: u * min(1, 0.25 / norm(expected)) - 0.01 * np.asarray(params[name]) for name, u in expected.items()
    }
    close(jax.tree.map(lambda x, i=i: x[i], updates), expected)


def test_pieces_compose_in_a_chain():
  """In a chain of Optax's they see parameters and pass extra arguments on."""
  tx: Any = optax.chain(optax.scale(-1.0), safeguards.limit_trust_ratio(0.1), safeguards.limit_global_norm(0.05))
  params, updates = draw(0), draw(1)
  limited, _ = tx.update(updates, tx.init(params), params, value=jnp.ones(()))
  assert norm(limited) <= 0.05 * (1 + 1e-6)
  for name in SHAPES:
    assert norm(limited[name]) <= 0.1 * norm(params[name]) * (1 + 1e-6)


def test_loss_and_length_of_the_run_reach_the_optimizer():
  def transform(theta, num_steps):
    def update(updates, state, params=None, **extra_args):
      return jax.tree.map(lambda g: theta * num_steps * extra_args["value"] + 0 * g, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)

  wrapped = safeguards.wrap(
    base.LearnedOptimizer(lambda key: jnp.float32(2.0), transform), adam_mix=0.0, weight_decay=0.0
  )
  assert wrapped.init(jax.random.key(0)) == 2.0
  tx: Any = wrapped.transform(jnp.float32(2.0), 10)
  g = {"w": jnp.ones(2)}
  np.testing.assert_array_equal(tx.update(g, tx.init(g), g, value=jnp.float32(0.5))[0]["w"], [10.0, 10.0])


@pytest.mark.parametrize(
  "options",
  [
    {"adam_mix": 1.5},
    {"adam_learning_rate": 0.0},
    {"base_width": 0},
    {"width_power": -1.0, "base_width": 1},
    {"trust_ratio": 0.0},
    {"trust_floor": 0.0, "trust_ratio": 0.1},
    {"global_norm": float("inf")},
    {"weight_decay": 1.0},
  ],
)
def test_bad_options_are_named(options):
  with pytest.raises(ValueError, match=f"^{next(iter(options))}="):
    safeguards.wrap(sgd(), **options)


def test_the_trust_ratio_needs_parameters():
  with pytest.raises(ValueError, match="needs the parameters"):
    apply(safeguards.limit_trust_ratio(0.1), draw(0))
