"""Runs handed one by one to processes that keep to a core each.

A line is given back as soon as its run ends: whatever is stopped, the runs in progress alone are lost. A
process that dies is replaced, and when this one dies its processes end too.
Held by: tests/test_arena.py.
"""

import collections
import contextlib
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import connection
from typing import Any, NamedTuple


class Done(NamedTuple):
  """A run with its line, or with why there is none."""

  run: dict
  line: dict | None
  error: str = ''


def serve(pipe: connection.Connection, core: int | None, one: Callable[[dict], dict]) -> None:
  """In the process: a run in, a line out, until nobody asks any more."""
  def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)
  threading.Thread(target=end_with_parent, daemon=True).start()
  if core is not None:
    os.sched_setaffinity(0, {core})   # before XLA starts its threads: one, then
  while True:
    try:
      run = pipe.recv()
    except EOFError:
      return
    try:
      pipe.send(Done(run, one(run)))
    except Exception as error:   # others may still go well
      pipe.send(Done(run, None, repr(error)))


class Worker:
  """A process and the runs of its unit that are left."""

  def __init__(self, core: int | None, one: Callable[[dict], dict]):
    context = multiprocessing.get_context('spawn')
    self.core, self.one = core, one
    self.pipe, theirs = context.Pipe()
    self.process = context.Process(target=serve, args=(theirs, core, one), daemon=True)
    self.process.start()
    theirs.close()   # its end is then closed when it dies
    self.left: collections.deque[dict] = collections.deque()
    self.run: dict | None = None

  def begin(self) -> None:
    self.run = self.left.popleft()
    with contextlib.suppress(OSError):   # it has died; `end` sees it
      self.pipe.send(self.run)

  def end(self) -> Done:
    try:
      return self.pipe.recv()
    except (EOFError, ConnectionError):
      self.process.join()
      return Done(self.run, None, f'its process ended with status {self.process.exitcode}')

  def renewed(self) -> 'Worker':
    """Itself, or one in its place if its process is gone."""
    if self.process.exitcode is None:
      return self
    other = Worker(self.core, self.one)
    other.left = self.left
    return other


def work_off(units: list[list[dict]], one: Callable[[dict], dict], cores: list[int | None],
             seconds: float = float('inf')) -> Iterator[Done]:
  """What comes of each run as it ends. A unit's runs are one process's, in their order; units begin in
  theirs. After so many seconds no run is begun, and those in progress are waited for."""
  stop, waiting = time.monotonic() + seconds, collections.deque(units)
  idle: list[Any] = [Worker(core, one) for core in cores[:len(units)]]
  busy: dict[connection.Connection, Worker] = {}
  while True:
    for worker in idle:
      if not worker.left and waiting:
        worker.left.extend(waiting.popleft())
      if worker.left and time.monotonic() < stop:
        worker.begin()
        busy[worker.pipe] = worker
      else:
        worker.pipe.close()
    if not busy:
      return
    idle = []
    for pipe in connection.wait(list(busy)):
      worker = busy.pop(pipe)
      yield worker.end()
      idle.append(worker.renewed())
