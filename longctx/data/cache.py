"""The tokens of one split of a corpus on disk, built once and memory-mapped.

A cache is a folder `<label>-<split>-<hash>`; the hash covers the source (names, sizes, times), the
split's rule, the tokenizer and FORMAT, so that a change of any of them is another folder:

    tokens.bin   SEP b1 .. bn  SEP b1 .. bm  ...  SEP     uint16 or uint32
    offsets.npy  where each document begins, and the end   int64 [documents + 1]
    meta.json    counts, file sizes and the hash of the content

The SEP at the end makes `tokens[i + 1]` the target of every token i. A cache is built in a folder
beside, under a lock, and renamed when whole, so that a half-written one is never seen.
Held by: tests/test_data_cache.py.
"""

import array
import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import time
from collections.abc import Iterator

import numpy as np
from absl import logging

from longctx.data.tokenizer import Tokenizer
from longctx.errors import ConfigError

FORMAT = 2


@dataclasses.dataclass(frozen=True)
class Cache:
  """A split's tokens; `tokens` and `offsets` are memory-mapped."""
  path: pathlib.Path
  tokens: np.ndarray   # [total + 1], the last one is SEP
  offsets: np.ndarray  # [documents + 1]
  meta: dict

  @property
  def content(self) -> str:
    """sha256 of all tokens and offsets: equal wherever and whenever the cache was built."""
    return self.meta['content']


def default_folder() -> pathlib.Path:
  base = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return pathlib.Path(base) / 'longctx'


def open_cache(source, split: str, tokenizer: Tokenizer, folder: str = '') -> Cache:
  """The cache of a source's split; builds it if it is not there, has changed or is damaged."""
  identity = json.dumps([FORMAT, split, source.fingerprint(split), tokenizer.fingerprint])
  digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
  root = pathlib.Path(folder).expanduser() if folder else default_folder()
  path = root / f'{source.label}-{split}-{digest}'
  found = _read(path)
  if found:
    return found
  try:
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root / f'{path.name}.lock'):
      found = _read(path)  # another process may have built it while this one waited
      if not found:
        _remove_remains(path)
        _build(path, source, split, tokenizer)
        found = _read(path)
  except OSError as e:
    room = (': free some space, or set data.cache_dir to another disk' if e.errno == errno.ENOSPC
            else ': set data.cache_dir to a folder that can be written')
    raise ConfigError(f'data.cache_dir={str(root)!r}: {e.strerror}{room}') from e
  assert found, path
  return found


def _read(path: pathlib.Path) -> Cache | None:
  """The cache at `path`, or None when there is none or its files are not as they were written."""
  if not path.exists():
    return None
  try:
    meta = json.loads((path / 'meta.json').read_text())
    for name, size in meta['sizes'].items():
      actual = (path / name).stat().st_size
      if actual != size:
        raise ValueError(f'{name} has {actual} bytes instead of {size}')
    # asarray: the same memory without the slow indexing of the memmap class
    tokens = np.asarray(np.memmap(path / 'tokens.bin', meta['dtype'], mode='r'))
    offsets = np.asarray(np.load(path / 'offsets.npy', mmap_mode='r'))
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
    logging.warning('The token cache %s is damaged (%s); it is built again.', path, e)
    return None
  return Cache(path=path, tokens=tokens, offsets=offsets, meta=meta)


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
  """Holds an exclusive lock on a file; the system frees it when its process dies."""
  with open(path, 'w') as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


def _remove_remains(path: pathlib.Path) -> None:
  """Removes a damaged cache and what builders that died left. Only under the lock."""
  for old in [path, *path.parent.glob(f'{path.name}.part-*')]:
    shutil.rmtree(old, ignore_errors=True)


def _build(path: pathlib.Path, source, split: str, tokenizer: Tokenizer) -> None:
  part = path.with_name(f'{path.name}.part-{os.getpid()}')
  part.mkdir()
  try:
    meta = _write(part, source, split, tokenizer)
    with _synced(part / 'meta.json') as file:
      file.write(json.dumps(meta, indent=1).encode())
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


def _write(part: pathlib.Path, source, split: str, tokenizer: Tokenizer) -> dict:
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
  if not num_documents:
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
