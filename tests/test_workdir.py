"""The workdir: one run at a time, one config, whole files, and a stop that is asked for politely."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import ml_collections
import pytest

from longctx.errors import ConfigError, RunError
from longctx.training import workdir as workdir_lib

HOLD = """
import sys, time
from longctx.training import workdir
workdir.lock(sys.argv[1])  # kept without a reference
print('held', flush=True)
time.sleep(60)
"""




def start(code, *args):
  """A Python of its own; the caller ends it."""
  return subprocess.Popen([sys.executable, '-c', code, *map(str, args)], stdout=subprocess.PIPE,
                          cwd=Path(__file__).parents[1], env=os.environ | {'JAX_PLATFORMS': 'cpu'})


def make_config():
  return ml_collections.ConfigDict({
      'seed': 1, 'run': {'num_steps': 100, 'log_every': 10}, 'model': {'remat': False},
      'optimizer': {'name': 'adamw', 'betas': (0.9, 0.95)}})


def in_one_line(error):
  assert '\n' not in str(error.value)
  return str(error.value)


class TestLock:

  def test_a_lock_of_another_host_may_be_one_that_a_server_has_not_let_go(self, tmp_path):
    with workdir_lib.lock(tmp_path):
      (tmp_path / '.lock').write_text('pid 7 on another-host\n')
      with pytest.raises(RunError, match=r'held by a run that is still going \(pid 7 on another-host\); .* in a minute'):
        workdir_lib.lock(tmp_path)

  def test_second_run_is_refused_until_the_first_is_killed(self, tmp_path):
    first = start(HOLD, tmp_path)
    try:
      assert first.stdout.readline() == b'held\n'
      with pytest.raises(ConfigError) as e:
        workdir_lib.lock(tmp_path)
      assert f'pid {first.pid} on ' in in_one_line(e)
      first.send_signal(signal.SIGKILL)
      first.wait()
      with workdir_lib.lock(tmp_path):
        assert f'pid {os.getpid()} ' in (tmp_path / '.lock').read_text()
    finally:
      first.kill()
      first.wait()
      first.stdout.close()

  def test_refused_within_one_process_too_and_free_after_release(self, tmp_path):
    held = workdir_lib.lock(tmp_path / 'a' / 'b')
    with pytest.raises(ConfigError, match=f'pid {os.getpid()} '):
      workdir_lib.lock(tmp_path / 'a' / 'b')
    held.release()
    held.release()  # twice does no harm
    workdir_lib.lock(tmp_path / 'a' / 'b').release()

  def test_pid_of_the_holder_is_not_mixed_with_an_older_longer_one(self, tmp_path):
    (tmp_path / '.lock').write_text('pid 123456789 on a-host-of-a-very-long-name.example.org\n')
    with workdir_lib.lock(tmp_path):
      assert (tmp_path / '.lock').read_text().count('\n') == 1
      assert '123456789' not in (tmp_path / '.lock').read_text()

  def test_a_file_is_no_workdir(self, tmp_path):
    (tmp_path / 'file').write_text('')
    for path in (tmp_path / 'file', tmp_path / 'file' / 'below'):
      with pytest.raises(ConfigError, match='is a file; give a folder') as e:
        workdir_lib.lock(path)
      assert str(tmp_path / 'file') in in_one_line(e)

  def test_a_place_that_nobody_may_write_to(self):
    with pytest.raises(ConfigError, match=r'cannot make this folder|cannot write'):
      workdir_lib.lock('/proc/longctx')

  def test_a_folder_without_permission(self, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
      raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr(workdir_lib.os, 'open', refuse)
    with pytest.raises(ConfigError, match=r'cannot write there .Permission denied') as e:
      workdir_lib.lock(tmp_path)
    in_one_line(e)

  def test_a_full_disk_holds_without_a_name(self, tmp_path, monkeypatch):
    def full(*args):
      raise OSError(28, 'No space left on device')
    monkeypatch.setattr(workdir_lib.os, 'pwrite', full)
    held = workdir_lib.lock(tmp_path)
    with pytest.raises(ConfigError, match=r'still going \(another process\)'):
      workdir_lib.lock(tmp_path)
    held.release()

  def test_no_name(self):
    with pytest.raises(ConfigError, match='--workdir: missing'):
      workdir_lib.lock('')


class TestAgree:

  def test_first_run_writes_and_the_same_config_agrees(self, tmp_path):
    workdir_lib.agree(tmp_path, make_config(), '')
    text = (tmp_path / 'config.json').read_text()
    assert json.loads(text) == {
        'seed': 1, 'run': {'num_steps': 100, 'log_every': 10}, 'model': {'remat': False},
        'optimizer': {'name': 'adamw', 'betas': [0.9, 0.95]}}
    assert text.index('"model"') < text.index('"optimizer"') < text.index('"run"')
    assert len(text.splitlines()) > 10
    workdir_lib.agree(tmp_path, make_config(), '')
    assert (tmp_path / 'config.json').read_text() == text
    assert [p.name for p in tmp_path.iterdir()] == ['config.json']  # no temporary file stays

  def test_each_differing_key_is_told_with_the_remedy(self, tmp_path):
    workdir_lib.agree(tmp_path, make_config(), '')
    config = make_config()
    config.run.num_steps, config.optimizer.betas, config.model.remat = 200, (0.9, 0.99), True
    with pytest.raises(ConfigError) as e:
      workdir_lib.agree(tmp_path, config, '')
    message = in_one_line(e)
    assert 'run.num_steps: W has 100, you gave 200' in message
    assert 'optimizer.betas: W has [0.9, 0.95], you gave [0.9, 0.99]' in message
    assert 'model.remat: W has false, you gave true' in message
    assert 'log_every' not in message
    remedy = message.split('--allow_config_change=')[1].split(';')[0]
    assert remedy == 'model.remat,optimizer.betas,run.num_steps'
    workdir_lib.agree(tmp_path, config, remedy)  # the remedy is one
    workdir_lib.agree(tmp_path, config, '')  # and W has the new values now

  def test_allowing_some_still_refuses_the_others_and_changes_nothing(self, tmp_path):
    workdir_lib.agree(tmp_path, make_config(), '')
    before = (tmp_path / 'config.json').read_bytes()
    config = make_config()
    config.run.num_steps, config.seed = 200, 2
    with pytest.raises(ConfigError) as e:
      workdir_lib.agree(tmp_path, config, 'run.num_steps')
    assert 'seed: W has 1, you gave 2' in in_one_line(e)
    assert 'num_steps: W has' not in str(e.value)
    assert str(e.value).endswith('. seed cannot change in this workdir: give what W has; or give '
                                 'another workdir')
    config.seed, config.run.log_every = 1, 5
    with pytest.raises(ConfigError) as e:
      workdir_lib.agree(tmp_path, config, 'run.num_steps')
    assert '--allow_config_change=run.num_steps,run.log_every;' in in_one_line(e)
    assert (tmp_path / 'config.json').read_bytes() == before

  def test_what_changes_no_number_may_differ(self, tmp_path):
    from longctx import configuration
    config = configuration.base()
    workdir_lib.agree(tmp_path, config)
    config.mesh.update(dict(data=4, layout='fsdp'))
    config.run.update(dict(compilation_cache='none', expect='2.0'))
    config.data.update(dict(cache_dir='c', prefetch=9, threads=2))
    workdir_lib.agree(tmp_path, config, record=False)
    workdir_lib.agree(tmp_path, config)
    assert json.loads((tmp_path / 'config.json').read_text())['mesh']['data'] == 4
    free = (*workdir_lib.FREE, *workdir_lib.NOT_SCORED)
    config.update(dict(seed=3))
    config.optimizer.name, config.perplexity.stride, config.loss.chunk = 'lion', 3, 7
    workdir_lib.agree(tmp_path, config, record=False, free=free)
    config.data.validation_fraction = 0.2
    with pytest.raises(ConfigError, match=r'config: data\.validation_fraction: W has 0\.05'):
      workdir_lib.agree(tmp_path, config, record=False, free=free)

  def test_every_key_that_is_named_exists(self):
    from longctx import configuration
    known = {}
    for name in configuration.MODELS:
      known |= workdir_lib.leaves(workdir_lib.plain(configuration.base(name)))
    for name in (*workdir_lib.FREE, *workdir_lib.NOT_SCORED, *workdir_lib.FIXED):
      assert name in known or any(key.startswith(f'{name}.') for key in known), name

  def test_a_section_allows_its_keys_but_not_a_namesake(self, tmp_path):
    workdir_lib.agree(tmp_path, {'run': {'a': 1, 'b': 2}, 'run_name': 'x'}, '')
    workdir_lib.agree(tmp_path, {'run': {'a': 3, 'b': 4}, 'run_name': 'x'}, ' run , ')
    with pytest.raises(ConfigError, match='run_name: W has "x", you gave "y"'):
      workdir_lib.agree(tmp_path, {'run': {'a': 3, 'b': 4}, 'run_name': 'y'}, 'run')

  def test_keys_that_come_and_go_differ(self, tmp_path):
    workdir_lib.agree(tmp_path, {'a': 1, 'old': 2}, '')
    with pytest.raises(ConfigError) as e:
      workdir_lib.agree(tmp_path, {'a': 1, 'new': None}, '')
    assert 'new: W has no such key, you gave null' in in_one_line(e)
    assert 'old: W has 2, you gave no such key' in str(e.value)
    workdir_lib.agree(tmp_path, {'a': 1, 'new': None}, 'old,new')
    assert json.loads((tmp_path / 'config.json').read_text()) == {'a': 1, 'new': None}

  @pytest.mark.parametrize('a, b, same', [
      (1, 1.0, True), (0, False, False), (1, True, False), (float('nan'), float('nan'), True),
      (1e-3, 0.001, True), ((), (1,), False), ('', 'x', False), ((), (), True)])
  def test_equality_of_values(self, tmp_path, a, b, same):
    workdir_lib.agree(tmp_path, {'x': a}, '')
    if same:
      workdir_lib.agree(tmp_path, {'x': b}, '')
    else:
      with pytest.raises(ConfigError, match='x: W has'):
        workdir_lib.agree(tmp_path, {'x': b}, '')

  @pytest.mark.parametrize('allow, near', [('run.num_step', 'run.num_steps'), ('optimiser', 'optimizer')])
  def test_allowing_an_unknown_key_names_the_nearest(self, tmp_path, allow, near):
    workdir_lib.agree(tmp_path, make_config(), '')
    with pytest.raises(ConfigError) as e:
      workdir_lib.agree(tmp_path, make_config(), allow)
    assert f'--allow_config_change={allow}: no such key (did you mean "{near}"?)' == in_one_line(e)

  @pytest.mark.parametrize('content', [b'', b'{"run": {', b'\xff\xfe', b'[1]'])
  def test_a_config_that_no_run_wrote(self, tmp_path, content):
    (tmp_path / 'config.json').write_bytes(content)
    for read in (lambda: workdir_lib.agree(tmp_path, make_config(), ''),
                 lambda: workdir_lib.load_config(tmp_path)):
      with pytest.raises(ConfigError, match='not a config that a run wrote') as e:
        read()
      assert 'remove this file' in in_one_line(e)
    assert (tmp_path / 'config.json').read_bytes() == content

  def test_no_room_to_write_it(self, tmp_path, monkeypatch):
    def full(path, data):
      raise OSError(28, 'No space left on device')
    monkeypatch.setattr(workdir_lib, 'atomic_write', full)
    with pytest.raises(ConfigError, match='No space left on device'):
      workdir_lib.agree(tmp_path, make_config(), '')


class TestLoadConfig:

  def test_gives_back_what_was_agreed(self, tmp_path):
    config = make_config()
    config.optimizer.nested = ((1, 2), ('a',))
    workdir_lib.agree(tmp_path, config, '')
    loaded = workdir_lib.load_config(tmp_path)
    assert isinstance(loaded, ml_collections.ConfigDict)
    assert loaded.to_dict() == config.to_dict()
    assert isinstance(loaded.optimizer.betas, tuple)
    assert isinstance(loaded.optimizer.nested[0], tuple)

  def test_where_there_is_none(self, tmp_path):
    with pytest.raises(ConfigError, match='no such folder; give the workdir of a run'):
      workdir_lib.load_config(tmp_path / 'no')
    with pytest.raises(ConfigError, match='no run was started there'):
      workdir_lib.load_config(tmp_path)


class TestAtomicWrite:

  def test_a_failure_leaves_the_old_file_and_nothing_else(self, tmp_path, monkeypatch):
    path = tmp_path / 'f'
    workdir_lib.atomic_write(path, b'old')
    def full(fd):
      raise OSError(28, 'No space left on device')
    monkeypatch.setattr(workdir_lib.os, 'fsync', full)
    with pytest.raises(OSError):
      workdir_lib.atomic_write(path, b'new')
    assert path.read_bytes() == b'old'
    assert list(tmp_path.iterdir()) == [path]

  def test_the_file_is_never_half_written(self, tmp_path):
    """A reader beside a writer of two lengths sees one of them whole, at all times."""
    path, contents = tmp_path / 'f', (b'a' * 10, b'b' * 3_000_000)
    workdir_lib.atomic_write(path, contents[0])
    writer = start(
        'import sys\nfrom longctx.training import workdir\n'
        'for i in range(40): workdir.atomic_write(sys.argv[1], [b"a" * 10, b"b" * 3000000][i % 2])',
        path)
    seen = set()
    while writer.poll() is None:
      data = path.read_bytes()
      assert data in contents
      seen.add(len(data))
    writer.stdout.close()
    assert writer.returncode == 0
    assert len(seen) == 2


class TestStopSignal:

  @pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
  def test_sets_the_flag_and_puts_the_handlers_back(self, number):
    before = signal.getsignal(number)
    with workdir_lib.StopSignal() as stop:
      assert not stop.requested
      os.kill(os.getpid(), number)
      time.sleep(0.01)
      assert stop.requested
      assert stop.name == number.name
      os.kill(os.getpid(), signal.SIGTERM)  # again: no harm
      time.sleep(0.01)
    assert signal.getsignal(number) is before

  def test_second_interrupt_raises(self):
    before = signal.getsignal(signal.SIGINT)
    def interrupt_twice():
      with workdir_lib.StopSignal():
        for _ in range(2):
          os.kill(os.getpid(), signal.SIGINT)
          time.sleep(0.01)
    with pytest.raises(KeyboardInterrupt):
      interrupt_twice()
    assert signal.getsignal(signal.SIGINT) is before


class TestLeaveAtOnce:

  @pytest.fixture
  def left(self, monkeypatch):
    """Exit statuses, in place of the end of this process."""
    found = []
    monkeypatch.setattr(workdir_lib.os, '_exit', found.append)
    return found

  def wait(self, happened):
    deadline = time.monotonic() + 60
    while not happened():
      assert time.monotonic() < deadline
      time.sleep(0.01)

  def test_leaves_with_the_status_of_who_may_carry_on(self, left, capfd):
    before = signal.getsignal(signal.SIGTERM)
    with workdir_lib.LeaveAtOnce():
      os.kill(os.getpid(), signal.SIGTERM)
      self.wait(lambda: left)
    assert left == [75] and capfd.readouterr().err == 'longctx: SIGTERM: left at once; the same command carries on\n'
    assert signal.getsignal(signal.SIGTERM) is before and signal.set_wakeup_fd(-1) == -1

  def test_what_may_be_saved_is_not_left(self, left):
    with workdir_lib.LeaveAtOnce():
      with workdir_lib.StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        self.wait(lambda: stop.requested)
        time.sleep(0.1)
        assert not left
      os.kill(os.getpid(), signal.SIGTERM)   # with nothing to save any more
      self.wait(lambda: left)

  def test_nothing_changes_in_another_thread(self):
    def enter():
      with workdir_lib.LeaveAtOnce():
        found.append(signal.getsignal(signal.SIGTERM))
    before, found = signal.getsignal(signal.SIGTERM), []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [before]
