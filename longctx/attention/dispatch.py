"""One call for attention: it chooses the implementation and cuts the call over the mesh.

Query t of row b sees key s where start_BT[b, t] <= k_index_BS[b, s] < end_BT[b, t].
Held by: tests/test_attention.py, tests/test_mesh.py.

B batch  T queries  S keys  N query heads  K kv heads  H head dim
"""

import functools

import jax

from longctx.attention import blockwise, reference
from longctx.parallel import mesh
from longctx.parallel.sequence import gathered

IMPLEMENTATIONS = {'reference': reference.attend, 'blockwise': blockwise.attend}

DENSE_SCORES = 64   # queries up to which 'auto' takes the dense form: a strip of scores is small


def attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, start_BT: jax.Array,
           end_BT: jax.Array, k_index_BS: jax.Array, *, scale: float,
           implementation: str = 'auto', causal: bool = False, whole: bool = False,
           cached: bool = False) -> tuple[jax.Array, jax.Array]:
  """(out_BTNH, lse_BTN): softmax attention over the interval each query may see.

  `causal` promises that keys and queries are the same tokens in order (k_index is arange(S),
  end = arange(T) + 1, S = T); `whole` promises besides that every start is 0. Kernels skip more
  when they know. `cached` says that the keys are not cut along their length.
  Raises ValueError for an unknown implementation, or N not a multiple of K.
  """
  if implementation == 'auto':
    implementation = 'reference' if q_BTNH.shape[1] <= DENSE_SCORES else 'blockwise'
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f'implementation={implementation!r}: must be auto or one of '
                     f'{", ".join(IMPLEMENTATIONS)}')
  if q_BTNH.shape[2] % k_BSKH.shape[2]:
    raise ValueError(f'{q_BTNH.shape[2]} query heads must be a multiple of {k_BSKH.shape[2]} '
                     'kv heads; each kv head serves an equal group')
  layout = mesh.current()
  cut = layout is not None and layout.mesh.size > 1
  keys_move = cut and not cached and layout.size('length') > 1
  if causal and not keys_move:
    local = functools.partial(IMPLEMENTATIONS[implementation], scale=scale,
                              causal=True, whole=whole)
  else:
    local = functools.partial(IMPLEMENTATIONS[implementation], scale=scale)
  if cut:
    local = gathered(local, layout, keys_cut=not cached)
  return local(q_BTNH, k_BSKH, v_BSKH, start_BT, end_BT, k_index_BS)
