"""Step sizes against plain NumPy in float64, and what must not change them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lopt import base, configuration
from lopt.architectures import lstm, mlp, safeguards, step_sizes

NUM_STEPS = 50
PARAMS = {"b": np.array([0.5, -1.0, 0.25]), "w": np.arange(-5.0, 7.0).reshape(3, 4) / 10}
WITH_KERNEL = {**PARAMS, "k": np.sin(np.arange(2_304.0)).reshape(3, 3, 8, 32)}
"""One of more axes and more parameters than the network is told of."""
RULE = mlp.build(hidden_sizes=(4,))


def random_theta(optimizer, seed=0):
  """θ without zeros, the last layer included."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(optimizer.init, jax.random.key(0))
  return jax.tree.map(lambda x: jnp.float32(0.3 * rng.normal(size=x.shape)), shapes)


def draw(seed, number, params=PARAMS):
  rng = np.random.default_rng(seed)
  return [{name: rng.normal(size=p.shape) for name, p in params.items()} for _ in range(number)]


def run(optimizer, theta, gradients, losses, params=PARAMS):
  """The updates of successive gradients and losses at the same parameters."""
  tx = optimizer.transform(theta, NUM_STEPS)
  params, updates = jax.tree.map(jnp.float32, params), []
  state = tx.init(params)
  update = jax.jit(lambda g, state, loss: tx.update(g, state, params, value=loss))
  for g, loss in zip(gradients, losses, strict=True):
    u, state = update(jax.tree.map(jnp.float32, g), state, jnp.float32(loss))
    updates.append(u)
  return updates


def average(values, beta):
  """The bias-corrected exponential moving average."""
  return np.average(values, axis=0, weights=beta ** np.arange(len(values), dtype=float)[::-1])


def contrast(a, b):
  return (a - b) / (abs(a) + abs(b))


def numpy_factors(theta, gradients, inner, losses, params=PARAMS):
  """exp(s) of each tensor after all these gradients, losses and updates of the optimizer within."""
  t = len(losses) - 1
  dot = lambda x, y: np.sum(np.asarray(x, float) * np.asarray(y, float))
  fast, middle, slow = (average(losses, beta) for beta in (0.9, 0.99, 0.999))
  of_loss = [contrast(losses[-1], fast), contrast(fast, middle), contrast(middle, slow), contrast(fast, losses[0])]
  positions = (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)
  of_run = [np.tanh(10 * (t / NUM_STEPS - x)) for x in positions] + of_loss + [np.log10(NUM_STEPS / 1_000)]
  square_norms = {name: [dot(g[name], g[name]) for g in gradients] for name in params}
  sensitivity = {name: np.sqrt(square_norms[name][-1] * dot(p, p)) / abs(fast) for name, p in params.items()}
  total = np.sqrt(sum(x**2 for x in sensitivity.values()))
  factors = {}
  for name, p in params.items():
    alignments = [
      -dot(g[name], u[name]) / np.sqrt(dot(g[name], g[name]) * dot(u[name], u[name]))
      for g, u in zip(gradients, inner, strict=True)
    ]
    inputs = [
      np.log10(sensitivity[name]),
      np.log10(total),
      np.log10(np.sqrt(square_norms[name][-1] * dot(inner[-1][name], inner[-1][name])) / abs(fast)),
      alignments[-1],
      average(alignments, 0.95),
      0.5 * np.log10(square_norms[name][-1] / average(square_norms[name], 0.95)),
      np.log10(np.sqrt(np.mean(p**2))) / 2,
      min(p.ndim, 2) / 4,
      np.log(min(p.size, 2_048)) / 10,
      *of_run,
    ]
    hidden, output = theta["step_sizes"]["hidden"], theta["step_sizes"]["log_factor"]
    h = np.tanh(np.array(inputs) @ np.asarray(hidden["w"], float) + np.asarray(hidden["b"], float))
    factors[name] = np.exp(h @ np.asarray(output["w"], float) + np.asarray(output["b"], float)).item()
  return factors


@pytest.mark.parametrize("params", [PARAMS, WITH_KERNEL], ids=["matrix", "kernel"])
def test_updates_are_the_optimizers_times_factors_of_a_numpy_network(params):
  wrapped = step_sizes.learned(RULE, 5)
  theta, gradients, losses = random_theta(wrapped), draw(1, 12, params), np.linspace(3.0, 1.0, 12) ** 2
  inner = run(RULE, theta["optimizer"], gradients, losses, params)
  updates = run(wrapped, theta, gradients, losses, params)
  for t in (0, 1, 11):
    factors = numpy_factors(theta, gradients[: t + 1], inner[: t + 1], losses[: t + 1], params)
    assert all(abs(np.log(x)) > 0.05 for x in factors.values())
    for name in params:
      np.testing.assert_allclose(updates[t][name], factors[name] * inner[t][name], rtol=1e-4)


def test_an_untrained_network_changes_nothing():
  wrapped = step_sizes.learned(RULE, 3)
  theta, gradients = jax.jit(wrapped.init)(jax.random.key(0)), draw(1, 3)
  plain = run(RULE, theta["optimizer"], gradients, [1.0, 2.0, 3.0])
  for u, v in zip(plain, run(wrapped, theta, gradients, [1.0, 2.0, 3.0]), strict=True):
    jax.tree.map(np.testing.assert_array_equal, u, v)


def test_a_factor_on_the_loss_changes_nothing():
  wrapped = step_sizes.learned(RULE, 3)
  theta, gradients, losses = random_theta(wrapped), draw(1, 3), np.array([1.0, 2.0, 1.5])
  updates = run(wrapped, theta, gradients, losses)
  scaled = run(wrapped, theta, jax.tree.map(lambda g: 100 * g, gradients), 100 * losses)
  for u, v in zip(updates, scaled, strict=True):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3), u, v)


def test_nothing_of_the_size_of_the_parameters_is_remembered():
  params = jax.eval_shape(lambda: jax.tree.map(jnp.float32, PARAMS))
  wrapped = step_sizes.learned(RULE, 3)
  theta = jax.eval_shape(wrapped.init, jax.random.key(0))
  count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  own = jax.eval_shape(lambda theta, p: RULE.transform(theta["optimizer"], 9).init(p), theta, params)
  state = jax.eval_shape(lambda theta, p: wrapped.transform(theta, 9).init(p), theta, params)
  assert count(state) - count(own) == 1 + 4 + 2 * len(PARAMS)


def test_gradients_of_zero_and_tensors_of_zeros_give_finite_updates():
  wrapped = step_sizes.learned(RULE, 3)
  zeros = jax.tree.map(np.zeros_like, PARAMS)
  (updates,) = run(wrapped, random_theta(wrapped), [zeros], [0.0], params=zeros)
  assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))


@pytest.mark.parametrize("missing", ["the loss", "the parameters"])
def test_says_what_is_missing(missing):
  tx = step_sizes.learned(RULE, 3).transform(random_theta(step_sizes.learned(RULE, 3)), NUM_STEPS)
  params = jax.tree.map(jnp.float32, PARAMS)
  arguments = {"params": params} if missing == "the loss" else {"params": None, "value": jnp.float32(1)}
  with pytest.raises(ValueError, match=f"need {missing}: call update"):
    tx.update(params, tx.init(params), **arguments)


def test_a_configuration_puts_them_around_an_architecture_and_within_its_safeguards():
  section = {
    "name": "lstm",
    "hidden_sizes": [3],
    "step_sizes": {"hidden_size": 2},
    "safeguards": {"weight_decay": 0.5},
  }
  built = configuration.build("architectures", section, where="config.architecture")
  theta = random_theta(built)
  assert theta["step_sizes"]["hidden"]["w"].shape == (step_sizes.NUM_INPUTS, 2)
  updates = run(built, theta, draw(1, 1), [1.0])[0]
  rule = step_sizes.learned(lstm.build(hidden_sizes=(3,)), 2)
  expected = jax.tree.map(lambda u, p: u - 0.5 * p, run(rule, theta, draw(1, 1), [1.0])[0], PARAMS)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), updates, expected)


def sgd(theta=0.5):
  """An architecture with an update that is known: -α g, α out of θ."""
  return base.LearnedOptimizer(
    lambda key: jnp.float32(theta), lambda theta, num_steps: optax.with_extra_args_support(optax.sgd(theta))
  )


def test_wrap_with_everything_off_is_the_optimizer_itself():
  assert step_sizes.wrap(RULE) is RULE


def test_steps_are_relative_to_each_tensor_and_not_below_the_floor():
  params, (gradients,) = {**PARAMS, "b": 1e-6 * PARAMS["b"]}, draw(1, 1)
  (updates,) = run(step_sizes.wrap(sgd(), relative_floor=0.1), jnp.float32(0.5), [gradients], [1.0], params)
  for name, g in gradients.items():
    rms = max(np.sqrt(np.mean(np.square(params[name]))), 0.1)
    np.testing.assert_allclose(updates[name], -0.5 * rms * g, rtol=1e-5)
  relative = step_sizes.wrap(sgd(), relative_floor=0.1)
  mixed = safeguards.wrap(relative, adam_mix=0.5, adam_learning_rate=0.01)
  (with_adam,) = run(mixed, jnp.float32(0.5), [gradients], [1.0], params)
  for name, g in gradients.items():  # Adam's share is not
    np.testing.assert_allclose(with_adam[name], 0.5 * updates[name] - 0.005 * np.sign(g), rtol=1e-4)


@pytest.mark.parametrize(("num_steps", "first"), [(1, 2.0), (2, 2**0.5), (4, 1.0), (8, 0.5), (100, 0.04)])
def test_steps_are_annealed_over_the_run(num_steps, first):
  """Under jit with a traced length, as in meta-training; runs of 4 steps begin with steps of their own size."""
  wrapped = step_sizes.wrap(sgd(), base_steps=4)

  @jax.jit
  def sizes(num_steps):
    tx: Any = wrapped.transform(jnp.float32(1.0), num_steps)
    g = {"w": jnp.ones(2)}

    def step(state, _):
      updates, state = tx.update(g, state, g)
      return state, -updates["w"][0]

    return jax.lax.scan(step, tx.init(g), length=105)[1]

  t = np.arange(105)
  expected = first * np.cos(np.pi / 2 * np.minimum(t / num_steps, 1)) ** 2
  np.testing.assert_allclose(sizes(num_steps), expected, atol=1e-6)


def test_what_is_learned_sees_relative_steps_and_is_annealed():
  wrapped = step_sizes.wrap(RULE, relative_floor=0.1, hidden_size=3, base_steps=10)
  theta, (gradients,) = random_theta(wrapped), draw(1, 1)
  relative = step_sizes.wrap(RULE, relative_floor=0.1)
  (u,) = run(relative, theta["optimizer"], [gradients], [2.0])
  factors = numpy_factors(theta, [gradients], [u], [2.0])
  (updates,) = run(wrapped, theta, [gradients], [2.0])
  for name in PARAMS:
    expected = factors[name] * (10 / NUM_STEPS) * np.asarray(u[name])
    np.testing.assert_allclose(updates[name], expected, rtol=1e-4)


@pytest.mark.parametrize("options", [{"relative_floor": 0.0}, {"hidden_size": 0}, {"base_steps": 0}])
def test_bad_options_are_named(options):
  with pytest.raises(ValueError, match=f"^{next(iter(options))}="):
    step_sizes.wrap(RULE, **options)
