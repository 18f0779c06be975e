"""The problem of experiment 2 against a plain NumPy loop with derivatives by hand."""

import jax.numpy as jnp
import numpy as np


def loss(x0, x1):
  return np.sqrt(x0**2 + 5) - np.sqrt(5) + np.sin(x1) ** 2 * np.exp(-5 * x0**2) + abs(x1 - 100) / 4


def gradient(x0, x1):
  bump = np.exp(-5 * x0**2)
  return x0 / np.sqrt(x0**2 + 5) - 10 * x0 * np.sin(x1) ** 2 * bump, np.sin(2 * x1) * bump + np.sign(x1 - 100) / 4


def mean_loss(theta, horizon):
  x0, x1, total = 1.0, 1.0, 0.0
  for learning_rate in np.exp(np.linspace(theta[0], theta[1], horizon)):
    g0, g1 = gradient(x0, x1)
    x0, x1 = x0 - learning_rate * g0, x1 - learning_rate * g1
    total += loss(x0, x1)
  return total / horizon


def test_meta_objective(script):
  thetas = [(-4.0, -4.0), (-4.0, -1.0), (0.14, -0.52), (4.2, -8.0), (-8.0, 3.0)]
  measured = script.meta_objective(100, jnp.array(thetas))
  np.testing.assert_allclose(measured, [mean_loss(theta, 100) for theta in thetas], rtol=1e-3)


def test_the_minimum_of_the_inner_loss(script):
  np.testing.assert_allclose(script.inner_loss(jnp.array([0.0, 100.0])), np.sin(100.0) ** 2, rtol=1e-4)
  np.testing.assert_allclose(script.inner_loss(jnp.array([-1.0, 31 * np.pi])), loss(1.0, 31 * np.pi), rtol=1e-5)


def test_slope_and_curvature_by_finite_differences(script):
  theta, h = np.array([-4.0, -3.0]), 1e-3
  at = lambda i, j: mean_loss(theta + h * np.array([i, j]), 20)
  slope = np.array([at(1, 0) - at(-1, 0), at(0, 1) - at(0, -1)]) / (2 * h)
  mixed = (at(1, 1) - at(1, -1) - at(-1, 1) + at(-1, -1)) / 4
  along = [at(1, 0) - 2 * at(0, 0) + at(-1, 0), at(0, 1) - 2 * at(0, 0) + at(0, -1)]
  hessian = np.array([[along[0], mixed], [mixed, along[1]]]) / h**2
  expected = np.linalg.norm(slope), np.linalg.eigvalsh(hessian)[0]
  np.testing.assert_allclose(script.slope_and_curvature(20, np.float32(theta)), expected, rtol=1e-2)
