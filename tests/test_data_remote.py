"""Corpora and their tokens behind a URL, and parts that several processes build together."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time

import fsspec
import numpy as np
import pytest
from fsspec.registry import known_implementations

from longctx import progress
from longctx.data import bucket as bucket_lib
from longctx.data import cache, corpus, examples, parts, remote, stream
from longctx.errors import ConfigError, RunError

TEXTS = {f'{folder}/{i}.txt': f'document {i} of {folder}: ' + 'ü' * i * 7
         for folder in ('a', 'b') for i in range(12)}
SMALL = 300   # bytes of a part


@pytest.fixture
def bucket():
  """memory://texts with TEXTS, and its file system."""
  fs = fsspec.filesystem('memory')
  for name, text in TEXTS.items():
    fs.pipe_file(f'memory://texts/{name}', text.encode())
  yield fs
  fs.store.clear()


@pytest.fixture
def folder(tmp_path):
  for name, text in TEXTS.items():
    path = tmp_path / 'texts' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  return tmp_path


@pytest.fixture
def small_parts(monkeypatch):
  monkeypatch.setattr(corpus, 'PART', SMALL)


@pytest.fixture
def pauses(monkeypatch):
  """What was slept."""
  slept = []
  monkeypatch.setattr(remote.time, 'sleep', slept.append)
  return slept


def config_of(files, cache_dir, **settings):
  return stream.Config(**(dict(corpus='files', files=str(files), cache_dir=str(cache_dir), length=16, batch_size=4,
                               build_processes=1) | settings))


def texts(config, split='train', **share):
  d = stream.open_documents(config, split, **share)
  return [d.tokenizer.decode(d.document(i)).decode() for i in range(len(d))]


def batches(config, count=6):
  s = stream.open_stream(config, seed=3)
  found = [next(s) for _ in range(count)]
  s.close()
  return found


def assert_same(ours, theirs):
  for a, b in zip(ours, theirs, strict=True):
    for name in a:
      np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize('pattern', ['**/*.txt', 'a/*.txt', 'b/3.txt'])
@pytest.mark.parametrize('split', [dict(), dict(split='contiguous')])
def test_a_url_gives_what_a_path_gives(bucket, folder, pattern, split):
  rule = dict(validation_fraction=0.3 if 'b/3' not in pattern else 0, test_fraction=0) | split
  path, url = (config_of(f'{root}/{pattern}', folder / 'cache', **rule) for root in
               (folder / 'texts', 'memory://texts'))
  for part in ('train', 'validation') if rule['validation_fraction'] else ('train',):
    assert texts(url, part) == texts(path, part)
    assert stream.open_documents(url, part).content == stream.open_documents(path, part).content


def test_a_file_that_was_written_again_is_read_again(bucket, tmp_path):
  config = config_of('memory://texts/a/*.txt', tmp_path, validation_fraction=0, test_fraction=0)
  before = texts(config)
  bucket.pipe_file('memory://texts/a/0.txt', b'Document')   # as long
  assert [t for t in texts(config) if t not in before] == ['Document']


@pytest.mark.parametrize('form', ['packed', 'segments'])
def test_tokens_in_a_bucket_are_those_on_a_disk(bucket, folder, small_parts, form):
  disk = config_of(folder / 'texts/**/*.txt', folder / 'cache', form=form)
  far = config_of(folder / 'texts/**/*.txt', 'memory://tokens', form=form)
  assert_same(batches(far), batches(disk))
  assert texts(far, 'validation') == texts(disk, 'validation')
  assert stream.open_documents(far, 'train').content == stream.open_documents(disk, 'train').content
  assert len(bucket.glob('memory://tokens/*/meta.json')) > 2   # parts


def test_a_row_is_one_read_of_its_own_bytes(bucket, tmp_path, monkeypatch):
  bucket.pipe_file('memory://texts/long.txt', b'0123456789' * 10_000)
  config = config_of('memory://texts/long.txt', 'memory://tokens', validation_fraction=0, test_fraction=0,
                     threads=0, prefetch=0)
  s = stream.open_stream(config, seed=0)
  read, real = [], type(bucket).cat_file
  def counting(self, path, start=None, end=None, **kwargs):
    read.append(end - start)
    return real(self, path, start, end, **kwargs)
  monkeypatch.setattr(type(bucket), 'cat_file', counting)
  s.batch(2)
  assert read == [2 * (config.length + 1)] * config.batch_size
  s.close()


class ServerError(Exception):
  """Such as gcsfs's own, which is no OSError."""


@pytest.mark.parametrize('kind', [OSError, ServerError])
def test_a_bucket_that_fails_for_a_minute(bucket, tmp_path, monkeypatch, pauses, caplog, kind):
  """While the corpus is read, while tokens are opened, and while rows are."""
  config = config_of('memory://texts/a/*.txt', 'memory://tokens', threads=0, prefetch=0)
  straight = batches(config_of('memory://texts/a/*.txt', tmp_path, threads=0, prefetch=0))
  real, failures = type(bucket).cat_file, iter([True, True, False, True] + [False, True] * 1000)
  def flaky(self, *args, **kwargs):
    if next(failures):
      raise kind('the network is down')
    return real(self, *args, **kwargs)
  monkeypatch.setattr(type(bucket), 'cat_file', flaky)
  assert_same(batches(config), straight)
  assert pauses[:3] == [1, 2, 1]
  assert '/texts/a/' in caplog.text and 'tokens.bin: the network is down; tried again in 1 s' in caplog.text


def test_a_bucket_that_is_gone(bucket, tmp_path, monkeypatch, pauses):
  config = config_of('memory://texts/a/*.txt', 'memory://tokens', threads=0, prefetch=0)
  s = stream.open_stream(config, seed=0)
  def fail(*args, **kwargs):
    raise OSError('the network is down')
  monkeypatch.setattr(type(bucket), 'cat_file', fail)
  with pytest.raises(RunError, match=r'tokens\.bin: cannot be reached: the network is down; tried for 127 s. Once it'):
    s.batch(0)
  assert pauses == list(remote.PAUSES)
  with pytest.raises(RunError, match=r'^memory://tokens: cannot be reached: the network is down'):
    stream.open_documents(config, 'train')


@pytest.mark.parametrize('call', ['glob', 'pipe_file'])
@pytest.mark.parametrize('error, said', [
    (PermissionError(13, 'Permission denied'), 'Permission denied'),
    (OSError('Forbidden: https://storage/b: no storage.objects.list'), 'Forbidden: https://storage/b: no storage.obj.*')])
def test_a_bucket_that_may_not_be_read_or_written(bucket, folder, monkeypatch, pauses, call, error, said):
  """The second is what gcsfs says."""
  def refuse(*args, **kwargs):
    raise error
  monkeypatch.setattr(type(bucket), call, refuse)
  with pytest.raises(ConfigError, match=rf"^data\.cache_dir='memory://tokens': {said}; check the bucket"):
    stream.open_documents(config_of(folder / 'texts/a/*.txt', 'memory://tokens'), 'train')
  assert pauses == []


def test_a_full_disk_of_this_host_is_not_the_buckets_fault(bucket, folder, monkeypatch, pauses):
  def full(path):
    raise OSError(errno.ENOSPC, 'No space left on device', str(path))
  monkeypatch.setattr(cache, 'synced', full)
  with pytest.raises(ConfigError, match=r"^data\.cache_dir='memory://tokens': /\S+/longctx-\w+, where its parts are made "
                                        r'first: No space left on device; free some space, or set TMPDIR to another'):
    stream.open_documents(config_of(folder / 'texts/a/*.txt', 'memory://tokens'), 'train')
  assert pauses == []


@pytest.mark.parametrize('damage', ['truncate', 'no meta', 'torn meta', 'no offsets'])
def test_damage_in_a_bucket_is_built_again(bucket, damage):
  config = config_of('memory://texts/**/*.txt', 'memory://tokens')
  before = texts(config)
  meta, = bucket.glob('memory://tokens/*/meta.json')
  tokens = meta.replace('meta.json', 'tokens.bin')
  if damage == 'truncate':
    bucket.pipe_file(tokens, bucket.cat_file(tokens)[:-2])
  elif damage == 'no meta':
    bucket.rm(meta)
  elif damage == 'no offsets':
    bucket.pipe_file(meta.replace('meta.json', 'offsets.npy'), b'')
  else:
    bucket.pipe_file(meta, bucket.cat_file(meta)[:40])
  assert texts(config) == before
  assert len(bucket.cat_file(tokens)) == json.loads(bucket.cat_file(meta))['sizes']['tokens.bin']


@pytest.mark.parametrize('field', ['files', 'cache_dir'])
def test_a_url_that_cannot_be_opened(tmp_path, field, monkeypatch):
  lacking = {'class': 'a_package_that_is_not_there.Files', 'err': 'Please install lacking_fs'}
  monkeypatch.setitem(known_implementations, 'lacking', lacking)
  (tmp_path / 'a.txt').write_text('a')
  for url, said in (('lacking://b/*.txt', 'Please install lacking_fs'), ('nope://b/*.txt', 'not known')):
    given = dict(files=tmp_path / '*.txt', cache_dir=tmp_path / 'c') | {field: url}
    with pytest.raises(ConfigError, match=rf"^data\.{field}='{url[:4]}.*{said}"):
      stream.open_documents(config_of(**given), 'train')


def test_no_file_behind_a_url(bucket, tmp_path):
  with pytest.raises(ConfigError, match=r"^data\.files='memory://texts/\*\.md': matches no file; check the bucket"):
    stream.open_documents(config_of('memory://texts/*.md', tmp_path), 'train')


def test_pairs_and_labelled_texts_behind_a_url(bucket, tmp_path):
  files = {f'{part}/{label}/{i}.txt': f'{part} {label} {i}'
           for part in ('train', 'test') for label in ('bad', 'good') for i in range(6)}
  files |= {'train/unsup/0.txt': 'of no class', 'train/bad/0.md': 'no text', 'pairs/b.tsv': 'ab\txy\nc\tz\n',
            'pairs/more/a.tsv': 'ü\tv\n'}
  for name, text in files.items():
    bucket.pipe_file(f'memory://examples/{name}', text.encode())
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
  rule = corpus.SplitRule(kind='hash', validation=0.3, test=0)
  for split in corpus.SPLITS:
    far, near = (list(examples.folder_source(root, split, rule).examples(split)) for root in
                 ('memory://examples', str(tmp_path)))
    assert far == near and len(far) > 1
  whole = corpus.SplitRule(kind='hash', validation=0, test=0)
  far, near = (list(examples.pair_source(f'{root}/pairs/**/*.tsv', whole).examples('train'))
               for root in ('memory://examples', tmp_path))
  assert [x[1:] for x in far] == [x[1:] for x in near] == [(b'ab', b'xy'), (b'c', b'z'), ('ü'.encode(), b'v')]
  assert far[1][0] == 'memory://examples/pairs/b.tsv:2'.replace('memory://', 'memory:///')
  for read in (lambda url: examples.pair_source(url, whole), examples.folder_classes):
    with pytest.raises(ConfigError, match=r"^data\.files='memory://none.*: (matches no file|must be a folder)"):
      read('memory://none/*.tsv')


@pytest.fixture
def given(bucket, folder):
  """config(form, URL or folder of examples, ...) of pairs and labelled texts, in some ten files each."""
  lines = {f'pairs/{i}.tsv': ''.join(f'source {j}\t{"" if j % 5 == 0 else f"target {j}"}\n' for j in range(i, 99, 11))
           for i in range(11)}
  labelled = {f'{part}/{label}/{i}.txt': f'{label} {i} of {part} ' * (i % 7) for part in ('train', 'test')
              for label in ('bad', 'good') for i in range(8)}
  for name, content in (lines | labelled).items():
    bucket.pipe_file(f'memory://examples/{name}', content.encode())
    path = folder / 'examples' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
  def config(form, root, cache_dir, **settings):
    special = dict(files=f'{root}/pairs/*.tsv', source_length=10) if form == 'pairs' else dict(files=root)
    return config_of(**(special | dict(form=form, cache_dir=cache_dir, long_documents='trim', threads=0, prefetch=0)
                        | settings))
  return config


FORMS = ('pairs', 'labels')


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('processes', [1, 2])
def test_examples_of_parts_in_a_bucket_are_those_of_one_part_on_a_disk(bucket, given, folder, monkeypatch, form, processes):
  near = given(form, f'{folder}/examples', folder / 'cache', validation_fraction=0.3)
  dropped = dataclasses.replace(near, long_documents='drop')
  account = lambda config: stream.open_stream(config, seed=0).accounting
  whole = [batches(near), batches(dropped), account(near), account(dropped)]
  monkeypatch.setattr(corpus, 'PART', SMALL)
  # Builders that are processes would have a memory:// of their own.
  far = given(form, *(('memory://examples', 'memory://tokens') if processes == 1 else
                      (f'{folder}/examples', f'file://{folder}/tokens')), validation_fraction=0.3, build_processes=processes)
  far_dropped = dataclasses.replace(far, long_documents='drop')
  assert_same(batches(far), whole[0])
  assert_same(batches(far_dropped), whole[1])
  assert [account(far), account(far_dropped)] == whole[2:]
  assert len(fsspec.open_files(f'{far.cache_dir}/{form}-train-*/meta.json')) > 2
  for host in range(2):
    found, expected = (stream.open_rows(config, split='train', seed=3, host_index=host, num_hosts=2)[0]
                       for config in (far, near))
    assert_same([found[i] for i in range(4)], [expected[i] for i in range(4)])


@pytest.mark.parametrize('form', FORMS)
def test_parts_of_examples_are_files_of_their_size(given, folder, small_parts, form):
  config = given(form, f'{folder}/examples', '')
  whole = (examples.pair_source(config.files, examples.rule_of(config)) if form == 'pairs' else
           examples.folder_source(config.files, 'train', examples.rule_of(config)))
  found = whole.parts('train')
  assert [file for part in found for file in part.files] == list(whole.files)
  sizes = [[os.path.getsize(file.path) for file in part.files] for part in found]
  assert len(sizes) > 2 and all(sum(size) >= SMALL > sum(size[:-1]) for size in sizes[:-1])


@pytest.mark.parametrize('form', FORMS)
def test_two_hosts_make_the_examples_of_one_and_no_part_twice(bucket, given, small_parts, monkeypatch, form):
  monkeypatch.setattr(parts, 'POLL', 0.05)
  made, real = [], cache._write
  def write(path, *, source, **rest):
    made.append((threading.current_thread().name, source.files[0].name))
    return real(path, source=source, **rest)
  monkeypatch.setattr(cache, '_write', write)
  config, found = given(form, 'memory://examples', 'memory://tokens'), {}
  def host(i):
    found[i] = stream.open_rows(config, split='train', seed=3, builders=(i, 2))
  hosts = [threading.Thread(target=host, args=(i,), name=str(i)) for i in range(2)]
  for thread in hosts:
    thread.start()
  for thread in hosts:
    thread.join(60)
  both = list(made)
  alone = stream.open_rows(given(form, 'memory://examples', 'memory://alone'), split='train', seed=3)
  assert {name for name, _ in both} == {'0', '1'}
  assert sorted(name for _, name in both) == sorted(name for _, name in made[len(both):]) and len(both) > 2
  assert found[0][1] == found[1][1] == alone[1]
  for rows, _, _ in found.values():
    assert_same([rows[i] for i in range(4)], [alone[0][i] for i in range(4)])


@pytest.mark.parametrize('length, reads', [(200, 1), (4, 2)])
def test_an_example_in_a_bucket_is_one_read(bucket, given, monkeypatch, length, reads):
  """One whose source is cut is two, so that no more is read than a row has."""
  config = given('pairs', 'memory://examples', 'memory://tokens', length=length, source_length=length)
  found = stream.open_rows(config, split='train', seed=3)[0]
  read, real = [], type(bucket).cat_file
  def counting(self, path, start=None, end=None, **kwargs):
    read.append(end - start)
    return real(self, path, start, end, **kwargs)
  monkeypatch.setattr(type(bucket), 'cat_file', counting)
  batch = found[0]
  held = sum(batch['source_valid'].sum(axis=1) + batch['loss_mask'].sum(axis=1))
  assert len(read) == reads * config.batch_size and sum(read) == 2 * held


# Parts.

def requests(bucket, monkeypatch, do):
  """What a file system is asked while do() is done."""
  asked, inside = [], []
  with monkeypatch.context() as counted:
    for name in ('cat_file', 'size', 'info', 'exists', 'glob'):
      def call(self, *args, _name=name, _real=getattr(type(bucket), name), **kwargs):
        if not inside:
          asked.append(_name)
        inside.append(_name)   # what one call asks of another is its own affair
        try:
          return _real(self, *args, **kwargs)
        finally:
          inside.pop()
      counted.setattr(type(bucket), name, call)
    do()
  return asked


def test_a_start_asks_a_bucket_twice_whatever_the_number_of_parts(bucket, folder, small_parts, monkeypatch):
  """Once for a listing, once for what the first start kept."""
  config = config_of(folder / 'texts/**/*.txt', 'memory://tokens')
  before = stream.open_documents(config, 'train')
  assert len(bucket.glob('memory://tokens/*-train-*/meta.json')) > 3
  asked = requests(bucket, monkeypatch, lambda: stream.open_documents(config, 'train'))
  assert asked == ['glob', 'cat_file']
  again = stream.open_documents(config, 'train')
  assert again.content == before.content and again.lengths.tolist() == before.lengths.tolist()
  assert [again.document(i).tolist() for i in range(len(again))] == [
      before.document(i).tolist() for i in range(len(before))]


@pytest.mark.parametrize('damage', ['a part changed', 'a part gone', 'torn', 'gone'])
def test_what_a_start_kept_is_believed_only_of_parts_as_they_were(bucket, folder, small_parts, damage):
  config = config_of(folder / 'texts/**/*.txt', 'memory://tokens', validation_fraction=0)
  before = texts(config)
  index, = bucket.glob('memory://tokens/*.index')
  part = bucket.glob('memory://tokens/*-train-*/tokens.bin')[1]
  written = bucket.cat_file(part)
  if damage == 'a part changed':
    bucket.pipe_file(part, bucket.cat_file(part)[:-2])
  elif damage == 'a part gone':
    bucket.rm(part.rpartition('/')[0], recursive=True)
  elif damage == 'torn':
    bucket.pipe_file(index, bucket.cat_file(index)[:100])
  else:
    bucket.rm(index)
  assert texts(config) == before
  assert bucket.cat_file(part) == written


def test_parts_are_the_source_in_its_order(folder, small_parts):
  rule = corpus.SplitRule(kind='hash', validation=0.2, test=0)
  source = corpus.files_source(str(folder / 'texts/**/*.txt'), rule)
  for split in ('train', 'validation'):
    parts = source.parts(split)
    assert [n for p in parts for n in p.names(split)] == source.names(split)
    sizes = [sum(len(TEXTS[n].encode()) for n in p.names(split)) for p in parts]
    assert len(parts) > 1 or split == 'validation'
    assert all(SMALL <= size < 2 * SMALL for size in sizes[:-1])


def test_a_change_builds_its_own_part_again(folder, small_parts):
  config = config_of(folder / 'texts/**/*.txt', folder / 'cache', validation_fraction=0, test_fraction=0)
  texts(config)
  before = {p.name for p in (folder / 'cache').iterdir() if p.is_dir()}
  path = folder / 'texts/b/11.txt'
  path.write_text(path.read_text().upper())
  assert texts(config)[-1 - len([n for n in TEXTS if n > 'b/11.txt'])] == path.read_text()
  after = {p.name for p in (folder / 'cache').iterdir() if p.is_dir()}
  assert len(before) > 3
  assert len(after - before) == 1


def test_rows_do_not_know_of_parts_built_by_processes(folder, monkeypatch):
  """Values are those of one part: only the hash of the content is another."""
  one = config_of(folder / 'texts/**/*.txt', folder / 'one', long_documents='trim')
  whole = batches(one)
  monkeypatch.setattr(corpus, 'PART', SMALL)
  several = config_of(folder / 'texts/**/*.txt', folder / 'several', long_documents='trim', build_processes=3)
  assert_same(batches(several), whole)
  assert texts(several) == texts(one)
  accounting = lambda config: stream.open_stream(config, seed=0).accounting
  assert accounting(several) == accounting(one)


def test_more_parts_than_files_that_may_be_open(folder, small_parts, monkeypatch):
  config = config_of(folder / 'texts/**/*.txt', folder / 'cache')
  mapped = batches(config)
  monkeypatch.setattr(cache, 'MAPPED', 2)
  files = len(os.listdir('/proc/self/fd'))
  s = stream.open_stream(config, seed=3)
  assert_same([s.batch(i) for i in range(6)], mapped)
  assert len(os.listdir('/proc/self/fd')) <= files + 1
  s.close()


def test_parts_without_text(folder, monkeypatch):
  monkeypatch.setattr(corpus, 'PART', 1)
  for name in list(TEXTS)[3:]:
    (folder / 'texts' / name).write_text('')
  config = config_of(folder / 'texts/**/*.txt', folder / 'cache', validation_fraction=0, test_fraction=0)
  assert texts(config) == list(TEXTS.values())[:3]
  for name in TEXTS:
    (folder / 'texts' / name).write_text('')
  with pytest.raises(ConfigError, match='all 24 documents of the train split are empty'):
    texts(config)


SHARE = """
import sys
from longctx.data import cache, corpus, stream
corpus.PART = int(sys.argv[3])
real = cache._write
def say(path, **kwargs):
  open(sys.argv[5], 'a').write(sys.argv[4])
  return real(path, **kwargs)
cache._write = say
config = stream.Config(corpus='files', files=sys.argv[1], cache_dir=sys.argv[2], build_processes=1)
d = stream.open_documents(config, 'train', builders=(int(sys.argv[4]), 2))
print(d.content, len(d))
"""


@pytest.mark.parametrize('protocol', ['', 'file://'])
def test_two_hosts_build_a_part_each_and_no_part_twice(folder, monkeypatch, protocol):
  """On a disk that both see, and in a bucket that knows no locks."""
  log = folder / 'log'
  children = [subprocess.Popen([sys.executable, '-c', SHARE, str(folder / 'texts/**/*.txt'),
                                f'{protocol}{folder}/cache', str(SMALL), str(i), str(log)],
                               stdout=subprocess.PIPE, text=True) for i in range(2)]
  said = [child.communicate(timeout=120)[0] for child in children]
  assert said[0] == said[1]
  monkeypatch.setattr(corpus, 'PART', SMALL)
  config = config_of(folder / 'texts/**/*.txt', folder / 'alone')
  d = stream.open_documents(config, 'train')
  assert said[0] == f'{d.content} {len(d)}\n'
  parts = len(corpus.open_source(config).parts('train'))
  assert parts > 2
  assert len(log.read_text()) == parts
  if protocol:
    assert log.read_text().count('1') == parts // 2


def test_parts_of_a_host_that_does_not_come(bucket, small_parts, monkeypatch, caplog):
  monkeypatch.setattr(bucket_lib, 'QUIET', 0.3)
  monkeypatch.setattr(parts, 'POLL', 0.05)
  config = config_of('memory://texts/**/*.txt', 'memory://tokens')
  alone = texts(config_of('memory://texts/**/*.txt', 'memory://others'))
  assert texts(config, builders=(1, 3)) == alone
  assert 'No part of another process' in caplog.text


def test_who_waits_in_a_bucket_takes_what_comes(bucket, small_parts, monkeypatch):
  monkeypatch.setattr(parts, 'POLL', 0.05)
  config, found = config_of('memory://texts/**/*.txt', 'memory://tokens'), {}
  def host(i):
    found[i] = texts(config, builders=(i, 3))
  threads = [threading.Thread(target=host, args=(i,)) for i in range(3)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(60)
  assert found[0] == found[1] == found[2] == texts(config)


ORPHANS = """
import sys, time
from longctx.data import corpus, parts, stream
sys.path.insert(0, sys.argv[3])
import slow_job
corpus.PART = 300
parts._tried = slow_job.sleep
if __name__ == '__main__':
  stream.open_documents(stream.Config(corpus='files', files=sys.argv[1], cache_dir=sys.argv[2], build_processes=2), 'train')
"""


def test_builders_end_with_a_parent_that_is_killed(folder):
  (folder / 'slow_job.py').write_text("""
import os, pathlib, time
def sleep(job):
  (pathlib.Path(__file__).parent / f'builder-{os.getpid()}').write_text('')
  time.sleep(300)
""")
  (folder / 'main.py').write_text(ORPHANS)
  root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  parent = subprocess.Popen([sys.executable, str(folder / 'main.py'), str(folder / 'texts/**/*.txt'),
                             str(folder / 'cache'), str(folder)], env=os.environ | {'PYTHONPATH': root})
  deadline = time.monotonic() + 60
  while len(found := list(folder.glob('builder-*'))) < 2:
    assert time.monotonic() < deadline
    time.sleep(0.05)
  parent.kill()
  parent.wait()
  pids = [int(path.name.removeprefix('builder-')) for path in found]
  while any(os.path.exists(f'/proc/{pid}') for pid in pids):
    assert time.monotonic() < deadline
    time.sleep(0.05)


class Job:
  """A part that its builder never finishes: it moves, or does not."""

  def __init__(self, moves):
    self.place, self.name, self.moves = self, 'part', moves

  def read(self, name):
    return None

  def __call__(self, wait):
    for _ in range(20):
      time.sleep(0.1)
      if self.moves:
        progress.moved()


@pytest.mark.parametrize('moves', [True, False])
def test_what_builders_do_is_heard_before_a_part_is_done(monkeypatch, moves):
  monkeypatch.setattr(parts, 'POLL', 0.05)
  heard, began = [], time.monotonic()
  with progress.told(lambda: heard.append(time.monotonic() - began)):
    parts.side_by_side([Job(moves), Job(moves)], 2)
  if moves:
    assert len(heard) >= 6
  else:
    assert 1 <= len(heard) <= 2   # each part, once it is done


def test_parts_that_come_are_heard_by_who_waits(bucket, small_parts, monkeypatch):
  """In a bucket: here they come all at once."""
  monkeypatch.setattr(parts, 'POLL', 0.05)
  config, heard = config_of('memory://texts/**/*.txt', 'memory://tokens'), []
  number = len(corpus.open_source(config).parts('train'))
  other = threading.Timer(0.5, lambda: texts(config, builders=(0, 1)))
  monkeypatch.setattr(parts, 'side_by_side', lambda jobs, processes, real=parts.side_by_side: (
      real(jobs, processes) if threading.current_thread() is other else None))
  other.start()
  with progress.told(lambda: heard.append(1)):
    texts(config, builders=(1, 10 * number))
  other.join()
  assert len(heard) > number   # a look at all of them, and one thing more


def killed(job):
  os.kill(os.getpid(), signal.SIGKILL)


def test_a_builder_that_is_killed(folder, small_parts, monkeypatch):
  monkeypatch.setattr(parts, '_tried', killed)
  config = config_of(folder / 'texts/**/*.txt', folder / 'cache', build_processes=2)
  with pytest.raises(ConfigError, match=r'^data\.build_processes=2: one of them was killed'):
    texts(config)
