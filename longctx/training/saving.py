"""One save of a checkpoint, beside the training: whole for all processes, or for none of them.

    each process    writes its shards of the arrays (Orbax), and says whether it could
    the first       hears all. If all could: joins the shards, writes the rest, the manifest last, and renames
                    the folder; else removes it. Tidies up, and says what became of it
    each process    hears that, and takes it for its own

So a save fails everywhere, and soon, where a disk is full or a bucket away for one process alone; at the
barriers of Orbax's own manager the others would wait for that one for 20 minutes. What the processes say goes
through the coordinator, since collectives are the training's.

Held by: tests/test_checkpoint.py (two processes, each failing at each place that writes).
"""

import asyncio
import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax

from longctx.training import manifest, processes

PARTIAL = '.partial'     # suffix of a checkpoint that is not whole yet
REPLACED = '.replaced'   # of one whose step is saved anew
STATE = 'state'          # the folder of the arrays; others have one JSON file each
METADATA = f'{STATE}/array_metadatas'   # for which Orbax's handler waits 10 minutes, if the first process fails


class Outcome(NamedTuple):
  """Of a save, the same in all processes."""

  fault: str    # why there is no checkpoint; '': there is
  untidy: str   # what failed when it was there


class Save:
  """A save under way, from `start` on.

  Args:
    folder: the checkpoint's.
    handler: Orbax's, which writes the arrays.
    arrays: by name.
    files: {folder in it: what its JSON file says}, which the first process writes.
    tidy: what the first process does at last, whether the checkpoint is there or not.
  """

  def __init__(self, folder: Path, handler: Any, arrays: dict[str, Any], files: dict[str, Any],
               tidy: Callable[[], None]):
    self._folder, self._partial = folder, folder.with_name(f'{folder.name}{PARTIAL}')
    self._handler, self._arrays, self._files, self._tidy = handler, arrays, files, tidy
    self._talk = processes.Aside()
    self._writing: list[Any] = []   # what writes the arrays, and is to be waited for
    self._fault = ''                # of this process
    self._outcome = Outcome('', '')
    self._thread = threading.Thread(target=self._run, name='save', daemon=True)

  def start(self) -> Outcome:
    """Returns when the arrays' buffers may be donated. With a fault: nothing was begun, and `wait` is not for it."""
    fault = _fault_of(self._make_folders) if jax.process_index() == 0 else ''
    if fault := processes.first_fault(fault):
      return Outcome(fault, '')
    self._fault = _fault_of(self._begin)
    self._arrays = {}
    self._thread.start()
    return Outcome('', '')

  def done(self) -> bool:
    return not self._thread.is_alive()

  def wait(self) -> Outcome:
    self._thread.join()
    return self._outcome

  def _make_folders(self) -> None:
    clear(self._partial.parent)
    self._partial.parent.mkdir(parents=True, exist_ok=True)   # somebody may have moved it away
    for name in (METADATA, *self._files):
      (self._partial / name).mkdir(parents=True)

  def _begin(self) -> None:
    import orbax.checkpoint as ocp
    from etils import epath

    call = self._handler.async_save(epath.Path(self._partial / STATE), args=ocp.args.PyTreeSave(self._arrays))
    with ThreadPoolExecutor(1) as thread:   # the caller's may have an event loop of its own
      self._writing = thread.submit(asyncio.run, call).result() or []

  def _run(self) -> None:
    for writing in self._writing:   # all of them: none writes any more when the folder is renamed or removed
      self._fault = _fault_of(writing.result) or self._fault
    try:
      told = self._talk.gather(self._fault)
      fault, untidy = _first(told), ''
      if jax.process_index() == 0:
        fault = fault or _first([_fault_of(self._finish)])
        untidy = _fault_of(self._leave_in_order)
      self._outcome = Outcome(*self._talk.gather([fault, untidy])[0])
    except Exception as e:   # the coordinator is gone, and this run will end
      self._outcome = Outcome(reason(e), '')

  def _leave_in_order(self) -> None:
    clear(self._partial.parent)   # what failed may hold the room that the next one needs
    self._tidy()

  def _finish(self) -> None:
    from etils import epath

    self._handler.finalize(epath.Path(self._partial / STATE))
    for name, content in self._files.items():
      _write_json(self._partial / name / 'metadata', content)
    manifest.write(self._partial)
    if self._folder.exists():
      os.replace(self._folder, self._folder.with_name(f'{self._folder.name}{REPLACED}'))
    os.rename(self._partial, self._folder)


def clear(directory: Path) -> None:
  """Deletes what saves that failed, or were killed, left in the checkpoints' folder; while none is under way.

  One call may be too early: where an array could not be written, others of its save are still being written
  when its error comes, and make their folder anew.
  """
  for folder in directory.glob(f'*{PARTIAL}'):
    shutil.rmtree(folder, ignore_errors=True)


def _write_json(path: Path, content: Any) -> None:
  path.write_text(json.dumps(content))


def _fault_of(call: Callable[[], Any]) -> str:
  """call(), and what went wrong."""
  try:
    call()
  except Exception as e:   # tensorstore's errors have no common class
    return reason(e)
  return ''


def _first(faults: list[str]) -> str:
  """The first fault, with its process where there are several."""
  return next((f'process {i}: {fault}' if jax.process_count() > 1 else fault
               for i, fault in enumerate(faults) if fault), '')


def reason(error: BaseException) -> str:
  """An error in a few words."""
  text = ' '.join(str(error).split())
  if isinstance(error, OSError) and error.strerror:
    text = f'{error.strerror}: {error.filename}' if error.filename else error.strerror
  if len(text) > 300:   # tensorstore tells the system's error somewhere among paths of any length
    system = re.search(r'\[OS error [^\]]*\]', text)
    text = f'{text[:80]} ... {system.group() if system else text[-200:]}'
  return f'{text} ({type(error).__name__})' if text else type(error).__name__
