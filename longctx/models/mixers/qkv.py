"""What the delta rules' layers have in common: queries, keys and values by a short convolution.

  q, k, v = silu(conv(x W_q)), silu(conv(x W_k)), silu(conv(x W_v))      q, k of length 1 each head

Source: arXiv:2406.06484 (section 4), fla-org/flash-linear-attention (epsilon inside the root, so that
zero keys have a gradient). Held by: tests/test_delta.py.

B batch  T tokens  D model  H heads  K key dim  V value dim  C channels, H (2K + V)
"""

import jax
import jax.numpy as jnp
from flax import nnx

from longctx.errors import check
from longctx.models.context import Context
from longctx.models.layers import linear, normal, param
from longctx.models.mixers.base import Settings
from longctx.models.mixers.short_conv import ShortConv, empty_tail
from longctx.parallel.mesh import constrain

EPSILON = 1e-6


def unit(x: jax.Array) -> jax.Array:
  """x / |x| over the last dim, float32."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + EPSILON)


def head_dims(settings: Settings, mixer: str, parts: int = 4, value_factor: int = 1
              ) -> tuple[int, int, int]:
  """(heads, key dim, value dim); published: keys of parts/4 of the model's width in all."""
  heads, width = settings.num_heads, parts * settings.dim
  check(bool(settings.key_dim) or width % (4 * heads) == 0,
        f'model.num_heads={heads}: must divide {parts}/4 of model.embed_dim={settings.dim}, the keys of '
        f'{mixer}; or set model.mixer_key_dim')
  key_dim = settings.key_dim or width // (4 * heads)
  return heads, key_dim, settings.value_dim or value_factor * key_dim


def check_chunk(settings: Settings) -> None:
  chunk = settings.chunk
  check(chunk & (chunk - 1) == 0,
        f'model.mixer_chunk={chunk}: must be a power of two, as {1 << chunk.bit_length()}, or 0')


def project(x_BTD: jax.Array, w_DHK: jax.Array) -> jax.Array:
  """[B, T, D] -> [B, T, H, K], cut over heads."""
  y = linear(x_BTD, w_DHK.reshape(w_DHK.shape[0], -1))
  return constrain(y.reshape(*x_BTD.shape[:2], *w_DHK.shape[1:]), 'batch', 'length', 'heads', None)


def merge(y_BTHV: jax.Array, w_HVD: jax.Array) -> jax.Array:
  """[B, T, H, V] -> [B, T, D]."""
  y_BTD = linear(jax.lax.collapse(y_BTHV, 2), w_HVD.reshape(-1, w_HVD.shape[-1]))
  return constrain(y_BTD, 'batch', 'length', None)


class QKV(nnx.Module):
  """q, k, v, tail = qkv(x, tail, context); q of length K^-1/2, k of length 1."""

  reads = ('key_dim', 'value_dim', 'conv', 'negative')   # of the layers around it

  @staticmethod
  def cost(settings: Settings, dims: tuple[int, int, int]) -> tuple[int, int, int]:
    """(matrices, parameters of the convolution, floats of its state)."""
    H, K, V = dims
    channels = H * (2 * K + V)
    return (settings.dim * channels, settings.conv * channels * (settings.conv > 1),
            (settings.conv - 1) * channels)

  def __init__(self, settings: Settings, dims: tuple[int, int, int], *, rngs: nnx.Rngs):
    H, K, V = dims
    D, weight = settings.dim, normal(settings.std)
    self.dims, self.taps = dims, settings.conv
    self.w_q = param(rngs, weight, (D, H, K), ('embed', 'heads', None))
    self.w_k = param(rngs, weight, (D, H, K), ('embed', 'heads', None))
    self.w_v = param(rngs, weight, (D, H, V), ('embed', 'heads', None))
    # The channels of a head stand together, so that a cut over heads is one over channels.
    self.conv = (ShortConv(H * (2 * K + V), settings.conv, dims='heads', bias=False, rngs=rngs)
                 if settings.conv > 1 else None)

  def init_state(self, batch_size: int) -> jax.Array:
    H, K, V = self.dims
    return empty_tail(batch_size, self.taps, H * (2 * K + V))

  def __call__(self, x_BTD: jax.Array, tail_BWC: jax.Array, context: Context
               ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    _, K, _ = self.dims
    dtype = x_BTD.dtype
    x_BTHC = jnp.concatenate([project(x_BTD, w.get_value()) for w in (self.w_q, self.w_k, self.w_v)],
                             axis=-1)
    if self.conv is not None:
      x_BTC, tail_BWC = self.conv(jax.lax.collapse(x_BTHC, 2), tail_BWC, context)
      x_BTHC = constrain(x_BTC.reshape(x_BTHC.shape), 'batch', 'length', 'heads', None)
    q, k, v = jnp.split(jax.nn.silu(x_BTHC), [K, 2 * K], axis=-1)
    return (unit(q) * K ** -0.5).astype(dtype), unit(k).astype(dtype), v, tail_BWC
