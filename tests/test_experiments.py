"""Every experiment's smoke tier runs and writes what its README shows."""

import importlib
import json
import keyword
import os
import pathlib
import re
import subprocess
import sys
import types

import pytest

from longctx.data import corpus, stream

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
def test_speed_of_one_device(tmp_path):
  run = ROOT / 'experiments' / '00_speed_of_one_device' / 'run.py'
  done = subprocess.run([sys.executable, run, '--tier=smoke', f'--out={tmp_path}'],
                        capture_output=True, text=True, timeout=900)
  assert done.returncode == 0, done.stderr
  found = json.loads((tmp_path / 'results.json').read_text())['results']
  for shape in ('T=256', 'T=2048'):
    ours, theirs = found[shape]['longctx'], found[shape]['PyTorch']
    assert ours['speed_ratio'] > 0 and theirs['speed_ratio'] == 1
    # The same work: parameters within 5 % (RoPE has no table of positions), losses near ln 257.
    tables = (256 if shape == 'T=256' else 2048) * 128
    assert abs(ours['parameters'] / (theirs['parameters'] - tables) - 1) < 0.05
    assert abs(ours['loss'] - theirs['loss']) < 0.5
  assert (tmp_path / 'speed.png').stat().st_size > 10_000


@pytest.mark.slow
def test_cost_of_attention(tmp_path):
  run = ROOT / 'experiments' / '01_cost_of_attention' / 'run.py'
  done = subprocess.run([sys.executable, run, '--tier=smoke', f'--out={tmp_path}'],
                        capture_output=True, text=True, timeout=900)
  assert done.returncode == 0, done.stderr
  found = json.loads((tmp_path / 'results.json').read_text())
  memory = found['memory']['1024']
  assert memory['ring, 8 devices'] < memory['jax.nn dense over 8 devices (GSPMD)']
  assert found['ratios']['1024']['ring, 8 devices'] == 1
  assert found['ratios']['1024']['jax.nn dense, 1 device'] > 0
  assert (tmp_path / 'cost.png').stat().st_size > 10_000


@pytest.mark.slow
def test_recurrences(tmp_path):
  """A run that was cut short in the middle of a line carries on behind the last whole one."""
  run = [sys.executable, ROOT / 'experiments' / '02_recurrences' / 'run.py', '--tier=smoke',
         f'--out={tmp_path}']
  done = subprocess.run(run, capture_output=True, text=True, timeout=900)
  assert done.returncode == 0, done.stderr
  lines = (tmp_path / 'tasks.jsonl').read_text().splitlines()
  assert len(lines) == 2 and len((tmp_path / 'text.jsonl').read_text().splitlines()) == 2
  for name in ('tasks', 'text', 'stream'):
    assert (tmp_path / f'{name}.png').stat().st_size > 10_000
  row = json.loads(lines[0])
  assert row['task'] == 'mqar' and len(row['by_position_64']) == 64
  assert sum(x is not None for x in row['by_position_64']) > 8
  stream = json.loads((tmp_path / 'stream.jsonl').read_text().splitlines()[0])
  assert stream['growth'] < 0.05 and stream['state_bytes'] < 10_000
  (tmp_path / 'tasks.jsonl').write_text('\n'.join(lines) + '\n' + lines[0][:20])   # killed
  again = subprocess.run([*run, '--part=tasks'], capture_output=True, text=True, timeout=900)
  assert again.returncode == 0, again.stderr
  assert (tmp_path / 'tasks.jsonl').read_text().splitlines() == lines
  assert '"task"' not in again.stdout   # nothing was done twice


@pytest.mark.slow
def test_what_a_memory_recalls(tmp_path):
  run = [sys.executable, ROOT / 'experiments' / '03_memories' / 'run.py', '--tier=smoke', '--part=recall',
         f'--out={tmp_path}']
  done = subprocess.run(run, capture_output=True, text=True, timeout=900)
  assert done.returncode == 0, done.stderr
  row = json.loads((tmp_path / 'recall.jsonl').read_text())
  assert row['state_floats'] == 2 * 2 * 32 * 33   # layers, heads, M and z
  assert 0 <= row['accuracy_8'] <= 1 and (tmp_path / 'recall.png').stat().st_size > 10_000


@pytest.mark.slow
def test_memories(tmp_path):
  for i in range(12):
    (tmp_path / f'{i}.txt').write_text(f'the quick brown fox {i} jumps over the lazy dog\n' * 60)
  run = [sys.executable, ROOT / 'experiments' / '03_memories' / 'run.py', '--tier=smoke',
         f'--out={tmp_path}', f'--books={tmp_path}/*.txt']
  done = subprocess.run(run, capture_output=True, text=True, timeout=900)
  assert done.returncode == 0, done.stderr
  parts = ('recall', 'passkey', 'books', 'forms', 'inner_rate')
  rows = {part: [json.loads(line) for line in (tmp_path / f'{part}.jsonl').read_text().splitlines()]
          for part in parts}
  assert rows['recall'][0]['state_floats'] == 2 * 2 * 32 * 33   # layers, heads, M and z
  assert 0 <= rows['recall'][0]['accuracy_8'] <= 1
  assert rows['passkey'][0]['same_bits']   # of a context that one process saved and another answered from
  assert all(row['difference_forward'] < 1e-5 for row in rows['forms'])
  clipped, naive = ([r for r in rows['inner_rate'] if (r['clip'] == 'inf') == is_naive]
                    for is_naive in (False, True))
  assert all(r['lost_after'] is None for r in clipped) and any(r['lost_after'] for r in naive)
  assert 4 < rows['books'][0]['bits_per_byte'] < 8 and rows['books'][0]['state_floats'] == 16 * 48
  for part in parts:
    assert (tmp_path / f'{part}.png').stat().st_size > 10_000
  again = subprocess.run([*run, '--part=recall'], capture_output=True, text=True, timeout=900)
  assert again.returncode == 0 and '"task"' not in again.stdout   # nothing was done twice


@pytest.fixture(scope='module')
def passkey():
  """experiments/03_memories/passkey.py."""
  folder = str(ROOT / 'experiments' / '03_memories')
  sys.path.insert(0, folder)
  try:
    yield importlib.import_module('passkey')
  finally:
    sys.path.remove(folder)
    for name in ('passkey', 'models'):
      sys.modules.pop(name, None)


def test_memory_that_jumps_up_and_down_does_not_grow(passkey):
  for low_at in range(20):
    sizes = [425 if i % 20 == low_at or i % 7 == 0 else 462 for i in range(200)]
    assert passkey.growth(sizes) == dict(resident_early=462, growth=0, growth_samples=200)
  assert passkey.growth([50] + [100] * 9 + [101] * 10)['growth'] == 0.01


def test_the_table_of_passkeys_is_that_of_the_results(passkey):
  text = (ROOT / 'experiments' / '03_memories' / 'README.md').read_text()
  rows = passkey.shared.read(ROOT / 'experiments' / '03_memories' / 'results' / 'passkey.jsonl')
  assert passkey.table(rows).split('\n\n')[1] in text
  for row in rows:
    if row['growth_samples'] == len(row['curve']):   # of old lines
      assert row['growth'] == passkey.growth(row['curve'])['growth'] <= 0.0001   # as the text says


@pytest.fixture(scope='module')
def faults():
  """What experiments/05_faults has, by the names of its files."""
  folder = str(ROOT / 'experiments' / '05_faults')
  sys.path.insert(0, folder)
  try:
    yield types.SimpleNamespace(**{name: importlib.import_module(name) for name in ('faults', 'run', 'stall', 'faulty')})
  finally:
    sys.path.remove(folder)
    for name in ('faults', 'run', 'children', 'stall', 'faulty'):
      sys.modules.pop(name, None)


def test_the_plan_of_faults_has_every_kind_and_its_table_counts_them(faults):
  plan, table = faults.faults.plan, faults.faults.table
  plans = [plan(i, 4, 36) for i in faults.run.TIERS['cpu']['trials']]
  assert {kind: sum(p['kind'] == kind for p in plans) for kind in faults.faults.KINDS} == {
      kind: 2 if kind == 'minute' else 8 for kind in faults.faults.KINDS}
  turn = ['term', 'kill', 'stop', 'hang', 'cut', 'missing', 'flip', 'resize', 'disk', 'bucket', 'nan', 'spike', 'rollback',
          'divergence']
  assert [p['kind'] for p in plans] == 8 * turn + 8 * ['restart'] + 2 * ['minute']   # results are known by number and kind
  assert {p['process'] for p in plans} == {0, 1, 2, 3} and all(faults.faults.EVERY < p['step'] <= 24 for p in plans)
  rows = [dict(plans[1], kept=True, seconds=s, recovered=2 * s, reached=37, resumed_at=30, lost=0, same=True)
          for s in (3.0, 9.0, 4.0)]
  rows += [dict(plans[10], kept=False, lost=2, same=True), dict(plans[10], kept=False, error='it hung')]
  promised = faults.faults.KINDS
  assert table(rows).splitlines()[2:] == [
      f'| `kill` | {promised["kill"]} | 3 of 3 | none | 4.0 (9.0) | 8.0 (18.0) | 7 (7) |',
      f'| `nan` | {promised["nan"]} | 0 of 2 | in 1, not known of 1 | - | - | - |',
      '| all | | 3 of 5 | in 1, not known of 1 | | | |']


def test_the_table_of_faults_is_that_of_the_results(faults):
  text = (ROOT / 'experiments' / '05_faults' / 'README.md').read_text()
  rows = faults.run.shared.read(ROOT / 'experiments' / '05_faults' / 'results' / 'faults.jsonl')
  assert faults.run.with_table(text, rows) == text


def test_what_a_fault_has_changed_is_seen(faults, tmp_path):
  alike, lost = faults.faults.alike, faults.faults.lost
  straight = [dict(step=i, loss=5.0 - i / 10) for i in range(1, 13)]
  changed = lambda at, by: [x | (dict(loss=None if by is None else x['loss'] + by) if x['step'] == at else {})
                            for x in straight]
  key = lambda kind: dict(kind=kind, step=8, steps=12)
  assert alike(straight, straight, key('kill')) and not alike(changed(9, 1e-9), straight, key('kill'))
  assert alike(changed(9, 1e-4), straight, key('resize')) and not alike(changed(9, 0.1), straight, key('resize'))
  assert alike(changed(8, None), straight, key('nan'))   # the step that is skipped
  assert not alike(changed(9, None), straight, key('nan')) and not alike(changed(7, 0.1), straight, key('nan'))
  assert alike(changed(7, 0.1), straight, key('rollback')) and not alike(changed(6, 0.1), straight, key('rollback'))
  place = tmp_path / 'checkpoints' / '12' / 'stream'
  place.mkdir(parents=True)
  stand = lambda *at: (place / 'metadata').write_text(json.dumps(dict(processes=[dict(next_index=i) for i in at])))
  stand(12, 12)
  assert lost(key('kill'), tmp_path, straight, 0) == 0
  assert lost(key('kill'), tmp_path, straight[:5] + straight[6:], 0) == 1
  assert lost(key('kill'), tmp_path, [*straight, straight[3]], 0) == 1
  stand(15, 15)
  assert lost(key('rollback'), tmp_path, straight, 3) == 0 and lost(key('rollback'), tmp_path, straight, 2) == 1
  stand(12, 13)
  assert lost(key('kill'), tmp_path, straight, 0) > 0


OUTAGE = """
import os, sys, time
import faulty
faulty.SECONDS = 1.0
folder = sys.argv[1]
sys.argv[1] = f'--config.data.cache_dir=file://{folder}/tokens'
os.mkdir(f'{folder}/w')
faulty.restart(faulty.Fault(1, 3, f'{folder}/began'), f'{folder}/w')
def asked(times):
  said = ''
  for _ in range(times):
    try:
      os.listdir(f'{folder}/w')
      said += '.'
    except OSError as e:
      said += str(e.errno)
  return said
print(asked(4))
open(f'{folder}/began.killed', 'w').close()
faulty.restart(faulty.Fault(1, 3, f'{folder}/began'), f'{folder}/w')
print(os.path.exists(f'{folder}/began'), asked(4), os.path.exists(f'{folder}/began'))
time.sleep(1.1)
print(asked(2))
"""


def test_a_start_that_cannot_reach_its_files(tmp_path):
  """From the third on, for a while, and not before something was killed."""
  done = subprocess.run([sys.executable, '-c', OUTAGE, tmp_path], capture_output=True, text=True, timeout=60,
                        env=os.environ | {'PYTHONPATH': str(ROOT / 'experiments' / '05_faults')})
  assert done.stdout.splitlines() == ['....', 'False ..55 True', '..'], done.stderr


def test_what_a_save_costs_by_hand(faults):
  """A step a second; the save that is called after step 50 takes half a second, and slows two steps by a quarter."""
  steps, now = [], 0.0
  for i in range(100):
    now += {50: 1.75, 51: 1.25}.get(i, 1.0)
    steps.append(now)
  found = faults.stall.costs(steps, [[steps[49], steps[49] + 0.5, steps[50] + 1.0]])
  assert found == dict(step_seconds=1.0, saves=1, steps_beside=2, writing_seconds=2.75, call=0.5, cost=1.0, slower=0.5)


@pytest.mark.slow
@pytest.mark.parametrize('program, results, count', [
    ('run', 'faults', 2), ('stall', 'stall', 1), ('input', 'input', 1), ('first_step', 'first_step', 2)])
def test_faults(tmp_path, program, results, count):
  command = [sys.executable, ROOT / 'experiments' / '05_faults' / f'{program}.py', '--tier=smoke', f'--out={tmp_path}']
  if program == 'run':
    command.append(f'--work={tmp_path}/work')
  done = subprocess.run(command, capture_output=True, text=True, timeout=900)
  assert done.returncode == 0, done.stderr
  rows = [json.loads(line) for line in (tmp_path / f'{results}.jsonl').read_text().splitlines()]
  assert len(rows) == count
  if program == 'run':
    assert [row['kind'] for row in rows] == ['flip', 'nan'] and all(row['kept'] for row in rows), rows
    again = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert again.returncode == 0 and again.stdout == f'{done.stdout[done.stdout.index("| fault"):]}'


def test_the_harness_is_asked_of_files_that_are_not_trained_on(tmp_path):
  """experiments/07_lm_eval/tasks.py: what it says is right is what stands in the file."""
  done = subprocess.run([sys.executable, ROOT / 'experiments' / '07_lm_eval' / 'tasks.py', f'--out={tmp_path}'],
                        capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr
  source = corpus.open_source(stream.Config())
  read = lambda split: [b''.join(parts).decode('utf-8', 'replace') for _, parts in source.documents(split)]
  held, trained = read('validation') + read('test'), '\0'.join(read('train'))
  of = lambda name: [json.loads(line) for line in (tmp_path / f'{name}.jsonl').read_text().splitlines()]
  bits, lines, words = of('python_bits'), of('python_next_line'), of('python_keyword')
  assert min(map(len, (bits, lines, words))) > 50
  assert all(any(text.startswith(example['text']) for text in held) for example in bits)
  assert sum(example['text'] in trained for example in bits) == 0
  for example in lines:
    assert len(set(example['choices'])) == 4 and all(re.fullmatch(r' {4}\S.*\n', line) for line in example['choices'])
    right = example['q'] + example['choices'][example['gold']]
    assert len(example['q']) == 300 and any(right in text for text in held)
  assert [sum(example['gold'] == i for example in lines) > len(lines) / 8 for i in range(4)] == [True] * 4
  for example in words:
    word = example['q'][-2:] + example['a']
    assert keyword.iskeyword(word) and any(example['q'] + example['a'] in text for text in held)
