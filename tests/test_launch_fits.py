"""launch/fits.py, how it looks for the longest context that fits, launch/scaling.py, and their tables."""

import json
import sys

import pytest

from longctx import command_line, main
from longctx.configuration import parts
from longctx.parallel import aot
from tests.stand_ins import ROOT

sys.path.insert(0, str(ROOT / 'launch'))

import fits
import scaling


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
    fits.write_table(readme, fits.table(results.found))
  assert readme.read_text() == f"""before
{fits.BEGIN}
| slice | 1B | 3B | 8B |
|---|---|---|---|
| v5e:2x4 | 32K (0.5 GiB) |  |  |
| v5e:4x4 | at least 1M (16.0 GiB) | at least 8M (128.0 GiB) | - |
{fits.END}
after
"""


def test_a_table_is_written_and_another_one_stays(tmp_path):
  readme = tmp_path / 'README.md'
  text = f'a\n{fits.BEGIN}\nold\n{fits.END}\nb\n{scaling.BEGIN}\nother\n{scaling.END}\nc\n'
  readme.write_text(text)
  fits.write_table(readme, 'new')
  assert readme.read_text() == text.replace('old', 'new')
  fits.write_table(readme, 'newer', scaling.BEGIN, scaling.END)
  assert readme.read_text() == text.replace('old', 'new').replace('other', 'newer')


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


def compiled(fits=True, exposed=100, **seconds) -> dict:
  """compile.json of a step that sends 400 bytes, and whose own arithmetic takes 3 of 4 seconds."""
  least = max(seconds.values(), default=0)
  found = dict(fits=fits, memory=dict(total=2**33, chip=2**34), compile_seconds=3.0)
  return found | (dict(wire_bytes=400, exchanges=[dict(exposed_bytes=exposed), dict(exposed_bytes=0)], roofline=dict(
      seconds=seconds, least=least, utilization=3 / least)) if fits else {})


@pytest.mark.parametrize('seconds, exposed, least', [
    (dict(compute=4.0, memory=1.0, wire=2.0), 0, 4.0),
    (dict(compute=4.0, memory=1.0, wire=2.0), 100, 4.5),   # a quarter of what is sent waits for nothing else
    (dict(compute=4.0, memory=5.0, wire=2.0), 400, 7.0),
    (dict(compute=4.0, memory=1.0, wire=8.0), 100, 8.0),   # the links' time is counted once
])
def test_what_is_exposed_is_added_to_what_binds(monkeypatch, seconds, exposed, least):
  monkeypatch.setattr(fits, 'told', lambda *args, **mesh: compiled(exposed=exposed, **seconds))
  found = scaling.measure('v5p:4x4x4', 2**20)
  assert found['least'] == pytest.approx(least) and found['utilization'] == pytest.approx(3 / least)
  assert (found['data'], found['seq'], found['gib'], found['exposed_bytes']) == (1, 64, 8.0, exposed)


def test_a_row_is_cut_alike_on_more_chips(monkeypatch):
  for topology in scaling.TOPOLOGIES:
    for length in scaling.PIECES:
      mesh = scaling.cut(topology, length)
      assert mesh['data'] * mesh['seq'] == fits.chips_of(topology) and length % (2 * mesh['seq']) == 0
  assert scaling.cut('v5p:8x8x8', 2**17) == dict(data=32, seq=16)
  assert scaling.cut('v5e:8x8', 2**22) == dict(data=1, seq=64)
  monkeypatch.chdir(ROOT)
  _, _, *arguments = fits.command('compile', 'v5p:8x8x8', '8B', 2**17, data=32, seq=16)
  found = parts(command_line.parse_with_config(main.define_flags, ['main', *arguments])[1])
  assert (found.mesh.data, found.mesh.seq, found.data.batch_size, found.data.length) == (32, 16, 32, 2**17)
  assert found.perplexity.batch_size == found.eval.batch_size == 32   # they are dealt over mesh.data too


def test_what_does_not_fit_is_said(monkeypatch):
  monkeypatch.setattr(fits, 'told', lambda *args, **mesh: compiled(fits=False))
  row = scaling.measure('v5e:8x8', 2**22)
  assert '| 4M | v5e:8x8 | 1 x 64 | 65,536 | 8.0 of 16 | does not fit |' in scaling.table([row])


def test_the_readme_has_the_table_of_scaling():
  assert f'{scaling.BEGIN}\n{scaling.table(scaling.read())}\n{scaling.END}' in fits.README.read_text()
