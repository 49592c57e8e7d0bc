"""Chunks of tokens as affine maps of a matrix state, and the scan that carries the state through them.

Whatever a recurrence does inside a chunk, if it is linear in its state it comes down to four matrices
that need no state:

  out = read S + out0        S' = map S + write

With them only one product a chunk stands in the sequential scan; the rest is batched over all chunks.
Joined, they are the map of a whole shard: (map2 map1, map2 write1 + write2). All in float32.
The backward pass of the scan is written out, so that the gradient of the maps is one batched product.
Sources: the WY form of arXiv:2406.06484, in which map = I - K^T W, write = K^T U.
Held by: tests/test_delta.py, tests/test_diagonal_low_rank.py.

B batch  H heads  N chunks  C tokens of a chunk  K key dim  V value dim
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST,
                            preferred_element_type=jnp.float32)


class Chunks(NamedTuple):
  """Tokens whose dependence on the state before them is made explicit, chunk by chunk."""

  read: jax.Array    # [N, B, H, C, K]
  out: jax.Array     # [N, B, H, C, V]
  map: jax.Array     # [N, B, H, K, K] float32
  write: jax.Array   # [N, B, H, K, V] float32


class Map(NamedTuple):
  """S -> map S + write; float32."""

  map: jax.Array     # [B, H, K, K]
  write: jax.Array   # [B, H, K, V]


def transition(chunks: Chunks) -> Map:
  """The map of all chunks: what they make of the state (I, 0), in one scan."""
  K = chunks.map.shape[-1]
  write = jnp.concatenate([jnp.zeros_like(chunks.map), chunks.write], axis=-1)
  eye = jnp.broadcast_to(jnp.eye(K, dtype=jnp.float32), chunks.map.shape[1:])
  state = jnp.concatenate([eye, jnp.zeros_like(chunks.write[0])], axis=-1)
  _, after = carry(chunks.map, write, state)
  return Map(after[..., :K], after[..., K:])


def join(first: Map, second: Map) -> Map:
  return Map(product('...ij,...jk->...ik', second.map, first.map), apply(second, first.write))


def apply(transition: Map, state: jax.Array) -> jax.Array:
  return product('...ij,...jv->...iv', transition.map, state) + transition.write


def finish(chunks: Chunks, state_BHKV: jax.Array, form: str) -> tuple[jax.Array, jax.Array]:
  """(out [N, B, H, C, V] in the type of chunks.out, state after) from the true state before.

  form='scan' joins the chunks' maps in log2(N) rounds instead of one after the other.
  """
  if form == 'scan':
    joined = jax.lax.associative_scan(join, Map(chunks.map, chunks.write))
    after = apply(joined, state_BHKV)
    before_NBHKV = jnp.concatenate([state_BHKV[None], after[:-1]])
    state_BHKV = after[-1]
  else:
    before_NBHKV, state_BHKV = carry(chunks.map, chunks.write, state_BHKV)
  old = product('...ck,...kv->...cv', chunks.read, before_NBHKV.astype(chunks.read.dtype))
  return (chunks.out + old).astype(chunks.out.dtype), state_BHKV


@jax.custom_vjp
def carry(map_NBHKK: jax.Array, write_NBHKV: jax.Array, state_BHKV: jax.Array
          ) -> tuple[jax.Array, jax.Array]:
  """(the state before each chunk [N, B, H, K, V], the state after the last)."""
  def step(state, chunk):
    return apply(Map(*chunk), state), state
  after, before = jax.lax.scan(step, state_BHKV, (map_NBHKK, write_NBHKV))
  return before, after


def _carry_forward(map_NBHKK, write_NBHKV, state_BHKV):
  before, after = carry(map_NBHKK, write_NBHKV, state_BHKV)
  return (before, after), (map_NBHKK, before)


def _carry_backward(residuals, grads):
  map_NBHKK, before_NBHKV = residuals
  dbefore_NBHKV, dafter_BHKV = grads

  def step(dstate, chunk):
    map_BHKK, dbefore = chunk
    return dbefore + product('bhij,bhiv->bhjv', map_BHKK, dstate), dstate

  dstate, dwrite = jax.lax.scan(step, dafter_BHKV, (map_NBHKK, dbefore_NBHKV), reverse=True)
  return product('nbhiv,nbhjv->nbhij', dwrite, before_NBHKV), dwrite, dstate


carry.defvjp(_carry_forward, _carry_backward)
