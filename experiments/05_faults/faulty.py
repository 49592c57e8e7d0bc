"""python -m longctx.main, in which one thing goes wrong: python faulty.py --fault=KIND:PROCESS:STEP:FILE <its flags>
Without --fault nothing does; either way every program is kept once it is compiled.

    nan, rollback   the batch of step STEP has a NaN among its weights, in every process; rollback: the next too
    spike           the targets of step STEP's batch are a byte that no text has, in every process
    disk            from the first save of step STEP or later on PROCESS has no room in the workdir, for SECONDS
    bucket          from that save on no process can reach the workdir or the tokens, for SECONDS
    minute          as bucket, for MINUTE
    divergence      after step STEP a bit of one parameter is another one in PROCESS
    restart         started where there is FILE.killed: as bucket, but from the STEP-th file on that a process asks for
    hang            after step STEP PROCESS does not go on, and the others wait for it in a collective

FILE then has the time at which it began. Where FILE is there already, nothing goes wrong.
"""

import contextlib
import errno
import itertools
import os
import sys
import time
import types
from collections.abc import Callable

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

SECONDS, MINUTE = 5.0, 60.0
# What Python says before it touches a file (C++ writes only below folders that Python has made).
READS = ('os.listdir', 'os.scandir')
WRITES = ('os.mkdir', 'os.rename', 'os.remove', 'os.rmdir', 'os.truncate')


class Fault:
  """Which, where, and since when."""

  def __init__(self, process: int, step: int, file: str):
    self.process, self.step, self.file = process, step, file
    self.since: float | None = None   # time.monotonic()

  def begin(self) -> None:
    if self.since is None:
      self.since = time.monotonic()
      with contextlib.suppress(FileExistsError), open(self.file, 'x') as file:
        file.write(str(time.time()))

  def at_batch(self, do: Callable[[int, dict], dict]) -> None:
    """do(batch's number less STEP, batch) gives the batch that is trained on."""
    from longctx.data import stream
    read = stream.Stream.__next__
    def changed(stream):
      number = stream.state()['next_index'] + 1 - self.step
      if number == 0:
        self.begin()
      return do(number, read(stream))
    stream.Stream.__next__ = changed

  def after_step(self, do: Callable) -> None:
    """do(state) gives the state that PROCESS goes on with."""
    import jax

    from longctx import train
    prepare = train.Trainer.prepare
    def changed(trainer, state, done):
      update, batch = prepare(trainer, state, done)
      if done != self.step or jax.process_index() != self.process:
        return update, batch
      self.begin()
      state = do(state)
      return lambda _, batch: update(state, batch), batch
    train.Trainer.prepare = changed

  def at_save(self, everywhere: bool) -> None:
    import jax

    from longctx.training import checkpoint
    save = checkpoint.Checkpoints.save
    def begun(checkpoints, step, *args, **kwargs):
      if step >= self.step and (everywhere or jax.process_index() == self.process):
        self.begin()
      return save(checkpoints, step, *args, **kwargs)
    checkpoint.Checkpoints.save = begun

  def refuse(self, code: int, folders: tuple[str, ...], reads: bool, at_file: int = 0,
             seconds: float | None = None) -> None:
    """Files below `folders` cannot be written, or also not be read, once it has begun.

    `at_file`: it begins as so many have been asked for in this process, or in another one. `seconds`: or SECONDS.
    """
    seconds = SECONDS if seconds is None else seconds
    asked = itertools.count(1)
    def look(event: str, arguments: tuple) -> None:
      over = self.since is not None and time.monotonic() > self.since + seconds
      if over or (self.since is None and not at_file):
        return
      if not (event in WRITES or event == 'open' or (reads and event in READS)):
        return
      path = arguments[0]
      if not isinstance(path, str | os.PathLike) or not os.fspath(path).startswith(folders):
        return
      if event == 'open' and not reads and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
        return
      if self.since is None and next(asked) < at_file and not os.path.exists(self.file):
        return
      self.begin()
      raise OSError(code, os.strerror(code))
    sys.addaudithook(look)


def nan(fault: Fault, workdir: str, bad: tuple[int, ...] = (0,)) -> None:
  del workdir
  import numpy as np
  fault.at_batch(lambda number, batch: batch if number not in bad else batch | {
      'loss_mask': batch['loss_mask'] * np.float32(np.nan)})


def rollback(fault: Fault, workdir: str) -> None:
  nan(fault, workdir, (0, 1))


def spike(fault: Fault, workdir: str) -> None:
  del workdir
  import numpy as np
  fault.at_batch(lambda number, batch: batch if number else batch | {'targets': np.zeros_like(batch['targets'])})


def disk(fault: Fault, workdir: str) -> None:
  fault.at_save(everywhere=False)
  fault.refuse(errno.ENOSPC, (workdir,), reads=False)


def tokens() -> str:
  return next(flag.partition('file://')[2] for flag in sys.argv if flag.startswith('--config.data.cache_dir='))


def bucket(fault: Fault, workdir: str, seconds: float | None = None) -> None:
  fault.at_save(everywhere=True)
  fault.refuse(errno.EIO, (workdir, tokens()), reads=True, seconds=seconds)


def minute(fault: Fault, workdir: str) -> None:
  bucket(fault, workdir, MINUTE)


def restart(fault: Fault, workdir: str) -> None:
  if os.path.exists(f'{fault.file}.killed'):
    fault.refuse(errno.EIO, (workdir, tokens()), reads=True, at_file=fault.step)


def divergence(fault: Fault, workdir: str) -> None:
  del workdir
  import jax
  import numpy as np
  def other(x):
    """The same array, but for a bit of its largest number in each part that this process holds.

    Not the lowest: that may be rounded away by the step's update.
    """
    parts = []
    for shard in x.addressable_shards:
      part = np.array(shard.data)
      part.view(np.uint32).flat[np.abs(part).argmax()] ^= 1 << 12
      parts.append(jax.device_put(part, shard.device))
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, parts)
  def changed(state):
    leaves, tree = jax.tree.flatten(state.params)
    return state._replace(params=tree.unflatten([other(leaves[0]), *leaves[1:]]))
  fault.after_step(changed)


def hang(fault: Fault, workdir: str) -> None:
  del workdir
  fault.after_step(lambda state: time.sleep(1e6))


def keep_programs() -> None:
  """The next start compiles nothing: hundreds of starts are what this experiment costs.

  JAX keeps what took long to compile, of the first process alone; the others' programs have other names on CPUs.
  """
  import jax
  from jax._src import compiler

  from longctx import main
  compiler.distributed = types.SimpleNamespace(global_state=types.SimpleNamespace(process_id=0, client=None))
  choose = main.set_compilation_cache
  def keep(folder: str) -> None:
    choose(folder)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  main.set_compilation_cache = keep


KINDS = dict(nan=nan, rollback=rollback, spike=spike, disk=disk, bucket=bucket, minute=minute, divergence=divergence, hang=hang,
             restart=restart)


if __name__ == '__main__':
  if sys.argv[1].startswith('--fault='):
    kind, process, step, file = sys.argv.pop(1).removeprefix('--fault=').split(':')
    if not os.path.exists(file):
      KINDS[kind](Fault(int(process), int(step), file),
                  next(flag.partition('=')[2] for flag in sys.argv if flag.startswith('--workdir=')))
  keep_programs()
  from longctx.main import main
  sys.exit(main(sys.argv))
