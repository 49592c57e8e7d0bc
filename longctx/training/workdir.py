"""The workdir of a run: who holds it, which config it was made with, and how a run is asked to stop.

One run at a time holds W (`lock`); every run in W has the config that W/config.json tells, but for
the keys that its user names (`agree`); a file in W is either the old one or the new one, never half
of it (`atomic_write`).

Held by: tests/test_workdir.py, tests/test_patience.py, tests/test_distributed.py (signals).
"""

import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_collections

from longctx import files
from longctx.errors import ConfigError, RunError, check, nearest
from longctx.files import Lock, atomic_write

# Keys and sections of a config. These change no number of a run, and may differ from W's:
FREE = ('mesh', 'eval', 'run.compilation_cache', 'run.expect', 'data.cache_dir', 'data.prefetch',
        'data.threads', 'data.build_processes', 'run.watchdog_seconds', 'run.check_hosts_every', 'run.save_patience')
# nor do these change what a checkpoint scores;
NOT_SCORED = ('seed', 'optimizer', 'loss', 'run', 'perplexity', 'data.form', 'data.length',
              'data.batch_size', 'data.long_documents')
# and a checkpoint, or its place in the data, cannot be carried on with others of these.
FIXED = ('seed', 'data.form', 'data.length', 'data.source_length', 'data.batch_size',
         'data.long_documents', 'model.encoder_layers', 'model.num_classes', 'model.position_buckets',
         'optimizer.name', 'model.name', 'model.vocab_size', 'model.num_layers', 'model.embed_dim',
         'model.num_heads', 'model.num_kv_heads', 'model.head_dim', 'model.mlp', 'model.mlp_dim',
         'model.hidden_dim', 'model.position', 'model.qk_norm', 'model.tied', 'model.layer_loop',
         'model.segment', 'model.short_term', 'model.long_term', 'model.memory_layers',
         'model.memory_tokens', 'model.memory_size', 'model.memory_width', 'model.memory_depth')

STOPPED = 75   # exit status of who was asked to stop and left, all kept: sysexits.h, EX_TEMPFAIL; try again
CONFIG_FILE = 'config.json'
LOCK_FILE = '.lock'
_ABSENT = object()  # a key that one side lacks; None is a value
EVALUATED = (*FREE, *NOT_SCORED)   # what --mode=eval may change without a word


def lock(workdir: str | os.PathLike) -> Lock:
  """Makes the workdir if need be and takes it; ConfigError if another run has it.

  The kernel drops the lock with the process, SIGKILL included, so no stale lock is ever met. Of a
  distributed run process 0 alone takes it.
  """
  import jax

  _make(workdir)
  if jax.process_index() != 0:
    return Lock(None)
  try:
    return files.patiently(f'--workdir={workdir}', files.hold, Path(workdir) / LOCK_FILE)
  except files.HeldError as e:
    said = f'--workdir={workdir}: held by a run that is still going ({e.holder}); '
    if ' on ' in e.holder and not e.holder.endswith(f' on {socket.gethostname()}'):
      # Of a host that was lost a file server lets go after a while: what launchers try again.
      raise RunError(f'{said}stop it, or give another workdir; if its host was lost, the same command can go on '
                     'in a minute or two') from None
    raise ConfigError(f'{said}wait for it, stop it, or give another workdir') from None
  except files.CannotLockError as e:
    raise ConfigError(f'--workdir={workdir}: its file system cannot lock files ({e}); '
                      'give a workdir on another one') from e
  except OSError as e:
    raise ConfigError(f'--workdir={workdir}: cannot write there ({e.strerror}); give a folder '
                      'that you may write to') from e


def _make(workdir: str | os.PathLike) -> None:
  check(bool(str(workdir)), '--workdir: missing; give a folder for the run, such as --workdir=runs/a')
  try:
    files.patiently(f'--workdir={workdir}', Path(workdir).mkdir, parents=True, exist_ok=True)
  except (FileExistsError, NotADirectoryError) as e:
    raise ConfigError(f'--workdir={workdir}: {e.filename} is a file; give a folder') from e
  except OSError as e:
    raise ConfigError(f'--workdir={workdir}: cannot make this folder ({e.strerror}); give one '
                      'that you may write to') from e


def plain(config: Any) -> Any:
  """A ConfigDict as JSON would give it back: dicts, lists (tuples too), numbers, strings."""
  if isinstance(config, ml_collections.ConfigDict):
    config = config.to_dict()
  return json.loads(json.dumps(config))


def leaves(config: dict, prefix: str = '') -> dict[str, Any]:
  """{'run.num_steps': 100, ...}; a list, and an empty section, is a leaf."""
  found = {}
  for key, value in config.items():
    name = f'{prefix}{key}'
    found |= leaves(value, f'{name}.') if isinstance(value, dict) and value else {name: value}
  return found


def within(key: str, names: Iterable[str]) -> bool:
  """Whether `names` has the key or a section that it is in."""
  return any(key == name or key.startswith(f'{name}.') for name in names)


def agree(workdir: str | os.PathLike, config: Any, allow: str = '', *,
          record: bool = True, free: Iterable[str] = FREE) -> None:
  """Holds this run to the config of the runs before it in W; the first run writes it.

  Args:
    workdir: the folder W.
    config: a ConfigDict or dict.
    allow: keys (`run.num_steps`) or sections (`run`), with commas between, that may differ; W then
      has the new values from here on.
    record: write W/config.json; False only compares.
    free: keys or sections that may differ without a word.
  """
  import jax

  path, given = Path(workdir) / CONFIG_FILE, plain(config)
  new = leaves(given)
  old = leaves(_read(path)) if _is_there(path) else None
  allowed = [key.strip() for key in allow.split(',') if key.strip()]
  for key in allowed:
    known = set(new) | set(old or ())
    sections = {name[:i] for name in known for i, c in enumerate(name) if c == '.'}
    check(key in known | sections,
          f'--allow_config_change={key}: no such key{nearest(key, known | sections)}')
  if old is not None:
    _compare(path, old, new, allowed, (*free, *allowed))
  if record and old != new and jax.process_index() == 0:
    try:
      files.patiently(f'--workdir={workdir}', atomic_write, path,
                      (json.dumps(given, indent=2, sort_keys=True) + '\n').encode())
    except OSError as e:
      raise ConfigError(f'--workdir={workdir}: cannot write {CONFIG_FILE} ({e.strerror}); '
                        'make room or give another workdir') from e


def _compare(path: Path, old: dict, new: dict, allowed: list[str], free: Iterable[str]) -> None:
  differing = [key for key in sorted(set(old) | set(new))
               if not _same(old.get(key, _ABSENT), new.get(key, _ABSENT))]
  refused = [key for key in differing if not within(key, free)]
  if refused:
    show = lambda value: 'no such key' if value is _ABSENT else json.dumps(value)
    told = '; '.join(f'{key}: W has {show(old.get(key, _ABSENT))}, you gave '
                     f'{show(new.get(key, _ABSENT))}' for key in refused)
    fixed = [key for key in refused if key in FIXED]
    # A key that is allowed already has to be said again, or the next try is refused for it.
    remedy = ','.join([*allowed, *(key for key in refused if key not in FIXED)])
    ways = [f'{", ".join(fixed)} cannot change in this workdir: give what W has'] if fixed else []
    if len(fixed) < len(refused):
      ways.append(f'{"For the rest" if fixed else "To go on with what you gave"}: '
                  f'--allow_config_change={remedy}')
    raise ConfigError(f'{path} disagrees with this config: {told}. {". ".join(ways)}; or give '
                      'another workdir')


def overrides(workdir: str | os.PathLike, config: Any) -> dict[str, Any]:
  """The leaves of a config that are not as W/config.json has them, as JSON gives them back."""
  old = leaves(_read(Path(workdir) / CONFIG_FILE))
  return {key: value for key, value in leaves(plain(config)).items() if not _same(old.get(key, _ABSENT), value)}


def _same(a: Any, b: Any) -> bool:
  if a is _ABSENT or b is _ABSENT:
    return False
  return (a == b and isinstance(a, bool) == isinstance(b, bool)) or json.dumps(a) == json.dumps(b)


def _is_there(path: Path) -> bool:
  """Where the file system is away nobody knows: `exists` of later Pythons says no."""
  try:
    files.patiently(str(path), path.stat)
  except (FileNotFoundError, NotADirectoryError):
    return False
  return True


def _read(path: Path) -> dict:
  try:
    config = json.loads(files.patiently(str(path), path.read_bytes))
  except OSError as e:
    raise ConfigError(f'{path}: cannot be read ({e.strerror})') from e
  except ValueError as e:  # JSONDecodeError and UnicodeDecodeError
    raise ConfigError(f'{path}: not a config that a run wrote ({_first_line(e)}); remove this file '
                      'and start with the config that the run had') from e
  check(isinstance(config, dict), f'{path}: not a config that a run wrote (not a JSON object); '
        'remove this file and start with the config that the run had')
  return config


def load_config(workdir: str | os.PathLike) -> ml_collections.ConfigDict:
  """The config that W's run had, for whoever uses its model; lists are tuples again."""
  folder = Path(workdir)
  path = folder / CONFIG_FILE
  check(_is_there(folder) and folder.is_dir(), f'--workdir={workdir}: no such folder; give the workdir of a run '
        '(python -m longctx.main --config=... --workdir=... makes one)')
  check(_is_there(path), f'--workdir={workdir}: no run was started there (no {CONFIG_FILE}); give '
        'the workdir of a run (python -m longctx.main --config=... --workdir=... makes one)')
  return ml_collections.ConfigDict(tuples(_read(path)))


def tuples(value: Any) -> Any:
  """What JSON made lists of, as tuples again."""
  if isinstance(value, dict):
    return {key: tuples(v) for key, v in value.items()}
  return tuple(tuples(v) for v in value) if isinstance(value, list) else value


def _first_line(e: Exception) -> str:
  return str(e).splitlines()[0] if str(e) else type(e).__name__


class StopSignal:
  """`with StopSignal() as stop:` SIGTERM and SIGINT set `stop.requested`, for the loop to save and leave.

  A second SIGINT (a second Ctrl-C) raises KeyboardInterrupt. In the main thread only, as Python
  has it. The handlers before are put back at the end.
  """

  def __init__(self):
    self.requested = False
    self.name = ''  # 'SIGTERM', for the log
    self._before = {}

  def __enter__(self) -> 'StopSignal':
    for number in (signal.SIGTERM, signal.SIGINT):
      self._before[number] = signal.signal(number, self._handle)
    return self

  def _handle(self, number: int, frame: Any) -> None:
    del frame
    if number == signal.SIGINT and self.name == 'SIGINT':
      raise KeyboardInterrupt
    self.requested, self.name = True, signal.Signals(number).name

  def __exit__(self, *exc) -> None:
    for number, handler in self._before.items():
      # None: a handler that C code had set, which Python cannot put back.
      signal.signal(number, signal.SIG_DFL if handler is None else handler)
    self._before.clear()


class LeaveAtOnce:
  """`with LeaveAtOnce():` SIGTERM ends the process at once, with the exit status STOPPED.

  For the start of a run and for evaluations, which lose nothing by it: what they have done is on disk as soon
  as it is done. A thread does it, since a handler of Python's would wait for a main thread that compiles, or is
  in a collective whose other end is gone. Inside a StopSignal the signal is that one's. In the main thread
  only, as Python has it; in another one nothing changes.
  """

  _before = None   # the handler, and the descriptor that signals were written to

  def __enter__(self) -> 'LeaveAtOnce':
    if threading.current_thread() is threading.main_thread():
      read, self._write = os.pipe()
      os.set_blocking(self._write, False)
      self._before = signal.signal(signal.SIGTERM, _noted), signal.set_wakeup_fd(self._write)
      self._thread = threading.Thread(target=_leave, args=(read,), name='signals', daemon=True)
      self._thread.start()
    return self

  def __exit__(self, *exc) -> None:
    if self._before is not None:
      handler, wakeup = self._before
      signal.set_wakeup_fd(wakeup)
      signal.signal(signal.SIGTERM, signal.SIG_DFL if handler is None else handler)
      os.close(self._write)   # which ends the thread
      self._thread.join()


def _noted(number: int, frame: Any) -> None:
  """A handler, without which Python writes no signal to the descriptor."""


def _leave(read: int) -> None:
  """Ends the process when SIGTERM is read; returns when nothing more can come."""
  with open(read, 'rb', buffering=0) as numbers:
    while number := numbers.read(1):
      if number[0] == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is _noted:
        sys.stderr.write('longctx: SIGTERM: left at once; the same command carries on\n')
        sys.stderr.flush()
        os._exit(STOPPED)
