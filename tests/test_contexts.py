"""A folder of contexts: names, budget, pins, two processes at once; and the command that looks after it."""

import os
import shlex
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from longctx import chat, contexts, files, store
from longctx.command_line import parse_bytes, parse_flags
from longctx.errors import ConfigError
from longctx.parallel import device_memory
from longctx.store import index, seal
from tests.programs import save_contexts
from tests.programs.save_contexts import IDENTITY, make

ROOT = Path(__file__).parents[1]
KEY = b'k' * 32
SIZE = len(store.file.encode(make(0)))


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
  monkeypatch.delenv(seal.KEY_VARIABLE, raising=False)


def new(folder, **settings):
  return store.Store(str(folder), make=True, **settings)


def names(contexts):
  return [row.name for row in contexts.rows()]


def number(contexts, name):
  """Who wrote a context; every number of it must agree."""
  context = contexts.load(name)
  assert (context.arrays['x'] == context.header.tokens).all()
  return context.header.tokens


def refused(function, *args, **kwargs):
  with pytest.raises(ConfigError) as e:
    function(*args, **kwargs)
  assert '\n' not in str(e.value)
  return str(e.value)


def indexed(folder):
  """What the index on disk says, whoever is right."""
  with sqlite3.connect(folder / index.NAME) as database:
    return {row[0]: row[1:] for row in
            database.execute('select name, bytes, tokens, pinned from contexts')}


# --- Names and files.


def test_save_load_fork_delete(tmp_path):
  s = new(tmp_path)
  assert s.rows() == []
  s.save('alice', make(3))
  s.fork('alice', 'bob')
  s.save('alice', make(4))
  assert (number(s, 'alice'), number(s, 'bob')) == (4, 3)
  row = s.row('bob')
  assert (row.file, row.bytes, row.tokens, row.model) == ('bob.lcm', SIZE, 3, 'toy')
  assert row.hash == IDENTITY.hash
  s.delete('alice')
  assert names(s) == ['bob']
  assert 'alice' not in s
  assert number(new(tmp_path), 'bob') == 3   # another opening of the same folder


def test_names_that_are_none_or_not_there(tmp_path):
  s = new(tmp_path)
  s.save('alice', make(1))
  for name in ('', '../a', 'a/b', '.a', 'a b', 'a' * 101, 'é'):
    assert 'is no name; use letters' in refused(s.save, name, make(1))
  assert 'there is none in --store=' in refused(s.load, 'alcie')
  assert '(did you mean "alice"?)' in refused(s.load, 'alcie')
  assert 'is there already' in refused(s.fork, 'alice', 'alice')
  assert sorted(p.name for p in tmp_path.glob('*.lcm')) == ['alice.lcm']


def test_a_store_that_is_a_file_is_not_there_or_cannot_be_made(tmp_path):
  (tmp_path / 'file').write_text('')
  assert f'--store={tmp_path}/file: is a file; give a folder' == refused(new, tmp_path / 'file')
  assert 'cannot be made or entered (Not a directory' in refused(new, tmp_path / 'file' / 'below')
  assert 'no such folder' in refused(store.Store, str(tmp_path / 'none'))
  assert not (tmp_path / 'none').exists()


def test_another_models_context_is_refused_by_name(tmp_path):
  s = new(tmp_path)
  s.save('alice', make(1))
  other = store.Identity(model='toy', config={'size': 2}, parameters='0' * 64, tokenizer='bytes')
  said = refused(s.load, 'alice', other)
  assert "context 'alice': is the memory of another model: model.size: the context has 1" in said


def test_a_context_larger_than_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
  s = new(tmp_path)
  s.save('alice', make(1))
  monkeypatch.setattr(device_memory, 'available_memory', lambda: SIZE - 1)
  said = refused(s.load, 'alice')
  assert said == (f"context 'alice': is a file of {SIZE:,} bytes, and this machine has {SIZE - 1:,} bytes of "
                  'memory left; load it where there is more')
  for enough in (SIZE, None):   # None: the machine does not tell
    monkeypatch.setattr(device_memory, 'available_memory', lambda enough=enough: enough)
    assert number(s, 'alice') == 1


# --- The index.


def test_the_index_is_made_anew_from_the_files(tmp_path):
  s = new(tmp_path)
  for i, name in enumerate('abc'):
    s.save(name, make(i))
  s.pin('b')
  before = s.rows()
  on_disk = indexed(tmp_path)
  assert on_disk == {'a': (SIZE, 0, 0), 'b': (SIZE, 1, 1), 'c': (SIZE, 2, 0)}
  path = tmp_path / index.NAME
  for spoil in (path.unlink, lambda: path.write_bytes(b'torn' * 999), lambda: path.write_bytes(b''),
                lambda: path.write_bytes(path.read_bytes()[:5000])):
    spoil()
    assert s.rows() == before   # pins and times of use too
    assert indexed(tmp_path) == on_disk
  path.unlink()
  with sqlite3.connect(path) as database:
    database.execute('create table contexts (name text)')   # of another version
  assert s.rows() == before


def test_files_that_come_change_and_go_by_hand(tmp_path):
  s, other = new(tmp_path / 's'), new(tmp_path / 'other')
  s.save('a', make(1))
  s.save('b', make(2))
  other.save('c', make(3, size=2000))
  (tmp_path / 's' / 'a.lcm').unlink()
  os.replace(tmp_path / 'other' / 'c.lcm', tmp_path / 's' / 'c.lcm')
  (tmp_path / 's' / 'd.lcm').write_bytes(b'torn')
  (tmp_path / 's' / 'notes.txt').write_text('mine')
  (tmp_path / 's' / 'folder.lcm').mkdir()
  rows = {row.name: row for row in s.rows()}
  assert sorted(rows) == ['b', 'c', 'd']
  assert rows['c'].tokens == 3
  assert rows['d'].state == 'damaged'
  (tmp_path / 's' / 'd.lcm').write_bytes((tmp_path / 's' / 'b.lcm').read_bytes())
  assert s.row('d').tokens == 2
  (tmp_path / 's' / 'b.pin').touch()
  assert s.row('b').pinned


def test_what_a_dead_process_left_is_swept_after_a_day(tmp_path):
  s = new(tmp_path)
  young, old = tmp_path / '.a.lcm.1.2.tmp', tmp_path / '.b.lcm.1.2.tmp'
  young.write_bytes(b'half')
  old.write_bytes(b'half')
  another, folder = tmp_path / 'thesis.tmp', tmp_path / 'folder.tmp'   # no business of the store's
  another.write_bytes(b'whole')
  folder.mkdir()
  for path in (old, another, folder):
    os.utime(path, (0, time.time() - index.STALE - 60))
  assert s.rows() == []
  assert young.exists() and another.exists() and folder.exists()
  assert not old.exists()


def test_an_index_that_cannot_be_written_keeps_nothing_from_being_saved(tmp_path, monkeypatch):
  """As on a disk that is full but for the file."""
  s = new(tmp_path)
  s.save('a', make(1))
  s.pin('a')
  class Full(sqlite3.Connection):
    def execute(self, text, *args):
      if text.startswith(('replace', 'delete', 'create')) and self.on_disk:
        raise sqlite3.OperationalError('database or disk is full')
      return super().execute(text, *args)
    def __init__(self, path, **settings):
      super().__init__(path, **settings)
      self.on_disk = path != ':memory:'
  with monkeypatch.context() as patch:
    patch.setattr(index.sqlite3, 'connect', Full)
    s.save('a', make(2))
    s.save('b', make(3))
    assert [(r.name, r.tokens, r.pinned) for r in s.rows()] == [('a', 2, True), ('b', 3, False)]
  assert [(r.name, r.tokens, r.pinned) for r in s.rows()] == [('a', 2, True), ('b', 3, False)]


# --- The budget.


def test_what_was_used_longest_ago_goes_first(tmp_path):
  s = new(tmp_path, budget=3 * SIZE)
  for i, name in enumerate('abc'):
    s.save(name, make(i))
  s.load('a')
  s.read('b')   # looking is not using
  s.save('d', make(4))
  assert names(s) == ['a', 'c', 'd']
  (tmp_path / index.NAME).unlink()   # the times of use are not lost with the index
  s.save('e', make(5))
  assert names(s) == ['a', 'd', 'e']
  s.save('d', make(6))   # in place of the old one: nothing must go
  assert names(s) == ['a', 'd', 'e']
  s.save('big', make(7, size=2500))
  assert names(s) == ['big']


def test_never_a_pinned_one_nor_one_in_use_nor_the_one_that_is_saved(tmp_path):
  s = new(tmp_path, budget=3 * SIZE)
  s.save('pinned', make(1))
  s.pin('pinned')
  s.save('held', make(2))
  with new(tmp_path).hold('held'):
    s.save('c', make(3))
    s.save('d', make(4))
    assert names(s) == ['d', 'held', 'pinned']
    s.pin('d')
    s.save('d', make(5))
    before = {name: (tmp_path / f'{name}.lcm').read_bytes() for name in names(s)}
    said = refused(s.save, 'e', make(6))
    assert f'--budget={3 * SIZE}: e needs {SIZE} bytes, and contexts that are pinned or in use have ' \
           f'{3 * SIZE}; nothing was written and nothing dropped' in said
    assert f'a budget of {4 * SIZE} or more' in said
    said = refused(s.save, 'd', make(6, size=1500))
    assert 'nothing was written' in said
    assert {name: (tmp_path / f'{name}.lcm').read_bytes() for name in names(s)} == before
  s.save('e', make(6))   # 'held' is free now
  assert names(s) == ['d', 'e', 'pinned']


def test_trim(tmp_path):
  s = new(tmp_path)
  for i, name in enumerate('abc'):
    s.save(name, make(i))
  s.pin('a')
  assert new(tmp_path, budget=2 * SIZE).trim() == (['b'], 2 * SIZE)
  assert names(s) == ['a', 'c']
  with new(tmp_path).hold('a'):
    s.pin('a', False)
    assert new(tmp_path, budget=1).trim() == (['c'], SIZE)   # what may go goes, though not enough
  assert new(tmp_path, budget=1).trim() == (['a'], 0)


def test_what_was_dropped_is_said_and_a_copy_never_drops_its_source(tmp_path):
  s = new(tmp_path, budget=2 * SIZE)
  assert s.save('a', make(1)) == (SIZE, [])
  s.save('b', make(2))
  assert s.fork('a', 'c') == (SIZE, ['b'])   # and not a, which was used before it
  assert s.save('d', make(3)) == (SIZE, ['a'])
  s.pin('d')
  said = refused(s.fork, 'c', 'e')
  assert f'e needs {SIZE} bytes, and contexts that are pinned or in use, or what is copied, have ' \
         f'{2 * SIZE}; nothing was written' in said
  assert names(s) == ['c', 'd']


@pytest.mark.parametrize('where', ['fsync', 'replace'])
def test_a_full_disk_keeps_what_was_saved_and_drops_nothing(where, tmp_path, monkeypatch):
  s = new(tmp_path, budget=2 * SIZE)
  s.save('a', make(1))
  s.save('b', make(2))
  def full(*args):
    raise OSError(28, 'No space left on device')
  with monkeypatch.context() as patch:
    patch.setattr(files.os, where, full)
    for name, kept in (('a', 'what was saved before is as it was'), ('c', 'nothing was written')):
      said = refused(s.save, name, make(9))
      assert f'{name}.lcm: cannot be written: No space left on device; {kept}; make room' in said
  assert names(s) == ['a', 'b']
  assert (number(s, 'a'), number(s, 'b')) == (1, 2)
  assert not list(tmp_path.glob('.*.tmp'))


# --- Two at once.


def test_a_context_in_use_is_not_taken_deleted_or_encrypted(tmp_path):
  s = new(tmp_path, key=KEY)
  new(tmp_path).save('a', make(1))
  with new(tmp_path).hold('a'):
    for act in (s.hold, s.delete, s.encrypt):
      said = refused(act, 'a')
      assert f"'a': in use by another process (pid {os.getpid()} on " in said
      assert 'contexts fork a NEW' in said
    new(tmp_path).fork('a', 'b')   # reading is free
  s.encrypt('a')
  s.delete('a')


def test_a_name_that_another_process_has_begun_is_no_new_one(tmp_path, monkeypatch):
  """It is saved later, over whatever was put there meanwhile."""
  s = new(tmp_path)
  s.save('a', make(1))
  with new(tmp_path).hold('begun'):
    for act in (lambda: s.fork('a', 'begun'), lambda: s.save('begun', make(2), new=True)):
      assert "'begun': in use by another process" in refused(act)
  assert names(s) == ['a']
  tried, sync = [], os.fsync
  def meanwhile(*args):
    tried.append(refused(new(tmp_path).hold, 'b' if len(tried) < 2 else 'c'))
    return sync(*args)
  monkeypatch.setattr(files.os, 'fsync', meanwhile)
  s.fork('a', 'b')
  s.save('c', make(2), new=True)
  assert len(tried) == 4   # of the file and the folder, twice
  monkeypatch.undo()
  for name in 'bc':
    s.hold(name).release()


@pytest.mark.parametrize('act', ['load', 'read'])
def test_a_file_of_another_user_is_read_and_one_that_went_is_told(act, tmp_path, monkeypatch):
  s = new(tmp_path)
  s.save('a', make(1))
  def not_mine(*args, **kwargs):
    raise PermissionError(1, 'Operation not permitted')
  with monkeypatch.context() as patch:
    patch.setattr(index.os, 'utime', not_mine)
    assert getattr(s, act)('a').header.tokens == 1
  with monkeypatch.context() as patch:   # a hand that knows no lock, after the index looked
    patch.setattr(store.directory.device_memory, 'available_memory', s.path('a').unlink)
    assert f'{s.path("a")}: cannot be read: No such file' in refused(getattr(s, act), 'a')
  s.save('a', make(1))
  with monkeypatch.context() as patch:
    patch.setattr(Path, 'unlink', not_mine)
    assert f'{s.path("a")}: cannot be removed: Operation not permitted' in refused(s.delete, 'a')
  assert names(s) == ['a']


def test_two_processes_at_once(tmp_path):
  """Both save, load, fork and drop for room; what is there at the end is whole, and the index right."""
  at_once = [subprocess.Popen([sys.executable, '-m', 'tests.programs.save_contexts', tmp_path, str(i)],
                              cwd=ROOT, env=os.environ | {'JAX_PLATFORMS': 'cpu'},
                              stdout=subprocess.PIPE) for i in (1, 2)]
  for process in at_once:
    assert process.communicate(timeout=120)[0] == b'done\n'
    assert process.returncode == 0
  on_disk = indexed(tmp_path)
  s = new(tmp_path)
  assert {row.name: (row.bytes, row.tokens, 0) for row in s.rows()} == on_disk
  assert sorted(on_disk) == sorted(p.name.removesuffix('.lcm') for p in tmp_path.glob('*.lcm'))
  assert len(on_disk) > 5
  assert sum(size for size, _, _ in on_disk.values()) <= save_contexts.BUDGET
  assert {number(s, name) // 1000 for name in names(s)} <= {1, 2}
  assert not list(tmp_path.glob('.*.tmp'))


@pytest.mark.parametrize('act', ['save', 'load', 'delete', 'rows'])
def test_one_process_at_a_time_changes_a_store(act, tmp_path):
  """Whoever comes while another is at it waits."""
  s, done = new(tmp_path), threading.Event()
  s.save('a', make(1))
  acts = dict(save=lambda: s.save('b', make(2)), load=lambda: s.load('a'),
              delete=lambda: s.delete('a'), rows=s.rows)
  with files.hold(tmp_path / index.LOCK):
    late = threading.Thread(target=lambda: (acts[act](), done.set()))
    late.start()
    assert not done.wait(0.1)
    assert sorted(p.name for p in tmp_path.glob('*.lcm')) == ['a.lcm']
  late.join(60)
  assert done.is_set()


def test_a_reader_beside_writers_always_meets_a_whole_context(tmp_path):
  s = new(tmp_path)
  s.save('a', make(0))
  def write(first):
    for i in range(first, first + 25):
      new(tmp_path).save('a', make(i, size=3000))
  writers = [threading.Thread(target=write, args=(first,)) for first in (100, 200)]
  for writer in writers:
    writer.start()
  seen = set()
  while any(writer.is_alive() for writer in writers):
    seen.add(number(s, 'a'))
  for writer in writers:
    writer.join()
  assert len(seen) > 1
  assert number(s, 'a') in (124, 224)


# --- The command.


@pytest.fixture
def two(tmp_path):
  folder = tmp_path / 's'
  s = new(folder)
  s.save('alice', make(1234))
  s.save('bob', make(5))
  return folder


def run(capsys, folder, *args):
  status = contexts.main(['contexts', *args, f'--store={folder}'])
  out, err = capsys.readouterr()
  assert (status, err) == (0, '')
  return out


def test_list_and_show(two, capsys):
  run(capsys, two, 'pin', 'bob')
  lines = run(capsys, two, 'list').splitlines()
  sizes = [(two / f'{name}.lcm').stat().st_size for name in ('alice', 'bob')]
  assert lines[0].split() == ['name', 'tokens', 'bytes', 'model', 'used']
  assert lines[1].split()[:4] == ['alice', '1,234', f'{sizes[0]:,}', 'toy']
  assert lines[1].split()[4] == IDENTITY.hash[:8]
  assert lines[2].endswith('pinned')
  assert lines[3].split() == ['2', 'in', 'all', f'{sum(sizes):,}']
  shown = run(capsys, two, 'show', 'alice')
  for part in ('model         toy', 'tokens        1234', 'tokenizer     bytes', 'size = 1',
               'x  int32[1, 1000]', 'pinned        no'):
    assert part in shown
  assert contexts.main(['contexts', f'--store={two}', 'list']) == 0   # flags first


def test_every_other_command(two, tmp_path, capsys):
  assert 'carol: a copy of alice' in run(capsys, two, 'fork', 'alice', 'carol')
  assert run(capsys, two, 'delete', 'alice', 'bob') == 'alice: deleted\nbob: deleted\n'
  key = tmp_path / 'key'
  key.write_text(KEY.hex())
  assert run(capsys, two, 'encrypt', 'carol', f'--key_file={key}') == 'carol: encrypted\n'
  listed = run(capsys, two, 'list')
  assert 'encrypted' in listed
  assert '1,234' not in listed
  assert 'tokens        1234' in run(capsys, two, 'show', 'carol', f'--key_file={key}')
  run(capsys, two, 'fork', 'carol', 'dave', f'--key_file={key}')
  assert isinstance(store.inspect(two / 'dave.lcm'), store.Sealed)
  assert run(capsys, two, 'decrypt', 'dave', f'--key_file={key}') == 'dave: decrypted\n'


def test_decrypt_writes_it_plain(two, tmp_path, capsys):
  key = tmp_path / 'key'
  key.write_text(KEY.hex())
  run(capsys, two, 'encrypt', 'bob', f'--key_file={key}')
  run(capsys, two, 'decrypt', 'bob', f'--key_file={key}')
  assert number(new(two), 'bob') == 5
  run(capsys, two, 'pin', 'bob')
  assert run(capsys, two, 'trim', '--budget=5kB') == 'dropped alice\n'
  assert run(capsys, two, 'trim', '--budget=5kB') == 'fits; nothing was dropped\n'
  run(capsys, two, 'unpin', 'bob')
  run(capsys, two, 'delete', 'bob')
  assert run(capsys, two, 'list') == 'no contexts\n'


def test_what_goes_for_room_is_told(two, tmp_path, capsys):
  size = max((two / f'{name}.lcm').stat().st_size for name in ('alice', 'bob'))
  budget = f'--budget={2 * size + 100}'
  assert run(capsys, two, 'fork', 'alice', 'carol', budget).splitlines()[1:] == ['dropped bob']
  run(capsys, two, 'pin', 'carol')
  assert contexts.main(['contexts', 'trim', f'--store={two}', '--budget=1']) == 2
  out, err = capsys.readouterr()
  assert out == 'dropped alice\n'
  left = (two / 'carol.lcm').stat().st_size
  assert err == (f'longctx: --budget=1: contexts that are pinned or in use have {left} bytes; unpin '
                 f'or delete some, or give a budget of {left} or more\n')
  assert contexts.main(['contexts', 'trim', f'--store={two}', '--budget=1']) == 2
  assert capsys.readouterr().out == ''   # and nothing fits


MISTAKES = [
    (['--store={s}'], 'no command; give one of list, show, fork, delete, pin, unpin'),
    (['lst', '--store={s}'], "'lst': is no command; must be one of list"),
    (['lst', '--store={s}'], '(did you mean "list"?)'),
    (['list'], '--store: missing; give a folder for contexts'),
    (['list', '--store={s}/alice.lcm'], '--store={s}/alice.lcm: is a file; give a folder'),
    (['list', '--store={s}/none'], '--store={s}/none: no such folder'),
    (['list', 'alice', '--store={s}'], 'list: takes no name, and got alice; write list'),
    (['show', '--store={s}'], 'show: takes NAME, and got none; write show NAME'),
    (['fork', 'alice', '--store={s}'], 'fork: takes NAME NEW, and got alice; write fork NAME NEW'),
    (['fork', 'alice', 'bob', '--store={s}'], "'bob': is there already"),
    (['fork', 'alice', 'a/b', '--store={s}'], "'a/b': is no name"),
    (['delete', '--store={s}'], 'delete: takes NAME ..., and got none'),
    (['delete', 'bob', 'alcie', '--store={s}'], "'alcie': there is none in --store={s} (did you mean "
     '"alice"?)'),
    (['delete', 'alice', '--stor={s}'], '--stor: unknown flag (did you mean "store"?)'),
    (['trim', '--store={s}'], 'trim: no budget; give --budget=10GiB'),
    (['trim', '--store={s}', '--budget=lots'], '--budget=lots: must be a size, such as 10GiB'),
    (['trim', '--store={s}', '--budget=0'], '--budget=0: must be at least 1 byte'),
    (['encrypt', 'alice', '--store={s}'], 'encrypt: no key; give --key_file=FILE or set'),
    (['decrypt', 'alice', '--store={s}', '--key_file={key}'], "'alice': is not encrypted; leave it out"),
    (['list', '--store={s}', '--key_file='], '--key_file=: is empty; give the path'),
    (['list', '--store=' + 'x' * 300], 'cannot be made or entered (File name too long'),
    (['show', 'alice', '--store={s}', '--key_file={s}/none'], '--key_file={s}/none: cannot be read'),
]


@pytest.mark.parametrize('args, message', MISTAKES, ids=[' '.join(a) for a, _ in MISTAKES])
def test_a_mistake_is_one_line_and_status_2(two, tmp_path, capsys, args, message):
  (tmp_path / 'key').write_text(KEY.hex())
  fill = lambda text: text.format(s=two, key=tmp_path / 'key')
  assert contexts.main(['contexts', *map(fill, args)]) == 2
  out, err = capsys.readouterr()
  assert out == ''
  assert err.startswith('longctx: ')
  assert err.count('\n') == 1
  assert fill(message) in err
  assert names(new(two)) == ['alice', 'bob']


def test_of_several_all_are_encrypted_or_none(two, tmp_path, capsys):
  key = tmp_path / 'key'
  key.write_text(KEY.hex())
  encrypt = lambda *names: contexts.main(['contexts', 'encrypt', *names, f'--store={two}', f'--key_file={key}'])
  assert encrypt('bob') == 0
  assert encrypt('alice', 'bob') == 2 and "'bob': is encrypted already; leave it out" in capsys.readouterr().err
  assert {row.name: row.state for row in new(two).rows()} == {'alice': '', 'bob': 'encrypted'}
  assert contexts.main(['contexts', 'decrypt', 'bob', 'alice', f'--store={two}', f'--key_file={key}']) == 2
  assert {row.name: row.state for row in new(two).rows()} == {'alice': '', 'bob': 'encrypted'}


def test_a_disk_without_room_for_a_pin_is_one_line(two, capsys, monkeypatch):
  def full(*args, **kwargs):
    raise OSError(28, 'No space left on device')
  monkeypatch.setattr('pathlib.Path.touch', full)
  assert contexts.main(['contexts', 'pin', 'alice', f'--store={two}']) == 2
  assert 'alice.lcm: cannot be pinned: No space left on device' in capsys.readouterr().err


def test_a_linked_context_is_one(two, tmp_path):
  (two / 'carol.lcm').symlink_to(two / 'alice.lcm')
  (two / 'dave.lcm').symlink_to(tmp_path / 'nothing.lcm')
  s = new(two)
  assert names(s) == ['alice', 'bob', 'carol'] and 'carol' in s and 'dave' not in s
  assert s.read('carol').header == s.read('alice').header


def test_a_look_at_who_is_held_is_no_use(two):
  """A process that saves over its budget looks at each; who wants one just then gets it."""
  s, stop, looks = new(two), threading.Event(), []
  def look():
    while not stop.is_set():
      looks.append(new(two)._is_held('alice'))
  worker = threading.Thread(target=look)
  worker.start()
  try:
    while not looks:
      time.sleep(0.001)
    for _ in range(50):
      s.hold('alice').release()
  finally:
    stop.set()
    worker.join()


def test_a_pinned_one_is_not_deleted(two, capsys):
  run(capsys, two, 'pin', 'alice')
  assert contexts.main(['contexts', 'delete', 'alice', f'--store={two}']) == 2
  assert 'is pinned; unpin it first' in capsys.readouterr().err
  assert 'alice' in names(new(two))


@pytest.mark.parametrize('text, wanted', [
    ('10', 10), ('10B', 10), ('2kB', 2000), ('2KiB', 2048), ('1.5GiB', 3 * 2**29), ('3 MB', 3_000_000),
    ('1T', 10**12)])
def test_sizes(text, wanted):
  assert parse_bytes('--budget', text) == wanted


@pytest.mark.parametrize('text', ['', '-1', 'GiB', '1PB', '1e9', 'inf'])
def test_what_is_no_size(text):
  assert '--budget=' in refused(parse_bytes, '--budget', text)


def test_help_answers_before_jax_is_imported():
  done = subprocess.run([sys.executable, '-X', 'importtime', '-m', 'longctx.contexts', '--help'],
                        capture_output=True, text=True, timeout=60, check=True, cwd=ROOT)
  assert not {line.split('|')[-1].strip() for line in done.stderr.splitlines()} & {
      'jax', 'numpy', 'cryptography', 'sqlite3'}
  for word in (*contexts.COMMANDS, '--store=', '--key_file=', '--budget='):
    assert word in done.stdout


def test_what_a_context_holds_is_not_in_the_index_of_an_encrypted_one(tmp_path):
  s = new(tmp_path, key=KEY)
  s.save('a', make(987654))
  assert s.row('a').tokens is None
  raw = (tmp_path / index.NAME).read_bytes()
  assert IDENTITY.hash.encode() not in raw
  assert np.array_equal(s.load('a').arrays['x'], make(987654).arrays['x'])


def test_the_readmes_commands_are_ones():
  lines = (ROOT / 'README.md').read_text().splitlines()
  words = [shlex.split(line.partition('| ')[2] or line) for line in lines
           if line.startswith('    ') and ('longctx.contexts' in line or 'longctx.chat' in line)]
  assert len(words) >= 6
  for python, dash_m, module, *args in words:
    assert (python, dash_m) == ('python', '-m')
    if module == 'longctx.contexts':
      contexts.parse(['contexts', *args])
    else:
      assert module == 'longctx.chat'
      parse_flags(chat.define_flags(), ['chat', *args])
