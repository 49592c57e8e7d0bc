"""A killed evaluation of held-out text carries on, and ends with the very numbers of one that was not killed."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

from longctx.data import stream
from longctx.data.tokenizer import Bytes
from longctx.evaluation import course, held_out, perplexity
from longctx.parallel import mesh
from tests import toy_models
from tests.test_encoder import Knows
from tests.test_perplexity import VOCAB, Documents, make_documents


class KilledError(Exception):
  pass


def killed_after(kept, batches):
  """After so many batches of all passes."""
  read, heard = kept.read, []
  def counted(*args, **kwargs):
    read(*args, **kwargs)
    heard.append(1)
    if len(heard) == batches:
      raise KilledError
  kept.read = counted
  return kept


@pytest.fixture
def often(monkeypatch):
  """Written after each batch."""
  monkeypatch.setattr(course.Course, 'EVERY', -1.0)
  monkeypatch.setattr(course.Course, 'SHARE', 1e9)


SETTINGS = dict(length=16, stride=5, segment=7, batch_size=3, short_context=6)
calls = []   # which documents were opened


class Counted(Documents):
  def document(self, i):
    calls.append(i)
    return super().document(i)


def by_position(kept=None, **settings):
  graphdef, params = nnx.split(toy_models.CountModel(VOCAB))
  return perplexity.evaluate(graphdef, params, Counted(make_documents([1, 40, 7, 16, 17, 33, 2, 8, 100])), Bytes(),
                             perplexity.Config(**SETTINGS | settings), kept=kept)


@pytest.mark.parametrize('batches', [1, 3, 7, 12, 20])
def test_a_killed_evaluation_ends_with_the_same_bits(tmp_path, often, batches, capsys):
  calls.clear()
  whole = by_position()
  opened = len(calls)
  with pytest.raises(KilledError):
    by_position(killed_after(course.Course(tmp_path, 'a'), batches))
  capsys.readouterr()
  calls.clear()
  found = by_position(course.Course(tmp_path, 'a'))
  assert len(calls) < opened
  assert 'carries on: ' in capsys.readouterr().out
  for mode, one in whole.passes.items():
    assert one.bins == found.passes[mode].bins and one.total == found.passes[mode].total
  for field in dataclasses.fields(whole.keys):
    np.testing.assert_array_equal(getattr(whole.keys, field.name), getattr(found.keys, field.name))


def test_what_was_kept_of_another_or_is_damaged_is_not_used(tmp_path, often, capsys):
  path = tmp_path / course.NAME
  for spoil in (lambda data: data, lambda data: data[:-40], lambda data: data[:100], lambda data: b'',
                lambda data: data[:300] + bytes([data[300] ^ 1]) + data[301:]):
    with pytest.raises(KilledError):
      by_position(killed_after(course.Course(tmp_path, 'a'), 12))
    data = path.read_bytes()
    path.write_bytes(spoil(data))
    capsys.readouterr()
    by_position(course.Course(tmp_path, 'b' if path.read_bytes() == data else 'a'))
    assert 'carries on' not in capsys.readouterr().out
    path.unlink()


def test_a_whole_evaluation_leaves_nothing_behind(tmp_path, often):
  kept = course.Course(tmp_path, 'a')
  by_position(kept)
  assert (tmp_path / course.NAME).exists()
  kept.end()
  assert not list(tmp_path.iterdir())
  course.Course(tmp_path, 'a').end()   # nor is it missed


def test_it_is_written_now_and_then_and_tells_the_time_left(tmp_path, monkeypatch, capsys):
  kept = course.Course(tmp_path, 'a')
  by_position(kept)
  assert not (tmp_path / course.NAME).exists()
  assert capsys.readouterr().out == ''
  monkeypatch.setattr(course.Progress, 'EVERY', -1.0)
  by_position(course.Course(tmp_path, 'a'))
  out = capsys.readouterr().out.splitlines()
  assert out[0].startswith('full: ') and out[-1].startswith('sliding: 100 % of all tokens, ')
  assert out[-1].endswith(' tokens/s, 0:00 left')


def test_a_disk_that_takes_nothing_costs_a_line(tmp_path, often, monkeypatch, capsys):
  def full(path, data):
    raise OSError(28, 'No space left on device')
  monkeypatch.setattr(course, 'atomic_write', full)
  by_position(course.Course(tmp_path, 'a'))
  assert f'{tmp_path / course.NAME}: No space left on device' in capsys.readouterr().err


@pytest.mark.parametrize('batches', [1, 2])
@pytest.mark.parametrize('form', ['pairs', 'labels'])
def test_examples_that_are_scored_carry_on_too(tmp_path, often, form, batches):
  given = dict(corpus='files', length=5, long_documents='drop', validation_fraction=0.0, test_fraction=0.0, batch_size=2,
               cache_dir=str(tmp_path / 'cache'))
  if form == 'pairs':
    (tmp_path / 'a.tsv').write_text(''.join(f'{i}\t{"ab"[i % 2] * (1 + i % 3)}\n' for i in range(8)))
    config = stream.Config(form='pairs', files=f'{tmp_path}/a.tsv', source_length=3, **given)
  else:
    for i in range(8):
      for part in ('train', 'test'):
        path = tmp_path / part / ('b' if i % 3 else 'a') / f'{i}.txt'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('x')
    config = stream.Config(form='labels', files=str(tmp_path), **given)
  layout = mesh.make_layout(mesh.Config(layout='single'))
  settings = perplexity.Config(batch_size=3, split='train')
  rows = held_out.open_rows(config, settings, layout)
  def scored(kept=None):
    token = ord('a') if form == 'pairs' else 0
    found = held_out.evaluate(nnx.graphdef(Knows(token)), nnx.State({}), rows, config, Bytes(), settings, layout=layout,
                              loss_chunk=2, kept=kept)
    return dataclasses.replace(found, seconds=0.0)
  folder = tmp_path / 'w'
  folder.mkdir()
  with pytest.raises(KilledError):
    scored(killed_after(course.Course(folder, form), batches))
  assert course.Course(folder, form).before(0)[0] == batches
  assert scored(course.Course(folder, form)) == scored()
