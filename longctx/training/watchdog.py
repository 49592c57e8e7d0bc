"""The processes of a run watch each other: who is lost or stands still is named, and the run ends.

Every process keeps W/heartbeats/<process>.json: where it stands (step, phase), written each second by a
thread, and locked by the process. The kernel drops the lock with the process, SIGKILL included; where the
file system knows no locks, or the host itself is gone, a beat that does not change for LOST seconds tells.

    lost      a peer whose lock is free or whose beat stands still, or that left with an error, while
              this process has not moved for GRACE seconds
    hung      this process has not moved for `seconds` (ten times as long in phases that may last)

Then each process says where all of them stand, and ends at once with the exit status TEMPORARY: the same
command, started again, carries on. At once, because leaving in order would wait for the lost one. The first
process ends last: with it goes the service that keeps the others alive. Should the first itself be killed,
JAX aborts the others in the same instant; a handler of SIGABRT, called by the thread that aborts, lets them
speak as well.
Held by: tests/test_watchdog.py, tests/test_faults.py (four processes).
"""

import contextlib
import ctypes
import faulthandler
import fcntl
import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import jax

from longctx.errors import ConfigError, RunError
from longctx.training import processes
from longctx.training.badput import Ledger

TEMPORARY = 75     # sysexits.h, EX_TEMPFAIL
FOLDER = 'heartbeats'
BEAT = 1.0         # seconds between beats
GRACE = 5.0        # seconds that a process which cannot go on waits, for the others to say the same
LOST = 60.0        # seconds without a beat: below those after which JAX kills all, 100
SIZE = 512         # bytes of a beat: one write
MAY_LAST = ('start', 'compile', 'evaluation')


class Beat:
  """One process's file: its own, held and written; or a peer's, read."""

  def __init__(self, folder: Path, process: int):
    self.path, self.process = folder / f'{process}.json', process
    self._fd: int | None = None
    self._locked = False
    self._text, self._changed = b'', time.monotonic()   # what a peer last said, and since when

  def hold(self) -> None:
    """Takes the file, where the file system knows locks."""
    self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
    for _ in range(20):
      try:
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._locked = True
        return
      except BlockingIOError:   # one of the run before is just looking
        time.sleep(BEAT / 20)
      except OSError:
        return

  def write(self, **said: Any) -> None:
    line = json.dumps(said | dict(locked=self._locked, host=socket.gethostname(), pid=os.getpid(),
                                  time=time.time()))
    with contextlib.suppress(OSError):   # a full disk: the lock still tells
      os.pwrite(self._fd, line.encode().ljust(SIZE), 0)

  def release(self) -> None:
    if self._fd is not None:
      os.close(self._fd)
      self._fd = None

  def look(self, run: str) -> dict:
    """What a peer says in this run ({}: nothing yet), with `silent`: seconds since it last changed."""
    try:
      text = self.path.read_bytes()
      said = json.loads(text)
    except (OSError, ValueError):
      text, said = b'', {}
    if text != self._text:
      self._text, self._changed = text, time.monotonic()
    return said | dict(silent=time.monotonic() - self._changed) if said.get('run') == run else {}

  def free(self) -> bool:
    """Whether nobody holds a peer's file."""
    with open(self.path, 'rb') as file:
      try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
      except OSError:
        return False
    return True


class Watchdog:
  """`with Watchdog(...)`: beats and watches in a thread. Of a run of one process it does nothing.

  Args:
    folder: the workdir, which all processes see.
    ledger: what this process does.
    seconds: how long a process may stand still; 0: it may for ever, and only lost ones are looked for.
    process, count: which of how many this is.
    run: a name that the processes of this start share; older files are not of it.
  """

  def __init__(self, folder: str, ledger: Ledger, seconds: float, *, process: int, count: int, run: str):
    self.ledger, self.seconds, self.process, self.run = ledger, seconds, process, run
    self.enabled = count > 1
    self._folder = Path(folder) / FOLDER
    self._own = Beat(self._folder, process)
    self._peers = [Beat(self._folder, i) for i in range(count) if i != process]
    # Of many each reads two files a beat, and not all: the first looks at all, and tells the others.
    near = (0, (process + 1) % count)
    self._watched = [peer for peer in self._peers if count <= 16 or process == 0 or peer.process in near]
    self._moved, self._moves = time.monotonic(), -1
    self._over, self._ending = threading.Event(), threading.Lock()
    self._thread = threading.Thread(target=self._watch, name='watchdog', daemon=True)

  def __enter__(self) -> 'Watchdog':
    if self.enabled:
      self._folder.mkdir(parents=True, exist_ok=True)
      self._own.hold()
      self._beat()
      self._thread.start()
      # Not Python's `signal`, whose handlers wait for a main thread that is stuck in a collective.
      self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)
      ctypes.CDLL(None).signal(signal.SIGABRT, self._handler)
    return self

  def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
    del traceback
    if not self.enabled:
      return
    told = f'{kind.__name__}: {" ".join(str(error).split())[:200]}' if kind else ''
    # Such as a collective's, whose other end is gone; what all processes raise alike explains itself.
    if isinstance(error, Exception) and not isinstance(error, ConfigError | RunError):
      self._explain(told)
    self._over.set()
    self._thread.join()
    ctypes.CDLL(None).signal(signal.SIGABRT, None)   # as it was: the default
    self._beat(left=True, error=told)
    self._own.release()

  def _beat(self, **more: Any) -> None:
    self._own.write(run=self.run, step=self.ledger.step, phase=self.ledger.phase, **more)

  def _watch(self) -> None:
    while not self._over.wait(BEAT):
      self._beat()
      still = self._still()
      if still > GRACE and (lost := self._lost()):
        self._end(lost)
      limit = self.seconds * (10 if self.ledger.phase in MAY_LAST else 1)
      if limit and still > limit:
        self._end(f'run.watchdog_seconds={self.seconds:g}: nothing has moved in process {self.process} for '
                  f'{still:.0f} s, in {self.ledger.phase!r}')

  def _still(self) -> float:
    """Seconds since this process changed its phase or ended a step."""
    if self.ledger.moves != self._moves:
      self._moves, self._moved = self.ledger.moves, time.monotonic()
    return time.monotonic() - self._moved

  def _lost(self, alike: str = '') -> str:
    """Which peer is gone, and where it was last; '' if all are there.

    One that left with an error, but `alike`, is gone too, where no other is; of one that ended the run
    it is the reason that it gave.
    """
    left = ''
    for peer in self._watched:
      said = peer.look(self.run)
      if not said:
        continue   # not here yet
      if said.get('left'):
        if said['error'] and said['error'] != alike:
          told = f'process {peer.process} left with an error {_where(said)}: {said["error"]}'
          left = left or (said['error'] if said.get('ended') else told)
      elif said['locked'] and peer.free():
        return f'process {peer.process} is lost: it ended {_where(said)}'
      elif said['silent'] > LOST:
        return f'process {peer.process} is lost: no sign of it for {said["silent"]:.0f} s {_where(said)}'
    return left

  def _explain(self, error: str) -> None:
    """Ends the run if the error here comes of a lost peer; returns if none is found in time."""
    deadline = time.monotonic() + GRACE
    while time.monotonic() < deadline:
      if lost := self._lost(error):
        self._end(lost)
      time.sleep(BEAT / 4)

  def _end(self, reason: str) -> None:
    self._ending.acquire()   # never released: of two threads that have come to this one speaks
    self._over.set()
    lines = [f'longctx: {reason}; the run ends, and the same command carries on', 'where the processes stood:',
             f'  process {self.process}: step {self.ledger.step}, {self.ledger.phase} (said this)']
    lines += [f'  process {peer.process}: {_stands(peer.look(self.run))}' for peer in self._peers]
    print('\n'.join(lines), file=sys.stderr, flush=True)
    if not self._lost():   # nobody is gone: what its threads wait for is worth a look
      faulthandler.dump_traceback(sys.__stderr__)
    self._beat(left=True, ended=True, error=reason[:200])
    self.ledger.event('ended', why=reason)
    self.ledger.write()
    sys.stdout.flush()
    deadline = time.monotonic() + 3 * GRACE
    while self.process == 0 and time.monotonic() < deadline and any(map(self._is_here, self._peers)):
      time.sleep(BEAT / 4)   # the others speak first
    os._exit(TEMPORARY)

  def _is_here(self, peer: Beat) -> bool:
    said = peer.look(self.run)
    return bool(said) and not (said.get('left') or said['silent'] > GRACE or (said['locked'] and peer.free()))

  def _aborted(self, number: int) -> None:
    """In the C++ thread that aborts: speaks, where a peer is lost; else the abort goes on."""
    del number
    signal.alarm(int(6 * GRACE) + 1)   # should the interpreter be held for good
    if lost := self._lost():
      self._end(lost)


def watch(folder: str, ledger: Ledger, seconds: float) -> Watchdog:
  """The watchdog of this process among those of its run; all make this call."""
  return Watchdog(folder, ledger, seconds, process=jax.process_index(), count=jax.process_count(),
                  run=processes.of_first(uuid.uuid4().hex))


def _where(said: dict) -> str:
  return f'at step {said.get("step")}, {said.get("phase")} ({said.get("host")}, pid {said.get("pid")})'


def _stands(said: dict) -> str:
  if not said:
    return 'not seen in this run'
  if said.get('left'):
    return f'left at step {said.get("step")} {said.get("error", "")}'.rstrip()
  quiet = '' if said['silent'] < 3 * BEAT else f', silent for {said["silent"]:.0f} s'
  return f'step {said.get("step")}, {said.get("phase")} ({said.get("host")}, pid {said.get("pid")}){quiet}'
