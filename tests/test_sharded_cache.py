"""A cache of keys cut over devices: prefill in chunks and decode are those of one device.

B batch  T tokens  S slots  N query heads  K kv heads  H head dim
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.attention import Intervals, attend
from longctx.inference import sampling
from longctx.models import attention_layer, decoder
from longctx.parallel import mesh, sequence

VOCAB, BATCH, CAPACITY, PROMPT = 23, 2, 48, 40
CONFIG = decoder.Config(vocab_size=VOCAB, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2,
                        window=(0, 13), max_length=64, init_std=0.3)
LAYOUTS = {
    'ring of 3': mesh.Config(seq=3, layout='sequence', data=1),
    'both ways over 8': mesh.Config(seq=8, layout='sequence', data=1, strategy='bidirectional'),
    'data 2, ring of 2, model 2': mesh.Config(data=2, seq=2, model=2, layout='sequence'),
}


def make_layout(config):
  devices = jax.devices()[:config.data * config.seq * config.model]
  return mesh.make_layout(config, devices)


@functools.cache
def made():
  graphdef, params = nnx.split(decoder.Decoder(CONFIG, rngs=nnx.Rngs(0)))
  tokens = jax.random.randint(jax.random.key(1), (BATCH, PROMPT), 0, VOCAB)
  return graphdef, params, tokens


@functools.cache
def read(layout):
  """Hidden states of a document read in chunks of 24 (one row shorter than the other) and tokens."""
  graphdef, params, tokens = made()
  wrap = functools.partial(mesh.under, layout) if layout else lambda f: f
  fresh = jax.jit(wrap(lambda p: nnx.merge(graphdef, p).init_state(BATCH, CAPACITY)))
  call = jax.jit(wrap(lambda p, s, t, valid: nnx.merge(graphdef, p)(t, s, valid_BT=valid)))
  state, pieces = fresh(params), []
  valid = np.ones((BATCH, PROMPT), bool)
  valid[1, 17:24] = False
  for a, b in ((0, 24), *((i, i + 1) for i in range(24, PROMPT))):
    hidden, state = call(params, state, tokens[:, a:b], jnp.asarray(valid[:, a:b]))
    pieces.append(hidden)
  return np.concatenate(pieces, axis=1)[valid], state


@pytest.mark.parametrize('name', LAYOUTS)
def test_prefill_and_decode_are_those_of_one_device(name):
  layout = make_layout(LAYOUTS[name])
  hidden, state = read(layout)
  expected, one = read(None)
  np.testing.assert_allclose(hidden, expected, atol=2e-5, rtol=2e-5)
  for cache, alone in zip(state.layers, one.layers):
    np.testing.assert_array_equal(cache.index, alone.index)
    np.testing.assert_allclose(cache.k, alone.k, atol=2e-5)
  full = state.layers[0].k
  assert full.sharding.spec[1] == 'seq'
  assert full.addressable_shards[0].data.shape[1] == CAPACITY // layout.size('length')


def test_generation_over_devices_says_the_same():
  graphdef, params, tokens = made()
  prompts = [np.asarray(tokens[0, :30]), np.asarray(tokens[1, :7])]
  settings = dict(max_new_tokens=9, chunk=8, capacity=CAPACITY, seed=3)
  alone = list(sampling.generate_batch(graphdef, params, prompts, **settings))
  layout = make_layout(LAYOUTS['ring of 3'])
  shared = list(sampling.generate_batch(graphdef, layout.replicate(params), prompts,
                                        layout=layout, **settings))
  np.testing.assert_array_equal(shared, alone)


@pytest.mark.parametrize('strategy,order,ulysses', [
    ('ring', 'striped', 1), ('bidirectional', 'zigzag', 1), ('ulysses', 'striped', 1),
    ('hybrid', 'zigzag', 2)])
def test_tokens_as_they_come_are_read_in_any_order_of_the_mesh(strategy, order, ulysses):
  """Evaluation and generation lay nothing out, whatever mesh.order training has; padding amid rows."""
  layout = make_layout(mesh.Config(data=1, seq=4, layout='sequence', strategy=strategy, order=order,
                                   ulysses=ulysses, unit=4))
  graphdef, params, tokens = made()
  valid = np.ones((BATCH, PROMPT), bool)
  valid[0, 9:30] = valid[1, 20:23] = False
  def both(params, tokens, valid):
    model = nnx.merge(graphdef, params)
    return model(tokens, None)[0], model(tokens, None, valid_BT=valid)[0]
  found = jax.jit(mesh.under(layout, both))(params, tokens, jnp.asarray(valid))
  expected = read_whole(both)(params, tokens, jnp.asarray(valid))
  np.testing.assert_allclose(found[0], expected[0], atol=2e-5)
  np.testing.assert_allclose(np.asarray(found[1])[valid], np.asarray(expected[1])[valid], atol=2e-5)


@functools.cache
def whole_program():
  return {}


def read_whole(both):
  """One device's program, compiled once for all cases."""
  return whole_program().setdefault('both', jax.jit(both))


def arrays(length, slots):
  key = jax.random.split(jax.random.key(7), 3)
  q = jax.random.normal(key[0], (BATCH, length, 4, 8))
  k, v = (jax.random.normal(x, (BATCH, slots, 2, 8)) for x in key[1:])
  index = jnp.asarray(np.random.default_rng(0).permuted(
      np.tile(np.arange(slots), (BATCH, 1)), axis=1)).at[:, 3:9].set(-1)
  at = slots - 20 + jnp.arange(length)
  mask = Intervals(start_BT=jnp.broadcast_to(at - 30, (BATCH, length)).clip(0).at[0, 0].set(10),
                   end_BT=jnp.broadcast_to(at + 1, (BATCH, length)).at[0, 0].set(10),   # nothing
                   index_BT=jnp.broadcast_to(at, (BATCH, length)), key_index_BS=index, kind='any')
  return q, k, v, mask


@pytest.mark.parametrize('length,slots', [
    (1, 48), (24, 48), pytest.param(3, 45, marks=pytest.mark.slow),
    pytest.param(24, 45, marks=pytest.mark.slow)])
def test_attention_to_a_cut_cache_is_exact_in_values_and_gradients(length, slots):
  """Few queries go to the slots, many have the slots come; 45 are not cut at all."""
  q, k, v, mask = arrays(length, slots)

  def loss(q, k, v):
    out, lse = attend(q, k, v, mask, cached=True)
    return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))) + jnp.sum(
        jnp.where(lse > -1e29, lse, 0)), (out, lse)

  expected = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
  layout = make_layout(LAYOUTS['both ways over 8'])
  found = jax.jit(mesh.under(layout, jax.value_and_grad(loss, (0, 1, 2), has_aux=True)))(q, k, v)
  assert (np.asarray(found[0][1][0][0, 0]) == 0).all()
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
    np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


def test_one_token_moves_no_keys():
  """A step's exchanges: the largest score and the sums of what each device saw, of any cache."""
  graphdef, params, _ = made()
  layout = make_layout(dataclasses.replace(LAYOUTS['both ways over 8'], strategy='ring'))

  def sent(capacity):
    model = nnx.merge(graphdef, params)
    state = jax.eval_shape(mesh.under(layout, lambda: model.init_state(1, capacity)))
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state,
        attention_layer.shardings(layout, state))
    step = jax.jit(mesh.under(layout, lambda p, s, t: nnx.merge(graphdef, p)(t, s)))
    text = step.lower(params, state, jax.ShapeDtypeStruct((1, 1), jnp.int32)).compile().as_text()
    assert not re.findall(r'= .+? (?:all-gather|all-to-all|collective-permute)(?:-start)?\(', text)
    return re.findall(r'= (.+?) all-reduce(?:-start)?\(', text)

  assert sent(2048) == sent(64) != []


def test_slots_are_dealt_evenly_whatever_the_mesh():
  slots = 4 * attention_layer.LANES
  place = attention_layer.place_of(np.arange(slots), slots)
  assert sorted(place) == list(range(slots))
  for devices in (2, 4, 8, 16):
    for length in (devices, 64, 100, slots):
      share = np.bincount(place[:length] // (slots // devices), minlength=devices)
      assert share.max() - share.min() <= 1


def test_a_rebased_cache_keeps_each_key_in_its_slot():
  """Slots whose number does not divide the shift: they move to the slot of their new index."""
  slots, shift = 2 * attention_layer.LANES, 1000
  cache = attention_layer.empty_cache(1, slots, 1, 2, jnp.float32)
  index = jnp.arange(1500, 1500 + slots)[None]
  keys = jnp.broadcast_to(index[..., None, None].astype(jnp.float32), (1, slots, 1, 2))
  cache = attention_layer.write(cache, keys, keys, index)
  moved = attention_layer.rebase(cache, jnp.asarray([shift]), shift)
  again = attention_layer.write(attention_layer.empty_cache(1, slots, 1, 2, jnp.float32), keys,
                                keys, index - shift)
  for a, b in zip(moved, again):
    np.testing.assert_array_equal(a, b)


def test_writing_drops_what_has_no_slot():
  layout = make_layout(LAYOUTS['ring of 3'])
  old, new = jnp.zeros((1, 6), jnp.int32), jnp.asarray([[5, 6, 7]])
  write = jax.jit(mesh.under(layout, sequence.write_slots))
  np.testing.assert_array_equal(write(old, new, jnp.asarray([[4, 6, 1]])), [[0, 7, 0, 0, 5, 0]])
