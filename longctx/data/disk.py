"""Parts of a token cache in a folder of a disk, which processes may share: cache.py.

A part is built in a folder beside, under a lock, and renamed when whole, so that a half-written one is never
seen; who finds a part's lock taken goes on to another part.
Held by: tests/test_data_cache.py, tests/test_data_remote.py, tests/test_patience.py.
"""

import contextlib
import dataclasses
import errno
import fcntl
import itertools
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from absl import logging

from longctx import files, progress
from longctx.data import parts
from longctx.data.parts import Job, Part
from longctx.errors import ConfigError


class FileArray:
  """A file of numbers that is open only while a slice of it is read."""

  def __init__(self, path: pathlib.Path, dtype: str):
    self.path, self.dtype = path, np.dtype(dtype)

  def __getitem__(self, part: slice) -> np.ndarray:
    return files.patiently(str(self.path), np.fromfile, self.path, self.dtype, part.stop - part.start,
                           offset=part.start * self.dtype.itemsize)


def _rotated(jobs: Sequence[Job], share: tuple[int, int]) -> Sequence[Job]:
  """From the first of this process's own on, so that processes meet late."""
  first = len(jobs) * share[0] // share[1]
  return [*jobs[first:], *jobs[:first]]


@dataclasses.dataclass(frozen=True)
class Disk:
  """Parts in a folder of a disk, which processes may share."""

  root: pathlib.Path
  mapped: bool = True

  @contextlib.contextmanager
  def errors(self) -> Iterator[None]:
    try:
      yield
    except OSError as e:
      if e.errno in files.PASSING:
        raise files.not_now(f'data.cache_dir={str(self.root)!r}', e) from e
      room = (': free some space, or set data.cache_dir to another disk' if e.errno == errno.ENOSPC
              else ': set data.cache_dir to a folder that can be read and written')
      raise ConfigError(f'data.cache_dir={str(self.root)!r}: {e.strerror}{room}') from e

  def where(self, name: str) -> str:
    return str(self.root / name)

  def holds(self, name: str) -> bool:
    """Whether there is something of that name, whole or not."""
    return (self.root / name).exists()

  def build_all(self, jobs: Sequence[Job], there: Sequence[Part | None], share: tuple[int, int], processes: int) -> None:
    """Builds what is not `there`, together with others."""
    files.again(self.root.mkdir, parents=True, exist_ok=True)
    parts.side_by_side(_rotated([job for job, part in zip(jobs, there) if not part], share), processes)
    for job in jobs:
      job(wait=True)

  def read_all(self, jobs: Sequence[Job]) -> list[Part | None]:
    found = []
    for job in jobs:
      found.append(self.read(job.name))
      progress.moved()
    return found

  def keep(self, jobs: Sequence[Job], found: Sequence[Part]) -> None:
    """Nothing: to open a part again costs next to nothing."""

  def read(self, name: str) -> Part | None:
    """The part, or None when there is none or its files are not as they were written."""
    return files.again(self._read, self.root / name)

  def _read(self, path: pathlib.Path) -> Part | None:
    if not path.exists():
      return None
    try:
      meta = json.loads((path / 'meta.json').read_text())
      for file, size in meta['sizes'].items():
        actual = (path / file).stat().st_size
        if actual != size:
          raise ValueError(f'{file} has {actual} bytes instead of {size}')
      if self.mapped:   # asarray: the same memory without the slow indexing of the memmap class
        tokens = np.asarray(np.memmap(path / 'tokens.bin', meta['dtype'], mode='r'))
        offsets = np.asarray(np.load(path / 'offsets.npy', mmap_mode='r'))
      else:
        tokens, offsets = FileArray(path / 'tokens.bin', meta['dtype']), np.load(path / 'offsets.npy')
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError, EOFError) as e:
      logging.warning('The token cache %s is damaged (%s); it is built again.', path, e)
      return None
    return Part(tokens, offsets, meta)

  def build(self, name: str, write: Callable[[pathlib.Path], dict], wait: bool) -> None:
    """Builds a part, unless it is there, or another process is at it and `wait` is False."""
    files.again(self._build_part, self.root / name, write, wait)

  def _build_part(self, path: pathlib.Path, write: Callable[[pathlib.Path], dict], wait: bool) -> None:
    try:
      with _locked(path, wait):
        if self._read(path):   # another process may have built it while this one waited
          return
        _remove_remains(path)
        _build(path, write)
    except BlockingIOError:
      if wait:
        raise


@contextlib.contextmanager
def _locked(path: pathlib.Path, wait: bool) -> Iterator[None]:
  """Holds the exclusive lock of a part, path.lock; the system frees it when its process dies.

  BlockingIOError where another process has it and `wait` is False.
  """
  written = None
  with open(f'{path}.lock', 'w') as file:
    for turn in itertools.count():
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        break
      except BlockingIOError:
        if not wait:
          raise
      if turn % 10 == 0:
        before, written = written, _written(path)
        if before not in (None, written):
          progress.moved()
      time.sleep(parts.POLL / 10)
    yield


def _written(path: pathlib.Path) -> int:
  """Bytes of a part that is being built."""
  total = 0
  for file in path.parent.glob(f'{path.name}.part-*/*'):
    with contextlib.suppress(OSError):   # it has been renamed
      total += file.stat().st_size
  return total


def _remove_remains(path: pathlib.Path) -> None:
  """Removes a damaged cache and what builders that died left. Only under the lock."""
  for old in [path, *path.parent.glob(f'{path.name}.part-*')]:
    shutil.rmtree(old, ignore_errors=True)


def _build(path: pathlib.Path, write: Callable[[pathlib.Path], dict]) -> None:
  part = path.with_name(f'{path.name}.part-{os.getpid()}')
  part.mkdir()
  try:
    meta = write(part)
    with parts.synced(part / 'meta.json') as file:
      file.write(parts.encoded(meta))
    os.rename(part, path)
  except BaseException:
    shutil.rmtree(part, ignore_errors=True)
    raise
