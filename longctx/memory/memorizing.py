"""The memory of the Memorizing Transformer: the last M keys and values of each head, the best few read.

  read    the `top` keys with the largest k . q of those kept, s_i = scale k_i . q, q and k of length 1
          out = sum_i softmax(s)_i v_i                  0 where nothing is kept
  write   the oldest fall out; no gradient enters what is kept

The memory is a ring of slots: token number n stands in slot n mod M, and a write touches the slots it
fills and no other; in a program that reads too, where the reading is over first (`when_read`). A counter says
which slots hold a token; no other is ever met. Keys are searched a block at a time, as many blocks as are
filled, so that scores [C, M] never exist; what is found is scored again for the gradient of queries and scale.
Numbers a head: C (block + top H), whatever M is.

The memories before segments that follow each other are windows of one array, M tokens and those of the
segments: all are read with M + S C tokens in memory, not S M.

Source: Wu et al. 2022, arXiv:2203.08913, section 3.
Held by: tests/test_memorizing.py (loops in NumPy; all at once == one by one).

B batch  S segments, or keys written at once  C queries of one  L slots of an array  M slots of the memory
N query heads  K kv heads  Q = C N/K  H head dim  P places of the best
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from longctx import watch

NEG_INF = -1e30   # finite: a query that finds nothing gives 0, not NaN
BLOCK = 1024      # keys that are met at once


class State(NamedTuple):
  """Batch first; k and v in the type of the model's arithmetic."""

  k: jax.Array         # [B, M, K, H], of length 1 each
  v: jax.Array         # [B, M, K, H]
  written: jax.Array   # int32 [B]: tokens written so far, less a multiple of M once it is past 2 M


def empty(batch_size: int, slots: int, kv_heads: int, head_dim: int, dtype: jnp.dtype) -> State:
  shape = (batch_size, slots, kv_heads, head_dim)
  return State(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch_size,), jnp.int32))


def unit(x: jax.Array) -> jax.Array:
  """x / |x| over the last dim, in float32; 0 for 0."""
  x = x.astype(jnp.promote_types(jnp.float32, x.dtype))
  return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-6)


def write(state: State, k_BSKH: jax.Array, v_BSKH: jax.Array, valid_BS: jax.Array) -> State:
  """The memory after the valid ones of these tokens."""
  M = state.k.shape[1]
  rank_BS = jnp.cumsum(valid_BS, axis=1, dtype=jnp.int32) - 1
  count_B1 = valid_BS.sum(1, keepdims=True, dtype=jnp.int32)
  stays_BS = valid_BS & (rank_BS >= count_B1 - M)   # of two that want one slot the later
  slot_BS = jnp.where(stays_BS, (state.written[:, None] + rank_BS) % M, M)   # M: dropped
  rows_B1 = jnp.arange(len(slot_BS))[:, None]
  # Stopped here too, though `read` stops all: a scan over segments need not carry tangents along.
  put = lambda old, new: old.at[rows_B1, slot_BS].set(
      jax.lax.stop_gradient(new).astype(old.dtype), mode='drop')
  written = state.written + count_B1[:, 0]
  return State(put(state.k, unit(k_BSKH)), put(state.v, v_BSKH),
               jnp.where(written >= 2 * M, written % M + M, written))


def when_read(state: State, out_BCNH: jax.Array) -> State:
  """The same state, for a write that waits until `out` was read from it: where a compiler sees no order
  between the two it copies all that is kept, and writes into the copy."""
  always_B = jnp.isnan(out_BCNH).sum((1, 2, 3)) <= out_BCNH[0].size   # true, and no compiler knows it
  return state._replace(written=jnp.where(always_B, state.written, 0))


def clear(state: State, which_B: jax.Array, block: int = BLOCK) -> State:
  """0 in all slots of these rows, a block at a time; nothing is touched where there are no such rows."""
  M = state.k.shape[1]
  block = min(block, M)
  which_B = which_B & (state.written >= 0)   # known when `written` is: see when_read

  def one(i, arrays):
    first = jnp.minimum(i * block, M - block)   # the last block ends with the array
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, first, block, axis=1)
    put = lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, first, axis=1)
    return tuple(put(x, jnp.where(which_B[:, None, None, None], 0, cut(x))) for x in arrays)

  k, v = jax.lax.fori_loop(0, jnp.where(which_B.any(), -(-M // block), 0), one,
                           jax.lax.stop_gradient((state.k, state.v)))
  return state._replace(k=k, v=v)


@functools.partial(jax.tree_util.register_dataclass, data_fields=('k', 'v', 'filled'),
                   meta_fields=('slots', 'step', 'parts'))
@dataclasses.dataclass(frozen=True, kw_only=True)
class Windows:
  """The memories before `parts` segments of each row: its tokens oldest first, cut into as many pieces
  as there are segments, so that rows and segments may be one dim as those of other memories may."""

  k: jax.Array        # [B, S, L / S, K, H]
  v: jax.Array
  filled: jax.Array   # int32 [B, S]: tokens in each memory
  slots: int          # M: the memory before segment s ends with token M + s step
  step: int
  parts: int


def before(state: State, k_BSCKH: jax.Array, v_BSCKH: jax.Array, valid_BSC: jax.Array
           ) -> tuple[Windows, State]:
  """(the memories before each segment, the memory after the last)."""
  B, S, C = valid_BSC.shape
  M = state.k.shape[1]
  flat = lambda x: x.reshape(B, S * C, *x.shape[3:])
  k, v, valid_BL = unit(flat(k_BSCKH)), flat(v_BSCKH), flat(valid_BSC)
  oldest_first_BM = (state.written[:, None] + jnp.arange(M)) % M
  rows_B1 = jnp.arange(B)[:, None]
  length = -(-(M + (S - 1) * C) // S) * S

  def line(old, new):
    new = jax.lax.stop_gradient(new).astype(old.dtype)
    x = jnp.concatenate([old[rows_B1, oldest_first_BM], new], axis=1)[:, :length]
    x = jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))
    return x.reshape(B, S, -1, *x.shape[2:])

  new_BS = valid_BSC.sum(2, dtype=jnp.int32)
  filled_BS = jnp.minimum(state.written, M)[:, None] + jnp.cumsum(new_BS, axis=1) - new_BS
  filled_BS = jnp.minimum(filled_BS, M)
  windows = Windows(k=line(state.k, k), v=line(state.v, v), filled=filled_BS, slots=M, step=C, parts=S)
  return windows, write(state, flat(k_BSCKH), v, valid_BL)


def search(k_BLKH: jax.Array, low_B: jax.Array, high_B: jax.Array, q_BKQH: jax.Array, top: int, *,
           approximate: bool, block: int) -> tuple[jax.Array, jax.Array]:
  """(slots of the best keys from slot `low` to below `high` [B, K, Q, top], whether there is such a
  key)."""
  L = k_BLKH.shape[1]
  block = min(block, L)
  # The recall meant is that of all L keys: of one block alone, every key would have to be sorted.
  best = functools.partial(jax.lax.approx_max_k, reduction_input_size_override=L,
                           aggregate_to_topk=False) if approximate else jax.lax.top_k

  def meet(i, found):
    first = jnp.minimum(i * block, L - block)   # the last block ends with the array
    k_BSKH = jax.lax.dynamic_slice_in_dim(k_BLKH, first, block, axis=1)
    scores = jnp.einsum('bkqh,bskh->bkqs', q_BKQH, k_BSKH, preferred_element_type=found[0].dtype)
    slot_S = first + jnp.arange(block)
    new_BS = (slot_S >= i * block) & (slot_S >= low_B[:, None]) & (slot_S < high_B[:, None])
    scores, at = best(jnp.where(new_BS[:, None, None], scores, NEG_INF), min(top, block))
    scores = jnp.concatenate([found[0], scores], axis=-1)
    slots = jnp.concatenate([found[1], first + at], axis=-1)
    scores, at = jax.lax.top_k(scores, top)
    return scores, jnp.take_along_axis(slots, at, axis=-1)

  shape = (*q_BKQH.shape[:3], top)
  start = jnp.full(shape, NEG_INF, jnp.promote_types(jnp.float32, q_BKQH.dtype))
  scores, slots = jax.lax.fori_loop(low_B.min() // block, -(-high_B.max() // block), meet,
                                    (start, jnp.zeros(shape, jnp.int32)))
  return slots, scores > NEG_INF / 2


def weigh(k_BLKH: jax.Array, v_BLKH: jax.Array, slots_BKQP: jax.Array, there_BKQP: jax.Array,
          q_BKQH: jax.Array, scale_N: jax.Array) -> jax.Array:
  """What each query makes of the keys found, [B, K, Q, H]."""
  B, K, Q, _ = q_BKQH.shape
  rows, heads = jnp.arange(B)[:, None, None, None], jnp.arange(K)[:, None, None]
  # Slots without a token may hold anything, what a step that failed has left included.
  k, v = (jnp.where(there_BKQP[..., None], x[rows, slots_BKQP, heads], 0).astype(q_BKQH.dtype)
          for x in (k_BLKH, v_BLKH))
  scale_KQ1 = jnp.tile(scale_N.reshape(K, -1), (1, Q * K // len(scale_N)))[..., None]
  scores = scale_KQ1 * jnp.einsum('bkqh,bkqph->bkqp', q_BKQH, k)
  scores = jnp.where(there_BKQP, scores, NEG_INF)
  weights = jnp.where(there_BKQP, jnp.exp(scores - scores.max(-1, keepdims=True)), 0.0)
  total = weights.sum(-1, keepdims=True)
  weights /= jnp.where(total > 0, total, 1.0)
  watch.tell('memorizing', slots_BKQP=slots_BKQP, weights_BKQP=weights)
  return jnp.einsum('bkqp,bkqph->bkqh', weights, v)


def read(memory: State | Windows, q_BCNH: jax.Array, scale_N: jax.Array, top: int, *,
         approximate: bool, block: int = BLOCK) -> jax.Array:
  """[B, C, N, H] float32; the heads of a group read their kv head's memory.

  With Windows, B is of rows and segments.
  """
  B, C, N, H = q_BCNH.shape
  K = memory.k.shape[-2]
  q_BKQH = jnp.moveaxis(unit(q_BCNH).reshape(B, C, K, N // K, H), 1, 2).reshape(B, K, -1, H)
  memory = jax.lax.stop_gradient(memory)
  searched = jax.lax.stop_gradient(q_BKQH).astype(memory.k.dtype)
  find = functools.partial(search, top=top, approximate=approximate, block=block)
  if isinstance(memory, State):
    low_B = jnp.zeros_like(memory.written)
    found = find(memory.k, low_B, jnp.minimum(memory.written, memory.k.shape[1]), searched)
    out_BKQH = weigh(memory.k, memory.v, *found, q_BKQH, scale_N)
  else:
    S = memory.parts
    by_segment = lambda x: jnp.moveaxis(x.reshape(B // S, S, *x.shape[1:]), 1, 0)
    k, v = (x.reshape(B // S, -1, K, H) for x in (memory.k, memory.v))
    high_S = memory.slots + memory.step * jnp.arange(S, dtype=jnp.int32)
    high_SB = jnp.broadcast_to(high_S[:, None], (S, B // S))
    found = jax.lax.map(lambda x: find(k, *x), (high_SB - by_segment(memory.filled), high_SB,
                                                by_segment(searched)))
    # Made again for the backward pass: the keys and values found are many times the queries.
    weigh_one = jax.checkpoint(lambda x: weigh(k, v, *x, scale_N))
    out_BKQH = jnp.moveaxis(jax.lax.map(weigh_one, (*found, by_segment(q_BKQH))), 0, 1)
  return jnp.moveaxis(out_BKQH.reshape(B, K, C, N // K, H), 2, 1).reshape(B, C, N, H)
