"""The token cache: rebuilt when anything changed, never half-written, never in memory whole."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from longctx import progress
from longctx.data import cache, corpus, disk, parts, stream
from longctx.data.tokenizer import Bytes
from longctx.errors import ConfigError

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def builds(monkeypatch):
  """The caches that were built, by name."""
  built = []
  real = disk._build
  def build(path, *args):
    built.append(path.name)
    real(path, *args)
  monkeypatch.setattr(disk, '_build', build)
  return built


def config_of(root, **kwargs):
  defaults = {'corpus': 'files', 'files': str(root / '*.txt'), 'cache_dir': str(root / 'cache'),
              'validation_fraction': 0, 'test_fraction': 0}
  return stream.Config(**(defaults | kwargs))


def write(root, **files):
  root.mkdir(exist_ok=True)
  for name, text in files.items():
    (root / f'{name}.txt').write_text(text)


def texts(config, split='train'):
  d = stream.open_documents(config, split)
  return [d.tokenizer.decode(d.document(i)).decode() for i in range(len(d))]


def folders(root):
  return sorted(p.name for p in (root / 'cache').iterdir() if p.is_dir())


def test_file_format(tmp_path):
  write(tmp_path, a='xy', b='z')
  stream.open_documents(config_of(tmp_path), 'train')
  name, = folders(tmp_path)
  assert name.startswith('files-train-')
  path = tmp_path / 'cache' / name
  assert sorted(p.name for p in path.iterdir()) == ['meta.json', 'offsets.npy', 'tokens.bin']
  assert np.fromfile(path / 'tokens.bin', np.uint16).tolist() == [256, 120, 121, 256, 122, 256]
  assert np.load(path / 'offsets.npy').tolist() == [0, 3, 5]
  meta = json.loads((path / 'meta.json').read_text())
  assert (meta['documents'], meta['tokens'], meta['bytes']) == (2, 5, 3)


def test_wide_tokens_for_a_large_vocabulary(tmp_path):
  class Wide(Bytes):
    vocab_size = 70_000
    separator = 69_999
    fingerprint = 'wide'
  write(tmp_path, a='xy')
  from longctx.data import corpus
  source = corpus.open_source(config_of(tmp_path))
  store = cache.open_cache(source, 'train', Wide(), str(tmp_path / 'cache'))
  assert store.parts[0].tokens.tolist() == [69_999, 120, 121, 69_999]


def test_built_once_and_again_when_the_source_changes(tmp_path, builds):
  write(tmp_path, a='one', b='two')
  config = config_of(tmp_path)
  assert texts(config) == texts(config) == ['one', 'two']
  assert len(builds) == 1
  write(tmp_path, b='TWO')                                # same size, other time
  assert texts(config) == ['one', 'TWO']
  write(tmp_path, c='three')                              # added
  assert texts(config) == ['one', 'TWO', 'three']
  (tmp_path / 'a.txt').unlink()                           # removed
  assert texts(config) == ['TWO', 'three']
  (tmp_path / 'c.txt').rename(tmp_path / 'A.txt')         # renamed
  assert texts(config) == ['three', 'TWO']
  assert len(builds) == len(set(builds)) == 5
  assert len(folders(tmp_path)) == 5                      # superseded ones stay


def test_split_rule_and_split_have_caches_of_their_own(tmp_path, builds):
  write(tmp_path, a='0123456789')
  rule = {'split': 'contiguous', 'validation_fraction': 0.2}
  assert texts(config_of(tmp_path, **rule)) == ['01234567']
  assert texts(config_of(tmp_path, **rule), 'validation') == ['89']
  assert texts(config_of(tmp_path, **(rule | {'validation_fraction': 0.4}))) == ['012345']
  assert len(set(builds)) == 3


def test_hash_of_content_is_of_the_content_alone(tmp_path):
  for folder in ('x', 'y'):
    write(tmp_path / folder, a='one', b='two')
  write(tmp_path / 'z', a='onet', b='wo')
  x, y, z = (stream.open_documents(config_of(tmp_path / f), 'train').content for f in 'xyz')
  assert x == y != z


@pytest.mark.parametrize('damage', ['truncate', 'grow', 'offsets', 'no meta', 'torn meta', 'gone',
                                    'not a dict'])
def test_damaged_caches_are_built_again(tmp_path, builds, damage, caplog):
  write(tmp_path, a='one', b='two')
  config = config_of(tmp_path)
  texts(config)
  path = tmp_path / 'cache' / folders(tmp_path)[0]
  if damage == 'truncate':
    os.truncate(path / 'tokens.bin', 6)
  elif damage == 'grow':
    os.truncate(path / 'tokens.bin', 600)
  elif damage == 'offsets':
    os.truncate(path / 'offsets.npy', 10)
  elif damage == 'no meta':
    (path / 'meta.json').unlink()
  elif damage == 'torn meta':
    os.truncate(path / 'meta.json', 30)
  elif damage == 'gone':
    (path / 'tokens.bin').unlink()
  elif damage == 'not a dict':
    (path / 'meta.json').write_text('[]')
  assert texts(config) == ['one', 'two']
  assert len(builds) == 2
  assert 'damaged' in caplog.text
  assert texts(config) == ['one', 'two']
  assert len(builds) == 2


BUILDER = '''
import sys, time
from longctx.data import cache, corpus, stream
config = stream.Config(corpus='files', files=sys.argv[1] + '/*.txt', validation_fraction=0,
                       test_fraction=0, cache_dir=sys.argv[1] + '/cache')
real = corpus.read_chunks
def slow(*args):
  open(sys.argv[1] + '/log', 'a').write('read\\n')
  yield from real(*args)
  time.sleep(float(sys.argv[2]))
corpus.read_chunks = slow
documents = stream.open_documents(config, 'train')
print([documents.tokenizer.decode(documents.document(i)) for i in range(len(documents))])
'''


def start(root, seconds):
  return subprocess.Popen([sys.executable, '-c', BUILDER, str(root), str(seconds)], cwd=ROOT,
                          stdout=subprocess.PIPE, text=True)


def test_a_killed_builder_leaves_nothing_that_is_used(tmp_path, builds):
  write(tmp_path, a='one', b='two')
  process = start(tmp_path, 60)
  try:
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob('cache/*.part-*/tokens.bin')):
      assert time.monotonic() < deadline
      time.sleep(0.05)
  finally:
    process.send_signal(signal.SIGKILL)
    process.communicate()
  half, = folders(tmp_path)
  assert '.part-' in half
  assert texts(config_of(tmp_path)) == ['one', 'two']
  assert len(builds) == 1
  done, = folders(tmp_path)  # what the dead one left is gone
  assert '.part-' not in done


def test_two_processes_build_once(tmp_path):
  write(tmp_path, a='one', b='two')
  processes = [start(tmp_path, 0.5) for _ in range(2)]
  outputs = [p.communicate(timeout=120)[0] for p in processes]
  assert outputs == ["[b'one', b'two']\n"] * 2
  assert (tmp_path / 'log').read_text() == 'read\n' * 2  # two documents, once each


def test_a_cache_of_an_earlier_format_is_told_and_built_again(tmp_path, builds, monkeypatch, caplog):
  write(tmp_path, a='one', b='two')
  with monkeypatch.context() as earlier:
    earlier.setattr(cache, 'FORMAT', 2)
    earlier.setattr(cache._name, '__defaults__', (2,))
    assert texts(config_of(tmp_path)) == ['one', 'two']
  old, = folders(tmp_path)
  assert caplog.text == ''
  assert texts(config_of(tmp_path)) == ['one', 'two']
  assert f'{tmp_path}/cache/{old}: is of an earlier format; its text is tokenised again' in caplog.text
  assert len(set(builds)) == 2 and old in folders(tmp_path)
  caplog.clear()
  assert texts(config_of(tmp_path)) == ['one', 'two']
  assert len(builds) == 2 and caplog.text == ''


# Pairs and labelled texts.


def pairs_of(root, **settings):
  return config_of(root, **(dict(form='pairs', length=16, source_length=16, long_documents='drop', batch_size=1, threads=0,
                                 prefetch=0) | settings))


def targets(config):
  """Of an epoch, sorted; of classes their numbers."""
  found, _, tokenizer = stream.open_rows(config, split='train', seed=0)
  batches = [found[i] for i in range(found.num_rows)]
  if config.form == 'labels':
    return sorted(int(b['targets'][0, 0]) for b in batches)
  return sorted(tokenizer.decode(b['targets'][b['loss_mask'] > 0]).decode() for b in batches)


def test_pairs_have_a_cache_of_their_own_that_is_built_when_a_file_changes(tmp_path, builds):
  write(tmp_path, a='1\tone\n2\t\n', b='3\ttwo')
  config = pairs_of(tmp_path)
  assert targets(config) == targets(config) == ['', 'one', 'two']
  assert texts(config_of(tmp_path)) == ['1\tone\n2\t\n', '3\ttwo']
  assert [name.rpartition('-')[0] for name in builds] == ['pairs-train', 'files-train']
  assert targets(pairs_of(tmp_path, length=4, long_documents='trim')) == ['', 'one', 'two']   # the same tokens
  assert len(builds) == 2
  write(tmp_path, b='3\tTWO')   # same size, other time
  assert targets(config) == ['', 'TWO', 'one']
  (tmp_path / 'b.txt').unlink()
  assert targets(config) == ['', 'one']
  assert len(builds) == len(set(builds)) == 4


def test_classes_that_have_other_numbers_are_built_again(tmp_path, builds):
  for name in ('train/b/0', 'test/b/0', 'train/c/0', 'test/c/0'):
    path = tmp_path / f'{name}.txt'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(name)
  config = pairs_of(tmp_path, form='labels', source_length=0, files=str(tmp_path))
  assert targets(config) == targets(config) == [0, 1]
  assert len(builds) == 1
  for part in ('train', 'test'):
    (tmp_path / part / 'a').mkdir()   # a class without texts
  assert targets(config) == [1, 2]
  assert len(builds) == 2


@pytest.mark.parametrize('processes', [1, 2])
def test_a_line_that_is_no_pair_is_told_by_who_builds(tmp_path, monkeypatch, processes):
  monkeypatch.setattr(corpus, 'PART', 1)
  write(tmp_path, a='1\tone', b='2\ttwo\nthree', c='4\tfour')
  with pytest.raises(ConfigError) as e:
    targets(pairs_of(tmp_path, build_processes=processes))
  assert str(e.value) == f'{tmp_path}/b.txt:2: has 0 tabs; must have one, between source and target'


LONG = 'ünd der Rest\n' * 40


@pytest.mark.parametrize('split', [dict(), dict(split='contiguous', validation_fraction=0.3, test_fraction=0.1)])
@pytest.mark.parametrize('form', ['packed', 'segments'])
def test_a_huge_document_is_in_several_parts_and_one_document(tmp_path, monkeypatch, split, form):
  write(tmp_path, a='one', b=LONG, c=LONG[7:], d='', e='five')
  def opened(name, part):
    monkeypatch.setattr(corpus, 'CHUNK', 16)
    monkeypatch.setattr(corpus, 'PART', part)
    config = config_of(tmp_path, cache_dir=str(tmp_path / name), form=form, length=8, batch_size=2,
                       build_processes=1, **split)
    return config, stream.open_documents(config, 'train')
  (one, whole), (many, cut) = opened('whole', 1 << 20), opened('cut', 96)
  assert len(folders_of(tmp_path / 'whole')) == 1 and len(folders_of(tmp_path / 'cut')) > 6
  assert sum(meta['continues'] for meta in metas_of(tmp_path / 'cut')) > 5
  assert len(cut) == len(whole) == 4
  assert cut.lengths.tolist() == whole.lengths.tolist()
  assert cut._store.meta['tokens'] == whole._store.meta['tokens']
  assert cut._store.meta['empty_documents'] == whole._store.meta['empty_documents']
  for i in range(4):
    size = int(whole.lengths[i])
    assert cut.document(i).tolist() == whole.document(i).tolist()
    for low, high in ((0, 1), (size - 1, size + 1), (size // 2, size // 2 + 200), (95, 99)):
      low, high = min(low, size), min(high, size + 1)
      assert cut._store.read(i, low, high).tolist() == whole._store.read(i, low, high).tolist()
  assert cut.content != whole.content
  ours, theirs = (stream.open_stream(config, seed=5) for config in (many, one))
  for _ in range(20):
    a, b = next(ours), next(theirs)
    for name in a:
      np.testing.assert_array_equal(a[name], b[name], err_msg=name)
  ours.close()
  theirs.close()


def folders_of(path):
  return [p for p in path.iterdir() if p.is_dir() and '-train-' in p.name]


def metas_of(path):
  return [json.loads((p / 'meta.json').read_text()) for p in folders_of(path)]


# Progress.


def counted(do):
  """How often do() says that it goes on."""
  moves = []
  with progress.told(lambda: moves.append(1)):
    do()
  return len(moves)


def test_each_piece_of_a_document_counts(tmp_path, monkeypatch):
  """One file is one part, however large."""
  monkeypatch.setattr(corpus, 'CHUNK', 100)
  write(tmp_path, a='line\n' * 1000)
  assert counted(lambda: texts(config_of(tmp_path))) >= 50
  assert counted(lambda: texts(config_of(tmp_path))) == 1   # it is there


@pytest.mark.parametrize('grows', [True, False])
def test_who_waits_moves_with_who_builds(tmp_path, monkeypatch, grows):
  """Another process has the lock, and its part's files grow, or do not."""
  monkeypatch.setattr(parts, 'POLL', 0.1)
  write(tmp_path, a='one')
  assert texts(config_of(tmp_path)) == ['one']
  name, = folders(tmp_path)
  whole, half = tmp_path / 'cache' / name, tmp_path / 'cache' / f'{name}.part-1'
  whole.rename(half)   # as while it is being built
  tokens = (half / 'tokens.bin').read_bytes()
  held, before = threading.Event(), []
  def build():
    with disk._locked(whole, wait=False):
      (half / 'tokens.bin').write_bytes(b'')
      held.set()
      for _ in range(10):
        time.sleep(0.2)
        if grows:
          with open(half / 'tokens.bin', 'ab') as file:
            file.write(b'some')
      before.append(len(moves))
      (half / 'tokens.bin').write_bytes(tokens)
      half.rename(whole)
  moves, builder = [], threading.Thread(target=build)
  builder.start()
  held.wait(60)
  with progress.told(lambda: moves.append(1)):
    assert texts(config_of(tmp_path)) == ['one']
  builder.join()
  first = 1   # a look at what is there
  assert before[0] >= first + 3 if grows else before[0] == first


def test_failure_while_building_leaves_nothing(tmp_path, monkeypatch):
  write(tmp_path, a='one')
  class Full:
    vocab_size, separator, fingerprint = 257, 256, 'full'
    def encode(self, data, name):
      raise OSError(28, 'No space left on device')
  from longctx.data import corpus
  source = corpus.open_source(config_of(tmp_path))
  with pytest.raises(ConfigError, match=r"^data\.cache_dir='.*': No space left on device: free"):
    cache.open_cache(source, 'train', Full(), str(tmp_path / 'cache'))
  assert folders(tmp_path) == []


def test_cache_dir_that_cannot_be_made(tmp_path):
  write(tmp_path, a='one')
  with pytest.raises(ConfigError, match=r"^data\.cache_dir='.*a\.txt/cache': .*can be read and written"):
    texts(config_of(tmp_path, cache_dir=str(tmp_path / 'a.txt' / 'cache')))


def test_default_folder(monkeypatch, tmp_path):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'x'))
  assert cache.default_folder() == tmp_path / 'x' / 'longctx'
  monkeypatch.delenv('XDG_CACHE_HOME')
  monkeypatch.setenv('HOME', str(tmp_path))
  assert cache.default_folder() == tmp_path / '.cache' / 'longctx'


READER = '''
import json, os, sys
import grain
import numpy as np
from longctx.data import stream
def rss():
  for line in open('/proc/self/status'):
    if line.startswith(sys.argv[2]):
      return int(line.split()[1]) / 1024
config = stream.Config(corpus='files', files=sys.argv[1] + '/*.txt', validation_fraction=0,
                       test_fraction=0, cache_dir=sys.argv[1] + '/cache', length=1024)
before = rss()
for form in ('packed', 'segments'):
  s = stream.open_stream(stream.Config(**{**config.__dict__, 'form': form}), seed=0)
  for _ in range(10):
    assert next(s)['tokens'].shape == (8, 1024)
  s.close()
print(json.dumps({'before': before, 'after': rss(), 'tokens': s.accounting['tokens']}))
'''


def measure(root, what):
  done = subprocess.run([sys.executable, '-c', READER, str(root), what], cwd=ROOT, check=True,
                        stdout=subprocess.PIPE, text=True)
  return json.loads(done.stdout)


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='needs Linux /proc')
def test_reading_a_large_cache_takes_no_memory(tmp_path):
  write(tmp_path, a='one')
  texts(config_of(tmp_path))
  path = tmp_path / 'cache' / folders(tmp_path)[0]
  num = 200_000_000
  os.truncate(path / 'tokens.bin', 2 * (num + 1))  # 400 MB, sparse
  np.save(path / 'offsets.npy', np.array([0, num // 2, num]))
  meta = json.loads((path / 'meta.json').read_text())
  meta['sizes'] = {n: (path / n).stat().st_size for n in meta['sizes']}
  (path / 'meta.json').write_text(json.dumps(meta | {'tokens': num, 'documents': 2}))
  found = measure(tmp_path, 'VmRSS')
  assert found['tokens'] == num
  assert found['after'] - found['before'] < 24, found


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='needs Linux /proc')
def test_building_a_large_cache_takes_little_memory(tmp_path):
  with open(tmp_path / 'a.txt', 'wb') as file:
    file.truncate(100_000_000)
  found = measure(tmp_path, 'VmHWM')
  assert found['tokens'] == 100_000_001
  assert found['after'] - found['before'] < 100, found  # of 300 MB
