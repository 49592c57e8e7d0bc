"""Recurrent layers over a mesh: loss and gradients of one device, and what is sent for them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.models import decoder
from longctx.parallel import layouts, mesh

VOCAB, BATCH, LENGTH = 29, 2, 64
CONFIG = decoder.Config(vocab_size=VOCAB, num_layers=4, embed_dim=16, num_heads=2, init_std=0.3,
                        layers=('gated_delta', 'mamba2', 'rglru', 'attention'), mixer_chunk=8)
LAYOUTS = {
    'seq 8': mesh.Config(data=1, seq=8, layout='sequence'),
    'data 2, seq 2, model 2': mesh.Config(data=2, seq=2, model=2, layout='sequence'),
}


@functools.cache
def made():
  graphdef, params = nnx.split(decoder.Decoder(CONFIG, rngs=nnx.Rngs(0)))
  tokens = jax.random.randint(jax.random.key(1), (BATCH, LENGTH), 0, VOCAB)
  segments = jnp.asarray(np.sort(np.random.default_rng(0).integers(1, 5, (BATCH, LENGTH))))
  return graphdef, params, tokens, segments


def loss(params, tokens, segments):
  model = nnx.merge(made()[0], params)
  hidden, _ = model(tokens, None, segment_ids_BT=segments)
  logits = model.logits(hidden).astype(jnp.float32)
  return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1).mean()


@functools.cache
def alone():
  return jax.jit(jax.value_and_grad(loss))(*made()[1:])


@pytest.mark.parametrize('name', [
    pytest.param('data 2, seq 2, model 2', marks=pytest.mark.slow), 'seq 8'])
def test_loss_and_gradients_are_those_of_one_device(name):
  layout = mesh.make_layout(LAYOUTS[name])
  _, params, tokens, segments = made()
  rows = layout.sharding('batch', 'length')
  args = (jax.device_put(params, layout.params_sharding(params)),
          jax.device_put(tokens, rows), jax.device_put(segments, rows))
  found = jax.jit(mesh.under(layout, jax.value_and_grad(loss)))(*args)
  scale = max(np.abs(x).max() for x in jax.tree.leaves(alone()[1]))
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(alone()), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5 * scale, rtol=1e-4)


def test_rows_that_the_ring_does_not_divide_are_padded_and_give_the_same():
  """As training lays them out: tokens, and where each of them stands."""
  layout = mesh.make_layout(mesh.Config(data=1, seq=4, layout='sequence'), jax.devices()[:4])
  graphdef, params, tokens, segments = made()
  short = LENGTH - 3
  rows = layouts.lay_out({'tokens': np.asarray(tokens[:, :short]),
                          'segment_ids': np.asarray(segments[:, :short])}, 'contiguous', 4)
  assert rows['tokens'].shape[1] == short + 3 and (rows['index'][:, -3:] == -1).all()
  hidden = lambda params, tokens, **kw: nnx.merge(graphdef, params)(tokens, None, **kw)[0]
  found = jax.jit(mesh.under(layout, hidden))(
      params, jnp.asarray(rows['tokens']),
      places=(jnp.asarray(rows['index']), jnp.asarray(rows['start'])))
  expected = jax.jit(hidden)(params, tokens[:, :short], segment_ids_BT=segments[:, :short])
  np.testing.assert_allclose(found[:, :short], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize('laid_out', [False, True])
def test_what_is_sent_does_not_grow_with_the_tokens(laid_out):
  """Maps of the state and three tokens of the convolution's left neighbour, never activations."""
  config = decoder.Config(vocab_size=VOCAB, num_layers=2, embed_dim=16, num_heads=2,
                          layers=('gated_delta', 'mamba2'), mixer_chunk=8, mlp='none')
  graphdef, params = nnx.split(decoder.Decoder(config, rngs=nnx.Rngs(0)))
  layout = mesh.make_layout(mesh.Config(data=1, seq=4, layout='sequence'), jax.devices()[:4])
  call = jax.jit(mesh.under(layout, lambda p, t: nnx.merge(graphdef, p)(
      t, None, places=(t, 0 * t) if laid_out else None)[0]))

  def sent(length):
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32,
                                  sharding=layout.sharding('batch', 'length'))
    text = call.lower(params, tokens).compile().as_text()
    kinds = 'all-gather|all-to-all|collective-permute|all-reduce'
    layers = '\n'.join(line for line in text.splitlines() if '/while/body' in line)   # a scan
    return sorted(re.findall(rf'= (.+?) ((?:{kinds})(?:-start)?)\(', layers))

  short, long = sent(64), sent(256)
  assert short == long
  assert sorted({kind for _, kind in short}) == ['all-gather', 'collective-permute']
