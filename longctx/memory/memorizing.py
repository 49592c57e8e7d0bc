"""The memory of the Memorizing Transformer: the last M keys and values of each head, the best few read.

  read    the `top` keys with the largest k . q of those written, s_i = scale k_i . q, q and k of length 1
          out = sum_i softmax(s)_i v_i                  0 where nothing is written
  write   the oldest fall out; no gradient enters what is kept

The memory is a ring of slots: token number n stands in slot n mod M, and a write touches the slots it
fills and no other. A counter says which slots hold a token; no other is ever met. Keys are searched a
block at a time, as many blocks as are filled, so that scores [C, M] never exist; what is found is scored
again for the gradient of queries and scale. Memory: C (block + top H) numbers a head, whatever M is.

Source: Wu et al. 2022, arXiv:2203.08913, section 3.
Held by: tests/test_memorizing.py (loops in NumPy).

B batch  C queries  S keys written at once  M slots  N query heads  K kv heads  Q = C N/K  H head dim
P places of the best
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

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


def search(state: State, q_BKQH: jax.Array, top: int, *, approximate: bool, block: int = BLOCK
           ) -> tuple[jax.Array, jax.Array]:
  """(slots of the best keys of each query [B, K, Q, top], whether there is such a key)."""
  M = state.k.shape[1]
  block, filled_B = min(block, M), jnp.minimum(state.written, M)
  best = jax.lax.approx_max_k if approximate else jax.lax.top_k

  def meet(i, found):
    first = jnp.minimum(i * block, M - block)   # the last block ends with the memory
    k_BSKH = jax.lax.dynamic_slice_in_dim(state.k, first, block, axis=1)
    scores = jnp.einsum('bkqh,bskh->bkqs', q_BKQH, k_BSKH, preferred_element_type=found[0].dtype)
    slot_S = first + jnp.arange(block)
    new_BS = (slot_S >= i * block) & (slot_S < filled_B[:, None])
    scores, at = best(jnp.where(new_BS[:, None, None], scores, NEG_INF), min(top, block))
    scores = jnp.concatenate([found[0], scores], axis=-1)
    slots = jnp.concatenate([found[1], first + at], axis=-1)
    scores, at = jax.lax.top_k(scores, top)
    return scores, jnp.take_along_axis(slots, at, axis=-1)

  shape = (*q_BKQH.shape[:3], top)
  start = jnp.full(shape, NEG_INF, jnp.promote_types(jnp.float32, q_BKQH.dtype))
  scores, slots = jax.lax.fori_loop(0, -(-filled_B.max() // block), meet,
                                    (start, jnp.zeros(shape, jnp.int32)))
  return slots, scores > NEG_INF / 2


def read(state: State, q_BCNH: jax.Array, scale_N: jax.Array, top: int, *, approximate: bool,
         block: int = BLOCK) -> jax.Array:
  """[B, C, N, H] float32; the heads of a group read their kv head's memory."""
  B, C, N, H = q_BCNH.shape
  K = state.k.shape[2]
  q_BKQH = jnp.moveaxis(unit(q_BCNH).reshape(B, C, K, N // K, H), 1, 2).reshape(B, K, -1, H)
  state = jax.lax.stop_gradient(state)
  slots_BKQP, there_BKQP = search(state, jax.lax.stop_gradient(q_BKQH).astype(state.k.dtype), top,
                                  approximate=approximate, block=block)
  rows, heads = jnp.arange(B)[:, None, None, None], jnp.arange(K)[:, None, None]
  k, v = (x[rows, slots_BKQP, heads].astype(q_BKQH.dtype) for x in (state.k, state.v))
  scale_KQ1 = jnp.broadcast_to(scale_N.reshape(K, 1, N // K), (K, C, N // K)).reshape(K, -1, 1)
  scores = scale_KQ1 * jnp.einsum('bkqh,bkqph->bkqp', q_BKQH, k)
  scores = jnp.where(there_BKQP, scores, NEG_INF)
  weights = jnp.where(there_BKQP, jnp.exp(scores - scores.max(-1, keepdims=True)), 0.0)
  total = weights.sum(-1, keepdims=True)
  out = jnp.einsum('bkqp,bkqph->bkqh', weights / jnp.where(total > 0, total, 1.0), v)
  return jnp.moveaxis(out.reshape(B, K, C, N // K, H), 2, 1).reshape(B, C, N, H)
