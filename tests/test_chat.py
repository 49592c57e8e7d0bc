"""A memory that outlives the process: carried on bit for bit, never torn, never lost, and its commands."""

import dataclasses
import functools
import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import assembly, chat, files, generate, main, store
from longctx.data.tokenizer import Bytes
from longctx.errors import ConfigError
from longctx.inference import reader as reader_lib
from longctx.inference.sampling import Sampling
from longctx.models import decoder, memory_config, memory_decoder, recurrent, segments
from longctx.parallel import device_memory
from longctx.store import seal
from tests import toy_models

ROOT = Path(__file__).parents[1]
SEP = 256
CHUNK = 8

small = functools.partial(decoder.Config, vocab_size=257, max_length=96, num_layers=1, embed_dim=8,
                          num_heads=2, mlp='none', init_std=0.5, layer_loop='unrolled',
                          attention='reference')
memory = functools.partial(memory_config.Config, vocab_size=257, num_layers=1, embed_dim=8, num_heads=2,
                           mlp='none', init_std=0.5, attention='reference')
CONFIGS = {
    'lstm': recurrent.Config(vocab_size=257, num_layers=1, embed_dim=8, hidden_dim=8, init_std=0.5),
    'full': small(),
    'adds': small(layers=('linear_attention',)),
    'sums': memory(segment=5, long_term='infini', memory_variant='linear'),
    'infini': memory(segment=12, long_term='infini'),   # longer than a chunk
    'armt': memory(segment=5, long_term='armt', memory_tokens=2, memory_width=4),
    'rmt': memory(segment=5, long_term='rmt', memory_tokens=2),
    'titans': memory(segment=6, short_term=4, long_term='titans', memory_variant='mac', memory_tokens=1,
                     memory_chunk=3),
}
MEMORIES = ['infini', 'armt', 'rmt', 'titans']   # of each dependency class, one behind a window
KINDS = {'lstm': recurrent.Recurrent, 'memory': memory_decoder.MemoryDecoder}
COUNTS = {'count': 257, 'counts pieces': 400}   # symbols of a toy model


@functools.cache
def made(name):
  if name in COUNTS:
    model = toy_models.CountModel(COUNTS[name])
  else:
    model = KINDS.get(CONFIGS[name].name, decoder.Decoder)(CONFIGS[name], rngs=nnx.Rngs(1))
  return model, *nnx.split(model)


def new_reader(name='lstm', **settings):
  model, graphdef, params = made(name)
  identity = store.identify(model.config, params, 'bytes')
  return reader_lib.Reader(graphdef, params, identity, first_token=SEP,
                           **dict(chunk=CHUNK) | settings)


def begun(name='lstm', **settings):
  reader = new_reader(name, **settings)
  reader.begin()
  return reader


def bits(reader):
  """All that a reader would save."""
  context = reader.context()
  header = dataclasses.replace(context.header, created=0)
  return header, {name: x.tobytes() for name, x in context.arrays.items()}


def refused(function, *args, **kwargs):
  with pytest.raises(ConfigError) as e:
    function(*args, **kwargs)
  assert '\n' not in str(e.value)
  return str(e.value)


# --- The reader.


TEXT = np.random.default_rng(0).integers(0, 256, 45)


@pytest.mark.parametrize('name', ['lstm', 'full', 'count', *MEMORIES])
def test_a_text_is_read_alike_however_it_is_cut(name):
  whole = begun(name)
  assert whole.read(TEXT) == 45
  assert (whole.tokens, whole.waiting) == (46, 46 % whole.chunk)
  for cuts in ([1, 2, 30], [8, 16], range(1, 45)):
    cut = begun(name)
    for part in np.split(TEXT, cuts):
      cut.read(part)
    assert bits(cut) == bits(whole)
  seen = begun(name)
  for part in np.split(TEXT, [20]):   # through contexts, in mid-text
    seen.read(part)
    other = new_reader(name)
    other.restore(seen.context())
    seen = other
  assert bits(seen) == bits(whole)


def test_each_token_is_computed_once_in_segments(monkeypatch):
  """The cells that calls are planned as have a slot a token, and those of a segment begun before again."""
  reader, calls, read_chunk = begun('infini'), [], reader_lib.s.read_chunk
  size = reader.model.config.segment
  plan = jax.jit(lambda state, valid: segments.plan(valid.shape, size, state, None, valid))

  def counting(run, params, memory, chunk, *more):
    before, had = jax.tree.map(np.array, memory.state), len(memory.tail[0])
    found = read_chunk(run, params, memory, chunk, *more)
    took = had - len(memory.tail[0])
    cells = plan(before, np.arange(chunk)[None] < took).cells
    calls.append((int((cells.length > 0).sum()) * size, took))
    return found

  monkeypatch.setattr(reader_lib.s, 'read_chunk', counting)
  reader.read(TEXT)
  assert calls == [(size, size)] * 3
  generated(reader, 5)   # token by token, into the middle of a segment
  calls.clear()
  reader.read(TEXT)
  assert calls == [(size, size - 50 % size)] + [(size, size)] * 2
  assert (reader.tokens, reader.waiting) == (96, size)


def test_what_is_read_equals_one_call_of_the_model():
  """Chunks, tails and padding change nothing of what the next token is."""
  reader, (model, *_) = begun(), made('lstm')
  reader.read(TEXT)
  token, = reader.generate(max_new_tokens=1, sampling=Sampling(temperature=0))
  hidden, _ = model(np.array([[SEP, *TEXT]]), model.init_state(1))
  assert token == int(np.argmax(model.logits(hidden[:, -1:])))


@pytest.mark.parametrize('after', [0, 1, 3])
def test_a_read_that_is_stopped_stands_at_a_chunk(after):
  reader, chunks = begun(), []
  reader.read(TEXT[:3])
  took = reader.read(TEXT[3:], stop=lambda: len(chunks) == after,
                     after_chunk=lambda: chunks.append(1))
  assert took == max(0, after * CHUNK - 4)   # of the first chunk four tokens were there before
  assert reader.tokens == 4 + took
  as_far = begun()
  as_far.read(TEXT[:3 + took])
  as_far.read_tail()
  if after:
    assert bits(reader)[1] == bits(as_far)[1]   # nothing waits
    assert reader.waiting == 0
  reader.read(TEXT[3 + took:])   # and goes on
  assert reader.tokens == 46


def test_a_fault_in_mid_read_leaves_a_text_that_is_carried_on(monkeypatch):
  """What was not read waits in the tail: nothing is lost, and nothing is read twice."""
  reader, read_chunk, chunks = begun(), reader_lib.s.read_chunk, []
  def broken(*args):
    chunks.append(1)
    if len(chunks) == 3:
      raise RuntimeError('out of memory')
    return read_chunk(*args)
  with monkeypatch.context() as patch:
    patch.setattr(reader_lib.s, 'read_chunk', broken)
    with pytest.raises(RuntimeError):
      reader.read(TEXT)
  assert (reader.tokens, reader.waiting) == (46, 46 - 2 * CHUNK)
  other, whole = new_reader(), begun()
  other.restore(reader.context())
  other.read(TEXT[:3])
  whole.read(np.concatenate([TEXT, TEXT[:3]]))
  assert bits(other) == bits(whole)


def generated(reader, count, **settings):
  return list(reader.generate(max_new_tokens=count, sampling=Sampling(), **settings))


@pytest.mark.parametrize('name', ['lstm', 'full', *MEMORIES])
def test_generation_goes_on_from_where_it_stood(name):
  """In one process or two, the same seed draws the same text; another seed or place another."""
  one, two = begun(name), begun(name)
  for reader in (one, two):
    reader.read(TEXT[:20])
  first = generated(one, 6)
  assert generated(two, 6) == first
  assert one.tokens == 21 + 6
  assert one.waiting == 1   # the last one was not read yet
  apart = new_reader(name)
  apart.restore(two.context())
  second = generated(one, 6)
  assert generated(apart, 6) == second != first
  assert bits(apart) == bits(one)
  two.read(TEXT[:1])
  again = begun(name)
  again.read(TEXT[:20])
  assert generated(again, 6, seed=1) != first


def test_two_programs_serve_every_call():
  """One for a chunk and one for a token, whatever is read and however it is drawn."""
  model = toy_models.CountModel(259)
  graphdef, params = nnx.split(model)
  toy_models.TRACES.clear()
  reader = reader_lib.Reader(graphdef, params, store.identify(model.config, params, 'bytes'),
                             first_token=SEP, chunk=CHUNK)
  reader.begin()
  for sampling in (Sampling(top_k=3), Sampling(top_k=3)):
    reader.read(TEXT)
    reader.read(TEXT[:3])
    list(reader.generate(max_new_tokens=5, sampling=sampling))
  assert toy_models.TRACES == [(1, CHUNK), (1, 1)]


def test_whoever_ceases_to_ask_has_a_state_after_what_was_handed_out():
  reader, (model, *_) = begun(), made('lstm')
  reader.read(TEXT[:5])
  handed = []
  for token in reader.generate(max_new_tokens=50, sampling=Sampling()):
    handed.append(token)
    if len(handed) == 4:
      break
  assert (reader.tokens, reader.waiting) == (10, 0)
  reader.read([7])
  token, = reader.generate(max_new_tokens=1, sampling=Sampling(temperature=0))
  hidden, _ = model(np.array([[SEP, *TEXT[:5], *handed, 7]]), model.init_state(1))
  assert token == int(np.argmax(model.logits(hidden[:, -1:])))


def test_a_separator_ends_what_is_made_and_is_not_remembered():
  reader = begun('count')
  reader.read([SEP] * 9)   # the count model now says it again
  assert list(reader.generate(max_new_tokens=5, sampling=Sampling(temperature=0))) == []
  assert reader.tokens == 10
  assert int(reader.memory.state[0, SEP]) == 10
  with pytest.raises(ValueError, match='nothing to carry on from'):
    next(reader.generate(max_new_tokens=5, sampling=Sampling()))


def test_room_for_so_many_tokens_and_no_more():
  reader = begun('full', capacity=20)
  assert 'read: 20 tokens more than the 1 so far are 21; this context has room for 20' in refused(
      reader.read, TEXT[:20])
  assert reader.tokens == 1
  reader.read(TEXT[:15])
  assert len(generated(reader, 50)) == 4   # to the brim
  assert reader.room == 0
  assert 'generate: 1 tokens more' in refused(lambda: generated(reader, 1))
  assert all(np.isfinite(x).all() for x in reader.context().arrays.values())
  assert '--capacity=97: must be at most model.max_length=96' in refused(begun, 'full', capacity=97)
  assert begun('lstm').room == float('inf')
  assert '--capacity=9: does nothing with this model' in refused(begun, 'lstm', capacity=9)


def test_a_memory_larger_than_the_device_is_refused_before_it_is_made(monkeypatch):
  saved = begun('full').context()
  monkeypatch.setattr(device_memory, 'free_bytes', lambda device: 1000)
  said = refused(begun, 'full', capacity=80)
  assert 'takes 5,452 bytes of a device with room for 80 tokens, and cpu has 1,000 left' in said
  reader = new_reader('full')
  assert 'bytes of a device with room for 96 tokens' in refused(reader.restore, saved)
  monkeypatch.setattr(device_memory, 'free_bytes', lambda device: 5452)
  begun('full', capacity=80)


def test_free_memory_is_told():
  assert 2**20 < device_memory.free_bytes(jax.devices()[0]) < 2**50
  @dataclasses.dataclass
  class Device:
    stats: dict | None
    platform: str = 'gpu'
    device_kind: str = 'NVIDIA L4'
    def memory_stats(self):
      return self.stats
  assert device_memory.free_bytes(Device({'bytes_limit': 100, 'bytes_in_use': 30})) == 70
  assert device_memory.free_bytes(Device(None)) == 24 * 2**30
  assert device_memory.free_bytes(Device({}, device_kind='unheard of')) is None


@pytest.mark.parametrize('name, said', [
    ('lstm', 'is no sum over what was read'), ('full', 'model.layers has attention'),
    ('sums', 'a text of 46 tokens ends 1 tokens into a segment of 5')])
def test_texts_that_cannot_be_merged_stay_as_they_are(name, said):
  """Their tails too: they would be read in other chunks than a text that nobody tried to merge."""
  readers = begun(name), begun(name)
  for reader, count in zip(readers, (44, 45)):
    reader.read(TEXT[:count])
  before = [bits(reader) for reader in readers]
  assert said in refused(readers[0].merge, readers[1])
  assert [bits(reader) for reader in readers] == before
  assert all(reader.waiting for reader in readers)


def test_several_devices_share_what_is_restored():
  from longctx.parallel import mesh
  one = begun('full')
  one.read(TEXT)
  layout = mesh.make_layout(mesh.Config(data=1, seq=2, layout='sequence'), jax.devices()[:2])
  shared = new_reader('full', layout=layout)
  shared.restore(one.context())
  k = shared.memory.state.layers[0].k
  assert k.sharding.shard_shape(k.shape)[1] * 2 == k.shape[1]
  assert bits(shared) == bits(one)
  shared.read(TEXT[:10])
  one.read(TEXT[:10])
  for name, x in one.context().arrays.items():
    np.testing.assert_allclose(shared.context().arrays[name], x, atol=1e-5)


# --- The conversation.


class Loader:
  """In place of assembly.load_for_inference."""

  def __init__(self, name='lstm'):
    self.name, self.params, self.tokenizer = name, None, Bytes()

  def __call__(self, folder, **settings):
    model, graphdef, params = made(self.name)
    return graphdef, self.params or params, self.tokenizer, model.config, None


@pytest.fixture
def loader(monkeypatch):
  loader = Loader()
  monkeypatch.setattr(assembly, 'load_for_inference', loader)
  monkeypatch.setattr(chat, 'set_compilation_cache', lambda folder: None)
  monkeypatch.setattr(chat, 'check_devices', lambda: None)
  monkeypatch.setattr(reader_lib.Reader.__init__, '__kwdefaults__',
                      reader_lib.Reader.__init__.__kwdefaults__ | {'chunk': CHUNK})
  monkeypatch.delenv(seal.KEY_VARIABLE, raising=False)
  return loader


@pytest.fixture
def talk(tmp_path, loader, monkeypatch, capsys):
  """talk(line, ..., --flag, ...) -> (status, what the model said, what was told)."""
  def talk(*lines, flags=(), context='alice'):
    data = b''.join(line if isinstance(line, bytes) else f'{line}\n'.encode() for line in lines)
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(data)))
    status = chat.main(['chat', f'--workdir={tmp_path}', f'--store={tmp_path}/store',
                        f'--context={context}', '--max_new_tokens=12', *flags])
    return status, *capsys.readouterr()
  return talk


def saved(tmp_path, name='alice', key=None):
  context = store.load(tmp_path / 'store' / f'{name}.lcm', key=key)
  return (context.header.tokens, context.header.tail,
          {name: x.tobytes() for name, x in context.arrays.items()})


LINES = ('what is it', 'and then', '', 'é // end')


def test_a_conversation_in_four_processes_is_one_in_one(talk, tmp_path):
  status, said, told = talk(*LINES)
  assert (status, told.splitlines()[0]) == (0, 'alice: a new context')
  apart = [talk(line, context='bob') for line in LINES]
  assert ''.join(text for _, text, _ in apart) == said
  assert saved(tmp_path, 'alice') == saved(tmp_path, 'bob')
  assert len(said) > 30
  assert 'tokens remembered' in apart[1][2]
  assert talk(*LINES, context='carol', flags=['--seed=1'])[1] != said


def test_reading_a_file_then_asking(talk, tmp_path, loader):
  loader.name = 'count'
  path = tmp_path / 'book.txt'
  path.write_bytes(b'abcabz' * 50 + b'z' * 100 + b'\xff\xfe')
  _, said, told = talk(f'/read {path}', '/info', 'q', flags=['--temperature=0'])
  assert said == 'z' * 12 + '\n'   # what it read most often
  assert f'read 402 tokens of {path} in ' in told
  assert 'alice: 403 tokens seen, of any number, 3 of them waiting to be read; 1,028 bytes held; ' \
         'never saved; model toy ' in told
  state = store.load(tmp_path / 'store' / 'alice.lcm').arrays['state'][0]
  assert state[ord('c')] == 50
  assert state[0xff] == state[0xfe] == 1
  assert state[ord('\n')] == 1   # before the line that was typed


def test_files_are_read_in_blocks_that_end_between_characters(tmp_path, monkeypatch):
  path = tmp_path / 'f'
  text = ('aé€𝄞' * 9 + '\n' + '€' * 20 + 'b\n\n' + 'x' * 30).encode()
  for size in range(1, 40):
    monkeypatch.setattr(chat, 'BLOCK', size)
    for data in (text, b'\x80' * 50, b'', os.urandom(300)):
      path.write_bytes(data)
      with chat.opened(str(path)) as (file, length):
        blocks = list(chat.blocks_of(file))
      assert length == len(data)
      assert b''.join(blocks) == data
      assert all(blocks)
      if data == text and size >= 4:
        for block in blocks:
          block.decode()


def test_an_empty_file_is_read(talk, tmp_path):
  (tmp_path / 'empty').touch()
  status, _, told = talk(f'/read {tmp_path}/empty', '/info')
  assert (status, f'read 0 tokens of {tmp_path}/empty' in told) == (0, True)
  assert 'alice: 1 tokens seen' in told
  assert not (tmp_path / 'store' / 'alice.lcm').exists()


def test_a_file_that_ends_in_what_is_no_text_says_what_stays(talk, tmp_path, loader, monkeypatch):
  from longctx.data import tokenizer
  (tmp_path / 'model').write_bytes(tokenizer.train_sentencepiece([b'the cat sat. ' * 200 + bytes(
      range(32, 127))], 400))
  loader.name, loader.tokenizer = 'counts pieces', tokenizer.SentencePiece(tmp_path / 'model')
  monkeypatch.setattr(chat, 'BLOCK', 64)
  path = tmp_path / 'book'
  path.write_bytes(b'the cat sat.\n' * 10 + b'\xff\n')
  status, _, told = talk(f'/read {path}')
  assert status == 2
  line = next(line for line in told.splitlines() if line.startswith('longctx: '))
  count = int(line.partition("data.tokenizer='bytes'; ")[2].split()[0])
  assert f'/read {path}, from byte ' in line
  assert line.endswith(f'; {count} tokens before that were read, and stay')
  tokens, tail, _ = saved(tmp_path)
  assert tokens + len(tail) == 1 + count > 20
  path.write_bytes(b'\xff\n')
  assert "data.tokenizer='bytes'; nothing of it was read" in talk(f'/read {path}', context='bob')[2]


@pytest.mark.parametrize('name', ['lstm', 'full'])   # read as it comes, and only if it all fits
def test_a_file_that_cannot_be_read_is_told_and_nothing_is_lost(
    talk, tmp_path, loader, monkeypatch, name):
  loader.name = name
  path = tmp_path / 'book'
  path.write_bytes(b'x' * 30)
  def denied(*args):
    raise PermissionError(13, 'Permission denied')
  class Broken(io.BytesIO):
    def read(self, size):
      if self.tell():
        raise OSError(5, 'Input/output error')
      return super().read(size)
  monkeypatch.setattr(chat, 'BLOCK', 16)
  stays = {'lstm': '17 tokens before that were read, and stay',
           'full': 'nothing of it was read'}[name]
  for i, (opens, message) in enumerate((
      (denied, 'cannot be read: Permission denied'),
      (lambda *args: Broken(b'x' * 30), f'cannot be read: Input/output error; {stays}'))):
    with monkeypatch.context() as patch:
      patch.setattr(chat, 'open', opens, raising=False)
      status, _, told = talk('a', f'/read {path}', context=f'c{i}')
    assert (status, f'/read {path}: {message}' in told) == (2, True)
    assert saved(tmp_path, f'c{i}')[0] > 2
  status, _, told = talk('a', b'/read a\0b\n')
  assert (status, "/read 'a\\x00b': is no path" in told) == (2, True)
  assert saved(tmp_path)[0] > 2


def test_only_a_regular_file_is_read(talk, tmp_path, monkeypatch):
  """Nobody could interrupt a wait for a pipe's other end."""
  os.mkfifo(tmp_path / 'pipe')
  monkeypatch.setattr(chat, 'open', lambda *args: pytest.fail('was opened'), raising=False)
  for path in (tmp_path / 'pipe', '/dev/null'):
    status, _, told = talk(f'/read {path}')
    assert status == 2
    assert f'/read {path}: is a pipe, a socket or a device' in told
    assert 'only a regular file is read: save it first' in told


def test_a_fault_of_ours_saves_the_conversation_first(talk, tmp_path, loader, monkeypatch):
  talk('one', context='bob')
  def broken(data, name):
    if b'two' in data:
      raise RuntimeError('a fault')
    return Bytes().encode(data)
  monkeypatch.setattr(loader.tokenizer, 'encode', broken)
  with pytest.raises(RuntimeError, match='a fault'):
    talk('one', 'two', 'three')
  assert saved(tmp_path) == saved(tmp_path, 'bob')


def test_a_fault_that_takes_the_state_leaves_the_saved_one(talk, tmp_path, monkeypatch, capsys):
  talk('one')
  before = saved(tmp_path)
  def broken(run, params, memory, *sizes):
    for x in jax.tree.leaves(memory.state):
      x.delete()
    raise RuntimeError('a fault')
  monkeypatch.setattr(reader_lib.s, 'read_chunk', broken)
  with pytest.raises(RuntimeError, match='a fault'):
    talk('two')
  assert 'not saved: what was saved before is as it was' in capsys.readouterr().err
  assert saved(tmp_path) == before


def test_a_line_may_begin_with_a_slash(talk, loader):
  loader.name = 'count'
  assert talk('////', flags=['--temperature=0'])[1] == '/' * 12 + '\n'


def test_save_fork_forget_and_info(talk, tmp_path):
  status, said, told = talk('one', '/save', '/fork bob', 'two', '/forget', '/info', '/abandon')
  assert status == 0
  lines = told.splitlines()
  assert lines[1].startswith('alice: saved, ')
  assert lines[2].startswith('bob: saved as a copy, ')
  assert lines[3] == 'alice: forgotten; the saved one stays until the next save'
  assert lines[4].startswith('alice: 1 tokens seen, of any number, 1 of them waiting')
  assert 'bytes saved, changed since' in lines[4]
  assert saved(tmp_path, 'alice') == saved(tmp_path, 'bob')   # abandoned: as it was at /save
  two = said.splitlines()[1:]
  assert talk('two')[1].splitlines() == two   # carried on from there
  assert saved(tmp_path, 'alice') != saved(tmp_path, 'bob')
  assert talk('two', context='bob')[1].splitlines() == two
  assert "'bob': is there already" in talk('/fork bob')[2]


def test_an_empty_context_is_not_saved_and_quit_ends(talk, tmp_path):
  assert talk()[0] == 0
  assert talk('/info', '/quit', 'never read')[:2] == (0, '')
  assert not list((tmp_path / 'store').glob('*.lcm'))
  status, said, told = talk('a', '/quit', 'never read')
  assert (status, said.count('\n') >= 1, 'alice: saved' in told) == (0, True, True)
  before = (tmp_path / 'store' / 'alice.lcm').stat().st_mtime_ns
  assert 'saved' not in talk('/info', '/quit')[2].replace('bytes saved', '')
  assert (tmp_path / 'store' / 'alice.lcm').stat().st_mtime_ns == before


def test_merge(talk, tmp_path, loader):
  loader.name = 'adds'
  talk('the first', context='one')
  talk('the second', context='two')
  status, _, told = talk('/merge two', context='one')
  assert (status, 'one: remembers two too' in told) == (0, True)
  assert '/merge one: is this conversation' in talk('/merge one', context='one')[2]
  (a, tail_a, _), (b, tail_b, _) = saved(tmp_path, 'one'), saved(tmp_path, 'two')
  assert a > b + len(tail_b)
  assert tail_a == ()
  assert talk('what', context='one')[0] == 0   # and is carried on
  loader.name = 'lstm'
  talk('a', context='x')
  talk('b', context='y')
  assert "memory of model.name='lstm' is no sum" in talk('/merge y', context='x')[2]


def test_help_lists_every_command(talk):
  told = talk('/help')[2]
  for command in chat.Chat(*[None] * 5, max_new_tokens=1, seed=0, interrupts=None,
                           terminal=None).commands:
    assert f'{command}' in told


COMMANDS = [
    ('/raed x', '/raed: no such command (did you mean "/read"?); /help lists them, and a line that '
     'begins with // is text'),
    ('/read', '/read: takes FILE, and got nothing; write /read FILE'),
    ('/save it', '/save: takes nothing, and got it; write /save'),
    ('/read {tmp}/none', '/read {tmp}/none: cannot be read: No such file'),
    ('/read {tmp}', '/read {tmp}: is a folder; give a file'),
    ('/fork a/b', "context 'a/b': is no name"),
    ('/merge nobody', "context 'nobody': there is none in --store={tmp}/store"),
]


@pytest.mark.parametrize('line, message', COMMANDS, ids=[line for line, _ in COMMANDS])
def test_a_mistaken_command_ends_a_script_and_loses_nothing(talk, tmp_path, line, message):
  status, _, told = talk('a', line.format(tmp=tmp_path), 'never read')
  assert status == 2
  said = [line for line in told.splitlines() if line.startswith('longctx: ')]
  assert len(said) == 1
  assert message.format(tmp=tmp_path) in said[0]
  assert (tmp_path / 'store' / 'alice.lcm').exists()
  alone = saved(tmp_path)
  talk('a', context='bob')
  assert saved(tmp_path, 'bob') == alone


def fill_disk(monkeypatch):
  def full(*args):
    raise OSError(28, 'No space left on device')
  monkeypatch.setattr(files.os, 'fsync', full)


def test_a_full_disk_is_told_and_the_old_file_stays(talk, tmp_path, monkeypatch):
  talk('one')
  before = (tmp_path / 'store' / 'alice.lcm').read_bytes()
  fill_disk(monkeypatch)
  for lines in (['two'], ['two', '/save']):
    status, said, told = talk(*lines)
    assert status == 2
    assert 'alice.lcm: cannot be written: No space left on device; what was saved before is' in told
    assert said
  assert (tmp_path / 'store' / 'alice.lcm').read_bytes() == before


class Keys(io.TextIOWrapper):
  """A terminal's stdin."""

  def isatty(self):
    return True


def test_at_a_terminal_a_mistake_or_a_full_disk_ends_nothing(talk, tmp_path, monkeypatch, capsys):
  lines = iter(['/raed x', 'one', None, '/fork bob', None])
  def typed(prompt):
    line = next(lines)
    if line is None:
      raise EOFError
    return line
  tries = []
  save = store.Store.save
  def save_or_fail(self, name, context, new=False):
    tries.append(name)
    if len(tries) == 1:
      raise ConfigError('alice.lcm: cannot be written: No space left on device')
    return save(self, name, context, new)
  monkeypatch.setattr(store.Store, 'save', save_or_fail)
  monkeypatch.setattr('builtins.input', typed)
  monkeypatch.setattr(sys, 'stdin', Keys(io.BytesIO()))
  status = chat.main(['chat', f'--workdir={tmp_path}', f'--store={tmp_path}/store',
                      '--context=alice', '--max_new_tokens=3'])
  told = capsys.readouterr().err
  assert status == 0
  assert 'did you mean "/read"' in told
  assert 'not saved: mend that and end again' in told
  assert tries == ['alice', 'bob', 'alice']
  assert saved(tmp_path, 'alice') == saved(tmp_path, 'bob')


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_answer_is_remembered_as_far_as_it_was_written(
    talk, tmp_path, monkeypatch, number):
  class Interrupting(generate.Terminal):
    written = 0
    def __call__(self, text):
      super().__call__(text)
      Interrupting.written += len(text)
      if Interrupting.written == 5 and text:
        os.kill(os.getpid(), number)
  with monkeypatch.context() as patch:
    patch.setattr(generate, 'Terminal', Interrupting)
    before = signal.getsignal(number)
    status, said, _ = talk(b'hello\n', 'never read')
    assert signal.getsignal(number) is before
  assert status == 130
  assert len(said.rstrip('\n')) in (5, 6)   # a byte may stand for no character of its own
  tokens, tail, _ = saved(tmp_path)
  assert 1 + 5 + 5 <= tokens + len(tail) < 1 + 5 + 12


def test_an_interrupted_reading_keeps_what_was_read(talk, tmp_path, monkeypatch):
  path = tmp_path / 'book'
  path.write_bytes(TEXT.astype(np.uint8).tobytes())
  chunks = []
  read_chunk = reader_lib.s.read_chunk
  def interrupted(*args):
    chunks.append(1)
    if len(chunks) == 3:
      os.kill(os.getpid(), signal.SIGINT)
    return read_chunk(*args)
  monkeypatch.setattr(reader_lib.s, 'read_chunk', interrupted)
  status, _, told = talk(f'/read {path}', 'never read')
  assert status == 130
  assert f'stopped after {3 * CHUNK - 1} tokens of {path}' in told
  tokens, tail, arrays = saved(tmp_path)
  assert (tokens, tail) == (3 * CHUNK, ())
  reader = begun()
  reader.read(TEXT[:3 * CHUNK - 1])
  reader.read_tail()
  assert arrays == bits(reader)[1]


def test_a_growing_state_has_room_for_so_many_and_says_so(talk, tmp_path, loader):
  loader.name = 'full'
  path = tmp_path / 'book'
  path.write_bytes(b'x' * 100)
  status, _, told = talk(f'/read {path}', flags=['--capacity=40'])
  assert status == 2
  assert f'/read {path}: nothing of it was read: the first: 100 tokens more than the 1 so far are ' \
         '101; this context has room for 40. /forget empties it' in told
  assert not (tmp_path / 'store' / 'alice.lcm').exists()
  _, _, told = talk('x' * 30, flags=['--capacity=40'])
  assert 'alice: full, it has room for 40 tokens' in told
  assert "--capacity=50: context 'alice' has room for 40 tokens, which cannot be changed" in talk(
      'more', flags=['--capacity=50'])[2]
  status, _, told = talk('more', flags=['--capacity=40'])
  assert status == 2
  assert 'the line and one token: 6 tokens more than the 40 so far' in told


def test_a_context_of_another_model_or_tokenizer(talk, tmp_path, loader):
  talk('a')
  before = (tmp_path / 'store' / 'alice.lcm').read_bytes()
  loader.params = jax.tree.map(lambda x: x + 1, made('lstm')[2])
  status, _, told = talk('b')
  assert status == 2
  assert "longctx: context 'alice': is the memory of another model: parameters: the context has" in told
  loader.params = None
  loader.tokenizer = Bytes()
  loader.tokenizer.fingerprint = 'f' * 64
  assert f'tokenizer: the context has bytes, this model has {"f" * 16}' in talk('b')[2]
  loader.name = 'full'
  assert 'model.name: the context has "lstm", this model has "decoder"' in talk('b')[2]
  assert (tmp_path / 'store' / 'alice.lcm').read_bytes() == before


def test_parameters_that_are_not_finite_save_nothing(talk, tmp_path, loader):
  loader.params = jax.tree.map(lambda x: x * jnp.nan, made('lstm')[2])
  status, _, told = talk('a')
  assert status == 2
  assert 'hold NaN' in told
  assert not (tmp_path / 'store' / 'alice.lcm').exists()


@pytest.mark.parametrize('lines, is_told', [
    ((), True), ((), False), (('/save',), False), (('/fork bob',), False), (('/quit',), False)])
def test_a_memory_that_is_no_longer_finite_leaves_the_saved_one(
    talk, tmp_path, loader, monkeypatch, lines, is_told):
  """No token is made that would show it; `is_told`: by /read itself, or whatever saves after it refuses."""
  loader.name, loader.params = 'infini', jax.tree.map(lambda x: x, made('infini')[2])
  table = loader.params['embedding']['table']
  table.set_value(table.get_value().at[ord('z')].set(jnp.nan))
  (tmp_path / 'good').write_bytes(b'a good book. ' * 5)
  (tmp_path / 'bad').write_bytes(b'a bad one. z ' * 5)
  assert talk(f'/read {tmp_path}/good')[0] == 0
  before = (tmp_path / 'store' / 'alice.lcm').read_bytes()
  if not is_told:
    monkeypatch.setattr(reader_lib.Reader, 'check_finite', lambda self, what: None)
  status, _, told = talk(f'/read {tmp_path}/bad', *lines)
  last = told.splitlines()[-1]
  assert (status, told.count('longctx: ')) == (2, 1)
  assert (f'/read {tmp_path}/bad: ' in last) == is_told
  assert re.search('longctx: .*: memory.layers.0.store.* of what is remembered is NaN or infinite, and must be '
                   'finite; go on from .*, without .*; what was saved before is as it was$', last)
  assert [path.name for path in (tmp_path / 'store').glob('*.lcm')] == ['alice.lcm']
  assert (tmp_path / 'store' / 'alice.lcm').read_bytes() == before


def with_numbers(tmp_path, name, number):
  """The saved context with another number for each of its own, as none would be saved where it is not finite."""
  path = tmp_path / 'store' / f'{name}.lcm'
  context = store.load(path)
  store.save(path, dataclasses.replace(context, arrays={
      key: np.full_like(x, number) if x.dtype == np.float32 else x for key, x in context.arrays.items()}))


def test_a_saved_memory_that_is_not_finite_is_refused(talk, tmp_path, loader):
  loader.name = 'adds'
  talk('one')
  talk('two', context='bob')
  with_numbers(tmp_path, 'bob', np.nan)
  status, _, told = talk('more', context='bob')
  assert (status, "context 'bob': layers.0" in told, told.count('\n')) == (2, True, 1)
  assert 'must be finite: nothing can be read on from it; delete it (python -m longctx.contexts delete ' in told
  status, _, told = talk('more', '/merge bob')
  assert (status, "context 'bob': layers.0" in told, 'alice: saved, ' in told) == (2, True, True)


def test_memories_whose_sum_overflows_are_not_merged(talk, tmp_path, loader):
  loader.name = 'adds'
  for name in ('alice', 'bob'):
    talk('/read ' + str(ROOT / 'pyproject.toml'), context=name)
    with_numbers(tmp_path, name, 3e38)
  status, _, told = talk('/merge bob')
  assert (status, '/merge bob: nothing was merged: the state: layers.0' in told, 'alice: saved, ' in told) == (2, True, False)


def test_an_encrypted_conversation(talk, tmp_path, monkeypatch):
  plain = talk('a secret', 'more', context='plain')[1]
  monkeypatch.setenv(seal.KEY_VARIABLE, 'ab' * 32)
  assert talk('a secret')[1] + talk('more')[1] == plain
  assert isinstance(store.inspect(tmp_path / 'store' / 'alice.lcm'), store.Sealed)
  assert saved(tmp_path, key=b'\xab' * 32) == saved(tmp_path, 'plain')
  monkeypatch.setenv(seal.KEY_VARIABLE, 'cd' * 32)
  assert 'and the key given is' in talk('more')[2]
  monkeypatch.delenv(seal.KEY_VARIABLE)
  assert 'is encrypted (key ' in talk('more')[2]


def test_a_damaged_context_is_refused_and_left_alone(talk, tmp_path):
  talk('a')
  path = tmp_path / 'store' / 'alice.lcm'
  broken = path.read_bytes()[:-3]
  path.write_bytes(broken)
  status, _, told = talk('b')
  assert status == 2
  assert 'is damaged or cut short' in told
  assert path.read_bytes() == broken


def test_one_conversation_at_a_time(talk, tmp_path):
  talk('a')
  with store.Store(str(tmp_path / 'store')).hold('alice'):
    status, _, told = talk('b')
    assert status == 2
    assert f"context 'alice': in use by another process (pid {os.getpid()} on" in told
    assert talk('b', context='bob')[0] == 0


def test_a_budget_drops_other_contexts_but_never_this_one(talk, tmp_path):
  talk('a', context='old')
  size = (tmp_path / 'store' / 'old.lcm').stat().st_size
  status, _, told = talk('a', flags=[f'--budget={size + 100}'])
  assert status == 0
  assert told.splitlines()[-1] == 'dropped old'
  assert [p.name for p in (tmp_path / 'store').glob('*.lcm')] == ['alice.lcm']
  status, out, told = talk('b', flags=['--budget=10'])
  assert (status, out) == (2, '')   # before anything is read or written
  assert '--budget=10: alice holds' in told
  talk('a', context='old')
  assert 'dropped old' in talk('/fork bob', flags=[f'--budget={2 * size + 100}'])[2]
  assert '/fork alice: is this conversation; give another name' in talk('/fork alice')[2]


MISTAKES = [
    ([], '--workdir: missing'),
    (['--workdir=/no/such'], '--workdir=/no/such: no such folder'),
    (['W'], '--context: missing; give the context a name'),
    (['W', '--context=a'], '--store: missing; give a folder for contexts'),
    (['W', '--context=a', '--store={tmp}/file'], '--store={tmp}/file: is a file; give a folder'),
    (['W', '--context=a/b', '--store={tmp}/s'], "context 'a/b': is no name"),
    (['W', '--context=a', '--store={tmp}/s', '--capacity=-1'], '--capacity=-1: must be at least 0'),
    (['W', '--context=a', '--store={tmp}/s', '--budget=x'], '--budget=x: must be a size'),
    (['W', '--contxt=a'], '--contxt: unknown flag (did you mean "context"?)'),
    (['hello'], "'hello': not a flag; type text when it has started, or give it on stdin"),
    (['W', '--temperature=-1'], '--temperature=-1.0: must be at least 0'),
    (['W', '--prompt=a'], '--prompt: unknown flag'),
]


@pytest.mark.parametrize('args, message', MISTAKES, ids=[m for _, m in MISTAKES])
def test_a_mistake_is_one_line_and_status_2(tmp_path, loader, capsys, args, message):
  (tmp_path / 'file').write_text('')
  args = [f'--workdir={tmp_path}' if a == 'W' else a.format(tmp=tmp_path) for a in args]
  assert chat.main(['chat', *args]) == 2
  out, err = capsys.readouterr()
  assert (out, err.count('\n')) == ('', 1)
  assert err.startswith('longctx: ')
  assert message.format(tmp=tmp_path) in err


def test_help_answers_before_jax_is_imported():
  done = subprocess.run([sys.executable, '-X', 'importtime', '-m', 'longctx.chat', '--help'],
                        capture_output=True, text=True, timeout=60, check=True, cwd=ROOT)
  assert not {line.split('|')[-1].strip() for line in done.stderr.splitlines()} & {
      'jax', 'numpy', 'flax'}
  for name in chat.define_flags():
    assert name in ('flagfile', 'undefok') or f'--{name}=' in done.stdout
  assert '--prompt' not in done.stdout


# --- The real command.


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """The workdir of a run of a few steps."""
  from tests.programs import tiny
  folder = tmp_path_factory.mktemp('chat')
  tiny.write_corpus(folder / 'corpus')
  assert main.main([
      'main', f'--config={ROOT}/tests/programs/tiny.py:lstm', f'--workdir={folder}/w',
      f'--config.data.files={folder}/corpus/*.txt', f'--config.data.cache_dir={folder}/cache',
      '--config.run.num_steps=2', '--config.run.eval_every=0', '--config.mesh.layout=single']) == 0
  return folder


def start(trained, context, **settings):
  return subprocess.Popen(
      [sys.executable, '-m', 'longctx.chat', f'--workdir={trained}/w', f'--store={trained}/s',
       f'--context={context}', '--max_new_tokens=20'], cwd=ROOT, stdin=subprocess.PIPE,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE,
      env=os.environ | {'JAX_PLATFORMS': 'cpu', 'XDG_CACHE_HOME': f'{trained}/cache'}, **settings)


@pytest.mark.slow
def test_real_processes_carry_a_conversation_on(trained):
  together = start(trained, 'one')
  apart = start(trained, 'two')
  said, told = together.communicate(b'hello\nagain\n', timeout=120)
  assert together.returncode == 0, told
  # The first of the two processes is told to end while it waits for a line.
  apart.stdin.write(b'hello\n')
  apart.stdin.flush()
  first = apart.stdout.readline()
  while not said.startswith(first) or b'\n' not in first:
    first += apart.stdout.readline()
  time.sleep(0.5)   # other lines of the answer, if it has several
  apart.send_signal(signal.SIGTERM)
  rest, told = apart.communicate(timeout=60)
  assert apart.returncode == 130
  assert b'two: saved, ' in told
  second = start(trained, 'two').communicate(b'again\n', timeout=120)
  assert first + rest + second[0] == said
  contexts = [store.load(trained / 's' / f'{name}.lcm') for name in ('one', 'two')]
  assert contexts[0].header.tail == contexts[1].header.tail
  for name, x in contexts[0].arrays.items():
    assert x.tobytes() == contexts[1].arrays[name].tobytes()
