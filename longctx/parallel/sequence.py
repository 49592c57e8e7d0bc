"""Attention over a sequence that is cut over the mesh axis `seq`, under one `shard_map`.

Each device holds its part of the batch, of the queries' length and of the heads. Keys and values
are gathered along `seq` (K kv heads only, before they are shared by query groups); the local
attention then runs on whole rows of keys. With seq = 1 nothing is gathered.
Held by: tests/test_mesh.py.

B batch  T queries  S keys  N query heads  K kv heads  H head dim
"""

from collections.abc import Callable

import jax

from longctx.parallel.mesh import Layout


def gathered(attend: Callable, layout: Layout, *, keys_cut: bool = True) -> Callable:
  """`attend(q, k, v, start, end, k_index) -> (out, lse)` with its arguments cut by `layout`.

  q_BTNH and start/end_BT are cut over batch and length. k/v_BSKH and k_index_BS likewise, and
  gathered along the length inside; or not cut along it (`keys_cut=False`, a cache).
  """
  q_spec = layout.spec('batch', 'length', 'heads', None)
  length = 'length' if keys_cut else None
  kv_spec = layout.spec('batch', length, 'kv_heads', None)
  row_spec, key_row_spec = layout.spec('batch', 'length'), layout.spec('batch', length)
  lse_spec = layout.spec('batch', 'length', 'heads')
  axis = layout.rules['length']
  cut = keys_cut and layout.size('length') > 1

  def local(q_BTNH, k_BSKH, v_BSKH, start_BT, end_BT, k_index_BS):
    if cut:
      k_BSKH, v_BSKH, k_index_BS = (
          jax.lax.all_gather(x, axis, axis=1, tiled=True) for x in (k_BSKH, v_BSKH, k_index_BS))
    return attend(q_BTNH, k_BSKH, v_BSKH, start_BT, end_BT, k_index_BS)

  return jax.shard_map(
      local, mesh=layout.mesh,
      in_specs=(q_spec, kv_spec, kv_spec, row_spec, row_spec, key_row_spec),
      out_specs=(q_spec, lse_spec), check_vma=False)
