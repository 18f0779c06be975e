"""Unrolling groups of particles: what every estimator has in common.

A *group* is the particles that share every random number but their perturbation: an antithetic pair, a pair and
the unperturbed mean, or, for estimators that differentiate, that one alone. Arrays are `[group, particle, ...]`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.extend import core
from jaxtyping import Array, Bool, Float, Int, Key

from lopt import base
from lopt.outer import vectors

Tree = TypeVar("Tree")


CACHED_BYTES = 2**19  # of the largest array that a step makes on the way, one particle a group
LARGEST_BLOCK = 8  # groups: where one of a block begins an episode, that is computed for all of them
HORIZON_SAMPLES = 2**16  # for E[T]: its standard error is below 0.3% for horizons log-uniform over two decades


class Episodes(NamedTuple):
  """Inner runs in progress, one to a group."""

  state: base.State  # [group, particle, ...], or [group, ...] where a group has one common state
  steps_left: Int[Array, " groups"]  # at 0, the next step begins a new episode
  next_share: Float[Array, " groups"]  # how much of the next episode is run: 1, but for a staggered first one


class Losses(NamedTuple):
  """What a window of K steps cost each particle, by the episode that owns the losses."""

  first: Float[Array, "groups particles"]  # sum over the episode that was running when the window began
  rest: Float[Array, "groups particles"]  # sum over the episodes that began inside the window
  steps: Int[Array, " groups"]  # inner steps that each particle took
  restarted: Bool[Array, " groups"]  # whether any did
  diverged: Bool[Array, "groups particles"]  # whether any loss was capped


def mean_horizon(problem: base.UnrolledProblem, key: base.PRNGKey) -> base.Scalar:
  """E[T], by which estimators of whole episodes divide; consumes the key."""
  horizons = jax.vmap(problem.horizon)(jax.random.split(key, HORIZON_SAMPLES))
  return jnp.mean(horizons.astype(jnp.float32))


def group_keys(key: base.PRNGKey, index: Int[Array, " groups"]) -> Key[Array, " groups"]:
  """A key for each group that depends on its index alone, not on how many there are or where they run."""
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


def before_first(
  problem: base.UnrolledProblem,
  key: base.PRNGKey,
  index: Int[Array, " groups"],
  *,
  particles: tuple[int, ...],
  stagger: bool,
) -> Episodes:
  """Where an estimator starts: the first step will begin an episode for every group.

  Staggered, the first episode of length T is cut short after a uniformly drawn 1..T steps, so that from then on
  groups are at every age at once.

  Args:
    problem: What will be unrolled.
    key: Consumed.
    index: The groups' numbers.
    particles: Axes of the state between the group's and its own: (2,) for pairs, () for one common state.
    stagger: Whether to, or to run in lockstep.
  """
  shapes = jax.eval_shape(lambda key: problem.init(key, problem.horizon(key)), key)
  state = jax.tree.map(lambda x: jnp.zeros((*index.shape, *particles, *x.shape), x.dtype), shapes)
  ones = jnp.ones(index.shape)
  share = 1 - jax.vmap(jax.random.uniform)(group_keys(key, index)) if stagger else ones
  return Episodes(state, jnp.zeros(index.shape, jnp.int32), share)


def begin(
  problem: base.UnrolledProblem, keys: Key[Array, " groups"], particles: int
) -> tuple[base.State, Int[Array, " groups"]]:
  """Fresh episodes: states [group, particle, ...], alike within a group, and lengths T."""

  def begin_one(key: base.PRNGKey) -> tuple[base.State, base.Horizon]:
    horizon_key, init_key = jax.random.split(key)
    horizon = problem.horizon(horizon_key)
    return problem.init(init_key, horizon), horizon

  state, horizon = jax.vmap(begin_one)(keys)
  return copies(state, particles), horizon


def copies(state: base.State, particles: int) -> base.State:
  """One state a group, [group, ...] -> one for each of its particles, [group, particle, ...]."""
  return jax.tree.map(lambda x: jnp.broadcast_to(x[:, None], (x.shape[0], particles, *x.shape[1:])), state)


def advance(
  problem: base.UnrolledProblem,
  thetas: Float[Array, "groups particles P"],
  unravel: vectors.Unravel,
  state: base.State,
  keys: Key[Array, " groups"],
) -> tuple[base.State, Float[Array, "groups particles"], Bool[Array, "groups particles"]]:
  """One step of every particle, its loss bounded by the problem's cap, and whether it had to be."""

  def step(theta, state, key):
    return problem.step(unravel(theta), state, key)

  # The key is not mapped over a group's particles: what only depends on it (data) is computed once for them all.
  state, loss = jax.vmap(jax.vmap(step, in_axes=(0, 0, None)))(thetas, state, keys)
  return state, *bounded(loss, problem.loss_cap)


def bounded(loss: Float[Array, "*any"], cap: float) -> tuple[Float[Array, "*any"], Bool[Array, "*any"]]:
  """The loss, or the cap where it is NaN or not below it, and where that is: what counts as diverged everywhere."""
  diverged = ~(loss < cap)  # true for NaN
  return jnp.where(diverged, cap, loss), diverged


def unroll_window(
  problem: base.UnrolledProblem,
  thetas: Float[Array, "groups particles P"],
  unravel: vectors.Unravel,
  episodes: Episodes,
  keys: Key[Array, " groups"],
  length: int,
  *,
  thetas_of_new: Float[Array, "groups particles P"] | None = None,
  differentiable: bool = False,
) -> tuple[Episodes, Losses]:
  """K = `length` steps of every particle; an episode that ends is followed by a fresh one within the window.

  Args:
    problem: What is unrolled.
    thetas: Each particle's θ, as vectors.
    unravel: Makes θ of a vector.
    episodes: The inner runs, where the window begins.
    keys: One a group, consumed.
    length: K.
    thetas_of_new: θ of episodes that begin in this window, where it is another.
    differentiable: Whether this will be differentiated in reverse: then the states between steps are all that is
      kept, and the rest of a step is computed a second time.
  """
  groups, particles = thetas.shape[:2]

  def restart(ended: Bool[Array, " groups"], episodes: Episodes, keys: Key[Array, " groups"]) -> Episodes:
    state, horizon = begin(problem, keys, particles)
    steps = jnp.clip(jnp.ceil(episodes.next_share * horizon), 1, horizon).astype(jnp.int32)
    return where_group(ended, Episodes(state, steps, jnp.ones(groups)), episodes)

  def body(carry, step_keys):
    episodes, losses = carry
    ended = episodes.steps_left == 0
    # `cond` on a scalar, outside the vmap, begins episodes only in the steps where one has to.
    episodes = jax.lax.cond(jnp.any(ended), lambda: restart(ended, episodes, step_keys[:, 0]), lambda: episodes)
    restarted = losses.restarted | ended
    now = thetas if thetas_of_new is None else where_group(restarted, thetas_of_new, thetas)
    state, loss, diverged = advance(problem, now, unravel, episodes.state, step_keys[:, 1])
    losses = Losses(
      first=losses.first + jnp.where(restarted[:, None], 0.0, loss),
      rest=losses.rest + jnp.where(restarted[:, None], loss, 0.0),
      steps=losses.steps,
      restarted=restarted,
      diverged=losses.diverged | diverged,
    )
    return (episodes._replace(state=state, steps_left=episodes.steps_left - 1), losses), None

  none = Losses(
    first=jnp.zeros((groups, particles), thetas.dtype),
    rest=jnp.zeros((groups, particles), thetas.dtype),
    steps=jnp.full(groups, length),
    restarted=jnp.zeros(groups, bool),
    diverged=jnp.zeros((groups, particles), bool),
  )
  step_keys = jax.vmap(lambda t: split_step_keys(keys, t))(jnp.arange(length))
  body = jax.checkpoint(body, prevent_cse=False) if differentiable else body
  (episodes, losses), _ = jax.lax.scan(body, (episodes, none), step_keys)
  return episodes, losses


def differentiate_window(
  problem: base.UnrolledProblem,
  theta: Float[Array, " P"],
  unravel: vectors.Unravel,
  episodes: Episodes,
  keys: Key[Array, " groups"],
  length: int,
) -> tuple[Episodes, Losses, Callable[[float, float], Float[Array, "groups P"]]]:
  """`unroll_window` of one unperturbed particle a group, and how its losses depend on θ within the window.

  Returns:
    Episodes and losses as `unroll_window`, and a function `(a, b) -> ∇_θ [a Σ first losses + b Σ rest]`, a gradient a
    group. It is 0 for a group with a capped loss (which is constant) whose gradient is not finite.
  """

  def unroll(thetas: Float[Array, "groups 1 P"]):
    end, losses = unroll_window(problem, thetas, unravel, episodes, keys, length, differentiable=True)
    return (losses.first, losses.rest), (end, losses)

  thetas = jnp.broadcast_to(theta, (keys.shape[0], 1, theta.size))
  (first, rest), pull_back, (end, losses) = jax.vjp(unroll, thetas, has_aux=True)

  def gradients(a: float, b: float) -> Float[Array, "groups P"]:
    (gradient,) = pull_back((jnp.full_like(first, a), jnp.full_like(rest, b)))
    return without_capped(gradient[:, 0], losses.diverged[:, 0])

  return end, losses, gradients


def without_capped(gradients: Float[Array, "groups P"], diverged: Bool[Array, " groups"]) -> Float[Array, "groups P"]:
  """Gradients, 0 for groups that diverged beyond what has a derivative: reverse mode makes NaN of 0 × ∞ there."""
  return jnp.where(diverged[:, None], finite_or_zero(gradients), gradients)


def finite_or_zero(gradients: Float[Array, "groups P"]) -> Float[Array, "groups P"]:
  """Gradients, 0 for groups whose own is not finite."""
  return jnp.where(jnp.all(jnp.isfinite(gradients), axis=1, keepdims=True), gradients, 0.0)


def unroll_episode(
  problem: base.UnrolledProblem,
  thetas: Float[Array, "groups particles P"],
  unravel: vectors.Unravel,
  keys: Key[Array, " groups"],
) -> Losses:
  """One whole episode of every particle, from its first step to its last."""
  groups, particles = thetas.shape[:2]
  state, horizon = begin(problem, split_step_keys(keys, 0)[:, 0], particles)

  def body(carry):
    t, state, total, diverged = carry
    step_keys = split_step_keys(keys, t)[:, 1]
    state, loss, diverged_now = advance(problem, thetas, unravel, state, step_keys)
    running = (t < horizon)[:, None]
    return t + 1, state, total + jnp.where(running, loss, 0.0), diverged | (diverged_now & running)

  start = (0, state, jnp.zeros((groups, particles), thetas.dtype), jnp.zeros((groups, particles), bool))
  _, _, total, diverged = jax.lax.while_loop(lambda carry: carry[0] < jnp.max(horizon), body, start)
  return Losses(total, jnp.zeros_like(total), horizon, jnp.zeros(groups, bool), diverged)


def split_step_keys(keys: Key[Array, " groups"], t: Int[Array, ""] | int) -> Key[Array, "groups 2"]:
  """For step t of a window: the keys to begin episodes with, should they have to, and those of the step itself."""
  return jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, t)))(keys)


def where_group(condition: Bool[Array, " groups"], this: Tree, that: Tree) -> Tree:
  """`this` for the groups where the condition holds, `that` for the others."""
  return jax.tree.map(lambda x, y: jnp.where(condition.reshape(-1, *[1] * (x.ndim - 1)), x, y), this, that)


def in_blocks(
  function: Callable[..., Tree],
  problem: base.UnrolledProblem,
  theta: base.Theta,
  groups_per_block: int | None,
  *args: base.PyTree,
) -> Tree:
  """`function(*args)`, its groups taken a block at a time, so that a block's arrays stay in the cache.

  Blocks have `groups_per_block` groups, or the largest number below it that divides the number of groups. None means
  as many as have `CACHED_BYTES` in their largest array, from one to `LARGEST_BLOCK`; on accelerators, all.
  """
  groups = jax.tree.leaves(args)[0].shape[0]
  if groups_per_block is None:
    groups_per_block = groups
    if jax.default_backend() == "cpu":
      groups_per_block = min(max(1, CACHED_BYTES // _largest_array(problem, theta)), LARGEST_BLOCK)
  size = max(n for n in range(1, min(groups_per_block, groups) + 1) if groups % n == 0)
  if size == groups:
    return function(*args)
  blocks = jax.tree.map(lambda x: x.reshape(groups // size, size, *x.shape[1:]), args)
  results = jax.lax.map(lambda block: function(*block), blocks)
  return jax.tree.map(lambda x: x.reshape(groups, *x.shape[2:]), results)


def _largest_array(problem: base.UnrolledProblem, theta: base.Theta) -> int:
  """Bytes of the largest array that a step of one particle computes."""

  def largest(jaxpr: core.Jaxpr) -> int:
    sizes = [math.prod(getattr(x.aval, "shape", ())) * 4 for equation in jaxpr.eqns for x in equation.outvars]
    return max([*sizes, *map(largest, core.subjaxprs(jaxpr))], default=1)

  key = jax.random.key(0)
  state = jax.eval_shape(lambda: problem.init(key, problem.horizon(key)))
  theta = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), theta)
  return largest(jax.make_jaxpr(problem.step)(theta, state, key).jaxpr)


def metrics(gradients: Float[Array, "groups P"], losses: Losses, steps: base.Scalar | float | int) -> base.Metrics:
  """What estimators report, all of it means over groups.

  Args:
    gradients: Each group's own estimate.
    losses: Of particles θ + ε, θ - ε, and maybe more that do not count for the meta-loss; or of θ alone.
    steps: What the sum of losses is divided by to have the mean loss per inner step.

  Returns:
    `meta_loss`, the mean loss per inner step; `diverged`, the share of particles with a capped loss;
    `inner_steps`, how many the group took, all its particles together; `mean_square_gradient`, the groups' mean
    |g_i|², from which follows the variance of their mean.
  """
  particles = losses.first.shape[1]
  return {
    "meta_loss": jnp.mean((losses.first + losses.rest)[:, :2]) / steps,
    "diverged": jnp.mean(losses.diverged[:, :2].astype(jnp.float32)),
    "inner_steps": particles * jnp.mean(losses.steps.astype(jnp.float32)),
    "mean_square_gradient": jnp.mean(jnp.sum(jnp.square(gradients), axis=1)),
  }
