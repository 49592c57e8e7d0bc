"""A recurrent cell over a sequence: everything that Elman's, the LSTM, the GRU and sLSTM share.

A cell is the element-wise part of a step and its derivative; this file is the rest: the product of
h with its matrix, the scan, documents, padding, and the gradient of the whole. The projection of
the inputs stands outside, one product for all steps. The backward pass is written out: it scans the
element-wise derivatives, and the gradient of the matrix is one product over all steps instead of T
small ones added up. The state is float32 whatever the compute type.

  product_t = h_{t-1} W_h + b_h        state_t = step(x_t + b, product_t, state_{t-1})

Dependency class P2: each step needs the one before, so the sequence cannot be cut over devices.
Held by: tests/test_recurrent_cells.py (NumPy loops, autodiff of plain steps, torch).

B batch  T tokens  C gates  E recurrent width  N heads  H head dim
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Biases = tuple[jax.Array | None, jax.Array | None]   # of the inputs, of the product: [C, E] each
State = tuple[jax.Array, ...]   # h first; float32 [B, E] each; zeros at the start of a document


class Cell(NamedTuple):
  """The element-wise part of a cell; static, so that programs are found again."""

  name: str
  gates: int
  state: type[tuple]
  # (x_BCE, product_BCE, state) -> (state, kept for `turn`)
  step: Callable[[jax.Array, jax.Array, State], tuple[State, tuple[jax.Array, ...]]]
  # (kept, state before, gradient of state) -> (of x, of the product or None if the same, of state
  # before, without its way through the product; None: nothing)
  turn: Callable
  flops: int       # element-wise, a unit of E and a token, counting exp and tanh as one


class Cost(NamedTuple):
  """Closed form of one layer. Floats and FLOPs of a row or a token; 2 FLOPs a multiply-add."""

  parameters: int
  matrices: int    # parameters that multiply every token: 2 FLOPs each
  flops: float     # of a token, forward, besides the matrices
  state: int       # floats of state of a row


def cost(cell: Cell, input_dim: int, width: int, heads: int = 1, hidden_biases: int = 0) -> Cost:
  """Of projection, recurrent matrix (block-diagonal over `heads`) and one bias a gate."""
  matrices = cell.gates * width * (input_dim + width // heads)
  return Cost(matrices + (cell.gates + hidden_biases) * width, matrices,
              (cell.flops + 2 * cell.gates + hidden_biases) * width,
              len(cell.state._fields) * width)


def zero_state(cell: Cell, batch_size: int, width: int) -> State:
  return cell.state(*(jnp.zeros((batch_size, width), jnp.float32) for _ in cell.state._fields))


def join_gates(*parts_BE: jax.Array) -> jax.Array:
  """[B, C, E]. Joined flat, which a CPU copies; stacked, it would choose number by number."""
  return jnp.concatenate(parts_BE, axis=1).reshape(-1, len(parts_BE), parts_BE[0].shape[1])


def _multiply(h_BE: jax.Array, w: jax.Array) -> jax.Array:
  """h W -> [B, C, E] float32. w: [E, C, E], or [H, N, C, H], a block a head."""
  h_BE = h_BE.astype(w.dtype)
  if w.ndim == 3:
    return jnp.einsum('BE,ECF->BCF', h_BE, w, preferred_element_type=jnp.float32)
  H, N, C, _ = w.shape
  product = jnp.einsum('BNH,HNCJ->BCNJ', h_BE.reshape(-1, N, H), w,
                       preferred_element_type=jnp.float32)
  return product.reshape(-1, C, N * H)


def _multiply_back(d_BCE: jax.Array, w_turned: jax.Array) -> jax.Array:
  """[B, C, E] -> [B, E] by the transposed matrix of `_turned`."""
  d_BCE = d_BCE.astype(w_turned.dtype)
  if w_turned.ndim == 3:
    C, F, E = w_turned.shape
    return jnp.matmul(d_BCE.reshape(-1, C * F), w_turned.reshape(C * F, E),
                      preferred_element_type=jnp.float32)
  N, C, H, _ = w_turned.shape
  back = jnp.einsum('BCNJ,NCJH->BNH', d_BCE.reshape(-1, C, N, H), w_turned,
                    preferred_element_type=jnp.float32)
  return back.reshape(-1, N * H)


def _turned(w: jax.Array) -> jax.Array:
  # Once, behind a barrier: inside the scan a CPU would transpose it in every step.
  return jax.lax.optimization_barrier(
      jnp.moveaxis(w, 0, -1) if w.ndim == 3 else jnp.transpose(w, (1, 2, 3, 0)))


def _matrix_gradient(h_TBE: jax.Array, d_TBCE: jax.Array, w: jax.Array) -> jax.Array:
  h_TBE, d_TBCE = h_TBE.astype(w.dtype), d_TBCE.astype(w.dtype)
  if w.ndim == 3:
    # Not einsum, which contracts B before T and so transposes both.
    dw = jax.lax.dot_general(h_TBE, d_TBCE, (((0, 1), (0, 1)), ((), ())),
                             preferred_element_type=jnp.float32)
  else:
    H, N, C, _ = w.shape
    T, B, _ = h_TBE.shape
    dw = jnp.einsum('TBNH,TBCNJ->HNCJ', h_TBE.reshape(T, B, N, H), d_TBCE.reshape(T, B, C, N, H),
                    preferred_element_type=jnp.float32)
  return dw.astype(w.dtype)


def _forward(cell, x_TBCE, w, biases, state, keep_TB1, valid_TB1):
  # Added inside the scan, where they cost no pass over x of their own.
  add = lambda x, b_CE: x if b_CE is None else x + b_CE.astype(jnp.float32)

  def step(state, inputs):
    x_BCE, keep_B1, valid_B1 = inputs
    before = state if keep_B1 is None else tuple(s * keep_B1 for s in state)
    after, kept = cell.step(add(x_BCE.astype(jnp.float32), biases[0]),
                            add(_multiply(before[0], w), biases[1]), before)
    if valid_B1 is not None:
      after = tuple(jnp.where(valid_B1 > 0, new, old) for new, old in zip(after, state))
    return tuple(after), (tuple(after), kept)

  state, (states, kept) = jax.lax.scan(step, tuple(state), (x_TBCE, keep_TB1, valid_TB1))
  return state, states, kept


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan_cell(cell: Cell, x_TBCE: jax.Array, w: jax.Array, biases: Biases, state: State,
              keep_TB1: jax.Array | None = None, valid_TB1: jax.Array | None = None
              ) -> tuple[jax.Array, State]:
  """(h of every step [T, B, E], state after the last), float32, from projected inputs x W_x.

  keep 0 where a document begins (the state before it is dropped), valid 0 for padding (the state
  stands still); None: 1 everywhere.
  """
  after, states, _ = _forward(cell, x_TBCE, w, biases, state, keep_TB1, valid_TB1)
  return states[0], cell.state(*after)


def _scan_forward(cell, x_TBCE, w, biases, state, keep_TB1, valid_TB1):
  after, states, kept = _forward(cell, x_TBCE, w, biases, state, keep_TB1, valid_TB1)
  kind = jnp.zeros((0,), x_TBCE.dtype)
  return ((states[0], cell.state(*after)),
          (w, biases, tuple(state), states, kept, keep_TB1, valid_TB1, kind))


def _scan_backward(cell, residuals, gradients):
  w, biases, start, states, kept, keep_TB1, valid_TB1, kind = residuals
  dy_TBE, dstate = gradients
  turned = _turned(w)
  # A step's state before it: that after the one before, unless a document begins.
  before = tuple(jnp.concatenate([s[None], x[:-1]]) for s, x in zip(start, states))
  if keep_TB1 is not None:
    before = tuple(x * keep_TB1 for x in before)

  def step(dstate, inputs):
    dy_BE, kept, before, keep_B1, valid_B1 = inputs
    dstate = (dstate[0] + dy_BE, *dstate[1:])
    dafter = dstate if valid_B1 is None else tuple(d * valid_B1 for d in dstate)
    dx_BCE, dproduct_BCE, dbefore = cell.turn(kept, before, dafter)
    through = _multiply_back(dx_BCE if dproduct_BCE is None else dproduct_BCE, turned)
    dbefore = (through if dbefore[0] is None else through + dbefore[0], *dbefore[1:])
    if keep_B1 is not None:
      dbefore = tuple(d * keep_B1 for d in dbefore)
    if valid_B1 is not None:
      dbefore = tuple(d + old * (1 - valid_B1) for d, old in zip(dbefore, dstate))
    return dbefore, (dx_BCE.astype(kind.dtype),
                     None if dproduct_BCE is None else dproduct_BCE.astype(w.dtype))

  dstate, (dx_TBCE, dproduct_TBCE) = jax.lax.scan(
      step, tuple(dstate), (dy_TBE, kept, before, keep_TB1, valid_TB1), reverse=True)
  if dproduct_TBCE is None:
    dproduct_TBCE = dx_TBCE
  db = tuple(None if b_CE is None else d.sum((0, 1), dtype=jnp.float32).astype(b_CE.dtype)
             for b_CE, d in zip(biases, (dx_TBCE, dproduct_TBCE)))
  nothing = lambda x: None if x is None else jnp.zeros_like(x)
  return (dx_TBCE, _matrix_gradient(before[0], dproduct_TBCE, w), db, cell.state(*dstate),
          nothing(keep_TB1), nothing(valid_TB1))


scan_cell.defvjp(_scan_forward, _scan_backward)
