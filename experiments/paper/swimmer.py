"""Experiment 6, control: PES learns to swim from short windows, where truncated ES over the same windows stalls.

    python experiments/paper/swimmer.py

Takes about two minutes on 2 cores. A linear policy learns MuJoCo's Swimmer, whose episodes have 1000 steps. The paper
says that PES, which updates the policy after every 100 steps, learns from fewer environment steps than full ES, and
that truncated ES over 100 steps stalls. Expect the second half only: PES and full ES reach a reward of 300 after
about equally many environment steps, truncated ES stays below 100 on average, and the exit status is 1.

The environment is Gymnasium's Swimmer-v5, written in JAX so that it runs inside the compiled unrolls; a test compares
it with MuJoCo itself, step by step.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import paper
from jaxtyping import Array, Float
from matplotlib.figure import Figure

from lopt import base
from lopt.outer import es, parallel, pes

Coordinates = Float[Array, "5"]
"""x and y of the swimmer's front joint [m]; the first link's angle; the two joints' angles [rad]. Or velocities."""
Angles = Float[Array, "3"]

# swimmer.xml: three equal capsules in a row, hinged, in a plane full of liquid. Units are MKS.
RADIUS, LENGTH, DENSITY = 0.1, 1.0, 1000.0
LIQUID_DENSITY, VISCOSITY = 4000.0, 0.1
ARMATURE, GEAR, JOINT_LIMIT = 0.1, 150.0, np.deg2rad(100)
TIME_STEP, FRAME_SKIP = 0.01, 4
CONTROL_COST, RESET_NOISE = 1e-4, 0.1
HORIZON = 1000

GOAL = 300  # a good reward; the best linear policies have about 350

# Link k's centre is at (x, y) + Σ_j CENTRES[k, j] e(a_j), with the links' angles a and e(a) = (cos a, sin a).
CENTRES = np.array([[1.0, 0.0, 0.0], [0.5, -0.5, 0.0], [0.5, -1.0, -0.5]])
# From the links' angles to the first one's and the two joints'.
TO_JOINTS = np.array([[1.0, 0.0, 0.0], [-1.0, 1.0, 0.0], [0.0, -1.0, 1.0]])

# A link: a cylinder and two half-spheres.
_CYLINDER = DENSITY * np.pi * RADIUS**2 * LENGTH
_SPHERE = DENSITY * 4 / 3 * np.pi * RADIUS**3
MASS = _CYLINDER + _SPHERE
INERTIA_ALONG = _CYLINDER * RADIUS**2 / 2 + _SPHERE * 2 / 5 * RADIUS**2
INERTIA = _CYLINDER * (RADIUS**2 / 4 + LENGTH**2 / 12) + _SPHERE * (
  2 / 5 * RADIUS**2 + LENGTH**2 / 4 + 3 / 8 * LENGTH * RADIUS
)
# The liquid acts on a box of the same mass and inertia ("inertia model" in MuJoCo's documentation).
BOX_WIDTH = np.sqrt(6 * INERTIA_ALONG / MASS)
BOX_LENGTH = np.sqrt(6 * (2 * INERTIA - INERTIA_ALONG) / MASS)
BOX_DIAMETER = (2 * BOX_WIDTH + BOX_LENGTH) / 3

# The equation of motion of the angles alone, (x, y) eliminated: by LEVERS[k, j], a force on link k's centre acts on
# angle j.
TOTAL_MASS = 3 * MASS + ARMATURE
LEVERS = CENTRES - MASS * CENTRES.sum(axis=0) / TOTAL_MASS
COUPLING = MASS * CENTRES.T @ LEVERS
INERTIAS = INERTIA * np.eye(3) + ARMATURE * TO_JOINTS.T @ TO_JOINTS
# Of the two joints, in a straight swimmer: acceleration by one's own torque.
MOBILITY_AT_REST = np.diag(TO_JOINTS @ np.linalg.inv(COUPLING + INERTIAS) @ TO_JOINTS.T)[1:]


class State(NamedTuple):
  """A swimmer; also the rates at which its coordinates change."""

  position: Coordinates
  velocity: Coordinates


def acceleration(swimmer: State, torques: Float[Array, "2"]) -> Coordinates:
  """The planar chain's equations of motion, (x, y) eliminated:

      (H ∘ cos(a_i - a_j) + inertias) ä = torques + n_i · Σ_k LEVERS[k, i] F_k - (H ∘ sin(a_i - a_j)) ȧ²

  with the links' angles a, the matrix H = COUPLING, the normals n_i = e'(a_i), and the liquid's forces F_k on the
  links' centres.
  """
  angles, rates = jnp.cumsum(swimmer.position[2:]), jnp.cumsum(swimmer.velocity[2:])
  along = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)
  normal = jnp.stack([-jnp.sin(angles), jnp.cos(angles)], axis=1)
  velocities = swimmer.velocity[None, :2] + CENTRES @ (rates[:, None] * normal)
  forces, drag = liquid(along, normal, velocities, rates)

  difference = angles[:, None] - angles[None, :]
  mobility = symmetric_inverse(COUPLING * jnp.cos(difference) + INERTIAS)
  driven = drag + TO_JOINTS.T[:, 1:] @ torques
  pushed = jnp.sum(normal * (LEVERS.T @ forces), axis=1)
  free = mobility @ (driven + pushed - (COUPLING * jnp.sin(difference)) @ jnp.square(rates))
  joints = jnp.array(TO_JOINTS[1:])
  limiting = limit_torques(
    swimmer.position[3:], swimmer.velocity[3:], joints @ free, mobility=joints @ mobility @ joints.T
  )
  limited = free + mobility @ joints.T @ limiting
  turning = jnp.square(rates)[:, None] * along - limited[:, None] * normal
  moved = (jnp.sum(forces, axis=0) + MASS * CENTRES.sum(axis=0) @ turning) / TOTAL_MASS
  return jnp.concatenate([moved, TO_JOINTS @ limited])


def liquid(
  along: Float[Array, "3 2"], normal: Float[Array, "3 2"], velocities: Float[Array, "3 2"], rates: Angles
) -> tuple[Float[Array, "3 2"], Angles]:
  """Forces and torques on the links: friction, as on a sphere; drag, quadratic in the speeds along a box's sides."""
  forward, sideways = jnp.sum(velocities * along, axis=1), jnp.sum(velocities * normal, axis=1)
  drag_along = LIQUID_DENSITY / 2 * BOX_WIDTH**2 * jnp.abs(forward) * forward
  drag_across = LIQUID_DENSITY / 2 * BOX_WIDTH * BOX_LENGTH * jnp.abs(sideways) * sideways
  friction = 3 * np.pi * VISCOSITY * BOX_DIAMETER * velocities
  drag_turning = LIQUID_DENSITY / 64 * BOX_WIDTH * (BOX_WIDTH**4 + BOX_LENGTH**4) * jnp.abs(rates) * rates
  friction_turning = np.pi * VISCOSITY * BOX_DIAMETER**3 * rates
  forces = -friction - drag_along[:, None] * along - drag_across[:, None] * normal
  return forces, -friction_turning - drag_turning


def limit_torques(
  joints: Float[Array, "2"],
  rates: Float[Array, "2"],
  accelerations: Float[Array, "2"],
  mobility: Float[Array, "2 2"],
) -> Float[Array, "2"]:
  """What keeps the joints within ±100°: MuJoCo's soft constraints ("Computation" in its documentation).

  A joint beyond its limit by a depth d has the reference acceleration of a critically damped spring, inwards.
  The torques f ≥ 0, inwards too, solve (mobility + R) f = reference - accelerations, or are 0 where that would be
  negative; R, the softness, derives from an impedance that grows with d from 0.9 to 0.95 within 1 mrad.
  """
  outwards = jnp.sign(joints)
  depth = jnp.abs(joints) - JOINT_LIMIT
  beyond = depth > 0
  x = jnp.clip(depth / 0.001, 0, 1)
  impedance = 0.9 + 0.05 * jnp.where(x < 0.5, 2 * x**2, 1 - 2 * (1 - x) ** 2)
  reference = 2 / (0.95 * 0.02) * outwards * rates + impedance * depth / (0.95 * 0.02) ** 2
  missing = jnp.where(beyond, reference + outwards * accelerations, -1.0)
  softness = (1 - impedance) / impedance * MOBILITY_AT_REST
  own = jnp.diagonal(mobility) + softness
  other = jnp.where(jnp.all(beyond), outwards[0] * outwards[1] * mobility[0, 1], 0.0)
  # Two unknowns: either both equations hold, or those of one joint do, with nothing from the other.
  both = (own[::-1] * missing - other * missing[::-1]) / (own[0] * own[1] - other**2)
  alone = jnp.maximum(missing / own, 0)
  return -outwards * jnp.where(both[::-1] < 0, alone, jnp.maximum(both, 0))


def symmetric_inverse(matrix: Float[Array, "3 3"]) -> Float[Array, "3 3"]:
  """By cofactors, which fuse with what is around them; a library call for each tiny matrix would take far longer."""
  cofactors = jnp.cross(jnp.roll(matrix, -1, axis=0), jnp.roll(matrix, -2, axis=0))
  return cofactors / (matrix[0] @ cofactors[0])


def swim(swimmer: State, action: Float[Array, "2"]) -> State:
  """Four Runge-Kutta steps of 0.01 s under a constant action, which is bounded by ±1."""
  torques = GEAR * jnp.clip(action, -1, 1)
  rates = lambda s: State(s.velocity, acceleration(s, torques))
  after = lambda s, rate, dt: jax.tree.map(lambda x, dx: x + dt * dx, s, rate)

  def runge_kutta(_: int, s: State) -> State:
    k1 = rates(s)
    k2 = rates(after(s, k1, TIME_STEP / 2))
    k3 = rates(after(s, k2, TIME_STEP / 2))
    k4 = rates(after(s, k3, TIME_STEP))
    return after(s, jax.tree.map(lambda a, b, c, d: a + 2 * b + 2 * c + d, k1, k2, k3, k4), TIME_STEP / 6)

  return jax.lax.fori_loop(0, FRAME_SKIP, runge_kutta, swimmer)


def problem() -> base.UnrolledProblem:
  """θ is the policy: torques = θ · observation, from all coordinates but x and y, and all velocities.

  A step's loss is minus its reward: the speed of x, less a little for the action.
  """

  def init(key: base.PRNGKey, horizon: base.Horizon) -> State:
    del horizon
    return State(*jax.random.uniform(key, (2, 5), minval=-RESET_NOISE, maxval=RESET_NOISE))

  def step(theta: Float[Array, "2 8"], state: State, key: base.PRNGKey) -> tuple[State, base.Scalar]:
    del key
    action = theta @ jnp.concatenate([state.position[2:], state.velocity])
    after = swim(state, action)
    speed = (after.position[0] - state.position[0]) / (FRAME_SKIP * TIME_STEP)
    return after, CONTROL_COST * jnp.sum(jnp.square(action)) - speed

  return base.UnrolledProblem(lambda key: jnp.int32(HORIZON), init, step)


class Settings(NamedTuple):
  """The paper's, but for how often and how well the reward is measured."""

  num_environment_steps: int = 500_000  # of each training run
  num_seeds: int = 12  # twice the paper's
  num_records: int = 25
  num_episodes: int = 5  # from which a policy's reward is measured
  num_pairs: int = 10
  unroll_length: int = 100
  full_es: tuple[float, float] = (0.3, 0.3)  # σ and the learning rate of plain SGD
  pes: tuple[float, float] = (0.3, 0.1)
  truncated_es: tuple[float, float] = (0.1, 0.1)
  seed: int = 0


class Method(NamedTuple):
  """An estimator with what its outer step takes."""

  estimator: base.GradientEstimator
  learning_rate: float
  steps: int  # environment steps of one outer step


def methods(settings: Settings) -> dict[str, Method]:
  swimming, length = problem(), settings.unroll_length
  pairs: dict[str, Any] = {"num_pairs": settings.num_pairs, "pairs_per_block": settings.num_pairs}
  (full_sigma, full_rate), (pes_sigma, pes_rate) = settings.full_es, settings.pes
  sigma, rate = settings.truncated_es
  full = es.build(swimming, sigma=full_sigma, **pairs)
  persistent = pes.build(swimming, sigma=pes_sigma, unroll_length=length, **pairs)
  truncated = es.build(swimming, sigma=sigma, unroll_length=length, **pairs)
  return {
    "PES": Method(normalized(persistent), pes_rate, 2 * settings.num_pairs * length),
    "full ES": Method(normalized(full), full_rate, 2 * settings.num_pairs * HORIZON),
    # A pair and the unperturbed policy.
    "truncated ES": Method(normalized(truncated), rate, 3 * settings.num_pairs * length),
  }


def normalized(estimator: base.GradientEstimator) -> base.GradientEstimator:
  """2 ĝ / √(mean_i |g_i|² / P), from the pairs' own estimates g_i: steps are as long whatever the rewards' scale.

  For ES this is the step of augmented random search (Mania et al. 2018), which divides by the returns' standard
  deviation, in the part of it that a pair's two returns differ by.
  """

  def estimate(
    key: base.PRNGKey, theta: base.Theta, state: base.State
  ) -> tuple[base.Theta, base.State, base.Metrics]:
    gradient, state, metrics = estimator.estimate(key, theta, state)
    size = sum(x.size for x in jax.tree.leaves(theta))
    scale = 2 / jnp.sqrt(metrics["mean_square_gradient"] / size)
    return jax.tree.map(lambda x: scale * x, gradient), state, metrics

  return base.GradientEstimator(estimator.init, estimate)


def rewards(theta: Float[np.ndarray, "*any 2 8"], num_episodes: int) -> Float[np.ndarray, "*any"]:
  """The mean total reward of `num_episodes` episodes under each policy; all policies start from the same states."""
  swimming = problem()

  def mean_reward(_: None, theta: Float[Array, "2 8"]) -> base.Scalar:
    keys = jax.random.split(jax.random.key(2**31), num_episodes)
    states = jax.vmap(lambda key: swimming.init(key, jnp.int32(HORIZON)))(keys)
    step = lambda states, _: jax.vmap(swimming.step, in_axes=(None, 0, None))(theta, states, keys[0])
    _, losses = jax.lax.scan(step, states, length=HORIZON)
    return -jnp.sum(jnp.mean(losses, axis=1))

  flat = jax.jit(lambda theta: parallel.map_runs(mean_reward, None, theta))(theta.reshape(-1, *theta.shape[-2:]))
  return np.asarray(flat).reshape(theta.shape[:-2])


def run(settings: Settings) -> paper.Finding:
  """Trains a policy by every method, all with the same number of environment steps."""
  grid = np.linspace(0, settings.num_environment_steps, settings.num_records + 1)
  curves = {}
  for name, method in methods(settings).items():
    num_steps = settings.num_environment_steps // method.steps
    num_records = min(settings.num_records, num_steps)
    training = paper.train(
      method.estimator,
      optax.sgd(method.learning_rate),
      lambda key: jnp.zeros((2, 8)),
      num_steps=num_records * math.ceil(num_steps / num_records),
      num_records=num_records,
      num_seeds=settings.num_seeds,
      seed=settings.seed,
      label=name,
    )
    measured = rewards(training.theta, settings.num_episodes)
    steps = np.concatenate([np.zeros((settings.num_seeds, 1)), training.inner_steps], axis=1)
    curves[name] = np.stack([np.interp(grid, *curve) for curve in zip(steps, measured, strict=True)])

  average = {name: np.mean(x, axis=1) for name, x in curves.items()}
  final = {name: x[:, -1] for name, x in curves.items()}
  faster = paper.lower(average["full ES"], average["PES"])
  stalls = all(paper.lower(final["truncated ES"], final[name]) for name in ("PES", "full ES"))
  describe = lambda name: f"{name} {paper.mean_and_error(average[name])}"
  relation = ">" if faster else "<" if paper.lower(average["PES"], average["full ES"]) else "no different from"
  verdict = (
    f"reward, mean over the first {settings.num_environment_steps:,} environment steps: {describe('PES')} {relation} "
    f"{describe('full ES')}; {describe('truncated ES')} {'stalls' if stalls else 'does not stall'}"
  )
  table = [
    ("method", "mean reward while learning", "reward at the end", f"steps until the reward is {GOAL} (median)")
  ]
  table += [
    (name, paper.mean_and_error(average[name]), paper.mean_and_error(final[name]), steps_to_goal(grid, x))
    for name, x in curves.items()
  ]
  return paper.Finding(draw(grid, curves), verdict, faster and stalls, table, remarks(settings, average, final))


def steps_to_goal(steps: Float[np.ndarray, " n"], curves: Float[np.ndarray, "seeds n"]) -> str:
  """The median over seeds of when the reward first reaches the goal, or that it is beyond the end of training."""
  reached = curves >= GOAL
  median = np.median(np.where(np.any(reached, axis=1), steps[np.argmax(reached, axis=1)], np.inf))
  return f"{median:,.0f}" if np.isfinite(median) else f"more than {steps[-1]:,.0f}"


def remarks(
  settings: Settings, average: dict[str, Float[np.ndarray, " seeds"]], final: dict[str, Float[np.ndarray, " seeds"]]
) -> str:
  ahead = average["PES"].mean() - average["full ES"].mean()
  error = np.hypot(*(np.std(average[name], ddof=1) / np.sqrt(settings.num_seeds) for name in ("PES", "full ES")))
  failed = ", ".join(f"{name} {np.sum(x < GOAL)}" for name, x in final.items())
  return (
    f"While learning, the mean reward of PES minus that of full ES is {ahead:.0f} ± {error:.0f}; the paper "
    "has PES ahead. An outer step of PES costs a tenth as many environment steps. Of "
    f"{settings.num_seeds} seeds, this many end below {GOAL}: {failed}. Two things differ from the authors' script: "
    "pairs are spread over the ages of an episode, where theirs are in lockstep; and the gradient is divided by the "
    "root mean square of the pairs' own estimates, theirs by the standard deviation of the returns. The steps of "
    "truncated ES count its unperturbed runs too, those of no method the episodes in which rewards are measured."
  )


def draw(steps: Float[np.ndarray, " n"], curves: dict[str, Float[np.ndarray, "seeds n"]]) -> Figure:
  """The paper's figure: reward against environment steps, bands from the lowest to the highest seed."""
  figure = Figure(figsize=(6.5, 4), layout="constrained")
  axes = figure.subplots()
  for name, rewards in curves.items():
    paper.band(axes, steps / 1000, rewards, name)
  axes.set(xlabel="environment steps, all particles together (thousands)", ylabel="reward of an episode")
  axes.set(xlim=(0, steps[-1] / 1000), ylim=(-20, 400))
  axes.legend(loc="upper left", ncols=3)
  return figure


EXPERIMENT = paper.Experiment(
  number=6,
  title="Control: Swimmer",
  paper_says=(
    "PES learns from fewer environment steps than ES over whole episodes; truncated ES, over windows as short as "
    "those of PES, fails because of its bias."
  ),
  quick=Settings(),
  full=Settings(num_seeds=48, num_records=50, num_episodes=50),
  run=run,
)

if __name__ == "__main__":
  paper.main(EXPERIMENT)
