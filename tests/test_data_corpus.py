"""Corpora: what is a document, which split it is in, and that no split leaks into another."""

import hashlib
import os
import pathlib
import sysconfig

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.data import corpus, stream
from longctx.errors import ConfigError

HASH = corpus.SplitRule(kind='hash', validation=0.2, test=0.1)


def contents(source, split):
  return {name: b''.join(chunks) for name, chunks in source.documents(split)}


def write(root, files):
  for name, data in files.items():
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def files_config(pattern, tmp_path, **kwargs):
  return stream.Config(corpus='files', files=str(pattern), cache_dir=str(tmp_path / 'cache'),
                       **kwargs)


def test_stdlib_is_the_sources_that_this_python_runs():
  rule = corpus.SplitRule(kind='hash', validation=0.05, test=0.05)
  source = corpus.stdlib_source(rule)
  names = {split: source.names(split) for split in corpus.SPLITS}
  everything = [n for split in corpus.SPLITS for n in names[split]]
  assert len(everything) == len(set(everything)) == len(source) > 300
  assert all(names[split] == sorted(names[split]) for split in corpus.SPLITS)
  assert {'ast.py', 'json/decoder.py', 'asyncio/tasks.py'} <= set(everything)
  for n in everything:
    assert n.endswith('.py')
    assert not {'site-packages', 'dist-packages', 'test', 'tests'} & set(n.split('/'))
  root = pathlib.Path(sysconfig.get_path('stdlib'))
  some = contents(source, 'validation')
  for n in list(some)[:5]:
    assert some[n] == (root / n).read_bytes()
  assert 0.85 < len(names['train']) / len(everything) < 0.95
  assert names['validation']
  assert names['test']


def test_no_file_of_the_stdlib_is_in_two_splits():
  rule = corpus.SplitRule(kind='hash', validation=0.3, test=0.3)
  source = corpus.stdlib_source(rule)
  seen = {split: set(contents(source, split).values()) for split in corpus.SPLITS}
  for one, other in (('train', 'validation'), ('train', 'test'), ('validation', 'test')):
    assert not seen[one] & seen[other]


def test_of_equal_files_in_several_splits_the_first_stays_and_the_others_are_counted(
    tmp_path, monkeypatch):
  names = {split: [f'{i}.py' for i in range(40) if HASH.holds(f'{i}.py', split)]
           for split in corpus.SPLITS}
  train, held = sorted(names['train'])[:3], sorted(names['validation'])[:2]
  files = {train[0]: b'same', train[1]: b'same', held[0]: b'same', train[2]: b'mess', held[1]: b'x'}
  write(tmp_path, files)
  monkeypatch.setattr(sysconfig, 'get_path', lambda name: str(tmp_path))
  source = corpus.stdlib_source(HASH)
  equal = sorted(name for name, data in files.items() if data == b'same')
  stays = 'train' if equal[0] in train else 'validation'
  lost = [name for name in equal if (name in held) != (stays == 'validation')]
  assert source.num_copies == len(lost) > 0
  kept = {name for split in corpus.SPLITS for name in source.names(split)}
  assert kept == files.keys() - set(lost)
  config = stream.Config(cache_dir=str(tmp_path / 'cache'), validation_fraction=0.2,
                         test_fraction=0.1, length=4, batch_size=1)
  assert stream.open_stream(config, seed=0).accounting['dropped_copies'] == len(lost)
  assert corpus.stdlib_source(corpus.SplitRule(kind='contiguous', validation=0.2,
                                               test=0.1)).num_copies == 0


def test_hash_split_is_the_hash_of_the_name():
  """Written out, so that the split of a published number never moves."""
  for name in ('ast.py', 'json/decoder.py', 'ü.txt', 'a/b/c') + tuple(map(str, range(300))):
    u = int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) / 16**16
    expected = 'test' if u < 0.1 else 'validation' if u < 0.1 + 0.2 else 'train'
    assert [s for s in corpus.SPLITS if HASH.holds(name, s)] == [expected]


def test_split_of_a_document_does_not_depend_on_the_others(tmp_path):
  names = [f'{i}.txt' for i in range(60)]
  write(tmp_path / 'few', dict.fromkeys(names[::3], b'x'))
  write(tmp_path / 'many', dict.fromkeys(names, b'x'))
  for split in corpus.SPLITS:
    few = corpus.files_source(str(tmp_path / 'few/*.txt'), HASH).names(split)
    many = corpus.files_source(str(tmp_path / 'many/*.txt'), HASH).names(split)
    assert few == [n for n in many if n in names[::3]]


def test_glob_names_are_relative_to_its_fixed_part(tmp_path):
  write(tmp_path, {'d/a.txt': b'1', 'd/e/b.txt': b'2', 'd/e/c.md': b'3'})
  rule = corpus.SplitRule(kind='hash', validation=0, test=0)
  def names(pattern):
    return corpus.files_source(str(tmp_path / pattern), rule).names('train')
  assert names('d/**/*.txt') == ['a.txt', 'e/b.txt']
  assert names('d/**') == ['a.txt', 'e/b.txt', 'e/c.md']
  assert names('*/e/?.txt') == ['d/e/b.txt']
  assert names('d/a.txt') == ['a.txt']


def test_glob_is_relative_to_the_working_folder_and_home(tmp_path, monkeypatch):
  write(tmp_path, {'a.txt': b'1'})
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('HOME', str(tmp_path))
  for pattern in ('*.txt', 'a.txt', '~/a.txt', '~/*'):
    source = corpus.files_source(pattern, corpus.SplitRule(kind='hash', validation=0, test=0))
    assert contents(source, 'train') == {'a.txt': b'1'}


def test_contiguous_is_nanogpts_split(tmp_path):
  data = bytes(np.random.default_rng(0).integers(32, 127, 1_003, dtype=np.uint8))
  write(tmp_path, {'input.txt': data})
  config = files_config(tmp_path / 'input.txt', tmp_path, split='contiguous',
                        validation_fraction=0.1, test_fraction=0.0)
  train, validation = (stream.open_documents(config, s) for s in ('train', 'validation'))
  assert train.tokenizer.decode(train.document(0)) == data[:int(len(data) * 0.9)]
  assert validation.tokenizer.decode(validation.document(0)) == data[int(len(data) * 0.9):]
  assert len(train) == len(validation) == 1
  with pytest.raises(ConfigError, match=r'data\.test_fraction=0\.0: the test split'):
    stream.open_documents(config, 'test')


def test_contiguous_cuts_are_exact():
  rule = corpus.SplitRule(kind='contiguous', validation=0.05, test=0.05)
  assert [rule.bounds(100, s) for s in corpus.SPLITS] == [(0, 90), (90, 95), (95, 100)]
  rule = corpus.SplitRule(kind='contiguous', validation=0.1, test=0.2)
  assert [rule.bounds(10, s) for s in corpus.SPLITS] == [(0, 7), (7, 8), (8, 10)]


@given(st.text(max_size=60), st.floats(0, 0.5), st.floats(0, 0.49))
@settings(max_examples=150, deadline=None)
def test_contiguous_parts_are_the_document_and_cut_between_characters(text, validation, test):
  rule = corpus.SplitRule(kind='contiguous', validation=validation, test=test)
  parts = [corpus.cut_bytes(text.encode(), rule, split) for split in corpus.SPLITS]
  assert ''.join(p.decode() for p in parts) == text


@given(st.binary(max_size=60), st.integers(4, 9), st.integers(1, 30))
@settings(max_examples=150, deadline=None)
def test_chunks_join_to_the_document_and_pieces_have_its_chunks(data, size, part):
  path = pathlib.Path(os.environ.get('TMPDIR', '/tmp')) / f'longctx-chunks-{os.getpid()}'
  old, corpus.CHUNK, corpus.PART = (corpus.CHUNK, corpus.PART), size, part
  try:
    path.write_bytes(data)
    for rule in (corpus.SplitRule(kind='contiguous', validation=0.3, test=0.2), HASH):
      for split in corpus.SPLITS:
        chunks = list(corpus.read_chunks(path, rule, split))
        assert b''.join(chunks) == corpus.cut_bytes(data, rule, split)
        assert all(0 < len(c) < 2 * size for c in chunks)
        pieces = corpus.pieces(*rule.bounds(len(data), split))
        assert all(high - low <= 2 * max(size, part + size) for low, high in pieces)
        assert [c for piece in pieces for c in corpus.read_chunks(path, rule, split, piece)] == chunks
  finally:
    corpus.CHUNK, corpus.PART = old
    path.unlink()


@given(st.text(max_size=40), st.integers(4, 9))
@settings(max_examples=150, deadline=None)
def test_chunks_of_text_are_text(text, size):
  path = pathlib.Path(os.environ.get('TMPDIR', '/tmp')) / f'longctx-text-{os.getpid()}'
  old, corpus.CHUNK = corpus.CHUNK, size
  try:
    path.write_bytes(text.encode())
    chunks = list(corpus.read_chunks(path, HASH, 'train'))
    assert ''.join(c.decode() for c in chunks) == text
  finally:
    corpus.CHUNK = old
    path.unlink()


def test_empty_documents_are_skipped_and_counted(tmp_path):
  write(tmp_path, {'a.txt': b'', 'b.txt': b'hello', 'c.txt': b''})
  config = files_config(tmp_path / '*.txt', tmp_path, validation_fraction=0, test_fraction=0,
                        length=2, batch_size=1)
  documents = stream.open_documents(config, 'train')
  assert len(documents) == 1
  assert documents.tokenizer.decode(documents.document(0)) == b'hello'
  assert (documents.total_tokens, documents.total_bytes) == (6, 5)
  account = stream.open_stream(config, seed=0).accounting
  assert (account['documents'], account['empty_documents']) == (1, 2)


@pytest.mark.parametrize('pattern, files, split, message', [
    ('none/*.txt', {}, 'train', r"^data\.files='.*none/\*\.txt': matches no file"),
    ('d*', {'d1/a.txt': b'x'}, 'train', r'matches only folders; write .*\*\*/\*\.txt'),
    ('*.txt', {'b.txt': b'', 'c.txt': b''}, 'train',
     r'all 2 documents of the train split are empty'),
    ('b.txt', {'b.txt': b'x'}, 'validation',
     r"^data\.validation_fraction=0\.05: the validation split .*split='contiguous'"),
    ('b.txt', {'b.txt': b'x'}, 'test', r"^data\.test_fraction=0\.05: the test split"),
    ('b.txt', {'b.txt': b'x'}, 'tests', r"^split='tests': must be one of .*did you mean \"test\""),
])
def test_mistakes(tmp_path, pattern, files, split, message):
  write(tmp_path, files)
  with pytest.raises(ConfigError, match=message) as e:
    stream.open_documents(files_config(tmp_path / pattern, tmp_path), split)
  assert '\n' not in str(e.value)


def test_unreadable_files_are_named(tmp_path, monkeypatch):
  write(tmp_path, {'a.txt': b'text'})
  (tmp_path / 'b.txt').symlink_to(tmp_path / 'gone.txt')
  config = files_config(tmp_path / '*.txt', tmp_path, validation_fraction=0, test_fraction=0)
  with pytest.raises(ConfigError, match=r"^data\.files: '.*b\.txt' cannot be read: No such file"):
    stream.open_documents(config, 'train')
  (tmp_path / 'b.txt').unlink()
  real_open = pathlib.Path.open
  def refuse(path, *args, **kwargs):
    if path.name == 'a.txt':
      raise PermissionError(13, 'Permission denied')
    return real_open(path, *args, **kwargs)
  monkeypatch.setattr(pathlib.Path, 'open', refuse)
  with pytest.raises(ConfigError, match=r"^data\.files: '.*a\.txt' cannot be read: Permission"):
    stream.open_documents(config, 'train')


def test_python_without_sources(tmp_path, monkeypatch):
  monkeypatch.setattr(sysconfig, 'get_path', lambda name: str(tmp_path))
  with pytest.raises(ConfigError, match=r"^data\.corpus='stdlib': .* no \.py file"):
    stream.open_documents(stream.Config(cache_dir=str(tmp_path)), 'train')
