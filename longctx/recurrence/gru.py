"""The gated recurrent unit, reset after the product, as cuDNN and torch.nn.GRU have it.

  [r, z] = sigmoid([x_r, x_z] + h [W_r, W_z])
  n  = tanh(x_n + r (h W_n + b_n))
  h' = (1 - z) n + z h

b_n stands inside the product with r, so it cannot be joined to the bias of the inputs.
Sources: Cho et al. 2014, arXiv:1406.1078. Differs from the paper, which resets h before the product.
Held by: tests/test_recurrent_cells.py.

B batch  T tokens  C gates (3: r, z, n)  E recurrent width
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from longctx.recurrence.cell import Cell, join_gates, scan_cell


class State(NamedTuple):
  h: jax.Array


def _step(x_BCE, product_BCE, state):
  gates = jax.nn.sigmoid(x_BCE[:, :2] + product_BCE[:, :2])
  r, z = gates[:, 0], gates[:, 1]
  inner = product_BCE[:, 2]
  n = jnp.tanh(x_BCE[:, 2] + r * inner)
  return State(n + z * (state[0] - n)), (gates, n, inner)


def _turn(kept, before, dstate):
  (gates, n, inner), (h,), (dh,) = kept, before, dstate
  r, z = gates[:, 0], gates[:, 1]
  dn = dh * (1 - z) * (1 - n * n)
  dr = dn * inner * r * (1 - r)
  dz = dh * (h - n) * z * (1 - z)
  return join_gates(dr, dz, dn), join_gates(dr, dz, dn * r), (dh * z,)


CELL = Cell('gru', 3, State, _step, _turn, flops=14)


def gru(x_TB3E: jax.Array, w_E3E: jax.Array, state: State, keep_TB1: jax.Array | None = None,
        valid_TB1: jax.Array | None = None, bias_CE: jax.Array | None = None,
        bias_n_E: jax.Array | None = None) -> tuple[jax.Array, State]:
  """(y_TBE, state) from projected inputs; bias_n_E is b_n; see cell.scan_cell."""
  if bias_n_E is not None:
    bias_n_E = jnp.concatenate([jnp.zeros((2, *bias_n_E.shape), bias_n_E.dtype), bias_n_E[None]])
  return scan_cell(CELL, x_TB3E, w_E3E, (bias_CE, bias_n_E), state, keep_TB1, valid_TB1)
