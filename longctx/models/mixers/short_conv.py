"""A short causal convolution over each channel, and its special case, the token shift.

  y_t = sum_j w_j x_{t-j}, j = 0 .. W-1; what lies before the document is zero

The last W-1 inputs are the state, so a document may be split anywhere; padding is skipped.
Sources: H3 arXiv:2212.14052, Mamba arXiv:2312.00752 (width 4); RWKV's token shift (width 2).
Held by: tests/test_short_conv.py.

B batch  T tokens  C channels  W width
"""

import jax
import jax.numpy as jnp
from flax import nnx

from longctx.models.context import Context
from longctx.models.layers import param, scaled, shifted
from longctx.parallel.state_scan import earlier


def empty_tail(batch_size: int, width: int, channels: int) -> jax.Array:
  return jnp.zeros((batch_size, width - 1, channels), jnp.float32)


def previous(x_BTC: jax.Array, tail_BWC: jax.Array, context: Context,
             channels: str | None = None) -> tuple[list[jax.Array], jax.Array]:
  """[x_{t-1}, .., x_{t-(W-1)}] for every token, and the tail after them, float32 [B, W-1, C].

  `channels`: the meaning of the last dim, where a mesh cuts it.
  """
  count = tail_BWC.shape[1]
  tail = tail_BWC.astype(x_BTC.dtype)
  if context.valid_BT is None or context.order:   # laid out: padding is at the row's end alone
    shifted, after = earlier(x_BTC, tail, channels)
  else:   # the valid tokens moved together: x_{t-j} is the j-th valid token before t
    order_BT = jnp.argsort(~context.valid_BT, axis=1, stable=True)
    packed = jnp.take_along_axis(x_BTC, order_BT[..., None], axis=1)
    all_BSC = jnp.concatenate([tail, packed], axis=1)
    rank_BT = jnp.cumsum(context.valid_BT, axis=1) - 1 + count
    take = lambda at: jnp.take_along_axis(all_BSC, jnp.maximum(at, 0)[..., None], axis=1)
    shifted = [take(rank_BT - j) for j in range(1, count + 1)]
    after = take(context.valid_BT.sum(1)[:, None] + jnp.arange(count))
  age_BT1 = (context.index_BT - context.start_BT)[..., None]
  seen = [jnp.where(age_BT1 >= j, x, 0) for j, x in enumerate(shifted, 1)]
  return seen, after.astype(jnp.float32)


class ShortConv(nnx.Module):
  """Depthwise causal convolution of `width` taps with a bias; width 1 is a scale."""

  def __init__(self, channels: int, width: int, *, dims: str | None = None, bias: bool = True,
               rngs: nnx.Rngs):
    limit = width ** -0.5   # torch's Conv1d: uniform in +-1/sqrt(taps)
    uniform = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -limit, limit)
    self.width, self.channels, self.dims = width, channels, dims
    self.taps = param(rngs, uniform, (width, channels), (None, dims))   # taps[j] multiplies x_{t-j}
    self.bias = param(rngs, uniform, (channels,), (dims,)) if bias else None

  def init_state(self, batch_size: int) -> jax.Array:
    return empty_tail(batch_size, self.width, self.channels)

  def __call__(self, x_BTC: jax.Array, tail_BWC: jax.Array, context: Context
               ) -> tuple[jax.Array, jax.Array]:
    before, tail_BWC = previous(x_BTC, tail_BWC, context, self.dims)
    y_BTC = sum(scaled(x, tap) for x, tap in zip((x_BTC, *before), self.taps.get_value()))
    if self.bias is not None:
      y_BTC = shifted(y_BTC, self.bias.get_value())
    return y_BTC, tail_BWC
