"""SIGKILL at random instants: the run that carries on is the run that was never killed."""

import collections
import contextlib
import functools
import json
import random
import re
import signal
import time

import jax
import numpy as np
import pytest

from longctx import assembly
from longctx.training.checkpoint import Checkpoints
from longctx.training.saving import PARTIAL
from tests.programs import launch, tiny

LIMIT = 600   # seconds for one process, on a machine that does much else


def wait_for(done, child, output):
  """Until done(what the process has said); seconds it took."""
  began = time.monotonic()
  while not done(output.read_text()):
    assert child.poll() is None, f'it ended too soon: {output.read_text()}'
    assert time.monotonic() < began + LIMIT, 'the run hangs'
    time.sleep(0.005)
  return time.monotonic() - began


def last_step(said):
  return int(([0, *re.findall(r'^step +(\d+)/', said, re.MULTILINE)])[-1])


@contextlib.contextmanager
def running(arguments, output, quick):
  child = launch.start(arguments, output, quick=quick)
  try:
    yield child
  finally:
    child.kill()
    child.wait()


def phase(workdir, output):
  """What the process did as it was killed, from what it left."""
  if 'first step after' not in output.read_text():
    return 'start-up'
  if list((workdir / 'checkpoints').glob(f'*{PARTIAL}')):
    return 'saving'
  steps = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  last = steps[-1] if steps else {}
  return ('perplexity' if last and last['step'] % 100 == 0 and 'validation_loss' not in last
          else 'steps')


def logged(workdir):
  clock = ('tokens_per_second', 'seconds')
  return [{k: v for k, v in json.loads(line).items() if k not in clock}
          for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def every_bit(config, workdir):
  """{step: the bytes of its state}: all checkpoints on disk can be read."""
  a = assembly.assemble(config, jax.devices()[:1])
  data = lambda x: (jax.random.key_data(x) if jax.dtypes.issubdtype(
      x.dtype, jax.dtypes.prng_key) else x)
  with Checkpoints(workdir / 'checkpoints', read_only=True) as checkpoints:
    found = {at: checkpoints.restore_step(at, a.abstract) for at in checkpoints.steps()}
  return {at: (one.stream_state, [np.asarray(data(x)).tobytes()
                                  for x in jax.tree.leaves(one.state)])
          for at, one in found.items()}


@pytest.mark.parametrize('kills,steps', [
    pytest.param(2, 200, marks=pytest.mark.slow), pytest.param(20, 2000, marks=pytest.mark.slow)])
def test_killed_is_straight(tmp_path, kills, steps):
  text = {'files': tiny.write_corpus(tmp_path / 'text'), 'cache_dir': str(tmp_path / 'cache')}
  changes = {'model_dropout': 0.1, 'optimizer_ema': 0.99, 'run_num_steps': steps,
             'run_log_every': 5, 'run_eval_every': 100, 'run_checkpoint_every': max(20, steps // 40),
             'run_compilation_cache': str(tmp_path / 'xla')}
  arguments = lambda folder: launch.command(folder, text, 'windowed', **changes)
  run = functools.partial(running, quick=kills <= 2)   # the many kills are of the real program
  straight, killed = tmp_path / 'straight', tmp_path / 'killed'

  # Undisturbed; how long its parts take scales the instants of the kills.
  output = tmp_path / 'straight.out'
  with run(arguments(straight), output) as child:
    starting = wait_for(lambda said: 'first step after' in said, child, output)
    began = time.monotonic()
    assert child.wait(LIMIT) == 0, output.read_text()
    training = time.monotonic() - began

  chance, phases, reached = random.Random(1), collections.Counter(), []
  for k in range(kills):
    target = (k + chance.random()) * steps / (kills + 1)
    early = chance.random() < 0.2 if kills > 2 else k == 0
    output = tmp_path / f'killed{k}.out'
    with run(arguments(killed), output) as child:
      if not early:
        wait_for(lambda said, target=target: last_step(said) >= target, child, output)
      # Started again it compiles nothing, and a fifth of the first start is all it takes.
      time.sleep(chance.uniform(0, starting / 5 if early else training * 20 / steps))
      assert child.poll() is None, f'it ended before it was killed: {output.read_text()}'
    phases[phase(killed, output)] += 1
    saved = Checkpoints(killed / 'checkpoints', read_only=True).steps()
    reached.append(max(saved, default=0))

  output = tmp_path / 'last.out'
  with run(arguments(killed), output) as child:
    assert child.wait(LIMIT) == 0, output.read_text()
  print(f'{kills} kills {dict(phases)}, carried on from {reached}; undisturbed {starting:.1f} s to '
        f'the first step and {training:.1f} s of training')
  assert reached == sorted(reached)
  assert logged(killed) == logged(straight)   # each step exactly once, bit for bit
  assert [line['step'] for line in logged(killed) if 'loss' in line] == list(
      range(5, steps + 1, 5))
  config = tiny.get_config('windowed')
  for name, value in changes.items():
    section, _, field = name.partition('_')
    config[section][field] = value
  ours, theirs = every_bit(config, killed), every_bit(config, straight)
  assert ours[steps] == theirs[steps]
  assert ours.keys() == theirs.keys()


@pytest.mark.slow
def test_four_processes_of_which_one_hangs_or_is_killed(tmp_path):
  """The others leave within a bounded time and name it; the same command carries on, and loses no step."""
  text = {'files': tiny.write_corpus(tmp_path / 'text'), 'cache_dir': str(tmp_path / 'cache')}
  changes = {'run_num_steps': 120, 'run_log_every': 10, 'run_eval_every': 0, 'run_checkpoint_every': 10,
             'run_watchdog_seconds': 120, 'run_check_hosts_every': 20, 'run_compilation_cache': str(tmp_path / 'xla')}
  folder, reached = tmp_path / 'w', 0
  # (signal, to which, after so many steps, what each of the others says)
  lost = r'process {} is lost: no sign of it for \d+ s at step \d+, (steps|input|checkpoints) '
  faults = [(signal.SIGSTOP, 1, 20, lost.format(1)), (signal.SIGKILL, 2, 50, lost.format(2)),
            (signal.SIGKILL, 0, 80, lost.format(0))]
  for number, victim, after, said in faults:
    with launch.several(launch.command(folder, text, 'packed', **changes), tmp_path / f'{after}.out',
                        processes=4, devices=1) as (children, files):
      wait_for(lambda output, after=after: last_step(output) >= after, children[0], files[0])
      children[victim].send_signal(number)
      others = [i for i in range(4) if i != victim]
      for i in others:
        children[i].wait(LIMIT)
      outputs = [file.read_text() for file in files]
    assert [children[i].returncode for i in others] == [75] * 3, '\n'.join(outputs)
    for i in others:
      assert re.search(said, outputs[i]), outputs[i]
      assert 'the run ends, and the same command carries on' in outputs[i]
    if reached:
      assert f'resumed at step {reached}' in outputs[0]
    steps = Checkpoints(folder / 'checkpoints', read_only=True).steps()
    assert after - 10 <= steps[-1]   # the last save, or the one before, which was under way
    reached = steps[-1]
  with launch.several(launch.command(folder, text, 'packed', **changes), tmp_path / 'last.out',
                      processes=2, devices=1) as (children, files):
    assert [child.wait(LIMIT) for child in children] == [0, 0], files[0].read_text()
    assert f'resumed at step {reached}' in files[0].read_text()
  assert [line['step'] for line in logged(folder) if 'loss' in line] == list(range(10, 121, 10))
  found = json.loads((folder / 'badput.json').read_text())
  assert found['starts'] == 4 and found['step'] == 120 and found['seconds']['down'] > 0
