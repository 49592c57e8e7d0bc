"""Parts of a token cache behind a URL, where files appear whole and nothing can be locked: cache.py.

Process i of n builds every n-th part, meta.json last, and waits for the others' parts; if for QUIET seconds
none comes, it builds them too. What the first has opened it keeps as one file, `<label>-<split>-<hash>.index`: of
parts by the thousand a start then reads that file, and one listing.
Held by: tests/test_data_remote.py.
"""

import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import os
import pathlib
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging

from longctx import progress
from longctx.data import parts, remote
from longctx.data.parts import Job, Part
from longctx.errors import ConfigError

QUIET = 600.0   # seconds without a new part of another process


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

  def where(self, name: str) -> str:
    return f'{self.root.rstrip("/")}/{name}'

  def holds(self, name: str) -> bool:
    return remote.patiently(self.root, self._files().exists, self._url(name, 'meta.json'))

  def _sizes(self, jobs: Sequence[Job]) -> dict[str, int]:
    """{'NAME/FILE': bytes} of what is there of these parts, by one listing."""
    fs, kind = self._files(), jobs[0].name.rpartition('-')[0]
    fs.invalidate_cache()   # what it listed before may have grown
    listed = remote.patiently(self.root, fs.glob, self._url(f'{kind}-*', '*'), detail=True)
    return {'/'.join(path.split('/')[-2:]): info['size'] for path, info in listed.items()}

  def build_all(self, jobs: Sequence[Job], there: Sequence[Part | None], share: tuple[int, int], processes: int) -> None:
    """Builds of what is not `there` its own, and waits for the rest."""
    sizes = self._sizes(jobs)
    lacking = [job for job, part in zip(jobs, there) if not part]
    damaged = {job.name for job in lacking if f'{job.name}/meta.json' in sizes}
    mine = [job for i, job in enumerate(jobs) if i % share[1] == share[0] and job in lacking]
    parts.side_by_side(mine, processes)
    left, since = [job for job in lacking if job not in mine], time.monotonic()
    while left:
      sizes = self._sizes(jobs)
      still = [job for job in left if f'{job.name}/meta.json' not in sizes
               or (job.name in damaged and not self._read(job.name, sizes))]
      if len(still) < len(left):
        left, since = still, time.monotonic()
        progress.moved()
      elif time.monotonic() - since > QUIET:
        logging.warning('No part of another process for %d s: the %d that are missing are built here.', QUIET,
                        len(left))
        return parts.side_by_side(left, processes)
      else:
        time.sleep(parts.POLL)

  def read_all(self, jobs: Sequence[Job]) -> list[Part | None]:
    sizes = self._sizes(jobs)
    if found := self._kept(jobs, sizes):
      return found
    found = []
    for job in jobs:
      found.append(self._read(job.name, sizes))
      progress.moved()
    return found

  def _index(self, jobs: Sequence[Job]) -> str:
    names = hashlib.sha256(' '.join(job.name for job in jobs).encode()).hexdigest()[:16]
    return f'{self.root.rstrip("/")}/{jobs[0].name.rpartition("-")[0]}-{names}.index'

  def keep(self, jobs: Sequence[Job], found: Sequence[Part]) -> None:
    """What `_read` has read of several parts, as one file."""
    if len(found) > 1:
      file = io.BytesIO()
      np.savez(file, metas=np.frombuffer(json.dumps([part.meta for part in found]).encode(), np.uint8),
               offsets=np.concatenate([part.offsets for part in found]))
      remote.patiently(self.root, self._files().pipe_file, self._index(jobs), file.getvalue())

  def _kept(self, jobs: Sequence[Job], sizes: dict[str, int]) -> list[Part]:
    """What `keep` kept; nothing where it kept none, or a file is not as it was then."""
    if len(jobs) < 2:
      return []
    try:
      held = np.load(io.BytesIO(remote.patiently(self.root, self._files().cat_file, self._index(jobs))))
      metas, offsets = json.loads(held['metas'].tobytes()), held['offsets']
    except (FileNotFoundError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
      return []
    if not all(self._whole(job.name, meta, sizes) for job, meta in zip(jobs, metas)):
      return []
    cuts = np.cumsum([meta['pieces'] + 1 for meta in metas])[:-1]
    return [self._part(job.name, *each) for job, *each in zip(jobs, metas, np.split(offsets, cuts))]

  def _read(self, name: str, sizes: dict[str, int]) -> Part | None:
    """The part, or None when there is none or its files are not as they were written."""
    if f'{name}/meta.json' not in sizes:
      return None
    get = lambda file: remote.patiently(self.root, self._files().cat_file, self._url(name, file))
    try:
      meta = json.loads(get('meta.json'))
      size = sizes.get(f'{name}/tokens.bin', 0)
      if size != meta['sizes']['tokens.bin']:
        raise ValueError(f'tokens.bin has {size} bytes instead of {meta["sizes"]["tokens.bin"]}')
      offsets = np.load(io.BytesIO(get('offsets.npy')))
    except FileNotFoundError:
      return None
    except (ValueError, KeyError, TypeError, AttributeError, EOFError) as e:
      logging.warning('The token cache %s is damaged (%s); it is built again.', self.where(name), e)
      return None
    return self._part(name, meta, offsets)

  def _part(self, name: str, meta: dict, offsets: np.ndarray) -> Part:
    return Part(remote.RemoteArray(self._url(name, 'tokens.bin'), meta['dtype']), offsets, meta)

  def _whole(self, name: str, meta: dict, sizes: dict[str, int]) -> bool:
    """Whether its files have the sizes that they were written with."""
    return all(sizes.get(f'{name}/{file}') == size for file, size in (
        *meta['sizes'].items(), ('meta.json', len(parts.encoded(meta)))))

  def build(self, name: str, write: Callable[[pathlib.Path], dict], wait: bool) -> None:
    """Builds a part on a local disk and copies it, unless it is there."""
    del wait   # there are no locks: who builds which is agreed
    fs = self._files()
    with tempfile.TemporaryDirectory(prefix='longctx-') as folder:
      try:
        meta = write(pathlib.Path(folder))
      except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
          raise
        raise ConfigError(f'data.cache_dir={self.root!r}: {folder}, where its parts are made first: {e.strerror}; free '
                          'some space, or set TMPDIR to another disk') from e
      for file in meta['sizes']:
        remote.put(fs, os.path.join(folder, file), self._url(name, file))
    remote.patiently(self.root, fs.pipe_file, self._url(name, 'meta.json'), parts.encoded(meta))
