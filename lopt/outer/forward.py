"""Forward-mode gradients: what the state owes to θ is carried along with it.

RTRL: R. J. Williams, D. Zipser, "A learning algorithm for continually running fully recurrent neural networks", 1989.
UORO: C. Tallec, Y. Ollivier, "Unbiased online recurrent optimization", ICLR 2018, algorithm 1.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from lopt import base, checks
from lopt.outer import unrolls, vectors

Method = Literal["rtrl", "uoro"]
Floats = tuple[Float[Array, "..."], ...]  # the leaves of a state that have derivatives


class RTRLState(NamedTuple):
  """N inner runs, and all that their states owe to θ."""

  index: Int[Array, " N"]  # a run's number among all runs, from which its random numbers derive
  episodes: unrolls.Episodes  # state leaves are [N, 1, ...]
  jacobian: Floats  # ds/dθ: [N, P, 1, ...] for each floating-point leaf of the state


class UOROState(NamedTuple):
  """N inner runs, and a random rank-one matrix s̃ θ̃ᵀ a run, whose mean is ds/dθ."""

  index: Int[Array, " N"]  # a run's number among all runs, from which its random numbers derive
  episodes: unrolls.Episodes  # state leaves are [N, 1, ...]
  s_tilde: Floats  # [N, 1, ...] for each floating-point leaf of the state
  theta_tilde: Float[Array, "N P"]


def build(
  problem: base.UnrolledProblem,
  *,
  method: Method = "rtrl",
  num_runs: int = 32,
  unroll_length: int = 20,
  stagger: bool = True,
  runs_per_block: int | None = None,
) -> base.GradientEstimator:
  """Real-time recurrent learning, exact or by an unbiased rank-one approximation.

  With F the window's map from (s, θ), its first state and θ, to its last state, L the sum of its losses, and
  J = ds/dθ at its beginning,

      ĝ = 1/N Σ_i [∂L/∂θ + ∂L/∂s J] / K,   then   J ← ∂F/∂θ + ∂F/∂s J,   and J = 0 where an episode begins.

  RTRL carries J itself, by forward-mode differentiation of the window in all P directions: P times the time and the
  memory of the state. UORO carries vectors with E[s̃ θ̃ᵀ] = J and gets by with that of a few states: with ν uniform in
  {-1, 1}ⁿ,

      s̃ ← ρ₀ ∂F/∂s s̃ + ρ₁ ν,   θ̃ ← θ̃/ρ₀ + νᵀ∂F/∂θ / ρ₁,   ρ₀² = |θ̃| / |∂F/∂s s̃|,   ρ₁² = |νᵀ∂F/∂θ| / |ν|.

  Both are unbiased as long as θ does not move; J is that of the θ that the episode has seen.

  Args:
    problem: What is unrolled; its step must be differentiable.
    method: 'rtrl' or 'uoro'.
    num_runs: N, inner runs, each with random numbers of its own.
    unroll_length: K, inner steps between two estimates (and for UORO, between two draws of ν).
    stagger: Whether runs are spread over the ages of an episode, or run in lockstep.
    runs_per_block: Runs that advance together; None: as many as stay in the cache of a CPU, all on an accelerator.

  Raises:
    ValueError: For counts below 1 or another method.
  """
  checks.counts(num_runs=num_runs, unroll_length=unroll_length, runs_per_block=runs_per_block)
  checks.require(method in get_args(Method), "method", method, " or ".join(map(repr, get_args(Method))))
  begin, advance = (_rtrl if method == "rtrl" else _uoro)(problem, unroll_length)

  def init(key: base.PRNGKey, theta: base.Theta) -> RTRLState | UOROState:
    flat, _ = vectors.ravel(theta)
    index = jnp.arange(num_runs)
    return begin(index, unrolls.before_first(problem, key, index, particles=(1,), stagger=stagger), flat)

  def estimate(key: base.PRNGKey, theta: base.Theta, state):
    flat, unravel = vectors.ravel(theta)

    def advance_block(state):
      keys = jax.vmap(jax.random.split)(unrolls.group_keys(key, state.index))
      return advance(keys, flat, unravel, state)

    state, gradients, losses = unrolls.in_blocks(advance_block, problem, theta, runs_per_block, state)
    gradients /= unroll_length
    return unravel(jnp.mean(gradients, axis=0)), state, unrolls.metrics(gradients, losses, unroll_length)

  return base.GradientEstimator(init, estimate)


def _rtrl(problem: base.UnrolledProblem, length: int):
  def begin(index: Int[Array, " N"], episodes: unrolls.Episodes, theta: Float[Array, " P"]) -> RTRLState:
    floats, _ = _split(episodes.state)
    jacobian = tuple(jnp.zeros((len(x), theta.size, *x.shape[1:]), x.dtype) for x in floats)
    return RTRLState(index, episodes, jacobian)

  def advance(keys: Key[Array, "N 2"], theta: Float[Array, " P"], unravel: vectors.Unravel, state: RTRLState):
    window, at = _window(problem, theta, unravel, state.episodes, keys[:, 1], length)

    def along(direction: Float[Array, " P"], floats: Floats):
      return jax.jvp(window, at, (jnp.broadcast_to(direction, at[0].shape), floats), has_aux=True)

    # Only the tangents are mapped over: the window itself is computed once for all directions.
    everywhere = jax.vmap(along, in_axes=(0, 1), out_axes=(None, (0, 1), None))
    _, (gradients, jacobian), (episodes, losses) = everywhere(jnp.eye(theta.size, dtype=theta.dtype), state.jacobian)
    return RTRLState(state.index, episodes, jacobian), gradients.T, losses

  return begin, advance


def _uoro(problem: base.UnrolledProblem, length: int):
  def begin(index: Int[Array, " N"], episodes: unrolls.Episodes, theta: Float[Array, " P"]) -> UOROState:
    floats, _ = _split(episodes.state)
    zeros = jnp.zeros((len(index), theta.size), theta.dtype)
    return UOROState(index, episodes, tuple(map(jnp.zeros_like, floats)), zeros)

  def advance(keys: Key[Array, "N 2"], theta: Float[Array, " P"], unravel: vectors.Unravel, state: UOROState):
    window, at = _window(problem, theta, unravel, state.episodes, keys[:, 1], length)
    _, (along_s_tilde, moved), _ = jax.jvp(window, at, (jnp.zeros_like(at[0]), state.s_tilde), has_aux=True)
    (loss, end), pull_back, (episodes, losses) = jax.vjp(lambda thetas: window(thetas, at[1]), at[0], has_aux=True)
    (direct,) = pull_back((jnp.ones_like(loss), jax.tree.map(jnp.zeros_like, end)))
    gradients = direct[:, 0] + along_s_tilde[:, None] * state.theta_tilde

    nu = tuple(_signs(keys[:, 0], i, x) for i, x in enumerate(end))
    (nu_theta,) = pull_back((jnp.zeros_like(loss), nu))
    nu_theta = nu_theta[:, 0]
    # A fresh episode owes nothing to the past: ∂F/∂s is 0 there, and what θ̃ still holds would be noise only.
    theta_tilde = unrolls.where_group(losses.restarted, jnp.zeros_like(state.theta_tilde), state.theta_tilde)
    rho_0 = _root_of_ratio(_norm((theta_tilde,)), _norm(moved))
    rho_1 = _root_of_ratio(_norm((nu_theta,)), _norm(nu))
    s_tilde = tuple(_scaled(rho_0, m) + _scaled(rho_1, n) for m, n in zip(moved, nu, strict=True))
    theta_tilde = theta_tilde / rho_0[:, None] + nu_theta / rho_1[:, None]
    return UOROState(state.index, episodes, s_tilde, theta_tilde), gradients, losses

  return begin, advance


def _window(
  problem: base.UnrolledProblem,
  theta: Float[Array, " P"],
  unravel: vectors.Unravel,
  episodes: unrolls.Episodes,
  keys: Key[Array, " N"],
  length: int,
):
  """The window as a differentiable function (thetas, first state) -> (Σ losses, last state), and its arguments.

  Both states are floating-point leaves only; what else is in them has no derivative. The function's second result is
  `unroll_window`'s.
  """
  floats, merge = _split(episodes.state)

  def window(thetas: Float[Array, "N 1 P"], floats: Floats):
    start = episodes._replace(state=merge(floats))
    end, losses = unrolls.unroll_window(problem, thetas, unravel, start, keys, length, differentiable=True)
    return ((losses.first + losses.rest)[:, 0], _split(end.state)[0]), (end, losses)

  return window, (jnp.broadcast_to(theta, (keys.shape[0], 1, theta.size)), floats)


def _split(state: base.State) -> tuple[Floats, Callable[[Floats], base.State]]:
  """The floating-point leaves of a state, and the way back from others in their place."""
  leaves, structure = jax.tree.flatten(state)
  where = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating)]

  def merge(floats: Floats) -> base.State:
    merged = list(leaves)
    for i, x in zip(where, floats, strict=True):
      merged[i] = x
    return jax.tree.unflatten(structure, merged)

  return tuple(leaves[i] for i in where), merge


def _signs(keys: Key[Array, " N"], number: int, like: Float[Array, "N ..."]) -> Float[Array, "N ..."]:
  """Random signs for leaf `number` of every run's state."""
  draw = lambda key: jax.random.rademacher(jax.random.fold_in(key, number), like.shape[1:], like.dtype)
  return jax.vmap(draw)(keys)


def _norm(leaves: Floats) -> Float[Array, " N"]:
  return jnp.sqrt(sum(jnp.sum(jnp.square(x.reshape(len(x), -1)), axis=1) for x in leaves))


def _root_of_ratio(a: Float[Array, " N"], b: Float[Array, " N"]) -> Float[Array, " N"]:
  """√(a/b), and 1 where that is 0 or infinite: any factor leaves the mean of s̃ θ̃ᵀ as it is."""
  proper = (a > 0) & (b > 0)
  return jnp.where(proper, jnp.sqrt(jnp.where(proper, a, 1.0) / jnp.where(proper, b, 1.0)), 1.0)


def _scaled(factor: Float[Array, " N"], x: Float[Array, "N ..."]) -> Float[Array, "N ..."]:
  return factor.reshape(-1, *[1] * (x.ndim - 1)) * x
