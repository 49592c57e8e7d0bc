"""Processes that are lost, leave or stand still are named. Here all of them are threads of one process."""

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from longctx.errors import ConfigError
from longctx.training import badput, heartbeats, watchdog

LIMIT = 60   # seconds until a test gives up
# The thread that would end the process ends itself.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnhandledThreadExceptionWarning')


class Coordinator:
  """Stands in for the client of JAX's coordination service: the key-value store, and what befalls it."""

  def __init__(self):
    self.values, self.calls = {}, 0
    self.answers = threading.Event()   # while it is not set calls wait, as for a process that is stopped
    self.answers.set()
    self.dead = False                  # calls fail, as where the process has ended

  def _answer(self):
    self.answers.wait(LIMIT)
    self.calls += 1
    if self.dead:
      raise RuntimeError('UNAVAILABLE: failed to connect to all addresses')

  def key_value_set(self, key, value, allow_overwrite=False):
    self._answer()
    if key in self.values and not allow_overwrite:
      raise RuntimeError(f'ALREADY_EXISTS: {key}')
    self.values[key] = value

  def key_value_dir_get(self, key):
    self._answer()
    return [(name, value) for name, value in sorted(self.values.items()) if name.startswith(key)]


@pytest.fixture
def client():
  found = Coordinator()
  yield found
  found.answers.set()


@pytest.fixture
def ended(monkeypatch):
  """Exit statuses, in place of the end of this process; everything happens a score of times sooner."""
  found, happened = [], threading.Event()
  def leave(status):
    found.append(status)
    happened.set()
    raise SystemExit   # of the thread
  monkeypatch.setattr(watchdog.os, '_exit', leave)
  monkeypatch.setattr(watchdog.signal, 'alarm', lambda seconds: None)
  monkeypatch.setattr(heartbeats, 'BEAT', 0.02)
  for name, seconds in dict(GRACE=0.3, LOST=0.9).items():
    monkeypatch.setattr(watchdog, name, seconds)
  return types.SimpleNamespace(statuses=found, wait=lambda: happened.wait(LIMIT))


def ledger(step=0, phase='steps', stepped=True):
  """A ledger that does not move, unless the test moves it."""
  return types.SimpleNamespace(step=step, phase=phase, stepped=stepped, moves=0, write=lambda: None,
                               event=lambda what, **more: None)


def dog(client, process=0, count=2, seconds=0.0, run='this', **stands):
  return watchdog.Watchdog(ledger(**stands), seconds, process=process, count=count, client=client, run=run)


def kill(one):
  """As SIGKILL would: it says nothing more."""
  one._over.set()
  one._thread.join()
  one._beats._says = None   # its thread ends with an error
  one._beats._thread.join()


def heard(client, process, run='this'):
  """What a process has said, once it has said something."""
  deadline = time.monotonic() + LIMIT
  while (key := f'longctx/{run}/{process}/beat') not in client.values:
    assert time.monotonic() < deadline
    time.sleep(0.01)
  return json.loads(client.values[key])


def test_a_killed_process_is_named_with_where_it_was(client, ended, capfd):
  with contextlib.ExitStack() as exits:
    for process in (0, 1):
      exits.enter_context(dog(client, process, 3, step=9))
    victim = dog(client, 2, 3, step=8, phase='input')
    victim.__enter__()
    heard(client, 2)
    kill(victim)
    assert ended.wait()
  said = capfd.readouterr().err
  assert re.search(r'longctx: process 2 is lost: no sign of it for \d s at step 8, input \(', said), said
  assert f'pid {os.getpid()}); the run ends, and the same command carries on' in said
  assert 'process 0: step 9, steps' in said and 'process 1: step 9, steps' in said
  assert 'in _watch' not in said   # nobody's threads are of interest
  assert set(ended.statuses) == {watchdog.TEMPORARY}


def test_silence_is_longer_where_a_phase_may_last(client, ended):
  with dog(client, 0) as one:
    victim = dog(client, 1, phase='compile')
    victim.__enter__()
    heard(client, 1)
    kill(victim)
    time.sleep(1.8)
    assert not ended.statuses
    assert ended.wait()
    assert one._beats.of(1)['silent'] > 2.7


def test_who_leaves_in_order_is_not_missed_and_who_leaves_with_an_error_is(client, ended, capfd):
  with dog(client, 0, 3, step=12), dog(client, 1, 3, step=12):
    with dog(client, 2, 3, step=12):
      pass
    assert heard(client, 2)['left']
    time.sleep(1.5)
    assert not ended.statuses
    error = OSError('no such disk')
    with contextlib.suppress(OSError), contextlib.ExitStack() as exits:
      exits.enter_context(dog(client, 2, 3, step=13))
      raise error
    assert ended.wait()
  assert 'process 2 left with an error at step 13, steps' in (said := capfd.readouterr().err)
  assert 'OSError: no such disk; the run ends' in said


def test_a_standstill_says_where_each_stood(client, ended, capfd):
  waits = dog(client, 1, step=40, phase='input')
  with waits, dog(client, 0, seconds=0.5, step=41):
    assert ended.wait()
  said = capfd.readouterr().err
  assert "longctx: run.watchdog_seconds=0.5: nothing has moved in process 0 for " in said
  assert "s, in 'steps' (if it may take that long, give more, or 0); the run ends" in said
  assert 'process 0: step 41, steps (said this)' in said and 'process 1: step 40, input (' in said
  assert 'in _watch' in said   # what its threads were at


def test_the_reason_of_the_first_that_ends_is_what_all_say(client, ended, capfd):
  first, second = dog(client, 0, step=41, seconds=0.5), dog(client, 1, step=41)
  with first, second:
    assert ended.wait()
    second._thread.join(LIMIT)
  said = [line for line in capfd.readouterr().err.splitlines() if line.startswith('longctx: ')]
  assert len(said) == 2 and said[0] == said[1] and 'nothing has moved in process 0' in said[0]


def test_of_many_the_first_tells_the_others(client, ended, capfd):
  with contextlib.ExitStack() as exits:
    for process in (0, 1):
      exits.enter_context(dog(client, process, 17, step=9))
    victim = dog(client, 16, 17, step=8)
    victim.__enter__()
    heard(client, 16)
    kill(victim)
    assert ended.wait()
    threads = [thread for thread in threading.enumerate() if thread.name == 'watchdog']
    for thread in threads:
      thread.join(LIMIT)
  said = [line for line in capfd.readouterr().err.splitlines() if line.startswith('longctx: ')]
  assert len(said) == 2 and said[0] == said[1] and 'process 16 is lost' in said[0]


def test_of_many_one_whose_collective_fails_is_not_taken_for_the_lost_one(client, ended, capfd, monkeypatch):
  """It hears the first alone, whose own collective hangs."""
  for name, seconds in dict(GRACE=1.0, LOST=4.0).items():
    monkeypatch.setattr(watchdog, name, seconds)
  first, fails, victim = (dog(client, process, 17, step=9) for process in (0, 3, 7))
  victim.__enter__()
  with first:
    fails.__enter__()
    while not (first._beats.of(7) and fails._beats.of(0)):
      time.sleep(0.01)
    kill(victim)
    with pytest.raises(SystemExit):
      fails.__exit__(ValueError, ValueError('connection closed'), None)
    first._thread.join(LIMIT)
    fails._beats.part(LIMIT, close=True)
  said = [line for line in capfd.readouterr().err.splitlines() if line.startswith('longctx: ')]
  assert len(said) == 2 and said[0] == said[1] and 'process 7 is lost' in said[0], said
  assert set(ended.statuses) == {watchdog.TEMPORARY}


def test_of_many_one_that_fails_says_so_and_waits_for_what_the_first_finds(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(watchdog, 'time', types.SimpleNamespace(
      monotonic=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds)))
  one = dog(Coordinator(), 3, 17)
  monkeypatch.setattr(one._beats, 'of', lambda process: dict(phase='steps', silent=0.0, refused=False))
  one._explain('ValueError: of its own')
  assert now[0] > watchdog.LOST + heartbeats.BEAT
  assert one._beats._says()['failed'] == 'ValueError: of its own'


@pytest.mark.parametrize('left', [False, True])
def test_where_one_has_failed_one_that_is_silent_is_the_reason(left):
  lines = {process: dict(step=9, phase='compile', host='there', pid=3, silent=0.0, refused=False) for process in (3, 7)}
  lines[7]['silent'] = watchdog.GRACE + 1.0
  one = dog(Coordinator(), 0, 17)
  one._beats.of = lambda process: lines.get(process, {})
  assert one._lost() == ''
  lines[3] |= dict(failed='ValueError: closed') | (dict(left=True, error='ValueError: closed') if left else {})
  assert one._lost().startswith('process 7 is lost: no sign of it for 6 s at step 9, compile (there, pid 3)')
  lines[7]['silent'] = 1.0
  assert one._lost() == ('process 3 left with an error at step 9, compile (there, pid 3): ValueError: closed' if left else '')


def test_who_moves_is_left_alone_and_compilation_may_take_longer(client, ended):
  with dog(client, 1) as other, dog(client, 0, seconds=0.3) as one:
    for _ in range(20):
      one.ledger.moves += 1
      other.ledger.moves += 1
      time.sleep(0.05)
    one.ledger.phase, one.ledger.moves = 'compile', -5
    time.sleep(0.9)
    assert not ended.statuses


# The first process keeps the store.


def test_a_coordinator_that_is_gone_is_the_first_process(client, ended, capfd):
  client.values['longctx/this/0/beat'] = json.dumps(dict(step=7, phase='compile', host='there', pid=3))
  with dog(client, 1, step=7) as one:
    while not one._beats.of(0):
      time.sleep(0.01)
    client.dead = True
    began = time.monotonic()
    assert ended.wait()
    assert time.monotonic() - began < 2.7   # of a process that is silent more would be needed
  said = capfd.readouterr().err
  assert 'longctx: process 0 is lost: no sign of it for ' in said
  assert 'at step 7, compile (there, pid 3); the run ends' in said


def test_a_coordinator_that_does_not_answer_is_the_first_process(client, ended, capfd):
  """Calls to it hang, and others' silence is not theirs."""
  with dog(client, 1, 3, step=7) as one, dog(client, 2, 3, step=7), dog(client, 0, 3, step=6):
    while not (one._beats.of(0) and one._beats.of(2)):
      time.sleep(0.01)
    client.answers.clear()
    assert ended.wait()
    said = capfd.readouterr().err
    client.answers.set()
  assert re.search(r'longctx: process 0 is lost: no sign of it for \d s at step 6, steps \(', said), said
  # Whichever of the two speaks first: the other is there.
  assert re.search(r'process [12]: step 7, steps \(\S+, pid \d+\)(, silent for 0 s)?$', said, re.MULTILINE), said


def test_an_abort_of_jax_names_the_first_process(client, ended, capfd):
  """No call comes back while the thread that aborts is in the handler."""
  with dog(client, 1, step=7) as one, dog(client, 0, step=6):
    while not one._beats.of(0):
      time.sleep(0.01)
    client.answers.clear()
    one._over.set()   # its own thread would find it too
    with pytest.raises(SystemExit):
      one._aborted(6)
    client.answers.set()
  assert 'process 0 is lost: no sign of it for ' in capfd.readouterr().err


def test_an_abort_while_all_are_there_goes_on(client, ended):
  with dog(client, 1) as one, dog(client, 0):
    heard(client, 0)
    one._aborted(6)
    assert not ended.statuses


# Errors.


def test_an_error_that_comes_of_a_lost_process_names_it(client, ended, capfd, monkeypatch):
  """A collective fails in the instant in which its other end is gone: less silence will do."""
  monkeypatch.setattr(watchdog, 'LOST', 600.0)
  victim, one = dog(client, 2, 3, step=3), dog(client, 1, 3, step=3)
  victim.__enter__()
  one.__enter__()
  while not one._beats.of(2):
    time.sleep(0.01)
  kill(victim)
  with pytest.raises(SystemExit):
    one.__exit__(ValueError, ValueError('connection closed'), None)
  assert 'process 2 is lost' in capfd.readouterr().err
  one._beats.part(LIMIT, close=True)


def test_errors_that_all_raise_alike_speak_for_themselves(client, ended):
  with pytest.raises(ConfigError), dog(client, 0), dog(client, 1):
    raise ConfigError('run.max_bad_steps=3: too many')
  said = heard(client, 0)
  assert said['left'] and said['error'].startswith('ConfigError')
  assert not ended.statuses


def test_what_was_said_in_an_earlier_run_means_nothing(client, ended):
  old = dog(client, 1, run='before')
  old.__enter__()
  heard(client, 1, 'before')
  kill(old)
  with dog(client, 0):
    time.sleep(1.5)
    assert not ended.statuses


# A process alone.


def test_a_process_alone_that_stands_still_ends(ended, capfd):
  with dog(None, 0, 1, seconds=0.5, step=41):
    assert ended.wait()
  said = capfd.readouterr().err
  assert 'longctx: run.watchdog_seconds=0.5: nothing has moved in process 0 for ' in said
  assert 'process 0: step 41, steps (said this)' in said and 'in _watch' in said
  assert ended.statuses == [watchdog.TEMPORARY]


def test_a_disk_that_hangs_does_not_keep_it(ended):
  with dog(None, 0, 1, seconds=0.5) as one:
    one.ledger.write = lambda: time.sleep(LIMIT)
    assert ended.wait()
  assert ended.statuses == [watchdog.TEMPORARY]


@pytest.mark.parametrize('phase, stepped', [
    ('start', True), ('compile', True), ('evaluation', True), ('checkpoints', True), ('steps', False)])
def test_what_may_last_is_no_standstill(ended, phase, stepped):
  """Nor the first step, whose length nobody knows."""
  with dog(None, 0, 1, seconds=0.1, phase=phase, stepped=stepped):
    time.sleep(0.5)
    assert not ended.statuses
    assert ended.wait()


def test_what_goes_on_is_no_standstill(ended, tmp_path):
  with watchdog.Watchdog(badput.Ledger(tmp_path), 0.05) as one:
    assert one.ledger.phase == 'start'
    for _ in range(50):   # half a second is too long
      one.ledger.tick()
      time.sleep(0.02)
    assert not ended.statuses
    assert ended.wait()


def test_time_in_which_it_was_suspended_does_not_count(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(watchdog.time, 'monotonic', lambda: now[0])
  one = dog(None, 0, 1, seconds=600.0)
  one._still()
  for seconds, still in ((1.0, 1.0), (3600.0, 4.0), (1.0, 5.0)):
    now[0] += seconds
    assert one._still() == still
  one.ledger.moves += 1
  assert one._still() == 0


def test_steps_that_take_long_are_known_by_the_first(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(watchdog.time, 'monotonic', lambda: now[0])
  one = dog(None, 0, 1, seconds=600.0, stepped=False)
  def stands(seconds, then):
    for _ in range(seconds):
      now[0] += 1.0
      one._still()
    one.ledger.moves += 1
    one.ledger.phase = then
    one._still()
  one._still()
  assert one._limit() == 6000
  stands(2000, 'input')
  one.ledger.stepped = True
  assert one._limit() == 600   # of another phase
  stands(3, 'steps')
  assert one._limit() == 10_000
  stands(1, 'steps')
  assert one._limit() == 10_000


def test_it_may_be_turned_off():
  with dog(None, 0, 1) as one:
    assert not one._thread.is_alive()


HANGS = """
import sys, time
import jax
from longctx.training import badput, watchdog
jax.config.update('jax_platforms', 'cpu')
ledger = badput.Ledger(sys.argv[1])
with watchdog.watch(ledger, 1):
  ledger.turn('steps')
  ledger.reach(3)
  ledger.stepped = True
  hang = lambda x: time.sleep(600) or x
  x = jax.jit(lambda x: jax.pure_callback(hang, x, x))(1.0)
  x.block_until_ready()
"""


def test_a_device_that_hangs(tmp_path):
  done = subprocess.run([sys.executable, '-c', HANGS, str(tmp_path)], cwd=Path(__file__).parents[1], timeout=LIMIT * 5,
                        stderr=subprocess.PIPE, text=True)
  assert done.returncode == watchdog.TEMPORARY, done.stderr
  assert re.search(r"nothing has moved in process 0 for \d s, in 'steps'", done.stderr), done.stderr
  assert re.search(r'line 1[23] in <module>', done.stderr), done.stderr   # the call, or the wait for its result
  assert 'nothing has moved' in (tmp_path / 'events.jsonl').read_text()
