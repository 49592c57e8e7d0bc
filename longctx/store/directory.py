"""A folder of named contexts, safe under several processes at once, with a budget of bytes.

A context is written beside the old one and put in its place in one instant, with the store's lock
held; then what was used longest ago goes, until the rest fits the budget. Never dropped: what is
pinned, what a process holds (`hold`), what is being saved, and what it is a copy of. Where that
cannot be, nothing is written. A new name is held while it is written, so that nobody else has begun
it.
Held by: tests/test_contexts.py.
"""

import contextlib
import errno
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from longctx import files
from longctx.errors import ConfigError, check, nearest
from longctx.parallel import device_memory
from longctx.store import file, index
from longctx.store.context import Context
from longctx.store.file import SUFFIX
from longctx.store.identity import Identity

NAME = re.compile('[A-Za-z0-9][A-Za-z0-9._-]{0,99}')
HOLDS = '.holds'   # folder of lock files, one a context
MOMENT = 0.5       # seconds


def check_name(name: str) -> None:
  check(NAME.fullmatch(name) is not None, f'context {name!r}: is no name; use letters, digits, ".", '
        '"_" and "-", beginning with a letter or a digit, at most 100')


class Written(NamedTuple):
  """What came of a write."""

  bytes: int           # of the context
  dropped: list[str]   # contexts that went for it, by the budget


class Store:
  """Contexts by name in a folder; `key` encrypts them, `budget` bounds their bytes (0: no bound)."""

  def __init__(self, folder: str, key: bytes | None = None, budget: int = 0, make: bool = False):
    """`make`: the folder is made if it is not there."""
    self.folder, self.key, self.budget = Path(folder), key, budget
    self.flag = f'--store={folder}'
    check(bool(str(folder)), '--store: missing; give a folder for contexts, such as --store=contexts')
    if key is not None:   # and not only once there is much to save
      file.seal.check_can_encrypt()
    try:
      check(not self.folder.exists() or self.folder.is_dir(), f'{self.flag}: is a file; give a folder')
      if make:
        self.folder.mkdir(parents=True, exist_ok=True)
      check(self.folder.is_dir(), f'{self.flag}: no such folder; python -m longctx.chat makes it '
            'when it saves a context')
      (self.folder / HOLDS).mkdir(exist_ok=True)
    except OSError as e:
      raise ConfigError(f'{self.flag}: cannot be made or entered ({e.strerror}: {e.filename}); give a folder '
                        'that you may write to') from e

  def path(self, name: str) -> Path:
    check_name(name)
    return self.folder / (name + SUFFIX)

  @contextlib.contextmanager
  def _index(self) -> Iterator[index.Index]:
    with contextlib.ExitStack() as stack:
      try:
        opened = stack.enter_context(index.opened(self.folder))
      except files.CannotLockError as e:
        raise ConfigError(f'{self.flag}: its file system cannot lock files ({e}); give a folder on '
                          'another one') from e
      except OSError as e:
        raise ConfigError(f'{self.flag}: cannot be used ({e.strerror}: {e.filename}); give a folder '
                          'that you may write to, on a disk with room') from e
      yield opened

  def rows(self) -> list[index.Row]:
    with self._index() as i:
      return sorted(i.rows.values())

  def row(self, name: str) -> index.Row:
    with self._index() as i:
      return self._known(i, name)

  def _known(self, i: index.Index, name: str) -> index.Row:
    check_name(name)
    check(name in i.rows, f'context {name!r}: there is none in {self.flag}{nearest(name, i.rows)}')
    return i.rows[name]

  def __contains__(self, name: str) -> bool:
    return self.path(name).exists()

  def hold(self, name: str) -> files.Lock:
    """Keeps a context to this process: nobody else may hold, delete or drop it meanwhile."""
    check_name(name)
    try:
      return self._hold(name)
    except files.HeldError as e:
      raise ConfigError(f'context {name!r}: in use by another process ({e.holder}); end that first, or '
                        f'fork it: python -m longctx.contexts fork {name} NEW '
                        f'{self.flag}') from None
    except (OSError, files.CannotLockError) as e:
      raise ConfigError(f'{self.flag}: cannot lock a file there ({e})') from e

  def _hold(self, name: str) -> files.Lock:
    """A hold, after a moment: a process that looks whether there is one (`_is_held`) has it meanwhile."""
    deadline = time.monotonic() + MOMENT
    while True:
      try:
        return files.hold(self.folder / HOLDS / name)
      except files.HeldError:
        if time.monotonic() > deadline:
          raise
        time.sleep(0.01 * random.random())

  def _is_held(self, name: str) -> bool:
    try:
      files.hold(self.folder / HOLDS / name).release()
    except files.HeldError:
      return True
    except OSError:   # cannot be told: better kept
      return True
    return False

  def save(self, name: str, context: Context, new: bool = False) -> Written:
    """Writes a context, whole or not at all. `new`: nobody may have the name, saved or not."""
    path = self.path(name)
    with self._hold_free(name) if new else contextlib.nullcontext():
      return self._write(name, file.dump(context, path, self.key), new)

  def load(self, name: str, identity: Identity | None = None) -> Context:
    data = file.unseal(self._bytes(name, use=True), self.path(name), self.key)
    context = file.decode(data, str(self.path(name)))
    if identity is not None:
      file.check_same(context.header.identity, identity, f'context {name!r}')
    return context

  def read(self, name: str) -> Context:
    """The context, checked, of whatever model; that it was looked at is no use of it."""
    return file.decode(self._plain(name), str(self.path(name)))

  def fork(self, name: str, new: str) -> Written:
    """A copy under a new name that shares nothing with the first, which stays."""
    with self._hold_free(new):
      data = self._plain(name)
      return self._write(new, self._sealed(data, new), new=True, source=name)

  def encrypt(self, name: str) -> Written:
    """Encrypts a context that is not encrypted."""
    check(self.key is not None, 'encrypt: no key; give --key_file=FILE or set '
          f'{file.seal.KEY_VARIABLE}')
    with self.hold(name):
      data = file.unseal(self._bytes(name), self.path(name), None)
      file.check_whole(data, str(self.path(name)))
      return self._write(name, self._sealed(data, name))

  def decrypt(self, name: str) -> Written:
    """Writes an encrypted context as it is."""
    with self.hold(name):
      return self._write(name, self._plain(name))

  def _bytes(self, name: str, use: bool = False) -> bytes:
    with self._index() as i:
      size, free = self._known(i, name).bytes, device_memory.available_memory()
      check(free is None or size <= free, f'context {name!r}: is a file of {size:,} bytes, and this '
            f'machine has {free or 0:,} bytes of memory left; load it where there is more')
      if use:
        i.touch(name)
      with self._told(name, 'read'):
        opened = open(self.path(name), 'rb')  # noqa: SIM115  (read below, without the lock)
    # What was opened stays as it is, whoever drops or replaces it meanwhile.
    with opened, self._told(name, 'read'):
      return opened.read()

  @contextlib.contextmanager
  def _told(self, name: str, done: str) -> Iterator[None]:
    """What the system refuses with the file of a context, in one line."""
    try:
      yield
    except OSError as e:
      raise ConfigError(f'{self.path(name)}: cannot be {done}: {e.strerror or e}') from e

  def _plain(self, name: str) -> bytes:
    """The checked bytes of a context, decrypted."""
    data = file.unseal(self._bytes(name), self.path(name), self.key)
    file.check_whole(data, str(self.path(name)))
    return data

  def _sealed(self, data: bytes, name: str) -> bytes:
    return data if self.key is None else file.seal.seal(data, self.key, name)

  def check_room(self, name: str, size: int) -> None:
    """ConfigError where a context of `size` bytes can never be saved under the budget."""
    check(not self.budget or size <= self.budget, f'--budget={self.budget}: {name} holds {size} bytes; give a '
          'budget of that and more, for all contexts together, or none')

  def check_free(self, name: str) -> None:
    check(name not in self, f'context {name!r}: is there already in {self.flag}; give another name, or '
          f'delete it first: python -m longctx.contexts delete {name} {self.flag}')

  def _hold_free(self, name: str) -> files.Lock:
    """A hold on a name that nobody has: what another process has begun may not be saved yet."""
    self.check_free(name)
    return self.hold(name)

  def _write(self, name: str, data: bytes, new: bool = False, source: str = '') -> Written:
    with self._index() as i:
      self._to_drop(i, name, len(data), source)   # refuses before anything is written
    path = self.path(name)
    try:
      with files.beside(path, data) as put, self._index() as i:
        if new:
          self.check_free(name)
        dropped = self._to_drop(i, name, len(data), source)
        put()
        for victim in dropped:
          self._remove(i, victim)
        i.refresh(name)
        i.touch(name)
    except OSError as e:
      kept = 'what was saved before is as it was' if path.exists() else 'nothing was written'
      room = ('; make room on the disk, or delete contexts: python -m longctx.contexts list '
              f'{self.flag}' * (e.errno in (errno.ENOSPC, errno.EDQUOT)))
      raise ConfigError(f'{path}: cannot be written: {e.strerror or e}; {kept}{room}') from e
    return Written(len(data), dropped)

  def _to_drop(self, i: index.Index, name: str, size: int, source: str = '') -> list[str]:
    """The contexts that must go so that `size` bytes of `name`, a copy of `source`, fit."""
    if not self.budget:
      return []
    others = [row for row in i.rows.values() if row.name != name]
    dropped, left = self._oldest(others, self.budget - size, source)
    stay = 'pinned or in use' + ', or what is copied,' * bool(source)
    check(left + size <= self.budget, f'--budget={self.budget}: {name} needs {size} bytes, and '
          f'contexts that are {stay} have {left}; nothing was written and nothing dropped: unpin '
          f'or delete some, or give a budget of {size + left} or more')
    return dropped

  def _oldest(self, rows: list[index.Row], room: int, source: str = '') -> tuple[list[str], int]:
    """(those used longest ago that may go until the rest fits in `room`, bytes of the rest)."""
    dropped, left = [], sum(row.bytes for row in rows)
    for row in sorted(rows, key=lambda row: row.used):
      if left > room and row.name != source and not row.pinned and not self._is_held(row.name):
        dropped.append(row.name)
        left -= row.bytes
    return dropped, left

  def trim(self) -> tuple[list[str], int]:
    """Drops what was used longest ago until the rest fits the budget, or may not go.

    Returns the names that went, and the bytes of the rest.
    """
    with self._index() as i:
      dropped, left = self._oldest(list(i.rows.values()), self.budget)
      for name in dropped:
        self._remove(i, name)
      return dropped, left

  def delete(self, name: str) -> None:
    with self._index() as i:
      row = self._known(i, name)
      check(not row.pinned, f'context {name!r}: is pinned; unpin it first: python -m longctx.contexts '
            f'unpin {name} {self.flag}')
      with self.hold(name):
        self._remove(i, name)

  def _remove(self, i: index.Index, name: str) -> None:
    with self._told(name, 'removed'):
      self.path(name).unlink(missing_ok=True)
    i.refresh(name)

  def pin(self, name: str, pinned: bool = True) -> None:
    """A pinned context is never dropped for room, nor deleted."""
    with self._index() as i:
      self._known(i, name)
      mark = self.folder / (name + index.PIN)
      with self._told(name, 'pinned' if pinned else 'unpinned'):
        mark.touch() if pinned else mark.unlink(missing_ok=True)
      i.refresh(name)
