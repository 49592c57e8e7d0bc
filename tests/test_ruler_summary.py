"""Averages and effective lengths of rows of RULER's published table (its README at c3f5e3b), and
scores beside published ones."""

import pytest

from longctx.data.tasks.table import Text
from longctx.errors import ConfigError
from longctx.evaluation import ruler_published
from longctx.evaluation.records import Cell, Interval, cells
from longctx.evaluation.ruler_summary import average, compared, effective_length, weighted_average

LENGTHS = [4096 * 2**i for i in range(6)]
# Model: (scores of 4K to 128K, average, wAvg. (inc), wAvg. (dec), effective length).
TABLE = {
    'Jamba-1.5-large': ((96.7, 96.6, 96.4, 96.0, 95.4, 95.1), 96.0, 95.7, 96.3, 131072),
    'GPT-4-1106-preview': ((96.6, 96.3, 95.2, 93.2, 87.0, 81.2), 91.6, 89.0, 94.1, 65536),
    'Llama3.1 (70B)': ((96.5, 95.8, 95.4, 94.8, 88.4, 66.6), 89.6, 85.5, 93.7, 65536),
    'Command-R-plus-0824': ((96.0, 95.1, 94.0, 92.4, 85.4, 64.6), 87.9, 83.4, 92.4, 32768),
    'MegaBeam-Mistral (7B)': ((93.8, 92.5, 92.0, 89.2, 83.7, 83.7), 89.1, 87.3, 91.0, 32768),
    'GradientAI/Llama3 (8B)': ((92.8, 90.3, 85.7, 79.9, 76.3, 69.5), 82.4, 78.5, 86.3, 16384),
    'Qwen1.5 (72B)': ((94.9, 93.8, 78.0, 67.8, 0.0, 0.0), 55.7, 37.5, 74.0, 8192),
    'InternLM2.5 (7B)': ((88.1, 85.5, 84.5, 82.7, 75.5, 68.9), 80.9, 77.8, 83.9, 4096),
    'LWM (7B)': ((82.3, 78.4, 73.7, 69.1, 68.1, 65.0), 72.8, 69.9, 75.7, None),
}


@pytest.mark.parametrize('model', TABLE)
def test_rows_of_the_published_table(model):
  scores, mean, rising, falling, effective = TABLE[model]
  # In any order of the lengths; scores are published to 0.05, and so are the averages.
  row = dict(reversed([*zip(LENGTHS, scores)]))
  assert average(row) == pytest.approx(mean, abs=0.1)
  assert weighted_average(row, rising=True) == pytest.approx(rising, abs=0.1)
  assert weighted_average(row, rising=False) == pytest.approx(falling, abs=0.1)
  assert effective_length(row) == effective


def test_an_effective_length_reaches_the_threshold_itself():
  row = {4096: 90.0, 8192: 85.6, 16384: 85.5}
  assert effective_length(row) == 8192
  assert effective_length(row, threshold=85.5) == 16384
  assert effective_length({4096: 98.4, 131072: 85.6}) == 131072   # Qwen3-32B's in the table


def test_scores_that_are_none_are_refused():
  with pytest.raises(ConfigError, match='has no score'):
    average({})
  with pytest.raises(ConfigError, match=r'scores_by_length\[4096\]=101: must be at least 0'):
    effective_length({4096: 101})


def cell(task, length, score):
  interval = None if score is None else Interval(score, score, score)
  return Cell(task, length, interval, None, None, 0 if score is None else 10, 10 if score is None else 0)


# Means of the thirteen at 4,096 as RULER's README has them: 96.6 and 92.2 (Phi3-mini).
RULER = ('niah_single_1', 'niah_single_2', 'niah_single_3', 'niah_multikey_1', 'niah_multikey_2',
         'niah_multikey_3', 'niah_multivalue', 'niah_multiquery', 'vt', 'cwe', 'fwe', 'qa_1', 'qa_2')


def test_thirteen_tasks_are_summed_up_beside_the_published_models():
  found = [cell(f'ruler_{name}', length, score) for name in RULER
           for length, score in ((4096, 1.0 if name != 'vt' else 0.35), (512, 0.9), (16384, 0.5 if name != 'qa_2' else None))]
  table, among = compared([cell('passkey', 4096, 1.0), *found])
  assert table.columns == [
      'task', '512', '4,096', '16,384', 'published: GPT-4-1106-preview at 4096', 'published: Phi-3-mini-128k at 4096',
      'published: Phi-3-mini-128k at 8192', 'published: Phi-3-mini-128k at 16384']
  assert table.rows[8] == ['ruler_vt', '90.0', '35.0', '50.0', '100.0', '97.1', '99.3', '99.3']
  assert table.rows[12] == ['ruler_qa_2', '90.0', '100.0', '-', '70.0', '54.2', '53.0', '50.2']
  # 16,384 has no score of one task, and so no mean.
  assert table.rows[13][:6] == ['mean of 13', '90.0', '95.0', '-', '96.6', '92.2'] and len(table.rows) == 14
  # (90 + 95) / 2; (90 + 2 * 95) / 3; (2 * 90 + 95) / 3
  assert table.notes[1:] == [
      "RULER's summary over 2 lengths: average 92.5, wAvg. (inc) 93.3, wAvg. (dec) 91.7, effective length 4,096 "
      "(the longest whose mean is at least 85.6, Llama-2-7B-chat's at 4,096)."]
  assert table.markdown().splitlines()[2:4] == ['| ' + ' | '.join(table.columns) + ' |', '| --- |' + ' ---: |' * 7]


  assert among.columns == ['model', '512', '4,096', '8,192', '16,384', '32,768', '65,536', '131,072']
  assert among.rows[0] == ['this one', '90.0', '95.0', '-', '-', '-', '-', '-']
  row = next(row for row in among.rows if row[0] == 'GPT-4-1106-preview')
  assert row == ['GPT-4-1106-preview', '-', '96.6', '96.3', '95.2', '93.2', '87.0', '81.2']
  assert among.rows[1][0].startswith('Llama2') and among.rows[1][1:] == ['-', '85.6', *'-----']
  assert len(among.rows) == 1 + len(ruler_published.MEANS) and 'NVIDIA/RULER at c3f5e3b' in among.notes[0]
  assert 'this one' in among.markdown() and '-syn' not in among.markdown() + table.markdown()
  made_up = [c._replace(text=Text('x in place of y', False, True)) if c.task.endswith(('vt', 'qa_1')) else c for c in found]
  table, among = compared(made_up)
  assert [row[0] for row in table.rows][8:] == [
      'ruler_vt-syn', 'ruler_cwe', 'ruler_fwe', 'ruler_qa_1-syn', 'ruler_qa_2', 'mean of 13, 2 -syn']
  assert among.rows[0][0] == 'this one, 2 -syn'
  assert all('Tasks marked -syn were put here in other text' in one.notes[0] for one in (table, among))


# As published, of all models but Llama2 (7B), which has one length and none.
AVERAGES = (
    96.0, 95.8, 95.7, 95.0, 94.6, 93.9, 93.7, 93.1, 91.8, 91.6, 91.6, 89.6, 89.1, 86.0, 87.9, 85.9, 87.4,
    88.9, 89.9, 88.3, 88.9, 88.3, 89.1, 80.5, 86.5, 81.9, 87.5, 85.2, 84.2, 84.8, 81.5, 80.4, 82.4, 75.5,
    80.9, 68.4, 66.2, 69.6, 72.8, 56.3, 55.7, 50.3, 49.1, 36.3)


def test_the_published_means_have_the_published_averages():
  """A figure that was copied wrongly by 0.6 or more is seen."""
  (first, *_), rest = ruler_published.MEANS.items(), dict(list(ruler_published.MEANS.items())[1:])
  assert first == ('Llama2 (7B)', (85.6,)) and len(rest) == len(AVERAGES)
  said = {name: average(dict(zip(LENGTHS, scores))) - mean for (name, scores), mean in zip(rest.items(), AVERAGES)}
  # Which the README has as 95.7, of six scores whose mean is 95.2.
  assert said.pop('Qwen2.5-14B-Instruct-1M* (14B)') == pytest.approx(-0.5)
  assert all(abs(difference) < 0.1 for difference in said.values()), said
  for name, (scores, *_) in TABLE.items():
    assert sum(name.split(' (')[0] in known and scores == found for known, found in ruler_published.MEANS.items()) == 1


def test_other_seeds_than_the_published_one_are_told():
  notes = lambda task, seed: compared([cell(task, 4096, 0.9)._replace(seed=seed)])[0].notes[0]
  said = 'Its bytes are those of eval.seed=42; here it is 0: '
  assert said in notes('ruler_compat_vt', 0) and 'eval.seed' not in notes('ruler_vt', 0)
  assert 'eval.seed' not in notes('ruler_compat_vt', 42) + notes('ruler_compat_vt', None)
  line = dict(task='ruler_compat_vt', length=4096, index=0, score=1.0, too_long=False, seed=0)
  assert said in compared(cells([line]))[0].notes[0]


def test_a_part_of_the_tasks_is_called_so_and_forms_are_kept_apart():
  exact, balanced, arena = compared([
      cell('ruler_vt', 4096, 0.5), cell('lra_text', 4000, 0.7), cell('lra_image', 4000, None),
      cell('ruler_compat_vt', 4096, 0.9)])
  assert balanced.rows[0][:2] == ['ruler_vt', '50.0'] and exact.rows[0][:2] == ['ruler_compat_vt', '90.0']
  assert 'effective length none' in balanced.notes[1] and 'effective length 4,096' in exact.notes[1]
  assert balanced.notes[1].endswith('Of 1 of the 13 tasks: not to be compared with means of all.')
  assert arena.columns == ['task', '4,000', 'published: Transformer at 1024', 'published: Transformer at 4000']
  assert arena.rows == [['lra_text', '70.0', '-', '64.3'], ['lra_image', '-', '42.4', '-'], ['mean of 2', '-', '-', '-']]
  assert compared([cell('passkey', 4096, 1.0), cell('ruler_of_old', 512, 1.0)]) == []
