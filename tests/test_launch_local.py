"""launch/local.sh and launch/worker.sh: processes that are lost, stopped, restarted; workdirs of hosts."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from longctx import train
from longctx.training import watchdog
from tests.programs import tiny
from tests.stand_ins import ROOT, StandIns

CONFIG = '--config=configs/quickstart.py'
GRACEFUL = 'trap "echo saved; exit 0" TERM; echo ready; while :; do sleep 0.05; done'
FAKE_MAIN = ROOT / 'tests/programs/stand_in_main.sh'

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='the launchers are for Linux')


@pytest.fixture
def stand(tmp_path):
  stand = StandIns(tmp_path)
  (tmp_path / 'bin/python').unlink()
  (tmp_path / 'bin/python').symlink_to(FAKE_MAIN)
  return stand


def starts(stand, process=0):
  path = Path(f'{stand.calls_file}.{process}')
  return path.read_text().splitlines() if path.exists() else []


def await_text(path, text, seconds=60):
  deadline = time.monotonic() + seconds
  while not path.exists() or text not in path.read_text():
    assert time.monotonic() < deadline, path.read_text() if path.exists() else path
    time.sleep(0.02)


# local.sh.

def test_processes_are_started_with_their_places(stand, tmp_path):
  done = stand.run('local.sh', CONFIG, f'--workdir={tmp_path}/w', '--processes=3', '--devices=5', '--config.seed=1')
  assert done.returncode == 0, done.stderr
  for i in range(3):
    line, = starts(stand, i)
    flags, platform, devices, local, arguments = line.split('|')
    assert (flags.split('=')[0], platform, devices, local) == (
        '--xla_cpu_collective_call_terminate_timeout_seconds', 'cpu', '5', '')
    assert arguments == (f'-m longctx.main {CONFIG} --config.seed=1 --workdir={tmp_path}/w '
                         f'--coordinator_address=localhost:1234 --num_processes=3 --process_id={i}')
  assert done.stdout == 'process 0 speaks\n'
  assert (tmp_path / 'w/logs/process_2.log').read_text() == 'process 2 speaks\n'


def test_gpus_are_one_process_or_one_each(stand, tmp_path):
  given = CONFIG, f'--workdir={tmp_path}/w', '--platform=gpu'
  assert stand.run('local.sh', *given).returncode == 0
  assert starts(stand) == [f'--xla_gpu_enable_latency_hiding_scheduler=true|cuda,cpu|||-m longctx.main {CONFIG} --workdir={tmp_path}/w']
  assert stand.run('local.sh', *given, '--processes=2').returncode == 0
  assert starts(stand)[1].split('|')[3] == '0'
  assert starts(stand, 1)[0].split('|')[3] == '1'


@pytest.mark.parametrize('loss, said', [
    ('kill -KILL $$', 'killed by SIGKILL'), ('echo its last words; exit 7', 'status 7'),
    ('kill -TERM $$', 'killed by SIGTERM')])   # which this launcher was not asked for
def test_a_lost_process_is_named_and_all_start_again(stand, tmp_path, loss, said):
  done = stand.run('local.sh', CONFIG, f'--workdir={tmp_path}/w', '--patience=1', LOSS=loss, LOSSES='2')
  assert done.returncode == 0, done.stderr
  assert [len(starts(stand, i)) for i in range(4)] == [3] * 4
  lost = re.findall(r'launch: process (\d) of 4 \(pid \d+\) was lost: (.*); ending the others', done.stderr)
  assert lost == [('2', said)] * 2
  assert 'restart 2 of 3, from the last checkpoint' in done.stderr
  if 'words' in loss:
    assert 'its last words' in done.stderr


def test_the_others_have_time_for_their_last_words(stand, tmp_path):
  began = time.monotonic()
  done = stand.run('local.sh', CONFIG, f'--workdir={tmp_path}/w', LOSS='exit 7', LOSSES='1', timeout=80,
                   OTHERS='sleep 0.5; echo "process 2 is lost"; exit 75')
  assert done.returncode == 0, done.stderr
  assert time.monotonic() - began < 45   # no longer than they take
  assert 'process 2 is lost' in done.stdout
  assert 'process 2 is lost' in (tmp_path / 'w/logs/process_1.log').read_text()


@pytest.mark.parametrize('launcher', ['local.sh', 'slurm.sh'])
def test_patience_outlasts_the_watchdog(launcher):
  """Who compiles, evaluates or saves names a lost process last; the first process leaves after the others."""
  patience = int(re.search(r'\[patience\]=(\d+)', (ROOT / 'launch' / launcher).read_text())[1])
  assert patience > 3 * watchdog.LOST + 5 * watchdog.GRACE
  assert f'--patience={patience} ' in help_of(launcher)
  row, = re.findall(rf'^\| `{launcher}` .*', (ROOT / 'launch/README.md').read_text(), re.MULTILINE)[-1:]
  assert f'`--patience={patience}` seconds' in row


def help_of(launcher):
  return subprocess.run([ROOT / 'launch' / launcher, '--help'], capture_output=True, text=True, check=True).stdout


def test_restarts_are_bounded(stand, tmp_path):
  given = 'local.sh', CONFIG, f'--workdir={tmp_path}/w', '--processes=3', '--restarts=1', '--patience=0'
  done = stand.run(*given, LOSS='exit 7', LOSSES='9')
  assert done.returncode == 7
  assert len(starts(stand)) == 2
  assert 'given up with status 7 after 1 restarts (--restarts=1)' in done.stderr
  done = stand.run(*given, LOSS='exit 2', LOSSES='9')   # a mistake is not tried again
  assert done.returncode == 2
  assert len(starts(stand)) == 3


@pytest.mark.parametrize('loss, status', [
    ('echo ready; exec sleep 601', 130), (GRACEFUL, 0), (GRACEFUL.replace('exit 0', 'exit 75'), 0)])
def test_sigterm_goes_to_all_and_leaves_none_behind(stand, tmp_path, loss, status):
  """Processes that save and leave are a run that ended well, and is not started again."""
  env = os.environ | dict(PATH=f'{tmp_path}/bin:/usr/bin:/bin', PYTHON=str(tmp_path / 'bin/python'), LOSSES='9',
                          CALLS=str(stand.calls_file), LOSS=loss, LOST_PROCESS='all')
  with open(tmp_path / 'out', 'w') as out:
    child = subprocess.Popen([ROOT / 'launch/local.sh', CONFIG, f'--workdir={tmp_path}/w'], env=env, stdout=out,
                             stderr=subprocess.PIPE, text=True)
  for path in (tmp_path / 'out', *(tmp_path / f'w/logs/process_{i}.log' for i in range(1, 4))):
    await_text(path, 'ready')
  child.send_signal(signal.SIGTERM)
  assert child.wait(60) == status, child.stderr.read()
  assert len(starts(stand)) == 1
  assert sleepers(tmp_path) == []


def sleepers(folder):
  """Commands of processes whose environment names the folder."""
  found = []
  for process in Path('/proc').glob('[0-9]*'):
    try:
      if str(folder).encode() in (process / 'environ').read_bytes():
        found.append((process / 'cmdline').read_bytes())
    except OSError:
      continue
  return found


@pytest.mark.slow
def test_four_processes_of_two_devices_survive_a_kill(tmp_path):
  """The real thing: one of four processes is killed in mid-run; the run ends as one process's would."""
  text = {'files': tiny.write_corpus(tmp_path / 'text'), 'cache_dir': str(tmp_path / 'cache')}
  changes = dict(run_num_steps=40, run_checkpoint_every=10, run_eval_every=40)
  overrides = [f'--config.{name.replace("_", ".", 1)}={value}' for name, value in changes.items()]
  overrides += [f'--config.data.{name}={value}' for name, value in text.items()]
  with open(tmp_path / 'out', 'w') as out:
    child = subprocess.Popen(
        [ROOT / 'launch/local.sh', '--config=tests/programs/tiny.py', f'--workdir={tmp_path}/w', '--processes=4',
         '--devices=2', '--restarts=1', *overrides], stdout=out, stderr=subprocess.STDOUT,
        env=os.environ | {'JAX_DISABLE_MOST_OPTIMIZATIONS': 'true', 'TMPDIR': str(tmp_path)})
  try:
    deadline = time.monotonic() + 900
    while not any(p.name.isdecimal() for p in (tmp_path / 'w/checkpoints').glob('*')):   # a whole one
      assert child.poll() is None and time.monotonic() < deadline, (tmp_path / 'out').read_text()
      time.sleep(0.01)
    victim, = [int(p.parent.name) for p in Path('/proc').glob('[0-9]*/cmdline')
               if b'--process_id=3' in p.read_bytes() and str(tmp_path).encode() in p.read_bytes()]
    os.kill(victim, signal.SIGKILL)
    assert child.wait(900) == 0, (tmp_path / 'out').read_text()
  finally:
    child.terminate()
  out = (tmp_path / 'out').read_text()
  assert f'process 3 of 4 (pid {victim}) was lost: killed by SIGKILL' in out
  assert 'on data 8 x seq 1 x model 1' in out
  assert re.search(r'resumed at step [1-3]0', out)
  config = tiny.get_config()
  config.data.update(text)
  for name, value in changes.items():
    config[name.partition('_')[0]][name.partition('_')[2]] = value
  train.run(config, str(tmp_path / 'alone'))
  losses = [{r['step']: r['loss'] for r in map(json.loads, (tmp_path / f'{w}/metrics.jsonl').read_text().splitlines())
             if 'loss' in r} for w in ('w', 'alone')]
  assert losses[0].keys() == losses[1].keys()
  np.testing.assert_allclose(list(losses[0].values()), list(losses[1].values()), rtol=1e-5)


# worker.sh.

def worker(stand, *command, **env):
  return stand.run('worker.sh', *command, LONGCTX_STATE=f'{stand.folder}/state', **env)


def test_a_run_in_the_background_is_followed_told_of_and_stopped(stand, tmp_path):
  given = CONFIG, f'--workdir={tmp_path}/w'
  assert worker(stand, 'state').stdout.split()[1:] == ['none']
  assert 'no run was started here' in worker(stand, 'follow').stderr
  assert worker(stand, 'start', '--platform=tpu', *given, LOSSES='1', LOST_PROCESS='0', LOSS='exit 5').returncode == 0
  done = worker(stand, 'follow')
  assert (done.returncode, done.stdout) == (5, 'process 0 speaks\n')
  assert worker(stand, 'state').stdout.split()[1:] == ['exited', '5']
  assert starts(stand) == [f'|tpu,cpu|||-m longctx.main {CONFIG} --workdir={tmp_path}/w']
  # One that goes on, until it is told to end: it may then save, and its status is told.
  assert worker(stand, 'start', *given, LOSSES='9', LOST_PROCESS='0', LOSS=GRACEFUL).returncode == 0
  assert worker(stand, 'state').stdout.split()[1:] == ['running']
  done = worker(stand, 'start', *given)
  assert done.returncode == 2
  assert 'a run is still going' in done.stderr
  await_text(tmp_path / 'state/log', 'ready')
  assert worker(stand, 'stop').returncode == 0
  assert worker(stand, 'state').stdout.split()[1:] == ['exited', '0']
  assert (tmp_path / 'state/log').read_text().endswith('saved\n')
  # Saved and not finished: no failure where it was asked for, a run to start again where a machine asked.
  of_machine = 'trap "echo saved; exit 75" TERM; echo ready; while :; do sleep 0.05; done'
  for ask, status in ((lambda: worker(stand, 'stop'), '0'),
                      (lambda: subprocess.run(['pkill', '-TERM', '--session', (tmp_path / 'state/pid').read_text().strip()],
                                              check=True), '75')):
    assert worker(stand, 'start', *given, LOSSES='9', LOST_PROCESS='0', LOSS=of_machine).returncode == 0
    await_text(tmp_path / 'state/log', 'ready')
    ask()
    await_text(tmp_path / 'state/status', status)
  # One that hears nothing.
  assert worker(stand, 'start', *given, LOSSES='9', LOST_PROCESS='0',
                LOSS='trap "" TERM; echo ready; while :; do sleep 0.05; done').returncode == 0
  await_text(tmp_path / 'state/log', 'ready')
  assert worker(stand, 'stop', STOP_SECONDS='1').returncode == 0
  assert worker(stand, 'state').stdout.split()[1:] == ['stopped']   # and is not to be started again
  assert worker(stand, 'follow').returncode == 143
  (tmp_path / 'state/stopping').unlink()   # as if the host had killed it
  assert worker(stand, 'state').stdout.split()[1:] == ['killed']
  assert worker(stand, 'follow').returncode == 137
  # One that is asked, and cannot save.
  assert worker(stand, 'start', *given, LOSSES='9', LOST_PROCESS='0', LOSS=of_machine.replace('75', '1')).returncode == 0
  await_text(tmp_path / 'state/log', 'ready')
  assert worker(stand, 'stop').returncode == 0
  assert worker(stand, 'state').stdout.split()[1:] == ['stopped']
  # SIGTERM that nobody asked for, before there is a handler; and what a launcher ends, which it may start again.
  assert worker(stand, 'start', *given, LOSSES='9', LOST_PROCESS='0', LOSS='kill -TERM $$').returncode == 0
  assert worker(stand, 'follow').returncode == 143
  assert worker(stand, 'state').stdout.split()[1:] == ['exited', '143']
  assert worker(stand, 'start', *given, LOSSES='9', LOST_PROCESS='0', LOSS=of_machine).returncode == 0
  await_text(tmp_path / 'state/log', 'ready')
  assert worker(stand, 'end').returncode == 0
  assert worker(stand, 'state').stdout.split()[1:] == ['exited', '75']


def test_stop_between_two_starts_of_a_launcher_holds_for_that_launcher(stand, tmp_path):
  given = CONFIG, f'--workdir={tmp_path}/w'
  state = lambda: worker(stand, 'state').stdout.split(None, 1)[1]
  done = worker(stand, 'start', '--run=a', *given, LOSSES='1', LOST_PROCESS='0', LOSS='exit 5')
  assert done.returncode == 0, done.stderr
  assert worker(stand, 'follow').returncode == 5
  done = worker(stand, 'stop')
  assert done.returncode == 0
  assert 'no run is going; if its launcher still is, it starts none' in done.stderr
  assert worker(stand, 'start', '--run=a', *given).returncode == 0
  assert worker(stand, 'follow').returncode == 143
  assert state() == 'stopped\n'
  assert len(starts(stand)) == 1
  for run in (['--run=b'], []):   # another launcher; by hand
    worker(stand, 'stop')
    assert worker(stand, 'start', *run, *given).returncode == 0
    assert worker(stand, 'follow').returncode == 0
  assert len(starts(stand)) == 3
  assert state() == 'exited 0\n'


def test_a_full_disk_ends_a_start(stand, tmp_path):
  full = '#!/bin/sh\ntrap "" XFSZ\nulimit -f 0\nexec /usr/bin/setsid "$@"\n'   # no file may grow
  for name, script in dict(setsid=full, sleep='#!/bin/sh\nexec /bin/sleep 0\n').items():
    (tmp_path / 'bin' / name).write_text(script)
    (tmp_path / 'bin' / name).chmod(0o755)
  done = worker(stand, 'start', CONFIG, f'--workdir={tmp_path}/w', LOSSES='9', LOST_PROCESS='0', timeout=30,
                LOSS=f'touch {tmp_path}/began')
  assert done.returncode == 2
  assert re.match(rf'launch: {tmp_path}/state: cannot be written to on \S+; see that its disk is not full',
                  done.stderr.splitlines()[-1])
  assert not (tmp_path / 'began').exists()   # which nobody could stop


def test_a_run_that_cannot_start_leaves_its_own_status(stand, tmp_path):
  """And nothing of the run before, which would be told and followed as if it were this one."""
  assert worker(stand, 'start', CONFIG, f'--workdir={tmp_path}/w').returncode == 0
  done = worker(stand, 'follow')
  assert (done.returncode, done.stdout) == (0, 'process 0 speaks\n')
  stand.answers(('gcsfuse*', 1, ''))
  done = worker(stand, 'start', CONFIG, '--workdir=gs://bucket/runs/a')
  assert done.returncode == 2
  assert 'gcsfuse cannot mount bucket' in done.stderr
  assert worker(stand, 'state').stdout.split()[1:] == ['exited', '2']
  done = worker(stand, 'follow')
  assert (done.returncode, done.stdout) == (2, '')
  assert worker(stand, 'start', CONFIG, f'--workdir={tmp_path}/w').returncode == 0   # and again
  assert worker(stand, 'follow').returncode == 0


def test_a_workdir_that_a_host_does_not_see(stand, tmp_path):
  (tmp_path / 'w').mkdir()
  (tmp_path / 'w/.seen').write_text('here.1\n')
  given = 'exec', '--platform=gpu', CONFIG, f'--workdir={tmp_path}/w', '--distributed'
  assert worker(stand, *given, '--seen=here.1').returncode == 0
  assert starts(stand) == [f'--xla_gpu_enable_latency_hiding_scheduler=true|cuda,cpu|||-m longctx.main {CONFIG} --distributed '
                           f'--workdir={tmp_path}/w']
  for other in (f'--workdir={tmp_path}/elsewhere', '--seen=here.2'):
    done = worker(stand, *given, '--seen=here.1', other)
    assert done.returncode == 2
    line, = done.stderr.splitlines()
    assert 'does not see it as the launching host does; give a folder of a file system that all hosts share' in line
  assert len(starts(stand)) == 1


def test_a_bucket_is_mounted_before_the_run(stand, tmp_path):
  done = worker(stand, 'exec', CONFIG, '--workdir=gs://bucket/runs/a')
  assert done.returncode == 0, done.stderr
  assert stand.calls() == ['gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 '
                           f'bucket {tmp_path}/gcs/bucket']
  assert starts(stand)[0].endswith(f'--workdir={tmp_path}/gcs/bucket/runs/a')
  assert list((tmp_path / 'gcs/bucket/runs/a').iterdir()) == []
  # On GKE the driver has mounted it.
  (tmp_path / 'bin/mountpoint').symlink_to('/bin/true')
  assert worker(stand, 'exec', CONFIG, '--workdir=gs://bucket/b', GCS_ROOT=f'{tmp_path}/other').returncode == 0
  assert len(stand.calls()) == 1
  assert starts(stand)[1].endswith(f'--workdir={tmp_path}/other/bucket/b')


def trouble(stand, error, times):
  """mv fails so many times; nobody sleeps, but it is told how long one would."""
  scripts = dict(mv=f'if [ $(cat "$CALLS.mv" 2>/dev/null | wc -l) -lt {times} ]; then\necho >>"$CALLS.mv"\n'
                    f'echo "{error}" >&2\nexit 1\nfi\nexec /bin/mv "$@"', sleep='echo "$1" >>"$CALLS.sleep"')
  for name, script in scripts.items():
    (stand.folder / f'calls.{name}').unlink(missing_ok=True)
    (stand.folder / 'bin' / name).write_text(f'#!/bin/sh\n{script}\n')
    (stand.folder / 'bin' / name).chmod(0o755)


@pytest.mark.parametrize('error', ['Input/output error', 'Transport endpoint is not connected', 'Connection timed out'])
def test_a_bucket_that_fails_for_a_moment_is_tried_again(stand, tmp_path, error):
  """And if it goes on is left with the status of what may pass: a launcher starts it again."""
  given = CONFIG, '--workdir=gs://bucket/runs/a'
  trouble(stand, f'mv: cannot move: {error}', times=2)
  done = worker(stand, 'exec', *given)
  assert done.returncode == 0, done.stderr
  assert (tmp_path / 'calls.sleep').read_text().split() == ['1', '2']
  assert len(starts(stand)) == 1
  assert list((tmp_path / 'gcs/bucket/runs/a').iterdir()) == []
  trouble(stand, f'mv: cannot move: {error}', times=99)
  done = worker(stand, 'exec', *given)
  assert done.returncode == 75
  assert (tmp_path / 'calls.sleep').read_text().split() == ['1', '2', '4', '8', '16']
  line, = done.stderr.splitlines()
  assert f'cannot move: {error}; that may pass, and the same command carries on' in line
  assert worker(stand, 'start', *given).returncode == 75
  assert worker(stand, 'state').stdout.split()[1:] == ['exited', '75']
  assert len(starts(stand)) == 1
  assert list((tmp_path / 'gcs/bucket/runs/a').iterdir()) == []


def test_a_bucket_that_cannot_be_mounted_for_a_moment(stand, tmp_path):
  given = 'exec', CONFIG, '--workdir=gs://bucket/runs/a'
  away = ('gcsfuse*', 1, 'googleapi: Error 503: Service Unavailable')
  trouble(stand, 'none', times=0)   # notes what is slept
  stand.answers(away, away)
  done = worker(stand, *given)
  assert done.returncode == 0 and done.stderr.count('Error 503') == 2
  assert (tmp_path / 'calls.sleep').read_text().split() == ['1', '2']
  assert len(starts(stand)) == 1
  stand.answers(*[away] * 6)
  done = worker(stand, *given)
  assert done.returncode == 75
  assert 'gcsfuse cannot mount bucket' in done.stderr and 'that may pass, and the same command carries on' in done.stderr
  assert len(starts(stand)) == 1


def test_a_bucket_that_cannot_be_used(stand, tmp_path):
  given = 'exec', CONFIG, '--workdir=gs://bucket/runs/a'
  stand.answers(('gcsfuse*', 1, ''))
  done = worker(stand, *given)
  assert done.returncode == 2
  assert 'gcsfuse cannot mount bucket; see that it is there' in done.stderr
  for error in ('Too many open files', 'Permission denied'):   # the first: without a hierarchical namespace
    trouble(stand, f'mv: cannot move: {error}', times=1)
    done = worker(stand, *given)
    assert done.returncode == 2
    assert f'whole or not there (mv: cannot move: {error}); give a bucket' in done.stderr
    assert '--enable-hierarchical-namespace' in done.stderr
  (tmp_path / 'bin/gcsfuse').unlink()
  done = worker(stand, *given)
  assert done.returncode == 2
  assert 'gcsfuse is not installed' in done.stderr
  assert starts(stand) == []


def test_setting_up_makes_the_environment_of_the_constraints(stand, tmp_path):
  """uv is called with the launching machine's Python and versions, in a copy of the tree."""
  tree = tmp_path / 'tree'
  (tree / 'launch').mkdir(parents=True)
  for name in ('worker.sh', 'common.sh'):
    (tree / 'launch' / name).write_bytes((ROOT / 'launch' / name).read_bytes())
  (tree / 'python_version').write_text('3.12\n')
  (tmp_path / 'bin/uv').symlink_to(ROOT / 'tests/programs/stand_in.sh')
  env = os.environ | dict(PATH=f'{tmp_path}/bin:/usr/bin:/bin', HOME=str(tmp_path), CALLS=str(stand.calls_file),
                          ANSWERS=str(stand.answers_file))
  done = subprocess.run(['bash', tree / 'launch/worker.sh', 'setup'], env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert stand.calls() == [
      'uv venv --quiet --python 3.12 .venv',
      'uv pip install --quiet --python .venv/bin/python --requirement requirements.txt jax[tpu] gcsfs '
      '--constraint constraints.txt']
  # `stop` while a launcher sets up holds for that one.
  mark = tmp_path / '.longctx/stopping'
  for run, left in (('a', False), ('a', True), ('b', False)):
    mark.touch()
    subprocess.run(['bash', tree / 'launch/worker.sh', 'setup', f'--run={run}'], env=env, check=True)
    assert mark.exists() == left
