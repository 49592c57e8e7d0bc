"""What fails for a moment where a run starts is tried again, and then ends it with a status that is restarted."""

import errno
import json
import os
import pathlib
import time

import numpy as np
import pytest

from longctx import examine, files
from longctx.data import cache, corpus, disk, examples, tokenizer
from longctx.errors import ConfigError, RunError
from longctx.training import badput, manifest, metrics, processes, workdir
from longctx.training.checkpoint import Checkpoints

RULE = corpus.SplitRule(kind='contiguous', validation=0.0, test=0.0)
TEXT = 'some words\n'


@pytest.fixture
def slept(monkeypatch):
  """Seconds of each pause, none of which is made."""
  found = []
  monkeypatch.setattr(files.time, 'sleep', found.append)
  return found


@pytest.fixture
def fail(monkeypatch):
  """fail(thing, name, error, times): its next calls, but those of other paths than `at`, raise the error."""
  def begin(thing, name, code, times, at=''):
    real, left = getattr(thing, name), [times]
    def flaky(*args, **kwargs):
      if left[0] > 0 and at in str(args[:1]):
        left[0] -= 1
        raise OSError(code, os.strerror(code))
      return real(*args, **kwargs)
    monkeypatch.setattr(thing, name, flaky)
  return begin


@pytest.fixture
def w(tmp_path):
  """A workdir with a bit of all that is read, and a text beside it."""
  (tmp_path / 'text').mkdir()
  (tmp_path / 'text' / 'a.txt').write_text(TEXT)
  folder = tmp_path / 'w'
  (folder / 'checkpoints' / '3' / 'meta').mkdir(parents=True)
  (folder / 'checkpoints' / '3' / 'meta' / 'metadata').write_text('{"validation_loss": 2.5}')
  (folder / 'config.json').write_text('{"seed": 1}')
  (folder / 'metrics.jsonl').write_text('{"step": 1}\n{"step": 2}\n')
  open_tokens(folder)
  return folder


def open_tokens(w, fresh=False):
  source = corpus.files_source(str(w.parent / 'text' / '*.txt'), RULE)
  return cache.open_cache(source, 'train', tokenizer.Bytes(), str(w.parent / ('fresh' if fresh else 'tokens')))


def lock(w):
  with workdir.lock(w):
    return True


def opened(w, **how):
  return Checkpoints(w / 'checkpoints', **how)


def truncated(w):
  metrics.MetricsWriter(w).truncate_after(1)
  return (w / 'metrics.jsonl').read_text()


def recorded(w):
  workdir.agree(w, {'seed': 2}, 'seed')
  return json.loads((w / 'config.json').read_text())


def put_aside(w):
  opened(w)._set_aside({3: 'damaged'})
  return [p.name for p in (w / 'checkpoints').iterdir()]


def one_part(w):
  folder, = (w.parent / 'tokens').glob('*-train-*[!k]')
  return disk.FileArray(folder / 'tokens.bin', 'uint16')[1:5].tolist()


def text_of(w):
  return b''.join(corpus.read_chunks(w.parent / 'text' / 'a.txt', RULE, 'train')).decode()


# What is done at a start: the call of the system that fails, for which path, the deed, what comes of it.
PLACES = {
    'the folder': (os, 'mkdir', '', lambda w: lock(w / 'new'), True),
    'its lock': (files.os, 'open', '.lock', lock, True),
    'its lock, held': (files.fcntl, 'flock', '', lock, True),
    "an evaluation's": (files.fcntl, 'flock', '', lambda w: examine._alone(str(w)).release(), None),
    'the config': (pathlib.Path, 'read_bytes', 'config.json', lambda w: workdir.load_config(w).seed, 1),
    'the config, compared': (pathlib.Path, 'read_bytes', 'config.json', recorded, {'seed': 2}),
    'the config, written': (workdir, 'atomic_write', 'config.json', recorded, {'seed': 2}),
    'checkpoints': (os, 'mkdir', 'others', lambda w: Checkpoints(w / 'others').steps(), []),
    'damaged ones': (os, 'replace', 'checkpoints', put_aside, ['3.unreadable']),
    'metrics': (metrics.os, 'truncate', 'metrics.jsonl', truncated, '{"step": 1}\n'),
    'text': (pathlib.Path, 'open', 'a.txt', text_of, TEXT),
    'its size': (pathlib.Path, 'stat', 'a.txt', lambda w: corpus._stat(w.parent / 'text' / 'a.txt')[0], len(TEXT)),
    'pairs': (pathlib.Path, 'open', 'a.txt', lambda w: examples._read(w.parent / 'text' / 'a.txt').decode(), TEXT),
    'tokens': (pathlib.Path, 'read_text', 'meta.json', lambda w: len(open_tokens(w)), 1),
    'tokens, made': (os, 'fsync', '', lambda w: len(open_tokens(w, fresh=True)), 1),
    'a folder for tokens': (os, 'mkdir', 'fresh', lambda w: len(open_tokens(w, fresh=True)), 1),
    'a tokenizer': (pathlib.Path, 'read_bytes', 'no.model', lambda w: tokenizer.SentencePiece('no.model'), ConfigError),
}
# Those whose lasting errors others turn into what the user reads, or which have none.
QUIET = {
    'the config, there': (pathlib.Path, 'stat', 'config.json', recorded, {'seed': 2}),
    'steps': (pathlib.Path, 'iterdir', 'checkpoints', lambda w: opened(w, read_only=True).steps(), [3]),
    'losses': (pathlib.Path, 'read_bytes', 'metadata', lambda w: opened(w, read_only=True).best_step(), 3),
    'a pattern': (os, 'scandir', 'text', lambda w: len(corpus.matching(str(w.parent / 'text' / '*.txt'))), 1),
    'tokens that are not mapped': (np, 'fromfile', 'tokens.bin', one_part, list(b'some')),
}


@pytest.mark.parametrize('place', [*PLACES, *QUIET])
def test_is_tried_again(w, slept, fail, place):
  thing, name, path, do, expected = (PLACES | QUIET)[place]
  fail(thing, name, errno.ESTALE, 3, path)
  if expected is ConfigError:   # and this is what it is then
    with pytest.raises(ConfigError, match='No such file'):
      do(w)
  else:
    assert do(w) == expected
  assert slept == [1, 2, 4]


@pytest.mark.parametrize('place', [*PLACES, *QUIET])
def test_and_then_ends_the_run_with_a_status_that_is_restarted(w, slept, fail, place):
  thing, name, path, do, _ = (PLACES | QUIET)[place]
  fail(thing, name, errno.EIO, 1000, path)
  with pytest.raises(RunError, match=r': cannot be reached \(Input/output error\), tried for 123 s; once it can, the same '
                     'command carries on$') as e:
    do(w)
  assert slept == list(files.PAUSES) and '\n' not in str(e.value)


@pytest.mark.parametrize('place', PLACES)
def test_what_lasts_is_told_at_once(w, slept, fail, place):
  thing, name, path, do, _ = PLACES[place]
  fail(thing, name, errno.EACCES, 1000, path)
  with pytest.raises(ConfigError):
    do(w)
  assert not slept


def test_a_handle_that_is_stale_is_opened_anew(w, slept, monkeypatch):
  """Of a file in whose midst it fails no chunk is lost, or read twice."""
  monkeypatch.setattr(corpus, 'CHUNK', 64)
  path = w.parent / 'text' / 'a.txt'
  path.write_text(text := ''.join(f'line {i}\n' for i in range(100)))
  real, handles = pathlib.Path.open, []
  class Stale:
    def __init__(self, file):
      self.file, self.reads = file, 0
    def seek(self, *args):
      return self.file.seek(*args)
    def read(self, size):
      self.reads += 1
      if self.reads > 4:   # for ever
        raise OSError(errno.ESTALE, 'Stale file handle')
      return self.file.read(size)
    def close(self):
      self.file.close()
  def opened(self, *args):
    handles.append(Stale(real(self, *args)))
    return handles[-1]
  monkeypatch.setattr(pathlib.Path, 'open', opened)
  assert text_of(w) == text
  assert len(handles) > 2 and all(one.file.closed for one in handles) and set(slept) == {1}


def test_many_open_files_have_a_remedy(slept):
  def call():
    raise OSError(errno.EMFILE, 'Too many open files')
  with pytest.raises(RunError, match=r'tried for 123 s; let the process open more files \(ulimit -n\); once it can'):
    files.patiently('w', call)


def test_an_account_of_time_that_cannot_be_read_for_a_moment_is_not_begun_anew(tmp_path, slept, fail):
  badput.Ledger(tmp_path).write()
  fail(pathlib.Path, 'read_bytes', errno.EIO, 2, badput.NAME)
  assert badput.Ledger(tmp_path).account()['starts'] == 2 and slept == [1, 2]


def test_what_one_process_cannot_reach_ends_all_alike(monkeypatch):
  monkeypatch.setattr(processes, 'gather', lambda value: [value, [True, 'w: cannot be reached']])
  with pytest.raises(RunError, match='w: cannot be reached'):
    processes.together(lambda: 1)
  monkeypatch.setattr(processes, 'gather', lambda value: [[False, 'w: held'], value])
  with pytest.raises(ConfigError, match='w: held'):
    processes.together(lambda: 1)


def test_of_many_files_that_cannot_be_read_one_is_enough(tmp_path, monkeypatch):
  """Each is tried for two minutes."""
  (tmp_path / manifest.NAME).write_text(json.dumps({'files': {str(i): [1, ''] for i in range(60)}}))
  looked = []
  def look(folder, name, expected):
    looked.append(name)
    time.sleep(0.1 * (name != '0'))
    return 'cannot be read now'
  monkeypatch.setattr(manifest, '_file_fault', look)
  assert manifest.fault(tmp_path) == 'cannot be read now' and len(looked) < 60


def test_no_waiting_while_a_run_goes_on(w, slept, fail):
  """A save that failed is told at once, whatever else the file system refuses."""
  with opened(w) as c:
    fail(pathlib.Path, 'iterdir', errno.EIO, 1000)
    assert c.newest() is None and not c.has(3) and not slept
  assert manifest.PAUSES is files.PAUSES
