"""The public face of attention: which implementation serves a call, and its gradient.

`IMPLEMENTATIONS` is the whole table; 'auto' takes the first that can serve, in the platform's
order. A call is one custom_vjp around (forward, backward) of an implementation, with the sequence
cut over the mesh where there is one (`parallel/sequence.py`). Learned sink logits (gpt-oss) are one
more term of the softmax's sum, added to any implementation's (out, lse).
Held by: tests/test_attention.py, tests/test_ring.py.

B batch  T queries  S keys  N query heads  K kv heads  H head dim
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from longctx import watch
from longctx.attention.blockwise import Blockwise
from longctx.attention.intervals import Intervals, Options
from longctx.attention.reference import Reference
from longctx.attention.whole import Foreign
from longctx.parallel import mesh, sequence

IMPLEMENTATIONS = {
    'reference': Reference(),
    'cudnn': Foreign('cudnn', 'gpu'),
    'mosaic_gpu': Foreign('mosaic_gpu', 'gpu'),
    'splash': Foreign('splash', 'tpu'),
    'blockwise': Blockwise(),
}

# 'auto' takes the dense form of so few queries, and scores: one strip of them is small.
DENSE_QUERIES, DENSE_SCORES = 64, 2 ** 20


def attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Intervals, *,
              sink_N: jax.Array | None = None, **settings: Any) -> jax.Array:
  """out_BTNH in q's type: softmax attention of each query over the keys that `mask` lets it see.

  Settings are those of `attend`. A query that sees nothing gives 0, and gradient 0.
  """
  return _attend(q_BTNH, k_BSKH, v_BSKH, mask, sink_N=sink_N, lse_gradient=sink_N is not None,
                 **settings)[0]


def attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Intervals,
           **settings: Any) -> tuple[jax.Array, jax.Array]:
  """(out_BTNH in q's type, lse_BTN float32 in natural base); `merge` joins two such results.

  Settings, by name:
    scale: of q.k, H ** -0.5 by default.
    softcap: c * tanh(score / c); 0 for none.
    bias: added to the scores, see `attention.biases`.
    sink_N: a logit a head that joins the softmax and adds nothing to out (gpt-oss).
    implementation: 'auto' or one of IMPLEMENTATIONS.
    cached: the keys are a cache; see parallel/sequence.py.
  Where a query sees nothing, out is 0 and lse -1e30 (with sink_N: the sink's logit).
  Raises ValueError for shapes that do not fit or an unknown implementation, NotImplementedError
  with the reason where the implementation named cannot serve the call.
  """
  return _attend(q_BTNH, k_BSKH, v_BSKH, mask, lse_gradient=True, **settings)


def _attend(q, k, v, mask, *, scale=None, softcap=0.0, bias=None, sink_N=None,
            implementation='auto', cached=False, lse_gradient):
  check_shapes(q, k, v, mask)
  options = Options(scale=q.shape[-1] ** -0.5 if scale is None else scale, softcap=softcap,
                    bias=bias)
  q, k, v, mask, options = jax.tree.map(jnp.asarray, (q, k, v, mask, options))
  watch.tell('attention', q=q, k=k, mask=mask, options=options, sink_N=sink_N)
  kernel = choose(implementation, q, k, v, mask, options, lse_gradient, cached)
  layout = mesh.current()
  if layout is None or layout.mesh.size == 1:
    out, lse = sequence.one_device(kernel, lse_gradient, q, k, v, mask, options)
  else:
    out, lse = sequence.attend(kernel, layout, q, k, v, mask, options, cached=cached,
                               lse_gradient=lse_gradient)
  if sink_N is not None:
    total = jnp.logaddexp(lse, sink_N.astype(lse.dtype))
    out *= jnp.exp(lse - total)[..., None]
    lse = total
  return out.astype(q.dtype), lse


def check_shapes(q: jax.Array, k: jax.Array, v: jax.Array, mask: Intervals) -> None:
  """ValueError unless queries, keys, values and mask belong together."""
  if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or (q.shape[0], q.shape[3]) != (
      k.shape[0], k.shape[3]):
    raise ValueError(f'q {q.shape}, k {k.shape}, v {v.shape}: must be [B, T, N, H], [B, S, K, H] '
                     'and [B, S, K, H]')
  if q.shape[2] % k.shape[2]:
    raise ValueError(f'{q.shape[2]} query heads must be a multiple of {k.shape[2]} kv heads; '
                     'each kv head serves an equal group')
  if mask.start_BT.shape != q.shape[:2] or mask.keys_BS.shape != k.shape[:2]:
    raise ValueError(f'the mask is of {mask.start_BT.shape} queries and {mask.keys_BS.shape} keys; '
                     f'q has {q.shape[:2]}, k has {k.shape[:2]}')


def choose(implementation: str, q: Any, k: Any, v: Any, mask: Intervals, options: Options,
           lse_gradient: bool, cached: bool = False) -> Any:
  """The implementation named, or the first in the table that can serve the call ('auto')."""
  layout = mesh.current()
  platform = layout.mesh.devices.flat[0].platform if layout else jax.default_backend()
  hop = None if layout is None else _mask_of_a_hop(layout, q, k, mask, cached)

  def refusal(name: str) -> str:
    kernel = IMPLEMENTATIONS[name]
    if kernel.platform not in ('', platform):
      return f'it runs on {kernel.platform.upper()}s, and the devices are {platform.upper()}s'
    if lse_gradient and not kernel.LSE_GRADIENT:
      return 'it gives no gradient through lse; call attention(), which returns none'
    reason = kernel.cannot(q, k, v, mask, options)
    return reason or (kernel.cannot(q, k, v, hop, options) if hop is not None else '')

  if implementation == 'auto':
    if q.shape[1] <= DENSE_QUERIES and q.shape[1] * k.shape[1] <= DENSE_SCORES:
      return IMPLEMENTATIONS['reference']
    names = [name for name in IMPLEMENTATIONS if name != 'reference']
    return IMPLEMENTATIONS[next(name for name in names if not refusal(name))]
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f'implementation={implementation!r}: must be auto or one of '
                     f'{", ".join(IMPLEMENTATIONS)}')
  reason = refusal(implementation)
  if reason:
    raise NotImplementedError(f'implementation={implementation!r} cannot serve this call: {reason}')
  return IMPLEMENTATIONS[implementation]


def _mask_of_a_hop(layout: mesh.Layout, q: Any, k: Any, mask: Intervals, cached: bool
                   ) -> Intervals | None:
  """What a kernel is given where keys of other devices, or padding, have no order that is known."""
  size = layout.size('length')
  if cached or q.shape[1] < size or size == 1:   # a cache's mask is of no known order already
    return None
  padded = q.shape[1] % size or k.shape[1] % size
  if layout.ulysses == size and not padded:
    return None   # all tokens, in their order
  kind = 'full' if mask.kind == 'full' and not padded else 'any'
  return dataclasses.replace(mask, key_index_BS=mask.keys_BS, kind=kind)
