"""Memory Caching: recurrent memories of past segments, cached, and read by every token beside its own.

A segment's memory begins at 0 and is learned token by token (any recurrence whose state S is a matrix);
after the segment S and the mean of its inputs m are cached, and the oldest of `slots` falls out. Token t
of segment s, S_t and m_t being those of its segment so far:

  residual   y_t = q_t S_t + sum_i q_t S_i                        i: the cached segments
  gated      y_t = g_s q_t S_t + sum_i g_i q_t S_i                g = softmax(<u_t, m_t>, <u_t, m_i> ..)
  selective  as gated, over the token's own segment and the `top` with the largest <u_t, m_i>

Reading a matrix is linear, so that the paper's soup, q_t (g_s S_t + sum_i g_i S_i), is the gated one.
Source: Behrouz et al. 2026, arXiv:2602.24281.
Differs: the cache is bounded; all cached memories are read and those not selected dropped, for a
segment's tokens select different ones.
Held by: tests/test_memory_caching.py.

B batch  C tokens  S slots  R segments  N heads  H head dim  D model
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from longctx import watch
from longctx.recurrence.affine import product


class State(NamedTuple):
  """Batch first, oldest first; float32."""

  S: jax.Array       # [B, S, N, H, H]
  mean: jax.Array    # [B, S, D]
  count: jax.Array   # int32 [B]: how many slots, the last, are filled


def empty(batch_size: int, slots: int, heads: int, head_dim: int, dim: int) -> State:
  return State(jnp.zeros((batch_size, slots, heads, head_dim, head_dim), jnp.float32),
               jnp.zeros((batch_size, slots, dim), jnp.float32), jnp.zeros((batch_size,), jnp.int32))


def there(state: State) -> jax.Array:
  """[B, S] bool: which slots are filled."""
  slots = state.mean.shape[1]
  return jnp.arange(slots) >= slots - state.count[:, None]


def running_mean(x_BCD: jax.Array) -> jax.Array:
  """[B, C, D] float32: of the tokens up to each."""
  C = x_BCD.shape[1]
  return jnp.cumsum(x_BCD.astype(jnp.float32), axis=1) / jnp.arange(1, C + 1)[:, None]


def gates(state: State, u_BCD: jax.Array, mean_BCD: jax.Array, top: int = 0) -> jax.Array:
  """[B, C, S + 1] float32: g of the cached segments and, last, of the token's own. top 0: all slots."""
  cached_BCS = product('bcd,bsd->bcs', u_BCD, state.mean)
  cached_BCS = jnp.where(there(state)[:, None], cached_BCS, -jnp.inf)
  if top and top < state.mean.shape[1]:
    least_BC1 = jax.lax.top_k(jax.lax.stop_gradient(cached_BCS), top)[0][..., -1:]
    cached_BCS = jnp.where(cached_BCS >= least_BC1, cached_BCS, -jnp.inf)
  own_BC1 = (u_BCD.astype(jnp.float32) * mean_BCD).sum(-1, keepdims=True)
  gates_BCS = jax.nn.softmax(jnp.concatenate([cached_BCS, own_BC1], axis=-1))
  watch.tell('memory_caching', gates_BCS=gates_BCS)
  return gates_BCS


def read(state: State, q_BCNH: jax.Array, gates_BCS: jax.Array | None) -> jax.Array:
  """[B, C, N, H] float32: what the cached memories say, weighed by their gates (none: added up)."""
  if gates_BCS is None:   # an empty slot's S is 0
    return product('bcnh,bnhv->bcnv', q_BCNH, state.S.sum(1))
  said_BCSNV = product('bcnh,bsnhv->bcsnv', q_BCNH, state.S)
  return product('bcs,bcsnv->bcnv', gates_BCS, said_BCSNV)


def push(state: State, S_BNHH: jax.Array, mean_BD: jax.Array) -> State:
  """The cache after a segment."""
  return before(state, S_BNHH[:, None], mean_BD[:, None])[1]


def before(state: State, S_BRNHH: jax.Array, mean_BRD: jax.Array) -> tuple[State, State]:
  """(the cache before each of R segments, [B, R, ...]; the one after the last)."""
  R, slots = mean_BRD.shape[1], state.mean.shape[1]
  all_S = jnp.concatenate([state.S, S_BRNHH], axis=1)
  all_mean = jnp.concatenate([state.mean, mean_BRD], axis=1)
  window_RS = jnp.arange(R)[:, None] + jnp.arange(slots)
  count = lambda r: jnp.minimum(state.count[:, None] + r, slots)
  return (State(all_S[:, window_RS], all_mean[:, window_RS], count(jnp.arange(R))),
          State(all_S[:, R:], all_mean[:, R:], count(R)[:, 0]))
