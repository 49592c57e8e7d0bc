"""Files by URL: gs://, s3://, memory://, whatever fsspec reads.

A protocol may need a package of its own (gs: gcsfs; s3: s3fs); the error names it. What fails for a moment
is tried again, after 1, 2, 4 .. seconds, for two minutes in all.
Held by: tests/test_data_remote.py.
"""

import dataclasses
import errno
import io
import time
from collections.abc import Callable
from typing import Any, BinaryIO, TypeVar

import numpy as np
from absl import logging

from longctx.errors import ConfigError, RunError

T = TypeVar('T')
PAUSES = (1, 2, 4, 8, 16, 32, 64)   # seconds
AHEAD = 1 << 22   # bytes of a corpus that are read at once
LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


def is_url(path: str) -> bool:
  return '://' in path


def file_system(url: str, field: str) -> Any:
  """fsspec's file system of a URL; `field` is what the user gave it as."""
  import fsspec
  try:
    return fsspec.core.url_to_fs(url)[0]
  except (ImportError, ValueError) as e:
    raise ConfigError(f'{field}={url!r}: {e}') from e


def patiently(what: str, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
  """call(*args, **kwargs), again after a pause where it fails as a network does; RunError in the end.

  File systems have errors of their own for that: all are taken for passing but those that say what is wrong.
  """
  for pause in (*PAUSES, None):
    try:
      return call(*args, **kwargs)
    except (*LASTING, ValueError, NotImplementedError, RunError):
      raise
    except Exception as e:
      if str(e).startswith('Forbidden'):   # gcsfs has no error of its own for it
        raise PermissionError(errno.EACCES, str(e)) from e
      if pause is None:
        raise RunError(f'{what}: cannot be reached: {e}; tried for {sum(PAUSES)} s. Once it can, start the same '
                       'command again, which carries on from the last checkpoint') from e
      logging.warning('%s: %s; tried again in %d s', what, e, pause)
      time.sleep(pause)
  raise AssertionError


def put(fs: Any, path: str, url: str) -> None:
  """Copies a file to where others will read it."""
  try:
    patiently(url, fs.put_file, path, url)
  except FileNotFoundError:   # where folders are real
    fs.makedirs(url.rpartition('/')[0], exist_ok=True)
    patiently(url, fs.put_file, path, url)


class _Ranges(io.RawIOBase):
  """A file that is read a range at a time."""

  def __init__(self, url: str, size: int):
    self._url, self._size, self._at = url, size, 0

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
    self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
    return self._at

  def readinto(self, buffer: Any) -> int:
    stop = min(self._at + len(buffer), self._size)
    if stop <= self._at:
      return 0
    data = patiently(self._url, file_system(self._url, 'data.files').cat_file, self._url, start=self._at, end=stop)
    buffer[:len(data)] = data
    self._at += len(data)
    return len(data)


@dataclasses.dataclass(frozen=True)
class RemoteFile:
  """A file as it was listed."""

  url: str
  size: int      # bytes
  version: str   # another one for another content

  def open(self, mode: str = 'rb') -> BinaryIO:
    return io.BufferedReader(_Ranges(self.url, self.size), AHEAD)

  def __str__(self) -> str:
    return self.url


def _version(info: dict) -> str:
  """What a store says of a file's content; their names for it differ."""
  names = ('generation', 'etag', 'ETag', 'md5', 'mtime', 'updated', 'LastModified', 'created')
  return next((str(info[name]) for name in names if info.get(name)), '')


def find(pattern: str) -> list[RemoteFile]:
  """The files of a glob, sorted."""
  fs = file_system(pattern, 'data.files')
  listed = patiently(pattern, fs.glob, pattern, detail=True)
  return [RemoteFile(fs.unstrip_protocol(path), info['size'], _version(info))
          for path, info in sorted(listed.items()) if info['type'] == 'file']


class RemoteArray:
  """A file of numbers whose slices are read when they are asked for, each in one ranged read."""

  def __init__(self, url: str, dtype: str):
    self.url, self.dtype = url, np.dtype(dtype)

  def __getitem__(self, part: slice) -> np.ndarray:
    size = self.dtype.itemsize
    data = patiently(self.url, file_system(self.url, 'data.cache_dir').cat_file, self.url,
                     start=int(part.start) * size, end=int(part.stop) * size)
    return np.frombuffer(data, self.dtype)
