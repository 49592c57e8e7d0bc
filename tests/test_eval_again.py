"""What makes an evaluation again: from the config of a run and what an evaluation kept of its own."""

import json
import subprocess

import ml_collections
import pytest

from longctx import configuration
from longctx.evaluation import again
from longctx.training import workdir

RUN = workdir.plain(configuration.base('decoder'))


def line(task='passkey', length=512, index=0, too_long=False, **overrides):
  given = {name.replace('__', '.'): value for name, value in overrides.items()}
  return dict(task=task, length=length, index=index, too_long=too_long, overrides=given)


def test_what_is_kept_is_what_differs_and_its_hash_is_that_of_all(tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps(RUN))
  config = configuration.base('decoder')
  assert again.about(str(tmp_path), config) == dict(config=again.digest(RUN), overrides={})
  config.eval.tasks, config.perplexity.use_ema, config.model.window = ('parity',), True, (12,)
  found = again.about(str(tmp_path), config)
  assert found['overrides'] == {'eval.tasks': ['parity'], 'perplexity.use_ema': True, 'model.window': [12]}
  assert again.is_made_by(RUN, found) and not again.is_made_by(RUN | dict(seed=1), found)
  other = ml_collections.ConfigDict(workdir.tuples(RUN))
  assert again.digest(other) == again.digest(RUN) != found['config']


def test_a_config_is_kept_once_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
  config = configuration.base('decoder')
  again.keep(str(tmp_path), config)
  path = tmp_path / 'configs' / f'{again.digest(RUN)}.json'
  before = path.stat().st_mtime_ns
  again.keep(str(tmp_path), config)
  assert path.stat().st_mtime_ns == before and again.kept(str(tmp_path), again.digest(RUN)) == RUN
  path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
  assert again.kept(str(tmp_path), again.digest(RUN)) is None is again.kept(str(tmp_path), 'gone')
  def full(path, data):
    raise OSError(28, 'No space left on device')
  monkeypatch.setattr(workdir, 'atomic_write', full)
  config.seed = 2
  again.keep(str(tmp_path), config)
  assert capsys.readouterr().err == f'{tmp_path}/configs/{again.digest(config)}.json: No space left on device\n'
  monkeypatch.setattr(again.jax, 'process_index', lambda: 1)
  again.keep(str(tmp_path / 'other'), config)
  assert [one.name for one in tmp_path.iterdir()] == ['configs']


def test_the_commit_is_that_of_this_checkout_and_of_no_other(tmp_path, monkeypatch):
  def git(*words):
    return subprocess.run(['git', '-C', str(tmp_path), '-c', 'user.name=a', '-c', 'user.email=a', *words], check=True,
                          capture_output=True, text=True).stdout.strip()
  found = again.commit.__wrapped__
  monkeypatch.setattr(again, 'ROOT', tmp_path / 'inner')
  (tmp_path / 'inner').mkdir()
  (tmp_path / 'a.py').write_text('1')
  for words in (('init',), ('add', '.'), ('commit', '-m', 'a')):
    git(*words)
  assert found() is None   # an installed package that lies in a repository
  monkeypatch.setattr(again, 'ROOT', tmp_path)
  assert found() == git('rev-parse', '--short=12', 'HEAD')
  (tmp_path / 'a.py').write_text('2')
  assert found() == git('rev-parse', '--short=12', 'HEAD') + '+'
  monkeypatch.setenv('PATH', '')
  assert found() is None


def test_what_only_an_allowed_change_may_be_is_allowed_by_the_command():
  words = again.command('w', 7, {'eval.tasks': ['a'], 'model.window': [12], 'data.files': 'x y', 'seed': 3})
  assert words[3:] == ['--config=CONFIG', '--workdir=w', '--mode=eval', '--checkpoint=7',
                       '--allow_config_change=model.window,data.files', "--config.eval.tasks=('a',)",
                       '--config.model.window=(12,)', '--config.data.files=x y', '--config.seed=3']
  assert again.command('w', None, {})[3:] == ['--config=CONFIG', '--workdir=w', '--mode=eval']


ASKED = dict(eval__tasks=['passkey', 'niah'], eval__samples=3)


@pytest.mark.parametrize('lines, changed', [
    # As it was asked, and of one that was killed.
    ([line(length=RUN['data']['length'], index=i, **ASKED) for i in range(3)], {}),
    # Asked before: another task, length and more samples.
    ([line(task='s3', **ASKED), line(length=99, **ASKED), line(index=4, length=99, **ASKED)],
     {'eval.tasks': ['passkey', 'niah', 's3'], 'eval.samples': 5, 'eval.lengths': [RUN['data']['length'], 512, 99]}),
    ([line(too_long=True, eval__lengths=[512], **ASKED)], {'eval.lengths': [512], 'eval.too_long': 'count'})])
def test_all_that_was_answered_is_asked(lines, changed):
  base = {'eval.tasks': ['passkey', 'niah'], 'eval.samples': 3}
  assert again.of_tasks(RUN, lines) == base | changed


def test_the_command_has_the_texts_that_were_read():
  given = lambda task, haystack, **more: line(task=task, **more) | dict(haystack=haystack)
  lines = [given('passkey', 'noise', eval__tasks=['passkey'], eval__haystack='noise'),
           given('niah', 'noise', eval__tasks=['niah'], eval__haystack='noise'), given('s3', '', eval__tasks=['s3'])]
  found = again.of_tasks(RUN, lines)
  assert found['eval.tasks'] == ['s3', 'passkey', 'niah'] and found['eval.haystack'] == 'noise'
  # Said once to no avail: none of what was answered had it.
  assert 'eval.haystack' not in again.of_tasks(RUN, lines[2:])
  named = RUN | dict(eval=RUN['eval'] | dict(haystack='noise'))
  assert 'eval.haystack' not in again.of_tasks(named, lines)
  assert again.of_tasks(named, [given('passkey', '')])['eval.haystack'] == ''


def test_the_command_has_the_depths_of_tasks_that_place_needles():
  lines = [line(eval__depths=2) | dict(depths=2), line(task='parity'), line(task='mqar') | dict(depths=2)]
  assert again.of_tasks(RUN, lines)['eval.depths'] == 2
  assert 'eval.depths' not in again.of_tasks(RUN | dict(eval=RUN['eval'] | dict(depths=2)), lines)
  assert 'eval.depths' not in again.of_tasks(RUN, lines[1:2])
  assert again.of_tasks(RUN, [line(eval__depths=2) | dict(depths=0)])['eval.depths'] == 0


def test_held_out_text_is_read_where_the_run_names_tasks():
  assert again.of_held_out(RUN, {}) == {}
  named = RUN | dict(eval=RUN['eval'] | dict(tasks=['s3']))
  assert again.of_held_out(named, dict(overrides={'perplexity.stride': 3})) == {'perplexity.stride': 3, 'eval.tasks': []}
  assert again.of_held_out(named, dict(overrides={'eval.tasks': []})) == {'eval.tasks': []}
