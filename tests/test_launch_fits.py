"""launch/fits.py: how it looks for the longest context that fits, and the table that it writes."""

import importlib.util
import json

import pytest

from longctx import command_line, main
from longctx.configuration import parts
from longctx.parallel import aot
from tests.stand_ins import ROOT

spec = importlib.util.spec_from_file_location('fits', ROOT / 'launch/fits.py')
fits = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fits)


def pretended(planned: int, true: int, asked: list):
  """A step that fits up to `true` tokens, of which the plan thinks that it fits up to `planned`."""
  def measure(mode, topology, model, length):
    asked.append((mode, length))
    return dict(fits=length <= (planned if mode == 'plan' else true), gib=length / 2**16, of=16.0)
  return measure


@pytest.mark.parametrize('planned', [0, 2**13, 2**16, 2**18, 2**23])
@pytest.mark.parametrize('true', [0, 2**13, 2**17, 2**23])
def test_the_longest_that_compiles_is_found_whatever_the_plan_says(tmp_path, planned, true):
  asked = []
  results = fits.Results(tmp_path / 'fits.jsonl', pretended(planned, true, asked))
  assert results.longest('v5e:2x4', '1B') == true
  compiled = [length for mode, length in asked if mode == 'compile']
  assert len(compiled) == len(set(compiled))
  # Both sides of the limit were compiled, not inferred.
  assert {true, 2 * true or fits.LENGTHS[0]} & set(fits.LENGTHS) <= set(compiled)
  # And none is compiled or planned again by the next call, or the next process.
  again = []
  assert fits.Results(tmp_path / 'fits.jsonl', pretended(0, 0, again)).longest('v5e:2x4', '1B') == true
  assert again == []


def test_a_good_plan_costs_two_compilations(tmp_path):
  asked = []
  fits.Results(tmp_path / 'fits.jsonl', pretended(2**17, 2**17, asked)).longest('v5e:2x4', '1B')
  assert [a for a in asked if a[0] == 'compile'] == [('compile', 2**17), ('compile', 2**18)]


def test_the_table_stands_between_its_marks(tmp_path):
  for model, true in (('8B', 0), ('1B', 2**20), ('3B', 2**23)):
    fits.Results(tmp_path / 'fits.jsonl', pretended(true, true, [])).longest('v5e:4x4', model)
  results = fits.Results(tmp_path / 'fits.jsonl', pretended(2**15, 2**15, []))
  results.longest('v5e:2x4', '1B')
  del results.found['v5e:4x4', '1B', 2**21]   # not compiled yet
  readme = tmp_path / 'README.md'
  readme.write_text(f'before\n{fits.BEGIN}\nold\n{fits.END}\nafter\n')
  for _ in range(2):
    fits.write_table(readme, results.found)
  assert readme.read_text() == f"""before
{fits.BEGIN}
| slice | 1B | 3B | 8B |
|---|---|---|---|
| v5e:2x4 | 32K (0.5 GiB) |  |  |
| v5e:4x4 | at least 1M (16.0 GiB) | at least 8M (128.0 GiB) | - |
{fits.END}
after
"""


def test_the_readme_has_the_table_of_what_was_compiled():
  found = {(r['topology'], r['model'], r['length']): r
           for r in map(json.loads, fits.RESULTS.read_text().splitlines())}
  if not found:
    pytest.skip('nothing was compiled yet')
  assert f'{fits.BEGIN}\n{fits.table(found)}\n{fits.END}' in fits.README.read_text()


def test_the_commands_are_of_configs_that_are_right(monkeypatch):
  """Every model is cut by every slice: a length is a multiple of two parts a chip."""
  monkeypatch.chdir(ROOT)
  for topology in fits.TOPOLOGIES:
    chips = aot.check_topology(topology)[1]
    for model in fits.MODELS.values():
      assert fits.LENGTHS[0] % (2 * chips) == model['embed_dim'] % chips == 0
      assert model['num_heads'] % model['num_kv_heads'] == model['embed_dim'] % model['num_heads'] == 0
  _, _, *arguments = fits.command('compile', 'v5e:8x8', '70B', 2**20)
  _, config = command_line.parse_with_config(main.define_flags, ['main', *arguments])
  found = parts(config)
  assert (found.mesh.seq, found.data.length, found.model.embed_dim) == (64, 2**20, 8192)
  # Meta's count: 70.6 billion.
  assert found.model.num_parameters() / 1e9 == pytest.approx(70.55, abs=0.01)
