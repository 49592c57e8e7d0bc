"""Attention by its definition: all scores at once. Memory grows with T x S.

Held by: tests/test_attention.py.

B batch  T queries  S keys  N query heads  K kv heads  G = N / K  H head dim
"""

import jax
import jax.numpy as jnp

NEG_INF = -1e30  # finite: a row that sees nothing gives 0, not NaN


def attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, start_BT: jax.Array,
           end_BT: jax.Array, k_index_BS: jax.Array, *, scale: float, causal: bool = False,
           whole: bool = False) -> tuple[jax.Array, jax.Array]:
  """(out_BTNH in q's type, lse_BTN float32 in natural base); `causal`, `whole` change nothing."""
  del causal, whole
  batch, length, heads, head_dim = q_BTNH.shape
  kv_heads = k_BSKH.shape[2]
  q_BTKGH = q_BTNH.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
  scores_BKGTS = scale * jnp.einsum('BTKGH,BSKH->BKGTS', q_BTKGH, k_BSKH,
                                    preferred_element_type=jnp.float32)
  index_B1S = k_index_BS[:, None, :]
  sees_BTS = (start_BT[:, :, None] <= index_B1S) & (index_B1S < end_BT[:, :, None])
  sees_B11TS = sees_BTS[:, None, None]
  scores_BKGTS = jnp.where(sees_B11TS, scores_BKGTS, NEG_INF)
  max_BKGT1 = jax.lax.stop_gradient(scores_BKGTS.max(axis=-1, keepdims=True))
  p_BKGTS = jnp.where(sees_B11TS, jnp.exp(scores_BKGTS - max_BKGT1), 0.0)
  sum_BKGT = p_BKGTS.sum(axis=-1)
  out_BTKGH = jnp.einsum('BKGTS,BSKH->BTKGH', p_BKGTS.astype(v_BSKH.dtype), v_BSKH,
                         preferred_element_type=jnp.float32)
  some_BKGT = sum_BKGT > 0
  safe_BKGT = jnp.where(some_BKGT, sum_BKGT, 1.0)
  out_BTKGH /= jnp.moveaxis(safe_BKGT, 3, 1)[..., None]
  lse_BKGT = jnp.where(some_BKGT, max_BKGT1[..., 0] + jnp.log(safe_BKGT), NEG_INF)
  return (out_BTKGH.reshape(q_BTNH.shape).astype(q_BTNH.dtype),
          jnp.moveaxis(lse_BKGT, 3, 1).reshape(batch, length, heads))
