"""Masks as data: the keys that a query may see are one interval of token indices.

Causal masks, packed documents, sliding windows, chunks, prefixes and padding are all of this form,
and so are their intersections. Each token carries its own index, so a mask means the same however
the tokens are laid out over devices, and a kernel finds what it may skip by comparing numbers.
A second interval, seen besides the first, holds attention sinks (StreamingLLM, arXiv:2309.17453).
Held by: tests/test_intervals.py.

B batch  T queries  S keys
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

KINDS = ('any', 'ordered', 'causal', 'full')


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=('start_BT', 'end_BT', 'index_BT', 'key_index_BS', 'sink_start_BT', 'sink_end_BT'),
    meta_fields=('kind', 'reach', 'order'))
@dataclasses.dataclass(frozen=True, kw_only=True)
class Intervals:
  """Query t of row b sees key s iff start <= key_index[b, s] < end, or likewise for the sinks.

  `kind` says what is known, of slots, before the arrays are: 'causal' (T = S, query slot t sees key
  slots 0 to t, or the last `reach` of them), 'ordered' (it sees some slot up to t, and all from
  there to t: packed documents, chunks), 'full' (every query sees every key) or 'any'. `reach` > 0
  promises that no query sees a key `reach` or more slots before itself, nor one after (a window),
  sinks excepted, where the slots are put back into the order of their tokens. Both only save work.
  `order` says how the tokens stand over devices: see parallel/layouts.py.
  """

  start_BT: jax.Array
  end_BT: jax.Array
  index_BT: jax.Array                       # the queries' own indices; -1 for padding
  key_index_BS: jax.Array | None = None     # None: the keys are the queries' own tokens
  sink_start_BT: jax.Array | None = None
  sink_end_BT: jax.Array | None = None
  kind: str = 'any'
  reach: int = 0
  order: str = 'contiguous'

  @property
  def keys_BS(self) -> jax.Array:
    """Indices of the keys."""
    return self.index_BT if self.key_index_BS is None else self.key_index_BS

  @property
  def has_sinks(self) -> bool:
    return self.sink_start_BT is not None


@functools.partial(jax.tree_util.register_dataclass, data_fields=('bias',),
                   meta_fields=('scale', 'softcap'))
@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """How a score is made of a query and a key: softcap * tanh(scale * q.k / softcap) + bias."""

  scale: float
  softcap: float = 0.0     # 0: no cap (Gemma 2, arXiv:2408.00118, caps at 50)
  bias: Any = None         # a pytree with block(q_index, k_index): see attention/biases.py


def _index(batch: int, length: int) -> jax.Array:
  return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))


def causal(batch: int, length: int) -> Intervals:
  """Each token sees itself and all before it."""
  index_BT = _index(batch, length)
  return Intervals(start_BT=jnp.zeros_like(index_BT), end_BT=index_BT + 1, index_BT=index_BT,
                   kind='causal')


def bidirectional(batch: int, length: int, num_keys: int | None = None) -> Intervals:
  """Every query sees every key; with `num_keys`, cross-attention to so many keys."""
  index_BT = _index(batch, length)
  key_index_BS = None if num_keys is None else _index(batch, num_keys)
  return Intervals(start_BT=jnp.zeros_like(index_BT),
                   end_BT=jnp.full_like(index_BT, length if num_keys is None else num_keys),
                   index_BT=index_BT, key_index_BS=key_index_BS, kind='full')


def packed(segment_ids_BT: jax.Array, *, causal: bool = True) -> Intervals:
  """Documents in a row: a token sees its own, up to itself (or all of it if not `causal`).

  A document goes on while the segment id stays the same.
  """
  index_BT = _index(*segment_ids_BT.shape)
  first_B1 = jnp.ones((segment_ids_BT.shape[0], 1), bool)
  begins_BT = jnp.concatenate([first_B1, segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]], axis=1)
  start_BT = jax.lax.cummax(jnp.where(begins_BT, index_BT, 0), axis=1)
  if causal:
    return Intervals(start_BT=start_BT, end_BT=index_BT + 1, index_BT=index_BT, kind='ordered')
  ends_BT = jnp.concatenate([begins_BT[:, 1:], first_B1], axis=1)
  length = index_BT.shape[1]
  end_BT = jax.lax.cummin(jnp.where(ends_BT, index_BT + 1, length), axis=1, reverse=True)
  return Intervals(start_BT=start_BT, end_BT=end_BT, index_BT=index_BT)


def sliding_window(batch: int, length: int, window: int) -> Intervals:
  """Each token sees itself and the window - 1 before it."""
  if window < 1:
    raise ValueError(f'window={window}: must be at least 1 (a token sees itself)')
  index_BT = _index(batch, length)
  return Intervals(start_BT=jnp.maximum(index_BT + 1 - window, 0), end_BT=index_BT + 1,
                   index_BT=index_BT, kind='causal', reach=window)


def chunked(batch: int, length: int, chunk: int) -> Intervals:
  """Causal within chunks of so many tokens, nothing across them."""
  if chunk < 1:
    raise ValueError(f'chunk={chunk}: must be at least 1')
  index_BT = _index(batch, length)
  return Intervals(start_BT=index_BT // chunk * chunk, end_BT=index_BT + 1, index_BT=index_BT,
                   kind='ordered', reach=chunk)


def prefix_lm(prefix_B: jax.Array, length: int) -> Intervals:
  """Causal, but the first prefix_B[b] tokens of a row see one another whole and are seen by all."""
  index_BT = _index(prefix_B.shape[0], length)
  end_BT = jnp.maximum(index_BT + 1, jnp.minimum(prefix_B, length)[:, None].astype(jnp.int32))
  return Intervals(start_BT=jnp.zeros_like(index_BT), end_BT=end_BT, index_BT=index_BT)


def padding(valid_BT: jax.Array) -> Intervals:
  """Everybody sees everybody, but padding (False) sees nothing and is seen by nobody.

  The padding stands at the end of a row.
  """
  slot_BT = _index(*valid_BT.shape)
  index_BT = jnp.where(valid_BT, slot_BT, -1)
  end_BT = jnp.where(valid_BT, valid_BT.sum(axis=1, keepdims=True, dtype=jnp.int32), 0)
  return Intervals(start_BT=jnp.zeros_like(slot_BT), end_BT=end_BT, index_BT=index_BT)


def intersect(a: Intervals, b: Intervals) -> Intervals:
  """What both masks let a query see. They are of the same tokens; add sinks afterwards."""
  if a.has_sinks or b.has_sinks:
    raise ValueError('intersect: a mask with sinks is two intervals; intersect first, then add '
                     'the sinks with with_sinks')
  if a.start_BT.shape != b.start_BT.shape or (a.key_index_BS is None, a.order) != (
      b.key_index_BS is None, b.order):
    raise ValueError(f'intersect: masks of {a.start_BT.shape} and {b.start_BT.shape} queries, order '
                     f'{a.order!r} and {b.order!r}; both must be of the same queries and keys')
  least = lambda x, y: jnp.minimum(x, y)
  kinds = {a.kind, b.kind} - {'full'}
  kind = ('full' if not kinds else kinds.pop() if len(kinds) == 1
          else 'ordered' if kinds == {'ordered', 'causal'} else 'any')
  return Intervals(
      start_BT=jnp.maximum(a.start_BT, b.start_BT), end_BT=least(a.end_BT, b.end_BT),
      index_BT=least(a.index_BT, b.index_BT),   # -1 where either says padding
      key_index_BS=None if a.key_index_BS is None else least(a.key_index_BS, b.key_index_BS),
      kind=kind, reach=min(a.reach, b.reach) or max(a.reach, b.reach), order=a.order)


def with_sinks(mask: Intervals, count: int, first_BT: jax.Array | None = None) -> Intervals:
  """The mask, and besides it the first `count` tokens of the document (never the future).

  `first_BT` is the index of each query's document's first token; None: index 0.
  """
  if mask.has_sinks:
    raise ValueError('with_sinks: the mask has sinks already')
  first_BT = jnp.zeros_like(mask.start_BT) if first_BT is None else first_BT
  end_BT = jnp.minimum(first_BT + count, mask.end_BT)
  return dataclasses.replace(mask, sink_start_BT=first_BT, kind='any',
                             sink_end_BT=jnp.where(mask.start_BT < mask.end_BT, end_BT, first_BT))


def sees(mask: Intervals) -> jax.Array:
  """[B, T, S] bool: the mask by its definition. Memory T x S."""
  key_B1S = mask.keys_BS[:, None, :]
  within = lambda start_BT, end_BT: (start_BT[..., None] <= key_B1S) & (key_B1S < end_BT[..., None])
  sees_BTS = within(mask.start_BT, mask.end_BT)
  if mask.has_sinks:
    sees_BTS |= within(mask.sink_start_BT, mask.sink_end_BT)
  return sees_BTS
