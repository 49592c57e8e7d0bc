"""Attention over a sequence that is cut over the mesh axis `seq`: the strategies, one shard_map.

    allgather      keys and values gathered whole; for short rows
    ring           keys travel round (parallel/ring.py)
    bidirectional  half of them each way
    ulysses        an all-to-all turns a cut of the tokens into a cut of the heads, and back
    hybrid         ulysses inside groups of neighbours, a ring over the groups

Every strategy is exact for every mask and order of the tokens: a mask is intervals of indices, and
each token brings its index. A length that the axis does not divide is padded, and masked, inside.

A cache of keys stays where it was written, cut over the same axis. A few queries (a token that is
being generated) go to all devices, each attends to its own slots, and one small sum over the devices
merges what they saw; a chunk of many queries attends to it by the strategy, as to any keys.
Sources: Ulysses arXiv:2309.14509, hybrid (USP) arXiv:2405.07719, ring arXiv:2310.01889.
Held by: tests/test_ring.py, tests/test_mesh.py, tests/test_sharded_cache.py.

B batch  T queries  S keys  N query heads  K kv heads  H head dim
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longctx.errors import check
from longctx.parallel import layouts
from longctx.parallel.mesh import STRATEGIES, Layout, current
from longctx.parallel.ring import Ring, hops_needed, ring_attention

__all__ = ['STRATEGIES', 'attend', 'check_heads', 'write_slots']


def attend(kernel: Any, layout: Layout, q: jax.Array, k: jax.Array, v: jax.Array,
           mask: Any, options: Any, *, cached: bool = False, lse_gradient: bool = True
           ) -> tuple[jax.Array, jax.Array]:
  """(out_BTNH, lse_BTN) of arrays [B, T, ...] that are cut by `layout`; see `attention.attend`.

  `cached`: the keys are a cache, cut over the axis of `slots` where it divides their number.
  """
  k, v = (share_heads(x, layout, cached) for x in (k, v))
  check_heads(layout, q.shape[2] // layout.size('heads'), k.shape[2] // layout.size('heads'))
  size, length, num_keys = layout.size('length'), q.shape[1], k.shape[1]
  mask = dataclasses.replace(mask, key_index_BS=mask.keys_BS)
  rows, keys = 'length', 'length'   # what the queries and the keys are cut as
  local = functools.partial(one_device, kernel, lse_gradient)
  if cached and size > 1 and num_keys % size == 0 and not _keys_move(layout, q, k):
    rows = None
    local = functools.partial(_own_slots, kernel, lse_gradient, layout.rules['length'])
  elif length < size:   # one token at a time: every device has all of them
    rows = keys = None
  elif size > 1 and cached and num_keys % size:
    q, mask = _pad_queries(q, mask, size)
    keys = None
  elif size > 1:
    q, mask = _pad_queries(q, mask, size)
    k, v, mask = _pad_keys(k, v, mask, size)
    known_order = not cached and length == num_keys == q.shape[1]   # padding is of no order
    local = functools.partial(_cut, kernel, lse_gradient, layout,
                              mask.order if known_order else None)
  q_spec = layout.spec('batch', rows, 'heads', None)
  kv_spec = layout.spec('batch', keys, 'heads', None)
  mask_spec = jax.tree.map(lambda _: layout.spec('batch', rows), mask)
  mask_spec = dataclasses.replace(mask_spec, key_index_BS=layout.spec('batch', keys))
  options_spec = jax.tree.map(lambda _: layout.spec('heads'), options)
  out, lse = jax.shard_map(
      local, mesh=layout.mesh, in_specs=(q_spec, kv_spec, kv_spec, mask_spec, options_spec),
      out_specs=(q_spec, layout.spec('batch', rows, 'heads')), check_vma=False,
  )(q, k, v, mask, options)
  return out[:, :length], lse[:, :length]


def _keys_move(layout: Layout, q: jax.Array, k: jax.Array) -> bool:
  """Whether queries of a cut cache stay and its keys come to them: where that is less to send."""
  if q.shape[1] % layout.size('length'):
    return False
  queries = q.shape[1] * q.shape[2] * (q.dtype.itemsize + 2 * 4)   # there, and float32 sums back
  return queries > 2 * k.shape[1] * k.shape[2] * k.dtype.itemsize


def _own_slots(kernel, lse_gradient, axis, q, k, v, mask, options):
  """All queries over all slots, from what each device's queries saw of its own slots."""
  out, lse = one_device(kernel, lse_gradient, q, k, v, mask, options)
  top = jax.lax.stop_gradient(jax.lax.pmax(jax.lax.stop_gradient(lse), axis))
  weight = jnp.exp(lse - top)[..., None]
  both = jax.lax.psum(jnp.concatenate([out.astype(lse.dtype) * weight, weight], axis=-1), axis)
  out, total = both[..., :-1], both[..., -1:]   # the total is at least 1
  return out / total, top + jnp.log(total[..., 0])


def write_slots(old: jax.Array, new: jax.Array, slot_BT: jax.Array) -> jax.Array:
  """`old` [B, S, ...] with new[b, t] in slot slot_BT[b, t]; slots of S and above are not written.

  Under a layout that cuts the slots each device writes those that it has.
  """
  def write(old, new, slot_BT):
    row_B1 = jnp.arange(old.shape[0])[:, None]
    return old.at[row_B1, slot_BT].set(new.astype(old.dtype), mode='drop')

  layout = current()
  if layout is None or layout.size('slots') == 1 or old.shape[1] % layout.size('slots'):
    return write(old, new, slot_BT)
  heads = ('kv_heads', None)[:old.ndim - 2]
  spec = layout.spec('batch', 'slots', *heads, shape=old.shape)

  def local(old, new, slot_BT):
    first = jax.lax.axis_index(layout.rules['slots']) * old.shape[1]
    mine = (slot_BT >= first) & (slot_BT < first + old.shape[1])
    return write(old, new, jnp.where(mine, slot_BT - first, old.shape[1]))

  return jax.shard_map(
      local, mesh=layout.mesh, out_specs=spec, check_vma=False,
      in_specs=(spec, layout.spec('batch', None, *heads, shape=new.shape),
                layout.spec('batch', None)))(old, new, slot_BT)


def _copied(x_BSKH: jax.Array, times: int) -> jax.Array:
  """Kv heads repeated; in float32 at least, so that the sums of their gradients are."""
  return jnp.repeat(x_BSKH.astype(jnp.promote_types(x_BSKH.dtype, jnp.float32)), times, axis=2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def sent_narrow(exchange: Any, dtype: Any, x: jax.Array) -> jax.Array:
  """exchange(x), sent as `dtype`, which holds x exactly; gradients are sent and summed as they are."""
  return exchange(x.astype(dtype)).astype(x.dtype)


sent_narrow.defvjp(
    lambda exchange, dtype, x: (sent_narrow(exchange, dtype, x), x.shape),
    lambda exchange, dtype, shape, grad: jax.linear_transpose(
        exchange, jax.ShapeDtypeStruct(shape, grad.dtype))(grad))


def share_heads(x_BSKH: jax.Array, layout: Layout, cached: bool = False) -> jax.Array:
  """Kv heads repeated, where there are fewer than devices to share the heads: one for each."""
  devices, K = layout.size('heads'), x_BSKH.shape[2]
  if K % devices == 0:
    return x_BSKH
  check(devices % K == 0, f'model.num_kv_heads={K}: must divide mesh.model={devices} or be a '
        'multiple of it, so that each device has the kv head of its query heads')
  times = devices // K
  return jnp.repeat(x_BSKH, times, axis=2) if cached else _copied(x_BSKH, times)


def check_heads(layout: Layout, num_heads: int, num_kv_heads: int) -> None:
  """ConfigError where Ulysses cannot deal out the heads; names the degrees that it can."""
  degree = layout.ulysses
  fits = lambda u: num_heads % u == 0 and (num_kv_heads % u == 0 or u % num_kv_heads == 0)
  if degree == 1 or fits(degree):
    return
  size = layout.size('length')
  working = [u for u in range(2, size) if size % u == 0 and fits(u)]
  remedy = (f"mesh.strategy='hybrid' with mesh.ulysses={' or '.join(map(str, working))}"
            if working else "mesh.strategy='ring'")
  check(False, f'mesh.strategy={layout.strategy!r} with {degree} devices to share {num_heads} '
        f'query and {num_kv_heads} kv heads of each: the number must divide both, or be a '
        f'multiple of the kv heads; set {remedy}')


def _pad_queries(q, mask, size):
  missing = -q.shape[1] % size
  if not missing:
    return q, mask
  row = lambda x, fill: None if x is None else jnp.pad(x, ((0, 0), (0, missing)),
                                                       constant_values=fill)
  mask = dataclasses.replace(
      mask, start_BT=row(mask.start_BT, 0), end_BT=row(mask.end_BT, 0),
      index_BT=row(mask.index_BT, -1), sink_start_BT=row(mask.sink_start_BT, 0),
      sink_end_BT=row(mask.sink_end_BT, 0), kind='any')
  return jnp.pad(q, ((0, 0), (0, missing), (0, 0), (0, 0))), mask


def _pad_keys(k, v, mask, size):
  missing = -k.shape[1] % size
  if not missing:
    return k, v, mask
  k, v = (jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) for x in (k, v))
  index = jnp.pad(mask.key_index_BS, ((0, 0), (0, missing)), constant_values=-1)
  return k, v, dataclasses.replace(mask, key_index_BS=index, kind='any')


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def one_device(kernel: Any, lse_gradient: bool, q: jax.Array, k: jax.Array, v: jax.Array,
               mask: Any, options: Any) -> tuple[jax.Array, jax.Array]:
  """(out, lse) of a kernel, differentiable in q, k, v and the bias; in lse if `lse_gradient`.

  It computes in the queries' type. Gradients come in the type of what they are of: those of float32
  keys are not rounded, so that they may be summed.
  """
  return _forward(kernel, lse_gradient, q, k, v, mask, options)[0]


def _forward(kernel, lse_gradient, q, k, v, mask, options):
  del lse_gradient
  kinds = jnp.zeros((0,), k.dtype), jnp.zeros((0,), v.dtype)
  k, v = k.astype(q.dtype), v.astype(q.dtype)
  out, lse = kernel.forward(q, k, v, mask, options)
  return (out, lse), (q, k, v, mask, options, out, lse, kinds)


def _backward(kernel, lse_gradient, residuals, cotangents):
  q, k, v, mask, options, out, lse, kinds = residuals
  dout, dlse = cotangents
  dq, dk, dv, dbias = kernel.backward(q, k, v, mask, options, out, lse, dout,
                                      dlse if lse_gradient else None)
  doptions = dataclasses.replace(
      options, bias=jax.tree.map(lambda x, d: d.astype(x.dtype), options.bias, dbias))
  return dq.astype(q.dtype), dk.astype(kinds[0].dtype), dv.astype(kinds[1].dtype), None, doptions


one_device.defvjp(_forward, _backward)


def _cut(kernel, lse_gradient, layout, order, q, k, v, mask, options):
  """One device's part, under shard_map. `order` is None where the slots follow no known order."""
  axis, size = layout.rules['length'], layout.size('length')
  if layout.strategy == 'allgather':
    gather = lambda x: jax.lax.all_gather(x, axis, axis=1, tiled=True)
    wide = lambda x: sent_narrow(gather, x.dtype, x.astype(jnp.promote_types(x.dtype, jnp.float32)))
    mask = dataclasses.replace(mask, key_index_BS=gather(mask.key_index_BS),
                               kind='full' if mask.kind == 'full' else 'any')
    return one_device(kernel, lse_gradient, q, wide(k), wide(v), mask, options)
  hops = size // layout.ulysses - 1
  if mask.reach and not mask.has_sinks and order is not None:
    length = q.shape[1] * size
    unit = layouts.unit_of(order, length, size, layout.unit)
    group = lambda run: layouts.device_of(order, run, size) // layout.ulysses
    hops = hops_needed(group, length // unit, unit, size // layout.ulysses, mask.reach)
  ring = Ring(axis=axis, size=size // layout.ulysses, stride=layout.ulysses, hops=hops,
              # What a window reaches comes one way: the other way round it would come last.
              both_ways=layout.strategy == 'bidirectional' and hops == size // layout.ulysses - 1,
              overlap=layout.overlap)
  if ring.size > 1:
    inner = functools.partial(ring_attention, kernel, ring, lse_gradient)
  else:
    inner = functools.partial(one_device, kernel, lse_gradient)
  if layout.ulysses == 1:
    return inner(q, k, v, mask, options)
  sort = None
  if order not in (None, 'contiguous'):
    sort = layouts.sorting(order, q.shape[1] * size, size, layout.ulysses, layout.unit)
  return _ulysses(inner, axis, size, layout.ulysses, sort, q, k, v, mask, options)


def _ulysses(inner, axis, size, degree, sort, q, k, v, mask, options):
  """`inner` on all tokens of a group of neighbours and 1/degree of the heads."""
  groups = np.arange(size).reshape(-1, degree).tolist()
  groups = None if len(groups) == 1 else groups
  take = lambda x, order: x if order is None else x[:, order]
  unsort = None
  if sort is not None:
    group = jax.lax.axis_index(axis) // degree
    sort, unsort = jnp.asarray(sort)[group], jnp.asarray(np.argsort(sort, axis=1))[group]
  tokens = lambda x: take(jax.lax.all_to_all(
      x, axis, split_axis=2, concat_axis=1, tiled=True, axis_index_groups=groups), sort)
  heads = lambda x: jax.lax.all_to_all(
      take(x, unsort), axis, split_axis=1, concat_axis=2, tiled=True, axis_index_groups=groups)
  gather = lambda x: take(jax.lax.all_gather(
      x, axis, axis=1, tiled=True, axis_index_groups=groups), sort)
  keys = tokens
  if k.shape[2] % degree:   # gradients of the copies of a head are summed
    keys = lambda x: sent_narrow(tokens, q.dtype, x)
    k, v = (_copied(x, degree // x.shape[2]) for x in (k, v))
  mine = jax.lax.axis_index(axis) % degree
  share = lambda x: jax.lax.dynamic_slice_in_dim(
      x, mine * (x.shape[0] // degree), x.shape[0] // degree)
  mask = jax.tree.map(gather, mask)
  out, lse = inner(tokens(q), keys(k), keys(v), mask, jax.tree.map(share, options))
  return heads(out.astype(q.dtype)), heads(lse)   # nothing is merged after: rounded before it is sent
