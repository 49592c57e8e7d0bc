"""Additive score biases, made block by block from token indices: [T, S] never exists.

A bias is a pytree whose arrays have the query heads as their leading dim, with
`block(q_index_P, k_index_R) -> [heads, P, R]`; kernels call it with the arrays of a few heads and
give gradients to the arrays.
Sources: ALiBi, arXiv:2108.12409; T5's relative position buckets, arXiv:1910.10683.
Held by: tests/test_attention.py.

N query heads  P queries of a block  R keys of a block
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp


@functools.partial(jax.tree_util.register_dataclass, data_fields=('slope_N',), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Alibi:
  """-slope * distance: nearer keys weigh more."""

  slope_N: jax.Array

  def block(self, q_index_P: jax.Array, k_index_R: jax.Array) -> jax.Array:
    distance_PR = jnp.abs(q_index_P[:, None] - k_index_R[None, :])
    return -self.slope_N[:, None, None] * distance_PR


def alibi(num_heads: int) -> Alibi:
  """The paper's slopes: 2^(-8 i / N) for a power of two; else the even slopes of the next one too."""
  power = 2 ** math.floor(math.log2(num_heads))
  slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
  slopes += [2 ** (-8 * (i + 1) / (2 * power)) for i in range(0, 2 * power, 2)]
  return Alibi(jnp.asarray(slopes[:num_heads], jnp.float32))


@functools.partial(jax.tree_util.register_dataclass, data_fields=('table_NX',),
                   meta_fields=('max_distance', 'bidirectional'))
@dataclasses.dataclass(frozen=True)
class T5Buckets:
  """A learned number for each head and bucket of distances (X buckets; log-spaced when far)."""

  table_NX: jax.Array
  max_distance: int = 128
  bidirectional: bool = False

  def block(self, q_index_P: jax.Array, k_index_R: jax.Array) -> jax.Array:
    num_buckets = self.table_NX.shape[1]
    least = 4 if self.bidirectional else 2
    if num_buckets < least:
      raise ValueError(f'table_NX has {num_buckets} buckets: must have at least {least}, half of '
                       'them of one distance each')
    distance_PR = q_index_P[:, None] - k_index_R[None, :]   # > 0: the key came before
    offset_PR = 0
    if self.bidirectional:
      num_buckets //= 2
      offset_PR = jnp.where(distance_PR < 0, num_buckets, 0)
      distance_PR = jnp.abs(distance_PR)
    distance_PR = jnp.maximum(distance_PR, 0)
    exact = num_buckets // 2
    ratio_PR = jnp.log(jnp.maximum(distance_PR, 1) / exact) / math.log(self.max_distance / exact)
    far_PR = exact + (ratio_PR * (num_buckets - exact)).astype(jnp.int32)
    bucket_PR = jnp.where(distance_PR < exact, distance_PR, jnp.minimum(far_PR, num_buckets - 1))
    return self.table_NX[:, offset_PR + bucket_PR]
