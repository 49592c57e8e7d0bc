"""A line of experiments/03_memories says what made it."""

import importlib
import pathlib
import sys
import types

import pytest

from experiments import shared

FOLDER = pathlib.Path(__file__).parents[1] / 'experiments' / '03_memories'


@pytest.fixture
def run():
  """experiments/03_memories/run.py."""
  before = set(sys.modules)
  sys.path.insert(0, str(FOLDER))
  try:
    yield importlib.import_module('run')
  finally:
    sys.path.remove(str(FOLDER))
    for name in set(sys.modules) - before:
      if FOLDER in pathlib.Path(getattr(sys.modules[name], '__file__', None) or '/').parents:
        del sys.modules[name]


def test_a_new_line_says_what_made_it_and_an_old_one_stays(run, monkeypatch, tmp_path):
  part = types.SimpleNamespace(
      runs=lambda args, tier, done: ((dict(model=name), lambda: dict(bits=1.5)) for name in ('old', 'new')),
      table=str, draw=lambda done, path: None)
  monkeypatch.setattr(run, 'PARTS', {'recall': part})
  monkeypatch.setattr(run.host_memory, 'keep_freed_memory', lambda: None)
  monkeypatch.setattr(run.shared, 'provenance', lambda: dict(commit='abc+', versions=dict(jax='1')))
  monkeypatch.setattr(sys, 'argv', ['run.py', f'--out={tmp_path}'])
  (tmp_path / 'recall.jsonl').write_text('{"model": "old"}\n')
  run.main()
  assert shared.read(tmp_path / 'recall.jsonl') == [
      dict(model='old'), dict(model='new', bits=1.5, commit='abc+', versions=dict(jax='1'))]
