"""The LSTM cell.

  [i, f, g, o] = x W_x + b + h W_h
  c' = sigmoid(f) c + sigmoid(i) tanh(g)        h' = sigmoid(o) tanh(c')

Sources: Hochreiter & Schmidhuber 1997; forget gate of Gers et al. 2000; gate order of cuDNN and
torch.nn.LSTM, but one bias.
Held by: tests/test_recurrent_cells.py.

B batch  T tokens  C gates (4)  E recurrent width
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from longctx.recurrence.cell import Cell, join_gates, scan_cell

# sigmoid(x) = tanh(x / 2) / 2 + 1 / 2: one function for all gates is one pass without branches.
SCALE_C1 = np.array([0.5, 0.5, 1.0, 0.5], np.float32)[:, None]
SHIFT_C1 = np.array([0.5, 0.5, 0.0, 0.5], np.float32)[:, None]


class State(NamedTuple):
  h: jax.Array
  c: jax.Array


def _step(x_BCE, product_BCE, state):
  gates_BCE = jnp.tanh((x_BCE + product_BCE) * SCALE_C1) * SCALE_C1 + SHIFT_C1
  i, f, g, o = (gates_BCE[:, n] for n in range(4))
  c_BE = f * state[1] + i * g
  return State(o * jnp.tanh(c_BE), c_BE), (gates_BCE,)


def _turn(kept, before, dstate):
  (gates_BCE,), (_, c), (dh, dc) = kept, before, dstate
  i, f, g, o = (gates_BCE[:, n] for n in range(4))
  tanh_c = jnp.tanh(f * c + i * g)
  dc = dc + dh * o * (1 - tanh_c * tanh_c)
  dgates_BCE = join_gates(dc * g * i * (1 - i), dc * c * f * (1 - f), dc * i * (1 - g * g),
                          dh * tanh_c * o * (1 - o))
  return dgates_BCE, None, (None, dc * f)


CELL = Cell('lstm', 4, State, _step, _turn, flops=21)


def lstm(x_TB4E: jax.Array, w_E4E: jax.Array, state: State, keep_TB1: jax.Array | None = None,
         valid_TB1: jax.Array | None = None, bias_CE: jax.Array | None = None
         ) -> tuple[jax.Array, State]:
  """(y_TBE, state) from projected inputs; see cell.scan_cell."""
  return scan_cell(CELL, x_TB4E, w_E4E, (bias_CE, None), state, keep_TB1, valid_TB1)
