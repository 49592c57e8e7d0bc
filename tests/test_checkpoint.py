"""Checkpoints: bit for bit, whole or not at all, and never the end of a run that could go on."""

import asyncio
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from longctx import files as files_lib
from longctx.errors import ConfigError, RunError
from longctx.training import checkpoint, manifest, saving
from longctx.training.checkpoint import Checkpoints, best_of

ROOT = Path(__file__).parents[1]


def make_state(step, size=4):
  """A state of every kind of leaf, all of whose values tell `step`."""
  rng = np.random.default_rng(step)
  params = {'w': jnp.asarray(rng.normal(size=(size, 8)), jnp.float32),
            'b': jnp.asarray(rng.normal(size=8), jnp.bfloat16)}
  return {
      'params': nnx.State({k: nnx.Param(v) for k, v in params.items()}),
      'opt': optax.adam(1e-3).init(params), 'step': jnp.int32(step), 'key': jax.random.key(step),
      'keys': jax.random.split(jax.random.key(step, impl='rbg'), 2), 'flag': jnp.asarray(step % 2 == 0),
      'memory': (jnp.zeros((0, 3)), jnp.full((8, 2), step, jnp.int32)),
      'odd': jnp.asarray([np.nan, -0.0, np.inf, 1e-45, step], jnp.float32)}


def one_device(leaf):
  return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def abstract(state, sharding=one_device):
  return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(x)), state)


def bits(tree):
  """[(name, type, bytes)] of every leaf: NaN and -0.0 count."""
  def of(x):
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return str(x.dtype), x.shape, np.asarray(jax.random.key_data(x) if is_key else x).tobytes()
  paths, _ = jax.tree_util.tree_flatten_with_path(tree)
  return [(jax.tree_util.keystr(path), *of(leaf)) for path, leaf in paths]


def assert_same_bits(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  assert bits(a) == bits(b)


def save(checkpoints, step, state=None, **more):
  more = {'stream_state': {'at': step}, 'meta': {'seed': step}} | more
  started = checkpoints.save(step, make_state(step) if state is None else state, **more)
  checkpoints.wait()
  return started


def assert_holds(restored, step):
  assert restored.step == step
  assert restored.stream_state == {'at': step}
  assert restored.meta == {'seed': step}
  assert_same_bits(restored.state, make_state(step))


@pytest.fixture
def warnings(monkeypatch):
  """The warnings and errors of the project and of the libraries below it."""
  records = []
  handler = logging.logging.Handler()
  handler.emit = lambda r: records.append(r.getMessage()) if r.levelno >= logging.logging.WARNING else None
  logger = logging.logging.getLogger('absl')
  logger.addHandler(handler)
  yield records
  logger.removeHandler(handler)


@pytest.fixture
def folder(tmp_path):
  return tmp_path / 'checkpoints'


class TestRoundTrip:

  def test_every_bit_of_every_kind_of_leaf(self, folder, warnings):
    with Checkpoints(folder, keep_last=2) as c:
      assert c.restore_newest(abstract(make_state(1))) is None
      assert save(c, 1)
      assert save(c, 2)
    with Checkpoints(folder, keep_last=2) as c:  # as the next process would
      assert c.steps() == [1, 2]
      assert_holds(c.restore_newest(abstract(make_state(0))), 2)
      assert_holds(c.restore_step(1, abstract(make_state(0))), 1)
    assert warnings == []

  def test_without_sharding_a_leaf_is_a_numpy_array(self, folder):
    state = {'w': jnp.arange(6, dtype=jnp.bfloat16), 'n': np.arange(3), 'e': np.zeros((2, 0))}
    with Checkpoints(folder, keep_last=1) as c:
      save(c, 1, state)
      restored = c.restore_newest(abstract(state, lambda x: None)).state
    assert all(isinstance(x, np.ndarray) for x in restored.values())
    assert_same_bits(restored, {k: np.asarray(v) for k, v in state.items()})

  def test_a_part_of_the_state(self, folder, warnings):
    with Checkpoints(folder, keep_last=1) as c:
      save(c, 3)
    with Checkpoints(folder, read_only=True) as c:
      params = c.restore_newest(abstract({'params': make_state(0)['params']}), partial=True).state
    assert_same_bits(params, {'params': make_state(3)['params']})
    assert warnings == []

  def test_one_array_is_a_state(self, folder):
    with Checkpoints(folder, keep_last=1) as c:
      save(c, 1, jnp.arange(3))
      np.testing.assert_array_equal(c.restore_newest(abstract(jnp.arange(3))).state, [0, 1, 2])

  @pytest.mark.parametrize('to', [1, 4, 8])
  def test_onto_another_mesh(self, folder, to):
    """8 devices -> 1, 4, 8 (cut the other way); then back."""
    def cut(n, axis):
      mesh = Mesh(np.array(jax.devices()[:n]), ('x',))
      return lambda leaf: NamedSharding(mesh, PartitionSpec(
          *([None] * axis), 'x') if leaf.ndim == 2 and leaf.shape[axis] % n == 0 else PartitionSpec())
    state = make_state(5, size=8)
    eight = jax.tree.map(lambda x: jax.device_put(x, cut(8, 0)(x)), state)
    target = cut(to, 1)
    with Checkpoints(folder, keep_last=1) as c:
      save(c, 5, eight)
      restored = c.restore_newest(abstract(state, target)).state
      assert_same_bits(restored, state)
      for leaf in jax.tree.leaves(restored):
        assert leaf.sharding.is_equivalent_to(target(leaf), leaf.ndim)
      save(c, 6, restored)
      assert_same_bits(c.restore_newest(abstract(state, cut(8, 0))).state, state)

  def test_the_stream_state_may_move_on_while_it_is_written(self, folder, monkeypatch):
    write = saving._write_json
    def write_later(*args):
      time.sleep(0.2)
      write(*args)
    monkeypatch.setattr(saving, '_write_json', write_later)
    stream, meta = {'at': [1, 2]}, {'seed': 1}
    with Checkpoints(folder, keep_last=1) as c:
      c.save(1, make_state(1), stream_state=stream, meta=meta)
      stream['at'].append(3)
      meta['seed'] = 2
      c.wait()
      restored = c.restore_newest(abstract(make_state(0)))
    assert restored.stream_state == {'at': [1, 2]}
    assert restored.meta == {'seed': 1}

  @pytest.mark.parametrize('devices, spec', [(1, None), (8, 'x'), (8, None)])
  def test_buffers_may_be_donated_as_soon_as_save_returns(self, folder, devices, spec):
    """Steps that donate the state run while it is written; what was saved is what it was before."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ('x',))
    cut = NamedSharding(mesh, PartitionSpec(spec))
    step = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
    state = {str(i): jax.device_put(jnp.full((8, 1 << 15), i, jnp.float32), cut) for i in range(24)}
    first, state = state, step(state)  # compiled, and buffers of the runtime's own
    assert first['0'].is_deleted()  # this step does donate
    before = {k: np.array(v) for k, v in state.items()}
    with Checkpoints(folder, keep_last=1) as c:
      steps = 0
      assert c.save(1, state, stream_state={}, meta={})
      while steps == 0 or (c.is_saving and steps < 100):
        state, steps = step(state), steps + 1
      jax.block_until_ready(state)
      c.wait()
      restored = c.restore_newest(abstract(state, lambda x: x.sharding)).state
    for name, value in before.items():
      np.testing.assert_array_equal(restored[name], value)


class TestKeeping:

  def test_the_last_n_and_the_best(self, folder):
    losses = {1: 3.0, 2: 1.5, 3: 2.0, 4: None, 5: float('nan'), 6: 1.5}
    with Checkpoints(folder, keep_last=2, keep_best=True) as c:
      seen = {}
      for step, loss in losses.items():
        save(c, step, metrics=None if loss is None else {'validation_loss': loss})
        seen[step] = (c.steps(), c.best_step())
    assert seen == {1: ([1], 1), 2: ([1, 2], 2), 3: ([2, 3], 2), 4: ([2, 3, 4], 2),
                    5: ([2, 4, 5], 2), 6: ([5, 6], 6)}

  def test_the_best_is_known_to_the_next_process(self, folder):
    with Checkpoints(folder, keep_last=1, keep_best=True) as c:
      save(c, 1, metrics={'validation_loss': 1.0})
      save(c, 2, metrics={'validation_loss': 2.0})
    with Checkpoints(folder, keep_last=1, keep_best=True) as c:
      assert c.best_step() == 1
      save(c, 3, metrics={'validation_loss': 3.0})
      assert c.steps() == [1, 3]
    assert Checkpoints(folder, read_only=True).best_step() == 1

  def test_without_metrics_and_without_keep_best(self, folder):
    with Checkpoints(folder, keep_last=1, keep_best=True) as c:
      for step in range(3):
        save(c, step)
      assert c.steps() == [2]
      assert c.best_step() is None
    with Checkpoints(folder, keep_last=2) as c:
      save(c, 3, metrics={'validation_loss': 1.0})
      for step in (4, 5):
        save(c, step, metrics={'validation_loss': 2.0})
      assert c.steps() == [4, 5]

  def test_best_of(self):
    assert best_of({}) is None
    assert best_of({1: 2.0, 2: 1.0, 3: 1.0, 4: 5.0}) == 3

  def test_a_step_that_is_there_is_left(self, folder):
    with Checkpoints(folder, keep_last=2) as c:
      save(c, 1)
      inode = (folder / '1' / 'manifest.json').stat().st_ino
      assert save(c, 1, make_state(7))
      assert (folder / '1' / 'manifest.json').stat().st_ino == inode
      assert_holds(c.restore_newest(abstract(make_state(0))), 1)

  def test_force_replaces_the_one_that_is_there(self, folder, monkeypatch, warnings):
    with Checkpoints(folder, keep_last=2, keep_best=True) as c:
      save(c, 1)
      assert save(c, 1, make_state(7), force=True, metrics={'validation_loss': 1.0})
      assert_same_bits(c.restore_newest(abstract(make_state(0))).state, make_state(7))
      assert c.best_step() == 1
      with monkeypatch.context() as broken:  # and stays if the new one cannot be written
        break_saving(broken, 'the manifest')
        save(c, 1, make_state(8), force=True)
      assert [told[:24] for told in c.poll()] == ['could not save step 1: N']
      assert warnings == []
      assert_same_bits(c.restore_newest(abstract(make_state(0))).state, make_state(7))
      assert c.best_step() == 1
      assert c.steps() == [1]
      (folder / '1').rename(folder / '1.replaced')  # killed in between
    with Checkpoints(folder, keep_last=2) as c:
      assert_same_bits(c.restore_newest(abstract(make_state(0))).state, make_state(7))

  def test_keep_last_must_be_positive(self, folder):
    with pytest.raises(ConfigError, match=r'run.keep_last=0: must be at least 1'):
      Checkpoints(folder, keep_last=0)

  def test_read_only_writes_and_deletes_nothing(self, folder):
    with Checkpoints(folder, keep_last=3) as c:
      for step in (1, 2, 3):
        save(c, step)
    damage(folder / '3' / 'meta' / 'metadata')
    (folder / '4.partial').mkdir()
    before = sorted(str(p) for p in folder.rglob('*'))
    with Checkpoints(folder, keep_last=1, read_only=True) as c:
      assert_holds(c.restore_newest(abstract(make_state(0))), 2)
      with pytest.raises(ValueError, match='read-only'):
        save(c, 5)
    assert sorted(str(p) for p in folder.rglob('*')) == before
    with Checkpoints(folder.parent / 'none', read_only=True) as c:
      assert c.restore_newest(abstract(make_state(0))) is None
      assert c.steps() == []
    assert not (folder.parent / 'none').exists()


def test_going_back_drops_what_came_after_and_saves_it_again(folder):
  with Checkpoints(folder, keep_last=3, keep_best=True) as c:
    for step in (1, 2, 3):
      save(c, step, metrics={'validation_loss': 4.0 - step})
    c.wait()
    assert c.restore_newest(abstract(make_state(0)), below=3).step == 2
    assert c.restore_newest(abstract(make_state(0)), below=1) is None
    c.drop_after(1)
    assert c.steps() == [1] and c.best_step() == 1
    assert [p.name for p in folder.iterdir()] == ['1']
    save(c, 2, make_state(7))
    c.wait()
    assert_same_bits(c.restore_newest(abstract(make_state(0))).state, make_state(7))


def damage(path, at=None):
  data = bytearray(path.read_bytes())
  data[len(data) // 2 if at is None else at] ^= 0x10
  path.write_bytes(data)


class TestDamage:

  def test_every_file_flipped_cut_short_or_removed(self, folder, warnings):
    """Each is seen and the one before taken, or is harmless: the same bits come back."""
    rng = np.random.default_rng(0)
    with Checkpoints(folder, keep_last=2) as c:
      save(c, 1)
      save(c, 2)
    kept = folder.parent / 'kept'
    shutil.copytree(folder, kept)
    files = [p.relative_to(folder) for p in sorted((folder / '2').rglob('*')) if p.is_file()]
    assert len(files) > 10
    seen = {}
    for name in files:
      size = (folder / name).stat().st_size
      cases = {f'byte {at}': lambda p, at=at: damage(p, at)
               for at in {size - 1, int(rng.integers(0, size))} if size}
      cases |= {'cut short': lambda p, size=size: os.truncate(p, size // 2), 'removed': os.remove}
      for case, spoil in cases.items():
        spoil(folder / name)
        warnings.clear()
        with Checkpoints(folder, keep_last=2, read_only=True) as c:
          restored = c.restore_newest(abstract(make_state(0)))
        seen.setdefault(name.name if len(name.parts) == 2 else 'item', set()).add(restored.step)
        assert_holds(restored, restored.step)
        if restored.step == 1:
          assert len(warnings) == 1, (name, case)
          assert warnings[0].startswith('checkpoint of step 2 cannot be read: ')
          assert warnings[0].endswith('; trying the one before')
          assert '\n' not in warnings[0]
        else:
          assert warnings == [], (name, case)
        shutil.copyfile(kept / name, folder / name)
    assert seen['item'] == {1}  # nothing in an item's folder is harmless
    assert seen.keys() == {'item', 'manifest.json'} and 1 in seen['manifest.json']

  def test_what_cannot_be_read_for_a_moment_is_no_damage(self, folder, warnings, monkeypatch):
    with Checkpoints(folder, keep_last=2) as c:
      save(c, 1)
      save(c, 2)
    real, failing, slept = manifest._digest, [3], []
    def flaky(path):
      if failing[0] > 0:
        failing[0] -= 1
        raise OSError(errno.EIO, 'Input/output error')
      return real(path)
    monkeypatch.setattr(manifest, '_digest', flaky)
    monkeypatch.setattr(files_lib.time, 'sleep', slept.append)
    with Checkpoints(folder, keep_last=2) as c:
      assert_holds(c.restore_newest(abstract(make_state(0))), 2)
      assert slept and not [line for line in warnings if 'checkpoint' in line]
      failing[0] = 10_000
      with pytest.raises(RunError, match=r'2: .* cannot be read now \(Input/output error\), tried for 123 s; once it'):
        c.restore_newest(abstract(make_state(0)))
      assert c.steps() == [1, 2]   # none was put aside

  @pytest.mark.parametrize('where, name, error', [
      (checkpoint, '_read_json', OSError(errno.ESTALE, 'Stale file handle')),
      (checkpoint.named_arrays, 'read', ValueError('Error reading "d/0": [OS error 5: EIO Input/output error]'))])
  def test_nor_is_what_cannot_be_read_once_it_was_verified(self, folder, warnings, monkeypatch, where, name, error):
    with Checkpoints(folder) as c:
      save(c, 1)
    def fail(*args):
      raise error
    monkeypatch.setattr(files_lib.time, 'sleep', lambda seconds: None)
    with Checkpoints(folder) as c:
      monkeypatch.setattr(where, name, fail)
      with pytest.raises(RunError, match=r'1: cannot be read now \(.*\).*; once it can, the same command carries on'):
        c.restore_newest(abstract(make_state(0)))
      assert c.steps() == [1]

  def test_the_warning_names_step_and_reason_and_the_run_saves_that_step_again(
      self, folder, warnings):
    with Checkpoints(folder, keep_last=3) as c:
      for step in (1, 2, 3):
        save(c, step, metrics={'validation_loss': -step})
    damage(folder / '2' / 'stream' / 'metadata')
    shutil.rmtree(folder / '3' / 'state')
    with Checkpoints(folder, keep_last=3, keep_best=True) as c:
      assert_holds(c.restore_newest(abstract(make_state(0))), 1)
      assert len(warnings) == 2
      assert 'step 3 cannot be read: state/' in warnings[0]
      assert 'is missing' in warnings[0]
      assert 'step 2 cannot be read: stream/metadata is damaged' in warnings[1]
      assert c.steps() == [1]
      assert c.best_step() == 1
      assert sorted(p.name for p in folder.iterdir()) == ['1', '2.unreadable', '3.unreadable']
      assert save(c, 2)
      assert_holds(c.restore_newest(abstract(make_state(0))), 2)

  def test_none_readable_is_an_error_and_touches_nothing(self, folder):
    with Checkpoints(folder, keep_last=2) as c:
      save(c, 1)
      save(c, 2)
    for step in '12':
      os.remove(folder / step / 'manifest.json')
    with Checkpoints(folder, keep_last=2) as c:
      with pytest.raises(ConfigError, match='none of its checkpoints can be read') as e:
        c.restore_newest(abstract(make_state(0)))
      assert 'step 2: manifest.json is missing; step 1: manifest.json is missing' in str(e.value)
      assert '\n' not in str(e.value)
      assert c.steps() == [1, 2]

  def test_a_step_asked_for_by_number(self, folder):
    with Checkpoints(folder, keep_last=2) as c:
      save(c, 1)
      save(c, 2)
      with pytest.raises(ConfigError, match=r'has no checkpoint of step 3; it has 1, 2'):
        c.restore_step(3, abstract(make_state(0)))
      damage(folder / '2' / 'meta' / 'metadata')
      with pytest.raises(ConfigError, match=r'step 2 cannot be read .meta/metadata is damaged'):
        c.restore_step(2, abstract(make_state(0)))

  def test_a_half_written_one_is_not_taken_and_is_cleaned_up(self, folder, warnings):
    with Checkpoints(folder, keep_last=2) as c:
      save(c, 1)
    shutil.copytree(folder / '1', folder / '2.partial')
    with Checkpoints(folder, keep_last=2) as c:
      assert_holds(c.restore_newest(abstract(make_state(0))), 1)
      assert save(c, 2)
      assert c.steps() == [1, 2]
    assert sorted(p.name for p in folder.iterdir()) == ['1', '2']
    assert warnings == []

  @pytest.mark.parametrize('name, change, told', [
      ('shape', lambda s: s | {'odd': jnp.zeros(6)}, 'odd is float32[5] in the checkpoint and float32[6] in'),
      ('type', lambda s: s | {'step': jnp.float32(1)}, 'step is int32[] in the checkpoint and float32[] in'),
      ('more', lambda s: s | {'ema': jnp.zeros(2)}, 'ema is absent in the checkpoint and float32[2] in'),
      ('less', lambda s: {k: v for k, v in s.items() if k != 'flag'},
       'flag is bool[] in the checkpoint and absent in'),
      ('key', lambda s: s | {'key': jax.random.key(0, impl='rbg')}, 'key is key<fry>[] in the checkpoint and key<rbg>[]'),
  ])
  def test_another_model_is_not_called_damage(self, folder, warnings, name, change, told):
    with Checkpoints(folder, keep_last=2) as c:
      save(c, 1)
      save(c, 2)
      with pytest.raises(ConfigError, match='is of another model') as e:
        c.restore_newest(abstract(change(make_state(0))))
      assert told in str(e.value)
      assert '\n' not in str(e.value)
      assert c.steps() == [1, 2]
    assert warnings == []


def break_saving(monkeypatch, where):
  """The disk is full, at one of the places that write."""
  from orbax.checkpoint._src.serialization import jax_array_handlers

  error = OSError(28, 'No space left on device')
  def full(*args, **kwargs):
    raise error

  async def full_later(*args, **kwargs):
    await asyncio.sleep(0.05)
    raise error
  match where:
    case 'at the start':
      monkeypatch.setattr(saving.Save, '_make_folders', full)
    case 'an array':
      monkeypatch.setattr(jax_array_handlers, '_async_serialize_replica_slices', full_later)
    case 'the manifest':
      monkeypatch.setattr(manifest, 'write', full)
    case 'the JSON':
      monkeypatch.setattr(saving, '_write_json', full)
    case 'the rename':
      monkeypatch.setattr(saving.os, 'rename', full)


class TestFailures:
  """A save that fails costs that checkpoint and nothing else."""

  @pytest.mark.parametrize('where', ['at the start', 'an array', 'the manifest', 'the JSON', 'the rename'])
  def test_the_run_goes_on_and_the_next_save_works(self, folder, monkeypatch, warnings, where):
    with Checkpoints(folder, keep_last=1, keep_best=True) as c:
      save(c, 1, metrics={'validation_loss': 2.0})
      save(c, 2, metrics={'validation_loss': 3.0})
      with monkeypatch.context() as broken:
        break_saving(broken, where)
        started = save(c, 3, metrics={'validation_loss': 1.0})
        assert started == (where != 'at the start')
      assert c.poll() == [
          'could not save step 3: No space left on device (OSError); the last good checkpoint is '
          'step 2; training goes on']
      assert c.steps() == [1, 2]
      assert c.best_step() == 1
      assert_holds(c.restore_newest(abstract(make_state(0))), 2)
      assert save(c, 4, metrics={'validation_loss': 4.0})
      # No torn folder keeps its room, nor is one forgotten that was to be deleted after step 3.
      assert sorted(p.name for p in folder.iterdir()) == ['1', '4']
      assert_holds(c.restore_newest(abstract(make_state(0))), 4)
      assert c.poll() == []
    assert warnings == []  # told by `poll` alone

  def test_what_is_written_after_a_failure_is_deleted_by_the_next_save(self, folder, monkeypatch):
    with Checkpoints(folder, keep_last=1) as c:
      with monkeypatch.context() as broken:
        break_saving(broken, 'an array')
        save(c, 1)
        c.wait()
      (folder / '1.partial' / 'state').mkdir(parents=True)   # as a write of it that was late does
      (folder / '1.partial' / 'state' / 'late').write_text('x')
      save(c, 2)
      assert [p.name for p in folder.iterdir()] == ['2']

  def test_whether_the_last_save_failed_is_known(self, folder, monkeypatch):
    with Checkpoints(folder, keep_last=1) as c:
      assert not c.failing
      with monkeypatch.context() as broken:
        break_saving(broken, 'the manifest')
        save(c, 1)
        c.wait()
        assert c.failing
      save(c, 1)
      c.wait()
      assert not c.failing and c.steps() == [1]

  def test_poll_tells_without_a_wait(self, folder, monkeypatch, warnings):
    with Checkpoints(folder, keep_last=1) as c:
      with monkeypatch.context() as broken:
        break_saving(broken, 'an array')
        assert c.save(1, make_state(1), stream_state={}, meta={})
        deadline = time.time() + 10
        while not (told := c.poll()) and time.time() < deadline:
          time.sleep(0.01)
      assert told == [
          'could not save step 1: No space left on device (OSError); the last good checkpoint is '
          'none yet; training goes on']
      assert warnings == []
      assert c.restore_newest(abstract(make_state(0))) is None

  def test_an_old_one_that_cannot_be_deleted(self, folder, monkeypatch):
    def refuse(*args, **kwargs):
      raise PermissionError(13, 'Permission denied')
    with Checkpoints(folder, keep_last=1) as c:
      save(c, 1)
      with monkeypatch.context() as broken:
        broken.setattr(checkpoint, 'shutil', types.SimpleNamespace(rmtree=refuse))
        save(c, 2)
      assert c.poll() == ['saved step 2, but could not tidy up after it: Permission denied '
                          '(PermissionError)']
      assert_holds(c.restore_newest(abstract(make_state(0))), 2)
      save(c, 3)
      assert c.steps() == [3]

  # A write of tensorstore that ends after the failure finds Orbax's event loop closed.
  def test_a_long_reason_keeps_the_systems_error_wherever_it_stands(self):
    long = ValueError('a' * 200 + ' [OS error 28: ENOSPC No space left on device] ' + 'z' * 400)
    told = saving.reason(long)
    assert 'No space left on device' in told and len(told) < 250
    assert saving.reason(ValueError('b' * 200 + 'c' * 200)).endswith('c' * 200 + ' (ValueError)')

  @pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
  def test_a_full_disk_for_real(self, tmp_path, warnings):
    disk = tmp_path / 'disk'
    disk.mkdir()
    made = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=2m', 'tmpfs', disk],
                          capture_output=True, text=True)
    if made.returncode:
      pytest.skip(f'cannot mount a small file system here: {made.stderr.strip()}')
    try:
      with Checkpoints(disk / 'checkpoints', keep_last=1) as c:
        assert save(c, 1)
        (disk / 'filler').write_bytes(b'x' * 1_500_000)
        large = make_state(2) | {'large': jnp.asarray(np.random.default_rng(0).normal(size=200_000))}
        save(c, 2, large)
        told, = c.poll()
        assert told.startswith('could not save step 2: ')
        assert 'No space left on device' in told
        assert told.endswith('the last good checkpoint is step 1; training goes on')
        assert c.steps() == [1]
        assert_holds(c.restore_newest(abstract(make_state(0))), 1)
        os.remove(disk / 'filler')
        assert save(c, 3, large | make_state(3))
        assert os.listdir(disk / 'checkpoints') == ['3']
        assert c.poll() == []
        assert warnings == []
    finally:
      subprocess.run(['umount', '-l', disk], check=True)

  def test_what_the_caller_did_wrong_is_raised(self, folder):
    with Checkpoints(folder, keep_last=1) as c:
      gone = jnp.arange(3)
      gone.delete()
      with pytest.raises(ValueError, match=r'state leaf a.b was donated'):
        save(c, 1, {'a': {'b': gone}})
      with pytest.raises(TypeError, match='state leaf step is a int, and must be an array'):
        save(c, 1, {'step': 1})
      with pytest.raises(ValueError, match='two leaves of the state have one name'):
        save(c, 1, {'a': {'b': jnp.zeros(1)}, 'a.b': jnp.zeros(1)})
      with pytest.raises(TypeError, match='not JSON serializable'):
        save(c, 1, stream_state={'at': np.int64(1)})
      assert c.steps() == []

  def test_a_directory_that_somebody_moved_away(self, folder):
    with Checkpoints(folder, keep_last=1) as c:
      save(c, 1)
      folder.rename(folder.parent / 'away')
      assert c.steps() == []
      save(c, 2)
      assert_holds(c.restore_newest(abstract(make_state(0))), 2)

  def test_a_directory_that_cannot_be_made(self):
    with pytest.raises(ConfigError, match='cannot make the folder of the checkpoints'):
      Checkpoints('/proc/longctx/checkpoints', keep_last=1)


SAVE_FOREVER = """
import sys
import jax
import numpy as np
from longctx.training.checkpoint import Checkpoints
one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
make = lambda step: {str(i): jax.device_put(np.full((64, 64), step + i, np.float32)) for i in range(4)}
asked = {str(i): jax.ShapeDtypeStruct((64, 64), np.float32, sharding=one) for i in range(4)}
with Checkpoints(sys.argv[1], keep_last=2) as c:
  restored = c.restore_newest(asked)
  step = restored.step if restored else 0
  print(step, flush=True)
  while True:
    step += 1
    assert c.save(step, make(step), stream_state={'at': step}, meta={'seed': step})
    print(step, flush=True)
"""


def test_killed_at_any_instant(folder, warnings):
  """SIGKILL while it saves without a pause: what is found is whole, and not far behind."""
  rng = np.random.default_rng(0)
  last = 0
  asked = {str(i): jax.ShapeDtypeStruct((64, 64), jnp.float32) for i in range(4)}
  for _ in range(5):
    child = subprocess.Popen([sys.executable, '-c', SAVE_FOREVER, folder], cwd=ROOT, text=True,
                             stdout=subprocess.PIPE, env=os.environ | {'JAX_PLATFORMS': 'cpu'})
    try:
      told = [child.stdout.readline() for _ in range(4)]  # two at least are on disk
      time.sleep(float(rng.uniform(0, 0.3)))
      child.send_signal(signal.SIGKILL)
      told += child.stdout.read().split()
    finally:
      child.kill()
      child.wait()
      child.stdout.close()
    assert int(told[0]) == last  # the next process takes what this one has found
    with Checkpoints(folder, read_only=True) as c:
      restored = c.restore_newest(asked)
    assert restored.stream_state == {'at': restored.step}
    assert restored.meta == {'seed': restored.step}
    for name, value in restored.state.items():
      np.testing.assert_array_equal(value, np.full((64, 64), restored.step + int(name)))
    assert restored.step >= int(told[-1]) - 1  # that one was being written
    last = restored.step
  # A checkpoint cut short by its own deletion is no cause for alarm: a newer one stands before it.
  assert warnings == []


PROCESS = """
import sys
from pathlib import Path
import jax
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 2)
me = int(sys.argv[1])
jax.distributed.initialize(sys.argv[3], 2, me)
import jax.numpy as jnp, numpy as np
from longctx.training.checkpoint import Checkpoints
from longctx.training.processes import barrier
from jax.sharding import NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((4,), ('x',))
cut, whole = NamedSharding(mesh, P('x')), NamedSharding(mesh, P())
def make(step):
  w = np.arange(16.0).reshape(8, 2) + step
  put = lambda v, s: jax.make_array_from_callback(v.shape, s, lambda i: v[i])
  return {'w': put(w, cut), 'b': put(w[0], whole)}
def abstract(s):
  return {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=v.sharding) for k, v in s.items()}
def holds(r, step):
  assert (r.step, r.stream_state, r.meta) == (step, {'process': me, 'pad': 'x' * me * 99}, {'seed': step})
  want = make(step)
  for k, v in r.state.items():
    for a, b in zip(v.addressable_shards, want[k].addressable_shards):
      np.testing.assert_array_equal(a.data, b.data)
"""

TWO_PROCESSES = """
with Checkpoints(sys.argv[2], keep_last=2) as c:
  for step in (1, 2, 3):
    assert c.save(step, make(step), stream_state={'process': me, 'pad': 'x' * me * 99}, meta={'seed': step})
  c.wait()
  assert c.steps() == [2, 3], c.steps()
  holds(c.restore_newest(abstract(make(0))), 3)
  barrier('before the damage')
  if me == 0:
    (Path(sys.argv[2]) / '3' / 'meta' / 'metadata').write_text('{}')
  barrier('after the damage')
  holds(c.restore_newest(abstract(make(0))), 2)
  assert c.steps() == [2]
print('done', me, flush=True)
"""


def in_two_processes(program, folder, *arguments):
  """Both end well, and soon: neither waits for the other in vain."""
  with socket.socket() as s:
    s.bind(('localhost', 0))
    address = f'localhost:{s.getsockname()[1]}'
  children = [subprocess.Popen(
      [sys.executable, '-c', PROCESS + program, str(i), folder, address, *arguments], cwd=ROOT, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for i in range(2)]
  try:
    outputs = [child.communicate(timeout=100)[0] for child in children]
  finally:
    for child in children:
      child.kill()
      child.wait()
  assert [child.returncode for child in children] == [0, 0], '\n'.join(outputs)
  assert all(f'done {i}' in output for i, output in enumerate(outputs))


@pytest.mark.slow
def test_two_processes(folder):
  in_two_processes(TWO_PROCESSES, folder)
  assert json.loads((folder / '2' / 'stream' / 'metadata').read_text())['processes'] == [
      {'process': 0, 'pad': ''}, {'process': 1, 'pad': 'x' * 99}]
  # One process restores the arrays of two, and says that it cannot carry on two streams.
  want = {'w': np.arange(16.0, dtype=np.float32).reshape(8, 2) + 2}
  with Checkpoints(folder, read_only=True) as c:
    asked = {'w': jax.ShapeDtypeStruct((8, 2), jnp.float32, sharding=one_device(None)),
             'b': jax.ShapeDtypeStruct((2,), jnp.float32, sharding=one_device(None))}
    with pytest.raises(ConfigError, match='saved by 2 processes, and 1 cannot carry on'):
      c.restore_newest(asked)
    del asked['b']
    np.testing.assert_array_equal(c.restore_newest(asked, partial=True).state['w'], want['w'])


ONE_FAILS = """
import pytest
from tests.test_checkpoint import FAILING, break_saving
more = lambda step: dict(stream_state={'process': me, 'pad': 'x' * me * 99}, meta={'seed': step})
with Checkpoints(sys.argv[2], keep_last=1) as c:
  assert c.save(1, make(1), **more(1))
  for i, (who, where) in enumerate(FAILING):
    last, step = 1 + 2 * i, 2 + 2 * i
    c.wait()
    barrier('begin')
    with pytest.MonkeyPatch.context() as broken:
      if me == who:
        break_saving(broken, where)
      assert c.save(step, make(step), **more(step)) == (where != 'at the start')
      c.wait()
    assert c.failing and c.steps() == [last]
    named = '' if where == 'at the start' else f'process {who}: '
    assert c.poll() == [f'could not save step {step}: {named}No space left on device (OSError); the last good '
                        f'checkpoint is step {last}; training goes on']
    barrier('failed')
    assert sorted(p.name for p in Path(sys.argv[2]).iterdir()) == [str(last)]
    barrier('looked')
    assert c.save(step + 1, make(step + 1), **more(step + 1))
    c.wait()
    assert not c.failing and c.poll() == []
    holds(c.restore_newest(abstract(make(0))), step + 1)
print('done', me, flush=True)
"""
FAILING = [(1, 'an array'), (0, 'an array'), (0, 'at the start'), (0, 'the JSON'), (0, 'the manifest'), (0, 'the rename')]


@pytest.mark.slow
def test_saves_that_one_of_two_processes_fails_at(folder):
  """Both say so at once, nothing of it stays, and the next one works."""
  in_two_processes(ONE_FAILS, folder)
