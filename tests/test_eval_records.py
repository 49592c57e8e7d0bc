"""Lines, intervals and the table: against tables and by hand, and what a kill leaves behind."""

import json
import math

import pytest

from longctx.errors import ConfigError
from longctx.evaluation import records


@pytest.mark.parametrize('right, n, low, high', [
    # Wilson's interval at 95 %, of published tables (Newcombe 1998, Statistics in Medicine 17, table I)
    (81, 263, .2553, .3662), (15, 148, .0624, .1605), (0, 20, .0, .1611), (1, 29, .0061, .1718)])
def test_wilson(right, n, low, high):
  found = records.interval([1.0] * right + [0.0] * (n - right))
  assert found.mean == pytest.approx(right / n)
  assert (round(found.low, 4), round(found.high, 4)) == (low, high)


def test_the_interval_of_partial_scores_is_that_of_as_many_right_by_the_same_mean():
  # By hand, z = 1.959964, n = 12: 0.5 -+ z / (1 + z z / 12) * sqrt(1 / 48 + z z / 576) = 0.5 -+ 0.24622
  for scores in ([0.5] * 12, [0.25, 0.75] * 6, [0.0, 1.0] * 6):
    assert records.interval(scores) == (0.5, pytest.approx(0.25378, abs=1e-5), pytest.approx(0.74622, abs=1e-5))
  # n = 4, mean 0.9: (0.9 + 0.480182 -+ z * sqrt(0.0225 + 0.0600228)) / 1.960365
  assert records.interval([0.9] * 4) == (pytest.approx(0.9), pytest.approx(0.41684, abs=1e-5),
                                         pytest.approx(0.99125, abs=1e-5))
  assert records.interval([0.5]) == (0.5, pytest.approx(0.05462, abs=1e-5), pytest.approx(0.94538, abs=1e-5))


@pytest.mark.parametrize('usual, seldom', [(0.5, 0.0), (0.5, 1.0), (0.1, 0.9), (0.9, 0.0), (1.0, 0.4)])
def test_an_interval_holds_the_mean_of_who_is_seldom_otherwise(usual, seldom):
  """How often, exactly: of 20 scores that are mostly alike, k are others with a binomial probability."""
  for p in (0.01, 0.03, 0.1, 0.3):
    truth, held = usual + (seldom - usual) * p, 0.0
    for k in range(21):
      found = records.interval([usual] * (20 - k) + [seldom] * k)
      held += (found.low <= truth <= found.high) * math.comb(20, k) * p ** k * (1 - p) ** (20 - k)
    assert held > 0.92


KEYS = dict(passkey='k')   # of each task


def line(index, score=1.0, task='passkey', length=512, key='k', **more):
  return dict(key=key, task=task, length=length, index=index, score=score, too_long=False) | more


def test_lines_are_kept_and_a_torn_one_is_dropped(tmp_path):
  kept = records.Records(tmp_path, KEYS)
  kept.append([line(0), line(1, 0.0)])
  kept.append([line(2)])
  path = tmp_path / 'tasks.jsonl'
  whole = path.read_bytes()
  for torn in (b'{"key": "k", "ta', json.dumps(line(3)).encode()):   # the second lacks its line end alone
    path.write_bytes(whole + torn)
    again = records.Records(tmp_path, KEYS)
    assert list(again.lines) == [('passkey', 512, 0), ('passkey', 512, 1), ('passkey', 512, 2)]
    assert path.read_bytes() == whole
  again.append([line(3)])
  assert path.read_bytes() == whole + json.dumps(line(3)).encode() + b'\n'


def test_lines_of_another_evaluation_are_kept_apart(tmp_path):
  records.Records(tmp_path, dict(passkey='a')).append([line(0, key='a')])
  records.Records(tmp_path, dict(niah='b')).append([line(0, task='niah', key='b')])
  other = records.Records(tmp_path, dict(passkey='b'))
  assert other.lines == {}
  other.append([line(0, 0.0, key='b')])
  assert len((tmp_path / 'tasks.jsonl').read_text().splitlines()) == 3
  assert records.Records(tmp_path, dict(passkey='a')).lines['passkey', 512, 0]['score'] == 1.0
  # Of each task its own key.
  assert set(records.Records(tmp_path, dict(passkey='b', niah='b')).lines) == {('passkey', 512, 0), ('niah', 512, 0)}
  assert set(records.Records(tmp_path, dict(passkey='a', niah='a')).lines) == {('passkey', 512, 0)}


def test_a_line_that_is_not_ours_is_an_error_with_its_number(tmp_path):
  records.Records(tmp_path, KEYS).append([line(0)])
  with open(tmp_path / 'tasks.jsonl', 'a') as file:
    file.write('hello\n')
  with pytest.raises(ConfigError, match=r'tasks\.jsonl: line 2 is no line of an evaluation'):
    records.Records(tmp_path, KEYS)


def test_only_one_process_writes(tmp_path):
  kept = records.Records(tmp_path, KEYS, enabled=False)
  kept.append([line(0)])
  kept.write_table('x')
  assert kept.lines and not list(tmp_path.iterdir())


def test_a_disk_that_takes_nothing_ends_in_one_line(tmp_path):
  (tmp_path / 'tasks.jsonl').mkdir()
  kept = records.Records.__new__(records.Records)
  kept.path, kept.enabled, kept.lines = tmp_path / 'tasks.jsonl', True, {}
  with pytest.raises(ConfigError, match='cannot be written'):
    kept.append([line(0)])


def test_the_table_says_what_was_asked():
  lines = [line(i, float(i < 3), control_score=0.0, answer_logprob=-2.0 * i) for i in range(4)]
  lines += [line(i, None, length=4096, too_long=True) for i in range(2)]
  found = records.cells(lines)
  assert [(c.task, c.length, c.count, c.too_long, c.control, c.logprob) for c in found] == [
      ('passkey', 512, 4, 0, 0.0, -3.0), ('passkey', 4096, 0, 2, None, None)]
  assert records.table(found, {'passkey': 1 / 90_000}).splitlines() == [
      '| task | length | score, % | 95 % interval | guessing | without context | nats of the answer | n | '
      'too long |', '| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |',
      '| passkey | 512 | 75.0 | 30.1 to 95.4 | 0.001 | 0.0 | 3.000 | 4 | 0 |',
      '| passkey | 4,096 | - | - | 0.001 | - | - | 0 | 2 |']
  plain = records.table(records.cells([line(0)]), {'passkey': 0.0})
  assert 'control' not in plain and 'without context' not in plain and 'too long' not in plain
