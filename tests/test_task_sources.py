"""Files that tasks read, by their bytes: what was edited differs, and where it lies does not matter."""

import json
import shutil

import pytest

from longctx.data.tasks import example, sources
from longctx.data.tasks.table import TASKS
from longctx.data.tokenizer import Bytes
from longctx.errors import ConfigError
from longctx.evaluation import harness_tasks
from tests.test_task_lra import write_files

SQUAD = dict(data=[dict(paragraphs=[dict(context=f'Town {i} is {i} old.', qas=[
    dict(question=f'How old is town {i}?', answers=[dict(text=str(i))])]) for i in range(9)])])


def test_words_that_name_no_file_have_no_digest():
  for haystack in ('', 'repeated', 'noise'):
    assert sources.digests(('passkey',), dict(haystack=haystack, paragraphs='', files='')) == {'passkey': {}}


def test_a_task_has_the_digests_of_what_it_reads_alone(tmp_path):
  (tmp_path / 'a').write_text('A. B. ')
  (tmp_path / 'q').write_text(json.dumps(SQUAD))
  names = ('parity', 'passkey', 'niah', 'ruler_qa_1')
  given = dict(haystack=f'{tmp_path}/a', paragraphs=f'{tmp_path}/q', files='')
  found = sources.digests(names, given)
  assert [set(of) for of in found.values()] == [set(), {'haystack'}, {'haystack'}, {'paragraphs'}]
  assert found['passkey'] == found['niah']
  assert sources.read_by('niah', given, found['niah']) == dict(haystack=f'sha256 {found["niah"]["haystack"]}')
  assert sources.read_by('niah', dict(haystack='noise'), {}) == dict(haystack='noise')
  assert sources.read_by('niah', {}, {}) == dict(haystack='') and sources.read_by('parity', given, {}) == {}


@pytest.mark.parametrize('source, name, text', [('haystack', 'passkey', 'A sentence. And one. '),
                                                ('paragraphs', 'ruler_qa_1', json.dumps(SQUAD))])
def test_a_digest_is_of_bytes_and_not_of_paths(tmp_path, source, name, text):
  of = lambda pattern: sources.digests((name,), {source: str(pattern)})[name][source]
  (tmp_path / 'a').mkdir()
  (tmp_path / 'b').mkdir()
  for path in ('a/1.x', 'b/1.x', 'b/2.x'):
    (tmp_path / path).write_text(text)
  assert of(tmp_path / 'a/*.x') == of(tmp_path / 'b/1.x') != of(tmp_path / 'b/*.x')
  before = of(tmp_path / 'a/*.x')
  (tmp_path / 'a/1.x').write_text(text.replace('one', 'two').replace('Town 3', 'Town 4'))
  assert of(tmp_path / 'a/*.x') != before
  with pytest.raises(ConfigError, match=rf"eval\.{source}='.*none\.x': no file matches"):
    of(tmp_path / 'none.x')


NAMES = sorted(name for name in TASKS if name.startswith('lra_'))


@pytest.mark.parametrize('name', NAMES)
def test_of_a_folder_count_the_files_that_a_task_reads(name, tmp_path):
  """Every file whose bytes its examples come from, and none of the other split."""
  write_files(tmp_path / 'f')
  other = name.removesuffix('_train') if name.endswith('_train') else f'{name}_train'
  both = sources.digests((name, other), dict(files=str(tmp_path / 'f')))
  read = both[name]['files']
  assert read != both[other]['files']
  shutil.copytree(tmp_path / 'f', tmp_path / 'g')
  assert sources.digests((name,), dict(files=str(tmp_path / 'g')))[name]['files'] == read
  opened = set(map(str, sources.lra.paths(name, tmp_path / 'f')))
  assert opened
  for path in (tmp_path / 'f').rglob('*'):
    if path.is_file() and str(path) not in opened:
      path.write_bytes(b'' if path.suffix == '.png' else b'\xff')   # is not read
  sources.forget()
  example.example(name, TASKS[name], Bytes(), length=8000, index=0, files=str(tmp_path / 'f'))
  with open(sorted(opened)[0], 'ab') as file:   # of Pathfinder an image
    file.write(b' ')
  assert sources.digests((name,), dict(files=str(tmp_path / 'f')))[name]['files'] != read


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
  (tmp_path / 'a').write_text('A. B. ')
  def refuse(file, kind):
    raise PermissionError(13, 'Permission denied')
  monkeypatch.setattr(sources.hashlib, 'file_digest', refuse)
  with pytest.raises(ConfigError, match=r'^eval\.haystack=.*a: cannot be read \(Permission denied\); let yourself'):
    sources.digests(('passkey',), dict(haystack=str(tmp_path / 'a')))


@pytest.mark.parametrize('source, name, said', [
    ('haystack', 'passkey', 'no file matches'), ('paragraphs', 'ruler_qa_1', 'no file matches'),
    ('files', 'lra_text', '.*: holds no aclImdb/test/neg'), ('files', 'lra_image', '.*: holds no cifar')])
def test_what_is_wrong_begins_with_the_setting_that_its_user_knows(tmp_path, source, name, said):
  given = {source: str(tmp_path / 'none')}
  for setting in ('eval.{}', 'data.task_{}', '--{}'):
    begin = rf"^{setting.format(source)}='.*none': {said}"
    with pytest.raises(ConfigError, match=begin):
      sources.digests((name,), given, setting)
    with pytest.raises(ConfigError, match=begin):
      example.example(name, TASKS[name], Bytes(), length=2000, index=0, setting=setting, **given)
  with pytest.raises(ConfigError, match=rf"^--{source}='.*none': {said}"):
    harness_tasks.export(str(tmp_path / 'd'), [name], lengths=[2000], samples=1, tokenizer=Bytes(), seed=0, depths=0,
                         sources=dict.fromkeys(example.SOURCES, '') | given)


def test_a_large_file_is_read_in_pieces(tmp_path):
  import tracemalloc
  with open(tmp_path / 'large', 'wb') as file:
    file.truncate(1 << 26)
  tracemalloc.start()
  sources.digests(('passkey',), dict(haystack=str(tmp_path / 'large')))
  most = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert most < 1 << 22
