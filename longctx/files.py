"""Files that are whole at all times, holds on files that end with the process, and patience with file systems.

Held by: tests/test_workdir.py, tests/test_store.py, tests/test_patience.py.
"""

import contextlib
import errno
import fcntl
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from absl import logging

from longctx.errors import RunError

T = TypeVar('T')
# Errors of a moment: a file that cannot be reached now is neither gone nor damaged.
PASSING = (errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.ENOMEM,
           errno.ECONNRESET, errno.ENOTCONN, errno.EHOSTUNREACH)
PAUSES = (1, 2, 4, 8, 16, 32, 60)   # seconds before it is tried again


def again(call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
  """call(*args, **kwargs), after a pause once more where it meets an error of a moment; the last one is raised."""
  for pause in PAUSES:
    try:
      return call(*args, **kwargs)
    except OSError as e:
      if e.errno not in PASSING:
        raise
      logging.warning('%s; tried again in %d s', e, pause)
      time.sleep(pause)
  return call(*args, **kwargs)


def patiently(what: str, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
  """As `again`, but for the last error of a moment, which is a RunError that names `what`."""
  try:
    return again(call, *args, **kwargs)
  except OSError as e:
    if e.errno in PASSING:
      raise not_now(what, e) from e
    raise


def not_now(what: str, e: OSError) -> RunError:
  """What ends a run with a status that a launcher restarts."""
  more = 'let the process open more files (ulimit -n); ' if e.errno in (errno.EMFILE, errno.ENFILE) else ''
  return RunError(f'{what}: cannot be reached ({e.strerror}), tried for {sum(PAUSES)} s; {more}once it can, the same '
                  'command carries on')


@contextlib.contextmanager
def beside(path: str | os.PathLike, data: bytes) -> Iterator[Callable[[], None]]:
  """Writes `data` next to `path`; the function that it yields puts it there in one instant.

  What was not put there is removed at the end of the `with`, and `path` is as it was.
  """
  path = Path(path)
  # Two processes that write one path must not share the temporary file.
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.{threading.get_ident()}.tmp')

  def put() -> None:
    os.replace(temporary, path)
    sync_folder(path.parent)   # the rename itself

  try:
    with open(temporary, 'wb') as f:
      f.write(data)
      f.flush()
      os.fsync(f.fileno())
    yield put
  finally:
    with contextlib.suppress(OSError):
      temporary.unlink()


def atomic_write(path: str | os.PathLike, data: bytes) -> None:
  """Writes `data` so that a reader, or a power cut, meets the old file or the new one."""
  with beside(path, data) as put:
    put()


def sync_folder(folder: Path) -> None:
  fd = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(fd)
  finally:
    os.close(fd)


class HeldError(Exception):
  """Another process holds the file; `holder` says which."""

  def __init__(self, holder: str):
    super().__init__(holder)
    self.holder = holder


class CannotLockError(Exception):
  """The file system knows no locks; the message says why."""


class Lock:
  """A hold on a file; `release`, leaving the `with`, or the process's end drop it."""

  def __init__(self, fd: int | None):
    self._fd = fd

  def release(self) -> None:  # never by collection: the caller may keep no reference
    """Lets the next one in. The file stays: removing it would let two lock two files."""
    if self._fd is not None:
      os.close(self._fd)
      self._fd = None

  def __enter__(self) -> 'Lock':
    return self

  def __exit__(self, *exc) -> None:
    self.release()


def hold(path: str | os.PathLike, wait: bool = False) -> Lock:
  """Takes the lock of the file `path`, which is made if need be; HeldError if another has it.

  The kernel drops it with the process, SIGKILL included, so no stale lock is ever met. `wait`:
  until the other drops it.
  """
  fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
  try:
    fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
  except BlockingIOError:
    holder = os.read(fd, 200).decode(errors='replace').strip() or 'another process'
    os.close(fd)
    raise HeldError(holder) from None
  except OSError as e:
    os.close(fd)
    if e.errno in PASSING:
      raise
    raise CannotLockError(e.strerror) from e
  except BaseException:   # interrupted while waiting
    os.close(fd)
    raise
  with contextlib.suppress(OSError):   # a full disk: held without a name
    os.ftruncate(fd, 0)
    os.pwrite(fd, f'pid {os.getpid()} on {socket.gethostname()}\n'.encode(), 0)
  return Lock(fd)
