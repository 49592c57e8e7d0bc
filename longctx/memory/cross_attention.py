"""Attention without order: every query meets every key that is there.

Held by: tests/test_compressive.py, tests/test_block_recurrent.py.

B batch  T queries  S keys  N query heads  K kv heads  H head dim
"""

import jax
import jax.numpy as jnp

from longctx.attention import Intervals, attention


def attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, valid_BS: jax.Array | None,
           implementation: str) -> jax.Array:
  """out_BTNH in q's type, 0 where no key is there; None: all keys are."""
  B, T = q_BTNH.shape[:2]
  S = k_BSKH.shape[1]
  slots_BS = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
  if valid_BS is not None:
    slots_BS = jnp.where(valid_BS, slots_BS, -1)
  mask = Intervals(start_BT=jnp.zeros((B, T), jnp.int32), end_BT=jnp.full((B, T), S, jnp.int32),
                   index_BT=jnp.zeros((B, T), jnp.int32), key_index_BS=slots_BS)
  return attention(q_BTNH, k_BSKH, v_BSKH, mask, implementation=implementation)
