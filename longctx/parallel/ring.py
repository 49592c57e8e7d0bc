"""Ring attention: the sequence is cut over a mesh axis and the keys travel round it.

Each device holds a part of the tokens, with their indices. At every hop it attends from its queries
to the keys it holds, merges, and hands the keys on; the masks are intervals of indices, so any
layout of the tokens is exact, and tiles that nobody sees are skipped by the kernel. A window that
reaches h devices needs h hops and no more are made.

The backward pass sends the keys round once more, and the sums of their gradients behind them, which
jump home at the end: with h hops, h sends of keys and h of gradients. Hops stand in a scan, so that
memory does not grow with the ring. Where transfers go on beside the arithmetic they are hidden: the
last hop is peeled (no send that nobody needs), and half of the local work is kept for the end, to
hide the way home. Results and gradients are float32; the keys travel in their own type.

Sources: Liu et al. 2023, arXiv:2310.01889; backward from the global lse: Dao et al. 2022.
Held by: tests/test_ring.py (values, gradients, hops, bytes, memory), tests/test_ring_tpu.py.

B batch  T queries of this device  S keys of a device  N query heads  K kv heads  H head dim
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ring:
  """Who sends to whom: `size` devices a ring, `stride` apart on `axis`; `hops` of size - 1 needed.

  `both_ways` halves what a link carries: half of the kv heads go the other way round, or half of
  the keys where the heads are odd in number. `overlap` spends memory on transfers that go on while
  the device computes; a CPU's do not, and it goes without.
  """

  axis: str
  size: int
  hops: int
  stride: int = 1
  both_ways: bool = False
  overlap: bool = True

  def shift(self, tree: Any, steps: int) -> Any:
    """Everybody's `tree`, from the device that many places back."""
    count = self.size * self.stride
    step = steps * self.stride
    table = [(i, (i + step) % count) for i in range(count)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis, table), tree)


class Group(NamedTuple):
  """Query and kv heads that go together, and how their keys travel: (step, which keys) a lane."""

  heads: slice
  kv_heads: slice
  lanes: tuple[tuple[int, slice], ...]


ALL = slice(None)


def groups_of(ring: Ring, num_heads: int, num_kv_heads: int, num_keys: int) -> list[Group]:
  if not ring.both_ways or ring.size == 1:
    return [Group(ALL, ALL, ((1, ALL),))]
  if num_kv_heads % 2 == 0:
    n, k = num_heads // 2, num_kv_heads // 2
    return [Group(slice(0, n), slice(0, k), ((1, ALL),)),
            Group(slice(n, None), slice(k, None), ((-1, ALL),))]
  if num_keys < 2:
    return [Group(ALL, ALL, ((1, ALL),))]
  half = num_keys // 2
  return [Group(ALL, ALL, ((1, slice(0, half)), (-1, slice(half, None))))]


class _Call:
  """One call of a ring on one device: its arrays in the kernel's form, a list over the groups.

  `queries[g]` stay; `parts[g][lane] = (k, v, index)` travel.
  """

  def __init__(self, kernel: Any, ring: Ring, q: jax.Array, k: jax.Array, v: jax.Array, mask: Any,
               options: Any):
    self.kernel, self.ring, self.mask = kernel, ring, mask
    self.groups = groups_of(ring, q.shape[2], k.shape[2], k.shape[1])
    # A bias has the heads in front.
    self.options = [jax.tree.map(lambda x, g=g: x[g.heads], options) for g in self.groups]
    self.queries, self.parts = [], []
    for group in self.groups:
      lanes = []
      for _, keys in group.lanes:
        q_folded, *kv = kernel.fold(q[:, :, group.heads], k[:, keys, group.kv_heads],
                                    v[:, keys, group.kv_heads])
        lanes.append((*kv, mask.keys_BS[:, keys]))
      self.queries.append(q_folded)
      self.parts.append(lanes)

  def hand_on(self, travelling: list, hops: int = 1) -> list:
    """Each lane's arrays, so many hops further."""
    return [[self.ring.shift(x, hops * step) for (step, _), x in zip(group.lanes, lanes)]
            for group, lanes in zip(self.groups, travelling)]

  def against(self, index: jax.Array, own: bool) -> Any:
    """The mask against keys of these indices. Of keys from elsewhere nothing is known beforehand."""
    known = own and index.shape[1] == self.mask.start_BT.shape[1]   # not of a lane's half
    kind = self.mask.kind if known or self.mask.kind == 'full' else 'any'
    return dataclasses.replace(self.mask, key_index_BS=index, kind=kind)

  def attend(self, parts: list, results: list, own: bool = False) -> list:
    after = []
    for q, options, lanes, result in zip(self.queries, self.options, parts, results):
      for k, v, index in lanes:
        result = self.kernel.add(q, k, v, self.against(index, own), options, result)
      after.append(result)
    return after

  def gradients(self, parts: list, saved: list, sums: list, into: list, own: bool = False,
                only: jax.Array | None = None) -> tuple[list, list]:
    """Adds to `sums` (dq, dbias of each group) and `into` (dk, dv of each lane).

    `only` [T] bool: of these queries; the others see nothing, and their tiles are skipped.
    """
    after, sent = [], []
    for q, options, lanes, kept, (dq, dbias), before in zip(
        self.queries, self.options, parts, saved, sums, into):
      new = []
      for (k, v, index), (dk, dv) in zip(lanes, before):
        mask = self.against(index, own)
        if only is not None:
          mask = _of_queries(mask, only)
        dq, dk, dv, dbias = self.kernel.add_gradients(
            q, k, v, mask, options, kept, (dq, dk, dv, dbias))
        new.append((dk, dv))
      after.append((dq, dbias))
      sent.append(new)
    return after, sent

  def no_sums(self) -> list:
    return [[self.kernel.no_dkv(k, v) for k, v, _ in lanes] for lanes in self.parts]


def _of_queries(mask: Any, only_T: jax.Array) -> Any:
  """The mask with all other queries blind."""
  blind = lambda start, end: None if start is None else jnp.where(only_T, end, start)
  return dataclasses.replace(
      mask, end_BT=blind(mask.start_BT, mask.end_BT), kind='any',
      sink_end_BT=blind(mask.sink_start_BT, mask.sink_end_BT))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def ring_attention(kernel: Any, ring: Ring, lse_gradient: bool, q: jax.Array,
                   k: jax.Array, v: jax.Array, mask: Any, options: Any
                   ) -> tuple[jax.Array, jax.Array]:
  """(out_BTNH, lse_BTN) of this device's queries over the keys of the whole ring.

  Runs under `shard_map`; arguments are this device's parts. `kernel` has the methods of
  `attention/blockwise.py::Blockwise`, and computes in the queries' type; gradients come in the type
  of what they are of.
  """
  return _forward(kernel, ring, lse_gradient, q, k, v, mask, options)[0]


def _forward(kernel, ring, lse_gradient, q, k, v, mask, options):
  del lse_gradient
  # Else JAX takes what depends on the mask alone out of a scan over layers, and keeps it for all
  # hops at once: memory would grow with the ring.
  q, mask = jax.lax.optimization_barrier((q, mask))
  call = _Call(kernel, ring, q, k.astype(q.dtype), v.astype(q.dtype), mask, options)
  parts, results = call.parts, [kernel.nothing(q) for q in call.queries]
  hops = ring.hops
  if kernel.KNOWS_KINDS:   # the device's own tokens, whose kind is known
    coming = call.hand_on(parts) if hops else None
    results = call.attend(parts, results, own=True)
    parts, hops = coming, hops - 1
  def hop(carry, _):
    parts, results = carry
    return (call.hand_on(parts), call.attend(parts, results)), None
  if hops > 0:
    (parts, results), _ = jax.lax.scan(hop, (parts, results), None, length=hops)
  if hops >= 0:
    results = call.attend(parts, results)
  outs, lses = zip(*(kernel.unfold(result, q.shape[1]) for result in results))
  out, lse = (x[0] if len(x) == 1 else jnp.concatenate(x, axis=2) for x in (outs, lses))
  return (out, lse), (q, k, v, mask, options, out, lse)


def _backward(kernel, ring, lse_gradient, residuals, cotangents):
  q, k, v, mask, options, out, lse = residuals
  dout, dlse = cotangents
  # Else XLA keeps the forward pass's travelling keys for this one: memory would grow with the ring.
  k_given, v_given = jax.lax.optimization_barrier((k, v))
  k, v = k_given.astype(q.dtype), v_given.astype(q.dtype)
  call = _Call(kernel, ring, q, k, v, mask, options)
  saved = []
  for group in call.groups:
    at = lambda x, group=group: x[:, :, group.heads]
    saved.append(kernel.saved(at(q), k[:, :, group.kv_heads], at(out), at(lse), at(dout),
                              at(dlse) if lse_gradient else None))
  sums = [(kernel.no_dq(q), kernel.no_dbias(q, o)) for q, o in zip(call.queries, call.options)]
  parts, home = call.parts, call.no_sums()

  if not ring.hops:
    sums, home = call.gradients(parts, saved, sums, home, own=True)
    return _finish(call, q, k_given, v_given, options, sums, home)

  if not ring.overlap:
    sums, home = _gradients_in_turn(call, saved, sums, lambda k, v: _Call(
        kernel, ring, q, k, v, mask, options).parts, k, v)
    return _finish(call, q, k_given, v_given, options, sums, home)

  first_T = jnp.arange(q.shape[1]) < q.shape[1] // 2
  add = lambda a, b: jax.tree.map(jnp.add, a, b)
  coming = call.hand_on(parts)
  sums, home = call.gradients(parts, saved, sums, home, own=True, only=first_T)   # hides hop 1
  # Done before the keys of hop 1 are used, and not at some later place that hides nothing.
  parts, sums, home = jax.lax.optimization_barrier((coming, sums, home))
  if ring.hops > 1:
    coming = call.hand_on(parts)
  sums, mine = call.gradients(parts, saved, sums, call.no_sums())
  if ring.hops > 1:
    def hop(carry, _):
      parts, travelling, sums = carry
      coming, arrived = call.hand_on(parts), call.hand_on(travelling)
      sums, mine = call.gradients(parts, saved, sums, call.no_sums())
      return (coming, add(arrived, mine), sums), None
    if ring.hops > 2:
      (coming, mine, sums), _ = jax.lax.scan(hop, (coming, mine, sums), None, length=ring.hops - 2)
    arrived = call.hand_on(mine)
    sums, mine = call.gradients(coming, saved, sums, call.no_sums())
    mine = add(arrived, mine)
  # The second half of the local work may not begin before the sums are on their way home.
  saved, mine = jax.lax.optimization_barrier((saved, mine))
  arrived = call.hand_on(mine, -ring.hops)
  sums, home = call.gradients(call.parts, saved, sums, home, own=True, only=~first_T)
  return _finish(call, q, k_given, v_given, options, sums, add(home, arrived))


def _gradients_in_turn(call: _Call, saved: list, sums: list, fold: Callable, k: jax.Array,
                       v: jax.Array) -> tuple[list, list]:
  """(sums, home) where nothing is sent while the device computes: no gradients wait for others.

  The device's own keys come last, folded anew: they need not be kept folded through the hops.
  """
  def hop(carry, _):
    parts, travelling, sums = carry
    sums, travelling = call.gradients(parts, saved, sums, travelling)
    return (call.hand_on(parts), call.hand_on(travelling), sums), None
  carry = (call.hand_on(call.parts), call.no_sums(), sums)
  if call.ring.hops > 1:
    carry, _ = jax.lax.scan(hop, carry, None, length=call.ring.hops - 1)
  parts, travelling, sums = carry
  sums, travelling = call.gradients(parts, saved, sums, travelling)
  arrived = call.hand_on(travelling, -call.ring.hops)
  k, v, arrived = jax.lax.optimization_barrier((k, v, arrived))
  return call.gradients(fold(k, v), saved, sums, arrived, own=True)


def _finish(call, q, k, v, options, sums, home):
  """The gradients in the arrays' own form and types."""
  kernel, dqs, dks, dvs, dbiases = call.kernel, [], [], [], []
  for group, lanes, (dq, dbias), group_options in zip(call.groups, home, sums, call.options):
    dqs.append(kernel.finish_dq(dq, group_options, q.shape[1]))
    dbiases.append(kernel.finish_dbias(dbias))
    finished = [kernel.finish_dkv(dk, dv, group_options, len(range(k.shape[1])[keys]))
                for (_, keys), (dk, dv) in zip(group.lanes, lanes)]
    for total, parts in zip((dks, dvs), zip(*finished)):
      total.append(_joined(parts, 1))
  dbias = jax.tree.map(lambda *x: _joined(x, 0), *dbiases)
  doptions = dataclasses.replace(
      options, bias=jax.tree.map(lambda x, d: d.astype(x.dtype), options.bias, dbias))
  return (_joined(dqs, 2).astype(q.dtype), _joined(dks, 2).astype(k.dtype),
          _joined(dvs, 2).astype(v.dtype), None, doptions)


def _joined(parts: Sequence[jax.Array], dim: int) -> jax.Array:
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=dim)


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
