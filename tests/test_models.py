"""The laws of every model: whole == any split == token by token, packed == separate, causality.

A new model joins by one line in MODELS. What it costs is compilation: of each, calls of six shapes and
kinds are compiled for the quick tests, those that training and inference make, and the rest for the slow.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.memory import memorizing
from longctx.models import (
  attention_layer,
  decoder,
  encoder_config,
  encoder_decoder,
  memory_config,
  memory_decoder,
  recurrent,
  segments,
)
from longctx.models.memories import base as memories
from longctx.models.mixers import MIXERS

VOCAB, BATCH, LENGTH = 29, 2, 24

cell = functools.partial(recurrent.Config, vocab_size=VOCAB, embed_dim=12, hidden_dim=16, init_std=0.5)
small = functools.partial(decoder.Config, vocab_size=VOCAB, num_layers=2, embed_dim=16, num_heads=4,
                          max_length=64, init_std=0.3)
def recurrent_layers(*layers, **settings):
  return small(layers=layers, num_layers=len(layers), num_heads=2, mixer_chunk=8, **settings)


def memory(long_term, **settings):
  return memory_config.Config(**dict(
      vocab_size=VOCAB, num_layers=1, embed_dim=16, num_heads=2, segment=5, init_std=0.3, mlp='none',
      long_term=long_term) | settings)


MODELS = {
    'full': small(),
    'grouped': small(num_kv_heads=2, qk_norm=True, tied=False),
    'windowed': small(window=(5,)),
    'mixed': small(window=(0, 3), layer_loop='unrolled'),
    'window of one': small(window=(1, 0)),
    'gelu learned': small(mlp='gelu', position='learned', remat='dots'),
    # Mixers in one model share its compilations; tests/test_<recurrence>.py hold each by itself.
    'delta rules': recurrent_layers('delta_net', 'gated_delta', 'kda', mixer_negative=True, mlp='none'),
    'decays': recurrent_layers('linear_attention', 'retention', 'gla', 'mamba2', mlp='none'),
    'griffin': recurrent_layers('min_gru', 'min_lstm', 'rglru', 'attention', window=(5,), mlp='none'),
    'normalised': recurrent_layers('mlstm', 'rwkv7', mlp='none'),
    'elman': cell(name='elman', num_layers=1),
    'lstm': cell(tied=True),
    'gru': cell(name='gru', layer_norm=True),
    'slstm': cell(name='slstm', num_layers=1, cell_heads=4),
    # Segment memories as they are published and used, and then otherwise.
    'transformer_xl': memory('none', short_term=7, mlp='swiglu'),
    'relative': memory('none', short_term=3, position='relative', num_heads=4, num_kv_heads=2),
    'infini': memory('infini', num_layers=2, num_heads=4, num_kv_heads=2, mlp='swiglu'),
    'two stores': memory('infini', num_layers=2, short_term=7, memory_variant='linear',
                         memory_layers=(1,)),
    'compressive': memory('compressive', segment=6, short_term=3, memory_size=4, position='relative'),
    'compressive mean': memory('compressive', segment=6, short_term=3, memory_size=2, memory_variant='mean'),
    'compressive max': memory('compressive', segment=6, short_term=6, memory_size=3, memory_rate=2,
                              memory_variant='max'),
    'block_recurrent': memory('block_recurrent', memory_tokens=3, short_term=5, num_heads=4, num_kv_heads=2),
    'block_recurrent without a window': memory('block_recurrent', num_layers=2, memory_tokens=3),
    'block_recurrent lstm': memory('block_recurrent', memory_tokens=3, memory_variant='lstm', short_term=3,
                                   qk_norm=True),
    'memorizing': memory('memorizing', memory_size=9, memory_top=3),
    'memorizing behind a window': memory('memorizing', short_term=3, memory_size=9, memory_top=3,
                                         qk_norm=True, memory_layers=(0,), mlp='swiglu'),
    'armt': memory('armt', memory_tokens=3, memory_width=16),
    'armt behind a window': memory('armt', num_layers=2, memory_tokens=3, memory_width=16, short_term=3),
    'rmt': memory('rmt', memory_tokens=2),
    'rmt behind a window': memory('rmt', num_layers=2, memory_tokens=2, short_term=3),
    'memory caching': memory('memory_caching', memory_size=3, memory_top=2),
    'cached linear': memory('memory_caching', memory_size=2, memory_variant='linear_residual'),
    'caching behind a window': memory('memory_caching', memory_variant='gated_delta', memory_size=3,
                                      memory_width=4, short_term=3),
    'cached rglru': memory('memory_caching', memory_variant='rglru_residual', memory_size=2),
    'titans mag': memory('titans', segment=6, memory_chunk=3, memory_rate=2),
    'titans behind a window': memory('titans', segment=6, memory_chunk=3, memory_variant='mac',
                                     short_term=3),
    'titans mac': memory('titans', segment=6, memory_chunk=3, memory_variant='mac', num_heads=4,
                         num_kv_heads=2),
    'titans mal': memory('titans', segment=6, memory_chunk=3, memory_rate=4, memory_variant='mal'),
    'titans mal behind a window': memory('titans', segment=6, memory_chunk=3, memory_rate=4,
                                         memory_variant='mal', memory_depth=1, memory_tokens=2,
                                         short_term=7),
    'titans alone': memory('titans', segment=6, memory_chunk=2, memory_rate=4,
                           memory_variant='memory', memory_depth=3, memory_width=5),
    'ttt': memory('ttt', segment=6, memory_chunk=3),
    'ttt behind a window': memory('ttt', num_layers=2, segment=6, memory_chunk=3, short_term=3),
    # Without a source; with one: tests/test_encoder_decoder.py.
    'encoder_decoder': encoder_config.PairConfig(
        vocab_size=VOCAB, num_layers=1, embed_dim=16, num_heads=4, max_length=64, source_length=8,
        init_std=0.3, position='t5', layer_loop='unrolled'),
}
# Their parts stand in other models too, or are held by tests of their own; of memories, what is not used most.
SLOW = ('windowed', 'window of one', 'gelu learned', 'elman', 'gru', 'decays', 'normalised', 'relative',
        'compressive mean', 'compressive max', 'block_recurrent without a window', 'block_recurrent lstm',
        'memorizing behind a window', 'armt behind a window', 'rmt behind a window', 'cached linear',
        'cached rglru', 'caching behind a window', 'titans mac', 'titans mal', 'titans alone',
        'titans behind a window', 'titans mal behind a window', 'ttt behind a window')
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in MODELS]
# Rows of one document ask for nothing that rows of several do not; a kind of state each shows it.
OF_ONE_DOCUMENT = ('full', 'lstm', 'delta rules', 'infini')
CLASSES = {'decoder': decoder.Decoder, 'memory': memory_decoder.MemoryDecoder,
           'encoder_decoder': encoder_decoder.EncoderDecoder} | dict.fromkeys(recurrent.CELLS, recurrent.Recurrent)


def built(config):
  """The model; of a segment memory no parameter is left as it begins: what is closed hides the rest."""
  model = CLASSES[config.name](config, rngs=nnx.Rngs(0))
  if config.name != 'memory':
    return model
  graphdef, params = nnx.split(model)
  leaves, tree = jax.tree.flatten(params)
  rng = np.random.default_rng(0)
  shaken = [x + 0.3 * rng.standard_normal(x.shape, np.float32) * (np.ptp(x) == 0) for x in leaves]
  return nnx.merge(graphdef, jax.tree.unflatten(tree, shaken))


@functools.cache
def made(name):
  config = MODELS[name]
  model = built(config)
  graphdef, params = nnx.split(model)
  call = jax.jit(lambda params, *args, **kwargs: nnx.merge(graphdef, params)(*args, **kwargs))
  return model, functools.partial(call, params)


@functools.cache
def tokens():
  return jax.random.randint(jax.random.key(1), (BATCH, LENGTH), 0, VOCAB)


SEGMENTS = np.array([[1] * 7 + [2] * 1 + [3] * 16, [5] * 15 + [6] * 9])


def run_split(call, state, edges, **arrays):
  """The hidden states of a row read in pieces, and the state after it."""
  pieces = []
  for a, b in itertools.pairwise(edges):
    given = {k: v[:, a:b] for k, v in arrays.items()}
    if b - a == 8 and not arrays:   # the program that reads padding serves
      given['valid_BT'] = jnp.ones((BATCH, 8), bool)
    hidden, state = call(tokens()[:, a:b], state, **given)
    pieces.append(hidden)
  return np.concatenate(pieces, axis=1), state


# Pieces of 8 and of 1 token only: each length compiles once a model.
SPLITS = {'uneven': (0, 8, 9, 10, 18, 19, 20, 21, 22, 23, 24), 'one by one': tuple(range(25))}


def test_every_mixer_and_cell_is_held_to_these_laws():
  layers = {layer for config in MODELS.values() for layer in getattr(config, 'layers', ())}
  assert set(MIXERS) <= layers
  assert set(recurrent.CELLS) <= {config.name for config in MODELS.values()}


@pytest.mark.parametrize('split', SPLITS)
@pytest.mark.parametrize('name, packed', [
    *((name, True) for name in MODELS if name not in SLOW), *((name, False) for name in OF_ONE_DOCUMENT),
    *(pytest.param(name, packed, marks=pytest.mark.slow) for name in MODELS for packed in (False, True)
      if (name in SLOW if packed else name not in OF_ONE_DOCUMENT))])
def test_whole_equals_any_split(name, packed, split):
  model, call = made(name)
  arrays = {'segment_ids_BT': jnp.asarray(SEGMENTS)} if packed else {}
  whole, none = call(tokens(), None, **arrays)
  assert none is None
  carried, _ = run_split(call, model.init_state(BATCH, 32), SPLITS[split], **arrays)
  np.testing.assert_allclose(carried, whole, atol=1e-5, rtol=1e-5)


def states_are_equal(found, expected):
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('name', NAMES)
def test_state_after_pieces_is_the_state_after_single_tokens(name):
  """Of packed documents; a piece of 8 tokens holds whole segments, and parts of two documents."""
  model, call = made(name)
  states_are_equal(*(run_split(call, model.init_state(BATCH, 32), split, segment_ids_BT=jnp.asarray(SEGMENTS))[1]
                     for split in SPLITS.values()))


@pytest.mark.parametrize('name', [
    name if name in OF_ONE_DOCUMENT else pytest.param(name, marks=pytest.mark.slow) for name in MODELS])
def test_state_after_a_split_is_the_state_after_the_whole(name):
  model, call = made(name)
  _, after_whole = call(tokens(), model.init_state(BATCH, 32))
  _, after_split = run_split(call, model.init_state(BATCH, 32), SPLITS['uneven'])
  states_are_equal(after_split, after_whole)


@pytest.mark.parametrize('name', NAMES)
def test_packed_equals_separate(name):
  _, call = made(name)
  packed, _ = call(tokens(), None, segment_ids_BT=jnp.asarray(SEGMENTS))
  for row, a, b in ((0, 0, 7), (0, 7, 8), (0, 8, 24), (1, 0, 15), (1, 15, 24)):
    # What follows a token does not move it (the next test), so one shape serves all documents.
    moved = jnp.tile(jnp.roll(tokens()[row], -a), (BATCH, 1))
    alone, _ = call(moved, None)
    np.testing.assert_allclose(packed[row, a:b], alone[0, :b - a], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('name', NAMES)
def test_the_future_and_other_documents_change_nothing(name):
  """Bit for bit: what cannot be seen must not move."""
  _, call = made(name)
  segments = jnp.asarray(SEGMENTS)
  before, _ = call(tokens(), None, segment_ids_BT=segments)
  other = tokens().at[0, 3].add(1).at[1, 20].add(1) % VOCAB
  after, _ = call(other, None, segment_ids_BT=segments)
  moved = np.any(np.asarray(before) != np.asarray(after), axis=-1)
  assert not moved[0, :3].any() and moved[0, 3] and not moved[0, 7:].any()
  assert not moved[1, :20].any() and moved[1, 20]


@pytest.mark.parametrize('where', ['left', 'right', 'middle', 'a whole call'])
@pytest.mark.parametrize('name', NAMES)
def test_padding_is_not_seen(name, where):
  model, call = made(name)
  whole, _ = call(tokens(), None)
  at = {'left': range(8), 'right': range(24, 32), 'middle': (1, 2, 3, 7, 8, 13, 20, 30),
        'a whole call': range(8, 16)}[where]
  length = LENGTH + 8
  valid = np.ones((BATCH, length), bool)
  valid[:, list(at)] = False
  padded = np.full((BATCH, length), 7)
  padded[valid] = np.asarray(tokens()).ravel()
  state, pieces = model.init_state(BATCH, 32), []
  for a, b in ((0, 8), (8, 16), (16, 24), (24, 32)):
    hidden, state = call(jnp.asarray(padded[:, a:b]), state, valid_BT=jnp.asarray(valid[:, a:b]))
    pieces.append(hidden)
  hidden = np.concatenate(pieces, axis=1)
  kept = hidden[valid].reshape(BATCH, LENGTH, -1)
  np.testing.assert_allclose(kept, whole, atol=1e-5, rtol=1e-5)
  stateless, _ = call(jnp.asarray(padded), None, valid_BT=jnp.asarray(valid))
  np.testing.assert_allclose(np.asarray(stateless)[valid].reshape(BATCH, LENGTH, -1), whole,
                             atol=1e-5, rtol=1e-5)
  assert np.isfinite(hidden).all()


@pytest.mark.parametrize('name', NAMES)
def test_rows_with_padding_of_their_own(name):
  """One row pads while the other reads: a row's state stands still, the other's moves on."""
  model, call = made(name)
  whole, _ = call(tokens(), None)
  valid = jnp.asarray([[True] * 5 + [False] * 3, [False] * 3 + [True] * 5])
  mixed = jnp.stack([jnp.pad(tokens()[0, :5], (0, 3)), jnp.pad(tokens()[1, :5], (3, 0))])
  hidden, state = call(mixed, model.init_state(BATCH, 32), valid_BT=valid)
  np.testing.assert_allclose(hidden[0, :5], whole[0, :5], atol=1e-5, rtol=1e-5)
  np.testing.assert_allclose(hidden[1, 3:], whole[1, :5], atol=1e-5, rtol=1e-5)
  hidden, _ = call(tokens()[:, 5:13], state, valid_BT=jnp.ones((BATCH, 8), bool))
  np.testing.assert_allclose(hidden, whole[:, 5:13], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('name', NAMES)
def test_batch_rows_are_strangers(name):
  _, call = made(name)
  whole, _ = call(tokens(), None)
  swapped, _ = call(tokens()[::-1], None)
  np.testing.assert_allclose(swapped[::-1], whole, atol=1e-6)


def in_bfloat16(name):
  return built(dataclasses.replace(MODELS[name], dtype='bfloat16'))


@pytest.mark.parametrize('name', NAMES)
def test_in_bfloat16_what_is_added_up_stays_float32(name):
  model = in_bfloat16(name)
  assert {x.dtype for x in jax.tree.leaves(nnx.state(model))} == {jnp.dtype('float32')}
  before = model.init_state(BATCH, 32)
  hidden, after = jax.eval_shape(model, tokens(), before)
  assert hidden.dtype == jnp.bfloat16
  # Nothing is added up in these.
  kept_exactly = (attention_layer.Cache, memories.Past, memorizing.State)
  for state in (before, after):
    layers = state.memory.layers if isinstance(state, segments.State) else state.layers
    summed = jax.tree.map(lambda x: None if isinstance(x, kept_exactly) else x, layers,
                          is_leaf=lambda x: isinstance(x, kept_exactly))
    assert {x.dtype for x in jax.tree.leaves(summed) if jnp.issubdtype(x.dtype, jnp.floating)} <= {
        jnp.dtype('float32')}


@pytest.mark.parametrize('name', [
    name if name in ('full', 'lstm', 'infini') else pytest.param(name, marks=pytest.mark.slow) for name in MODELS])
def test_bfloat16_is_near(name):
  model = in_bfloat16(name)
  whole, _ = made(name)[1](tokens(), None)
  hidden, _ = jax.jit(model)(tokens(), model.init_state(BATCH, 32))
  # Root mean squares: a norm behind a head that says almost nothing makes single numbers large.
  rms = lambda x: np.sqrt(np.mean(np.square(np.asarray(x, np.float32))))
  assert rms(np.asarray(hidden, np.float32) - whole) < 0.02 * MODELS[name].num_layers * rms(whole)


@pytest.mark.parametrize('name', NAMES)
def test_parameter_count_is_the_closed_form(name):
  config = MODELS[name].resolved(VOCAB)
  model, _ = made(name)
  assert sum(x.size for x in jax.tree.leaves(nnx.state(model))) == config.num_parameters()


@pytest.mark.parametrize('name', NAMES)
def test_logits_are_hidden_times_the_output_table(name):
  model, call = made(name)
  hidden, _ = call(tokens(), None)
  expected = np.asarray(hidden, np.float64) @ np.asarray(model.output_embedding_VD(), np.float64).T
  np.testing.assert_allclose(model.logits(hidden), expected, rtol=1e-4, atol=1e-4)
