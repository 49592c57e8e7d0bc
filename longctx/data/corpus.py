"""Corpora: where documents come from, and which split each belongs to.

A source names its documents in a stable order and reads one as chunks of bytes, so that a document
larger than memory is never held whole. `stdlib` is the source code of the running Python's standard
library, text that every machine has, without files that another split has too; `files` is any glob, of
paths or of a URL (remote.py); `tfds` is in tfds_corpus.py. A large source has parts, which are tokenised side
by side (cache.py); a huge file is in several, since its chunks are the same wherever one begins to read it.

Splits: 'hash' puts a whole document where sha256(name) says, whatever else the corpus holds;
'contiguous' gives the first part of every document's bytes to train, the next to validation, the
last to test, cut between UTF-8 characters.
Held by: tests/test_data_corpus.py, tests/test_patience.py.
"""

import collections
import contextlib
import dataclasses
import glob
import hashlib
import itertools
import os
import pathlib
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, TypeVar

from longctx.data.remote import RemoteFile, find, is_url
from longctx.errors import ConfigError, check
from longctx.files import patiently

T = TypeVar('T')
SPLITS = ('train', 'validation', 'test')
CHUNK = 1 << 20  # bytes of a document read at once; up to twice as many are a chunk
PART = 64 << 20  # bytes of a source's part, at least; its last may have fewer
EXCLUDED = {'site-packages', 'dist-packages', 'test', 'tests', '__pycache__'}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitRule:
  """Which documents, or which part of each, are in a split."""
  kind: str  # 'hash' or 'contiguous'
  validation: float
  test: float

  def holds(self, name: str, split: str) -> bool:
    """Whether any part of the document `name` may be in `split`."""
    if self.kind == 'contiguous':
      return True
    digest = hashlib.sha256(name.encode('utf-8', 'surrogateescape')).digest()
    u = int.from_bytes(digest[:8], 'big') / 2**64
    if u < self.test:
      return split == 'test'
    return split == ('validation' if u < self.test + self.validation else 'train')

  def bounds(self, size: int, split: str) -> tuple[int, int]:
    """The part [start, stop), in bytes, of a document that is in `split` (if it `holds` it)."""
    if self.kind == 'hash':
      return 0, size
    # rounded, so that 1 - 0.05 - 0.05 is 0.9 and not 0.8999...
    cuts = [0, int(size * round(1 - self.validation - self.test, 12)),
            int(size * round(1 - self.test, 12)), size]
    i = SPLITS.index(split)
    return cuts[i], cuts[i + 1]


def between_characters(before: bytes, after: bytes) -> int:
  """How many bytes (0 to 3) to step back from a cut so that it falls between UTF-8 characters."""
  if not after or after[0] & 0xC0 != 0x80:
    return 0
  for step in range(1, min(3, len(before)) + 1):
    if before[-step] & 0xC0 != 0x80:
      return step if before[-step] >= 0xC0 else 0  # ASCII before a later byte is not UTF-8
  return 0


def cut_bytes(data: bytes, rule: SplitRule, split: str) -> bytes:
  """The part of a document in memory that is in `split`."""
  start, stop = (c - between_characters(data[max(c - 3, 0):c], data[c:c + 1])
                 for c in rule.bounds(len(data), split))
  return data[start:stop]


class _Reader:
  """A file's bytes; it is opened anew after an error of a moment, since its handle may be stale."""

  def __init__(self, path: pathlib.Path | RemoteFile):
    self._path = path
    self._file: BinaryIO | None = None

  def size(self) -> int:
    return self._patiently(lambda file: file.seek(0, os.SEEK_END))

  def read(self, start: int, stop: int) -> bytes:
    def read(file: BinaryIO) -> bytes:
      file.seek(start)
      return file.read(stop - start)
    return self._patiently(read)

  def _patiently(self, do: Callable[[BinaryIO], T]) -> T:
    def opened() -> T:
      try:
        self._file = self._file or self._path.open('rb')
        return do(self._file)
      except OSError:
        self.close()
        raise
    return patiently(f'data.files: {str(self._path)!r}', opened)

  def close(self) -> None:
    file, self._file = self._file, None
    if file:
      file.close()


def _aligned(file: _Reader, cut: int) -> int:
  return cut - between_characters(file.read(max(cut - 3, 0), cut), file.read(cut, cut + 1))


def read_chunks(path: pathlib.Path | RemoteFile, rule: SplitRule, split: str, piece: tuple[int, int] | None = None
                ) -> Iterator[bytes]:
  """The split's part of a file, or a piece of it: those of its chunks that `pieces` gives.

  A chunk ends after the last line that ends before the next multiple of CHUNK bytes, or at least between
  characters: where it does can be told without the chunks before.
  """
  try:
    with contextlib.closing(_Reader(path)) as file:
      bounds = rule.bounds(file.size(), split)
      start, stop = (_aligned(file, c) for c in bounds)
      low, high = piece or bounds
      at, left = start, b''   # what a chunk had to leave to the next
      if low > bounds[0]:
        at = low
        window = file.read(low - CHUNK, low)
        left = window[_end_of_chunk(file, low - CHUNK, window):]
      while at < stop and at < high:
        window = file.read(at, min((at // CHUNK + 1) * CHUNK, stop))
        if not window:
          break   # the file shrank meanwhile
        end = len(window) if at + len(window) == stop else _end_of_chunk(file, at, window)
        if chunk := left + window[:end]:
          yield chunk
        at, left = at + len(window), window[end:]
      if left and at < high:
        yield left
  except OSError as e:
    raise ConfigError(f'data.files: {str(path)!r} cannot be read: {e.strerror or e}') from e


def _end_of_chunk(file: _Reader, at: int, window: bytes) -> int:
  """How many bytes of a window, which begins at `at`, are of the chunk that it ends."""
  stop = at + len(window)
  return window.rfind(b'\n') + 1 or max(0, len(window) - between_characters(
      file.read(max(0, stop - 3), stop), file.read(stop, stop + 1)))


def pieces(start: int, stop: int) -> list[tuple[int, int]]:
  """Bytes [start, stop) of a document, cut at multiples of CHUNK into pieces of PART or a little more."""
  size = -(-PART // CHUNK) * CHUNK
  cuts = [c for c in range((start // size + 1) * size, stop, size) if start + CHUNK <= c <= stop - CHUNK]
  edges = [start, *cuts, stop]
  return list(itertools.pairwise(edges))


def explain_empty(rule: SplitRule, split: str, what: str, num_documents: int) -> str:
  """Why a split of a corpus that has text has none, and what to do."""
  fraction = (f'data.{split}_fraction={getattr(rule, split)}' if split != 'train' else
              f'data.validation_fraction={rule.validation}, data.test_fraction={rule.test}')
  remedy = ("cut every document instead with data.split='contiguous'" if rule.kind == 'hash' else
            'choose other fractions')
  return (f'{fraction}: the {split} split of {what} ({num_documents} documents) is empty with '
          f'data.split={rule.kind!r}; {remedy}')


class FileSource:
  """Documents that are files, by names that do not change with the place they are in."""

  def __init__(self, label: str, root: str, files: dict[str, pathlib.Path | RemoteFile], rule: SplitRule,
               copies: frozenset[str] = frozenset(), cut: dict[str, tuple[int, int]] | None = None):
    """`cut`: of these files only so many bytes; see `parts`."""
    self.label = label
    self._cut = cut or {}
    self.num_copies = len(copies)   # documents that are left out because another split has them
    self._rule = rule
    self._root = root
    self._files = {n: f for n, f in sorted(files.items()) if n not in copies}

  def __len__(self) -> int:
    return len(self._files)

  def names(self, split: str) -> list[str]:
    return [n for n in self._files if self._rule.holds(n, split)]

  def explain_empty(self, split: str) -> str:
    """Why a split has no text; for the error."""
    what = f'data.corpus={self.label!r}'
    names = self.names(split)
    if names and not any(_stat(self._files[n])[0] for n in names):
      return f'{what}: all {len(names)} documents of the {split} split are empty'
    return explain_empty(self._rule, split, what, len(self))

  def fingerprint(self, split: str) -> list:
    """Changes when a file of the split is added, removed, renamed or written."""
    del split  # the rule decides; cheap enough to take them all
    return [self.label, self._root, dataclasses.astuple(self._rule),
            [[n, *_stat(f), *self._cut.get(n, ())] for n, f in self._files.items()]]

  def documents(self, split: str) -> Iterator[tuple[str, Iterator[bytes]]]:
    for name in self.names(split):
      yield name, read_chunks(self._files[name], self._rule, split, self._cut.get(name))

  def continues(self, split: str) -> bool:
    """Whether the first document is what follows of the last one of the part before."""
    first = next(iter(self.names(split)), None)
    return first in self._cut and self._cut[first][0] > self._rule.bounds(_stat(self._files[first])[0], split)[0]

  def parts(self, split: str) -> list['FileSource']:
    """Sources of at least PART bytes, whose documents in their order are those of this one's split.

    A document of more is in several, a piece in each.
    """
    groups, size = [{}], 0   # {name: its piece}
    for name in self.names(split):
      for piece in pieces(*self._rule.bounds(_stat(self._files[name])[0], split)):
        if size >= PART:
          groups.append({})
          size = 0
        groups[-1][name] = piece
        size += piece[1] - piece[0]
    if len(groups) == 1:
      return [self]
    times = collections.Counter(name for group in groups for name in group)
    found = [FileSource(self.label, self._root, {name: self._files[name] for name in group}, self._rule,
                        cut={name: piece for name, piece in group.items() if times[name] > 1}) for group in groups]
    found[0].num_copies = self.num_copies
    return found


def _stat(file: pathlib.Path | RemoteFile) -> tuple[int, int | str]:
  """(bytes, what changes when it is written)."""
  if isinstance(file, RemoteFile):
    return file.size, file.version
  try:
    stat = patiently(f'data.files: {str(file)!r}', file.stat)
  except OSError as e:
    raise ConfigError(f'data.files: {str(file)!r} cannot be read: {e.strerror}') from e
  return stat.st_size, stat.st_mtime_ns


def _local_source(label: str, root: pathlib.Path, paths: list[pathlib.Path], rule: SplitRule,
                  copies: frozenset[str] = frozenset()) -> FileSource:
  return FileSource(label, str(root.resolve()), {p.relative_to(root).as_posix(): p for p in paths}, rule,
                    copies)


def stdlib_source(rule: SplitRule) -> FileSource:
  """The *.py of the standard library, without its tests and without installed packages."""
  root = pathlib.Path(sysconfig.get_path('stdlib'))
  paths = []
  for folder, folders, files in os.walk(root):
    folders[:] = [f for f in folders if f not in EXCLUDED]
    paths += [pathlib.Path(folder) / f for f in files if f.endswith('.py')]
  check(bool(paths), f"data.corpus='stdlib': {str(root)!r} holds no .py file (a Python shipped "
        "without its sources); use data.corpus='files'")
  return _local_source('stdlib', root, paths, rule, copies_in_other_splits(root, paths, rule))


def copies_in_other_splits(root: pathlib.Path, paths: list[pathlib.Path],
                           rule: SplitRule) -> frozenset[str]:
  """Names of files that are, byte for byte, an earlier one of another split; by name, sorted."""
  if rule.kind != 'hash':
    return frozenset()   # equal files are cut alike
  sizes = collections.Counter(_stat(path)[0] for path in paths)
  first, copies = {}, set()
  for name, path in sorted((path.relative_to(root).as_posix(), path) for path in paths):
    if sizes[_stat(path)[0]] > 1:
      split = next(s for s in SPLITS if rule.holds(name, s))
      digest = hashlib.sha256(b''.join(read_chunks(path, rule, split))).digest()
      if first.setdefault(digest, split) != split:
        copies.add(name)
  return frozenset(copies)


def matching(pattern: str) -> list[pathlib.Path | RemoteFile]:
  """The files that a glob of paths or of a URL matches, sorted; `**` goes through folders."""
  if is_url(pattern):
    return find(pattern)
  pattern = os.path.expanduser(pattern)
  _wait_for(pathlib.Path(*_fixed(pathlib.Path(pattern).parts)), f'data.files={pattern!r}')
  found = sorted(set(glob.glob(pattern, recursive=True)))
  return [pathlib.Path(p) for p in found if not os.path.isdir(p)]


def _wait_for(folder: pathlib.Path, what: str) -> None:
  """Until it can be listed: of one that cannot, glob says that it is empty."""
  with contextlib.suppress(OSError):   # a lasting one: glob's answer will do
    patiently(what, lambda: os.scandir(folder).close())


def files_source(pattern: str, rule: SplitRule) -> FileSource:
  """The files that a glob matches."""
  if is_url(pattern):
    return _remote_source(pattern, rule)
  paths = matching(pattern)
  pattern = os.path.expanduser(pattern)
  if not paths:
    found = glob.glob(pattern, recursive=True)
    what = 'matches only folders' if found else 'matches no file'
    remedy = (f'; write {os.path.join(pattern, "**", "*.txt")!r} for the files below it'
              if found else '; check the path, or quote the pattern in the shell')
    raise ConfigError(f'data.files={pattern!r}: {what}{remedy}')
  return _local_source('files', pathlib.Path(*_fixed(pathlib.Path(pattern).parts)), paths, rule)


def _fixed(parts: Sequence[str]) -> Sequence[str]:
  """The folders that a pattern names without wildcards."""
  return parts[:next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)]


def _remote_source(pattern: str, rule: SplitRule) -> FileSource:
  files = matching(pattern)
  check(bool(files), f'data.files={pattern!r}: matches no file; check the bucket, the path and who may read it')
  protocol, _, path = pattern.partition('://')
  root = f'{protocol}://{"/".join(_fixed(path.split("/")))}'
  name = lambda file: file.url.partition('://')[2].lstrip('/').removeprefix(
      root.partition('://')[2].strip('/')).lstrip('/')
  return FileSource('files', root, {name(file): file for file in files}, rule)


def open_source(config) -> FileSource:
  """The corpus that a stream.Config names."""
  rule = SplitRule(kind=config.split, validation=config.validation_fraction,
                   test=config.test_fraction)
  if config.corpus == 'stdlib':
    return stdlib_source(rule)
  if config.corpus == 'files':
    return files_source(config.files, rule)
  from longctx.data import tfds_corpus
  return tfds_corpus.TfdsSource(config, rule)
