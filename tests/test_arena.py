"""Experiment 04: its trials ask what they say, its runs are kept, its tables say what the lines say."""

import importlib
import importlib.util
import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest

from longctx import configuration
from longctx.models import recurrent
from longctx.models.memories import MEMORIES
from longctx.models.mixers import MIXERS

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / 'experiments' / '04_arena'
MODULES = ('arena', 'leaderboard', 'predictions', 'roster', 'trials', 'workers')


@pytest.fixture(scope='module')
def the():
  """The experiment's modules, by name."""
  sys.path.insert(0, str(FOLDER))
  found = {name: importlib.import_module(name) for name in MODULES}
  spec = importlib.util.spec_from_file_location('arena_run', FOLDER / 'run.py')   # others have a run.py too
  found['run'] = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(found['run'])
  yield types.SimpleNamespace(**found)
  sys.path.remove(str(FOLDER))


# The runs

def test_all_models_meet_all_trials_at_one_rate_before_any_meets_another(the):
  tier = the.run.TIERS['cpu'] | dict(trials=the.trials.NAMES)
  runs = the.run.all_runs(tier, 'abc')
  assert len(runs) == 495 == len({the.arena.key_of(run) for run in runs})
  assert {(r['trial'], r['model']) for r in runs[:165]} == {
      (t, m) for t in the.trials.NAMES for m in the.roster.NAMES}
  assert {r['learning_rate'] for r in runs[:165]} == {0.003}
  assert {r['trial'] for r in runs if r.get('files') == 'abc'} == {'books'}
  units = the.run.units(runs, [])   # a model at a rate, which compiles once
  assert [len(unit) for unit in units] == 99 * [5]
  assert [unit[0]['model'] for unit in units] == 3 * list(the.roster.NAMES)
  assert [len(unit) for unit in the.run.units(runs, runs[:7])] == [3] + 97 * [5]


def test_the_trials_of_symbols_are_one_model_and_its_programs(the):
  for tier in the.run.TIERS.values():
    made = {trial: the.trials.make(trial, '') for trial in the.trials.MAKE}
    assert len({(made[trial].vocab_size, made[trial].segment, tier['sizes'][trial]) for trial in made}) == 1
  for done in (0.0, 0.3, 0.75, 0.999):
    for trial in made.values():
      tokens, targets = trial.batch(np.random.default_rng(0), done, 6)
      assert tokens.shape == targets.shape == (6, 64) and tokens.dtype == targets.dtype == np.int32
      assert tokens.min() >= 0 and max(tokens.max(), targets.max()) < 64
      assert ((targets >= 0).sum(axis=1) > 0).all()


def test_a_line_is_done_whatever_commit_made_it_and_another_seed_or_book_is_not(the):
  tier = the.run.TIERS['smoke'] | dict(models=('gru',), trials=('parity', 'books'))
  runs = the.run.all_runs(tier, 'abc')
  done = [run | dict(commit='1', parity_64=0.5) for run in runs]
  left = lambda files='abc', **fields: [run for unit in the.run.units(
      the.run.all_runs(tier | fields, files), done) for run in unit]
  assert left() == [] and len(left(seeds=(0, 1))) == 2 and len(left(rates=(0.003, 0.01))) == 2
  assert [r['trial'] for r in left('abd')] == ['books']


def test_time_that_is_left_is_told_by_what_is_likest(the):
  line = lambda model, trial, seconds: dict(model=model, trial=trial, steps=1, rows=1,
                                            train_seconds=seconds, test_seconds=1.0)
  done = [line('gru', 'mqar', 9.0), line('lstm', 'mqar', 19.0), line('lstm', 'books', 39.0)]
  left = [dict(model=m, trial=t, steps=1, rows=1) for m, t in
          (('gru', 'mqar'), ('rmt', 'mqar'), ('rmt', 'parity'))]
  assert the.run.core_seconds(left, done) == pytest.approx(10 + 15 + 70 / 3)
  assert the.run.core_seconds(left, []) == 0


def work(run: dict) -> dict:
  """What a worker does in these tests."""
  if run['do'] == 'fail':
    raise ValueError('such a thing')
  if run['do'] == 'die':
    os._exit(3)
  return dict(process=os.getpid(), cores=sorted(os.sched_getaffinity(0)))


def test_runs_that_fail_or_die_take_no_other_with_them(the):
  core = min(os.sched_getaffinity(0))
  run = lambda name, do='well': dict(name=name, do=do)
  units = [[run('a'), run('b', 'fail'), run('c')], [run('d', 'die'), run('e')]]
  done = {d.run['name']: d for d in the.workers.work_off(units, work, [core])}
  assert ''.join(done) == 'abcde' and done['a'].line['cores'] == [core]
  assert done['a'].line['process'] == done['c'].line['process']   # a unit compiles once
  assert done['b'].line is None and 'such a thing' in done['b'].error
  assert done['d'].line is None and 'status 3' in done['d'].error
  assert done['e'].line['process'] != done['a'].line['process']
  assert list(the.workers.work_off(units, work, [core], seconds=0)) == []


ORPHANS = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import workers

def one(run):
  print(os.getpid(), flush=True)
  time.sleep(100)

if __name__ == '__main__':
  list(workers.work_off([[{}]], one, [None]))
"""


def test_workers_end_when_what_started_them_is_killed(tmp_path):
  (tmp_path / 'orphans.py').write_text(ORPHANS)
  parent = subprocess.Popen([sys.executable, tmp_path / 'orphans.py', FOLDER], stdout=subprocess.PIPE,
                            text=True)
  worker = int(parent.stdout.readline())
  parent.send_signal(signal.SIGKILL)
  parent.wait()
  for _ in range(600):   # of a tenth of a second
    if not pathlib.Path(f'/proc/{worker}').exists() or ' Z ' in pathlib.Path(
        f'/proc/{worker}/stat').read_text():
      return
    time.sleep(0.1)
  os.kill(worker, signal.SIGKILL)
  pytest.fail('it still runs')


def test_arena(tmp_path):
  """The smoke tier; a line that is there is not run again; the table has all."""
  for i in range(4):
    (tmp_path / f'{i}.txt').write_bytes(bytes(range(256)) * 40)
  run = [sys.executable, FOLDER / 'run.py', '--tier=smoke', f'--books={tmp_path}/*.txt', f'--out={tmp_path}/out',
         '--workers=1']
  env = os.environ | dict(XDG_CACHE_HOME=str(tmp_path / 'cache'))
  ask = lambda *more: subprocess.run([*run, *more], capture_output=True, text=True, timeout=900, env=env)
  none = ask('--minutes=0')
  assert none.returncode == 0 and 'No run yet' in none.stdout
  done = ask()
  assert done.returncode == 0, done.stderr
  lines = (tmp_path / 'out' / 'runs.jsonl').read_text().splitlines()
  found = {(row['model'], row['trial']): row for row in map(json.loads, lines)}
  assert set(found) == set(itertools.product(('gru', 'window'), ('mqar', 'rewrite', 'parity', 'passkey', 'books')))
  for model in ('gru', 'window'):
    parity, books = found[model, 'parity'], found[model, 'books']
    assert 0.35 < parity['parity_256'] < 0.65 and 0.35 < parity['validation'] < 0.65   # two steps teach nothing
    assert parity['validation'] != parity['parity_64'] and parity['examples']['parity_64'] == 256
    assert 0 < parity['standard_errors']['parity_256'] < 0.05
    for field in ('books', 'books_far', 'validation'):   # of bytes that follow each other two steps teach a little
      assert 5 < books[field] < 9 and len(books['files']) == 16
    assert parity['commit'] and set(parity['versions']) == {'jax', 'longctx'}
    assert abs(parity['parameters'] / 150_000 - 1) < 0.02
    assert found[model, 'mqar']['mqar'] < 0.4 and found[model, 'passkey']['passkey_64'] < 0.4
  assert (tmp_path / 'out' / 'leaderboard.png').stat().st_size > 10_000
  table = (tmp_path / 'out' / 'leaderboard.md').read_text()
  assert all(f'| {model} | ' in table and f'| {model} | ' in done.stdout for model in ('gru', 'window')) and '| 3b |' in table
  again = ask()
  assert again.returncode == 0 and (tmp_path / 'out' / 'runs.jsonl').read_text().splitlines() == lines


# The trials

def test_every_model_that_goes_on_from_a_text_has_a_place(the):
  roster = the.roster
  assert set(roster.CELLS) == set(recurrent.CELLS) and set(MIXERS) <= set(roster.NAMES)
  assert {fields.get('long_term', 'none') for fields in roster.MEMORIES.values()} == set(MEMORIES)
  # A decoder is attention and the mixers; encoders read what they are given at once.
  assert set(configuration.MODELS) - set(roster.CELLS) == {'decoder', 'memory', 'encoder', 'encoder_decoder'}
  assert len(set(roster.NAMES)) == len(roster.NAMES) == 33


def test_every_model_is_at_the_budget(the):
  made = [the.trials.make(trial, '') for trial in the.trials.MAKE]
  for shape in {*((trial.vocab_size, trial.segment) for trial in made), (257, 128)}:   # of books, which need files
    for model in the.roster.NAMES:
      count = the.roster.config(model, *shape).num_parameters()
      assert abs(count / the.roster.PARAMETERS - 1) < 0.05, (shape, model)


def asked_of(answers):
  """Programs whose model answers so, and the list of what they were shown."""
  shown = []
  def score(params, tokens, targets):
    shown.append(tokens)
    return None, answers(tokens, targets)
  return types.SimpleNamespace(score=score), shown


def test_a_score_is_the_mean_of_what_each_row_asks_and_the_draws_differ(the):
  parity = the.trials.parity()
  p, shown = asked_of(lambda tokens, targets: (targets == 1))
  near, valid = parity.ask(p, None, 'test')['parity_64'], parity.ask(p, None, 'validation')['parity_64']
  far = parity.far(p, None)['parity_256']
  rows = lambda i: np.concatenate(shown[i:i + 4])   # 64 at once
  odd = np.cumsum(rows(0), axis=1) % 2
  np.testing.assert_allclose(near, odd.mean(axis=1))
  np.testing.assert_allclose(far, (np.cumsum(rows(8), axis=1) % 2)[:, 64:].mean(axis=1))
  assert not np.array_equal(rows(0), rows(4)) and valid.shape == near.shape == far.shape == (256,)


def test_what_is_learned_grows_with_the_steps(the):
  asked = lambda trial, done: (the.trials.MAKE[trial]().batch(np.random.default_rng(1), done, 6)[1] >= 0).sum(axis=1)
  assert (asked('mqar', 0) == 8).all() and (asked('passkey', 0) == 3).all()
  assert [asked('parity', done).tolist() for done in (0, 0.49, 0.75, 0.95)] == [
      [n] * 6 for n in (16, 16, 46, 64)]
  assert asked('rewrite', 0.1).tolist() == [2] * 6 and asked('rewrite', 0.2).tolist() == [2] * 3 + [8] * 3
  of = lambda done: the.trials.passkey().batch(np.random.default_rng(1), done, 4)[1]
  where = lambda targets: [int(np.flatnonzero(row >= 0)[-1]) for row in targets]   # the last digit
  assert where(of(0.4)) == [31] * 4 and where(of(0.5)) == [31] * 2 + [63] * 2


def test_blanks_of_recall_hold_no_key_and_no_value(the):
  tokens, targets = the.trials.recall(np.random.default_rng(2), 50, 64)
  for row, answers in zip(tokens, targets):
    pairs = dict(zip(row[:16:2].tolist(), row[1:16:2].tolist()))
    assert len(pairs) == 8 and min(pairs) > 0
    asked = np.flatnonzero(answers >= 0)
    assert sorted(row[asked].tolist()) == sorted(pairs) and asked.min() >= 16
    assert [pairs[key] for key in row[asked].tolist()] == answers[asked].tolist()
    assert not np.delete(row[16:], asked - 16).any()


def test_no_book_is_of_two_parts(the, tmp_path):
  for i in range(8):
    (tmp_path / f'{i}.txt').write_bytes(bytes([i]) * 5000)
  books = the.trials.read_books(f'{tmp_path}/*.txt')
  assert [sorted(set(part.tolist())) for part in books[:3]] == [[0, 1, 4, 5], [2, 6], [3, 7]]
  (tmp_path / '7.txt').write_bytes(bytes([9]) * 5000)
  the.trials.read_books.cache_clear()
  assert the.trials.read_books(f'{tmp_path}/*.txt').digest != books.digest
  the.trials.read_books.cache_clear()
  (tmp_path / '2.txt').write_bytes(b'')
  (tmp_path / '6.txt').write_bytes(b'')
  with pytest.raises(SystemExit, match='0 to choose by'):
    the.trials.read_books(f'{tmp_path}/*.txt')


@pytest.mark.slow
@pytest.mark.parametrize('trial', ['mqar', 'rewrite', 'parity', 'passkey', 'books'])
def test_every_model_takes_a_step_on_every_trial_and_is_asked_all(the, trial, tmp_path, monkeypatch):
  for name, value in dict(ROWS=4, FAR=(1, 2), FAR_DOCUMENTS=2, LENGTH=256, FAR_LENGTH=512,
                          FAR_ROWS=1).items():
    monkeypatch.setattr(the.trials, name, value)
  for i in range(4):
    (tmp_path / f'{i}.txt').write_bytes(bytes(range(256)) * 10)
  fields = dict(mqar=['mqar'], rewrite=['rewrite_8', 'rewrite_16'], parity=['parity_64', 'parity_256'],
                passkey=['passkey_1', 'passkey_1', 'passkey_2'], books=['books', 'books_far'])[trial]
  for model in the.roster.NAMES:
    run = dict(trial=trial, model=model, steps=1, rows=2, learning_rate=1e-3, seed=0)
    line = the.arena.compete(run, f'{tmp_path}/*.txt')
    for field in fields:
      assert np.isfinite(line[field]) and line['examples'][field] >= 1, (model, field)
    assert np.isfinite(line['loss']) and line['state_floats'] > 0, model


# The tables

def lines_of(the, values, *, model, rate=3e-3, seed=0, validation=None, loss=1.0):
  """Lines of a model, by field: a score, or a score and its standard error."""
  trial_of = lambda field: field.split('_')[0]
  found = []
  for trial in dict.fromkeys(map(trial_of, values)):
    mine = {f: v if isinstance(v, tuple) else (v, 0.01) for f, v in values.items() if trial_of(f) == trial}
    found.append(dict(
        trial=trial, model=model, seed=seed, learning_rate=rate, steps=1, rows=1, state_floats=8, loss=loss,
        validation=next(iter(mine.values()))[0] if validation is None else validation, train_seconds=5.0,
        test_seconds=1.0, commit='c0ffee', versions=dict(jax='0', longctx='0'), device='cpu',
        standard_errors={f: e for f, (_, e) in mine.items()}, examples=dict.fromkeys(mine, 256),
        **{f: v for f, (v, _) in mine.items()}))
  return found


def test_the_validation_chooses_the_rate_and_the_test_is_told(the):
  rows = [*lines_of(the, dict(mqar=0.9), model='gru', rate=1e-2, validation=0.5),
          *lines_of(the, dict(mqar=0.7), model='gru', rate=3e-3, validation=0.6),
          *lines_of(the, dict(books=2.0, books_far=2.0), model='gru', rate=1e-2, validation=3.0),
          *lines_of(the, dict(books=2.5, books_far=2.5), model='gru', rate=3e-3, validation=2.9),
          *lines_of(the, dict(books=1.0, books_far=1.0), model='gru', rate=1e-3,
                    validation=float('nan'))]
  found = the.leaderboard.scores(rows)['gru']
  assert (found['mqar'].mean, found['mqar'].rates) == (0.7, 2) and found['books'].mean == 2.5
  table = the.leaderboard.table(rows, 3)
  assert '| 0.700±0.010 (2) |' in table and '| 2.500±0.010 |' in table
  assert table.endswith('| 8 | 0.5 |')   # of all five runs


def test_of_rates_that_are_equally_valid_the_order_of_lines_chooses_none(the):
  far = {(1e-2, 0.5): 0.2, (3e-3, 0.1): 0.9, (1e-3, float('nan')): 0.4}   # by rate and loss
  rows = [line for (rate, loss), value in far.items()
          for line in lines_of(the, dict(passkey_1=1.0, passkey_16=value), model='gru', rate=rate, loss=loss)]
  for order in (rows, rows[::-1]):
    assert the.leaderboard.scores(order)['gru']['passkey_16'].mean == 0.9
  same = [row | dict(loss=0.1) for row in rows]
  for order in (same, same[::-1]):
    assert the.leaderboard.scores(order)['gru']['passkey_16'].mean == 0.4   # the lowest rate


def test_all_that_guess_share_a_place(the):
  rows = [line for model, value in (('gru', 0.496), ('lstm', 0.515), ('rglru', (0.60, 0.06)), ('gla', 0.53), ('elman', 0.9))
          for line in lines_of(the, dict(parity_256=value), model=model)]
  places = the.leaderboard.ranks(the.leaderboard.scores(rows))
  assert places == dict(elman=1, gla=2, gru=4, lstm=4, rglru=4)


def test_seeds_add_to_the_standard_error(the):
  rows = [line for seed, value in enumerate((0.4, 0.6))
          for line in lines_of(the, dict(mqar=(value, 0.03)), model='gru', seed=seed)]
  score = the.leaderboard.scores(rows)['gru']['mqar']
  assert score.mean == pytest.approx(0.5) and score.error == pytest.approx(np.hypot(0.03, 0.1))


def test_the_places_of_the_arena_share_what_is_equal(the):
  rows = [line for model, mqar, books in (('gru', 0.5, 3.0), ('lstm', 0.5, 2.0), ('rglru', 0.9, 4.0))
          for line in lines_of(the, dict(mqar=mqar, books=books, books_far=books), model=model)]
  places = the.leaderboard.ranks(the.leaderboard.scores(rows))
  assert places == {'rglru': (1 + 3) / 2, 'gru': (2.5 + 2) / 2, 'lstm': (2.5 + 1) / 2}
  assert '| rglru | 2.0 | 0.900±0.010 |' in the.leaderboard.table(rows, 1)
  # One that was asked a part has no place, and takes none.
  more = [*rows, *lines_of(the, dict(mqar=0.7), model='attention')]
  assert the.leaderboard.ranks(the.leaderboard.scores(more)) == {'attention': pytest.approx(float('nan'), nan_ok=True)} | places
  table = the.leaderboard.table(more, 1).splitlines()
  assert table[-1].startswith('| attention | - | 0.700±0.010 | - |') and table[3].startswith('| lstm | 1.8 |')


def as_predicted(the):
  """Scores of all models that are as all predictions say."""
  found = {}
  for name in the.roster.NAMES:
    recalls = name in ('attention', 'delta_net', 'gated_delta', 'kda', 'rwkv7', 'mamba2')
    corrects = recalls or name in ('armt', 'infini')
    tracks = name in ('lstm', 'slstm', 'gru', 'gated_delta (0,2)')
    gone = name in ('attention', 'window', 'transformer_xl')
    bits = 2.9 if name == 'attention' else 2.8
    found[name] = dict(
        mqar=0.95 if recalls else 0.3, rewrite_8=0.9 if corrects else 0.5, rewrite_16=0.6,
        parity_64=0.9, parity_256=0.98 if tracks else 0.505, passkey_1=0.9,
        passkey_16=0.12 if gone else 0.7, passkey_64=0.12 if gone else 0.4, books=bits,
        books_far=bits + (0.5 if name == 'attention' else -0.1))
  return found


BREAKING = {   # what is changed of `as_predicted`, so that a prediction does not hold
    '1': ('mqar', dict(lstm=0.94)), '2': ('rewrite_8', dict(armt=0.52)),
    '3a': ('parity_256', dict(slstm=0.52)), '3b': ('parity_256', dict(rmt=0.53)),
    '4a': ('passkey_64', dict(window=0.2)), '4b': ('passkey_64', dict(attention=0.6)),
    '4c': ('passkey_16', dict(gla=0.4)), '5a': ('books', dict(mlstm=2.95)),
    '5b': ('books_far', dict(rmt=3.4))}


def marks(the, values):
  rows = [line for model, fields in values.items() for line in lines_of(the, fields, model=model)]
  text = the.leaderboard.verdicts(rows).splitlines()[2:]
  return {cells[1].strip(): (cells[3].strip(), cells[4]) for cells in (line.split('|') for line in text)}


def test_predictions_are_marked_by_their_rules(the):
  values = as_predicted(the)
  assert set(BREAKING) == {p.name for p in the.predictions.PREDICTIONS}
  assert {mark for mark, _ in marks(the, values).values()} == {'seen'}
  for name, (field, changes) in BREAKING.items():
    (model, value), = changes.items()
    changed = values | {model: values[model] | {field: value}}
    mark, numbers = marks(the, changed)[name]
    assert mark == 'not seen' and model in numbers, name
    trial = field.split('_')[0]
    without = values | {model: {k: v for k, v in values[model].items() if not k.startswith(trial)}}
    mark, numbers = marks(the, without)[name]
    assert mark == 'not run' and model in numbers, name
  never = {m: v | dict(passkey_1=0.112, passkey_16=0.112, passkey_64=0.112) for m, v in values.items()}
  assert marks(the, never)['4b'][0] == marks(the, never)['4c'][0] == 'not seen'   # nothing to lose
  assert 'attention 0.112±0.010 to 0.112±0.010 (not learned)' in marks(the, never)['4b'][1]
  lost = values | dict(mlstm=values['mlstm'] | dict(books=float('nan')))
  assert marks(the, lost)['5a'][0] == 'not seen'


def test_the_readme_lists_the_predictions_and_takes_the_tables(the, tmp_path, monkeypatch):
  readme = (FOLDER / 'README.md').read_text()
  flat = ' '.join(readme.split(the.leaderboard.BEGIN)[0].split())
  for prediction in the.predictions.PREDICTIONS:
    assert f'**{prediction.name}** {prediction.says}' in flat, prediction.name
  (tmp_path / 'README.md').write_text(readme)
  rows = [line for model, fields in as_predicted(the).items() for line in lines_of(the, fields, model=model)]
  text = the.leaderboard.report(rows, 3, 'a command')
  assert text.startswith('`a command`, 165 runs, 0.3 core-hours, seeds 0; at c0ffee; jax 0, longctx 0; on cpu.')
  the.leaderboard.write(text, rows, tmp_path, tmp_path / 'README.md')
  monkeypatch.setattr(the.leaderboard, 'draw', lambda *_: None)
  the.leaderboard.write(text, rows, tmp_path, tmp_path / 'README.md')   # in the place of the first
  written = (tmp_path / 'README.md').read_text()
  assert written.count(text) == 1 and written.startswith(readme.split(the.leaderboard.BEGIN)[0])
  assert (tmp_path / 'leaderboard.png').stat().st_size > 100_000   # 33 models


def test_the_readme_has_the_tables_of_the_lines(the):
  """Of as many as it says: while runs are made there are more."""
  told = (FOLDER / 'README.md').read_text().split(the.leaderboard.BEGIN)[1].split(the.leaderboard.END)[0]
  count = int(re.search(r'`, (\d+) runs, ', told)[1])
  lines = (FOLDER / 'results' / 'runs.jsonl').read_text().splitlines()[:count]
  rows = [json.loads(line) for line in lines]
  assert len(rows) == count >= 220
  for table in (the.leaderboard.table(rows, 3), the.leaderboard.verdicts(rows)):
    assert table in told and table in (FOLDER / 'results' / 'leaderboard.md').read_text()


def test_generators(tmp_path):
  run = FOLDER / 'generators.py'
  done = subprocess.run(
      [sys.executable, run, '--tasks=ruler_fwe,passkey', '--lengths=1024,2048', '--seconds=0.05',
       f'--out={tmp_path}/made.json'], capture_output=True, text=True, timeout=900)
  assert done.returncode == 0, done.stderr
  rows = json.loads((tmp_path / 'made.json').read_text())['rows']
  assert [(row['task'], row['length']) for row in rows] == [
      ('ruler_fwe', 1024), ('ruler_fwe', 2048), ('passkey', 1024), ('passkey', 2048)]
  for row in rows:   # what fits into the time, and one more
    assert row['examples'] / row['per_second'] > 0.049 and row['per_second'] > 1
