"""The Elman cell: h' = tanh(x W_x + b + h W_h).

Sources: Elman 1990, "Finding structure in time"; as torch.nn.RNN with its tanh, but one bias.
Held by: tests/test_recurrent_cells.py.

B batch  T tokens  C gates (1)  E recurrent width
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from longctx.recurrence.cell import Cell, scan_cell


class State(NamedTuple):
  h: jax.Array


def _step(x_BCE, product_BCE, state):
  del state
  h_BE = jnp.tanh(x_BCE + product_BCE)[:, 0]
  return State(h_BE), (h_BE,)


def _turn(kept, before, dstate):
  del before
  (h_BE,), (dh_BE,) = kept, dstate
  return (dh_BE * (1 - h_BE * h_BE))[:, None], None, (None,)


CELL = Cell('elman', 1, State, _step, _turn, flops=1)


def elman(x_TB1E: jax.Array, w_E1E: jax.Array, state: State, keep_TB1: jax.Array | None = None,
          valid_TB1: jax.Array | None = None, bias_CE: jax.Array | None = None
          ) -> tuple[jax.Array, State]:
  """(y_TBE, state) from projected inputs; see cell.scan_cell."""
  return scan_cell(CELL, x_TB1E, w_E1E, (bias_CE, None), state, keep_TB1, valid_TB1)
