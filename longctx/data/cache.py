"""The tokens of one split of a corpus, built once, on a disk or in a bucket.

A source has parts (one, unless it is large), and each part a folder `<label>-<split>-<hash>`; the hash covers
the source (names, sizes, times), the split's rule, the tokenizer and FORMAT, so that a change of any of
them is another folder:

    tokens.bin   SEP b1 .. bn  SEP b1 .. bm  ...  SEP     uint16 or uint32
    offsets.npy  where each document begins, and the end   int64 [documents + 1]
    meta.json    counts, file sizes and the hash of the content

The SEP at the end makes the token behind it the target of every token. All processes that open a split build
its parts together, and what they make is the same whoever makes it.

On a disk the tokens of up to MAPPED parts are memory-mapped, those of more are read when it is their turn, since a
process may hold only so many files open. A part is built in a folder beside, under a lock, and renamed when whole,
so that a half-written one is never seen; who finds a part's lock taken goes on to another part.
In a bucket (data.cache_dir=gs://...) each document's tokens of a row are read when it is its turn. There are no locks:
process i of n builds every n-th part, meta.json last, and waits for the others' parts; if for QUIET seconds
none comes, it builds them too.
All along `progress` is told of pieces that are done, here or by those who are waited for.
A process needs 8 to 16 bytes of memory for each document, nothing for its tokens (and the order of an epoch's
rows some more of each: packing.py).
Held by: tests/test_data_cache.py, tests/test_data_remote.py.
"""

import array
import bisect
import contextlib
import dataclasses
import errno
import fcntl
import functools
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import pathlib
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
from absl import logging

from longctx import progress
from longctx.data import remote
from longctx.data.tokenizer import Tokenizer
from longctx.errors import ConfigError

FORMAT = 2
QUIET = 600.0   # seconds without a new part of another process
MAPPED = 64     # parts: a file each stays open
POLL = 1.0      # seconds between looks at what others have built
COUNTS = ('documents', 'empty_documents', 'dropped_copies', 'tokens', 'bytes')


@dataclasses.dataclass(frozen=True)
class Part:
  """The tokens of a source's part."""

  tokens: Any   # [total + 1], an array or what gives its slices, the last one is SEP
  offsets: np.ndarray   # [documents + 1]
  meta: dict


class Cache:
  """A split's tokens: its parts' documents, one after the other."""

  def __init__(self, parts: Sequence[Part]):
    self.parts = parts
    self._first = list(itertools.accumulate((len(p.offsets) - 1 for p in parts), initial=0))
    self.meta = parts[0].meta | {name: sum(p.meta[name] for p in parts) for name in COUNTS}

  def __len__(self) -> int:
    return self._first[-1]

  @functools.cached_property
  def content(self) -> str:
    """sha256 of all tokens and offsets: equal wherever and whenever the cache was built."""
    hashes = [p.meta['content'] for p in self.parts]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(''.join(hashes).encode()).hexdigest()

  @functools.cached_property
  def lengths(self) -> np.ndarray:
    """Tokens of each document, its leading SEP counted: the number of its (input, target) pairs."""
    return np.concatenate([np.diff(p.offsets) for p in self.parts])

  def read(self, document: int, low: int, high: int) -> np.ndarray:
    """Tokens [low, high) of a document; the one behind its last is SEP."""
    i = bisect.bisect_right(self._first, document) - 1
    start = int(self.parts[i].offsets[document - self._first[i]])
    return self.parts[i].tokens[start + low:start + high]


def default_folder() -> pathlib.Path:
  base = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return pathlib.Path(base) / 'longctx'


def open_cache(source, split: str, tokenizer: Tokenizer, folder: str = '', *, share: tuple[int, int] = (0, 1),
               processes: int = 1) -> Cache:
  """The cache of a source's split; builds of it what is not there, has changed or is damaged.

  `share`: (i, n) of n processes that open it together; `processes`: how many this one builds with.
  """
  sources = source.parts(split)
  place = Bucket(folder) if remote.is_url(folder) else Disk(
      pathlib.Path(folder).expanduser() if folder else default_folder(), mapped=len(sources) <= MAPPED)
  jobs = [_Job(place, part, split, tokenizer, len(sources) > 1) for part in sources]
  with place.errors():
    parts = list(_read(place, jobs))
    if not all(parts):
      place.build_all(jobs, share, processes)
      parts = list(_read(place, jobs))
  assert all(parts), [job.name for job, part in zip(jobs, parts) if part is None]
  cache = Cache(parts)
  if not len(cache):
    raise ConfigError(source.explain_empty(split))
  return cache


def _read(place: 'Disk | Bucket', jobs: Sequence['_Job']) -> Iterator[Part | None]:
  for job in jobs:
    yield place.read(job.name)
    progress.moved()


class FileArray:
  """A file of numbers that is open only while a slice of it is read."""

  def __init__(self, path: pathlib.Path, dtype: str):
    self.path, self.dtype = path, np.dtype(dtype)

  def __getitem__(self, part: slice) -> np.ndarray:
    return np.fromfile(self.path, self.dtype, part.stop - part.start, offset=part.start * self.dtype.itemsize)


class _Job:
  """A part that is to be built; what another process can be sent."""

  def __init__(self, place: 'Disk | Bucket', source: Any, split: str, tokenizer: Tokenizer,
               may_be_empty: bool):
    identity = json.dumps([FORMAT, split, source.fingerprint(split), tokenizer.fingerprint])
    self.name = f'{source.label}-{split}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}'
    self.place, self._write = place, functools.partial(
        _write, source=source, split=split, tokenizer=tokenizer, may_be_empty=may_be_empty)

  def __call__(self, wait: bool) -> None:
    self.place.build(self.name, self._write, wait)


def _tried(job: _Job) -> None:
  job(wait=False)


def _begin_builder(parent: int, moves: Any) -> None:
  """Counts what moves; ends this process soon after its parent, which may have been killed and not told it."""
  def count():
    moves.value += 1
  progress.listen(count)
  def watch():
    while os.getppid() == parent:
      time.sleep(1)
    os._exit(1)
  threading.Thread(target=watch, daemon=True).start()


def _side_by_side(jobs: Sequence[_Job], processes: int) -> None:
  """Does what is missing of them in processes of their own, but for what another process is doing."""
  jobs = [job for job in jobs if job.place.read(job.name) is None]
  processes = min(processes or len(os.sched_getaffinity(0)), len(jobs))
  if processes < 2:
    for job in jobs:
      _tried(job)
    return
  spawn = multiprocessing.get_context('spawn')   # the threads of this one's devices do not survive a fork
  moves = spawn.Value('Q', lock=False)   # of two counts at once one is lost, and a killed one holds no lock
  with futures.ProcessPoolExecutor(processes, mp_context=spawn, initializer=_begin_builder,
                                   initargs=(os.getpid(), moves)) as pool:
    try:
      left, seen = {pool.submit(_tried, job) for job in jobs}, 0
      while left:
        done, left = futures.wait(left, POLL, futures.FIRST_COMPLETED)
        for one in done:
          one.result()
        if done or moves.value != seen:
          seen = moves.value
          progress.moved()
    except BrokenProcessPool as e:
      raise ConfigError(f'data.build_processes={processes}: one of them was killed, as where memory is short; '
                        'choose fewer') from e
    finally:
      pool.shutdown(wait=False, cancel_futures=True)


def _rotated(jobs: Sequence[_Job], share: tuple[int, int]) -> Sequence[_Job]:
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
      room = (': free some space, or set data.cache_dir to another disk' if e.errno == errno.ENOSPC
              else ': let the process open more files (ulimit -n)' if e.errno in (errno.EMFILE, errno.ENFILE)
              else ': set data.cache_dir to a folder that can be read and written')
      raise ConfigError(f'data.cache_dir={str(self.root)!r}: {e.strerror}{room}') from e

  def build_all(self, jobs: Sequence[_Job], share: tuple[int, int], processes: int) -> None:
    self.root.mkdir(parents=True, exist_ok=True)
    _side_by_side(_rotated(jobs, share), processes)
    for job in jobs:
      job(wait=True)

  def read(self, name: str) -> Part | None:
    """The part, or None when there is none or its files are not as they were written."""
    path = self.root / name
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
    try:
      with _locked(self.root / name, wait):
        if self.read(name):   # another process may have built it while this one waited
          return
        _remove_remains(self.root / name)
        _build(self.root / name, write)
    except BlockingIOError:
      if wait:
        raise


@dataclasses.dataclass(frozen=True)
class Bucket:
  """Parts behind a URL, where files appear whole and nothing can be locked."""

  root: str

  @contextlib.contextmanager
  def errors(self) -> Iterator[None]:
    try:
      yield
    except OSError as e:
      raise ConfigError(f'data.cache_dir={self.root!r}: {e.strerror or e}; check the bucket, and that it may '
                        'be read and written here') from e

  def _files(self) -> Any:
    return remote.file_system(self.root, 'data.cache_dir')

  def _url(self, name: str, file: str) -> str:
    return f'{self.root.rstrip("/")}/{name}/{file}'

  def build_all(self, jobs: Sequence[_Job], share: tuple[int, int], processes: int) -> None:
    mine = jobs[share[0]::share[1]]
    _side_by_side(mine, processes)
    left, since = [job for job in jobs if job not in mine], time.monotonic()
    while left:
      still = [job for job in left if self.read(job.name) is None]
      if len(still) < len(left):
        left, since = still, time.monotonic()
        progress.moved()
      elif time.monotonic() - since > QUIET:
        logging.warning('No part of another process for %d s: the %d that are missing are built here.', QUIET,
                        len(left))
        return _side_by_side(left, processes)
      else:
        time.sleep(POLL)

  def read(self, name: str) -> Part | None:
    """The part, or None when there is none or its files are not as they were written."""
    fs = self._files()
    get = lambda file: remote.patiently(self.root, fs.cat_file, self._url(name, file))
    try:
      meta = json.loads(get('meta.json'))
      size = remote.patiently(self.root, fs.size, self._url(name, 'tokens.bin'))
      if size != meta['sizes']['tokens.bin']:
        raise ValueError(f'tokens.bin has {size} bytes instead of {meta["sizes"]["tokens.bin"]}')
      offsets = np.load(io.BytesIO(get('offsets.npy')))
    except FileNotFoundError:
      return None
    except (ValueError, KeyError, TypeError, AttributeError, EOFError) as e:
      logging.warning('The token cache %s is damaged (%s); it is built again.', self._url(name, ''), e)
      return None
    return Part(remote.RemoteArray(self._url(name, 'tokens.bin'), meta['dtype']), offsets, meta)

  def build(self, name: str, write: Callable[[pathlib.Path], dict], wait: bool) -> None:
    """Builds a part on a local disk and copies it, unless it is there."""
    del wait
    if self.read(name):
      return
    fs = self._files()
    with tempfile.TemporaryDirectory(prefix='longctx-') as folder:
      meta = write(pathlib.Path(folder))
      for file in meta['sizes']:
        remote.put(fs, os.path.join(folder, file), self._url(name, file))
    remote.patiently(self.root, fs.pipe_file, self._url(name, 'meta.json'), _encoded(meta))


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
      time.sleep(POLL / 10)
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


def _encoded(meta: dict) -> bytes:
  return json.dumps(meta, indent=1).encode()


def _build(path: pathlib.Path, write: Callable[[pathlib.Path], dict]) -> None:
  part = path.with_name(f'{path.name}.part-{os.getpid()}')
  part.mkdir()
  try:
    meta = write(part)
    with _synced(part / 'meta.json') as file:
      file.write(_encoded(meta))
    os.rename(part, path)
  except BaseException:
    shutil.rmtree(part, ignore_errors=True)
    raise


@contextlib.contextmanager
def _synced(path: pathlib.Path) -> Iterator:
  """A file that is on the disk when the block ends."""
  with open(path, 'wb') as file:
    yield file
    file.flush()
    os.fsync(file.fileno())


def _write(part: pathlib.Path, *, source, split: str, tokenizer: Tokenizer, may_be_empty: bool) -> dict:
  """Writes tokens and offsets, a chunk of a document at a time; returns the meta data."""
  dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
  separator = np.array([tokenizer.separator], dtype).tobytes()
  offsets = array.array('q', [0])
  num_bytes = num_empty = 0
  content = hashlib.sha256()
  said = time.monotonic()
  with _synced(part / 'tokens.bin') as file:
    def put(data: bytes) -> int:
      file.write(data)
      content.update(data)
      return len(data) // dtype.itemsize

    for name, chunks in source.documents(split):
      length = 0
      for chunk in chunks:
        if chunk and not length:
          length = put(separator)
        length += put(tokenizer.encode(chunk, name).astype(dtype).tobytes())
        num_bytes += len(chunk)
        progress.moved()
      if length:
        offsets.append(offsets[-1] + length)
      else:
        num_empty += 1
      if time.monotonic() - said > 10:
        said = time.monotonic()
        logging.info('Tokenising %s (%s): %d documents, %.1f MB', source.label, split,
                     len(offsets) - 1, num_bytes / 1e6)
    put(separator)
  num_documents = len(offsets) - 1
  if not num_documents and not may_be_empty:
    raise ConfigError(source.explain_empty(split))
  with _synced(part / 'offsets.npy') as file:
    np.save(file, np.frombuffer(offsets, np.int64))
  content.update(offsets.tobytes())
  return {
      'format': FORMAT, 'label': source.label, 'split': split, 'dtype': dtype.name,
      'vocab_size': tokenizer.vocab_size, 'tokenizer': tokenizer.fingerprint,
      'documents': num_documents, 'empty_documents': num_empty,
      'dropped_copies': source.num_copies, 'tokens': offsets[-1],
      'bytes': num_bytes, 'content': content.hexdigest(),
      'sizes': {name: (part / name).stat().st_size for name in ('tokens.bin', 'offsets.npy')}}
