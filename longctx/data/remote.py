"""Files by URL: gs://, s3://, memory://, whatever fsspec reads.

A protocol may need a package of its own (gs: gcsfs; s3: s3fs); the error names it. What fails for a moment
is tried again, after 1, 2, 4 .. seconds, for two minutes in all.
Held by: tests/test_data_remote.py.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, BinaryIO, TypeVar

import numpy as np
from absl import logging

from longctx.errors import ConfigError, RunError

T = TypeVar('T')
PAUSES = (1, 2, 4, 8, 16, 32, 64)   # seconds
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
  """call(*args, **kwargs), again after a pause where it fails as a network does."""
  for pause in PAUSES:
    try:
      return call(*args, **kwargs)
    except LASTING:
      raise
    except OSError as e:
      logging.warning('%s: %s; tried again in %d s', what, e, pause)
      time.sleep(pause)
  return call(*args, **kwargs)


def put(fs: Any, path: str, url: str) -> None:
  """Copies a file to where others will read it."""
  try:
    patiently(url, fs.put_file, path, url)
  except FileNotFoundError:   # where folders are real
    fs.makedirs(url.rpartition('/')[0], exist_ok=True)
    patiently(url, fs.put_file, path, url)


@dataclasses.dataclass(frozen=True)
class RemoteFile:
  """A file as it was listed."""

  url: str
  size: int      # bytes
  version: str   # another one for another content

  def open(self, mode: str = 'rb') -> BinaryIO:
    return file_system(self.url, 'data.files').open(self.url, mode)

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
    fs = file_system(self.url, 'data.cache_dir')
    try:
      data = patiently(self.url, fs.cat_file, self.url, start=int(part.start) * size, end=int(part.stop) * size)
    except OSError as e:
      raise RunError(f'{self.url}: cannot be read any more: {e}; once it can, start the same command again, which '
                     'carries on from the last checkpoint') from e
    return np.frombuffer(data, self.dtype)
