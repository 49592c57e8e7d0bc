"""Intervals of key indices as ranges of key places, for kernels that count places.

Once the keys stand in ascending order of their index, what a query may see is one range of places.
In every layout of the tokens a device's keys stand so already, and keep their place; only keys
gathered from several devices are moved.
Held by: tests/test_attention_kernels.py.

B batch  T queries  S keys
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from longctx.attention.intervals import Intervals

NEVER = np.iinfo(np.int32).max   # index of padding, which stands behind all others


class Ranges(NamedTuple):
  """Query t sees the keys in places start <= s < end; start = S, end = 0 where it sees nothing."""

  start_BT: jax.Array
  end_BT: jax.Array
  order_BS: jax.Array | None = None    # the keys by their index; None: they stand so
  stands: jax.Array | None = None      # whether order_BS is arange after all

  def ordered(self, x_BSKH: jax.Array) -> jax.Array:
    """Keys, or values, in their places."""
    return self._moved(x_BSKH, self.order_BS)

  def restored(self, x_BSKH: jax.Array) -> jax.Array:
    """The reverse of `ordered`, for gradients."""
    return self._moved(x_BSKH, None if self.order_BS is None else jnp.argsort(self.order_BS, axis=1))

  def _moved(self, x_BSKH, order_BS):
    if order_BS is None:
      return x_BSKH
    return jax.lax.cond(
        self.stands, lambda x, order: x,
        lambda x, order: jnp.take_along_axis(x, order[:, :, None, None], axis=1), x_BSKH, order_BS)


def key_ranges(mask: Intervals, num_keys: int) -> Ranges:
  """The ranges of `mask`, which has no sinks."""
  start_BT, end_BT, order_BS, stands = mask.start_BT, mask.end_BT, None, None
  if mask.kind == 'full':
    start_BT, end_BT = jnp.zeros_like(start_BT), jnp.full_like(end_BT, num_keys)
  elif mask.kind == 'any' or mask.key_index_BS is not None:   # else a key's index is its place
    index_BS = jnp.where(mask.keys_BS < 0, NEVER, mask.keys_BS)
    order_BS = jnp.argsort(index_BS, axis=1, stable=True)
    stands = (order_BS == jnp.arange(num_keys)).all()
    index_BS = jnp.take_along_axis(index_BS, order_BS, axis=1)
    search = jax.vmap(jnp.searchsorted)
    start_BT, end_BT = search(index_BS, start_BT), search(index_BS, end_BT)
  sees_BT = start_BT < end_BT
  # An empty row must not widen the range of tiles that its block of rows visits.
  return Ranges(jnp.where(sees_BT, start_BT, num_keys).astype(jnp.int32),
                jnp.where(sees_BT, end_BT, 0).astype(jnp.int32), order_BS, stands)
