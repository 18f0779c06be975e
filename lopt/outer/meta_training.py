"""The outer loop: estimate the meta-gradient, update θ, again."""

import math
import signal
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lopt import base
from lopt.outer import parallel
from lopt.runs import interruption


class MetaState(NamedTuple):
  """All that continues from one outer step to the next."""

  theta: base.Theta
  optimizer_state: base.State
  particles: base.State  # the estimator's state, leaves [D, N/D, ...] on devices, [N, ...] when saved


class Trainer(NamedTuple):
  """Meta-training as three functions; between calls, all is in the `MetaState`."""

  init: Callable[[], MetaState]
  """The state before outer step 0."""
  advance: Callable[[int, MetaState], tuple[MetaState, dict[str, np.ndarray]]]
  """`(outer_step, state) -> (state, metrics)`: the next `steps_per_call` outer steps, one compiled program. Consumes
  the state. Metrics have one value for each outer step."""
  steps_per_call: int
  save: Callable[[MetaState], MetaState]
  """The state as host arrays that do not tell on how many devices it was: what a checkpoint holds."""
  load: Callable[[MetaState], MetaState]
  """The state that `save` made, back on the devices."""
  saved_like: MetaState
  """Shapes and dtypes of what `save` returns."""
  lower: Callable[[parallel.Devices], jax.stages.Lowered]
  """The program of `advance` for given devices, which need not be there (`experiments/check_tpu.py`)."""


def outer_optimizer(
  num_steps: int,
  *,
  learning_rate: float = 1e-3,
  warmup_steps: int = 50,
  final_fraction: float = 0.03,
  weight_decay: float = 0.0,
  clip_norm: float = 1.0,
) -> optax.GradientTransformation:
  """AdamW on clipped meta-gradients, its learning rate warmed up linearly and decayed by a cosine.

  Args:
    num_steps: Outer steps of the whole run.
    learning_rate: At the end of the warm-up.
    warmup_steps: Outer steps from 0 to the full learning rate; at most half of all.
    final_fraction: The last learning rate, as a fraction of the full one.
    weight_decay: Decoupled, per unit of learning rate.
    clip_norm: The largest norm that a meta-gradient enters Adam with.

  Raises:
    ValueError: For a setting out of its range.
  """
  for name, value in {"learning_rate": learning_rate, "clip_norm": clip_norm}.items():
    if not 0 < value < math.inf:
      raise ValueError(f"{name}: must be above 0 and finite, not {value}")
  for name, value in {"weight_decay": weight_decay, "final_fraction": final_fraction}.items():
    if not value >= 0:
      raise ValueError(f"{name}: must be at least 0, not {value}")
  if warmup_steps < 0:
    raise ValueError(f"warmup_steps: must be at least 0, not {warmup_steps}")
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, learning_rate, min(warmup_steps, num_steps // 2), num_steps, learning_rate * final_fraction
  )
  return optax.chain(optax.clip_by_global_norm(clip_norm), optax.adamw(schedule, weight_decay=weight_decay))


class Keys(NamedTuple):
  """What a run's random numbers derive from."""

  theta: base.PRNGKey  # the first θ
  particles: base.PRNGKey  # the estimator's first state
  steps: base.PRNGKey  # with the number of the outer step folded in, all else


def keys(seed: int) -> Keys:
  """The keys of the run with this seed."""
  return Keys(*jax.random.split(jax.random.key(seed), 3))


def build(
  estimator: base.GradientEstimator,
  init_theta: Callable[[base.PRNGKey], base.Theta],
  optimizer: optax.GradientTransformation,
  *,
  seed: int,
  steps_per_call: int = 1,
) -> Trainer:
  """One outer step: gradient estimate on all devices, their mean, an Optax update, all in one compiled program.

  Outer step i uses a key that depends on (seed, i) alone, so a run that is interrupted and continued, or cut into
  calls, draws the same random numbers.

  Args:
    estimator: Of the meta-gradient.
    init_theta: Draws the first θ.
    optimizer: Of θ.
    seed: Everything random follows from it.
    steps_per_call: Outer steps that one call of `advance` takes.
  """
  theta_key, particles_key, steps_key = keys(seed)

  @parallel.jit
  def start() -> MetaState:
    theta = init_theta(theta_key)
    return MetaState(theta, optimizer.init(theta), estimator.init(particles_key, theta))

  saved_like = jax.eval_shape(start)
  num_particles = jax.tree.leaves(saved_like.particles)[0].shape[0]
  devices = parallel.num_devices(num_particles)
  averaged = parallel.averaged(estimator)

  def outer_step(carry, step):
    (theta, optimizer_state), particles = carry
    key = jax.random.fold_in(steps_key, step)
    gradient, particles, metrics = averaged.estimate(key, theta, particles)
    updates, optimizer_state = optimizer.update(gradient, optimizer_state, theta)
    theta = optax.apply_updates(theta, updates)
    square_norm = jnp.square(optax.tree.norm(gradient))
    metrics |= {
      "inner_steps": metrics["inner_steps"] * num_particles,
      "gradient_norm": jnp.sqrt(square_norm),
      "update_norm": optax.tree.norm(updates),
      "theta_norm": optax.tree.norm(theta),
    }
    if "mean_square_gradient" in metrics:
      variance = (metrics.pop("mean_square_gradient") - square_norm) / max(num_particles - 1, 1)
      metrics["gradient_standard_error"] = jnp.sqrt(jnp.maximum(variance, 0.0))
    return ((theta, optimizer_state), particles), metrics

  def outer_steps(first, replicated, particles):
    steps = first + jnp.arange(steps_per_call)
    (replicated, particles), metrics = jax.lax.scan(outer_step, (replicated, particles), steps)
    return replicated, particles, metrics

  program = parallel.compiled(parallel.spread(outer_steps, devices))

  def advance(step: int, state: MetaState) -> tuple[MetaState, dict[str, np.ndarray]]:
    replicated, particles, metrics = program(np.int32(step), state[:2], state.particles)
    theta, optimizer_state = replicated
    return MetaState(theta, optimizer_state, particles), jax.device_get(metrics)

  def save(state: MetaState) -> MetaState:
    return jax.device_get(state._replace(particles=parallel.join(state.particles)))

  # With arrays laid out in another way than the program returns them, its second call would compile it once more.
  place = parallel.spread(lambda step, replicated, particles: (replicated, particles, step), devices)

  def load(state: MetaState) -> MetaState:
    replicated, particles, _ = place(np.int32(0), state[:2], parallel.split(state.particles, devices))
    theta, optimizer_state = replicated
    return MetaState(theta, optimizer_state, particles)

  def lower(devices: parallel.Devices) -> jax.stages.Lowered:
    particles = jax.eval_shape(lambda x: parallel.split(x, len(devices)), saved_like.particles)
    return parallel.spread(outer_steps, devices).lower(np.int32(0), saved_like[:2], particles)

  return Trainer(lambda: load(start()), advance, steps_per_call, save, load, saved_like, lower)


class Every(NamedTuple):
  """Something to do after every so many outer steps, and after the last."""

  steps: int
  action: Callable[[int, MetaState], None]
  when_interrupted: bool = False
  """Also when the run is asked to end: what saves it."""


class DeadRunError(FloatingPointError):
  """A run that has nothing more to learn from, as where θ is so far off that every inner run diverges."""


def run(
  trainer: Trainer,
  state: MetaState,
  first_step: int,
  last_step: int,
  *,
  record: Callable[[int, dict[str, float]], None],
  periodic: Sequence[Every] = (),
  progress: Callable[[int, dict[str, float]], None] = lambda steps, metrics: None,
  max_dead_steps: int | None = 100,
) -> MetaState:
  """Takes outer steps first_step .. last_step - 1.

  Ctrl-C and SIGTERM end it after the call of `advance` that is under way, with what is due `when_interrupted` done.
  An outer step is dead if its meta-gradient is exactly zero, or every particle diverged: one of many is no harm, but
  with all of them dead there is nothing to learn from.

  Args:
    trainer: What takes them.
    state: Before `first_step`; consumed.
    first_step, last_step: Multiples of the trainer's `steps_per_call`, as are the periods below.
    record: `(outer steps taken, metrics)`, called with the means of every call's metrics, the inner steps per second
      that it came to, and `dead_steps`: how many outer steps in a row, up to here, were dead.
    periodic: Called in their order, after `record`.
    progress: `(outer steps taken by this call, metrics)`.
    max_dead_steps: Dead outer steps in a row that end the run; None to go on whatever happens.

  Raises:
    InterruptedRun: By Ctrl-C or SIGTERM; what was saved is of the outer step that the message names.
    DeadRunError: After `max_dead_steps`.
    FloatingPointError: The meta-gradient or θ is not finite; what was saved before is not affected.
  """
  dead_steps = 0
  with interruption.deferred("stopping after this outer step; once more to stop at once") as received:
    for step in range(first_step, last_step, trainer.steps_per_call):
      begun = time.perf_counter()
      state, metrics = trainer.advance(step, state)
      seconds = time.perf_counter() - begun
      # θ too: once it is NaN, every loss is capped, and the meta-gradient of equal losses is exactly zero.
      for name, what in {"gradient_norm": "the meta-gradient", "theta_norm": "θ"}.items():
        bad = ~np.isfinite(metrics[name])
        if bad.any():
          raise FloatingPointError(
            f"outer step {step + int(np.argmax(bad))}: {what} is not finite; lower the outer learning rate or σ, or "
            "give the task family a finite loss_cap"
          )
      dead = (metrics["gradient_norm"] == 0) | (metrics["diverged"] >= 1)
      alive = np.flatnonzero(~dead)
      dead_steps = len(dead) - 1 - int(alive[-1]) if alive.size else dead_steps + len(dead)
      means = {name: float(np.mean(values)) for name, values in metrics.items()}
      means["inner_steps_per_second"] = float(np.sum(metrics["inner_steps"])) / seconds
      means["dead_steps"] = float(dead_steps)
      done = step + trainer.steps_per_call
      record(done, means)
      progress(trainer.steps_per_call, means)
      if max_dead_steps is not None and dead_steps >= max_dead_steps:
        what = "every particle diverged" if metrics["diverged"][-1] >= 1 else "every meta-gradient was exactly zero"
        raise DeadRunError(
          f"outer step {done}: {what} in the last {dead_steps} outer steps, and nothing is learned from that (|θ| = "
          f"{means['theta_norm']:.3g}); lower the outer learning rate or σ and start anew (or, to go on all the "
          "same, lift max_dead_steps)"
        )
      stopped_by = parallel.of_any(received())
      for every, action, when_interrupted in periodic:
        if done % every == 0 or done == last_step or (stopped_by and when_interrupted):
          action(done, state)
      if stopped_by:
        message = f"stopped by {signal.Signals(stopped_by).name} after outer step {done} of {last_step}"
        raise interruption.InterruptedRun(message, stopped_by)
  return state
