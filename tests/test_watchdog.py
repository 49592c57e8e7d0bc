"""Processes that are lost, leave or stand still are named. Here all of them are threads of one process."""

import contextlib
import json
import os
import threading
import time
import types

import pytest

from longctx.errors import ConfigError
from longctx.training import watchdog

LIMIT = 60   # seconds until a test gives up
# The thread that would end the process ends itself.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnhandledThreadExceptionWarning')


@pytest.fixture
def ended(monkeypatch):
  """Exit statuses, in place of the end of this process; everything happens a hundred times sooner."""
  found, happened = [], threading.Event()
  def leave(status):
    found.append(status)
    happened.set()
    raise SystemExit   # of the thread
  monkeypatch.setattr(watchdog.os, '_exit', leave)
  for name, seconds in dict(BEAT=0.02, GRACE=0.1, LOST=0.6).items():
    monkeypatch.setattr(watchdog, name, seconds)
  found_and = types.SimpleNamespace(statuses=found, wait=lambda: happened.wait(LIMIT))
  return found_and


def ledger(step=0, phase='steps'):
  """A ledger that does not move, unless the test moves it."""
  return types.SimpleNamespace(step=step, phase=phase, moves=0, write=lambda: None,
                               event=lambda what, **more: None)


def dog(folder, process, count=2, seconds=0.0, run='this', **stands):
  return watchdog.Watchdog(folder, ledger(**stands), seconds, process=process, count=count, run=run)


def kill(one):
  """As SIGKILL would: it says nothing more, and the kernel drops its lock."""
  one._over.set()
  one._thread.join()
  os.close(one._own._fd)


def test_a_killed_process_is_named_with_where_it_was(tmp_path, ended, capfd):
  with contextlib.ExitStack() as exits:
    exits.enter_context(dog(tmp_path, 0, 3, step=9))
    exits.enter_context(dog(tmp_path, 1, 3, step=9))
    victim = dog(tmp_path, 2, 3, step=8, phase='input')
    victim.__enter__()
    kill(victim)
    assert ended.wait()
  said = capfd.readouterr().err
  assert 'longctx: process 2 is lost: it ended at step 8, input (' in said
  assert f'pid {os.getpid()}); the run ends, and the same command carries on' in said
  assert 'process 0: step 9, steps' in said and 'process 1: step 9, steps' in said
  assert set(ended.statuses) == {watchdog.TEMPORARY}


def test_one_that_says_no_more_is_named_though_it_holds_its_file(tmp_path, ended, capfd):
  silent = dog(tmp_path, 1, step=4)
  with dog(tmp_path, 0, step=4):
    silent.__enter__()
    silent._over.set()   # its host hangs
    assert ended.wait()
  silent._own.release()
  assert 'process 1 is lost: no sign of it for ' in capfd.readouterr().err


def test_who_leaves_in_order_is_not_missed_and_who_leaves_with_an_error_is(tmp_path, ended, capfd):
  with dog(tmp_path, 0, 3, step=12), dog(tmp_path, 1, 3, step=12):
    with dog(tmp_path, 2, 3, step=12):
      pass
    time.sleep(0.6)
    assert not ended.statuses
    error = OSError('no such disk')
    with contextlib.suppress(OSError), contextlib.ExitStack() as exits:
      exits.enter_context(dog(tmp_path, 2, 3, step=13))
      raise error
    assert ended.wait()
  assert 'process 2 left with an error at step 13, steps' in (said := capfd.readouterr().err)
  assert 'OSError: no such disk; the run ends' in said


def test_a_standstill_says_where_each_stood(tmp_path, ended, capfd):
  waits = dog(tmp_path, 1, step=40, phase='input')
  with waits, dog(tmp_path, 0, seconds=0.3, step=41):
    assert ended.wait()
  said = capfd.readouterr().err
  assert "longctx: run.watchdog_seconds=0.3: nothing has moved in process 0 for " in said
  assert "s, in 'steps'; the run ends" in said
  assert 'process 0: step 41, steps (said this)' in said and 'process 1: step 40, input (' in said
  assert 'in _watch' in said   # what its threads were at


def test_the_reason_of_the_first_that_ends_is_what_all_say(tmp_path, ended, capfd):
  first, second = dog(tmp_path, 0, step=41, seconds=0.3), dog(tmp_path, 1, step=41)
  with first, second:
    assert ended.wait()
    second._thread.join(LIMIT)
  said = [line for line in capfd.readouterr().err.splitlines() if line.startswith('longctx: ')]
  assert len(said) == 2 and said[0] == said[1] and 'nothing has moved in process 0' in said[0]


def test_who_moves_is_left_alone_and_compilation_may_take_longer(tmp_path, ended):
  with dog(tmp_path, 1) as other, dog(tmp_path, 0, seconds=0.3) as one:
    for _ in range(20):
      one.ledger.moves += 1
      other.ledger.moves += 1
      time.sleep(0.05)
    one.ledger.phase, one.ledger.moves = 'compile', -5
    time.sleep(0.9)
    assert not ended.statuses


def test_an_error_that_comes_of_a_lost_process_names_it(tmp_path, ended, capfd, monkeypatch):
  monkeypatch.setattr(watchdog, 'GRACE', 30.0)   # the thread would wait
  monkeypatch.setattr(watchdog.time, 'sleep', lambda seconds: None)
  victim, one = dog(tmp_path, 0, step=3), dog(tmp_path, 1, step=3)
  victim.__enter__()
  one.__enter__()
  kill(victim)
  with pytest.raises(SystemExit):
    one.__exit__(ValueError, ValueError('connection closed'), None)
  assert 'process 0 is lost' in capfd.readouterr().err
  one._own.release()


def test_errors_that_all_raise_alike_speak_for_themselves(tmp_path, ended):
  with pytest.raises(ConfigError), dog(tmp_path, 0), dog(tmp_path, 1):
    raise ConfigError('run.max_bad_steps=3: too many')
  said = json.loads((tmp_path / 'heartbeats' / '0.json').read_text())
  assert said['left'] and said['error'].startswith('ConfigError')
  assert not ended.statuses


def test_files_of_an_earlier_start_mean_nothing(tmp_path, ended):
  old = dog(tmp_path, 1, run='before')
  old.__enter__()
  kill(old)
  with dog(tmp_path, 0):
    time.sleep(0.6)
    assert not ended.statuses


def test_a_run_of_one_process_has_none(tmp_path):
  with dog(tmp_path, 0, count=1):
    assert list(tmp_path.iterdir()) == []
