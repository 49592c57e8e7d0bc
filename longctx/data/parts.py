"""What a token cache is made of: parts, and their building by several processes of a host.

Held by: tests/test_data_cache.py, tests/test_data_remote.py.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np

from longctx import progress
from longctx.errors import ConfigError

POLL = 1.0      # seconds between looks at what others have built


@dataclasses.dataclass(frozen=True)
class Part:
  """The tokens of a source's part."""

  tokens: Any   # [total + 1], an array or what gives its slices, the last one is SEP
  offsets: np.ndarray   # [documents + 1]
  meta: dict


class Job:
  """A part that is to be built; what another process can be sent.

  Args:
    place: Disk or Bucket.
    name: the part's.
    write: makes its files in a folder, and gives its meta data.
  """

  def __init__(self, place: Any, name: str, write: Callable[[pathlib.Path], dict]):
    self.place, self.name, self._write = place, name, write

  def __call__(self, wait: bool) -> None:
    self.place.build(self.name, self._write, wait)


def _tried(job: Job) -> None:
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


def side_by_side(jobs: Sequence[Job], processes: int) -> None:
  """Does them in processes of their own, but for what is there, and what another process is doing."""
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


def encoded(meta: dict) -> bytes:
  return json.dumps(meta, indent=1).encode()


@contextlib.contextmanager
def synced(path: pathlib.Path) -> Iterator:
  """A file that is on the disk when the block ends."""
  with open(path, 'wb') as file:
    yield file
    file.flush()
    os.fsync(file.fileno())
