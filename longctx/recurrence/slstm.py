"""The sLSTM cell of xLSTM: exponential input gate, normaliser, recurrence inside heads.

  [i, f, z, o] = x W_x + b + h W_h,  W_h block-diagonal: a head reads its own h alone
  c' = sigmoid(f) c + exp(i) tanh(z)    n' = sigmoid(f) n + exp(i)    h' = sigmoid(o) c' / n'

c and n are held divided by e^m, m' = max(log sigmoid(f) + m, i), so that no exponential overflows; h
does not know m. Where n = 0 nothing has been seen, and m' = i whatever m is: a state of zeros then
begins right (with m = 0 taken for a maximum, i << 0 would make c' = n' = 0 and h' = 0 / 0), and n'
is at least 1 ever after. The official code asks this of the whole batch at once.
m is a constant to the gradient, which is exact for all but the state's own m: any m_t gives the same
h. The gradient of a starting m is given as zero.
Source: Beck et al. 2024, arXiv:2405.04517, equations 8 to 17 (forget gate: sigmoid).
Held by: tests/test_recurrent_cells.py.

B batch  T tokens  C gates (4: i, f, z, o)  E recurrent width  N heads  H head dim
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from longctx.recurrence.cell import Cell, join_gates, scan_cell


class State(NamedTuple):
  h: jax.Array
  c: jax.Array   # times e^-m
  n: jax.Array   # times e^-m
  m: jax.Array


def _step(x_BCE, product_BCE, state):
  _, c, n, m = state
  i, f, z, o = (x_BCE[:, k] + product_BCE[:, k] for k in range(4))
  empty = n == 0
  log_forget = jnp.minimum(f, 0.0) - jnp.log1p(jnp.exp(-jnp.abs(f)))
  decayed = log_forget + m
  m = jnp.where(empty, i, jnp.maximum(decayed, i))
  write = jnp.exp(i - m)
  forget = jnp.where(empty, 0.0, jnp.exp(jnp.minimum(decayed - m, 0.0)))
  z, o = jnp.tanh(z), jax.nn.sigmoid(o)
  c, n = forget * c + write * z, forget * n + write
  return State(o * c / n, c, n, m), (write, forget, z, o, jax.nn.sigmoid(-f))


def _turn(kept, before, dstate):
  (write, forget, z, o, slope), (_, c, n, _), (dh, dc, dn, _) = kept, before, dstate
  c_after, n_after = forget * c + write * z, forget * n + write
  ratio = c_after / n_after
  dc = dc + dh * o / n_after
  dn = dn - dh * o * ratio / n_after
  dgates_BCE = join_gates((dc * z + dn) * write, (dc * c + dn * n) * forget * slope,
                          dc * write * (1 - z * z), dh * ratio * o * (1 - o))
  return dgates_BCE, None, (None, dc * forget, dn * forget, jnp.zeros_like(dh))


CELL = Cell('slstm', 4, State, _step, _turn, flops=32)


def slstm(x_TB4E: jax.Array, w_HN4H: jax.Array, state: State, keep_TB1: jax.Array | None = None,
          valid_TB1: jax.Array | None = None, bias_CE: jax.Array | None = None
          ) -> tuple[jax.Array, State]:
  """(y_TBE, state) from projected inputs; E is N heads of H, head by head; see cell.scan_cell."""
  return scan_cell(CELL, x_TB4E, w_HN4H, (bias_CE, None), state, keep_TB1, valid_TB1)
