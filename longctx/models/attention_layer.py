"""Self-attention with a key-value cache as its state.

A call attends to the cached keys and to its own, each with the mask as an interval of key indices,
and merges the two by their log-sum-exp; then it writes its keys. The cache is a ring of slots: the
key of index i stands in slot i mod S. A layer with a window needs window - 1 slots, however long the
document; a layer without one needs a slot for every token. Where a mesh cuts the sequence, it cuts
the cache too: large caches deal their slots out like cards, so that all devices have equal parts of
a document however long it is so far.
Sources: RoPE arXiv:2104.09864, GQA arXiv:2305.13245, qk-norm arXiv:2010.04245.
Held by: tests/test_models.py, tests/test_sharded_cache.py.

B batch  T tokens  S slots  N query heads  K kv heads  H head dim  D model  W window
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longctx.attention import attend, attention, merge
from longctx.models.context import Context
from longctx.models.layers import RMSNorm, linear, normal, param, rotate
from longctx.parallel.mesh import Layout, constrain
from longctx.parallel.sequence import write_slots


class Cache(NamedTuple):
  """Keys (already turned by their positions) and values; batch first."""

  k: jax.Array       # [B, S, K, H]
  v: jax.Array       # [B, S, K, H]
  index: jax.Array   # int32 [B, S]: which token's key stands here; -1 for none


LANES = 64   # into so many hands are slots dealt, whatever the mesh: a saved cache fits any
# By reversed bits: any power of two of devices, each with neighbouring hands, get slots in turn.
TURNS = np.array([int(f'{i:06b}'[::-1], 2) for i in range(LANES)])


def even_slots(slots: int) -> int:
  """So many, or, of a large cache, a little more, so that devices can share it evenly."""
  return slots if slots < 16 * LANES else -(-slots // LANES) * LANES


def empty_cache(batch_size: int, slots: int, num_kv_heads: int, head_dim: int,
                dtype: jnp.dtype) -> Cache:
  shape = (batch_size, slots, num_kv_heads, head_dim)
  return cut_slots(Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype),
                         jnp.full((batch_size, slots), -1, jnp.int32)))


def cut_slots(cache: Cache) -> Cache:
  """The cache, each device with its part of the slots under the current layout."""
  kv = lambda x: constrain(x, 'batch', 'slots', 'kv_heads', None)
  return Cache(kv(cache.k), kv(cache.v), constrain(cache.index, 'batch', 'slots'))


def shardings(layout: Layout, state: Any) -> Any:
  """Where a model's state stands: caches by their slots and kv heads, everything by rows."""
  def one(x):
    if not isinstance(x, Cache):
      return layout.sharding('batch')
    kv = layout.sharding('batch', 'slots', 'kv_heads', None, shape=x.k.shape)
    return Cache(kv, kv, layout.sharding('batch', 'slots', shape=x.index.shape))
  return jax.tree.map(one, state, is_leaf=lambda x: isinstance(x, Cache))


def place_of(slot: Any, slots: int) -> Any:
  """Where in the arrays a slot stands: in turn in one of LANES parts, each far from the last."""
  if slots % LANES:
    return slot
  turns = TURNS if isinstance(slot, np.ndarray) else jnp.asarray(TURNS)
  return turns[slot % LANES] * (slots // LANES) + slot // LANES


def write(cache: Cache, k_BTKH: jax.Array, v_BTKH: jax.Array, index_BT: jax.Array) -> Cache:
  """The cache after these keys; of two that want one slot the later stays, padding (-1) none."""
  slots = cache.index.shape[1]
  if slots == 0:
    return cache
  newest_B1 = index_BT.max(axis=1, keepdims=True)
  stays_BT = (index_BT >= 0) & (index_BT > newest_B1 - slots)
  place_BT = jnp.where(stays_BT, place_of(index_BT % slots, slots), slots)   # S: dropped
  return cut_slots(Cache(write_slots(cache.k, k_BTKH, place_BT),
                         write_slots(cache.v, v_BTKH, place_BT),
                         write_slots(cache.index, index_BT, place_BT)))


def rebase(cache: Cache, less_B: jax.Array, shift: int) -> Cache:
  """The cache after its row's indices became less by less_B, each 0 or `shift`.

  What falls below 0 is far behind every window. The key of index i stays in slot i mod S.
  """
  slots, less_B1 = cache.index.shape[1], less_B[:, None]
  index_BS = jnp.where(cache.index < less_B1, -1, cache.index - less_B1)
  cache = cache._replace(index=index_BS)
  if slots == 0 or shift % slots == 0:
    return cache
  order = np.arange(slots)
  source = np.empty(slots, int)   # place -> the place that what stands there comes from
  source[place_of(order, slots)] = place_of((order + shift) % slots, slots)
  turn = lambda x: jnp.where(less_B.reshape(-1, *[1] * (x.ndim - 1)) > 0, x[:, source], x)
  return Cache(*map(turn, cache))


class Attention(nnx.Module):
  """Grouped-query self-attention; `window` = 0 sees the whole document."""

  def __init__(self, *, dim: int, num_heads: int, num_kv_heads: int, head_dim: int,
               qk_norm: bool, norm_epsilon: float, implementation: str, std: float,
               out_std: float, rngs: nnx.Rngs):
    self.head_dim = head_dim
    self.implementation = implementation
    self.w_q = param(rngs, normal(std), (dim, num_heads, head_dim), ('embed', 'heads', None))
    self.w_kv = param(rngs, normal(std), (dim, 2, num_kv_heads, head_dim),
                      ('embed', None, 'kv_heads', None))
    self.w_out = param(rngs, normal(out_std), (num_heads, head_dim, dim),
                       ('heads', None, 'embed'))
    self.q_norm = RMSNorm(head_dim, norm_epsilon, rngs=rngs) if qk_norm else None
    self.k_norm = RMSNorm(head_dim, norm_epsilon, rngs=rngs) if qk_norm else None

  def heads(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q, k, v of each head, normed where the config says so, not yet turned by their positions."""
    return self.queries(x_BTD), *self.keys(x_BTD)

  def queries(self, x_BTD: jax.Array) -> jax.Array:
    q_BTNH = split_heads(x_BTD, self.w_q.get_value())
    return q_BTNH if self.q_norm is None else self.q_norm(q_BTNH)

  def keys(self, x_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """k and v, of the same tokens or of others: what is attended to."""
    w_kv = self.w_kv.get_value()
    k_BSKH, v_BSKH = split_heads(x_BSD, w_kv[:, 0]), split_heads(x_BSD, w_kv[:, 1])
    return k_BSKH if self.k_norm is None else self.k_norm(k_BSKH), v_BSKH

  def merged(self, out_BTNH: jax.Array) -> jax.Array:
    """What all heads say, back in the residual's width."""
    w_out = self.w_out.get_value()
    y_BTD = linear(out_BTNH.reshape(*out_BTNH.shape[:2], -1), w_out.reshape(-1, w_out.shape[-1]))
    return constrain(y_BTD, 'batch', 'length', None)

  def __call__(self, x_BTD: jax.Array, cache: Cache | None, context: Context, window: int
               ) -> tuple[jax.Array, Cache | None]:
    q_BTNH, k_BTKH, v_BTKH = self.heads(x_BTD)
    if context.angles is not None:
      angles = context.angles
      q_BTNH, k_BTKH = rotate(q_BTNH, angles), rotate(k_BTKH, angles)
    q_BTNH, k_BTKH, v_BTKH = cut_heads(q_BTNH, k_BTKH, v_BTKH)

    mask = context.mask(window)
    settings = dict(scale=self.head_dim ** -0.5, implementation=self.implementation,
                    bias=context.bias)
    if cache is None:
      out_BTNH = attention(q_BTNH, k_BTKH, v_BTKH, mask, **settings)
    else:
      here = attend(q_BTNH, k_BTKH, v_BTKH, mask, **settings)
      if cache.index.shape[1]:
        past = dataclasses.replace(mask, key_index_BS=cache.index, kind='any')
        here = merge(attend(q_BTNH, cache.k, cache.v, past, cached=True, **settings), here)
      cache = write(cache, k_BTKH, v_BTKH, context.index_BT)
      out_BTNH = here[0]
    return self.merged(out_BTNH), cache


def split_heads(x_BTD: jax.Array, w_DNH: jax.Array) -> jax.Array:
  y = linear(x_BTD, w_DNH.reshape(w_DNH.shape[0], -1))
  return y.reshape(*x_BTD.shape[:2], *w_DNH.shape[1:])


def cut_heads(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array
              ) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The three, each device with its rows, tokens and heads."""
  kv = lambda x: constrain(x, 'batch', 'length', 'kv_heads', None)
  return constrain(q_BTNH, 'batch', 'length', 'heads', None), kv(k_BSKH), kv(v_BSKH)
