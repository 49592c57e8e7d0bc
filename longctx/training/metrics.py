"""What a run tells of itself: metrics.jsonl, TensorBoard events, progress, utilisation, memory.

    model FLOPs utilisation = tokens/s * FLOPs of one token / (devices * peak FLOP/s of one)

The FLOPs of a token are the model's (`config.flops_per_token`): by the full convention every query
counts all T keys, by the mask-density convention those that its mask shows it.
Source: Chowdhery et al. 2022, arXiv:2204.02311, appendix B.
Held by: tests/test_metrics.py.
"""

import contextlib
import errno
import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from longctx import files
from longctx.errors import ConfigError
from longctx.files import PASSING, atomic_write
from longctx.parallel.chips import peak_flops
from longctx.training.optim import path_name


def model_flops_utilization(tokens_per_second: float, flops_per_token: float, *, kind: str,
                            count: int) -> float | None:
  """Part of `count` devices' published peak that the model's own arithmetic uses, 0 to 1."""
  peak = peak_flops(kind)
  return None if peak is None else tokens_per_second * flops_per_token / (peak * count)


def utilization(model: Any, devices: np.ndarray, length: int, tokens_per_second: float,
                keys: dict[int, Any]) -> dict[str, float]:
  """Both conventions, absent where the chip's peak is unknown. `keys`: of each window, seen on average."""
  of = lambda seen: model_flops_utilization(
      tokens_per_second, model.flops_per_token(length, seen), kind=devices.flat[0].device_kind,
      count=devices.size)
  full = of(None)
  if full is None:
    return {}
  return dict(model_flops_utilization=full, model_flops_utilization_masked=of(
      {window: float(mean) for window, mean in keys.items()}))


# metrics.jsonl and TensorBoard.

FIELDS = ('step', 'loss', 'bits_per_byte', 'grad_norm', 'learning_rate', 'tokens_per_second',
          'model_flops_utilization', 'seconds')  # these stand first, the rest as they come


class MetricsWriter:
  """Appends one JSON object a logged step to W/metrics.jsonl, and the same to W/tensorboard.

  A line is written whole, in one call: after a kill at most the last one is torn. A number that is
  not finite becomes null. While the disk refuses them lines wait in memory, and go with the next one.
  `enabled` is False on all processes but one; they write nothing.
  """

  def __init__(self, folder: str | os.PathLike, enabled: bool = True):
    self.path = Path(folder) / 'metrics.jsonl'
    self.enabled = enabled
    self._waiting = b''   # lines that a full disk refused
    self._events = None
    self._purge = None    # TensorBoard hides what an earlier process logged from this step on

  def truncate_after(self, step: int) -> None:
    """Drops lines of later steps, and torn ones: a run that resumes at `step` writes them again.

    ConfigError where the disk does not let it, RunError where it is away for long.
    """
    if not self.enabled:
      return
    self._purge = step + 1
    if self._events is not None:   # a run that goes back in its midst: the next file of events says so
      with refusal_is_told('TensorBoard events'):
        self._events.close()
      self._events = None
    try:
      files.patiently(str(self.path), self._drop_after, step)
    except OSError as e:
      raise ConfigError(f'{self.path}: cannot drop the lines after step {step} ({e.strerror}); make '
                        'room, or let yourself write there, or give another workdir') from e

  def _drop_after(self, step: int) -> None:
    try:
      text = self.path.read_bytes()
    except FileNotFoundError:
      return
    kept = b''.join(line + b'\n' for line in text.split(b'\n') if _step_of(line) <= step)
    if text.startswith(kept):   # needs no room
      os.truncate(self.path, len(kept))
    else:
      atomic_write(self.path, kept)

  def write(self, step: int, metrics: dict[str, Any]) -> None:
    if not self.enabled:
      return
    values = {'step': int(step)} | {name: _number(value) for name, value in metrics.items()}
    first = {name: values[name] for name in FIELDS if name in values}
    line = json.dumps(first | values, allow_nan=False).encode() + b'\n'
    self._append(line)
    self._tensorboard(step, values)

  def close(self) -> None:
    if self._waiting:
      self._append(b'')
    if self._events is not None:
      with refusal_is_told('TensorBoard events'):
        self._events.close()

  def _append(self, line: bytes) -> None:
    self._waiting += line
    with refusal_is_told(f'{self.path}: lines wait for room'):
      append(self.path, self._waiting)
      self._waiting = b''

  def _tensorboard(self, step: int, values: dict[str, Any]) -> None:
    # The events writer itself and not `SummaryWriter`, whose thread dies on a full disk and whose
    # queue then blocks the run.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary
    with refusal_is_told('TensorBoard events'):
      if self._events is None:
        folder = self.path.parent / 'tensorboard'
        folder.mkdir(exist_ok=True)
        self._events = EventsWriter(str(folder / 'events'), f'.{os.getpid()}.{time.time_ns()}')
        if self._purge is not None:
          self._events.write_event(Event(step=self._purge, wall_time=time.time(),
                                         session_log=SessionLog(status=SessionLog.START)))
      scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()
                 if name != 'step' and isinstance(value, int | float)]
      self._events.write_event(Event(step=step, wall_time=time.time(),
                                     summary=Summary(value=scalars)))
      self._events.flush()


def append(path: Path, lines: bytes) -> None:
  """All of them, or OSError and none."""
  with open(path, 'ab', buffering=0) as f:
    end = f.tell()
    try:
      if f.write(lines) < len(lines):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
      f.truncate(end)
      raise


@contextlib.contextmanager
def refusal_is_told(what: str) -> Iterator[None]:
  """A disk that takes nothing costs a line on stderr and not the run; other errors pass through."""
  try:
    yield
  except OSError as e:
    if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, *PASSING):
      raise
    print(f'{what}: {e.strerror}', file=sys.stderr, flush=True)


def _number(value: Any) -> Any:
  """A JSON value: numbers of NumPy and JAX become Python's, NaN and infinities null."""
  if isinstance(value, np.generic | np.ndarray | jax.Array):
    value = value.item()
  return None if isinstance(value, float) and not math.isfinite(value) else value


def _step_of(line: bytes) -> float:
  """The step of a line of metrics.jsonl; infinite if the line is torn or not ours."""
  try:
    return int(json.loads(line)['step'])
  except (ValueError, KeyError, TypeError):
    return math.inf


# Progress.


class Progress:
  """Loss, tokens/s and time left: a bar where `stream` is a terminal, plain lines elsewhere."""

  def __init__(self, num_steps: int, done: int = 0, enabled: bool = True, stream: Any = None):
    self.num_steps, self.enabled = num_steps, enabled
    self.stream = stream if stream is not None else sys.stdout
    self._since = (done, time.perf_counter())
    self._updated = False
    self._bar = None
    if enabled and self.stream.isatty():
      from tqdm import tqdm
      self._bar = tqdm(total=num_steps, initial=done, file=self.stream, unit='step',
                       dynamic_ncols=True, leave=False)

  def update(self, step: int, loss: float, tokens_per_second: float) -> None:
    if not self.enabled:
      return
    if self._bar is not None:
      self._bar.set_postfix_str(f'loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s',
                                refresh=False)
      self._bar.update(step - self._bar.n)
      self._bar.refresh()
      return
    self.say(f'step {step:>{len(str(self.num_steps))}}/{self.num_steps}  loss {loss:.4f}  '
             f'{tokens_per_second:,.0f} tokens/s  {_clock(self._seconds_left(step))} left')

  def say(self, line: str) -> None:
    """A line of its own, above the bar if there is one."""
    if not self.enabled:
      return
    if self._bar is not None:
      self._bar.write(line, file=self.stream)
    else:
      print(line, file=self.stream, flush=True)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()

  def _seconds_left(self, step: int) -> float:
    now, (at, since) = time.perf_counter(), self._since
    left = (self.num_steps - step) * (now - since) / max(step - at, 1)
    if not self._updated:   # from the first update on the pace is counted without the compilation
      self._since, self._updated = (step, now), True
    return left


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'


# Time and memory.

_IMPORTED = time.perf_counter()


def process_seconds() -> float:
  """Since this process was started: the interpreter's start and all imports count."""
  try:
    with open('/proc/self/stat') as f:   # the command's name, in parentheses, may hold anything
      ticks = int(f.read().rpartition(')')[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf('SC_CLK_TCK')
  except (OSError, AttributeError, ValueError):   # no Linux: since the import of this file
    return time.perf_counter() - _IMPORTED


def largest_arrays(tree: Any, n: int = 10) -> list[str]:
  """A line for each of the n largest arrays: name, shape, type, bytes, cut, bytes a device."""
  rows = []
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    size = x.dtype.itemsize
    sharding = getattr(x, 'sharding', None)
    part = x.shape if sharding is None else sharding.shard_shape(x.shape)
    cut = getattr(sharding, 'spec', None)
    rows.append((math.prod(x.shape) * size, path_name(path), f'{x.dtype}{list(x.shape)}',
                 'one device' if cut is None else str(tuple(cut)), math.prod(part) * size))
  rows = sorted(rows, key=lambda row: (-row[0], row[1]))[:n]
  names, types = (max([len(row[i]) for row in rows], default=0) for i in (1, 2))
  return [f'{name:<{names}}  {kind:<{types}}  {_bytes(total):>9}  {cut}  {_bytes(part)} a device'
          for total, name, kind, cut, part in rows]


def peak_memory_bytes() -> int:
  """Most memory ever in use: the fullest local device's, or the process's if devices don't say."""
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  peaks = [s['peak_bytes_in_use'] for s in stats if 'peak_bytes_in_use' in s]
  if peaks:
    return max(peaks)
  unit = 1 if sys.platform == 'darwin' else 1024   # ru_maxrss: bytes on macOS, KiB on Linux
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _bytes(n: float) -> str:
  units = ['B', 'KiB', 'MiB', 'GiB', 'TiB']
  while n >= 1024 and len(units) > 1:
    n, units = n / 1024, units[1:]
  return f'{n:.0f} B' if units[0] == 'B' else f'{n:.1f} {units[0]}'
