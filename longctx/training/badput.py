"""Where a run's time went, over all its starts: steps that count, and everything else.

    steps         training steps that were kept         input        a batch that the devices wait for
    compile       compiling the step                    evaluation   held-out loss
    checkpoints   the part of saving that a step waits for
    start         imports, the model, reading the checkpoint
    lost          steps and input of work that was done again, or given up
    down          from the last word of one start to the process of the next: the rest of what a kill cost

W/badput.json holds the seconds of each, kept by the first process, whole at any instant; W/events.jsonl
has a line for each thing that went wrong. Of a process that was killed, what it did since it last wrote
counts as down; how long lost steps took is known by the mean of their start.
Held by: tests/test_badput.py.
"""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longctx import files
from longctx.training.metrics import append, process_seconds, refusal_is_told
from longctx.training.workdir import atomic_write

NAME, EVENTS = 'badput.json', 'events.jsonl'
PHASES = ('steps', 'compile', 'input', 'evaluation', 'checkpoints', 'start', 'lost', 'down')
TRAINING = ('steps', 'input')   # what a step that is lost has cost
EVERY = 5.0   # seconds between two writes
COUNTS = ('starts', 'lost_steps', 'skipped_steps', 'rollbacks', 'failed_saves')


class Ledger:
  """What this process does (`phase`, `step`), for how long it has, and the file of all starts.

  `enabled` is False on all processes but one: they keep their own time and write nothing.
  """

  def __init__(self, folder: str, enabled: bool = True):
    self.folder, self.enabled = Path(folder), enabled
    self.phase, self.step = 'start', 0
    self.stepped = False      # whether a step of this process has ended
    self.moves = 0            # of phase, of step, within a phase: the same number twice is a standstill
    self._since = time.monotonic()
    self._own = dict.fromkeys(PHASES, 0.0) | {'start': process_seconds()}
    self._trained = 0.0
    self._before = dict.fromkeys(PHASES, 0.0)   # of the starts before this one
    self._counts = dict.fromkeys(COUNTS, 0) | {'starts': 1}
    self._first = 0           # the step that this process began with
    if enabled:
      self._read()

  # What happens now.

  @contextlib.contextmanager
  def doing(self, phase: str) -> Iterator[None]:
    before = self.phase
    self.turn(phase)
    try:
      yield
    finally:
      self.turn(before)

  def turn(self, phase: str, hidden: bool = False) -> None:
    """From here on the time is of `phase`; and so is what went before, where that is `hidden` by it."""
    now = time.monotonic()
    counted = phase if hidden else self.phase
    self._own[counted] += now - self._since
    self._trained += (now - self._since) * (counted in TRAINING)
    self.phase, self._since, self.moves = phase, now, self.moves + 1

  def reach(self, step: int) -> None:
    self.step, self.moves = step, self.moves + 1

  def tick(self) -> None:
    """What is done goes on, in the same phase and step."""
    self.moves += 1

  def training_seconds(self) -> float:
    """Of this process, in steps and in waiting for their input; lost ones too."""
    return self._trained + (time.monotonic() - self._since) * (self.phase in TRAINING)

  # What went wrong.

  def begin(self, step: int) -> None:
    """This process begins with `step`: what those before did beyond it is lost."""
    self._lose(self._before, self._kept_before, max(0, self._reached - step))
    self.step = self._first = step

  def roll_back(self, step: int, why: str) -> None:
    """From `self.step` back to `step`, in this process or to before it."""
    self.turn(self.phase)
    within = self.step - max(step, self._first)
    self._lose(self._own, self.step - self._first, within)
    self._lose(self._before, self._first, max(0, self._first - step))
    self.event('rollback', back_to=step, why=why)
    self._counts['rollbacks'] += 1
    self._first = min(self._first, step)
    self.reach(step)

  def count(self, name: str, what: str = '', **more: Any) -> None:
    """One more of COUNTS, and its event."""
    self._counts[name] += 1
    self.event(what or name, **more)

  def event(self, what: str, **more: Any) -> None:
    """A line of events.jsonl; while the disk refuses them they wait, for the next or for `write`."""
    if self.enabled:
      self._events += json.dumps(dict(step=self.step, what=what) | more | dict(time=round(time.time(), 3))) + '\n'
      self._tell_events()

  _events = ''   # that wait

  def _tell_events(self) -> None:
    if self._events:
      with refusal_is_told(f'{self.folder / EVENTS}: lines wait for room'):
        append(self.folder / EVENTS, self._events.encode())
        self._events = ''

  def _lose(self, seconds: dict[str, float], kept: int, lost: int) -> None:
    if not lost:
      return
    self._counts['lost_steps'] += lost
    part = min(1.0, lost / max(kept, lost))
    for phase in TRAINING:
      seconds['lost'] += part * seconds[phase]
      seconds[phase] *= 1 - part

  # The file.

  def _read(self) -> None:
    try:
      found = json.loads(files.again((self.folder / NAME).read_bytes))
      self._before |= {phase: float(found['seconds'][phase]) for phase in PHASES}
      self._counts |= {name: int(found[name]) for name in COUNTS}
      reached, written = int(found['step']), float(found['written'])
    except (OSError, ValueError, KeyError, TypeError):   # none yet, or damaged: a new account
      return
    self._reached = self._kept_before = reached
    self._counts['starts'] += 1
    if not found.get('finished'):   # else nobody waited
      began = time.time() - self._own['start']
      self._before['down'] += max(0.0, began - written)

  _reached = _kept_before = 0

  def keep(self) -> None:
    """Writes, where the last time is some seconds ago."""
    if time.monotonic() - self._written > EVERY:
      self.write()

  _written = 0.0

  def write(self, finished: bool = False) -> None:
    self._written = time.monotonic()
    if self.enabled:
      self._tell_events()
      self.turn(self.phase)
      with refusal_is_told(f'{self.folder / NAME}'):
        atomic_write(self.folder / NAME, (json.dumps(
            self.account() | dict(finished=finished, written=time.time()), indent=2) + '\n').encode())

  def account(self) -> dict:
    """Seconds by phase, their sum's part in steps, counts."""
    seconds = {phase: round(self._before[phase] + self._own[phase], 3) for phase in PHASES}
    total = sum(seconds.values())
    return dict(seconds=seconds, goodput=round(seconds['steps'] / total, 4) if total else 0.0,
                step=self.step, **self._counts)

  def table(self) -> str:
    """The account for a reader: seconds and part of each phase, and one line of what went wrong."""
    account = self.account()
    total = sum(account['seconds'].values()) or 1.0
    lines = ['where the time went      seconds    part']
    lines += [f'{phase:<21} {seconds:>10,.1f} {seconds / total:>6.1%}'
              for phase, seconds in account['seconds'].items() if seconds > 0]
    told = [f'{account[name]:,} {said}' for name, said in (
        ('starts', 'starts'), ('lost_steps', 'steps lost'), ('skipped_steps', 'skipped'),
        ('rollbacks', 'returns to a checkpoint'), ('failed_saves', 'failed saves'))
        if account[name] > (name == 'starts')]
    return '\n'.join([*lines, ', '.join(told)] if told else lines)
