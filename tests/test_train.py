"""A whole run: what it writes, and that stopping it, crashing it or moving it changes nothing."""

import contextlib
import errno
import functools
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from longctx import assembly, configuration, examine, train
from longctx.data import stream
from longctx.data.tasks import sources
from longctx.errors import ConfigError
from longctx.models import schedules
from longctx.parallel import mesh
from longctx.training import badput, watchdog
from longctx.training import step as step_lib
from longctx.training.checkpoint import Checkpoints
from tests.compilation import quick_compilation  # noqa: F401
from tests.programs import launch, tiny

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.usefixtures('quick_compilation')


@pytest.fixture(scope='module')
def text(tmp_path_factory):
  folder = tmp_path_factory.mktemp('text')
  return {'files': tiny.write_corpus(folder / 'text'), 'cache_dir': str(folder / 'cache')}


@pytest.fixture(autouse=True)
def on_devices(monkeypatch):
  """on_devices(n): runs from here on have the first n devices."""
  real = assembly.assemble
  def choose(count):
    monkeypatch.setattr(assembly, 'assemble',
                        functools.partial(real, devices=jax.devices()[:count]))
  choose(1)
  return choose


@pytest.fixture
def at_batch(monkeypatch):
  """at_batch(n, do): `do` is called before the n-th batch of the next run is read."""
  real = stream.Stream.__next__
  def arrange(n, do):
    calls = []
    def next_batch(self):
      calls.append(1)
      if len(calls) == n:
        do()
      return real(self)
    monkeypatch.setattr(stream.Stream, '__next__', next_batch)
  return arrange


def make_config(text, variant='packed', **changes):
  config = tiny.get_config(variant)
  config.data.update(text)
  for name, value in changes.items():
    section, _, field = name.partition('_')
    (config[section] if field else config)[field or section] = value
  return config


def lines(folder):
  return [json.loads(line) for line in (Path(folder) / 'metrics.jsonl').read_text().splitlines()]


def logged(folder):
  """What the run computed at each step, without what the clock says of it."""
  clock = ('tokens_per_second', 'seconds')
  return [{k: v for k, v in line.items() if k not in clock} for line in lines(folder)]


def evaluation(folder):
  """evaluation.json without what it says of time, memory, the very files and the command that made it."""
  text = (Path(folder) / 'evaluation.json').read_text()
  drop = ('seconds', 'tokens_per_second', 'peak_memory_bytes', 'config', 'overrides', 'checkpoint')
  return json.loads(text, object_pairs_hook=lambda pairs: {k: v for k, v in pairs
                                                           if k not in drop})


def table(out):
  """The printed result, up to what the clock says."""
  return out.split('\nposition  ')[1].split('\ntokens/s')[0]


def saved(config, folder):
  """{step: every byte of the state} of the checkpoints on disk."""
  a = assembly.assemble(config)
  data = lambda x: (jax.random.key_data(x) if jax.dtypes.issubdtype(
      x.dtype, jax.dtypes.prng_key) else x)
  with Checkpoints(Path(folder) / 'checkpoints', read_only=True) as checkpoints:
    found = {at: checkpoints.restore_step(at, a.abstract) for at in checkpoints.steps()}
  return {at: (one.stream_state, [np.asarray(data(x)).tobytes() for x in
                                  jax.tree.leaves(one.state)]) for at, one in found.items()}


def terminate():
  os.kill(os.getpid(), signal.SIGTERM)


class CrashError(Exception):
  """Stands for a kill: what is not on disk is lost."""


def crash():
  raise CrashError


# What a run writes.


def test_what_a_run_writes(text, tmp_path, capsys, monkeypatch):
  traces, real = [], step_lib.train_step
  monkeypatch.setattr(step_lib, 'train_step', lambda *a, **kw: (traces.append(1), real(*a, **kw))[1])
  config = make_config(text, run_expect='2.3 at the end')
  train.run(config, str(tmp_path))
  out = capsys.readouterr().out
  assert len(traces) == 1

  steps = [line for line in lines(tmp_path) if 'loss' in line]
  assert [line['step'] for line in steps] == [2, 4, 6, 8, 10, 12]
  for line in steps:
    assert list(line) == ['step', 'loss', 'bits_per_byte', 'grad_norm', 'learning_rate',
                          'tokens_per_second', 'seconds', 'skipped_steps']   # of a CPU: no MFU
    assert all(math.isfinite(x) for x in line.values())
    assert line['tokens_per_second'] > 0
    counts = (3443, 3437)   # tokens with a separator a document, and bytes
    assert line['bits_per_byte'] == pytest.approx(
        line['loss'] / math.log(2) * counts[0] / counts[1])
  assert steps[-1]['loss'] < 0.7 * steps[0]['loss']
  cosine = lambda at: 0.03 * (0.1 + 0.9 * (1 + math.cos(math.pi * (at - 1) / 12)) / 2)
  assert [line['learning_rate'] for line in steps] == pytest.approx(
      [cosine(line['step']) for line in steps])
  seconds = [line['seconds'] for line in steps]
  assert seconds == sorted(seconds)
  # tokens/s is of the steps between two lines, without the pauses for evaluation and saving.
  for before, line in zip([0, *seconds], steps):
    assert line['tokens_per_second'] == pytest.approx(
        2 * 8 * 16 / (line['seconds'] - before), rel=1e-6)

  scores = [line for line in lines(tmp_path) if 'validation_loss' in line]
  assert [line['step'] for line in scores] == [6, 12]
  assert scores[1]['validation_loss'] < scores[0]['validation_loss'] < math.log(257)
  for line in scores:
    assert f'step {line["step"]}: validation {line["validation_bits_per_byte"]:.4f}' in out
  total = evaluation(tmp_path)
  assert total['step'] == 12
  assert f'{scores[1]["validation_bits_per_byte"]:.4f}' in table(out)
  assert len(list(tmp_path.glob('tensorboard/events*'))) == 1
  assert (tmp_path / 'figures' / 'loss_by_position.png').stat().st_size > 1000
  assert f'figure: {tmp_path}/figures/loss_by_position.png' in out
  for told in ('decoder: 7,104 parameters', 'largest arrays:', 'params/embedding/table',
               'tokens_per_epoch 3,440', 'expect: 2.3 at the end', 'first step after',
               'step 12/12  loss'):
    assert told in out

  # The last two checkpoints and the best; here the best is the last.
  assert Checkpoints(tmp_path / 'checkpoints', read_only=True).steps() == [8, 12]

  # Again: nothing is trained, the result is printed.
  before, at_end = logged(tmp_path), evaluation(tmp_path)
  train.run(config, str(tmp_path))
  again = capsys.readouterr().out
  assert logged(tmp_path) == before
  assert 'first step' not in again
  assert table(again) == table(out)
  assert len(traces) == 1

  # And by --mode=eval.
  found = json.loads((tmp_path / 'evaluation.json').read_text())
  (tmp_path / 'evaluation.json').unlink()
  train.run(config, str(tmp_path), mode='eval')
  assert evaluation(tmp_path) == at_end
  # Which model and text it is of, and which config and code made it.
  told = examine.about(assembly.assemble(config), config, str(tmp_path), 12)
  again = json.loads((tmp_path / 'evaluation.json').read_text())
  content = stream.open_documents(assembly.assemble(config).parts.data, 'validation').content
  assert told | dict(content=content) == {name: again[name] for name in (*told, 'content')}
  assert told == {name: found[name] for name in told} and found['versions']['jax'] == jax.__version__
  assert (tmp_path / 'configs' / f'{found["config"]}.json').read_bytes() == (tmp_path / 'config.json').read_bytes()
  assert logged(tmp_path) == before


@pytest.mark.slow
def test_some_steps_are_profiled(tmp_path):
  """In a process of its own: JAX's profiler asks every plugin, and libtpu's, loaded by other tests, crashes."""
  files = tiny.write_corpus(tmp_path / 'corpus')
  done = subprocess.run(
      [sys.executable, '-m', 'longctx.main', f'--config={ROOT}/tests/programs/tiny.py',
       f'--workdir={tmp_path}/w', f'--config.data.files={files}', f'--config.data.cache_dir={tmp_path}',
       '--config.run.profile_start=3', '--config.run.profile_steps=2'],
      capture_output=True, text=True, timeout=600, cwd=ROOT)
  assert done.returncode == 0, done.stderr
  assert done.stdout.count(f'profile: {tmp_path}/w/profile') == 1
  assert any((tmp_path / 'w' / 'profile').rglob('*.xplane.pb'))


def test_tokens_per_second_of_the_very_first_step(text, tmp_path):
  """A line after every step, and after a resumed one, has a rate, compilation not counted in."""
  config = make_config(text, run_log_every=1, run_num_steps=2, run_eval_every=0)
  train.run(config, str(tmp_path))
  rates = [line['tokens_per_second'] for line in lines(tmp_path) if 'loss' in line]
  assert len(rates) == 2
  assert min(rates) > 8 * 16 / 2   # a step of these takes milliseconds, its compilation seconds


@pytest.mark.slow
def test_the_pauses_do_not_count(text, tmp_path, monkeypatch):
  real = train.evaluate
  monkeypatch.setattr(train, 'evaluate', lambda *a: (time.sleep(1.5), real(*a))[1])
  train.run(make_config(text, run_num_steps=8), str(tmp_path))
  assert lines(tmp_path)[-2]['seconds'] < 1.5   # 1.5 s each at steps 6 and 8
  real_next = stream.Stream.__next__
  monkeypatch.setattr(stream.Stream, '__next__', lambda s: (time.sleep(0.1), real_next(s))[1])
  train.run(make_config(text, run_num_steps=8), str(tmp_path / 'slow'))
  assert lines(tmp_path / 'slow')[-2]['seconds'] > 0.7   # but waiting for the input does


def test_padding_does_not_count_as_tokens(text, tmp_path, monkeypatch):
  real = stream.Stream.__next__
  def half(self):
    batch = real(self)
    return batch | {'loss_mask': np.where(np.arange(16) < 8, batch['loss_mask'], 0.0)}
  monkeypatch.setattr(stream.Stream, '__next__', half)
  train.run(make_config(text, run_num_steps=4, run_eval_every=0), str(tmp_path))
  before = 0.0
  for line in [line for line in lines(tmp_path) if 'loss' in line]:
    assert line['tokens_per_second'] * (line['seconds'] - before) == pytest.approx(2 * 8 * 8)
    before = line['seconds']


# Stopped, crashed, carried on.


@pytest.mark.parametrize('variant,lost,changes', [
    ('packed', 0, {'model_dropout': 0.2}),   # crashes as soon as step 8 is saved
    ('lstm', 3, {'optimizer_ema': 0.9, 'perplexity_use_ema': True}),
    pytest.param('windowed', 3, {'run_accumulate': 2, 'model_dropout': 0.2},
                 marks=pytest.mark.slow),
])
def test_interrupted_is_straight(text, tmp_path, capsys, at_batch, variant, lost, changes):
  config = make_config(text, variant, **changes)
  straight, broken = str(tmp_path / 'straight'), str(tmp_path / 'broken')
  train.run(config, straight)
  capsys.readouterr()

  at_batch(5, terminate)   # the batch under way is still trained on
  train.run(config, broken)
  out = capsys.readouterr().out
  assert out.endswith('SIGTERM: saved step 5; the same command carries on from there\n')
  assert [line['step'] for line in lines(broken)] == [2, 4]
  assert max(saved(config, broken)) == 5

  at_batch(4 + lost, crash)   # before step 9 + lost: what came after step 8 is lost
  with pytest.raises(CrashError):
    train.run(config, broken)
  assert f'resumed at step 5 from {broken}/checkpoints' in capsys.readouterr().out
  assert lines(broken)[-1]['step'] == (10 if lost else 8)   # and is written again

  at_batch(99, crash)
  train.run(config, broken)
  assert 'resumed at step 8' in capsys.readouterr().out
  assert logged(broken) == logged(straight)
  assert evaluation(broken) == evaluation(straight)
  ours, theirs = saved(config, broken), saved(config, straight)
  assert ours[12] == theirs[12]
  assert ours.keys() == theirs.keys()
  if config.perplexity.use_ema:
    train.run(config, broken, mode='eval')
    assert evaluation(broken) == evaluation(straight)
    config.perplexity.use_ema = False   # and these were the averaged parameters
    train.run(config, broken, mode='eval')
    assert evaluation(broken)['loss'] != evaluation(straight)['loss']


@pytest.mark.parametrize('changes', [
    {}, dict(run_keep_best=False, run_checkpoint_every=5)])   # no save is due where it evaluates
def test_terminated_while_it_evaluates(text, tmp_path, capsys, monkeypatch, changes):
  """It leaves between two pieces with what was trained, and evaluates first when it is started again.

  Before the first step a signal ends all at once: tests/test_distributed.py.
  """
  config, evaluate, tick, pieces = make_config(text, **changes), train.evaluate, badput.Ledger.tick, []
  straight, broken = str(tmp_path / 'straight'), str(tmp_path / 'broken')
  assert train.run(config, straight) == 0
  with monkeypatch.context() as m:
    m.setattr(badput.Ledger, 'tick', lambda ledger: (tick(ledger), pieces.append(ledger.step)))
    m.setattr(train, 'evaluate', lambda *a: (pieces.clear(), terminate(), evaluate(*a))[2])
    assert train.run(config, broken) == 75
    assert pieces == [6]
    assert 'SIGTERM: saved step 6; the same' in capsys.readouterr().out
    assert not [line for line in lines(broken) if 'validation_loss' in line]
    m.setattr(train, 'evaluate', lambda a, params, documents: (
        [terminate() for _ in lines(broken) if _['step'] == 12], evaluate(a, params, documents))[1])
    assert train.run(config, broken) == 75   # steps 6 to 12; the last evaluation is given up too
    assert 'SIGTERM: saved step 12; the same' in capsys.readouterr().out
    assert [line['step'] for line in lines(broken) if 'validation_loss' in line] == [6]
    assert not (tmp_path / 'broken' / 'evaluation.json').exists()
  assert train.run(config, broken) == 0
  assert logged(broken) == logged(straight)
  assert evaluation(broken) == evaluation(straight)
  ours, theirs = saved(config, broken), saved(config, straight)
  assert ours[12] == theirs[12]
  best = [Checkpoints(Path(folder) / 'checkpoints', read_only=True).best_step() for folder in (broken, straight)]
  assert best == [12, 12]


@pytest.mark.parametrize('pace, apart', [(0.5, 20), (50.0, 1), (0.0, 300)])
def test_all_processes_ask_each_other_at_the_same_counts(monkeypatch, pace, apart):
  """By the pace of the first, 300 apart at most; the second alone is asked to stop, at 2,000."""
  one, at, seconds, said, asked = 0, 0, [0.0, 0.0], {}, ([], [])
  stops = lambda now: one == 1 and at >= 2000
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(train, 'time', types.SimpleNamespace(monotonic=lambda: seconds[one]))
  def gather(own):
    said[one] = own
    asked[one].append(at)
    return [said[0], own if one else [at >= 2000, 7.0]]
  monkeypatch.setattr(train.processes, 'gather', gather)
  both, told = [train.Questions(0, most=300) for _ in seconds], []
  for at in range(0, 3000):
    told.append([])
    for one, questions in enumerate(both):  # noqa: B007 (what the stand-ins go by)
      told[-1].append(questions.ask(at, stops))
    seconds = [seconds[0] + pace, seconds[1] + 3.0]
  assert asked[0] == asked[1] == [0, *range(1, 3000, apart)]
  assert [ours for ours, theirs in told if ours != theirs] == []
  assert told.index([[True], [True]]) == min(at for at in asked[0] if at >= 2000)


@pytest.mark.slow
def test_from_eight_devices_to_one_to_four(text, tmp_path, on_devices, at_batch):
  config = make_config(text, 'windowed')
  alone, moved = str(tmp_path / 'alone'), str(tmp_path / 'moved')
  train.run(config, alone)
  for devices, batches in ((8, 4), (1, 5), (4, 99)):
    on_devices(devices)
    at_batch(batches, terminate)
    train.run(config, moved)
  loss = lambda folder: [line['loss'] for line in lines(folder) if 'loss' in line]
  assert len(loss(moved)) == 6
  np.testing.assert_allclose(loss(moved), loss(alone), rtol=1e-5)
  score = lambda folder: [line['validation_loss'] for line in lines(folder)
                          if 'validation_loss' in line]
  np.testing.assert_allclose(score(moved), score(alone), rtol=1e-5)
  assert max(saved(config, moved)) == 12


# Refused.


def test_another_tokenizer_is_refused(text, tmp_path, at_batch, monkeypatch):
  config = make_config(text)
  at_batch(5, terminate)
  train.run(config, str(tmp_path))
  before = sorted(p.name for p in (tmp_path / 'checkpoints').iterdir())
  from longctx.data import tokenizer
  real = tokenizer.load_tokenizer('bytes')
  class Other(type(real)):
    fingerprint = 'f' * 64
  for module in (stream, assembly):
    monkeypatch.setattr(module, 'load_tokenizer', lambda name: Other())
  with pytest.raises(ConfigError, match=r'data\.tokenizer: the checkpoint was trained with'):
    train.run(config, str(tmp_path))
  assert sorted(p.name for p in (tmp_path / 'checkpoints').iterdir()) == before
  assert lines(tmp_path)[-1]['step'] == 4
  with pytest.raises(ConfigError, match=r'data\.tokenizer: the checkpoint was trained with'):
    train.run(config, str(tmp_path), mode='eval')


@pytest.mark.parametrize('corpus', ['files', 'tasks'])
def test_what_was_read_of_another_text_of_equal_lengths_is_read_again(tmp_path, corpus, monkeypatch):
  (tmp_path / 'checkpoints' / '1').mkdir(parents=True)
  (tmp_path / 'checkpoints' / '1' / 'manifest.json').write_text('{}')
  path = tmp_path / 'text'
  def key(sentence):
    path.write_text(sentence * 50)
    sources.forget()
    given = dict(files=str(path), corpus=corpus, cache_dir=str(tmp_path / 'cache'))
    if corpus == 'tasks':
      given |= dict(files='', split='hash', tasks=('passkey',), task_haystack=str(path), length=320)
    config = make_config(given, model_max_length=320)
    train.workdir.agree(tmp_path, config)
    a = assembly.assemble(config)
    documents = assembly.open_documents(a)
    lengths = documents.lengths.tolist()
    return json.dumps(train._depends_on(a, train._about(a, config, str(tmp_path), 1, documents))), lengths
  one, same, other = key('A word. '), key('A word. '), key('A wood. ')
  assert one == same and one[1] == other[1] and one[0] != other[0]


def test_eval_scores_with_the_config_that_was_trained(text, tmp_path, at_batch):
  config = make_config(text)
  at_batch(3, terminate)
  train.run(config, str(tmp_path))
  written = (tmp_path / 'config.json').read_bytes()
  train.run(config, str(tmp_path), mode='eval')
  score = evaluation(tmp_path)
  for name in ('model.rope_base', 'model.window', 'data.validation_fraction'):
    other = make_config(text, **{name.replace('.', '_', 1): {
        'model.rope_base': 5.0, 'model.window': (2,), 'data.validation_fraction': 0.3}[name]})
    before = evaluation(tmp_path)
    with pytest.raises(ConfigError, match=f'{name}: W has .* --allow_config_change={name};'):
      train.run(other, str(tmp_path), mode='eval')
    assert evaluation(tmp_path) == before
    train.run(other, str(tmp_path), mode='eval', allow_config_change=name)
    assert evaluation(tmp_path)['loss'] != score['loss']
  same = make_config(text, seed=5, data_prefetch=9, data_batch_size=16, loss_chunk=3,
                     run_num_steps=99, optimizer_name='lion', perplexity_segment=8)
  train.run(same, str(tmp_path), mode='eval')
  assert evaluation(tmp_path)['loss'] == pytest.approx(score['loss'], rel=1e-6)
  assert (tmp_path / 'config.json').read_bytes() == written
  with pytest.raises(ConfigError, match=r'--checkpoint=best: no checkpoint of .* has a validation '
                     'loss; give newest or a step of 3'):
    train.run(config, str(tmp_path), mode='eval', checkpoint='best')


def test_fewer_steps_than_were_done_is_refused(text, tmp_path):
  config = make_config(text)
  train.run(config, str(tmp_path))
  config.run.num_steps = 10
  with pytest.raises(ConfigError, match=r'run\.num_steps: W has 12, you gave 10'):
    train.run(config, str(tmp_path))
  with pytest.raises(ConfigError, match=r'num_steps=10: the workdir has already done 12 steps'):
    train.run(config, str(tmp_path), allow_config_change='run.num_steps')
  assert lines(tmp_path)[-1]['step'] == 12
  config.run.num_steps = 12
  train.run(config, str(tmp_path))   # the refused config was not written down


def poison(monkeypatch, first, last=math.inf):
  """Batches first..last of a run (from 1) have a NaN among their weights."""
  real, count = stream.Stream.__next__, []
  def bad(self):
    batch = real(self)
    count.append(1)
    if first <= len(count) <= last:
      batch = batch | {'loss_mask': np.where(np.arange(16) == 3, np.nan, batch['loss_mask'])}
    return batch
  monkeypatch.setattr(stream.Stream, '__next__', bad)


def test_too_many_bad_steps_stop_the_run(text, tmp_path, capsys, monkeypatch):
  config = make_config(text, run_max_bad_steps=3)
  with monkeypatch.context() as m:
    poison(m, 6)
    with pytest.raises(ConfigError, match=re.escape(
        'run.max_bad_steps=3: 3 bad steps in a row up to step 8, at last the gradient of '
        'blocks/0/mixer/w_kv is not finite; lower optimizer.learning_rate=0.03')):
      train.run(config, str(tmp_path))
  out = capsys.readouterr().out
  assert [f'step {at} was skipped' in out for at in range(5, 10)] == [False, True, True, True,
                                                                      False]
  # What is on disk is good, and goes on.
  assert max(saved(config, tmp_path)) == 6
  train.run(config, str(tmp_path))
  found = [line for line in lines(tmp_path) if 'loss' in line]
  assert [line['step'] for line in found] == [2, 4, 6, 8, 10, 12]
  assert found[2]['loss'] is None
  assert [line['skipped_steps'] for line in found] == [0, 0, 1, 1, 1, 1]
  assert found[3]['loss'] < found[0]['loss']
  # The schedule goes by updates: the skipped step's rate comes with the next one.
  cosine = lambda updates: 0.03 * (0.1 + 0.9 * (1 + math.cos(math.pi * updates / 12)) / 2)
  assert [line['learning_rate'] for line in found] == pytest.approx(
      [cosine(updates) for updates in (1, 3, 5, 6, 8, 10)])


def test_bad_steps_in_between_do_not_stop_it(text, tmp_path, monkeypatch):
  poison(monkeypatch, 3, 4)
  train.run(make_config(text, run_max_bad_steps=3), str(tmp_path))
  assert [line for line in lines(tmp_path) if 'loss' in line][-1]['skipped_steps'] == 2


def events(folder):
  return [json.loads(line) for line in (Path(folder) / 'events.jsonl').read_text().splitlines()]


@pytest.mark.slow
def test_bad_steps_lead_back_and_their_data_is_passed_over(text, tmp_path, capsys, monkeypatch):
  """Steps 6 and 7 are bad: back to 4, on with the batch after step 8's, killed and carried on."""
  config = make_config(text, run_eval_every=0, run_keep_best=False, run_checkpoint_every=2, run_log_every=1,
                       run_rollback_after=2, model_dropout=0.2)
  real, calls = stream.Stream.__next__, []
  def bad(self):
    batch = real(self)
    calls.append(1)
    if len(calls) in (6, 7):
      batch = batch | {'loss_mask': np.where(np.arange(16) == 3, np.nan, batch['loss_mask'])}
    if len(calls) == 11:   # step 7 again
      raise CrashError
    return batch
  with monkeypatch.context() as m:
    m.setattr(stream.Stream, '__next__', bad)
    with pytest.raises(CrashError):
      train.run(config, str(tmp_path / 'bad'))
  assert 'back to step 4: 2 bad steps in a row from step 6 on; the batches since step 4 are passed over' in (
      capsys.readouterr().out)
  assert list(saved(config, tmp_path / 'bad')) == [4, 6]
  assert train.run(config, str(tmp_path / 'bad')) == 0
  assert 'resumed at step 6' in capsys.readouterr().out

  def without(self):   # a run that never sees them
    calls.append(1)
    if len(calls) == 5:
      for _ in range(4):
        real(self)
    return real(self)
  calls.clear()
  monkeypatch.setattr(stream.Stream, '__next__', without)
  train.run(config, str(tmp_path / 'without'))
  ours, theirs = (saved(config, tmp_path / name)[12] for name in ('bad', 'without'))
  assert ours == theirs   # bit for bit, the place in the data too
  assert logged(tmp_path / 'bad') == logged(tmp_path / 'without')
  found = json.loads((tmp_path / 'bad' / 'badput.json').read_text())
  assert (found['rollbacks'], found['skipped_steps'], found['starts']) == (1, 2, 2)
  assert found['lost_steps'] == 4 and found['seconds']['lost'] > 0 and found['finished']
  assert [(e['step'], e['what']) for e in events(tmp_path / 'bad')] == [
      (6, 'skipped'), (7, 'skipped'), (8, 'rollback')]


@pytest.mark.slow
def test_a_run_does_not_go_back_for_ever(text, tmp_path, monkeypatch):
  poison(monkeypatch, 5)
  with pytest.raises(ConfigError, match=r'run.rollback_after=2: has returned to step 4 3 times, and other'):
    train.run(make_config(text, run_rollback_after=2, run_num_steps=40), str(tmp_path))


@pytest.fixture
def leaving(monkeypatch):
  """(exit statuses in place of the end of this process, the event that there is one)"""
  statuses, noticed = [], threading.Event()
  def leave(status):
    statuses.append(status)
    noticed.set()
    raise SystemExit   # of the thread alone
  monkeypatch.setattr(watchdog.os, '_exit', leave)
  return statuses, noticed


@pytest.mark.filterwarnings('ignore::pytest.PytestUnhandledThreadExceptionWarning')
def test_an_evaluation_that_stands_still_ends(text, tmp_path, capfd, monkeypatch, leaving):
  statuses, noticed = leaving
  monkeypatch.setattr(watchdog.Watchdog, '_limit', lambda self: self.seconds)   # it may last ten times as long
  config = make_config(text, run_watchdog_seconds=1)
  train.workdir.agree(tmp_path, config)
  def hang(*args, **kwargs):
    assert noticed.wait(60)
    raise ConfigError('over')
  monkeypatch.setattr(assembly, 'load_parameters', hang)
  with pytest.raises(ConfigError, match='over'):
    train.run(config, str(tmp_path), mode='eval')
  assert statuses == [75]
  assert "run.watchdog_seconds=1: nothing has moved in process 0 for " in (said := capfd.readouterr().err)
  assert "in 'evaluation'" in said and 'in hang' in said
  assert [p.name for p in tmp_path.iterdir()] == ['config.json']   # the account of training is as it was


@pytest.mark.filterwarnings('ignore::pytest.PytestUnhandledThreadExceptionWarning')
def test_a_run_of_one_process_that_stands_still_ends(text, tmp_path, capfd, leaving, at_batch):
  statuses, noticed = leaving
  at_batch(3, lambda: noticed.wait(60))
  train.run(make_config(text, run_watchdog_seconds=3, run_num_steps=4), str(tmp_path))
  assert statuses == [75]
  said = capfd.readouterr().err
  assert re.search(r"longctx: run.watchdog_seconds=3: nothing has moved in process 0 for \d s, in 'input' \(if "
                   r'it may take that long, give more, or 0\); the run ends, and the same command carries on\n'
                   r'where the processes stood:\n  process 0: step 2, input', said)
  assert 'in next_batch' in said   # where it waits
  assert [(e['step'], e['what']) for e in events(tmp_path)] == [(2, 'ended')]


@pytest.mark.filterwarnings('ignore::pytest.PytestUnhandledThreadExceptionWarning')
@pytest.mark.parametrize('where, mode', [('lock', 'train'), ('agree', 'train'), ('load_config', 'eval')])
def test_a_file_system_that_hangs_at_the_very_start_is_noticed(text, tmp_path, capfd, monkeypatch, leaving, where, mode):
  statuses, noticed = leaving
  monkeypatch.setattr(watchdog.Watchdog, '_limit', lambda self: self.seconds)   # it may last ten times as long
  def hang(*args, **kwargs):
    assert noticed.wait(60)
    raise ConfigError('over')
  monkeypatch.setattr(train.workdir, where, hang)
  with pytest.raises(ConfigError, match='over'):
    train.run(make_config(text, run_watchdog_seconds=1), str(tmp_path), mode=mode)
  assert statuses == [75]
  assert 'run.watchdog_seconds=1: nothing has moved in process 0 for ' in capfd.readouterr().err
  assert {p.name for p in tmp_path.iterdir()} <= {'.lock'}


def test_a_cache_that_is_built_and_an_evaluation_go_on(text, tmp_path, monkeypatch):
  ticks = []
  monkeypatch.setattr(badput.Ledger, 'tick', lambda ledger: ticks.append(ledger.phase))
  new = text | {'cache_dir': str(tmp_path / 'cache')}
  train.run(make_config(new, run_num_steps=1), str(tmp_path / 'w'))
  assert ticks.count('start') >= 8 and ticks.count('evaluation') >= 2


# Checkpoints.


def test_a_failed_save_is_tried_again_and_the_last_one_until_it_succeeds(text, tmp_path, capsys, monkeypatch):
  """A disk that is full at the saves of steps 4, at whatever step that is due again, and twice at the last."""
  from longctx.training import manifest
  real, refused, clock = manifest.write, [], itertools.count(0, 0.75)   # looked at once a step
  def full(folder):
    at = int(folder.name.split('.')[0])
    if at in (4, 6) or (at == 12 and refused.count(12) < 2):
      refused.append(at)
      raise OSError(28, 'No space left on device')
    real(folder)
  monkeypatch.setattr(manifest, 'write', full)
  slept = []
  monkeypatch.setattr(train, 'time', types.SimpleNamespace(monotonic=lambda: next(clock), sleep=slept.append))
  config = make_config(text, run_eval_every=0, run_keep_best=False, run_checkpoint_every=4, run_save_patience=60)
  settle = Checkpoints.poll
  monkeypatch.setattr(Checkpoints, 'poll', lambda self: (self.wait(), settle(self))[1])   # each ends in its step
  assert train.run(config, str(tmp_path)) == 0
  assert refused == [4, 6, 12, 12] and slept == [1.0, 2.0]
  assert Checkpoints(tmp_path / 'checkpoints', read_only=True).steps() == [8, 12]
  out = capsys.readouterr().out
  assert out.count('could not save step') == 4 and '4 failed saves' in out
  assert [e['what'] for e in events(tmp_path)] == ['failed_saves'] * 4


@pytest.mark.parametrize('until, tried', [(0.5, 1), (62.0, 6), (89.5, 7), (91.0, 7)])
def test_the_last_save_is_tried_up_to_the_last_of_its_seconds(monkeypatch, until, tried):
  """Of a disk that takes nothing for a minute the state is kept; and one try is at the very end."""
  clock, saves = [0.0], []
  monkeypatch.setattr(train, 'time', types.SimpleNamespace(
      monotonic=lambda: clock[0], sleep=lambda seconds: clock.__setitem__(0, clock[0] + seconds)))
  trainer = types.SimpleNamespace(
      config=types.SimpleNamespace(save_patience=configuration.Run().save_patience), tell_failures=lambda: None,
      checkpoints=types.SimpleNamespace(wait=lambda: None, has=lambda at: bool(saves) and saves[-1] > until),
      save=lambda at, state, found: saves.append(clock[0]))
  train.Trainer.save_at_last(trainer, 7, None, None)
  assert saves == [1, 3, 7, 15, 31, 63, 90][:tried]


def test_the_best_is_kept_and_a_full_disk_is_survived(text, tmp_path, capfd, caplog, monkeypatch):
  """Validation gets worse from step 3 on; the saves of steps 4 and 12 meet a full disk."""
  from longctx.training import backoff, manifest
  monkeypatch.setattr(backoff, 'FIRST', math.inf)   # and no save is tried again
  config = make_config(text, run_keep_last=1, run_eval_every=3)
  real, write = train.evaluate, manifest.write
  count = []
  def worse(*args):
    found = real(*args)
    count.append(1)
    total = found.first.total
    worse_total = type(total)(total.nats * len(count), total.tokens, total.bytes)
    first = next(iter(found.passes))
    passes = found.passes | {first: found.passes[first].__class__(
        **(vars(found.passes[first]) | {'total': worse_total}))}
    return type(found)(**(vars(found) | {'passes': passes}))
  monkeypatch.setattr(train, 'evaluate', worse)
  def full(folder):
    if folder.name.split('.')[0] in ('4', '12'):
      raise OSError(28, 'No space left on device')
    write(folder)
  monkeypatch.setattr(manifest, 'write', full)
  assert train.run(config, str(tmp_path)) == 1
  out, err = capfd.readouterr()
  assert out.endswith('\nlost: step 12 could not be saved; the same command carries on from step 9\n')
  told = 'could not save step {}: No space left on device (OSError); the last good checkpoint is '
  for step, good in ((4, 3), (12, 9)):
    assert (out + err + caplog.text).count(told.format(step) + f'step {good}; training goes on') == 1
  assert 'step 12/12' in out
  checkpoints = Checkpoints(tmp_path / 'checkpoints', read_only=True)
  assert checkpoints.steps() == [3, 9]   # saved where it was evaluated, too
  assert checkpoints.best_step() == 3
  for which, at in (('newest', 9), ('best', 3), ('9', 9), ('3', 3)):
    train.run(config, str(tmp_path), mode='eval', checkpoint=which)
    assert evaluation(tmp_path)['step'] == at

  monkeypatch.setattr(manifest, 'write', write)
  monkeypatch.setattr(train, 'evaluate', real)
  assert train.run(config, str(tmp_path)) == 0   # carries on from step 9
  assert [line['step'] for line in lines(tmp_path) if 'loss' in line] == [2, 4, 6, 8, 10, 12]
  assert Checkpoints(tmp_path / 'checkpoints', read_only=True).steps()[-1] == 12


def test_a_stop_whose_save_fails_says_where_it_carries_on(text, tmp_path, capsys, monkeypatch,
                                                          at_batch):
  from longctx.training import manifest
  def full(folder):
    raise OSError(28, 'No space left on device')
  monkeypatch.setattr(manifest, 'write', full)
  at_batch(3, terminate)
  assert train.run(make_config(text), str(tmp_path)) == 1
  out = capsys.readouterr().out
  assert out.count('could not save step 3') == 1
  assert out.endswith('SIGTERM: step 3 could not be saved; the same command carries on from '
                      'step 0\n')


@pytest.mark.parametrize('code', [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_result_that_cannot_be_written_is_printed_and_told(text, tmp_path, capfd, monkeypatch,
                                                             code):
  config = make_config(text, run_num_steps=2)
  assert train.run(config, str(tmp_path)) == 0
  capfd.readouterr()
  def refuse(path, data):
    raise OSError(code, os.strerror(code))
  monkeypatch.setattr(train.workdir, 'atomic_write', refuse)
  assert train.run(config, str(tmp_path), mode='eval') == 1
  out, err = capfd.readouterr()
  assert '\nposition  ' in out
  assert 'figure:' not in out
  assert err.splitlines()[-2:] == [f'{tmp_path}/evaluation.json: {os.strerror(code)}',
                                   f'{tmp_path}/figures/loss_by_position.png: {os.strerror(code)}']


def test_a_disk_that_fills_while_a_run_saves(tmp_path):
  """The real command: a line for each lost checkpoint, no traceback, and status 1."""
  disk = tmp_path / 'disk'
  disk.mkdir()
  made = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=3m', 'tmpfs', disk],
                        capture_output=True, text=True)
  if made.returncode:
    pytest.skip(f'cannot mount a small file system here: {made.stderr.strip()}')
  try:
    text = {'files': tiny.write_corpus(tmp_path / 'text'), 'cache_dir': str(tmp_path / 'cache')}
    command = launch.command(disk / 'w', text, 'packed', run_num_steps=200, run_log_every=50,
                             run_eval_every=0, run_checkpoint_every=10)
    child = launch.start(command, tmp_path / 'out')
    while not (disk / 'w' / 'checkpoints' / '10').exists() and child.poll() is None:
      time.sleep(0.01)
    with contextlib.suppress(OSError), open(disk / 'filler', 'wb', buffering=0) as filler:
      while True:
        filler.write(b'x' * 4096)
    assert child.wait(300) == 1
    said = (tmp_path / 'out').read_text()
    assert 'could not save step 200: ' in said
    assert not re.search('Traceback|never retrieved|closed', said), said
    assert re.search('lost: step 200 could not be saved; the same command carries on from step [0-9]+'
                     '\n$', said)
  finally:
    subprocess.run(['umount', '-l', disk], check=True)


def test_everything_is_closed_however_it_ends(text, tmp_path, monkeypatch, at_batch):
  closed = []
  for cls in (stream.Stream, Checkpoints, train.metrics_lib.MetricsWriter,
              train.metrics_lib.Progress):
    def close(self, real=cls.close, name=cls.__name__):
      closed.append(name)
      real(self)
    monkeypatch.setattr(cls, 'close', close)
  config, before = make_config(text), signal.getsignal(signal.SIGTERM)
  at_batch(5, crash)
  with pytest.raises(CrashError):
    train.run(config, str(tmp_path))
  assert sorted(closed) == ['Checkpoints', 'MetricsWriter', 'Progress', 'Stream']
  closed.clear()
  def torn(self, *args):
    raise ConfigError('run.x=1: no')
  monkeypatch.setattr(train.Trainer, 'begin', torn)
  with pytest.raises(ConfigError):
    train.run(config, str(tmp_path))
  assert sorted(closed) == ['Checkpoints', 'Stream']
  assert signal.getsignal(signal.SIGTERM) == before
  from longctx.training import workdir
  workdir.lock(tmp_path).release()   # the workdir was let go


@pytest.mark.slow
def test_a_curriculum_cuts_the_first_rows_short_and_loses_no_token(text, tmp_path, monkeypatch):
  """Stages of 1 and 2 segments, then whole rows of 4: the same tokens in more and shorter rows."""
  config = make_config(text, data_length=32, data_batch_size=2)
  memory = configuration.base('memory').model
  memory.update(dict(num_layers=1, embed_dim=16, num_heads=2, segment=8, long_term='infini'))
  config.model = memory
  config.run.update(dict(num_steps=5, eval_every=0, checkpoint_every=3, log_every=1, curriculum=(1, 2),
                         curriculum_steps=2))
  seen, real = [], mesh.Layout.place
  def place(self, rows, batch_size):
    seen.append((batch_size, {name: x.copy() for name, x in rows.items()}))
    return real(self, rows, batch_size)
  monkeypatch.setattr(mesh.Layout, 'place', place)
  assert train.run(config, str(tmp_path / 'w')) == 0
  trained = seen[:5]
  assert [batch['tokens'].shape for _, batch in trained] == [(8, 8), (8, 8), (4, 16), (4, 16), (2, 32)]
  assert [size for size, _ in trained] == [8, 8, 4, 4, 2]
  straight = stream.open_stream(assembly.assemble(config).parts.data, seed=config.seed)
  for i, (_, batch) in enumerate(trained):
    np.testing.assert_array_equal(batch['tokens'].ravel(), straight.batch(i)['tokens'].ravel())
  straight.close()
  assert all(math.isfinite(line['loss']) for line in lines(tmp_path / 'w') if 'loss' in line)


def carried_curriculum(text):
  """RMT: a stage of a step with gradients through 1 segment of the 4 of a row, then through 2, then all."""
  config = make_config(text, data_length=16, data_batch_size=2, data_form='segments', data_align=True)
  config.model = configuration.base('memory').model
  config.model.update(dict(num_layers=1, embed_dim=8, num_heads=1, segment=4, long_term='rmt', memory_tokens=2,
                           attention='reference', mlp='none'))
  config.run.update(dict(num_steps=4, eval_every=0, checkpoint_every=1, keep_last=4, keep_best=False, log_every=1,
                         curriculum=(1, 2), curriculum_steps=1))
  config.perplexity.max_tokens = 64
  return config


@pytest.mark.slow
def test_a_curriculum_of_carried_rows_is_carried_on_bit_for_bit(text, tmp_path, at_batch, monkeypatch):
  """Stopped within it, the same; from its last stage on, what a run without one does; nothing else is read."""
  config = carried_curriculum(text)
  read, real = [], schedules.sequential   # RMT's schedule, of aligned rows alone
  def sequential(model, tokens_BSC, *args):
    read.append((model.config.truncate, tokens_BSC.shape))
    return real(model, tokens_BSC, *args)
  monkeypatch.setattr(schedules, 'sequential', sequential)
  train.run(config, str(tmp_path / 'straight'))
  assert list(dict.fromkeys(read)) == [(1, (2, 4, 4)), (2, (2, 4, 4)), (0, (2, 4, 4))]

  at_batch(2, terminate)
  assert train.run(config, str(tmp_path / 'stopped')) == train.STOPPED
  at_batch(99, terminate)
  train.run(config, str(tmp_path / 'stopped'))
  assert logged(tmp_path / 'stopped') == logged(tmp_path / 'straight')
  assert saved(config, tmp_path / 'stopped') == saved(config, tmp_path / 'straight')

  shutil.copytree(tmp_path / 'straight', tmp_path / 'without')
  for at in (3, 4):
    shutil.rmtree(tmp_path / 'without' / 'checkpoints' / str(at))
  config.run.curriculum = ()
  train.run(config, str(tmp_path / 'without'), allow_config_change='run.curriculum')
  assert logged(tmp_path / 'without') == logged(tmp_path / 'straight')


def test_a_stage_of_carried_rows_is_so_many_calls_each_without_gradient_into_the_one_before(text, monkeypatch):
  """The loss is that of whole rows; the gradient that of calls on shorter rows."""
  a = assembly.assemble(carried_curriculum(text))
  straight = stream.open_stream(a.parts.data, seed=0)
  batch, state = straight.batch(1), a.init()
  straight.close()

  def loss(a, params, pieces):
    model, memory, total = nnx.merge(a.graphdef, params), state.memory, 0.0
    for tokens_BT, ids_BT, targets_BT in zip(*(
        np.split(batch[name], pieces, axis=1) for name in ('tokens', 'segment_ids', 'targets'))):
      hidden, memory = model(tokens_BT, jax.lax.stop_gradient(memory), segment_ids_BT=ids_BT, aligned=True)
      logits = model.logits(hidden)
      total += optax.softmax_cross_entropy_with_integer_labels(logits, targets_BT).sum()
    return total

  found = {name: jax.jit(jax.value_and_grad(functools.partial(loss, a, pieces=pieces)))(state.params)
           for name, a, pieces in (('whole', a, 1), ('stage', a.truncated(2), 1), ('calls', a, 2))}
  values = {name: (float(value), np.concatenate([np.ravel(x) for x in jax.tree.leaves(grad)]))
            for name, (value, grad) in found.items()}
  for name in ('whole', 'calls'):
    assert values['stage'][0] == pytest.approx(values[name][0], rel=1e-6)
  np.testing.assert_allclose(values['stage'][1], values['calls'][1], atol=1e-5)
  assert np.abs(values['stage'][1] - values['whole'][1]).max() > 1e-4


@pytest.mark.parametrize('changes,message', [
    (dict(curriculum=(3,)), r'run.curriculum=\(3,\): each must divide the 4 segments of a row'),
    (dict(), 'run.curriculum=.*counts the segments of a row, and model.name=.decoder. has none'),
])
def test_a_curriculum_that_cannot_be_is_refused(text, changes, message):
  config = make_config(text, data_length=32, model_max_length=32)
  config.run.curriculum = (1,)
  if changes:
    config.model = configuration.base('memory').model
    config.model.update(dict(num_layers=1, embed_dim=16, num_heads=2, segment=8))
    config.run.update(changes)
  with pytest.raises(ConfigError, match=message):
    assembly.assemble(config)
