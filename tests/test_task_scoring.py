"""Scorers against cases whose scores are known, RULER's published rule among them."""

import difflib
import types

import pytest

from longctx.data.tasks import scoring

FRANCE = ('France', 'france', 'in France', 'the country of France')


def one(*references, **info):
  return types.SimpleNamespace(references=references, info=info)


@pytest.mark.parametrize('said, references, all_of, part_of', [
    ('France', FRANCE, 0.5, 1.0),             # NVIDIA's own 100 by part; lm-eval's mean would be 50
    ('  the COUNTRY of france.', FRANCE, 0.75, 1.0),
    ('Spain', FRANCE, 0.0, 0.0), ('', FRANCE, 0.0, 0.0),
    ('12, 34', ('12', '34', '56'), 2 / 3, 1.0),
    ('1234', ('123', '34'), 1.0, 1.0),        # inside a longer word too
    # control characters are line ends
    ('a\x00b', ('ab',), 0.0, 0.0), ('a\x1fb', ('a\nb',), 1.0, 1.0),
    ('\x07 red \x07', ('red',), 1.0, 1.0), ('ÉTÉ', ('été',), 1.0, 1.0),
])
def test_rulers_rules(said, references, all_of, part_of):
  assert scoring.match_all(said, one(*references)) == pytest.approx(all_of)
  assert scoring.match_part(said, one(*references)) == part_of


@pytest.mark.parametrize('said, score', [
    ('12345', 1), (' 12345. Remember', 1), ('the key is 12345', 1), ('123456', 0), ('1 12345', 0),
    ('', 0),
    ('no number', 0), ('012345', 0)])
def test_the_first_number_counts(said, score):
  assert scoring.first_number(said, one('12345')) == score


@pytest.mark.parametrize('said, score', [(' Anna', 1), ('Anna\nBob', 1), ('Bob Anna', 0), ('', 0)])
def test_an_answer_starts_with_it(said, score):
  assert scoring.starts_with(said, one('Anna')) == score


@pytest.mark.parametrize('said, score', [
    (' Anna', 1), ('It was Anna, not Bob', 1), ('Bob or Anna', 0), ('Bobby and Anna', 1),
    ('Annabel', 0),
    ('anna', 0), ('', 0)])
def test_the_choice_that_is_named_first_counts(said, score):
  assert scoring.first_choice(said, one('Anna', choices=('Anna', 'Bob'))) == score


def test_what_follows_the_last_mark_is_compared():
  text = 'It rains in the old town, and nobody minds the bells. ' * 5
  other = 'Quite unlike: zebra fjord! ' * 9
  score = lambda said: scoring.after_mark(said, one(text, mark='Xy7'))
  for said in (f'Xy7 {text}', f'thinking Xy7 {other} Xy7{text}', f' Xy7\n\n{text}\n'):
    assert score(said) == 1
  assert score(text) == score('') == score(f'xy7 {text}') == 0
  assert score('Xy7') == 0
  assert score(f'Xy7 {text[:135]}') == pytest.approx(2 * 135 / (135 + 269))
  # As published: from 200 letters of answer on, common letters begin no run. A judge without that
  # rule says more.
  plain = difflib.SequenceMatcher(None, text.strip(), other.strip(), autojunk=False).ratio()
  assert score(f'Xy7 {other}') == 0
  assert plain > 0.2
