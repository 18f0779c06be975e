"""The kernel, interpreted, against the network as layers write it; and its lowering for a GPU, without one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lopt.architectures import fused_mlp, mlp, sharding


def draw(*shape):
  return jnp.float32(np.random.default_rng(np.prod(shape)).normal(size=shape))


def network(weights, *features):
  h = jnp.concatenate(features)
  for i, (w, b) in enumerate(weights):
    h = jnp.matmul(w.T, jax.nn.relu(h) if i else h, precision="highest") + b[:, None]
  return h


def problem(sizes, number):
  weights = [(draw(*fans), draw(fans[1])) for fans in zip((8, *sizes), (*sizes, 2), strict=True)]
  return weights, draw(1, number), draw(1, number) - 1, draw(6, number)


interpreted = fused_mlp.on_gpus(network, interpret=True)


@pytest.mark.parametrize("sizes", [(32, 32), (16,), (20, 7), (5,), (32, 16, 32)])
@pytest.mark.parametrize("number", [1, 128, 300])
def test_the_kernel_computes_the_network(sizes, number):
  args = problem(sizes, number)
  expected = network(*args)
  np.testing.assert_allclose(interpreted(*args), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_several_networks_at_once():
  args = problem((32, 32), 200)
  several = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x, -x]), args)
  expected = jax.vmap(network)(*several)
  np.testing.assert_allclose(jax.vmap(interpreted)(*several), expected, rtol=1e-4, atol=1e-3)


def test_derivatives_are_the_networks():
  args = problem((32, 32), 50)
  of = lambda function: jax.grad(lambda *args: jnp.sum(jnp.sin(function(*args))), argnums=(0, 3))(*args)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3), of(interpreted), of(network))


def step_of(optimizer):
  theta = optimizer.init(jax.random.key(0))
  tx = optimizer.transform(theta, 10)
  params = {"w": draw(20, 30), "b": draw(30)}
  return lambda gradients: tx.update(gradients, tx.init(params), params)[0], params


def test_on_a_cpu_the_option_changes_nothing_on_a_gpu_little(monkeypatch):
  monkeypatch.setattr(sharding, "may_be_divided", lambda: False)
  plain, gradients = step_of(mlp.build())
  fused, _ = step_of(mlp.build(fused=True))
  same = np.testing.assert_array_equal
  if jax.default_backend() == "gpu":  # whose matrix products have ten bits
    same = functools.partial(np.testing.assert_allclose, rtol=1e-2, atol=1e-5)
  jax.tree.map(same, jax.jit(fused)(gradients), jax.jit(plain)(gradients))


@pytest.mark.parametrize("fused", [False, True])
def test_for_a_gpu_it_is_one_kernel_a_tensor(fused, monkeypatch):
  """Lowered for a GPU on whatever this machine has: Triton's language for the kernel is made and checked then."""
  monkeypatch.setattr(sharding, "may_be_divided", lambda: False)  # tests have several devices
  step, gradients = step_of(mlp.build(fused=fused))
  calls = [jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
  program = jax.export.export(jax.jit(step), platforms=["cuda"], disabled_checks=calls)(gradients).mlir_module()
  assert program.count("@__gpu$xla.gpu.triton") == (2 if fused else 0)
  assert ("32x600xf32" in program) != fused  # hidden units of all parameters
