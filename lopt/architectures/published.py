"""Weights published for google/learned_optimization and what builds on it, as θ of the architectures here.

The layout of that library is a nested dictionary of arrays, Haiku's parameters; a flat one with names joined by "/"
does as well. Where a default of ours differs from the published code, build with its value:

    weights                 θ                          architecture
    MLPLOpt                 mlp(weights)               mlp.build(epsilon=1e-5)
    AdafacMLPLOpt           adafactor_mlp(weights)     adafactor_mlp.build()
    Celo                    celo(weights)              published_celo.build()

Widths are those of the weights: `hidden_sizes` is to be given if they are not the defaults, and so are the published
step_mult and exp_mult, which are not in the weights. The published code computes 1 - β in
float32, for β = 0.9999 wrong in the fourth digit, and ours exactly (but for Celo); updates can differ by as much.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from lopt import base

Arrays = dict[str, Float[Array, "..."]]

CELO_FEATURES = (1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)
"""How many rows each feature of Celo's rule has, in the order of the published weights `w0__<i>`."""


def mlp(weights: Mapping[str, Any]) -> base.Theta:
  """θ of `mlp` from MLPLOpt's weights.

      mlp/~/linear_<i>/w, mlp/~/linear_<i>/b

  with i = 0, 1, ... the layers, from 19 inputs to 2 outputs.

  Raises:
    ValueError: An array is missing, not of this architecture, or has the wrong shape.
  """
  arrays = _flatten(weights)
  layers = _layers(arrays, "mlp/~/linear_{}/w", "mlp/~/linear_{}/b", num_inputs=19)
  _require_no_more(arrays)
  return {f"layer_{i}": {"w": w, "b": b} for i, (w, b) in enumerate(layers)}


def adafactor_mlp(weights: Mapping[str, Any]) -> base.Theta:
  """θ of `adafactor_mlp` from AdafacMLPLOpt's weights, for k decays.

      momentum_decays [k], rms_decays [1], adafactor_decays [k], nn/~/w<i>, nn/~/b<i>

  with i = 0, 1, ... the layers, from 15 + 8k inputs to 2 outputs. The variant that has each weight in an array of its
  own (make_separate_weights) is not supported.

  Raises:
    ValueError: An array is missing, not of this architecture, or has the wrong shape.
  """
  arrays = _flatten(weights)
  momentum_decays = _take(arrays, "momentum_decays", (None,))
  k = len(momentum_decays)
  theta = {
    "momentum_decays": momentum_decays,
    "rms_decays": _take(arrays, "rms_decays", (1,)),
    "adafactor_decays": _take(arrays, "adafactor_decays", (k,)),
  }
  layers = _layers(arrays, "nn/~/w{}", "nn/~/b{}", num_inputs=15 + 8 * k)
  _require_no_more(arrays)
  nn = {f"w{i}": w for i, (w, _) in enumerate(layers)} | {f"b{i}": b for i, (_, b) in enumerate(layers)}
  return {**theta, "nn": {"~": nn}}


def celo(weights: Mapping[str, Any]) -> base.Theta:
  """θ of `published_celo` from Celo's weights, for N rules and an LSTM of n units.

      ff_mod_stack/~/w0__<i> [N, _, _], ff_mod_stack/~/w<i>, ff_mod_stack/~/b<i>
      lstm_init_state/hidden, lstm_init_state/cell [1, n]
      rnn_params/<layer>/w, rnn_params/<layer>/b

  with <layer> linear, linear_1, linear_2 (from 18 inputs to n), rnn/linear (from 2n to 4n), rnn_to_controls (from n
  to N) and step_size (from n to 1).

  Raises:
    ValueError: An array is missing, not of this architecture, or has the wrong shape.
  """
  arrays = _flatten(weights)
  state = {"hidden": _take(arrays, "lstm_init_state/hidden", (1, None))}
  n = state["hidden"].shape[1]
  state["cell"] = _take(arrays, "lstm_init_state/cell", (1, n))

  first_b = _take(arrays, "ff_mod_stack/~/b0", (None, None))
  (N, size), rules = first_b.shape, {"b0": first_b}
  for i, rows in enumerate(CELO_FEATURES):
    rules[f"w0__{i}"] = _take(arrays, f"ff_mod_stack/~/w0__{i}", (N, rows, size))
  num_layers = max(sum(f"ff_mod_stack/~/w{i}" in arrays for i in range(1, len(arrays))), 1) + 1
  for i in range(1, num_layers):
    outputs = 3 if i == num_layers - 1 else None
    w = rules[f"w{i}"] = _take(arrays, f"ff_mod_stack/~/w{i}", (N, size, outputs))
    size = w.shape[2]
    rules[f"b{i}"] = _take(arrays, f"ff_mod_stack/~/b{i}", (N, size))

  shapes = {f"linear{suffix}": (18, n) for suffix in ("", "_1", "_2")}
  shapes |= {"rnn/linear": (2 * n, 4 * n), "rnn_to_controls": (n, N), "step_size": (n, 1)}
  scheduler = {
    layer: {
      "w": _take(arrays, f"rnn_params/{layer}/w", shape),
      "b": _take(arrays, f"rnn_params/{layer}/b", shape[1:]),
    }
    for layer, shape in shapes.items()
  }
  _require_no_more(arrays)
  return {"ff_mod_stack": {"~": rules}, "lstm_init_state": state, "rnn_params": scheduler}


def _flatten(weights: Mapping[str, Any], prefix: str = "") -> Arrays:
  arrays = {}
  for name, value in weights.items():
    if isinstance(value, Mapping):
      arrays |= _flatten(value, f"{prefix}{name}/")
    else:
      arrays[f"{prefix}{name}"] = jnp.asarray(value, jnp.float32)
  return arrays


def _take(arrays: Arrays, name: str, shape: tuple[int | None, ...]) -> Float[Array, "..."]:
  """Removes an array from `arrays`; None stands for any size."""
  if name not in arrays:
    raise ValueError(f"{name}: missing; other arrays: {', '.join(arrays) or 'none'}")
  array = arrays.pop(name)
  if array.ndim != len(shape) or any(want not in (None, size) for want, size in zip(shape, array.shape, strict=True)):
    wanted = ", ".join("any" if size is None else str(size) for size in shape)
    raise ValueError(f"{name}: must have shape ({wanted}), not {array.shape}")
  return array


def _layers(arrays: Arrays, w_name: str, b_name: str, *, num_inputs: int) -> list[tuple[Array, Array]]:
  layers = []
  num_layers = max(sum(w_name.format(i) in arrays for i in range(len(arrays))), 1)
  for i in range(num_layers):
    num_outputs = 2 if i == num_layers - 1 else None
    w = _take(arrays, w_name.format(i), (num_inputs, num_outputs))
    layers.append((w, _take(arrays, b_name.format(i), (w.shape[1],))))
    num_inputs = w.shape[1]
  return layers


def _require_no_more(arrays: Arrays) -> None:
  if arrays:
    raise ValueError(f"{', '.join(arrays)}: not of this architecture")
