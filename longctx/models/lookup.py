"""Rows of an embedding table by token, with the table cut over the mesh as it is kept.

A device holds some symbols, and of each some of its D numbers. It looks up the tokens of all devices
that hold the other numbers, and an all-to-all gives each device its own tokens whole: tokens (4 bytes)
and their vectors travel, and never the table or its gradient, which would be V x D each.
Held by: tests/test_layers.py, tests/test_mesh.py (values and gradients under every layout),
tests/test_decoder_memory.py (exchanges).

B batch  T tokens  D model  V vocab
"""

import functools

import jax
import jax.numpy as jnp

from longctx.parallel import mesh

# Up to this many symbols the gradient of a lookup is a product with the one-hot matrix: a scatter
# of rows is serial on CPU and slow on TPU. Above, the product would cost more than the scatter.
ONE_HOT_VOCAB = 1024


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def rows(dtype: jnp.dtype, table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
  """Rows of the table, [B, T, D] in `dtype`; a token outside the vocabulary gives NaN."""
  return jnp.take(table_VD, tokens_BT, axis=0, mode='fill', fill_value=jnp.nan).astype(dtype)


def _rows_forward(dtype, table_VD, tokens_BT):
  return rows(dtype, table_VD, tokens_BT), (tokens_BT, jnp.zeros((0, *table_VD.shape), table_VD.dtype))


def _rows_backward(dtype, residuals, grad_BTD):
  tokens_BT, like = residuals
  _, vocab, width = like.shape
  if vocab <= ONE_HOT_VOCAB:
    one_hot_BTV = jax.nn.one_hot(tokens_BT, vocab, dtype=grad_BTD.dtype)
    table = jnp.einsum('BTV,BTD->VD', one_hot_BTV, grad_BTD, preferred_element_type=jnp.float32)
  else:
    zeros = jnp.zeros((vocab, width), jnp.float32)
    table = zeros.at[tokens_BT].add(grad_BTD.astype(jnp.float32), mode='drop')
  return table.astype(like.dtype), None


rows.defvjp(_rows_forward, _rows_backward)


def lookup(table_VD: jax.Array, tokens_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """`rows` under the current layout: [B, T, D], cut over batch and length."""
  layout = mesh.current()
  if layout is None or layout.mesh.size == 1:
    return rows(dtype, table_VD, tokens_BT)
  vocab, embed = (axis if axis and layout.mesh.shape[axis] > 1 else None
                  for axis in layout.spec('vocab', 'embed', shape=table_VD.shape))
  over = [layout.rules[dim] for dim in ('batch', 'length')]
  divides = all(size % layout.size(dim) == 0
                for dim, size in zip(('batch', 'length'), tokens_BT.shape))
  if (vocab is None and embed is None) or not divides or (embed and embed not in over):
    return mesh.constrain(rows(dtype, table_VD, tokens_BT), 'batch', 'length', None)
  vocab_size = table_VD.shape[0]

  def part(table_VD, tokens_BT):
    # The backward pass sums the table's gradient over the devices that have the same part of it.
    also = tuple(axis for axis in over if axis and axis not in (vocab, embed))
    table_VD = jax.lax.pcast(table_VD, also, to='varying')
    if embed:
      dim = over.index(embed)
      tokens_BT = jax.lax.all_gather(tokens_BT, embed, axis=dim, tiled=True)
    if vocab:
      place_BT = tokens_BT - jax.lax.axis_index(vocab) * table_VD.shape[0]
      mine_BT = (place_BT >= 0) & (place_BT < table_VD.shape[0])
      x_BTD = rows(dtype, table_VD, jnp.where(mine_BT, place_BT, 0))
      x_BTD = jax.lax.psum(jnp.where(mine_BT[..., None], x_BTD, 0), vocab)   # one is not 0
      known_BT = (tokens_BT >= 0) & (tokens_BT < vocab_size)
      x_BTD = jnp.where(known_BT[..., None], x_BTD, jnp.nan)
    else:
      x_BTD = rows(dtype, table_VD, tokens_BT)
    if embed:
      x_BTD = jax.lax.all_to_all(x_BTD, embed, split_axis=dim, concat_axis=2, tiled=True)
    return x_BTD

  return jax.shard_map(
      part, mesh=layout.mesh,
      in_specs=(jax.sharding.PartitionSpec(vocab, embed), layout.spec('batch', 'length')),
      out_specs=layout.spec('batch', 'length', None))(table_VD, tokens_BT)
