"""What is in a store, in SQLite: a row a context. The files are the truth, and this is their index.

Whoever opens it holds the store's lock, so that one process at a time changes it; it is first made to
agree with the files (rows of files that came, changed or went), and made anew where it is lost or
damaged. Where it cannot be written (a full disk), one in memory takes its place for the while. So
what must outlive it stands with the files: NAME.pin says that a context is pinned, and a file's
access time when it was used, which is set at each use.
Held by: tests/test_contexts.py.
"""

import contextlib
import os
import re
import sqlite3
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from longctx import files
from longctx.errors import ConfigError
from longctx.store import file

NAME = 'index.sqlite'
LOCK = '.lock'
PIN = '.pin'
STALE = 24 * 3600   # seconds after which a temporary file was left behind by a process that died
OURS = re.compile(r'\..*' + re.escape(file.SUFFIX) + r'\.\d+\.\d+\.tmp')   # as longctx.files names it
TABLE = '''create table if not exists contexts (
  name text primary key, file text not null, bytes integer not null, tokens integer,
  model text not null, hash text not null, state text not null, created integer, used integer not null,
  pinned integer not null, modified integer not null, inode integer not null)'''
READY, SEALED, DAMAGED = '', 'encrypted', 'damaged'


class Row(NamedTuple):
  """One context. tokens and created are None, model and hash '', where the file does not tell."""

  name: str
  file: str
  bytes: int
  tokens: int | None
  model: str
  hash: str        # of the model: config, parameters and tokenizer
  state: str       # READY, SEALED or DAMAGED
  created: int | None
  used: int        # nanoseconds since 1970
  pinned: bool
  modified: int
  inode: int


class Index:
  """The open index; `rows` by name."""

  def __init__(self, folder: Path, database: sqlite3.Connection):
    self.folder, self.database = folder, database
    self.database.execute(TABLE)
    self.rows: dict[str, Row] = {}
    self._agree()

  def _agree(self) -> None:
    known = {row[0]: Row(*row)._replace(pinned=bool(row[9]))
             for row in self.database.execute(f'select {", ".join(Row._fields)} from contexts')}
    pinned = {path.name.removesuffix(PIN) for path in self.folder.glob(f'*{PIN}')}
    here = {}
    with os.scandir(self.folder) as entries:
      for entry in entries:
        # A file may go while it is looked at, by a hand that knows no lock.
        with contextlib.suppress(FileNotFoundError):
          found = entry.stat()
          if not stat.S_ISREG(found.st_mode):
            continue
          if OURS.fullmatch(entry.name) and time.time() - found.st_mtime > STALE:
            os.unlink(entry.path)
          if entry.name.endswith(file.SUFFIX):
            here[entry.name.removesuffix(file.SUFFIX)] = found
    for name in known.keys() - here.keys():
      self._forget(name)
    for name, found in sorted(here.items()):
      row = known.get(name)
      if row is None or (row.bytes, row.modified, row.inode) != (
          found.st_size, found.st_mtime_ns, found.st_ino):
        self._put(_row_of(self.folder, name, found, name in pinned))
      elif row.pinned != (name in pinned):
        self._put(row._replace(pinned=name in pinned))
      else:
        self.rows[name] = row

  def _put(self, row: Row) -> None:
    self.rows[row.name] = row
    self.database.execute(f'replace into contexts values ({", ".join("?" * len(row))})', row)

  def _forget(self, name: str) -> None:
    self.rows.pop(name, None)
    self.database.execute('delete from contexts where name = ?', (name,))

  def refresh(self, name: str) -> None:
    """The row of a file that was just written or removed."""
    path = self.folder / (name + file.SUFFIX)
    with contextlib.suppress(sqlite3.Error):   # a full disk; whoever opens it next makes it agree
      if path.exists():
        self._put(_row_of(self.folder, name, path.stat(), (self.folder / (name + PIN)).exists()))
      else:
        self._forget(name)

  def touch(self, name: str) -> None:
    """Notes that a context was used now."""
    path, now = self.folder / (name + file.SUFFIX), time.time_ns()
    with contextlib.suppress(OSError):   # another user's file, or one that just went
      os.utime(path, ns=(now, path.stat().st_mtime_ns))
    with contextlib.suppress(sqlite3.Error):
      self._put(self.rows[name]._replace(used=now))


def _row_of(folder: Path, name: str, found: os.stat_result, pinned: bool) -> Row:
  plain = dict(name=name, file=name + file.SUFFIX, bytes=found.st_size, tokens=None, model='',
               hash='', state=READY, created=None, used=found.st_atime_ns, pinned=pinned,
               modified=found.st_mtime_ns, inode=found.st_ino)
  try:
    header = file.inspect(folder / (name + file.SUFFIX))
  except ConfigError:
    return Row(**plain | dict(state=DAMAGED))
  if isinstance(header, file.Sealed):
    return Row(**plain | dict(state=SEALED))
  return Row(**plain | dict(tokens=header.tokens + len(header.tail), model=header.identity.model,
                            hash=header.identity.hash, created=header.created))


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Index]:
  """The index, agreeing with the files, while no other process changes the store."""
  with files.hold(folder / LOCK, wait=True), contextlib.ExitStack() as stack:
    def connect(path: str | Path) -> Index:
      database = stack.enter_context(contextlib.closing(sqlite3.connect(path, timeout=60)))
      return Index(folder, database)

    try:
      index = connect(folder / NAME)
    except sqlite3.Error:   # damaged, of another make, or on a full disk
      stack.close()
      try:
        for suffix in ('', '-journal'):
          (folder / (NAME + suffix)).unlink(missing_ok=True)
        index = connect(folder / NAME)
      except (OSError, sqlite3.Error):
        index = connect(':memory:')
    try:
      yield index
    finally:
      with contextlib.suppress(sqlite3.Error):
        index.database.commit()
