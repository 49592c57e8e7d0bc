"""How far a long evaluation is: told, and kept on disk, so that a killed one carries on.

W/evaluation.partial has the sums over the batches that were read, of each pass over the text, and the key of all
that they depend on; what has another key, or is damaged, is not used. It is written every half minute (seldomer
where that takes long), in one piece, and goes when the evaluation is whole.
Held by: tests/test_eval_course.py.
"""

import hashlib
import io
import json
import os
import sys
import time
import zipfile
from typing import Any

import jax
import numpy as np

from longctx.files import atomic_write
from longctx.training import processes
from longctx.training.metrics import refusal_is_told

NAME = 'evaluation.partial'
FORMAT = 2   # of the sums in it: what an earlier version of them wrote is not used
Arrays = dict[str, np.ndarray]


class Progress:
  """How much of all is read: a bar where stdout is a terminal, a line now and then elsewhere."""

  EVERY = 15.0   # seconds between two lines

  def __init__(self, total: int, done: int, enabled: bool, unit: str = 'tokens'):
    self._total, self._done, self._enabled, self._unit = total, done, enabled, unit
    self._begun, self._start, self._told = time.perf_counter(), done, time.perf_counter()
    self._bar = None
    if enabled and sys.stdout.isatty():
      from tqdm import tqdm
      self._bar = tqdm(total=total, initial=done, unit=unit.removesuffix('s'), unit_scale=True, dynamic_ncols=True,
                       leave=False, file=sys.stdout)
    elif enabled and done:
      print(f'carries on: {done:,} of {total:,} {unit} were read before', flush=True)

  def update(self, where: str, count: int) -> None:
    self._done += count
    if self._bar is not None:
      self._bar.set_description_str(where, refresh=False)
      self._bar.update(count)
    now = time.perf_counter()
    if self._bar is None and self._enabled and now - self._told > self.EVERY:
      rate = (self._done - self._start) / (now - self._begun)
      left = round((self._total - self._done) / rate)
      self._told = now
      print(f'{where}: {100 * self._done / self._total:.0f} % of all {self._unit}, {rate:,.0f} {self._unit}/s, '
            f'{left // 60}:{left % 60:02} left', flush=True)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()


class Course:
  """Of one evaluation. All processes of a run make it alike; the first tells and writes.

  Args:
    folder: the workdir; '': nothing is told or kept.
    key: all that the sums depend on; JSON.
  """

  EVERY = 30.0   # seconds between two writes
  SHARE = 0.05   # of the time, at most, goes into them

  def __init__(self, folder: str = '', key: Any = None):
    self._path = os.path.join(folder, NAME) if folder else ''
    self._key = hashlib.sha256(json.dumps([FORMAT, key], sort_keys=True).encode()).hexdigest()
    self._main = bool(folder) and jax.process_index() == 0
    self._passes = self._found() if folder else {}
    self._progress: Progress | None = None
    self._written, self._took = time.monotonic(), 0.0

  def _found(self) -> dict[int, Arrays]:
    """{pass: its sums} of before, if all processes see the same."""
    data, named = b'', {}
    try:
      with open(self._path, 'rb') as file:
        data = file.read()
      with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        named = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):   # none, or damaged: read again
      named = {}
    mine = hashlib.sha256(data).hexdigest() if str(named.pop('key', '')) == self._key else ''
    if set(processes.gather(mine)) != {mine} or not mine:
      return {}
    passes: dict[int, Arrays] = {}
    for name, array in named.items():
      number, field = name.split('/', 1)
      passes.setdefault(int(number), {})[field] = array
    return passes

  def begin(self, total: int, unit: str = 'tokens') -> None:
    """`total`: of what is read in all passes."""
    done = sum(int(arrays['read']) for arrays in self._passes.values())
    self._progress = Progress(total, done, self._main, unit)

  def before(self, number: int) -> tuple[int, Arrays]:
    """(batches of this pass that were read before, the sums over them)."""
    arrays = self._passes.get(number, {})
    return int(arrays.get('batches', 0)), arrays

  def read(self, number: int, batches: int, where: str, count: int, **sums: Any) -> None:
    """So many batches of this pass are read; the last one had `count` of what is told."""
    so_far = int(self._passes.get(number, {}).get('read', 0)) + count
    self._passes[number] = {name: np.asarray(x) for name, x in dict(sums, batches=batches, read=so_far).items()}
    if self._progress is not None:
      self._progress.update(where, count)
    if self._main and time.monotonic() - self._written > max(self.EVERY, self._took / self.SHARE):
      began = time.monotonic()
      self._write()
      self._written = time.monotonic()
      self._took = self._written - began

  def _write(self) -> None:
    file = io.BytesIO()
    np.savez(file, key=self._key, **{f'{number}/{name}': x for number, arrays in self._passes.items()
                                     for name, x in arrays.items()})
    with refusal_is_told(self._path):
      atomic_write(self._path, file.getvalue())

  def end(self) -> None:
    """It is whole, and its result is somewhere else."""
    if self._progress is not None:
      self._progress.close()
    if self._main:
      with refusal_is_told(self._path):
        if os.path.exists(self._path):
          os.remove(self._path)
