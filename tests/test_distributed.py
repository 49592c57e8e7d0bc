"""Two processes with four devices each are one run: as one process with eight, bit for bit resumed."""

import json
import re
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from longctx import main, train
from longctx.errors import ConfigError
from longctx.parallel import mesh
from longctx.training import workdir
from longctx.training.checkpoint import Checkpoints
from tests.compilation import quick_compilation  # noqa: F401
from tests.programs import launch, tiny

pytestmark = pytest.mark.usefixtures('quick_compilation')
# What the library of CPU collectives says, of several threads at once and so in pieces of any order.
GLOO = re.compile(r'\[Gloo\] Rank| is connected to| peer ranks\.|'
                  r' ?Expected number of connected peer ranks is|[\d\s:]')
LIMIT = 900   # seconds for a run, on a machine that does much else
CHANGES = {'run_num_steps': 30, 'run_log_every': 2, 'run_eval_every': 15,
           'run_checkpoint_every': 10, 'optimizer_ema': 0.9}


@pytest.fixture(scope='module')
def home(tmp_path_factory):
  return tmp_path_factory.mktemp('distributed')


@pytest.fixture(scope='module')
def text(home):
  return {'files': tiny.write_corpus(home / 'text'), 'cache_dir': str(home / 'cache')}


def run_pair(home, name, text, variant='windowed', stop=None, number=signal.SIGTERM, limit=LIMIT, **changes):
  """Runs two processes to their end; `stop`: the process that gets a signal once steps are made."""
  arguments = launch.command(home / name, text, variant,
                             run_compilation_cache=str(home / 'xla'), **changes)
  with launch.several(arguments, home / f'{name}.out') as (children, files):
    deadline = time.monotonic() + limit
    if stop is not None:
      while 'step  4/30' not in files[0].read_text():
        assert time.monotonic() < deadline, files[0].read_text()
        time.sleep(0.005)
      children[stop].send_signal(number)
    while any(child.poll() is None for child in children) and time.monotonic() < deadline:
      time.sleep(0.05)
    codes = [child.poll() for child in children]
  return codes, [file.read_text() for file in files]


def run_alone(folder, text, variant='windowed', **changes):
  """The same in this process, on its eight devices."""
  config = tiny.get_config(variant)
  config.data.update(text)
  for name, value in changes.items():
    section, _, field = name.partition('_')
    config[section][field] = value
  train.run(config, str(folder), allow_config_change='run.compilation_cache')


def logged(folder):
  clock = ('tokens_per_second', 'seconds')
  return [{k: v for k, v in json.loads(line).items() if k not in clock}
          for line in (Path(folder) / 'metrics.jsonl').read_text().splitlines()]


def assert_close(ours, theirs):
  """To rounding: sums over devices are made in another order, and a gradient's norm shows it."""
  assert [line['step'] for line in ours] == [line['step'] for line in theirs]
  for a, b in zip(ours, theirs):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_allclose(a[name], b[name], rtol=1e-3 if name == 'grad_norm' else 1e-5,
                                 err_msg=f'{name} of step {a["step"]}')


@pytest.fixture(scope='module')
def pair(home, text):
  codes, outputs = run_pair(home, 'pair', text, **CHANGES)
  assert codes == [0, 0], '\n'.join(outputs)
  return home / 'pair', outputs


def test_two_processes_are_as_one(home, text, pair):
  folder, outputs = pair
  run_alone(home / 'alone', text, **CHANGES)
  assert_close(logged(folder), logged(home / 'alone'))
  assert [line['step'] for line in logged(folder) if 'loss' in line] == list(range(2, 31, 2))
  # The first process alone speaks and writes.
  assert 'on data 8 x seq 1 x model 1' in outputs[0]
  assert 'step 30/30' in outputs[0]
  assert GLOO.sub('', outputs[1]) == ''
  assert len(list(folder.glob('tensorboard/events*'))) == 1
  assert json.loads((folder / 'evaluation.json').read_text())['step'] == 30


@pytest.mark.slow
def test_stopped_by_a_signal_to_one_and_carried_on(home, text, pair):
  codes, outputs = run_pair(home, 'stopped', text, stop=1, **CHANGES)
  assert codes == [75, 75], '\n'.join(outputs)
  at, = Checkpoints(home / 'stopped' / 'checkpoints', read_only=True).steps()[-1:]
  assert 4 <= at < 30
  assert f'saved step {at}; the same command carries on from there' in outputs[0]
  shutil.copytree(home / 'stopped', home / 'one')
  codes, outputs = run_pair(home, 'stopped', text, **CHANGES)
  assert codes == [0, 0], '\n'.join(outputs)
  assert f'resumed at step {at}' in outputs[0]
  assert logged(home / 'stopped') == logged(pair[0])   # bit for bit
  run_alone(home / 'one', text, **CHANGES)             # one process carries on what two began
  assert_close(logged(home / 'one'), logged(pair[0]))


STOPS = """
import os, signal, sys
import jax
from longctx import main, train
evaluate = train.evaluate
def stopped(*args, **kwargs):   # the second process is asked to stop when an evaluation begins
  if jax.process_index() == 1:
    os.kill(os.getpid(), signal.SIGTERM)
  return evaluate(*args, **kwargs)
train.evaluate = stopped
sys.exit(main.main(sys.argv))
"""


@pytest.mark.slow
def test_stopped_by_a_signal_to_one_while_both_evaluate(home, text, pair):
  command = launch.command(home / 'evaluating', text, 'windowed', run_compilation_cache=str(home / 'xla'), **CHANGES)
  with launch.several([command[0], '-c', STOPS, *command[3:]], home / 'evaluating.out') as (children, files):
    assert [child.wait(LIMIT) for child in children] == [75, 75], files[0].read_text()
    assert 'saved step 15; the same command carries on from there' in files[0].read_text()
  assert not [line for line in logged(home / 'evaluating') if 'validation_loss' in line]
  codes, outputs = run_pair(home, 'evaluating', text, **CHANGES)
  assert codes == [0, 0], '\n'.join(outputs)
  assert logged(home / 'evaluating') == logged(pair[0])   # bit for bit


HANGS = """
import sys, time
import jax
from longctx import assembly, main, train
def hang(*args, **kwargs):   # in a call from which Python's handlers are not called
  print('hangs', flush=True)
  wait = lambda x: time.sleep(600) or x
  jax.jit(lambda x: jax.pure_callback(wait, x, x))(1.0).block_until_ready()
owner = dict(assemble=assembly, jit_step=train)[sys.argv[1]]
setattr(owner, sys.argv.pop(1), hang)
sys.exit(main.main(sys.argv))
"""


@pytest.mark.parametrize('mode, place', [('train', 'assemble'), ('eval', 'assemble'), ('train', 'jit_step')])
def test_a_signal_at_the_start_and_while_it_evaluates(tmp_path, text, mode, place):
  """JAX's service for preemptions, in its own hands, would take the signal and go on."""
  folder = tmp_path / 'w'
  folder.mkdir()
  if mode == 'eval':
    (folder / 'config.json').write_text('{}')
  command = launch.command(folder, text)
  arguments = [command[0], '-c', HANGS, place, *command[3:], f'--mode={mode}']
  with launch.several(arguments, tmp_path / 'out', processes=1, devices=1) as ((child,), (file,)):
    deadline = time.monotonic() + LIMIT
    while 'hangs' not in file.read_text():
      assert time.monotonic() < deadline and child.poll() is None, file.read_text()
      time.sleep(0.05)
    time.sleep(0.5)
    child.send_signal(signal.SIGTERM)
    assert child.wait(60) == 75, file.read_text()
    assert file.read_text().endswith('longctx: SIGTERM: left at once; the same command carries on\n')


@pytest.mark.parametrize('victim', [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_process_is_named_by_the_other(home, text, pair, victim):
  """Without a file of theirs: nothing but the coordinator, which dies with the first, need be shared."""
  name, other = f'killed_{victim}', 1 - victim
  began = time.monotonic()
  codes, outputs = run_pair(home, name, text, stop=victim, number=signal.SIGKILL, **(CHANGES | {'run_num_steps': 30}))
  print(f'{time.monotonic() - began:.1f} s')
  assert codes[victim] == -signal.SIGKILL and codes[other] == 75, '\n'.join(outputs)
  assert re.search(rf'longctx: process {victim} is lost: no sign of it for \d+ s at step \d+, \w+ \(.*, pid \d+\); '
                   'the run ends, and the same command carries on', outputs[other]), outputs[other]
  assert re.search(rf'process {other}: step \d+, \w+ \(said this\)', outputs[other])
  assert not (home / name / 'heartbeats').exists()


@pytest.mark.slow
def test_tasks_are_put_by_two_processes_as_by_one(home, text, pair):
  shutil.copytree(pair[0], home / 'tasks')
  asked = dict(eval_tasks="('parity','induction')", eval_lengths='(96,200)', eval_samples=10,
               eval_segment=64, eval_answers='true')
  arguments = [*launch.command(home / 'tasks', text, 'windowed', run_compilation_cache=str(home / 'xla'),
                               **CHANGES, **asked), '--mode=eval']
  with launch.several(arguments, home / 'tasks.out') as (children, files):
    codes = [child.wait(LIMIT) for child in children]
    outputs = [file.read_text() for file in files]
  assert codes == [0, 0], '\n'.join(outputs)
  two = [json.loads(line) for line in (home / 'tasks' / 'tasks.jsonl').read_text().splitlines()]
  assert (home / 'tasks' / 'tasks.md').read_text() in outputs[0]
  assert 'parity' not in outputs[1]   # the first process alone speaks and writes
  shutil.copytree(pair[0], home / 'tasks_alone')
  command = [*launch.command(home / 'tasks_alone', text, 'windowed', **CHANGES, **asked), '--mode=eval']
  assert main.main(['main', *command[3:]]) == 0
  one = [json.loads(line) for line in (home / 'tasks_alone' / 'tasks.jsonl').read_text().splitlines()]
  assert len(one) == len(two) == 40
  for a, b in zip(one, two):
    assert a.pop('answer_logprob') == pytest.approx(b.pop('answer_logprob'), rel=1e-4)
    del a['config'], b['config']   # that of the programs' folder
    for overrides in (a['overrides'], b['overrides']):
      overrides.pop('run.compilation_cache', None)
    assert a == b


@pytest.mark.slow
def test_the_sequence_cut_over_processes(home, text):
  changes = {'mesh_layout': 'sequence', 'mesh_data': 1, 'mesh_seq': 8}
  codes, outputs = run_pair(home, 'sequence', text, 'packed', **changes)
  assert codes == [0, 0], '\n'.join(outputs)
  assert 'on data 1 x seq 8 x model 1' in outputs[0]
  run_alone(home / 'whole', text, 'packed')
  assert_close(logged(home / 'sequence'), logged(home / 'whole'))


@pytest.mark.slow
def test_a_held_workdir_is_refused_by_all(home, text):
  """The one that finds it held tells the others, which would wait for it."""
  with workdir.lock(home / 'held'):
    codes, outputs = run_pair(home, 'held', text)
  assert codes == [2, 2], '\n'.join(outputs)
  for output in outputs:
    assert 'held by a run that is still going' in output
    assert 'Traceback' not in output
  assert not (home / 'held' / 'config.json').exists()


def test_one_device_is_not_for_several_processes(monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  with pytest.raises(ConfigError, match=r"mesh\.layout='single': .* 2 processes"):
    mesh.make_layout(mesh.Config(layout='single'))
