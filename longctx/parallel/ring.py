"""Ring attention: the sequence is cut over a mesh axis and the keys travel round it.

Each device holds a part of the tokens, with their indices. At every hop it attends from its queries
to the keys it holds, merges, and hands the keys on; the masks are intervals of indices, so any
layout of the tokens is exact, and tiles that nobody sees are skipped by the kernel. A window that
reaches h devices needs h hops and no more are made.

The backward pass sends the keys round once more, and the sums of their gradients behind them, which
jump home at the end: with h hops, h sends of keys and h of gradients. The transfers are hidden: the
hops stand in a scan (memory does not grow with the ring), the last is peeled (no send that nobody
needs), and half of the local work is kept for the end, to hide the way home. Partial results and
gradients are float32; the keys travel in their own type.

Sources: Liu et al. 2023, arXiv:2310.01889; backward from the global lse: Dao et al. 2022.
Held by: tests/test_ring.py (values, gradients, hops, bytes, memory), tests/test_ring_tpu.py.

B batch  T queries of this device  S keys of a device  N query heads  K kv heads  H head dim
"""

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from longctx.parallel.merge import merge


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ring:
  """Who sends to whom: `size` devices a ring, `stride` apart on `axis`; `hops` of size - 1 needed.

  `both_ways` halves what a link carries: half of the kv heads go the other way round, or half of
  the keys where the heads are odd in number.
  """

  axis: str
  size: int
  hops: int
  stride: int = 1
  both_ways: bool = False

  def shift(self, tree: Any, steps: int) -> Any:
    """Everybody's `tree`, from the device that many places back."""
    count = self.size * self.stride
    step = steps * self.stride
    table = [(i, (i + step) % count) for i in range(count)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis, table), tree)


class Lane(NamedTuple):
  """What travels one way: a part of the kv heads (with their query heads) or of the keys."""

  step: int
  heads: slice
  kv_heads: slice
  keys: slice


ALL = slice(None)


def lanes_of(ring: Ring, num_heads: int, num_kv_heads: int, num_keys: int) -> list[Lane]:
  if not ring.both_ways or ring.size == 1:
    return [Lane(1, ALL, ALL, ALL)]
  if num_kv_heads % 2 == 0:
    n, k = num_heads // 2, num_kv_heads // 2
    return [Lane(1, slice(0, n), slice(0, k), ALL), Lane(-1, slice(n, None), slice(k, None), ALL)]
  half = num_keys // 2
  return [Lane(1, ALL, ALL, slice(0, half)), Lane(-1, ALL, ALL, slice(half, None))]


def _parts(lanes: list[Lane], k: jax.Array, v: jax.Array, index: jax.Array) -> list[tuple]:
  """What each lane carries: (k, v, index)."""
  cut = lambda x, lane: x[:, lane.keys, lane.kv_heads]
  return [(cut(k, lane), cut(v, lane), index[:, lane.keys]) for lane in lanes]


def _against(mask: Any, index: jax.Array) -> Any:
  """The mask of this device's queries against keys from elsewhere: nothing is known beforehand."""
  return dataclasses.replace(mask, key_index_BS=index, kind='any')


def _heads_of(options: Any, lane: Lane) -> Any:
  return jax.tree.map(lambda x: x[lane.heads], options)   # a bias has the heads in front


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def ring_attention(kernel: ModuleType, ring: Ring, lse_gradient: bool, q: jax.Array,
                   k: jax.Array, v: jax.Array, mask: Any, options: Any) -> tuple[jax.Array, jax.Array]:
  """(out_BTNH, lse_BTN) of this device's queries over the keys of the whole ring.

  Runs under `shard_map`; arguments are this device's parts. `kernel` has forward and backward.
  """
  return _forward(kernel, ring, lse_gradient, q, k, v, mask, options)[0]


def _forward(kernel, ring, lse_gradient, q, k, v, mask, options):
  lanes = lanes_of(ring, q.shape[2], k.shape[2], k.shape[1])
  hand_on = lambda parts: [ring.shift(p, lane.step) for p, lane in zip(parts, lanes)]

  def attend(parts, result):
    out, lse = result
    for (k, v, index), lane in zip(parts, lanes):
      part = kernel.forward(q[:, :, lane.heads], k, v, _against(mask, index),
                            _heads_of(options, lane))
      joined = merge((out[:, :, lane.heads], lse[:, :, lane.heads]), part)
      out, lse = (_put(whole, new, lane.heads) for whole, new in zip((out, lse), joined))
    return out, lse

  coming = hand_on(_parts(lanes, k, v, mask.keys_BS)) if ring.hops else None
  result = kernel.forward(q, k, v, mask, options)
  if ring.hops:
    def hop(carry, _):
      parts, result = carry
      return (hand_on(parts), attend(parts, result)), None
    if ring.hops > 1:
      (coming, result), _ = jax.lax.scan(hop, (coming, result), None, length=ring.hops - 1)
    result = attend(coming, result)
  return result, (q, k, v, mask, options, *result)


def _put(whole: jax.Array, part: jax.Array, heads: slice) -> jax.Array:
  return part if heads == ALL else whole.at[:, :, heads].set(part)


def _backward(kernel, ring, lse_gradient, residuals, cotangents):
  q, k, v, mask, options, out, lse = residuals
  dout, dlse = cotangents
  # Else XLA keeps the forward pass's travelling keys for this one: memory would grow with the ring.
  k, v = jax.lax.optimization_barrier((k, v))
  lanes = lanes_of(ring, q.shape[2], k.shape[2], k.shape[1])
  hand_on = lambda parts: [ring.shift(p, lane.step) for p, lane in zip(parts, lanes)]

  def gradients(queries: slice, heads: slice, k, v, mask, options):
    """(dq, dk, dv, dbias) from some of the queries and heads."""
    at = lambda x: x[:, queries, heads]
    return kernel.backward(at(q), k, v, _of_queries(mask, queries), options, at(out), at(lse),
                           at(dout), at(dlse) if lse_gradient else None)

  def attend(parts, dq, dbias):
    """Adds to dq and dbias; returns each lane's (dk, dv)."""
    sums = []
    for (k, v, index), lane in zip(parts, lanes):
      dq_part, dk, dv, dbias_part = gradients(ALL, lane.heads, k, v, _against(mask, index),
                                              _heads_of(options, lane))
      dq = _put(dq, dq[:, :, lane.heads] + dq_part, lane.heads)
      dbias = jax.tree.map(lambda a, b: a.at[lane.heads].add(b), dbias, dbias_part)
      sums.append((dk, dv))
    return sums, dq, dbias

  if not ring.hops:
    dq, dk, dv, dbias = gradients(ALL, ALL, k, v, mask, options)
    return _finish(q, k, v, options, dq, dk, dv, dbias)

  half = q.shape[1] // 2
  first, second = slice(0, half), slice(half, None)
  coming = hand_on(_parts(lanes, k, v, mask.keys_BS))
  local = gradients(first, ALL, k, v, mask, options)   # hides the first hop
  dq, dk, dv, dbias = local
  dq = jnp.pad(dq, ((0, 0), (0, q.shape[1] - half), (0, 0), (0, 0)))

  if ring.hops > 1:
    parts, coming = coming, hand_on(coming)
    sums, dq, dbias = attend(parts, dq, dbias)
    def hop(carry, _):
      parts, sums, dq, dbias = carry
      coming, arrived = hand_on(parts), hand_on(sums)
      mine, dq, dbias = attend(parts, dq, dbias)
      return (coming, jax.tree.map(jnp.add, arrived, mine), dq, dbias), None
    if ring.hops > 2:
      (coming, sums, dq, dbias), _ = jax.lax.scan(
          hop, (coming, sums, dq, dbias), None, length=ring.hops - 2)
    arrived = hand_on(sums)
    mine, dq, dbias = attend(coming, dq, dbias)
    sums = jax.tree.map(jnp.add, arrived, mine)
  else:
    sums, dq, dbias = attend(coming, dq, dbias)

  # The second half of the local work may not begin before the sums are on their way home.
  q, sums = jax.lax.optimization_barrier((q, sums))
  home = [ring.shift(s, -ring.hops * lane.step) for s, lane in zip(sums, lanes)]
  dq_part, dk_part, dv_part, dbias_part = gradients(second, ALL, k, v, mask, options)
  dq = dq.at[:, second].add(dq_part)
  dk, dv = dk + dk_part, dv + dv_part
  for (dk_lane, dv_lane), lane in zip(home, lanes):
    where = (ALL, lane.keys, lane.kv_heads)
    dk, dv = dk.at[where].add(dk_lane), dv.at[where].add(dv_lane)
  return _finish(q, k, v, options, dq, dk, dv, jax.tree.map(jnp.add, dbias, dbias_part))


def _of_queries(mask: Any, queries: slice) -> Any:
  """The mask of some of the queries against the same keys."""
  if queries == ALL:
    return mask
  cut = lambda x: None if x is None else x[:, queries]
  return dataclasses.replace(
      mask, start_BT=cut(mask.start_BT), end_BT=cut(mask.end_BT), index_BT=cut(mask.index_BT),
      sink_start_BT=cut(mask.sink_start_BT), sink_end_BT=cut(mask.sink_end_BT),
      key_index_BS=mask.keys_BS, kind='full' if mask.kind == 'full' else 'any')


def _finish(q, k, v, options, dq, dk, dv, dbias):
  doptions = dataclasses.replace(
      options, bias=jax.tree.map(lambda x, d: d.astype(x.dtype), options.bias, dbias))
  return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, doptions


ring_attention.defvjp(_forward, _backward)


def hops_needed(device_of_unit: Callable, num_units: int, unit: int, size: int, reach: int) -> int:
  """Hops after which every query has met every key that a window of `reach` tokens allows.

  `device_of_unit(u)`: the ring place of the u-th run of `unit` tokens. 0 reach: all size - 1.
  """
  if not reach:
    return size - 1
  back = min(num_units, -(-(reach - 1) // unit)) if reach > 1 else 0
  needed = 0
  for u in range(num_units):
    for earlier in range(max(0, u - back), u):
      needed = max(needed, (device_of_unit(u) - device_of_unit(earlier)) % size)
  return needed
