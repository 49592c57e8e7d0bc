"""Rows of tokens as chunks, and which tokens of a chunk belong to the same document.

A document that begins inside a chunk is not expressed by a decay of 0, whose logarithm would meet
itself in differences: documents are counted, and pairs of different ones masked before the exponential.
Held by: tests/test_delta.py, tests/test_mlstm.py.

B batch  T tokens  H heads  N chunks  C tokens of a chunk
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Documents(NamedTuple):
  """Of the tokens of each chunk. Booleans; H is 1 where all heads have the same."""

  pair: jax.Array    # [N, B, H, C, C]: i <= t, in one document
  first: jax.Array   # [N, B, H, C]: of the document that was open before the chunk
  last: jax.Array    # [N, B, H, C]: of the document that is open after it
  open: jax.Array    # [N, B, H]: no document begins in the chunk


def documents(reset_NBHC: jax.Array) -> Documents:
  count = jnp.cumsum(reset_NBHC, axis=-1, dtype=jnp.int32)
  end = count[..., -1]
  same = count[..., :, None] == count[..., None, :]
  return Documents(pair=jnp.tril(same), first=count == 0, last=count == end[..., None],
                   open=end == 0)


def chunk_size(length: int, chunk: int) -> int:
  """Tokens of a chunk, a power of two: at most `chunk`, no more than the tokens fill."""
  return min(chunk, 1 << (length - 1).bit_length())


def to_chunks(x_BT: jax.Array, size: int) -> jax.Array:
  """[B, T, H, ...] -> [N, B, H, C, ...], [B, T] -> [N, B, 1, C]; zeros fill the last chunk."""
  if x_BT.ndim == 2:
    x_BT = x_BT[:, :, None]
  batch, length, heads, *rest = x_BT.shape
  count = -(-length // size)
  filled = jnp.pad(x_BT, ((0, 0), (0, count * size - length)) + ((0, 0),) * (x_BT.ndim - 2))
  x_BNCH = filled.reshape(batch, count, size, heads, *rest)
  return jnp.moveaxis(x_BNCH, (1, 0, 3, 2), (0, 1, 2, 3))


def from_chunks(x_NBHC: jax.Array, length: int) -> jax.Array:
  """[N, B, H, C, ...] -> [B, T, H, ...]."""
  x_BNCH = jnp.moveaxis(x_NBHC, (1, 0, 3, 2), (0, 1, 2, 3))
  return jax.lax.collapse(x_BNCH, 1, 3)[:, :length]
