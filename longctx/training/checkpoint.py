"""Checkpoints: saved beside the training, whole or not at all, and restored bit for bit.

A checkpoint of step N is the folder N of the checkpoint directory:

    state/          every array of the state, by name (Orbax, OCDBT; the devices' shards as they lie)
    stream/         the data stream's state, one entry a process (JSON)
    meta/           what the run says of itself, the validation loss, and each array's type (JSON)
    manifest.json   size and SHA-256 of every file above

All is written into a temporary folder, the manifest last, and then renamed (saving.py): a process killed at
any instant leaves either no N or all of it. `restore_newest` verifies the manifest before it believes a
byte. Orbax copies the arrays to the host before `save` returns (on a CPU it holds on to the buffers,
which JAX then does not reuse), so that the next step may donate them.

Held by: tests/test_checkpoint.py (bits, donation, other meshes, damage of every file, a full disk,
SIGKILL while saving, two processes).
"""

import dataclasses
import functools
import json
import logging as python_logging
import math
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import logging

from longctx import files
from longctx.errors import ConfigError, RunError, check, check_range
from longctx.training import manifest, named_arrays, processes, saving

UNREADABLE = '.unreadable'  # suffix of folders that are no checkpoints any more


@dataclasses.dataclass(frozen=True)
class Restored:
  """What a checkpoint held."""

  step: int
  state: Any  # the structure, shardings and types of the abstract state that was asked for
  stream_state: Any  # of this process
  meta: dict


def best_of(losses: dict[int, float]) -> int | None:
  """The step of the lowest loss, the later one of two that are equal; None if there is none."""
  return min(losses, key=lambda step: (losses[step], -step), default=None)


class Checkpoints:
  """The checkpoints of one run. Every process of a distributed run makes the same calls.

  Keeps the last `keep_last`, and with `keep_best` the one of the lowest validation loss. Opened
  `read_only` it changes nothing on disk, and may look on while a run saves.
  """

  def __init__(self, directory: str | os.PathLike, *, keep_last: int = 1, keep_best: bool = False,
               read_only: bool = False):
    check_range('run.keep_last', keep_last, low=1)
    self.directory = Path(directory).absolute()
    self.read_only = read_only
    self.keep_last, self.keep_best = keep_last, keep_best
    self._save: saving.Save | None = None   # the one under way
    self._saving = 0    # its step
    self._failures: list[str] = []
    self.failing = False  # the last save that ended has failed
    if not read_only:
      self._make_directory()
    self._losses = {step: loss for step in self.steps()
                    if (loss := _loss_on_disk(self.directory / str(step), _patiently)) is not None}

  def _make_directory(self) -> None:
    try:
      files.patiently(str(self.directory), self._put_in_order)
    except OSError as e:
      raise ConfigError(f'{self.directory}: cannot make the folder of the checkpoints, or put it in '
                        f'order ({e.strerror}); give a workdir that you may write to') from e

  def _put_in_order(self) -> None:
    self.directory.mkdir(parents=True, exist_ok=True)
    self._settle_replaced()
    if jax.process_index() == 0:
      saving.clear(self.directory)

  @functools.cached_property
  def _handler(self) -> Any:
    """What writes arrays, made at its first use: its import takes half a second."""
    import orbax.checkpoint as ocp

    _quiet()
    # Weights and moments compress by a fifth, at twice the CPU time of writing them.
    return ocp.PyTreeCheckpointHandler(use_compression=False)

  # Saving.

  def save(self, step: int, state: Any, *, stream_state: Any, meta: dict,
           metrics: dict | None = None, force: bool = False) -> bool:
    """Starts to save; returns when the state's buffers may be donated.

    Waits for the save before. A failure (no room, no permission) is never raised: `poll` tells it.

    Args:
      step: its name.
      state: a pytree of arrays, typed PRNG keys among them.
      stream_state: this process's, as JSON can hold it.
      meta: as JSON can hold it.
      metrics: `validation_loss` decides which one is the best.
      force: a checkpoint of this step that exists gives way to this one, once this one is whole;
        else it is left as it is.
    Returns:
      False if it could not be started.
    """
    if self.read_only:
      raise ValueError(f'{self.directory} was opened read-only; save needs read_only=False')
    arrays, types = named_arrays.to_write(state)
    loss = (metrics or {}).get('validation_loss')
    loss = float(loss) if loss is not None and math.isfinite(loss) else None
    stream = {'processes': processes.gather(json.loads(json.dumps(stream_state)))}
    # Copies: both move on while they are written.
    about = json.loads(json.dumps({'meta': meta, 'types': types, 'validation_loss': loss}))
    self.wait()
    if not force and processes.of_first(self.has(step)):   # a listing may lag behind on one host
      return True
    if loss is not None:
      self._losses[step] = loss
    self._saving = step
    self._save = saving.Save(self.directory / str(step), self._handler, arrays, {'stream': stream, 'meta': about},
                             functools.partial(self._tidy, dict(self._losses)))
    outcome = self._save.start()
    if outcome.fault:
      self._ended(outcome)
    return not outcome.fault

  @property
  def is_saving(self) -> bool:
    """Whether a save is under way."""
    return self._save is not None and not self._save.done()

  def poll(self) -> list[str]:
    """The failures since the last call, of a save that ended meanwhile too; does not wait."""
    if not self.is_saving:
      self.wait()
    failures, self._failures = self._failures, []
    return failures

  def wait(self) -> None:
    """Returns when the save under way, if any, is on disk or has failed."""
    if self._save is not None:
      self._ended(self._save.wait())

  def close(self) -> None:
    self.wait()

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *exc) -> None:
    self.close()

  def _ended(self, outcome: saving.Outcome) -> None:
    step, self._save = self._saving, None
    self.failing = bool(outcome.fault)
    if outcome.fault:
      self._losses.pop(step, None)
      if (loss := _loss_on_disk(self.directory / str(step))) is not None:
        self._losses[step] = loss  # of the one that this should have replaced
      newest = self.newest()
      self._failures.append(f'could not save step {step}: {outcome.fault}; the last good checkpoint is '
                            f'{"none yet" if newest is None else f"step {newest}"}; training goes on')
    elif outcome.untidy:
      self._failures.append(f'saved step {step}, but could not tidy up after it: {outcome.untidy}')

  def _tidy(self, losses: dict[int, float]) -> None:
    """Leaves the last n and the best; by the first process, in the thread of a save."""
    self._settle_replaced()
    steps = self._steps_now()
    keep = set(steps[-self.keep_last:])
    if self.keep_best:
      keep.add(best_of({s: losses[s] for s in steps if s in losses}))
    for step in steps:
      if step not in keep:
        shutil.rmtree(self.directory / str(step))

  # Restoring.

  def steps(self) -> list[int]:
    """The steps on disk, whole ones and damaged ones, ascending; not one that is being written."""
    return files.patiently(str(self.directory), self._steps_now)

  def _steps_now(self) -> list[int]:
    """OSError, and no waiting, where the disk does not say."""
    if not self.directory.is_dir():
      return []
    return sorted(int(p.name) for p in self.directory.iterdir() if p.name.isdecimal())

  def newest(self) -> int | None:
    """The newest step on disk; None where there is none, or the disk does not say."""
    try:
      return max(self._steps_now(), default=None)
    except OSError:
      return None

  def has(self, step: int) -> bool:
    """Whether the disk says that it has this step."""
    try:
      return step in self._steps_now()
    except OSError:
      return False

  def best_step(self) -> int | None:
    """The step of the lowest validation loss on disk; None where none was measured."""
    return best_of({s: self._losses[s] for s in self.steps() if s in self._losses})

  def restore_newest(self, abstract_state: Any, *, partial: bool = False, below: int | None = None
                     ) -> Restored | None:
    """The newest checkpoint that can be read, with one warning for each newer one that cannot.

    Args:
      abstract_state: the state's structure, with a jax.ShapeDtypeStruct (or an array) for each
        array. Its sharding says where the array goes; one without is restored as a NumPy array.
      partial: read the arrays that `abstract_state` has and leave the others.
      below: only of earlier steps than this.
    Returns:
      None if there is no checkpoint at all. ConfigError if there are some and none can be read, or
      if it is of another model.
    """
    self.wait()
    unreadable = {}
    for step in reversed(processes.of_first([s for s in self.steps() if below is None or s < below])):
      restored, fault = self._try_restore(step, abstract_state, partial)
      if restored is not None:
        self._set_aside(unreadable)
        return restored
      unreadable[step] = fault
      logging.warning('checkpoint of step %d cannot be read: %s; trying the one before', step, fault)
    if unreadable:
      told = '; '.join(f'step {step}: {fault}' for step, fault in unreadable.items())
      raise ConfigError(f'{self.directory}: none of its checkpoints can be read ({told}); restore '
                        'them from a copy, or start afresh in another workdir')
    return None

  def restore_step(self, step: int, abstract_state: Any, *, partial: bool = False) -> Restored:
    """This very checkpoint, or ConfigError."""
    self.wait()
    steps = processes.of_first(self.steps())
    check(step in steps, f'{self.directory}: has no checkpoint of step {step}; it has '
          f'{", ".join(map(str, steps)) or "none"}')
    restored, fault = self._try_restore(step, abstract_state, partial)
    check(restored is not None, f'{self.directory}: the checkpoint of step {step} cannot be read '
          f'({fault}); choose another one of {", ".join(map(str, steps))}')
    return restored

  def _try_restore(self, step: int, abstract: Any, partial: bool) -> tuple[Restored | None, str]:
    folder = self.directory / str(step)
    if fault := _agreed(folder, manifest.fault(folder) if jax.process_index() == 0 else ''):
      return None, fault
    stream, about, fault = None, None, ''
    try:
      stream, about = (files.again(_read_json, folder, item) for item in ('stream', 'meta'))
    except (OSError, ValueError) as e:
      fault = _fault_of(e)
    if fault := _agreed(folder, fault):
      return None, fault
    named_arrays.check_types(folder, named_arrays.types(abstract), about['types'], partial)
    state = None
    try:
      _quiet()
      state = named_arrays.read(folder / 'state', abstract, partial)
    except Exception as e:  # tensorstore's errors have no common class
      fault = _fault_of(e)   # not tried again here: all processes read together
    if fault := _agreed(folder, fault):
      return None, fault
    stream_state = None if partial else _own(folder, stream['processes'])
    return Restored(step, state, stream_state, about['meta']), ''

  def _set_aside(self, unreadable: dict[int, str]) -> None:
    """Renames damaged checkpoints newer than the one restored: the run will save these steps again."""
    if self.read_only or not unreadable:
      return
    for step in unreadable:
      self._losses.pop(step, None)
      try:
        self._put_aside(step)
      except OSError as e:
        raise ConfigError(f'{self.directory}: cannot put the damaged checkpoint of step {step} aside '
                          f'({e.strerror}); let yourself write there, or remove it') from e

  def drop_after(self, step: int) -> None:
    """Removes the checkpoints of later steps: the run goes another way from here and saves them again."""
    self.wait()
    for later in processes.of_first([s for s in self.steps() if s > step]):
      self._losses.pop(later, None)
      self._put_aside(later)
      if jax.process_index() == 0:
        shutil.rmtree(self.directory / f'{later}{UNREADABLE}', ignore_errors=True)

  def _put_aside(self, step: int) -> None:
    aside = self.directory / f'{step}{UNREADABLE}'
    def move() -> None:
      shutil.rmtree(aside, ignore_errors=True)
      os.replace(self.directory / str(step), aside)
    if jax.process_index() == 0:
      files.patiently(str(aside), move)
    processes.barrier(f'{step}{UNREADABLE}')

  def _settle_replaced(self) -> None:
    """Drops what a new checkpoint of its step has replaced; brings back what none has."""
    if jax.process_index() == 0:
      for aside in self.directory.glob(f'*{saving.REPLACED}'):
        if aside.with_suffix('').exists():
          shutil.rmtree(aside, ignore_errors=True)
        else:
          os.replace(aside, aside.with_suffix(''))


def _read_json(folder: Path, item: str) -> dict:
  return json.loads((folder / item / 'metadata').read_bytes())


def _patiently(folder: Path, item: str) -> dict:
  return files.patiently(str(folder), _read_json, folder, item)


def _fault_of(e: Exception) -> str:
  """Why a checkpoint cannot be read; of a moment or not, which tensorstore tells by a number in its text."""
  if getattr(e, 'errno', None) in files.PASSING:
    return manifest.why(e)
  number = re.search(r'\[OS error (\d+)', str(e))
  passing = number and int(number.group(1)) in files.PASSING
  return f'{manifest.NOT_NOW} ({saving.reason(e)})' if passing else saving.reason(e)


def _agreed(folder: Path, fault: str) -> str:
  """The fault of the first process that has one, in all; RunError where another checkpoint must not take its place."""
  fault = processes.first_fault(fault)
  if manifest.NOT_NOW in fault:
    raise RunError(f'{folder}: {fault}; once it can, the same command carries on')
  return fault


def _loss_on_disk(folder: Path, read: Callable[[Path, str], dict] = _read_json) -> float | None:
  try:
    return read(folder, 'meta')['validation_loss']
  except (OSError, ValueError, KeyError, TypeError):
    return None  # damaged: `restore_newest` tells it, should it come to read this one


def _own(folder: Path, states: list) -> Any:
  if len(states) == jax.process_count():
    return states[jax.process_index()]
  # A stream that does not depend on the host carries on with any number of them.
  check(all(s == states[0] for s in states), f'{folder}: was saved by {len(states)} processes, and '
        f'{jax.process_count()} cannot carry on their data streams; run {len(states)} processes')
  return states[0]


def _quiet() -> None:
  """Whatever Orbax logs as an error it also raises, and then it is told here, in one line."""
  python_logging.getLogger('absl').addFilter(_not_orbax)
  python_logging.getLogger('asyncio').addFilter(_not_of_a_save)
  if not _before:
    _before.append(sys.unraisablehook)
    sys.unraisablehook = _quiet_hook


def _not_orbax(record: python_logging.LogRecord) -> bool:
  return (f'{os.sep}orbax{os.sep}' not in record.pathname
          or record.levelno >= python_logging.CRITICAL)


# Of the many writes of one checkpoint the first that fails is raised. Each of the others would print
# a traceback: its exception was never retrieved, or its event loop is closed as it ends.


def _not_of_a_save(record: python_logging.LogRecord) -> bool:
  said, raised = record.getMessage(), record.exc_info and record.exc_info[1]
  return 'never retrieved' not in said or not (
      isinstance(raised, OSError) or saving.PARTIAL in said or f'{os.sep}orbax{os.sep}' in said)


_before: list[Callable] = []   # the hook that Python had


def _quiet_hook(unraisable: Any) -> None:
  if str(unraisable.exc_value) != 'Event loop is closed':
    _before[0](unraisable)
