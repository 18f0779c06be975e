"""The Swimmer of experiment 6 against MuJoCo's own; against recorded steps of it where MuJoCo is not installed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(scope="module")
def environment():
  reason = "needs gymnasium[mujoco]: pip install -r requirements-paper.txt"
  pytest.importorskip("mujoco", reason=reason)
  return pytest.importorskip("gymnasium", reason=reason).make("Swimmer-v5")


# A policy that runs into the limits of both joints, and what Gymnasium 1.4.0's Swimmer-v5 on MuJoCo 4.0.0 makes of
# it: by the number of steps, the total reward, the coordinates and the velocities.
POLICY = np.array([[-0.4, -1.1, 0.7, -1.1, 2.0, 0.9, -0.4, 0.6], [1.6, 2.8, -0.9, 1.1, 0.5, -0.3, 1.1, 0.5]])
START = np.array([[0.01, -0.02, 0.05, -0.08, 0.09], [0.03, 0.07, -0.04, 0.06, -0.1]])
RECORDED = {
  1: (
    0.029343217149458707,
    [0.011173850945978349, -0.012712515208291874, 0.04414727829029843, -0.06848447418642092, 0.07662618582889522],
    [0.028622092764804218, 0.2927716256229134, -0.25106934256422936, 0.5123394603139224, -0.5648255915034004],
  ),
  10: (
    0.8187035767242288,
    [0.043078699057992, 0.29877049091744007, -0.3345606826222573, 0.306108974266236, 0.4482203210474745],
    [0.3488324059006095, 1.6877126950736463, -2.1992679946660467, 2.1973572100290575, 2.1984976167040413],
  ),
  30: (
    9.59602860482193,
    [0.39547293378725595, 0.9586362086297332, -1.4594901498231625, 1.4021418496660267, 1.7464983779922167],
    [0.22209160403998862, 0.3113244908879288, -0.43739996201724474, 0.5797447641488542, -0.0004182331195431501],
  ),
  60: (
    12.371232900116913,
    [0.5065995717531961, 1.1761048489535877, -1.6894205958798827, 1.7458455327147144, 1.746124643769572],
    [-0.03925840483754032, 0.11416213640199871, 0.03756398012353774, -9.646338106214272e-05, -2.443658457809476e-05],
  ),
}


def test_recorded_steps_of_mujoco(script):
  with jax.enable_x64(True):
    step = jax.jit(script.problem().step)
    state, reward = script.State(*jnp.array(START)), 0.0
    for t in range(1, 61):
      state, loss = step(POLICY, state, jax.random.key(0))
      reward -= loss
      if t in RECORDED:
        np.testing.assert_allclose(reward, RECORDED[t][0], rtol=1e-6)
        np.testing.assert_allclose(state, RECORDED[t][1:], atol=1e-6)


def test_accelerations_are_mujocos(script, environment):
  mujoco = pytest.importorskip("mujoco")
  model, data = environment.unwrapped.model, environment.unwrapped.data
  rng = np.random.default_rng(0)
  beyond = np.zeros(3, int)  # how often 0, 1 and 2 joints are beyond their limits
  with jax.enable_x64(True):
    acceleration = jax.jit(script.acceleration)
    for _ in range(300):
      data.qpos[:] = rng.normal(size=5) * [1, 1, 2, 1.5, 1.5]
      data.qvel[:] = rng.normal(size=5) * [1, 1, 2, 3, 3]
      data.ctrl[:] = rng.uniform(-1, 1, 2)
      mujoco.mj_forward(model, data)
      state = script.State(data.qpos.copy(), data.qvel.copy())
      mine = acceleration(state, script.GEAR * data.ctrl.copy())
      np.testing.assert_allclose(mine, data.qacc, rtol=0, atol=1e-6 * np.max(np.abs(data.qacc)))
      beyond[np.sum(np.abs(data.qpos[3:]) > script.JOINT_LIMIT)] += 1
  assert np.all(beyond > 10)


def test_steps_and_rewards_are_gymnasiums(script, environment):
  with jax.enable_x64(True):
    step = jax.jit(script.problem().step)
    for seed in range(5):
      theta = 0.5 * np.random.default_rng(seed).normal(size=(2, 8))
      observation, _ = environment.reset(seed=seed)
      data = environment.unwrapped.data
      state = script.State(jnp.array(data.qpos), jnp.array(data.qvel))
      for _ in range(100):
        observation, reward, *_ = environment.step(theta @ observation)  # not bounded: the environment does that
        state, loss = step(theta, state, jax.random.key(0))
        np.testing.assert_allclose(loss, -reward, rtol=0, atol=1e-6)
        np.testing.assert_allclose(state, [data.qpos, data.qvel], rtol=0, atol=1e-6)
  assert environment.spec.max_episode_steps == script.HORIZON


def test_episodes_start_as_gymnasiums(script, environment):
  keys = jax.random.split(jax.random.key(0), 2000)
  mine = np.asarray(jax.vmap(lambda key: script.problem().init(key, jnp.int32(script.HORIZON)))(keys))
  data, theirs = environment.unwrapped.data, []
  for seed in range(300):
    environment.reset(seed=seed)
    theirs.append([data.qpos.copy(), data.qvel.copy()])
  for values in (mine.transpose(1, 0, 2), np.array(theirs)):
    np.testing.assert_allclose(np.max(np.abs(values), axis=0), 0.1, rtol=0.05)
    np.testing.assert_allclose(np.mean(values, axis=0), 0, atol=0.02)
