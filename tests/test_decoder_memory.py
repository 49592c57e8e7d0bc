"""What blocks of tokens and cut tables need, read from compiled programs: memory and exchanges."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from longctx.models import layers, lookup
from longctx.parallel import aot, hlo, hlo_exchanges, mesh

D, F, T, V = 32, 128, 2048, 4096
pytestmark = pytest.mark.usefixtures('optimized')


def shape(layout, size, dtype, *dims):
  return jax.ShapeDtypeStruct(size, dtype, sharding=layout.sharding(*dims, shape=size))


def exchanges(compiled, layout) -> Counter:
  """(kind, axis, bytes of all turns) -> how often."""
  found = hlo_exchanges.exchanges(hlo.parse(compiled.as_text()), dict(layout.mesh.shape))
  return Counter((x.kind, x.axis, x.bytes * x.times) for x in found if x.bytes)


@functools.cache
def feed_forward(length: int, block: int, data: int = 1, layout: str = 'sequence_fsdp'):
  """Value and gradient of the layer, parameters and tokens cut over 8 devices."""
  layout = mesh.make_layout(mesh.Config(data=data, seq=8 // data, layout=layout))
  graphdef, params = nnx.split(nnx.eval_shape(
      lambda: layers.MLP(D, F, 'swiglu', 0.5, 0.5, block=block, rngs=nnx.Rngs(0))), nnx.Param)
  leaves, tree = jax.tree.flatten(params)
  cuts = jax.tree.leaves(layout.params_sharding(params))
  params = jax.tree.unflatten(tree, [
      jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=cut) for x, cut in zip(leaves, cuts)])
  x = shape(layout, (data, length, D), jnp.float32, 'batch', 'length', None)
  def loss(params, x):
    return (nnx.merge(graphdef, params)(x) ** 2).sum()
  run = jax.jit(mesh.under(layout, jax.grad(loss, (0, 1))),
                out_shardings=(jax.tree.unflatten(tree, cuts), x.sharding))
  return run.lower(params, x).compile(), layout


def test_blocks_gather_the_weights_once_and_no_tokens():
  compiled, layout = feed_forward(T, 64)
  found = exchanges(compiled, layout)
  gathered = found.pop(('all-gather', 'seq', D * F * 4 * 7 // 8))
  assert gathered == 3   # gate, input and output, for all blocks of both passes
  # Gradients, summed once; a TPU's compiler makes a reduce-scatter of it.
  assert found == {('all-reduce', 'seq', 2 * 3 * D * F * 4 * 7 // 8): 1}


@pytest.mark.parametrize('layout, first, parts', [('sequence_fsdp', 'seq', 4), ('sequence', 'data', 2)])
def test_gradients_are_summed_over_the_axis_that_cuts_them_first(layout, first, parts):
  """And a part of the sum over the other: a sum over both at once would be of all that is kept, whole."""
  found = exchanges(*feed_forward(T, 64, 8 // 4, layout))
  of = lambda axis: {size: n for (kind, over, size), n in found.items() if (kind, over) == ('all-reduce', axis)}
  whole, part = 3 * D * F * 4, 3 * D * F * 4 // parts
  assert of(first) == {2 * whole * (parts - 1) // parts: 1}
  other, others = ('data', 2) if first == 'seq' else ('seq', 4)
  assert of(other) == {2 * part * (others - 1) // others: 1}
  assert not of('data+seq')


def test_memory_of_blocks_grows_with_the_layers_input_alone():
  temporary = lambda *call: aot.memory_of(feed_forward(*call)[0]).temporary
  row = T // 8 * 4   # bytes a column of the tokens that a device gains from T to 2 T
  assert temporary(2 * T, 64) - temporary(T, 64) <= 1.1 * D * row
  assert temporary(2 * T, 0) - temporary(T, 0) >= 3 * F * row


@pytest.mark.parametrize('layout, sizes, expected', [
    ('sequence_fsdp', (1, 8, 1), {('all-gather', 'seq', 8 * T // 8 * 4 * 7): 1,
                                  ('all-to-all', 'seq', 8 * T // 8 * D * 4 * 7 // 8): 2}),
    ('sequence', (2, 2, 2), {('all-gather', 'data', 4 * T // 2 * 4): 1,
                             ('all-reduce', 'model', 8 * T // 2 * D // 2 * 4): 1,
                             ('all-to-all', 'data', 4 * T // 2 * D * 4 // 2): 2,
                             # of the table's part that two devices share
                             ('all-reduce', 'seq', V // 2 * D // 2 * 4): 1})])
def test_a_lookup_sends_tokens_and_their_vectors_and_no_table(layout, sizes, expected):
  data, seq, model = sizes
  layout = mesh.make_layout(mesh.Config(data=data, seq=seq, model=model, layout=layout))
  table = shape(layout, (V, D), jnp.float32, 'vocab', 'embed')
  tokens = shape(layout, (8, T), jnp.int32, 'batch', 'length')
  loss = lambda table, tokens: (lookup.lookup(table, tokens, jnp.float32) ** 2).sum()
  run = jax.jit(mesh.under(layout, jax.grad(loss)), out_shardings=table.sharding)
  assert exchanges(run.lower(table, tokens).compile(), layout) == expected
