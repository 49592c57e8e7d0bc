"""A context on disk: restored bit for bit, whole or refused, of one model, and merged where that is exact."""

import dataclasses
import functools
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import files, store
from longctx.errors import ConfigError
from longctx.models import decoder, memory_config, memory_decoder, recurrent
from longctx.store import file, identity, seal
from tests import toy_models
from tests.test_models import CLASSES, MODELS

ROOT = Path(__file__).parents[1]
VOCAB, ROOM = 13, 40
KEY, OTHER_KEY = b'k' * 32, b'o' * 32

small = functools.partial(decoder.Config, vocab_size=VOCAB, max_length=ROOM, num_layers=2, embed_dim=8,
                          num_heads=2, mlp='none', init_std=0.5, mixer_chunk=8,
                          layer_loop='unrolled', attention='reference')
CONFIGS = {
    'lstm': recurrent.Config(vocab_size=VOCAB, num_layers=1, embed_dim=8, hidden_dim=8, init_std=0.5),
    'windowed': small(window=(5,), dtype='bfloat16'),
    'full': small(num_layers=1),
    'gated_delta': small(num_layers=1, layers=('gated_delta',)),
    # A neural memory with its momenta, a convolution's tail, a window, and what waits beside it.
    'titans': memory_config.Config(vocab_size=VOCAB, num_layers=1, embed_dim=8, num_heads=2, segment=3,
                                   short_term=2, long_term='titans', memory_variant='mac',
                                   memory_tokens=1, mlp='none', init_std=0.5, attention='reference'),
}
KINDS = {'lstm': recurrent.Recurrent, 'memory': memory_decoder.MemoryDecoder}
TOYS = {'count': toy_models.CountModel, 'tail': toy_models.TailModel}
NAMES = [*CONFIGS, *TOYS]
BEFORE = np.array([[1, 2, 3, 4, 5, 6, 7, 8], [8, 7, 3, 3, 1, 0, 12, 2]])   # two rows
AFTER = np.array([[9, 9, 2, 1, 5, 11, 4, 3]])
TOKENIZER = 'bytes'


@functools.cache
def made(name):
  if name in TOYS:
    model = TOYS[name](VOCAB)
  else:
    config = CONFIGS[name]
    model = KINDS.get(config.name, decoder.Decoder)(config, rngs=nnx.Rngs(3))
  return model, nnx.split(model)


@functools.cache
def call(name):
  graphdef, params = made(name)[1]
  return functools.partial(jax.jit(lambda p, *args: nnx.merge(graphdef, p)(*args)), params)


@functools.cache
def identity_of(name):
  return store.identify(made(name)[0].config, made(name)[1][1], TOKENIZER)


@functools.cache
def half_read(name):
  """The state after BEFORE, of two rows."""
  return call(name)(BEFORE, made(name)[0].init_state(2, capacity=ROOM))[1]


def context_of(name, row=1, **more):
  return store.take(half_read(name), identity_of(name), row=row, capacity=ROOM,
                    tokens=BEFORE.shape[1], **more)


def uninterrupted(name, row=1):
  """What AFTER gives, read on from one row of the state that never left the process."""
  state = jax.tree.map(lambda x: x[row:row + 1], half_read(name))
  hidden, state = call(name)(AFTER, state)
  return [np.asarray(hidden), *map(np.asarray, jax.tree.leaves(state))]


def same_bits(found, wanted):
  assert len(found) == len(wanted)
  for a, b in zip(found, wanted):
    assert a.shape == b.shape
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def refused(function, *args, **kwargs):
  """The one line that a refusal says."""
  with pytest.raises(ConfigError) as e:
    function(*args, **kwargs)
  assert '\n' not in str(e.value)
  return str(e.value)


# --- Restored is uninterrupted.


@pytest.mark.parametrize('key', [None, KEY], ids=['plain', 'encrypted'])
@pytest.mark.parametrize('name', [
    pytest.param(name, marks=pytest.mark.slow) if name == 'full' else name for name in NAMES])
def test_restored_is_uninterrupted_bit_for_bit(name, key, tmp_path):
  """One row of two, saved and loaded, reads on as if nothing had happened; the rows differ."""
  path = tmp_path / 'a.lcm'
  store.save(path, context_of(name, tail=[4, 5]), key)
  context = store.load(path, identity_of(name), key)
  assert (context.header.tokens, context.header.tail, context.header.capacity) == (8, (4, 5), ROOM)
  hidden, state = call(name)(AFTER, store.state_of(context, made(name)[0].init_state))
  same_bits([hidden, *jax.tree.leaves(state)], uninterrupted(name))
  assert not np.array_equal(hidden, uninterrupted(name, row=0)[0])


@pytest.mark.parametrize('names', [
    ['lstm', 'titans'], pytest.param(['windowed'], marks=pytest.mark.slow)], ids=' '.join)
def test_another_process_carries_on_bit_for_bit(names, tmp_path):
  for name in names:
    store.save(tmp_path / f'{name}.lcm', context_of(name))
  subprocess.run([sys.executable, '-m', 'tests.programs.carry_on', tmp_path, *names], check=True, cwd=ROOT,
                 timeout=120, env=os.environ | {'JAX_PLATFORMS': 'cpu'})
  for name in names:
    out = np.load(tmp_path / f'{name}.npz')
    same_bits([out[k] for k in out], uninterrupted(name))


def test_every_type_and_shape_of_a_state_comes_back():
  rng = np.random.default_rng(0)
  state = {name: jnp.asarray(rng.normal(size=(1, 2, 3)) * 9, name) for name in (
      'float32', 'bfloat16', 'float16', 'int32', 'int8', 'uint32', 'bool', 'float8_e4m3fn')}
  state |= {'empty': jnp.zeros((1, 0, 4)), 'one': jnp.ones(1), 'deep': [(jnp.arange(4)[None],)]}
  state['edges'] = jnp.array([[np.finfo(np.float32).max, -0.0, -1e30, 1e-45]], jnp.float32)
  context = store.take(state, identity_of('count'), tokens=1)
  data = file.encode(context)
  assert data == file.encode(context)   # the same bytes each time
  back = store.state_of(file.decode(data, 'x'), lambda batch, capacity: state)
  same_bits(jax.tree.leaves(back), jax.tree.leaves(state))
  assert jax.tree.structure(back) == jax.tree.structure(state)


def test_any_reader_of_safetensors_opens_the_file(tmp_path):
  from safetensors import safe_open
  store.save(tmp_path / 'a.lcm', context_of('lstm'))
  with safe_open(tmp_path / 'a.lcm', 'np') as opened:
    header = json.loads(opened.metadata()['longctx'])
    assert set(opened.keys()) == set(context_of('lstm').arrays)
  who = identity_of('lstm')
  assert header['version'] == 1
  assert header['model'] == 'lstm'
  assert header['parameters'] == who.parameters
  assert header['config_sha256'] == who.config_hash
  assert header['tokenizer'] == TOKENIZER
  assert header['tokens'] == 8
  assert header['dtype'] == 'float32, int32'


def test_inspect_reads_the_beginning_alone(tmp_path):
  path = tmp_path / 'a.lcm'
  context = context_of('lstm', tail=[3])
  store.save(path, context)
  assert store.inspect(path) == context.header
  path.write_bytes(path.read_bytes()[:-8])
  assert store.inspect(path) == context.header
  store.save(path, context, KEY)
  assert store.inspect(path) == store.Sealed(1, seal.key_id(KEY).hex())
  assert not set(path.read_bytes().split(b'lstm')[1:])   # nothing of the header is in the clear


def test_rows_that_are_not_there_and_arrays_without_rows():
  with pytest.raises(ValueError, match=r'row=2: .* shape \(2,'):
    context_of('lstm', row=2)
  with pytest.raises(ValueError, match=r'step of the state has shape \(\)'):
    store.take({'step': jnp.zeros(())}, identity_of('lstm'), tokens=0)
  with pytest.raises(ValueError, match='key<fry>, which no file holds'):
    store.take({'key': jax.random.split(jax.random.key(0))}, identity_of('lstm'), tokens=0)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float8_e4m3fn'])
def test_a_state_that_is_not_finite_is_refused_of_its_own_row_alone(bad, dtype):
  if dtype.startswith('float8') and np.isinf(bad):
    return   # it has none
  state = {'S': jnp.ones((2, 3), dtype).at[1, 2].set(bad), 'n': jnp.arange(2), 'm': jnp.zeros((2, 1))}
  store.take(state, identity_of('count'), row=0, tokens=1)
  with pytest.raises(FloatingPointError, match='the state: S of what is remembered is NaN or infinite, and must be '):
    store.take(state, identity_of('count'), row=1, tokens=1)
  state['m'] = state['m'].at[1].set(bad)
  assert (store.spoilt(state), store.spoilt(state, 1)) == ('', 'S and 1 more')


@pytest.mark.parametrize('name', MODELS)
def test_an_empty_state_of_every_kind_is_accepted(name):
  """None begins with an infinity that a running maximum or a mask might have."""
  model = nnx.eval_shape(lambda: CLASSES[MODELS[name].name](MODELS[name], rngs=nnx.Rngs(0)))
  state = model.init_state(2, capacity=8)
  assert store.take(state, identity_of('count'), row=1, tokens=0).num_bytes


# --- Whole or refused.


@pytest.mark.parametrize('key', [None, KEY], ids=['plain', 'encrypted'])
def test_a_byte_that_flipped_anywhere_is_refused(key, tmp_path):
  path = tmp_path / 'a.lcm'
  store.save(path, context_of('lstm', tail=[1]), key)
  data = path.read_bytes()
  where = {*range(0, 130), *range(130, len(data), 23), *range(len(data) - 20, len(data))}
  for place in sorted(where):
    for flip in (0x01, 0x80):
      broken = bytearray(data)
      broken[place] ^= flip
      path.write_bytes(broken)
      said = refused(store.load, path, identity_of('lstm'), key)
      assert str(path) in said, place
      assert 'another model' not in said, place   # what is damaged is not blamed on the user
  path.write_bytes(data)
  store.load(path, identity_of('lstm'), key)


@pytest.mark.parametrize('key', [None, KEY], ids=['plain', 'encrypted'])
def test_a_file_cut_short_or_grown_is_refused(key, tmp_path):
  path = tmp_path / 'a.lcm'
  store.save(path, context_of('lstm'), key)
  data = path.read_bytes()
  for length in {0, 1, 7, 8, 9, 50, len(data) // 2, len(data) - 1, *range(0, len(data), 97)}:
    path.write_bytes(data[:length])
    assert str(path) in refused(store.load, path, None, key)
  for more in (b'\0', data):
    path.write_bytes(data + more)
    assert str(path) in refused(store.load, path, None, key)


def test_the_wrong_key_no_key_and_a_file_that_was_renamed(tmp_path):
  path = tmp_path / 'a.lcm'
  store.save(path, context_of('lstm'), KEY)
  mine, other = seal.key_id(KEY).hex(), seal.key_id(OTHER_KEY).hex()
  assert (f'is encrypted with key {mine}, and the key given is {other}; give the key'
          in refused(store.load, path, None, OTHER_KEY))
  assert f'is encrypted (key {mine}); give --key_file=FILE' in refused(store.load, path)
  path.rename(tmp_path / 'b.lcm')
  assert 'altered, damaged or renamed' in refused(store.load, tmp_path / 'b.lcm', None, KEY)
  store.save(path, context_of('lstm'))
  assert 'is not encrypted, so anybody' in refused(store.load, path, None, KEY)
  # The nonce is new each time: the same context never gives the same file.
  one, two = (seal.seal(b'text', KEY, 'a') for _ in range(2))
  assert one[16:28] != two[16:28]
  assert seal.open_sealed(one, KEY, 'a', 'x') == seal.open_sealed(two, KEY, 'a', 'x') == b'text'


def test_a_file_is_encrypted_by_pieces(monkeypatch):
  data = os.urandom(1000)
  whole = seal.seal(data, KEY, 'a')
  monkeypatch.setattr(seal, 'PIECE', 64)
  assert seal.open_sealed(whole, KEY, 'a', 'x') == data


def test_keys_are_read_from_a_file_or_the_environment(tmp_path, monkeypatch):
  monkeypatch.delenv(seal.KEY_VARIABLE, raising=False)
  assert store.read_key() is None
  path = tmp_path / 'key'
  for content in (KEY, KEY.hex().encode(), KEY.hex().upper().encode() + b'\n'):
    path.write_bytes(content)
    assert store.read_key(str(path)) == KEY
  monkeypatch.setenv(seal.KEY_VARIABLE, OTHER_KEY.hex())
  assert store.read_key() == OTHER_KEY
  assert store.read_key(str(path)) == KEY   # what is said counts before what is set
  path.write_text('secret')
  assert f'--key_file={path}: is no key (6 bytes)' in refused(store.read_key, str(path))
  assert 'cannot be read' in refused(store.read_key, str(tmp_path / 'none'))
  monkeypatch.setenv(seal.KEY_VARIABLE, 'x')
  said = refused(store.read_key)
  assert said.startswith('LONGCTX_STORE_KEY: is no key (1 bytes)')
  monkeypatch.setenv(seal.KEY_VARIABLE, '')   # a secret that is not there
  assert 'LONGCTX_STORE_KEY: is set and empty; unset it' in refused(store.read_key)
  assert 'cannot be read' in refused(store.read_key, 'a\0b')


def test_without_the_package_encryption_says_what_to_install(tmp_path, monkeypatch):
  """And at once, not when there is something to save."""
  monkeypatch.setitem(sys.modules, 'cryptography.hazmat.primitives.ciphers', None)
  assert 'pip install cryptography' in refused(seal.seal, b'', KEY, 'a')
  assert 'pip install cryptography' in refused(store.Store, str(tmp_path), KEY)


@pytest.mark.parametrize('call_name', ['write', 'fsync', 'replace'])
def test_a_full_disk_leaves_the_file_that_was_there(call_name, tmp_path, monkeypatch):
  path = tmp_path / 'a.lcm'
  store.save(path, context_of('lstm'))
  data = path.read_bytes()
  def full(*args, **kwargs):
    raise OSError(28, 'No space left on device')
  class Full(io.FileIO):
    def write(self, data):
      super().write(data[:100])
      full()
  with monkeypatch.context() as patch:
    if call_name == 'write':
      patch.setattr(files, 'open', lambda path, mode: Full(path, 'w'), raising=False)
    else:
      patch.setattr(files.os, call_name, full)
    with pytest.raises(OSError, match='No space left'):
      store.save(path, context_of('lstm', row=0))
  assert path.read_bytes() == data
  assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_context(tmp_path):
  path = tmp_path / 'a.lcm'
  assert f'{path}: no such context' == refused(store.load, path)
  path.write_bytes(b'hello')
  assert 'is not a context' in refused(store.load, path)
  from safetensors.numpy import save
  path.write_bytes(save({'x': np.zeros(3)}, {'format': 'pt'}))
  assert 'is not a context' in refused(store.load, path)
  assert 'is not a context' in refused(store.inspect, path)
  assert 'cannot be read: Is a directory' in refused(store.load, tmp_path)


def test_a_later_format_is_named(tmp_path, monkeypatch):
  path = tmp_path / 'a.lcm'
  monkeypatch.setattr(file, 'VERSION', 2)
  store.save(path, context_of('lstm'))
  monkeypatch.undo()
  assert 'has format version 2, and this longctx knows 1' in refused(store.load, path)


# --- Of one model.


def test_another_models_context_is_refused_with_every_field_that_differs(tmp_path):
  path = tmp_path / 'a.lcm'
  store.save(path, context_of('lstm'))
  mine = identity_of('lstm')
  config = mine.config | {'num_layers': 2, 'dropout': 0.5}
  said = refused(store.load, path, dataclasses.replace(mine, config=config, tokenizer='0' * 64))
  assert 'model.num_layers: the context has 1, this model has 2' in said
  assert 'model.dropout: the context has 0.0, this model has 0.5' in said
  assert f'tokenizer: the context has bytes, this model has {"0" * 16}' in said
  assert 'parameters' not in said
  assert 'hidden_dim' not in said
  said = refused(store.load, path, identity_of('gated_delta'))
  assert 'model.name: the context has "lstm", this model has "decoder"' in said
  assert 'model.hidden_dim: the context has 8, this model has no such field' in said
  assert 'model.window: the context has no such field, this model has [0]' in said


def test_parameters_are_told_apart_by_every_number_place_and_name():
  params = {'a': jnp.arange(6.).reshape(2, 3), 'b': jnp.arange(6.).reshape(2, 3) + 1}
  base = identity.hash_parameters(params)
  assert base == identity.hash_parameters(dict(reversed(params.items())))
  others = [params | {'a': params['a'].at[1, 2].add(1e-6)}, params | {'a': params['a'].T.reshape(3, 2)},
            params | {'a': params['a'].astype(jnp.bfloat16)}, {'a': params['b'], 'b': params['a']},
            params | {'a': -params['a'] * 0}, {'a': params['a'], 'c': params['b']}]
  assert len({base, *map(identity.hash_parameters, others)}) == 7


def test_a_state_of_other_arrays_is_explained(tmp_path):
  context = context_of('windowed')
  shorter = dataclasses.replace(context.header, capacity=3)
  said = refused(store.state_of, dataclasses.replace(context, header=shorter),
                 made('windowed')[0].init_state)
  assert 'with room for 3 tokens this model remembers other arrays: layers.0.k is bfloat16[1, 4, ' in said
  assert 'and 3 more' in said


def test_forks_share_nothing(tmp_path):
  a, b = tmp_path / 'a.lcm', tmp_path / 'b.lcm'
  for key in (None, KEY):
    store.save(a, context_of('lstm'), key)
    store.fork(a, b, key)
    store.save(a, context_of('lstm', row=0), key)
    found, wanted = store.load(b, None, key).arrays, context_of('lstm').arrays
    same_bits([found[name] for name in wanted], list(wanted.values()))
    a.unlink()
    store.load(b, None, key)
  b.write_bytes(b.read_bytes()[:-1])
  refused(store.fork, b, a, KEY)   # what is damaged is not copied
  assert not a.exists()


# --- Merged.


ADDS = small(layers=('linear_attention',), layer_loop='scan')
TEXTS = np.array([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])
QUESTION = np.array([[0, 12, 5]])


@functools.cache
def adder(num_layers=2, **settings):
  config = dataclasses.replace(ADDS, num_layers=num_layers, **settings)
  model = decoder.Decoder(config, rngs=nnx.Rngs(5))
  graphdef, params = nnx.split(model)
  read = jax.jit(lambda tokens, state: nnx.merge(graphdef, params)(tokens, state))
  return model, read, store.identify(config, params, TOKENIZER)


def contexts_of_both(model, read, who):
  _, state = read(TEXTS, model.init_state(2))
  return [store.take(state, who, row=row, tokens=8) for row in range(2)]


def attend_to_both_texts(model, texts, question):
  """The definition, in float64: in each layer a token attends to every key that its text has so far,
  and the question to every key of all texts too, each text having been read alone."""
  get = lambda x: np.asarray(x.get_value(), np.float64)
  feature = lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))
  def norm(module, x):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + ADDS.norm_epsilon) * get(module.scale)
  xs = [get(model.embedding.table)[tokens] for tokens in (*texts, question)]
  for i in range(model.config.num_layers):
    block = jax.tree.map(lambda x, i=i: x[i], model.blocks[0])
    keys, values, new = [], [], []
    for place, x in enumerate(xs):
      q, k, v = (np.einsum('td,dhk->thk', norm(block.mixer_norm, x), get(w))
                 for w in (block.mixer.w_q, block.mixer.w_k, block.mixer.w_v))
      before = (keys, values) if place == len(texts) else ([], [])
      out = np.zeros_like(v)
      for t in range(len(x)):
        seen_k = np.concatenate([*before[0], k[:t + 1]])
        seen_v = np.concatenate([*before[1], v[:t + 1]])
        weights = np.einsum('hk,shk->hs', feature(q[t]), feature(seen_k))
        out[t] = np.einsum('hs,shv->hv', weights / weights.sum(-1, keepdims=True), seen_v)
      keys.append(k)
      values.append(v)
      new.append(x + np.einsum('thv,hvd->td', out, get(block.mixer.w_out)))
    xs = new
  return norm(model.norm, xs[-1])


def test_merged_is_attention_to_both_texts():
  model, read, who = adder()
  a, b = contexts_of_both(model, read, who)
  merged = store.merge(a, b, model.merge_states, model.init_state)
  assert merged.header.tokens == 16
  hidden, _ = read(QUESTION, store.state_of(merged, model.init_state))
  np.testing.assert_allclose(hidden[0], attend_to_both_texts(model, TEXTS, QUESTION[0]),
                             atol=2e-5, rtol=2e-5)
  one = read(QUESTION, store.state_of(a, model.init_state))[0]
  assert np.abs(hidden - one).max() > 1e-2   # the other text matters
  other = store.merge(b, a, model.merge_states, model.init_state)
  same_bits(list(other.arrays.values()), list(merged.arrays.values()))


def test_in_one_layer_merged_is_one_text_after_the_other():
  model, read, who = adder(1, layer_loop='unrolled')
  merged = store.merge(*contexts_of_both(model, read, who), model.merge_states, model.init_state)
  _, state = read(TEXTS[:1], model.init_state(1))
  _, state = read(TEXTS[1:], state)
  for found, wanted in zip(jax.tree.leaves(store.state_of(merged, model.init_state)),
                           jax.tree.leaves(state)):
    np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-5)


def test_what_does_not_add_is_refused():
  for name, said in [('lstm', 'is no sum over what was read'), ('count', 'is no sum over'),
                     ('gated_delta', 'model.layers has gated_delta, whose memory is no plain sum'),
                     ('windowed', 'model.layers has attention, whose memory')]:
    model = made(name)[0]
    assert said in refused(store.merge, context_of(name), context_of(name, row=0),
                           getattr(model, 'merge_states', None), model.init_state)
  learned = nnx.eval_shape(lambda: decoder.Decoder(
      dataclasses.replace(ADDS, position='learned'), rngs=nnx.Rngs(0)))
  assert "position='learned'" in refused(learned.merge_states, None, None)
  model, read, who = adder()
  a, b = contexts_of_both(model, read, who)
  merge = lambda a, b: store.merge(a, b, model.merge_states, model.init_state)
  with_header = lambda **fields: dataclasses.replace(b, header=dataclasses.replace(b.header, **fields))
  assert '0 and 2 tokens are not read yet' in refused(merge, a, with_header(tail=(1, 2)))
  assert 'have room for 0 and 7 tokens' in refused(merge, a, with_header(capacity=7))
  assert 'the second context: is the memory of another model' in refused(
      merge, a, with_header(identity=identity_of('gated_delta')))


SEGMENT = 4   # two in each text
SUMS = memory_config.Config(vocab_size=VOCAB, num_layers=1, embed_dim=8, num_heads=2,
                            segment=SEGMENT, long_term='infini', memory_variant='linear',
                            init_std=0.5, mlp='none', attention='reference', remat='none')


@functools.cache
def infini():
  graphdef, params = nnx.split(memory_decoder.MemoryDecoder(SUMS, rngs=nnx.Rngs(5)))
  read = jax.jit(lambda tokens, state: nnx.merge(graphdef, params)(tokens, state))
  return nnx.merge(graphdef, params), read, store.identify(SUMS, params, TOKENIZER)


def test_linear_memories_merged_are_one_text_after_the_other():
  model, read, who = infini()
  merged = store.merge(*contexts_of_both(model, read, who), model.merge_states, model.init_state)
  _, state = read(TEXTS[:1], model.init_state(1))
  _, state = read(TEXTS[1:], state)
  found = store.state_of(merged, model.init_state)
  assert int(found.number[0]) == int(state.number[0]) == 4
  for a, b in zip(jax.tree.leaves(found.memory), jax.tree.leaves(state.memory)):
    np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)
  hidden = read(TEXTS[:1], found)[0]
  np.testing.assert_allclose(hidden, read(TEXTS[:1], state)[0], atol=1e-5)
  alone = store.state_of(contexts_of_both(model, read, who)[0], model.init_state)
  assert np.abs(hidden - read(TEXTS[:1], alone)[0]).max() > 1e-2   # the other text matters


def test_a_text_without_a_whole_segment_adds_nothing():
  """What stands in its memory then means nothing, and may be anything."""
  model, read, who = infini()
  a, b = contexts_of_both(model, read, who)
  empty = b.arrays | {'number': np.zeros(1, np.int32)}
  b = dataclasses.replace(b, arrays=empty)
  merged = store.merge(a, b, model.merge_states, model.init_state)
  same_bits(list(merged.arrays.values()), list(a.arrays.values()))


@pytest.mark.parametrize('settings, said', [
    (dict(memory_variant='delta'), "model.memory_variant='delta': is no plain sum"),
    (dict(memory_variant=''), "model.memory_variant='': is no plain sum"),
    (dict(long_term='armt', memory_variant=''), "model.long_term='armt'"),
    (dict(long_term='none', memory_variant=''), "model.long_term='none'"),
    (dict(short_term=4), 'model.short_term=4: it holds the last tokens of one text'),
], ids=lambda x: str(x))
def test_memories_of_segments_that_do_not_add_are_refused(settings, said):
  model = nnx.eval_shape(lambda: memory_decoder.MemoryDecoder(
      dataclasses.replace(SUMS, **settings), rngs=nnx.Rngs(0)))
  assert said in refused(model.check_merge, 8, 8)


def test_texts_that_end_within_a_segment_do_not_add():
  model, read, who = infini()
  a, _ = contexts_of_both(model, read, who)
  _, state = read(TEXTS[:, :6], model.init_state(2))
  b = store.take(state, who, tokens=6)
  assert 'merge: a text of 6 tokens ends 2 tokens into a segment of 4' in refused(
      model.check_merge, 8, 6)
  assert 'of 4, and a segment is remembered when it is whole; read 2 tokens more into it' in refused(
      store.merge, a, b, model.merge_states, model.init_state)
