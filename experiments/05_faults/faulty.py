"""python -m longctx.main, in which one thing goes wrong: python faulty.py --fault=KIND:PROCESS:STEP <its flags>

    nan         the batch of step STEP has a NaN among its weights, in every process
    disk        from the save of step STEP on, the file system has no room for 10 seconds
    divergence  after step STEP a bit of one parameter is another one in PROCESS
"""

import os
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

FULL = 10.0   # seconds


def nan(process: int, step: int) -> None:
  del process
  import numpy as np

  from longctx.data import stream
  read = stream.Stream.__next__
  def bad(self):
    at = self.state()['next_index'] + 1
    batch = read(self)
    return batch | {'loss_mask': batch['loss_mask'] * np.float32(np.nan)} if at == step else batch
  stream.Stream.__next__ = bad


def disk(process: int, step: int) -> None:
  del process
  from longctx.training import manifest
  write, since = manifest.write, []
  def full(folder):
    if int(folder.name.split('.')[0]) >= step and (not since or time.monotonic() < since[0] + FULL):
      since.append(time.monotonic())
      raise OSError(28, 'No space left on device')
    write(folder)
  manifest.write = full


def divergence(process: int, step: int) -> None:
  import jax
  import numpy as np

  from longctx import train
  prepare = train.Trainer.prepare
  def other(x):
    """The same array, but for the lowest bit of one number in each part that this process holds."""
    parts = []
    for shard in x.addressable_shards:
      part = np.array(shard.data)
      part.view(np.uint32).flat[0] ^= 1
      parts.append(jax.device_put(part, shard.device))
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, parts)
  def wrong(self, state, done):
    update, batch = prepare(self, state, done)
    if done != step or jax.process_index() != process:
      return update, batch
    leaves, tree = jax.tree.flatten(state.params)
    changed = state._replace(params=tree.unflatten([other(leaves[0]), *leaves[1:]]))
    return lambda _, batch: update(changed, batch), batch
  train.Trainer.prepare = wrong


if __name__ == '__main__':
  kind, number, at = sys.argv.pop(1).removeprefix('--fault=').split(':')
  {'nan': nan, 'disk': disk, 'divergence': divergence}[kind](int(number), int(at))
  from longctx.main import main
  sys.exit(main(sys.argv))
