"""The processes of a run watch themselves and each other: who is lost or stands still is named, and the run ends.

Each second every process says where it stands (step, phase), and hears the others: heartbeats.py.

    lost      a peer that has not been heard for LOST seconds (three times as long in phases that may last: its
              interpreter may be held), or that left with an error, while this process has not moved for GRACE
              seconds; GRACE seconds of silence are enough where the connection to it failed, or a collective,
              here or in another process: who has an error says so before it leaves
    hung      this process has not moved for `seconds` (ten times as long in phases that may last, and in its
              first step); nor for five times as long as it stood in this phase before and then went on, so
              that steps which take hours are let be once one has ended. Time in which it was itself stopped does
              not count

Then each process says where all of them stand, and ends at once with the exit status TEMPORARY: the same
command, started again, carries on. At once, because leaving in order would wait for the lost one. The first
process ends last: with it goes the service by which they hear each other. Should the first itself be killed,
JAX aborts the others in the same instant; a handler of SIGABRT, called by the thread that aborts, lets them
speak as well. A run of one process has no peers, and is watched all the same. Not noticed, in that one:
a call that hangs and never lets another thread of Python run.
Held by: tests/test_watchdog.py, tests/test_distributed.py (two processes), tests/test_faults.py (four).
"""

import ctypes
import faulthandler
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from longctx.errors import ConfigError, RunError
from longctx.training import heartbeats, processes
from longctx.training.badput import Ledger

TEMPORARY = 75     # sysexits.h, EX_TEMPFAIL
GRACE = 5.0        # seconds that a process which cannot go on waits, for the others to say the same
LOST = 20.0        # seconds without a beat; thrice that is below those after which JAX kills all, 100
MAY_LAST = ('start', 'compile', 'evaluation', 'checkpoints')
AS_BEFORE = 5.0    # times as long as it once took

_runs = itertools.count()   # a run's name; all processes begin the same runs


class Watchdog:
  """`with Watchdog(...)`: watches in a thread.

  Args:
    ledger: what this process does.
    seconds: how long it may stand still; 0: for ever, and only lost peers are looked for.
    process, count: which of how many this is.
    client: of the coordination service; None: no peers are heard.
    run: a name that the processes of this run share.
  """

  def __init__(self, ledger: Ledger, seconds: float, *, process: int = 0, count: int = 1, client: Any = None,
               run: str = ''):
    self.ledger, self.seconds, self.process = ledger, seconds, process
    self._beats = heartbeats.Heartbeats(client, run, process, count,
                                        lambda: dict(step=ledger.step, phase=ledger.phase, failed=self._failed))
    self.enabled = bool(seconds or self._beats.peers)
    self._moves, self._stood, self._looked = -1, 0.0, time.monotonic()
    self._phase, self._longest = ledger.phase, dict[str, float]()   # {phase: seconds that it stood there and went on}
    self._failed = ''   # an error of this process, which has not left for it yet
    self._over, self._ending = threading.Event(), threading.Lock()
    self._thread = threading.Thread(target=self._watch, name='watchdog', daemon=True)

  def __enter__(self) -> 'Watchdog':
    if self.enabled:
      self._beats.start()
      self._thread.start()
    if self._beats.peers:
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
    if self._beats.peers and isinstance(error, Exception) and not isinstance(error, ConfigError | RunError):
      self._explain(told)
    self._over.set()
    self._thread.join()
    if self._beats.peers:
      ctypes.CDLL(None).signal(signal.SIGABRT, None)   # as it was: the default
    self._beats.part(GRACE, close=True, left=True, error=told)

  def _watch(self) -> None:
    while not self._over.wait(heartbeats.BEAT):
      still = self._still()
      if still > GRACE and (lost := self._lost()):
        self._end(lost)
      if self.seconds and still > self._limit():
        self._end(f'run.watchdog_seconds={self.seconds:g}: nothing has moved in process {self.process} for '
                  f'{still:.0f} s, in {self.ledger.phase!r} (if it may take that long, give more, or 0)', hung=True)

  def _still(self) -> float:
    """Seconds of its own for which this process has not moved: one that is suspended does not see them all."""
    now = time.monotonic()
    moved = self.ledger.moves != self._moves
    if moved:
      self._longest[self._phase] = max(self._stood, self._longest.get(self._phase, 0.0))
      self._phase = self.ledger.phase
    self._stood = 0.0 if moved else self._stood + min(now - self._looked, 3 * heartbeats.BEAT)
    self._moves, self._looked = self.ledger.moves, now
    return self._stood

  def _limit(self) -> float:
    """Seconds for which it may stand where it is."""
    may_last = self.ledger.phase in MAY_LAST or not self.ledger.stepped
    return max(self.seconds * (10 if may_last else 1), AS_BEFORE * self._longest.get(self.ledger.phase, 0.0))

  def _lost(self, alike: str = '', failed: bool = False) -> str:
    """Which peer is gone, and where it was last; '' if all are there.

    One that left with an error, but `alike`, is gone too, where no other is; of one that ended the run
    it is the reason that it gave. `failed`: something here has, as it does when a peer is gone.
    """
    heard = {process: said for process in self._beats.peers if (said := self._beats.of(process))}   # who is here
    failed = failed or any(said.get('failed') for said in heard.values())
    left = ''
    for process, said in heard.items():
      if said.get('left'):
        if said['error'] and said['error'] != alike:
          told = f'process {process} left with an error {_where(said)}: {said["error"]}'
          left = left or (said['error'] if said.get('ended') else told)
      elif said['silent'] > (GRACE if failed or said['refused'] else LOST * (3 if said['phase'] in MAY_LAST else 1)):
        return f'process {process} is lost: no sign of it for {said["silent"]:.0f} s {_where(said)}'
    return left

  def _explain(self, error: str) -> None:
    """Ends the run if the error here comes of a lost peer; returns if none is found in time.

    Where the first process alone hears all, it is told of the error, and it is for it to say.
    """
    self._failed = error
    deadline = time.monotonic() + (2 * GRACE if self._beats.reads_all else LOST + 2 * heartbeats.BEAT)
    while time.monotonic() < deadline:
      if lost := self._lost(error, failed=True):
        self._end(lost)
      time.sleep(heartbeats.BEAT / 4)

  def _end(self, reason: str, hung: bool = False) -> None:
    if not self._ending.acquire(timeout=8 * GRACE):   # never released: of two threads one speaks, if it can
      os._exit(TEMPORARY)
    self._over.set()
    lines = [f'longctx: {reason}; the run ends, and the same command carries on', 'where the processes stood:',
             f'  process {self.process}: step {self.ledger.step}, {self.ledger.phase} (said this)']
    lines += [f'  process {peer}: {_stands(self._beats.of(peer))}' for peer in self._beats.peers]
    sys.stderr.write('\n'.join([*lines, '']))   # at once: others speak on the same stream
    sys.stderr.flush()
    if hung:   # what its threads wait for is worth a look
      faulthandler.dump_traceback(sys.__stderr__)
    self._beats.part(GRACE, left=True, ended=True, error=reason[:200])
    _in_time(lambda: self.ledger.event('ended', why=reason))
    _in_time(self.ledger.write)
    deadline = time.monotonic() + 3 * GRACE
    while self.process == 0 and time.monotonic() < deadline and any(map(self._is_here, self._beats.peers)):
      time.sleep(heartbeats.BEAT / 4)   # the others speak first
    os._exit(TEMPORARY)

  def _is_here(self, peer: int) -> bool:
    said = self._beats.of(peer)
    return bool(said) and not (said.get('left') or said['silent'] > GRACE)

  def _aborted(self, number: int) -> None:
    """In the C++ thread that aborts: speaks, where a peer is lost; else the abort goes on."""
    del number
    signal.alarm(int(8 * GRACE) + 1)   # should the interpreter be held for good
    self._explain('')


def watch(ledger: Ledger, seconds: float) -> Watchdog:
  """The watchdog of this process among those of its run; all make this call."""
  return Watchdog(ledger, seconds, process=jax.process_index(), count=jax.process_count(),
                  client=processes.coordinator(), run=str(next(_runs)))


def _in_time(call: Callable[[], None]) -> None:
  """call(), which is left behind where it takes too long: what hangs may be the disk."""
  thread = threading.Thread(target=call, daemon=True)
  thread.start()
  thread.join(GRACE)


def _where(said: dict) -> str:
  return f'at step {said.get("step")}, {said.get("phase")} ({said.get("host")}, pid {said.get("pid")})'


def _stands(said: dict) -> str:
  if not said:
    return 'not heard'
  if said.get('left'):
    return f'left at step {said.get("step")} {said.get("error", "")}'.rstrip()
  quiet = '' if said['silent'] < 3 * heartbeats.BEAT else f', silent for {said["silent"]:.0f} s'
  return f'step {said.get("step")}, {said.get("phase")} ({said.get("host")}, pid {said.get("pid")}){quiet}'
