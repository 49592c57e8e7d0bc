"""launch/: what each launcher asks of gcloud, kubectl, xpk and srun, in which order, and what it refuses."""

import json
import math
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import jsonschema
import kubernetes_validate
import packaging
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from longctx.parallel import aot
from tests.stand_ins import ROOT, StandIns

CONFIG = '--config=configs/quickstart.py'
TPU = ('tpu.sh', '--slice=v5e:4x4', CONFIG, '--workdir=gs://bucket/runs/a', '--poll=0')
PLACE = ('--project=p', '--zone=z')
GKE = (CONFIG, '--workdir=gs://bucket/runs/a', '--image=registry/longctx:1', '--poll=0')
TAKEN = r'--project=p --zone=z', '--quiet', r'--scopes=\S+', r'--run=here\.\d+'   # flags of each call
SSH = 'gcloud compute tpus tpu-vm ssh longctx'
DESCRIBE = 'gcloud compute tpus queued-resources describe longctx --format=value(state.state)'
NODE = 'gcloud compute tpus tpu-vm describe longctx --format=value(state)'
TYPE = 'gcloud compute tpus tpu-vm describe longctx --format=value(acceleratorType)'
CREATE = ('gcloud compute tpus queued-resources create longctx --node-id=longctx --accelerator-type=v5litepod-16 '
          '--runtime-version=v2-alpha-tpuv5-lite')
DELETE = 'gcloud compute tpus queued-resources delete longctx --force'
DELETE_NODE = 'gcloud compute tpus tpu-vm delete longctx'
FIT = f'python -m longctx.main {CONFIG} --mode=compile --topology=v5e:4x4 --workdir=TMP'
SET_UP = ['gcloud compute tpus tpu-vm scp TMP/longctx.tar.gz longctx: --worker=all',
          f'{SSH} --worker=all --command=mkdir -p longctx && tar -xzf longctx.tar.gz -C longctx && '
          'bash longctx/launch/worker.sh setup']
LOOK = f'{SSH} --worker=all --command=[ ! -e longctx/launch/worker.sh ] || bash longctx/launch/worker.sh state'
FOUND = [DESCRIBE, NODE, TYPE, LOOK]   # of a slice that is there before the launcher
START = [f'{SSH} --worker=all --command=bash longctx/launch/worker.sh end',
         f'{SSH} --worker=all --command=bash longctx/launch/worker.sh start --platform=tpu {CONFIG} '
         '--workdir=gs://bucket/runs/a --distributed']
FOLLOW = f'{SSH} --worker=0 --command=bash longctx/launch/worker.sh follow'
STATE = f'{SSH} --worker=all --command=bash longctx/launch/worker.sh state'
END = START[0]
pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='the launchers are for Linux')

# Answers.
VERSIONS = [('python */launch/versions.py', '0+', r'jax==0.10.2\nflax==0.12.8'), ('python -c*', '0+', '3.12')]
ABSENT = ('*queued-resources describe*', 1, 'ERROR: NOT_FOUND')
ACTIVE, UP = ('*queued-resources describe*', '0+', 'ACTIVE'), ('*tpu-vm describe*(state)', '0+', 'READY')
request = lambda state: ('*queued-resources describe*', 0, state)
OF_TYPE = ('*(acceleratorType)', '0+', 'v5litepod-16')
node = lambda state: ('*tpu-vm describe*(state)', 0, state)
followed = lambda status: ('*worker.sh follow*', status, '')
lines = lambda each: r'\n'.join(f't1v-w-{i} {s}' for i, s in enumerate(each))
states = lambda *each: ('*=bash longctx/launch/worker.sh state', 0, lines(each))
found = lambda *each: ('*|| bash longctx/launch/worker.sh state', 0, lines(each))


@pytest.fixture
def stand(tmp_path):
  return StandIns(tmp_path)


def tpu(stand, *more, answers=()):
  stand.answers(*answers, OF_TYPE, *VERSIONS)
  done = stand.run(*TPU, *PLACE, *more)
  return done, [c for c in stand.calls(*TAKEN) if not re.match(r'tar|python \S+/versions\.py|python -c|ssh-', c)]


def test_a_slice_is_asked_for_waited_for_set_up_and_followed(stand):
  done, calls = tpu(stand, '--spot', answers=[
      ABSENT, request('WAITING_FOR_RESOURCES'), request('PROVISIONING'), ACTIVE, node('CREATING'), UP])
  assert done.returncode == 0, done.stderr
  assert calls == [FIT, DESCRIBE, f'{CREATE} --spot', DESCRIBE, DESCRIBE, DESCRIBE, NODE, DESCRIBE, NODE,
                   *SET_UP, *START, f'{FOLLOW} +1']
  said = re.findall(r'slice longctx \(v5e:4x4\): (\w+)', done.stderr)
  assert said == ['none', 'waiting', 'ready']
  assert 'still there, and costs: launch/tpu.sh delete --name=longctx --project=p --zone=z\n' in done.stderr


def test_workers_get_this_environments_versions(stand, tmp_path):
  """What is sent: the code, with versions that pip can take as constraints."""
  stand.answers(ACTIVE, UP, *VERSIONS)
  (tmp_path / 'bin/gcloud').unlink()
  (tmp_path / 'bin/tar').unlink()   # the true one
  (tmp_path / 'bin/gcloud').write_text(   # keeps what it is given to copy
      f'#!/bin/sh\ncase "$*" in *scp*) cp "$5" {tmp_path}/sent.tar.gz;; esac\nexec {ROOT}/tests/programs/stand_in.sh "$@"\n')
  (tmp_path / 'bin/gcloud').chmod(0o755)
  assert stand.run(*TPU, *PLACE, '--check=none').returncode == 0
  listed = subprocess.run(['tar', '-tzf', f'{tmp_path}/sent.tar.gz'], capture_output=True, text=True).stdout.split()
  assert {'./launch/worker.sh', './longctx/main.py', 'constraints.txt', 'python_version'} <= set(listed)
  assert not [name for name in listed if name.startswith(('./.venv', './.git/', './runs'))]
  read = lambda name: subprocess.run(['tar', '-xzOf', f'{tmp_path}/sent.tar.gz', name], capture_output=True,
                                     text=True).stdout
  assert read('constraints.txt') == 'jax==0.10.2\nflax==0.12.8\n'
  assert read('python_version') == '3.12\n'


def test_pip_can_install_what_workers_get_with_these_versions():
  """By what is installed here: each version is one that every requirement takes, those of jax[tpu] among them."""
  done = subprocess.run([sys.executable, ROOT / 'launch/versions.py'], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  given = dict(line.split('==') for line in done.stdout.splitlines())
  lines = [line.partition('#')[0].strip() for line in (ROOT / 'requirements.txt').read_text().splitlines()]
  asked = [Requirement(line) for line in lines if line]
  assert {canonicalize_name(each.name) for each in asked} <= given.keys()
  for name, version in given.items():
    assert Version(metadata.version(name)).public == version
    extra = {'extra': 'tpu' if name == 'jax' else ''}
    asked += [r for r in map(Requirement, metadata.requires(name) or ()) if not r.marker or r.marker.evaluate(extra)]
  assert 'libtpu' in {each.name for each in asked}   # jax[tpu] asks for one version of it
  clash = [str(r) for r in asked if (name := canonicalize_name(r.name)) in given
           and not r.specifier.contains(given[name], prereleases=True)]
  assert clash == []
  assert given.keys() & {'libtpu', 'torch', 'pytest'} == set()


def test_versions_are_of_what_is_asked_for_directly_or_in_turn(tmp_path):
  """In an environment of empty packages."""
  lines = [line.partition('#')[0].strip() for line in (ROOT / 'requirements.txt').read_text().splitlines()]
  needs = {Requirement(line).name: [] for line in lines if line}
  needs |= {'jax': ['inner[more]>=1', 'libtpu; extra == "tpu"'], 'inner': ['further; extra == "more"'],
            **{name: [] for name in ('further', 'libtpu', 'torch')}}
  for name, asked in needs.items():
    folder = tmp_path / f'{name.replace("-", "_")}-1.5+mine.dist-info'
    folder.mkdir()
    (folder / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: 1.5+mine\n'
                                     + ''.join(f'Requires-Dist: {each}\n' for each in asked))
  (tmp_path / 'packaging').symlink_to(Path(packaging.__file__).parent)
  versions = lambda: subprocess.run([sys.executable, '-S', ROOT / 'launch/versions.py'], capture_output=True,
                                    text=True, env=os.environ | {'PYTHONPATH': str(tmp_path)})
  names = {canonicalize_name(name) for name in needs.keys() - {'libtpu', 'torch'}}
  assert versions().stdout.splitlines() == [f'{name}==1.5' for name in sorted(names)]
  (tmp_path / 'flax-1.5+mine.dist-info/METADATA').unlink()
  (tmp_path / 'flax-1.5+mine.dist-info').rmdir()
  done = versions()
  assert done.returncode == 1
  assert re.fullmatch('launch: flax: requirements.txt asks for it, and it is not installed in .*; make setup\n', done.stderr)


@pytest.mark.parametrize('launcher', ['tpu.sh', 'gke.sh'])
def test_an_environment_without_the_requirements_is_told_in_one_line(stand, launcher):
  (stand.folder / 'bin/python').unlink()
  (stand.folder / 'bin/python').write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')   # no site-packages
  (stand.folder / 'bin/python').chmod(0o755)
  command = [*TPU, *PLACE, '--check=none'] if launcher == 'tpu.sh' else ['gke.sh', 'image', *GKE]
  done = stand.run(*command)
  assert done.returncode == 2
  line, = done.stderr.splitlines()
  assert re.match(r"launch: \S+: No module named 'packaging'; make setup, or set PYTHON", line)
  assert [c for c in stand.calls() if c.startswith(('gcloud', 'docker'))] == []


def test_a_worker_that_fails_once_is_set_up_again(stand):
  done, calls = tpu(stand, '--check=none', answers=[ACTIVE, UP, ('*worker.sh setup*', 1, '')])
  assert done.returncode == 0, done.stderr
  assert calls == [*FOUND, *SET_UP, DESCRIBE, NODE, *SET_UP, *START, f'{FOLLOW} +1']
  assert 'setting up the workers failed (attempt 1 of 5)' in done.stderr


def test_workers_that_cannot_be_set_up(stand):
  done, calls = tpu(stand, '--check=none', answers=[ACTIVE, UP, ('*worker.sh setup*', '1+', '')])
  assert done.returncode == 2
  assert calls == [*FOUND, *[*SET_UP, DESCRIBE, NODE] * 5]
  assert 'and costs: launch/tpu.sh delete --name=longctx --project=p --zone=z\n' in done.stderr


# What is told of a slice that is gone, and what is then asked.
GONE = {
    'suspended': ([request('SUSPENDED')] * 2, [DESCRIBE, DESCRIBE, DELETE]),
    'on its way': ([request('SUSPENDING')] * 2 + [request('SUSPENDED')], [DESCRIBE] * 3 + [DELETE]),
    'no request left': ([ABSENT], [DESCRIBE]),
    'still active': ([request('ACTIVE'), node('PREEMPTED')] * 2, [DESCRIBE, NODE] * 2 + [DELETE]),
    'an empty request': ([request('ACTIVE'), ('*tpu-vm describe*(state)', 1, 'NOT_FOUND')] * 2,
                         [DESCRIBE, NODE] * 2 + [DELETE]),
}


@pytest.mark.parametrize('gone, looked', GONE.values(), ids=GONE)
def test_a_preempted_slice_is_made_again_and_the_same_command_started(stand, gone, looked):
  done, calls = tpu(stand, '--check=none', '--spot', '--restarts=0', answers=[
      request('ACTIVE'), node('READY'), followed(1), *gone, ABSENT, ACTIVE, UP])
  assert done.returncode == 0, done.stderr
  assert calls == [*FOUND, *SET_UP, *START, f'{FOLLOW} +1', *looked, DESCRIBE,
                   f'{CREATE} --spot', DESCRIBE, NODE, *SET_UP, *START, f'{FOLLOW} +1']
  assert 'preempted or lost; making it again' in done.stderr


@pytest.mark.parametrize('gone, looked', GONE.values(), ids=GONE)
@pytest.mark.parametrize('step', [0, 1], ids=['copying', 'setting up'])
def test_a_slice_preempted_while_it_is_set_up_is_made_again(stand, step, gone, looked):
  failed = [('*tpu-vm scp*', 1, 'ERROR: 503'), ('*worker.sh setup*', 255, '')][step]
  done, calls = tpu(stand, '--check=none', '--spot', '--restarts=0', answers=[
      request('ACTIVE'), node('READY'), failed, *gone, ABSENT, ACTIVE, UP])
  assert done.returncode == 0, done.stderr
  assert calls == [*FOUND, *SET_UP[:step + 1], *looked, DESCRIBE, f'{CREATE} --spot', DESCRIBE, NODE, *SET_UP,
                   *START, f'{FOLLOW} +1']


def test_a_slice_that_is_ready_for_a_while_after_its_preemption(stand):
  done, calls = tpu(stand, '--check=none', '--restarts=0', answers=[
      request('ACTIVE'), node('READY'), followed(255), request('ACTIVE'), node('READY'),
      ('*=bash longctx/launch/worker.sh state', 1, ''), request('SUSPENDED'), ABSENT, ACTIVE, UP])
  assert done.returncode == 0, done.stderr
  assert calls == [*FOUND, *SET_UP, *START, f'{FOLLOW} +1', DESCRIBE, NODE, STATE, DESCRIBE, DESCRIBE, CREATE,
                   DESCRIBE, NODE, *SET_UP, *START, f'{FOLLOW} +1']


PASSES = 'ERROR: (gcloud.compute.tpus) UNAVAILABLE: 503'
MINUTE = "ERROR: RESOURCE_EXHAUSTED: Quota exceeded for quota metric 'Writes' and limit 'Writes per minute'"


def test_what_gcloud_refuses_for_a_while_is_asked_for_again(stand):
  creates = lambda *said: [('*queued-resources create*', 1, each) for each in said]
  done, calls = tpu(stand, '--check=none', answers=[ABSENT, *creates(PASSES, MINUTE, 'ALREADY_EXISTS'), ACTIVE, UP])
  assert done.returncode == 0, done.stderr   # the request before had come through
  assert calls == [DESCRIBE, *[CREATE] * 3, DESCRIBE, NODE, *SET_UP, *START, f'{FOLLOW} +1']
  assert 'gcloud queued-resources create longctx: failed (attempt 1 of 10), as said above' in done.stderr
  stand.calls_file.unlink()
  done, calls = tpu(stand, '--check=none', answers=[
      request('SUSPENDED'), *[('*queued-resources delete*', 1, each) for each in (PASSES, 'NOT_FOUND')], ABSENT, ACTIVE, UP])
  assert done.returncode == 0, done.stderr
  assert calls[:5] == [DESCRIBE, DELETE, DELETE, DESCRIBE, CREATE]
  for refused in ('PERMISSION_DENIED: not yours', 'INVALID_ARGUMENT: no such zone', 'ALREADY_EXISTS: another node',
                  "Quota 'TPUV5sPreemptibleLitepod' exceeded"):
    stand.calls_file.unlink()
    done, calls = tpu(stand, '--check=none', answers=[ABSENT, *creates(refused)])
    assert (done.returncode, calls) == (2, [DESCRIBE, CREATE])
    assert refused in done.stderr
    assert 'the slice was refused, as said above' in done.stderr
  stand.calls_file.unlink()
  done, calls = tpu(stand, '--check=none', answers=[ABSENT, ('*queued-resources create*', '1+', PASSES)])
  assert (done.returncode, calls) == (2, [DESCRIBE, *[CREATE] * 10])


def test_a_slice_that_cannot_be_deleted_is_said_to_cost(stand):
  stand.answers(('*queued-resources delete*', '1+', PASSES))
  done = stand.run('tpu.sh', 'delete', *PLACE, '--poll=0')
  assert done.returncode == 1
  assert stand.calls(*TAKEN) == [DELETE] * 3
  assert ('the slice longctx could not be deleted, as said above, and may cost; '
          'launch/tpu.sh delete --name=longctx --project=p --zone=z\n') in done.stderr


NO_REQUEST, NO_NODE = [(f'*{kind} de*', '1+', 'ERROR: NOT_FOUND') for kind in ('queued-resources', 'tpu-vm')]


@pytest.mark.parametrize('kind, asked, answers, state', [
    ('queued', [DELETE, DELETE_NODE], [NO_REQUEST, UP], 'ready'),
    ('direct', [DELETE_NODE, DELETE], [NO_NODE, ('*queued-resources describe*', 0, 'ACCEPTED')], 'waiting')])
def test_a_slice_is_found_and_deleted_however_it_was_made(stand, kind, asked, answers, state):
  stand.answers(*answers)
  done = stand.run('tpu.sh', 'delete', f'--create={kind}', *PLACE)
  assert done.returncode == 0, done.stderr
  assert stand.calls(*TAKEN) == asked
  done = stand.run('tpu.sh', 'status', f'--create={kind}', *PLACE)
  assert (done.returncode, done.stdout) == (0, f'slice longctx (project p, zone z): {state}\n')
  stand.calls_file.unlink()
  stand.answers(NO_REQUEST, NO_NODE)
  done = stand.run('tpu.sh', 'delete', f'--create={kind}', *PLACE)
  assert done.returncode == 1
  assert stand.calls(*TAKEN) == asked
  assert 'launch: --name=longctx: no such slice in project p, zone z, and nothing was deleted; gcloud' in done.stderr
  done = stand.run('tpu.sh', 'status', f'--create={kind}', *PLACE)
  assert (done.returncode, done.stdout) == (0, 'slice longctx (project p, zone z): none\n')
  # What is gone when it is asked again was there.
  stand.calls_file.unlink()
  stand.answers(('*tpus * delete*', 1, PASSES), NO_REQUEST, NO_NODE)
  assert stand.run('tpu.sh', 'delete', f'--create={kind}', *PLACE, '--poll=0').returncode == 0
  assert stand.calls(*TAKEN) == asked[:1] * 2


def test_a_slice_of_another_type_is_not_taken(stand):
  done, calls = tpu(stand, '--check=none', answers=[ACTIVE, UP, ('*(acceleratorType)', 0, 'v5litepod-64')])
  assert done.returncode == 2
  assert calls == [DESCRIBE, NODE, TYPE]
  assert ('launch: --slice=v5e:4x4: is a v5litepod-16, and the slice longctx that is there a v5litepod-64; '
          'launch/tpu.sh delete --name=longctx --project=p --zone=z, or give another --name\n') in done.stderr


def test_a_run_that_another_launcher_started_is_not_stopped(stand):
  done, calls = tpu(stand, '--check=none', answers=[ACTIVE, UP, found('exited 0', 'running')])
  assert done.returncode == 2
  assert calls == FOUND
  assert ('(t1v-w-0 exited 0;t1v-w-1 running); launch/tpu.sh stop --name=longctx --project=p --zone=z, or give another '
          '--name\n') in done.stderr
  # Workers that do not answer are asked again; of a slice that this launcher made nothing is asked.
  stand.calls_file.unlink()
  done, calls = tpu(stand, '--check=none', answers=[
      ACTIVE, UP, ('*|| bash longctx/launch/worker.sh state', 255, ''), found('running')])
  assert (done.returncode, calls) == (2, [*FOUND, DESCRIBE, NODE, LOOK])


def test_a_launcher_that_is_interrupted_says_what_goes_on(stand):
  (stand.folder / 'bin/gcloud').unlink()
  (stand.folder / 'bin/gcloud').write_text(
      f'#!/bin/sh\ncase "$*" in *follow*) kill -TERM $PPID;; esac\nexec {ROOT}/tests/programs/stand_in.sh "$@"\n')
  (stand.folder / 'bin/gcloud').chmod(0o755)
  stand.answers(UP, *VERSIONS)
  done = stand.run(*TPU, *PLACE, '--check=none', '--create=direct')
  assert done.returncode == 130
  assert done.stderr.endswith('left alone: slice and run go on, and cost; launch/tpu.sh log, stop or delete --name=longctx '
                              '--project=p --zone=z --create=direct\n')


def test_a_launcher_tells_workers_that_it_is_the_same(stand):
  done, _ = tpu(stand, '--check=none', '--restarts=1', answers=[ACTIVE, UP, followed(1), states('exited 1', 'running')])
  assert done.returncode == 0, done.stderr
  runs = [re.search(r'(setup|start) --run=(here\.\d+)', c) for c in stand.calls() if 'setup' in c or 'start --' in c]
  assert [run[1] for run in runs] == ['setup', 'start', 'start']
  assert len({run[2] for run in runs}) == 1


def test_a_slice_found_preempted_is_made_again(stand):
  done, calls = tpu(stand, '--check=none', answers=[request('SUSPENDED'), ABSENT, ACTIVE, UP])
  assert done.returncode == 0, done.stderr
  assert calls[:4] == [DESCRIBE, DELETE, DESCRIBE, CREATE]


def test_a_run_that_fails_is_restarted_so_many_times(stand):
  broken = states('running', 'exited 134', 'running', 'killed')
  done, calls = tpu(stand, '--check=none', '--restarts=1', answers=[
      ACTIVE, UP, followed(1), broken, followed(1), broken])
  assert done.returncode == 1
  once = [*START, f'{FOLLOW} +1', DESCRIBE, NODE, STATE]
  assert calls == [*FOUND, *SET_UP, *once, *once, END]
  assert 'the run failed; these say: t1v-w-0 running;t1v-w-1 exited 134;t1v-w-2 running;t1v-w-3 killed' in done.stderr
  assert 'restart 1 of 1' in done.stderr
  assert 'given up after 1 restarts' in done.stderr


def test_a_broken_connection_is_not_a_failed_run(stand):
  done, calls = tpu(stand, '--check=none', '--restarts=0', '--delete_after', answers=[
      ACTIVE, UP, followed(255), states(*['running'] * 4)])
  assert done.returncode == 0, done.stderr
  assert calls == [*FOUND, *SET_UP, *START, f'{FOLLOW} +1', DESCRIBE, NODE, STATE, f'{FOLLOW} 20', DELETE]


def test_a_run_that_ended_while_the_connection_was_broken_ended_well(stand):
  done, calls = tpu(stand, '--check=none', answers=[ACTIVE, UP, ('*worker.sh follow*', '255+', ''),
                                                    states('exited 0', 'running'), states('exited 0', 'exited 0')])
  assert done.returncode == 0, done.stderr
  again = [f'{FOLLOW} 20', DESCRIBE, NODE, STATE]
  assert calls == [*FOUND, *SET_UP, *START, f'{FOLLOW} +1', DESCRIBE, NODE, STATE, *again, f'{FOLLOW} 20']
  assert 'failed' not in done.stderr


def test_a_sigterm_that_nobody_asked_for_is_a_failure(stand):
  done, calls = tpu(stand, '--check=none', answers=[ACTIVE, UP, followed(143), states('exited 143', 'running')])
  assert done.returncode == 0, done.stderr
  assert len([c for c in calls if 'worker.sh start' in c]) == 2
  assert 'restart 1 of 3' in done.stderr


def test_a_mistake_found_by_the_workers_is_not_tried_again(stand):
  done, calls = tpu(stand, '--check=none', answers=[ACTIVE, UP, followed(2), states('exited 2', 'running')])
  assert done.returncode == 2
  assert calls[-2:] == [STATE, END]
  assert len([c for c in calls if 'worker.sh start' in c]) == 1


def test_a_run_that_was_stopped_and_could_not_save_is_not_started_again(stand):
  done, calls = tpu(stand, '--check=none', answers=[ACTIVE, UP, followed(143), states('stopped', 'running')])
  assert done.returncode == 143
  assert 'stopped, before it could save; the same command carries on from the last checkpoint' in done.stderr
  assert calls[-2:] == [STATE, END]   # which waits for those that are still saving
  assert len([c for c in calls if 'worker.sh start' in c]) == 1


def test_a_slice_that_was_stopped_by_hand_keeps_its_disks(stand):
  halted = ('*tpu-vm describe*', 0, 'STOPPED')
  done, calls = tpu(stand, '--check=none', answers=[ACTIVE, halted])
  assert done.returncode == 2 and not [c for c in calls if 'delete' in c]
  assert 'gcloud compute tpus tpu-vm start longctx' in done.stderr
  assert 'or launch/tpu.sh delete --name=longctx --project=p --zone=z, and this again' in done.stderr


def test_a_run_that_starts_on_some_workers_alone_is_no_run(stand):
  """None is followed, for what an earlier run has left there, and the slice is not deleted as if it had ended well."""
  refused = ('*worker.sh start*', 2, 'launch: --workdir=gs://bucket/runs/a: gcsfuse cannot mount bucket')
  some = states('running', 'exited 2', 'running', 'none')
  done, calls = tpu(stand, '--check=none', '--delete_after', answers=[ACTIVE, UP, refused, some])
  assert done.returncode == 2
  assert calls == [*FOUND, *SET_UP, *START, DESCRIBE, NODE, STATE, END, DELETE]
  # What is no mistake, such as a connection that broke, is tried again.
  stand.calls_file.unlink()
  once = [('*worker.sh start*', 255, 'ERROR: 503'), states('running', 'none', 'running', 'running')]
  done, calls = tpu(stand, '--check=none', '--restarts=1', answers=[ACTIVE, UP, *once])
  assert done.returncode == 0, done.stderr
  assert calls == [*FOUND, *SET_UP, *START, DESCRIBE, NODE, STATE, *START, f'{FOLLOW} +1']
  assert 'the run did not start on all workers; these say: t1v-w-0 running;t1v-w-1 none;' in done.stderr
  done, calls = tpu(stand, '--check=none', '--restarts=1', answers=[ACTIVE, UP, *once, *once])
  assert done.returncode == 1
  assert 'given up after 1 restarts' in done.stderr


def test_a_slice_made_directly_and_of_one_host(stand):
  stand.answers(('*tpu-vm describe*', 1, 'ERROR: (gcloud) NOT_FOUND'), UP, *VERSIONS)
  done = stand.run('tpu.sh', '--slice=v5p:2x2x1', CONFIG, '--workdir=runs/a', *PLACE, '--create=direct',
                   '--reserved', '--check=none', '--name=mine')
  assert done.returncode == 0, done.stderr
  calls = [c.replace('mine', 'longctx') for c in stand.calls(*TAKEN) if c.startswith('gcloud')]
  start = START[1].replace(' --distributed', '').replace('gs://bucket/', '')
  assert calls == [NODE, 'gcloud compute tpus tpu-vm create longctx --accelerator-type=v5p-8 '
                   '--version=v2-alpha-tpuv5 --reserved', NODE, *SET_UP, END, start, f'{FOLLOW} +1']
  assert 'launch/tpu.sh delete --name=mine --project=p --zone=z --create=direct\n' in done.stderr


def test_a_failed_request_says_what_to_do(stand):
  done, calls = tpu(stand, '--check=none', answers=[request('FAILED')])
  assert done.returncode == 2
  assert calls == [DESCRIBE]
  assert 'launch/tpu.sh delete --name=longctx --project=p --zone=z, then try another --zone or --slice' in done.stderr


def test_what_gcloud_cannot_tell_ends_it(stand):
  done, calls = tpu(stand, '--check=none', answers=[('*describe*', 1, 'ERROR: PERMISSION_DENIED: not yours')])
  assert done.returncode == 2
  assert calls == [DESCRIBE]
  assert 'gcloud cannot tell the state of longctx: ERROR: PERMISSION_DENIED: not yours' in done.stderr
  stand.calls_file.unlink()
  done, calls = tpu(stand, '--check=none', answers=[
      ('*describe*', 1, 'ERROR: 503 Service Unavailable'), ('*describe*', 1, 'ERROR: PERMISSION_DENIED: not yours')])
  assert calls == [DESCRIBE, DESCRIBE]   # what passes is asked for again
  assert 'attempt 1 of 10): ERROR: 503' in done.stderr


@pytest.mark.parametrize('action, asked', [
    ('status', [DESCRIBE, NODE, STATE]), ('stop', [END.replace('end', 'stop')]), ('delete', [DELETE]),
    ('log', [f'{FOLLOW} 100'])])
def test_the_other_actions_of_a_slice(stand, action, asked):
  stand.answers(ACTIVE, UP, states('running'))
  done = stand.run('tpu.sh', action, *PLACE)
  assert done.returncode == 0, done.stderr
  assert stand.calls(*TAKEN) == asked
  if action == 'status':
    assert done.stdout == 'slice longctx (project p, zone z): ready\nt1v-w-0 running\n'


def test_a_step_that_does_not_fit_asks_for_nothing(stand):
  done, calls = tpu(stand, answers=[('python -m longctx.main*', 1, 'DOES NOT FIT')])
  assert done.returncode == 2
  assert calls == [FIT]
  assert '--slice=v5e:4x4: the step does not fit' in done.stderr
  assert 'Give a larger --slice, a smaller --config.data.length' in done.stderr
  done, calls = tpu(stand, answers=[('python -m longctx.main*', 2, 'longctx: a mistake')])
  assert (done.returncode, calls) == (2, [FIT] * 2)   # those of both
  assert 'mend what stands above' in done.stderr


OTHERS_KEY = '256 SHA256:0thers me@here (ED25519)'
HELD = {   # what ssh-add -l says, and whether several workers can be reached
    'no agent': ((2, 'Could not open a connection to your authentication agent.'), True),
    'an empty agent': ((1, 'The agent has no identities.'), True),
    'its key': ((0, rf'{OTHERS_KEY}\n3072 SHA256:g00gle me@here (RSA)'), True),
    'others': ((0, OTHERS_KEY), False),
}


@pytest.mark.parametrize('held, reached', HELD.values(), ids=HELD)
def test_gclouds_key_is_in_the_agent_before_a_slice_of_several_workers_is_asked_for(stand, tmp_path, held, reached):
  stand.answers(('ssh-add -l', *held), ('ssh-keygen -lf */.ssh/google_compute_engine', 0, '3072 SHA256:g00gle me@here (RSA)'),
                ACTIVE, UP, *VERSIONS)
  (tmp_path / '.ssh').mkdir()
  (tmp_path / '.ssh/google_compute_engine').touch()
  done = stand.run(*TPU, *PLACE, '--check=none')
  assert done.returncode == (0 if reached else 2), done.stderr
  if not reached:
    line, = done.stderr.splitlines()
    assert line.endswith('the 4 workers of v5e:4x4 at once; ssh-add ~/.ssh/google_compute_engine')
    assert not [c for c in stand.calls() if c.startswith('gcloud')]


def test_an_agent_where_gcloud_has_no_key_yet(stand):
  agent = [('ssh-add -l', 0, OTHERS_KEY), ('ssh-keygen*', 1, 'No such file or directory')]
  done, _ = tpu(stand, '--check=none', answers=agent)
  assert done.returncode == 2
  assert done.stderr.endswith('; ssh-keygen -t rsa -f ~/.ssh/google_compute_engine && ssh-add ~/.ssh/google_compute_engine\n')
  there = [ACTIVE, UP, ('*(acceleratorType)', 0, 'v5litepod-8')]
  done, _ = tpu(stand, '--check=none', '--slice=v5e:2x4', answers=[*agent, *there])   # one worker: no need
  assert done.returncode == 0, done.stderr


BAD = [
    (['tpu.sh', '--slice=v5e:3x3', CONFIG], r'--slice=v5e:3x3: no such slice; there are v5e:1x1 v5e:2x2'),
    (['tpu.sh', CONFIG], r'--slice: missing; give a TPU slice, such as --slice=v5e:4x4'),
    ([*TPU, '--zone=z'], r'--project: not set; give --project=my-project, or: gcloud config set project'),
    ([*TPU, '--project=p'], r'--zone: not set; give --zone=us-west4-a, or: gcloud config set compute/zone'),
    ([*TPU, '--workdir=runs/a'], r'--workdir=runs/a: a local path.*\(4 hosts\).*gs://BUCKET/FOLDER'),
    ([*TPU, '--workdir=gs://bucket'], r'--workdir=gs://bucket: must be gs://BUCKET/FOLDER'),
    ([*TPU, '--workdir='], r'--workdir: missing; give a folder'),
    (['tpu.sh', '--slice=v5e:2x4', CONFIG, '--workdir=runs/a', '--spot'],
     r'--workdir=runs/a: .*preempted; give --workdir=gs://'),
    ([*TPU, '--spot', '--reserved'], r'--spot and --reserved: give one of them'),
    ([*TPU, '--spot=maybe'], r'--spot=maybe: must be true or false'),
    ([*TPU, '--check=sometimes', *PLACE], r'--check=sometimes: must be compile, plan .* or none'),
    ([*TPU, '--create=now'], r'--create=now: must be queued or direct'),
    ([*TPU, '--restarts=some'], r'--restarts=some: must be a whole number of at least 0'),
    ([*TPU, '--name=Big_One'], r'--name=Big_One: must begin with a small letter'),
    ([*TPU, '--slize=v5e:4x4'], r'--slize: no such argument; there are --config=FILE.* slice'),
    ([*TPU, '--zone'], r'--zone: has no value; write --zone=VALUE'),
    (['tpu.sh', 'fly'], r'fly: no such action; give one of: run status log stop delete'),
    (['tpu.sh', 'run', 'fast'], r'fast: not an argument'),
    (['tpu.sh', '--slice=v5e:4x4'], r'--config: missing; give a config file'),
    *[([*command, f'--config={path}'], rf'--config={re.escape(path)}: the workers will not have this file: .* without '
       r'\.venv, runs and \.git; give a path from its root') for command, path in (
           (TPU, '/home/me/mine.py'), (TPU, '../mine.py:debug'), (TPU, 'configs/../../mine.py'),
           (TPU, './runs/a/config.py:debug'), (TPU, '.venv/mine.py'), (['gke.sh', '--slice=v5e:4x4', *GKE, *PLACE, '--cluster=c'], '.git/mine.py'))],
    (['gke.sh', '--slice=v5e:4x4', *GKE, *PLACE], r'--cluster: missing; give the GKE cluster'),
    (['gke.sh', '--slice=v5e:2x2', *GKE, '--workdir=runs/a'], r'--workdir=runs/a: a path in a pod'),
    (['gke.sh', '--slice=v5e:4x4', *GKE, '--image='], r'--image: missing; .* launch/gke.sh image builds it'),
    (['slurm.sh', CONFIG], r'--workdir: missing'),
    (['slurm.sh', CONFIG, '--workdir=a', '--nodes=0'], r'--nodes=0: must be a whole number of at least 1'),
    (['local.sh', CONFIG, '--workdir=a', '--platform=tpu'], r'--platform=tpu: must be cpu or gpu'),
]


@pytest.mark.parametrize('command, said', BAD, ids=lambda v: v if isinstance(v, str) else None)
def test_a_mistake_is_one_line_that_names_the_remedy(stand, command, said):
  done = stand.run(*command)
  assert done.returncode == 2
  line, = done.stderr.splitlines()
  assert re.match(f'launch: {said}', line), line
  assert [c for c in stand.calls() if 'config get-value' not in c and not c.startswith('ssh-')] == []


@pytest.mark.parametrize('path', ['./configs/mine.py:debug', 'configs/mine.py:a/../b'])
def test_a_config_that_the_workers_will_have(stand, path):
  done = stand.run('gke.sh', 'manifest', *GKE, '--slice=v5e:4x4', f'--config={path}')
  assert done.returncode == 0, done.stderr


def test_project_and_zone_come_from_gcloud(stand):
  stand.answers(('gcloud config get-value project', '0+', 'mine'), ('gcloud config get-value compute/zone', '0+', 'there'))
  assert stand.run('tpu.sh', 'delete').returncode == 0
  assert stand.calls()[-1].endswith('--project=mine --zone=there --force --quiet')


# GKE.

def manifest(stand, *more):
  done = stand.run('gke.sh', 'manifest', *GKE, *more)
  assert done.returncode == 0, done.stderr
  return yaml.safe_load(done.stdout)


@pytest.mark.parametrize('name, more, hosts, chips, selectors', [
    ('v5e:4x4', [], 4, 4, {'gke-tpu-accelerator': 'tpu-v5-lite-podslice', 'gke-tpu-topology': '4x4'}),
    ('v6e:2x4', ['--spot'], 1, 8, {'gke-tpu-accelerator': 'tpu-v6e-slice', 'gke-tpu-topology': '2x4', 'gke-spot': 'true'}),
    ('v5p:4x4x8', ['--reserved=ours'], 32, 4, {'gke-tpu-accelerator': 'tpu-v5p-slice', 'gke-tpu-topology': '4x4x8',
                                               'reservation-name': 'ours'})])
def test_the_manifest_is_what_kubernetes_takes(stand, name, more, hosts, chips, selectors):
  override = """--config.data.files=a "b" \\ @name@ '*.txt'"""
  found = manifest(stand, f'--slice={name}', '--restarts=7', '--name=true', override, *more)
  jsonschema.validate(found, json.loads((ROOT / 'tests/programs/jobset.schema.json').read_text()))
  template = found['spec']['replicatedJobs'][0]['template']
  kubernetes_validate.validate(dict(apiVersion='batch/v1', kind='Job', metadata={'name': 'a'}, **template),
                               '1.32', strict=True)
  job, pod = template['spec'], template['spec']['template']['spec']
  container, = pod['containers']
  assert found['spec']['failurePolicy']['maxRestarts'] == 7
  assert job['parallelism'] == job['completions'] == hosts
  assert container['resources']['limits']['google.com/tpu'] == chips
  assert pod['nodeSelector'] == {f'cloud.google.com/{key}': value for key, value in selectors.items()}
  assert container['command'] == ['bash', 'launch/worker.sh', 'exec', '--platform=tpu', CONFIG, override,
                                  '--workdir=gs://bucket/runs/a', *['--distributed'] * (hosts > 1)]
  # The workdir is where worker.sh looks for it.
  mount, = container['volumeMounts']
  assert mount['mountPath'] == '/gcs/bucket'
  assert {'name': 'GCS_ROOT', 'value': '/gcs'} in container['env']
  # Status 2 ends the JobSet: the rule's reason is what a Job fails with by its own rule.
  assert job['podFailurePolicy']['rules'][0]['onExitCodes']['containerName'] == container['name']
  assert pod['restartPolicy'] == 'Never'   # which a podFailurePolicy asks for


def test_the_schemas_find_faults(stand):
  """A test of the test: the schemas do refuse."""
  found = manifest(stand, '--slice=v5e:4x4')
  schema = json.loads((ROOT / 'tests/programs/jobset.schema.json').read_text())
  template = found['spec']['replicatedJobs'][0].pop('template')
  with pytest.raises(jsonschema.ValidationError):
    jsonschema.validate(found, schema)
  template['spec']['backofLimit'] = 0
  with pytest.raises(kubernetes_validate.ValidationError):
    kubernetes_validate.validate(dict(apiVersion='batch/v1', kind='Job', metadata={'name': 'a'}, **template),
                                 '1.32', strict=True)


def gke(stand, *more, answers=()):
  stand.answers(*answers)
  done = stand.run('gke.sh', *more, *GKE, *PLACE, '--slice=v5e:4x4', '--cluster=c')
  return done, stand.calls('--project=p', '--zone=z', r'--selector=jobset.sigs.k8s.io/jobset-name=longctx')


GET = 'kubectl get jobset/longctx --output=jsonpath={.status.'
CREDENTIALS = 'gcloud container clusters get-credentials c --location=z'
LEFT = 'kubectl get jobset/longctx --ignore-not-found --output=jsonpath={.metadata.name} {.status.terminalState}'
WAIT = 'kubectl wait --for=condition=Ready pod,batch.kubernetes.io/job-completion-index=0 --timeout=0s'


@pytest.mark.parametrize('end, status', [('Completed', 0), ('Failed', 1)])
def test_a_jobset_is_submitted_and_followed_over_a_restart(stand, end, status):
  pod = lambda name: ('kubectl get pods*', 0, f'{name} Running')
  ended = lambda state: ('kubectl get jobset/longctx --output*terminalState*', 0, state)
  count = lambda n: ('kubectl get jobset*restarts*', 0, n)
  done, calls = gke(stand, 'run', answers=[
      pod('first'), ended(''), count(0), pod('second'), ended(''), count(1), pod('second'), ended(end), count(1)])
  assert done.returncode == status, done.stderr
  look = [c for c in calls if c.startswith('kubectl get pods')][0]
  turn = lambda pod, tail: [WAIT, look, f'kubectl logs {pod} --container=longctx --follow --tail={tail}',
                            f'{GET}terminalState}}', f'{GET}restarts}}']
  assert calls == [FIT, CREDENTIALS, LEFT, f'kubectl apply --filename={stand.folder}/longctx.jobset.yaml',
                   *turn('first', -1), *turn('second', -1), *turn('second', 20)]
  assert yaml.safe_load((stand.folder / 'longctx.jobset.yaml').read_text()) == manifest(stand, '--slice=v5e:4x4')
  assert 'restart 1 of 10' in done.stderr
  assert f'JobSet longctx: {end}' in done.stderr


def test_the_log_of_a_pod_that_has_to_wait_is_told_from_its_head(stand):
  look = lambda pod: ('kubectl get pods*', 0, pod)
  ended = [('kubectl get jobset/longctx --output*terminalState*', 0, each) for each in ('', '', '', 'Completed')]
  done, calls = gke(stand, 'run', '--check=none', answers=[look(f'first {phase}') for phase in (
      'Pending', 'Running', 'Running', 'Succeeded')] + ended)
  assert done.returncode == 0, done.stderr
  assert [c.split(' ')[-1] for c in calls if c.startswith('kubectl logs')] == ['--tail=-1', '--tail=20']


def test_what_an_earlier_start_left_is_removed_and_made_again(stand):
  done, calls = gke(stand, 'run', '--check=none', answers=[
      ('kubectl get jobset/longctx --ignore*', 0, 'longctx Failed'), ('kubectl get jobset/longctx --output*terminal*', 0, 'Completed')])
  assert done.returncode == 0, done.stderr
  assert [c.split(' ')[1] for c in calls if c.startswith('kubectl')][:3] == ['get', 'delete', 'apply']
  assert 'JobSet longctx: Failed before; it is removed and made again' in done.stderr


def test_a_cluster_that_does_not_answer_for_a_while(stand):
  ended = lambda status, state: ('kubectl get jobset/longctx --output*terminal*', status, state)
  there = [('kubectl get jobset/longctx --ignore-not-found --output=name', '1+', '')]
  done, _ = gke(stand, 'run', '--check=none', answers=[*there, *[ended(1, '')] * 9, ended(0, 'Completed')])
  assert done.returncode == 0, done.stderr
  done, _ = gke(stand, 'run', '--check=none', answers=[*there, *[ended(1, '')] * 10])
  assert done.returncode == 2
  assert 'kubectl has not answered 10 times; the JobSet may go on' in done.stderr


def test_a_jobset_that_is_gone_was_stopped(stand):
  done, _ = gke(stand, 'run', '--check=none', answers=[('kubectl get jobset/longctx --output*terminal*', 1, '')])
  assert done.returncode == 143
  assert 'JobSet longctx: is gone: it was stopped' in done.stderr


def test_xpk_submits_and_deletes(stand):
  done, calls = gke(stand, 'run', '--xpk', '--spot', '--check=none',
                    answers=[('kubectl get jobset/longctx --output*terminalState*', 0, 'Completed')])
  assert done.returncode == 0, done.stderr
  assert calls[1:3] == [LEFT, (
      'xpk workload create --workload=longctx --cluster=c --tpu-type=v5litepod-16 --num-slices=1 '
      '--docker-image=registry/longctx:1 --max-restarts=10 --restart-on-exit-codes=1,3-126 '
      '--termination-grace-period-seconds=120 --spot --command=cd '
      f'/longctx && GCS_ROOT=/gcs bash launch/worker.sh exec --platform=tpu {CONFIG} '
      '--workdir=gs://bucket/runs/a --distributed')]
  # xpk adds 42 and 127 to 255; a mistake, 2, ends it.
  ranges = [list(map(int, part.split('-'))) for part in re.search(r'codes=(\S+)', calls[2])[1].split(',')]
  again = {42, *range(127, 256)}.union(*(range(each[0], each[-1] + 1) for each in ranges))
  assert again == set(range(256)) - {0, 2}
  done, calls = gke(stand, 'stop', '--xpk')
  assert done.returncode == 0, done.stderr
  assert calls[-1] == 'xpk workload delete --workload=longctx --cluster=c --force'


def test_what_xpk_has_started_and_has_not_ended_is_followed(stand):
  """xpk would ask whether to overwrite it, and there may be nobody to answer."""
  done, calls = gke(stand, 'run', '--xpk', '--check=none', answers=[
      ('kubectl get jobset/longctx --ignore*', 0, 'longctx '), ('kubectl get jobset/longctx --output*terminal*', 0, 'Completed')])
  assert done.returncode == 0, done.stderr
  assert [c.split(' ')[1] for c in calls[1:]] == ['get', 'wait', 'get', 'get', 'get']
  assert 'is there and has not ended; it is followed as it was started' in done.stderr


@pytest.mark.parametrize('command', [['create', '--restart-on-user-code-failure'], ['create', '--force'],
                                     ['delete', '--tpu-type=v5litepod-16'], ['resume']])
def test_the_stand_in_refuses_what_xpk_does(stand, command):
  """A test of the test: xpk's argparse takes no flag that it does not know."""
  done = subprocess.run([stand.folder / 'bin/xpk', 'workload', *command], capture_output=True, text=True)
  assert done.returncode == 2
  assert 'xpk: error' in done.stderr


def test_the_other_actions_of_a_jobset(stand):
  assert gke(stand, 'stop')[1][-1] == 'kubectl delete jobset/longctx'
  assert gke(stand, 'status')[1][-2:] == ['kubectl get jobset/longctx', 'kubectl get pods --output=wide']
  assert gke(stand, 'log')[1][-1].startswith('kubectl logs,batch.kubernetes.io/job-completion-index=0')


# SLURM.

SRUN = ('srun --job-name=longctx --nodes=2 --gpus-per-node=4 --ntasks-per-node=4 --kill-on-bad-exit=0 --wait=120 --label '
        f'--time=1:00:00 bash {ROOT}/launch/worker.sh exec --platform=gpu')


def slurm(stand, *more, answers=()):
  stand.answers(*answers)
  return stand.run('slurm.sh', CONFIG, '--nodes=2', '--gpus_per_node=4', '--time=1:00:00', *more)


def srun_says(stand, status, text, first=':'):
  """The first srun's complaints, on stderr, after a command; a second ends well."""
  (stand.folder / 'bin/srun').unlink()
  (stand.folder / 'bin/srun').write_text(
      f'#!/bin/sh\necho "srun $*" >>"$CALLS"\n[ $(grep -c srun "$CALLS") -gt 1 ] && exit 0\n{first}\n'
      f'echo "{text}" >&2\nexit {status}\n')
  (stand.folder / 'bin/srun').chmod(0o755)


def test_srun_starts_a_process_a_gpu_and_again_when_one_is_lost(stand, tmp_path):
  srun_says(stand, 137, 'srun: error: node2: task 5: Killed')
  done = slurm(stand, f'--workdir={tmp_path}/w')
  assert done.returncode == 0, done.stderr
  seen = (tmp_path / 'w/.seen').read_text().strip()
  command = f'{SRUN} --seen={seen} {CONFIG} --workdir={tmp_path}/w --distributed'
  assert stand.calls() == [command, command]
  assert 'lost: srun: error: node2: task 5: Killed' in done.stderr
  assert 'restart 1 of 3' in done.stderr


def test_a_mistake_in_one_task_is_not_tried_again(stand, tmp_path):
  srun_says(stand, 137, 'srun: error: node2: task 5: Exited with exit code 2\nsrun: error: node1: tasks 0-3: Killed')
  assert slurm(stand, '--workdir=gs://bucket/a').returncode == 2
  assert stand.calls() == [f'{SRUN} {CONFIG} --workdir=gs://bucket/a --distributed']


@pytest.mark.parametrize('stop, status, attempts, code, said', [
    (True, 75, 1, 0, 'stopped, and saved; the same command carries on'),
    (True, 137, 1, 143, 'lost: srun: error: node1: task 0'),   # it could not save in time
    (False, 75, 2, 0, 'restart 1 of 3, from the last checkpoint'),   # as at a preemption
    (False, 143, 2, 0, 'restart 1 of 3, from the last checkpoint')])   # that comes before there is a handler
def test_a_job_that_saves_and_leaves_is_started_again_unless_it_was_told_to_stop(stand, stop, status, attempts, code, said):
  name = 'longctx' if stop else 'other'
  srun_says(stand, status, f'srun: error: node1: task 0: Exited with exit code {status}',
            first=f'{ROOT}/launch/slurm.sh stop --name={name}')
  done = slurm(stand, '--workdir=gs://bucket/a')
  assert done.returncode == code, done.stderr
  assert said in done.stderr
  assert ('no launcher of it has left a mark' in done.stderr) == (not stop)
  assert len([c for c in stand.calls() if c.startswith('srun')]) == attempts
  assert list((stand.folder / '.longctx').iterdir()) == []


def test_the_other_actions_of_a_job(stand):
  stand.answers(('scancel*PENDING', 1, 'none waits'))
  assert stand.run('slurm.sh', 'stop').returncode == stand.run('slurm.sh', 'status', '--name=a').returncode == 0
  assert stand.calls() == ['scancel --me --name=longctx --state=PENDING', 'scancel --me --name=longctx --signal=TERM',
                           'squeue --me --name=a']


def test_a_step_of_an_allocation_is_found_by_its_job(stand):
  """There --name is the step's alone. The allocation is the user's, and stays."""
  launcher = f'{ROOT}/launch/slurm.sh'
  srun_says(stand, 75, 'srun: error: node1: task 0: Exited with exit code 75',
            first=f'{launcher} status && {launcher} stop || exit 1')
  stand.answers(('scancel --signal*', 1, 'Invalid job id'), ('squeue --jobs*', 1, 'Invalid job id'))   # as of one that ended
  done = stand.run('slurm.sh', CONFIG, '--workdir=gs://bucket/a', SLURM_JOB_ID='77')
  assert done.returncode == 0, done.stderr
  of_name = 'scancel --me --name=longctx'
  assert stand.calls()[1:] == ['squeue --me --name=longctx', 'squeue --jobs=77', 'scancel --signal=TERM 77',
                               f'{of_name} --state=PENDING', f'{of_name} --signal=TERM']
  assert list((stand.folder / '.longctx').iterdir()) == []


# All of them.

def test_the_readmes_commands_are_read(stand):
  commands = re.findall(r'`(launch/\w+\.sh [^`]*--config[^`]*)`', (ROOT / 'launch/README.md').read_text())
  assert len(commands) == 6
  for command in commands:
    done = stand.run(*command.removeprefix('launch/').split(), '--dry_run')
    assert done.returncode == 0, done.stderr
    assert '-m longctx.main' in done.stdout or 'worker.sh exec' in done.stdout
  assert stand.calls('--build.*') == []   # a dry run does nothing


def test_shellcheck():
  shellcheck = Path(sys.executable).with_name('shellcheck')
  files = [*(ROOT / 'launch').glob('*.sh'), *(ROOT / 'tests/programs').glob('*.sh')]
  assert len(files) >= 8
  done = subprocess.run([shellcheck, *files], capture_output=True, text=True, cwd=ROOT)
  assert done.returncode == 0, done.stdout


def test_slices_are_those_that_can_be_compiled_for():
  rows = [line.split() for line in (ROOT / 'launch/slices.txt').read_text().splitlines() if line[0] != '#']
  assert sorted(row[0] for row in rows) == sorted(f'{c}:{s}' for c, sizes in aot.TOPOLOGIES.items() for s in sizes)
  for name, accelerator, chips, hosts, *_ in rows:
    chip, shape = name.split(':')
    assert int(chips) == math.prod(map(int, shape.split('x')))
    # A v5p's type counts TensorCores, of which a chip has two.
    assert accelerator == f'{dict(v5e="v5litepod").get(chip, chip)}-{int(chips) * (2 if chip == "v5p" else 1)}'
    # docs.cloud.google.com: VMs of slices have 4 chips, but one VM of up to 8 for v5e and v6e.
    assert int(hosts) == (1 if int(chips) <= (4 if chip == 'v5p' else 8) else int(chips) // 4)


def flags():
  lines = (ROOT / 'launch/xla_flags.txt').read_text().splitlines()
  return [line.split(None, 3) for line in lines if line and line[0] != '#']


def test_each_flag_has_a_platform_and_a_reason():
  for platform, variable, flag, reason in flags():
    assert platform in ('cpu', 'gpu', 'tpu')
    assert variable in ('XLA_FLAGS', 'LIBTPU_INIT_ARGS')
    assert flag.startswith('--xla_')
    assert len(reason.removeprefix('# ').split()) > 5


@pytest.mark.slow
def test_each_flag_is_one_that_xla_knows():
  program = 'import jax; jax.devices()'
  given = ' '.join(flag for _, variable, flag, _ in flags() if variable == 'XLA_FLAGS')
  for more, status in (('', 0), (' --xla_no_such_flag=1', None)):
    env = os.environ | {'XLA_FLAGS': given + more, 'JAX_PLATFORMS': 'cpu'}
    done = subprocess.run([sys.executable, '-c', program], env=env, capture_output=True, text=True)
    assert (done.returncode == 0) == (status == 0), done.stderr
    assert ('Unknown flag' in done.stderr) == (status is None)


def test_a_caller_flag_comes_after_ours(stand):
  done = stand.run('local.sh', CONFIG, '--workdir=a', '--processes=1', '--dry_run', XLA_FLAGS='--xla_mine=1')
  value = re.search(r'XLA_FLAGS=(.*?[^\\]) ', done.stdout)[1].replace('\\', '')
  assert value == '--xla_cpu_collective_call_terminate_timeout_seconds=600 --xla_mine=1'
