"""Attention by its definition: all scores at once. Memory grows with T x S.

Held by: tests/test_attention.py, tests/test_ring.py.

B batch  T queries  S keys  N query heads  K kv heads  G = N / K  H head dim
"""

from typing import Any

import jax
import jax.numpy as jnp

from longctx.attention.intervals import Intervals, Options, sees
from longctx.attention.whole import Whole

NEG_INF = -1e30  # finite: a row that sees nothing gives 0, not NaN


def scores(q_BTNH, k_BSKH, mask, options):
  """(scores_BKGTS with mask and bias, d scores / d (scale q k), q_BTKGH)."""
  B, T, N, H = q_BTNH.shape
  K = k_BSKH.shape[2]
  wide = jnp.promote_types(jnp.float32, q_BTNH.dtype)
  q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
  scores_BKGTS = options.scale * jnp.einsum('BTKGH,BSKH->BKGTS', q_BTKGH, k_BSKH,
                                            preferred_element_type=wide)
  slope_BKGTS = 1.0
  if options.softcap:
    tanh_BKGTS = jnp.tanh(scores_BKGTS / options.softcap)
    scores_BKGTS, slope_BKGTS = options.softcap * tanh_BKGTS, 1 - tanh_BKGTS ** 2
  if options.bias is not None:
    scores_BKGTS += _bias(options.bias, mask).reshape(scores_BKGTS.shape).astype(wide)
  return jnp.where(sees(mask)[:, None, None], scores_BKGTS, NEG_INF), slope_BKGTS, q_BTKGH


def _bias(bias, mask):
  """[B, N, T, S]."""
  return jax.vmap(bias.block)(mask.index_BT, mask.keys_BS)


class Reference(Whole):
  """The kernel."""

  LSE_GRADIENT = True

  def cannot(self, q: Any, k: Any, v: Any, mask: Intervals, options: Options) -> str:
    """It serves everything."""
    del q, k, v, mask, options
    return ''

  def forward(self, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Intervals,
              options: Options) -> tuple[jax.Array, jax.Array]:
    """(out_BTNH, lse_BTN), both float32 at least; a query that sees nothing gives 0 and -1e30."""
    scores_BKGTS, _, _ = scores(q_BTNH, k_BSKH, mask, options)
    max_BKGT = scores_BKGTS.max(axis=-1)
    some_BKGT = max_BKGT > NEG_INF / 2
    p_BKGTS = jnp.where(some_BKGT[..., None], jnp.exp(scores_BKGTS - max_BKGT[..., None]), 0.0)
    safe_BKGT = jnp.where(some_BKGT, p_BKGTS.sum(axis=-1), 1.0)
    out_BTKGH = jnp.einsum('BKGTS,BSKH->BTKGH', p_BKGTS.astype(v_BSKH.dtype), v_BSKH,
                           preferred_element_type=scores_BKGTS.dtype)
    out_BTKGH /= jnp.moveaxis(safe_BKGT, 3, 1)[..., None]
    lse_BKGT = jnp.where(some_BKGT, max_BKGT + jnp.log(safe_BKGT), NEG_INF)
    return out_BTKGH.reshape(q_BTNH.shape), jnp.moveaxis(lse_BKGT, 3, 1).reshape(q_BTNH.shape[:3])

  def backward(self, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Intervals,
               options: Options, out_BTNH: jax.Array, lse_BTN: jax.Array, dout_BTNH: jax.Array,
               dlse_BTN: jax.Array | None = None
               ) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
    """(dq, dk, dv, dbias), float32 at least. (out, lse) may be those over more keys than these."""
    scores_BKGTS, slope_BKGTS, q_BTKGH = scores(q_BTNH, k_BSKH, mask, options)
    wide = scores_BKGTS.dtype
    heads = lambda x_BTN: jnp.moveaxis(x_BTN.reshape(q_BTKGH.shape[:4]), 1, 3)   # to BKGT
    delta_BTN = (out_BTNH.astype(wide) * dout_BTNH.astype(wide)).sum(-1)
    if dlse_BTN is not None:
      delta_BTN -= dlse_BTN
    some_BKGT = heads(lse_BTN) > NEG_INF / 2
    p_BKGTS = jnp.where(some_BKGT[..., None], jnp.exp(scores_BKGTS - heads(lse_BTN)[..., None]), 0.0)
    dout_BTKGH = dout_BTNH.reshape(q_BTKGH.shape).astype(q_BTNH.dtype)
    product = lambda formula, *x: jnp.einsum(formula, *x, preferred_element_type=wide)
    dv_BSKH = product('BKGTS,BTKGH->BSKH', p_BKGTS.astype(dout_BTKGH.dtype), dout_BTKGH)
    dp_BKGTS = product('BTKGH,BSKH->BKGTS', dout_BTKGH, v_BSKH)
    ds_BKGTS = p_BKGTS * (dp_BKGTS - heads(delta_BTN)[..., None])
    dbias = None
    if options.bias is not None:
      bias_BNTS, pull = jax.vjp(lambda bias: _bias(bias, mask), options.bias)
      dbias, = pull(ds_BKGTS.reshape(bias_BNTS.shape).astype(bias_BNTS.dtype))
    ds_BKGTS = (ds_BKGTS * slope_BKGTS).astype(q_BTNH.dtype)
    dq_BTKGH = options.scale * product('BKGTS,BSKH->BTKGH', ds_BKGTS, k_BSKH)
    dk_BSKH = options.scale * product('BKGTS,BTKGH->BSKH', ds_BKGTS, q_BTKGH)
    return dq_BTKGH.reshape(q_BTNH.shape), dk_BSKH, dv_BSKH, dbias
