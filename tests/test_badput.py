"""The account of a run's time, by hand: a clock that the test turns."""

import errno
import json
import os
import types

import pytest

from longctx.training import badput


@pytest.fixture
def clock(monkeypatch):
  """clock.now: seconds, of both clocks; a process begins 2 seconds before its ledger."""
  fake = types.SimpleNamespace(now=1000.0)
  monkeypatch.setattr(badput, 'time', types.SimpleNamespace(
      monotonic=lambda: fake.now, time=lambda: fake.now))
  monkeypatch.setattr(badput, 'process_seconds', lambda: 2.0)
  return fake


def spend(ledger, clock, phase, seconds):
  ledger.turn(phase)
  clock.now += seconds
  ledger.turn(phase)


def steps(ledger, clock, first, last):
  """Each takes 3 seconds, and its batch 1."""
  for step in range(first, last + 1):
    spend(ledger, clock, 'input', 1)
    spend(ledger, clock, 'steps', 3)
    ledger.reach(step)


def on_disk(folder):
  found = json.loads((folder / 'badput.json').read_text())
  return {k: v for k, v in found['seconds'].items() if v}, found


def test_every_second_is_of_one_phase(tmp_path, clock):
  ledger = badput.Ledger(tmp_path)
  ledger.begin(0)
  clock.now += 5
  spend(ledger, clock, 'compile', 7)
  steps(ledger, clock, 1, 10)
  with ledger.doing('evaluation'):
    clock.now += 11
    with ledger.doing('checkpoints'):
      clock.now += 13
    clock.now += 1
  assert ledger.phase == 'steps'
  ledger.turn('input')
  clock.now += 4
  ledger.turn('steps', hidden=True)   # a step was computing all the while
  assert ledger.training_seconds() == 44
  ledger.write(finished=True)
  seconds, found = on_disk(tmp_path)
  assert seconds == dict(start=7, compile=7, steps=34, input=10, evaluation=12, checkpoints=13)
  assert found['goodput'] == pytest.approx(34 / 83, abs=1e-4)
  assert (found['step'], found['starts'], found['lost_steps'], found['finished']) == (10, 1, 0, True)
  assert ledger.table().splitlines()[1].split() == ['steps', '34.0', '41.0%']
  clock.now += 1000   # a run that was done is not down
  again = badput.Ledger(tmp_path)
  again.begin(10)
  assert again.account()['seconds']['down'] == 0


def test_a_killed_start_is_down_and_its_last_steps_are_lost(tmp_path, clock):
  ledger = badput.Ledger(tmp_path)
  ledger.begin(0)
  steps(ledger, clock, 1, 10)
  ledger.write()
  steps(ledger, clock, 11, 12)   # nobody hears of these: killed
  clock.now += 30
  again = badput.Ledger(tmp_path)   # its process began 2 seconds ago
  again.begin(8)
  steps(again, clock, 9, 12)
  again.write()
  seconds, found = on_disk(tmp_path)
  # 10 steps took 40 s; two of them were done again. Down: 8 s of steps 11 and 12, and 30 less 2.
  assert seconds == dict(start=4, steps=24 + 12, input=8 + 4, lost=8, down=36)
  assert (found['step'], found['starts'], found['lost_steps']) == (12, 2, 2)


def test_a_return_to_a_checkpoint_loses_steps_of_this_start_and_of_those_before(tmp_path, clock):
  first = badput.Ledger(tmp_path)
  first.begin(0)
  steps(first, clock, 1, 10)
  first.write()
  ledger = badput.Ledger(tmp_path)
  ledger.begin(10)
  steps(ledger, clock, 11, 20)
  ledger.roll_back(15, 'bad')
  assert ledger.step == 15
  assert ledger.account()['seconds']['lost'] == 20
  steps(ledger, clock, 16, 16)
  ledger.roll_back(5, 'bad')   # 6 of its own, 5 of the start before
  account = ledger.account()
  assert account['seconds']['lost'] == 20 + 24 + 20
  assert account['seconds']['steps'] == 15 and account['lost_steps'] == 5 + 11 and account['rollbacks'] == 2
  assert ledger.training_seconds() == 44   # the pace of a run does not go backwards
  events = [json.loads(line) for line in (tmp_path / 'events.jsonl').read_text().splitlines()]
  assert [(e['step'], e['what'], e['back_to']) for e in events] == [(20, 'rollback', 15), (16, 'rollback', 5)]
  assert '16 steps lost' in ledger.table() and '2 returns' in ledger.table()


def test_a_damaged_file_begins_anew_and_others_write_nothing(tmp_path, clock):
  (tmp_path / 'badput.json').write_text('{"seconds": {"steps": 3')
  ledger = badput.Ledger(tmp_path)
  ledger.begin(0)
  steps(ledger, clock, 1, 1)
  assert ledger.account()['seconds']['steps'] == 3
  other = tmp_path / 'other'
  other.mkdir()
  ledger = badput.Ledger(other, enabled=False)
  ledger.count('failed_saves', why='full')
  ledger.write()
  assert list(other.iterdir()) == []


@pytest.mark.parametrize('code', [errno.ENOSPC, errno.EIO])
def test_what_went_wrong_while_the_disk_did_is_told_later(tmp_path, clock, monkeypatch, capsys, code):
  ledger = badput.Ledger(tmp_path)
  def refuse(path, lines):
    raise OSError(code, os.strerror(code))
  with monkeypatch.context() as broken:
    broken.setattr(badput, 'append', refuse)
    ledger.count('failed_saves', why='no room')
    ledger.event('other')
  assert not (tmp_path / 'events.jsonl').exists()
  assert f'events.jsonl: lines wait for room: {os.strerror(code)}' in capsys.readouterr().err
  for _ in range(2):
    ledger.write()
    assert [json.loads(line)['what'] for line in (tmp_path / 'events.jsonl').read_text().splitlines()] == [
        'failed_saves', 'other']
