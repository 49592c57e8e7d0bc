"""The tokens of one split of a corpus, built once, on a disk or in a bucket.

A source has parts (one, unless it is large), and each part a folder `<label>-<split>-<hash>`; the hash covers
the source (names, sizes, times), the split's rule, the tokenizer and FORMAT, so that a change of any of
them is another folder:

    tokens.bin   SEP b1 .. bn  SEP b1 .. bm  ...  SEP     uint16 or uint32
    offsets.npy  where each document begins, and the end   int64 [documents + 1]
    meta.json    counts, file sizes and the hash of the content

The SEP at the end makes the token behind it the target of every token. A part that `continues` begins, without a
SEP, with what follows of the last document of the part before: a huge document is in several. All processes that
open a split build its parts together, and what they make is the same whoever makes it.
Of pairs (examples.py) the documents 2i and 2i + 1 are example i, so empty ones are kept, as a SEP; of text they are
left out.

On a disk (disk.py) the tokens of up to MAPPED parts are memory-mapped, those of more are read when it is their turn,
since a process may hold only so many files open. In a bucket (bucket.py; data.cache_dir=gs://...) each document's
tokens of a row are read when it is its turn.
All along `progress` is told of pieces that are done, here or by those who are waited for.
A process needs 8 to 16 bytes of memory for each document, nothing for its tokens (and the order of an epoch's
rows some more of each: packing.py).
Held by: tests/test_data_cache.py, tests/test_data_remote.py.
"""

import array
import bisect
import functools
import hashlib
import itertools
import json
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from longctx import progress
from longctx.data import remote
from longctx.data.bucket import Bucket
from longctx.data.disk import Disk
from longctx.data.parts import Job, Part, synced
from longctx.data.tokenizer import Tokenizer
from longctx.errors import ConfigError

FORMAT = 3
BEFORE = (1, 2)   # formats that are no longer read
MAPPED = 64     # parts: a file each stays open
COUNTS = ('documents', 'empty_documents', 'dropped_copies', 'tokens', 'bytes')
PAIR_COUNTS = ('second_bytes',)   # of the second documents of pairs


class Cache:
  """A split's tokens: its parts' documents, one after the other."""

  def __init__(self, parts: Sequence[Part]):
    self.parts = parts
    # A piece is a document, or what a part has of one.
    self._first = list(itertools.accumulate((len(p.offsets) - 1 for p in parts), initial=0))
    # Of each piece that continues a document: which document. So few that a list will do.
    self._more = [first - 1 - i for i, first in enumerate(
        first for part, first in zip(parts, self._first) if part.meta['continues'])]
    self.meta = parts[0].meta | {name: sum(p.meta[name] for p in parts) for name in (*COUNTS, *PAIR_COUNTS)
                                 if name in parts[0].meta}

  def __len__(self) -> int:
    return self._first[-1] - len(self._more)

  @functools.cached_property
  def content(self) -> str:
    """sha256 of all tokens and offsets: equal wherever and whenever the cache was built."""
    hashes = [p.meta['content'] for p in self.parts]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(''.join(hashes).encode()).hexdigest()

  @functools.cached_property
  def lengths(self) -> np.ndarray:
    """Tokens of each document, its leading SEP counted: the number of its (input, target) pairs."""
    pieces = np.concatenate([np.diff(p.offsets) for p in self.parts])
    if not self._more:
      return pieces
    begins = np.ones(len(pieces), bool)
    begins[[document + 1 + i for i, document in enumerate(self._more)]] = False
    return np.add.reduceat(pieces, np.flatnonzero(begins))

  def read(self, document: int, low: int, high: int) -> np.ndarray:
    """Tokens [low, high) of a document; behind its last one are SEP and what follows in its part."""
    before, after = bisect.bisect_left(self._more, document), bisect.bisect_right(self._more, document)
    found, last = [], document + after
    for piece in range(document + before, last + 1):
      i = bisect.bisect_right(self._first, piece) - 1
      start, stop = map(int, self.parts[i].offsets[piece - self._first[i]:piece - self._first[i] + 2])
      size = stop - start
      if low < size + (piece == last) and high > 0:
        found.append(self.parts[i].tokens[start + max(low, 0):start + (high if piece == last else min(high, size))])
      low, high = low - size, high - size
      if high <= 0:
        break
    return found[0] if len(found) == 1 else np.concatenate(found)


def default_folder() -> pathlib.Path:
  base = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return pathlib.Path(base) / 'longctx'


def open_cache(source, split: str, tokenizer: Tokenizer, folder: str = '', *, share: tuple[int, int] = (0, 1),
               processes: int = 1, pairs: bool = False) -> Cache:
  """The cache of a source's split; builds of it what is not there, has changed or is damaged.

  `share`: (i, n) of n processes that open it together; `processes`: how many this one builds with; `pairs`: the
  source's documents are two an example, which are in one part.
  """
  sources = source.parts(split)
  place = Bucket(folder) if remote.is_url(folder) else Disk(
      pathlib.Path(folder).expanduser() if folder else default_folder(), mapped=len(sources) <= MAPPED)
  jobs = [Job(place, _name(part, split, tokenizer), functools.partial(
      _write, source=part, split=split, tokenizer=tokenizer, may_be_empty=len(sources) > 1, pairs=pairs))
      for part in sources]
  with place.errors():
    parts = place.read_all(jobs)
    if not all(parts):
      for old in (_name(source, split, tokenizer, format) for format in BEFORE):
        if place.holds(old):
          logging.warning('%s: is of an earlier format; its text is tokenised again, and it may be removed.',
                          place.where(old))
      place.build_all(jobs, parts, share, processes)
      parts = place.read_all(jobs)
      assert all(parts), [job.name for job, part in zip(jobs, parts) if part is None]
      if share[0] == 0:
        place.keep(jobs, parts)
  cache = Cache(parts)
  if not len(cache):
    raise ConfigError(source.explain_empty(split))
  return cache


def _name(source: Any, split: str, tokenizer: Tokenizer, format: int = FORMAT) -> str:
  identity = json.dumps([format, split, source.fingerprint(split), tokenizer.fingerprint])
  return f'{source.label}-{split}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}'


def _write(part: pathlib.Path, *, source, split: str, tokenizer: Tokenizer, may_be_empty: bool, pairs: bool) -> dict:
  """Writes tokens and offsets, a chunk of a document at a time; returns the meta data."""
  dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
  separator = np.array([tokenizer.separator], dtype).tobytes()
  offsets = array.array('q', [0])
  num_bytes = second_bytes = num_empty = 0
  content = hashlib.sha256()
  said = time.monotonic()
  with synced(part / 'tokens.bin') as file:
    def put(data: bytes) -> int:
      file.write(data)
      content.update(data)
      return len(data) // dtype.itemsize

    continues = source.continues(split)
    for name, chunks in source.documents(split):
      length, is_second = put(separator) if pairs else 0, pairs and len(offsets) % 2 == 0
      for chunk in chunks:
        if chunk and not length and not (continues and len(offsets) == 1):
          length = put(separator)
        length += put(tokenizer.encode(chunk, name).astype(dtype).tobytes())
        num_bytes += len(chunk)
        second_bytes += len(chunk) * is_second
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
  num_documents = len(offsets) - 1 - continues
  if not num_documents and not may_be_empty:
    raise ConfigError(source.explain_empty(split))
  with synced(part / 'offsets.npy') as file:
    np.save(file, np.frombuffer(offsets, np.int64))
  content.update(offsets.tobytes() + b'continues' * continues)
  return {
      'format': FORMAT, 'label': source.label, 'split': split, 'dtype': dtype.name,
      'vocab_size': tokenizer.vocab_size, 'tokenizer': tokenizer.fingerprint,
      'documents': num_documents, 'empty_documents': num_empty, 'pieces': len(offsets) - 1, 'continues': continues,
      'dropped_copies': source.num_copies, 'tokens': offsets[-1],
      'bytes': num_bytes, **({'second_bytes': second_bytes} if pairs else {}), 'content': content.hexdigest(),
      'sizes': {name: (part / name).stat().st_size for name in ('tokens.bin', 'offsets.npy')}}
