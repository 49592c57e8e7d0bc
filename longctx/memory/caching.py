"""Memory Caching: recurrent memories of past segments, cached, and read by every token beside its own.

A segment's memory begins at 0 and is learned token by token (any recurrence; q_t S is what its state S
says to token t);
after the segment S and the mean of its inputs m are cached, and the oldest of `slots` falls out. Token t
of segment s, S_t and m_t being those of its segment so far:

  residual   y_t = q_t S_t + sum_i q_t S_i                        i: the cached segments
  gated      y_t = g_s q_t S_t + sum_i g_i q_t S_i                g = softmax(<u_t, m_t>, <u_t, m_i> ..)
  selective  as gated, over the token's own segment and the `top` with the largest <u_t, m_i>

Reading a matrix is linear, so that the paper's soup, q_t (g_s S_t + sum_i g_i S_i), is the gated one.
Source: Behrouz et al. 2026, arXiv:2602.24281.
With a window there is no own memory: y_t is the sum over i, and g_s weighs nothing.
Differs: the cache is bounded; all cached memories are read and those not selected dropped, for a
segment's tokens select different ones.
The caches before segments that follow each other are windows of one array, of `slots` states and the
segments' own: a slot of all of them at a time is read, so that R + S states are in memory, and not R S.
Held by: tests/test_memory_caching.py.

B batch  C tokens  S slots  R segments  L states of an array  N heads  H head dim  D model
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from longctx import watch
from longctx.recurrence.affine import product


class State(NamedTuple):
  """Batch first, oldest first; float32."""

  S: Any             # [B, S, ...] leaves of any recurrence's state; [B, S, N, H, H] of a matrix
  mean: jax.Array    # [B, S, D]
  count: jax.Array   # int32 [B]: how many slots, the last, are filled
  tail: Any = None   # the last inputs before the next segment, for a recurrence that looks back at them


@functools.partial(jax.tree_util.register_dataclass, data_fields=('S', 'mean', 'count', 'tail'),
                   meta_fields=('slots', 'parts'))
@dataclasses.dataclass(frozen=True, kw_only=True)
class Windows:
  """The caches before `parts` segments of each row: slot i before segment r is the array's state r + i.

  The array is cut into as many pieces as there are segments, so that rows and segments may be one dim.
  """

  S: Any             # [B, R, L / R, ...]
  mean: jax.Array    # [B, R, L / R, D]
  count: jax.Array   # int32 [B, R]
  tail: Any = None   # [B, R, ...]
  slots: int
  parts: int

  def of_slots(self, tree: Any) -> Callable[[jax.Array], Any]:
    """f(i): slot i of each segment, [B R, ...], of S or mean [B R, L / R, ...]."""
    lines = jax.tree.map(lambda x: x.reshape(-1, self.parts * x.shape[1], *x.shape[2:]), tree)
    def slot(i):
      cut = lambda x: jax.lax.dynamic_slice_in_dim(x, i, self.parts, axis=1).reshape(-1, *x.shape[2:])
      return jax.tree.map(cut, lines)
    return slot


def empty(batch_size: int, slots: int, S: Any, dim: int, tail: Any = None) -> State:
  """S: a recurrence's state of any batch."""
  return State(jax.tree.map(lambda x: jnp.zeros((batch_size, slots, *x.shape[1:]), jnp.float32), S),
               jnp.zeros((batch_size, slots, dim), jnp.float32), jnp.zeros((batch_size,), jnp.int32),
               tail)


def there(state: State | Windows) -> jax.Array:
  """[B, S] bool: which slots are filled."""
  slots = state.slots if isinstance(state, Windows) else state.mean.shape[1]
  return jnp.arange(slots) >= slots - state.count[:, None]


def running_mean(x_BCD: jax.Array, valid_BC: jax.Array) -> jax.Array:
  """[B, C, D] float32: of the tokens up to each, where there is any; x is 0 where there is none."""
  count_BC = jnp.maximum(jnp.cumsum(valid_BC, axis=1), 1)
  return jnp.cumsum(x_BCD.astype(jnp.float32), axis=1) / count_BC[..., None]


def gates(state: State | Windows, u_BCD: jax.Array, mean_BCD: jax.Array, top: int = 0) -> jax.Array:
  """[B, C, S + 1] float32: g of the cached segments and, last, of the token's own. top 0: all slots."""
  if isinstance(state, Windows):
    slot = state.of_slots(state.mean)
    score = jax.checkpoint(lambda i: product('bcd,bd->bc', u_BCD, slot(i)))
    cached_BCS = jnp.moveaxis(jax.lax.map(score, jnp.arange(state.slots)), 0, -1)
  else:
    cached_BCS = product('bcd,bsd->bcs', u_BCD, state.mean)
  there_BS = there(state)
  cached_BCS = jnp.where(there_BS[:, None], cached_BCS, -jnp.inf)
  if top and top < there_BS.shape[1]:
    least_BC1 = jax.lax.top_k(jax.lax.stop_gradient(cached_BCS), top)[0][..., -1:]
    cached_BCS = jnp.where(cached_BCS >= least_BC1, cached_BCS, -jnp.inf)
  own_BC1 = (u_BCD.astype(jnp.float32) * mean_BCD).sum(-1, keepdims=True)
  gates_BCS = jax.nn.softmax(jnp.concatenate([cached_BCS, own_BC1], axis=-1))
  watch.tell('memory_caching', gates_BCS=gates_BCS)
  return gates_BCS


def read(state: State | Windows, q_BCNH: jax.Array, gates_BCS: jax.Array | None) -> jax.Array:
  """[B, C, N, H] float32: what the cached memories say, weighed by their gates (none: added up)."""
  say = lambda S_BNHH: product('bcnh,bnhv->bcnv', q_BCNH, S_BNHH)
  if gates_BCS is None:   # an empty slot's S is 0
    return say(_sum(state, lambda S_BNHH: S_BNHH) if isinstance(state, Windows) else state.S.sum(1))
  if isinstance(state, Windows):
    return _sum(state, say, gates_BCS)
  said_BCSNV = product('bcnh,bsnhv->bcsnv', q_BCNH, state.S)
  return product('bcs,bcsnv->bcnv', gates_BCS, said_BCSNV)


def weigh(state: State | Windows, say: Callable[[Any], jax.Array], gates_BCS: jax.Array | None) -> jax.Array:
  """[B, C or 1, ...] of what `say` makes of cached states [B, S, ...], [B, C or 1, S, ...], by their gates
  (none: added up)."""
  if isinstance(state, Windows):
    return _sum(state, lambda one: say(jax.tree.map(lambda x: x[:, None], one))[:, :, 0], gates_BCS)
  said = say(state.S)
  if gates_BCS is None:
    return said.sum(2)
  return (gates_BCS.reshape(*gates_BCS.shape, *[1] * (said.ndim - 3)) * said).sum(2)


def _sum(state: Windows, say: Callable[[Any], jax.Array], gates_BCS: jax.Array | None = None) -> jax.Array:
  """The sum over slots of what `say` makes of a slot's states [B, ...], times its gates [B, C]."""
  slot = state.of_slots(state.S)

  @jax.checkpoint   # else what each slot says would be kept for its gate's gradient
  def one(i, gate_BC):
    said = say(slot(i))
    return said if gate_BC is None else gate_BC.reshape(*gate_BC.shape, *[1] * (said.ndim - 2)) * said

  gates_SBC = None if gates_BCS is None else jnp.moveaxis(gates_BCS, -1, 0)
  slots = jnp.arange(state.slots), gates_SBC
  zero = jnp.zeros_like(jax.eval_shape(one, *jax.tree.map(lambda x: x[0], slots)))
  return jax.lax.scan(lambda total, inputs: (total + one(*inputs), None), zero, slots)[0]


def push(state: State, S_B: Any, mean_BD: jax.Array, any_B: jax.Array) -> State:
  """The cache after a segment; see `before`."""
  S_BR = jax.tree.map(lambda x: x[:, None], S_B)
  return before(state, S_BR, mean_BD[:, None], any_B[:, None])[1]


def before(state: State, S_BR: Any, mean_BRD: jax.Array, any_BR: jax.Array) -> tuple[Windows, State]:
  """(the caches before each of R segments, the one after the last), `tail` left out.

  any_BR: whether a segment has a token. Those that have none come before all others, with S and mean
  of 0 into slots that are empty: only the count must know.
  """
  R, slots = mean_BRD.shape[1], state.mean.shape[1]
  all_S = jax.tree.map(lambda old, new: jnp.concatenate([old, new], axis=1), state.S, S_BR)
  all_mean = jnp.concatenate([state.mean, mean_BRD], axis=1)
  length = -(-(slots + R - 1) // R) * R

  def line(x):
    x = x[:, :length]   # the last segment's own may be one too many; past it nobody looks
    x = jnp.pad(x, ((0, 0), (0, length - x.shape[1]), *[(0, 0)] * (x.ndim - 2)))
    return x.reshape(len(x), R, -1, *x.shape[2:])

  new_BR = jnp.cumsum(any_BR, axis=1, dtype=jnp.int32)
  before_BR = jnp.pad(new_BR[:, :-1], ((0, 0), (1, 0)))
  count = lambda new: jnp.minimum(state.count[:, None] + new, slots)
  return (Windows(S=jax.tree.map(line, all_S), mean=line(all_mean), count=count(before_BR), slots=slots,
                  parts=R),
          State(jax.tree.map(lambda x: x[:, R:], all_S), all_mean[:, R:], count(new_BR[:, -1:])[:, 0]))
