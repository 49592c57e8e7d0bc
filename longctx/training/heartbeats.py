"""What the processes of a run tell each other each second: where they stand, by way of the coordinator.

Every process puts a line of JSON into the key-value store of JAX's coordination service, which lives in the
first process, and reads those of the others. No file system is asked, so a workdir may be a bucket, or a
disk that each host has for itself. Of more than NEAR processes the first alone reads all, and what it makes of
them is in its own line, which the others read.

A call to a coordinator that hangs lasts as long as it hangs, and one made while JAX aborts never returns. So a
thread of its own makes them all; who asks is told what was heard last, and for how long nothing was.
Held by: tests/test_watchdog.py (a stand-in for the client), tests/test_distributed.py (two processes).
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

BEAT = 1.0   # seconds between two lines
NEAR = 16    # processes that all read each other


class Heartbeats:
  """This process's line, and those of its peers.

  Args:
    client: of the coordination service; None: there are no peers, and nothing is done.
    run: a name that the processes of this run share.
    process, count: which of how many this is.
    says: where this process stands.
  """

  def __init__(self, client: Any, run: str, process: int, count: int, says: Callable[[], dict]):
    self._client, self._says = client, says
    self._folder = f'longctx/{run}/'
    self._key = f'{self._folder}{process}/beat'
    self.reads_all = process == 0 or count <= NEAR
    self._read = self._folder if self.reads_all else f'{self._folder}0/'
    self.peers = [i for i in range(count if self.reads_all else 1) if i != process] if client else []
    self._heard: dict[int, tuple[str, float]] = {}   # {process: (its line, since when it says so)}
    self._answered = time.monotonic()   # when the coordinator last was there
    self._refused = False               # whether it was not, the last time
    self._last: dict | None = None      # the last words
    self._wake, self._parted, self._closed = threading.Event(), threading.Event(), False
    self._thread = threading.Thread(target=self._beat, name='heartbeats', daemon=True)

  def start(self) -> None:
    if self._client:
      self._thread.start()

  def of(self, process: int) -> dict:
    """What a peer says ({}: nothing yet), with `silent`: seconds for which it has not been heard.

    The first process keeps the store, so its silence lasts until now; the others' as long as the store told.
    `refused`: it is the first, and its port is closed, or the way to it.
    """
    if process not in self._heard:
      return {}
    line, since = self._heard[process]
    now = time.monotonic() if process == 0 else self._answered
    return json.loads(line) | dict(silent=now - since, refused=process == 0 and self._refused)

  def part(self, seconds: float, close: bool = False, **last: Any) -> None:
    """Says the last words; returns when they are said, or after `seconds`. `close`: no beat follows."""
    if not self._client:
      return
    self._last, self._closed = last, close
    self._wake.set()
    if not self._refused and time.monotonic() - self._answered < 3 * BEAT:
      self._parted.wait(seconds)

  def _beat(self) -> None:
    while True:
      last, closed = self._last, self._closed
      line = self._says() | dict(host=socket.gethostname(), pid=os.getpid(), time=time.time()) | (last or {})
      try:
        self._client.key_value_set(self._key, json.dumps(line), allow_overwrite=True)
        self._hear(self._client.key_value_dir_get(self._read))
        self._refused = False
      except RuntimeError:   # jax.errors.JaxRuntimeError: unavailable
        self._refused = True
      if last is not None:
        self._parted.set()
      if closed:
        return
      self._wake.wait(BEAT)
      self._wake.clear()

  def _hear(self, found: list[tuple[str, str]]) -> None:
    now = time.monotonic()
    for key, line in found:
      process = int(key.removeprefix(self._folder).split('/')[0])
      if self._heard.get(process, ('', 0.0))[0] != line:
        self._heard[process] = line, now
    self._answered = now
