"""Where a token stands, told to a stack of attention layers: added to its vector, turned, or as a bias.

    rope        queries and keys are turned by their position (arXiv:2104.09864)
    sinusoidal  PE(p, 2i) = sin(p / 10000^(2i/D)), PE(p, 2i+1) = cos of the same, added to the vectors,
                which are multiplied by sqrt(D) first (arXiv:1706.03762, sections 3.4 and 3.5)
    t5          a learned number for each head and bucket of distances, added to the scores of all layers
                of the stack (arXiv:1910.10683, section 2.1); buckets: longctx/attention/biases.py
    learned     a vector for each position, added (BERT, arXiv:1810.04805)
    none        nothing
Held by: tests/test_encoder_decoder.py.

B batch  T tokens  N query heads  X buckets  H head dim  D model
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from longctx.attention.biases import T5Buckets
from longctx.models.context import Context
from longctx.models.layers import normal, param, rotary_angles

KINDS = ('rope', 'sinusoidal', 't5', 'learned', 'none')


class Positions(nnx.Module):
  """x_BTD, context = positions(x_BTD, context): what the stack reads, and how its layers attend."""

  def __init__(self, config: Any, *, length: int, both_ways: bool, rngs: nnx.Rngs):
    """`config`: of models/encoder_config; `length`: positions that a learned table has."""
    self.config, self.both_ways = config, both_ways
    shape, dims = {'learned': ((length, config.embed_dim), (None, 'embed')),
                   't5': ((config.num_heads, config.position_buckets), ('heads', None)),
                   }.get(config.position, (None, ()))
    self.table = param(rngs, normal(config.init_std), shape, dims) if shape else None

  def __call__(self, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, Context]:
    c = self.config
    match c.position:
      case 'rope':
        return x_BTD, context._replace(
            angles=rotary_angles(context.position_BT, c.head_dim, c.rope_base))
      case 't5':
        bias = T5Buckets(self.table.get_value(), c.position_distance, self.both_ways)
        return x_BTD, context._replace(bias=bias)
      case 'sinusoidal':
        return (x_BTD * math.sqrt(c.embed_dim)
                + sinusoids(context.position_BT, c.embed_dim).astype(x_BTD.dtype)), context
      case 'learned':
        # Beyond the table there is no vector: NaN, and not the last one again.
        return x_BTD + jnp.take(self.table.get_value().astype(x_BTD.dtype), context.position_BT,
                                axis=0, mode='fill', fill_value=jnp.nan), context
    return x_BTD, context


def sinusoids(position_BT: jax.Array, dim: int) -> jax.Array:
  """float32 [B, T, D]."""
  rate = 10_000.0 ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
  angle = position_BT[..., None].astype(jnp.float32) * rate
  return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(*position_BT.shape, dim)


def num_parameters(config: Any, length: int) -> int:
  """Of one stack, in closed form."""
  return {'learned': length * config.embed_dim,
          't5': config.num_heads * config.position_buckets}.get(config.position, 0)
