"""Laws of every text task: exact length in any tokenizer, seeds, scores, needles, depths, floors,
haystacks.

A task joins by its entry in the table. What cannot hold for it is said here, once, with the reason.
"""

import functools
import hashlib
import os
import pathlib
import re
import string
import subprocess
import sys

import numpy as np
import pytest

from longctx.data import tokenizer
from longctx.data.tasks import example, haystack, paragraphs, words
from longctx.data.tasks.table import TASKS
from longctx.errors import ConfigError

ROOT = pathlib.Path(__file__).parent.parent
# Of ruler_compat_* lengths are bounds and examples come one after another, as in what they repeat
# byte for byte: tests/test_task_ruler_compat.py.
# What reads a benchmark's own files is held by the tests of its file, with such files.
NAMES = sorted(name for name in TASKS if TASKS[name].exact and 'files' not in TASKS[name].reads)
MANY = 48                      # examples by which depths are judged
SURE = 1.95 / np.sqrt(MANY)    # Kolmogorov's bound, passed by chance once in a thousand

BABILONG = [name for name in NAMES if name.startswith('babilong_')]
# The answer's words stand outside the needles too, so that what they mean must be understood.
ELSEWHERE = {
    **dict.fromkeys(['ruler_qa_1', 'ruler_qa_2'], 'other documents may tell the same of another '
                                                  'town'),
    **dict.fromkeys(BABILONG, 'other facts tell of the same places, people and things'),
    'induction': 'the letter is also one of the noise',
    'selective_copy': 'each capital is a needle, and the reference is all of them',
}
# The depth that is drawn where none is asked for is not uniform.
NOT_UNIFORM = {
    **dict.fromkeys(BABILONG, 'all facts are scattered evenly, the needed ones in their order'),
    'ruler_vt': 'its first needle is the first of five',
    'selective_copy': 'its first needle is the first of eight',
}
PROSE = ('Call me what you like, she said. The old road went down to the harbour! Did anybody see '
         'it? Each of the '
         'boats had a lamp at its bow, and none of the lamps was lit. We counted them twice. "So '
         'many," he said. ')
OTHER_SCRIPTS = {
    'greek': 'Ο ήλιος έδυε αργά πάνω από το λιμάνι. Κανείς δεν μίλησε; Τα πλοία γύρισαν. ',
    'chinese': '春天来了，花都开了。他沿着河走了很远！谁在那里？没有人回答。',
    'emoji': 'Done \U0001f600\U0001f680. Again \U0001f469\u200d\U0001f680! Über ſtraße… ',
}


@functools.cache
def small_sentencepiece():
  text = (PROSE + haystack.GRASS.decode() + ''.join(OTHER_SCRIPTS.values())) * 30
  text += haystack.noise(np.random.default_rng(0), 40_000).decode()
  import tempfile
  with tempfile.NamedTemporaryFile(suffix='.model') as file:
    file.write(tokenizer.train_sentencepiece([text.encode()], 700))
    file.flush()
    return tokenizer.load_tokenizer(file.name)


TOKENIZERS = {'bytes': functools.cache(tokenizer.Bytes), 'sentencepiece': small_sentencepiece}


def draw(name, length, index=0, tok='bytes', **kwargs):
  return example.example(name, TASKS[name], TOKENIZERS[tok](), length=length, index=index, **kwargs)


@functools.cache
def least(name, tok='bytes'):
  """The least length, as the task itself says it."""
  with pytest.raises(ConfigError, match=r'length=8: must be at least \d+') as caught:
    draw(name, 8, tok=tok)
  return int(re.search(r'at least (\d+)', str(caught.value)).group(1))


def short(name, tok='bytes'):
  return least(name, tok) * 5 // 4 + 64   # other examples need more than that of the error


def long(name):
  return least(name) * 3 + 1024


@functools.cache
def many(name):
  return [draw(name, long(name), index) for index in range(MANY)]


def outside_needles(one):
  cuts = [0, *(at for needle in sorted(one.needles) for at in needle), one.question]
  return b' '.join(one.prompt[start:stop] for start, stop in zip(cuts[::2], cuts[1::2])).decode()


@pytest.mark.parametrize('tok', TOKENIZERS)
@pytest.mark.parametrize('name', NAMES)
def test_an_example_has_exactly_the_tokens_asked_for(name, tok):
  for length, index in ((short(name, tok), 0), (short(name, tok) + 1, 1), (long(name), 2)):
    one, encode = draw(name, length, index, tok=tok), TOKENIZERS[tok]().encode
    assert 1 + len(encode(one.prompt)) + one.new_tokens == length
    assert len(encode(one.target)) <= one.new_tokens
    assert 0 < one.question <= len(one.prompt)


@pytest.mark.parametrize('name', NAMES)
def test_an_example_is_what_its_seed_says(name):
  length = short(name)
  one, again, other = draw(name, length), draw(name, length), draw(name, length, index=1)
  assert one == again
  assert len({one.prompt, other.prompt, draw(name, length, seed=1).prompt}) == 3


def digests(names):
  """A digest of three examples of each task, the last one drawn first."""
  drawn = {}
  for name in reversed(names):
    for index in (2, 1, 0):
      drawn[name, index] = draw(name, short(name), index, seed=5)
  return [hashlib.sha256(repr([drawn[name, index] for index in range(3)]).encode()).hexdigest()
          for name in names]


def test_another_process_draws_the_same_in_any_order():
  seed = '1' if os.environ.get('PYTHONHASHSEED') != '1' else '2'
  done = subprocess.run(
      [sys.executable, '-c', 'from tests import test_tasks as t; print(*t.digests(t.NAMES[::-1]))'],
      cwd=ROOT,
      env={**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHONHASHSEED': seed}, capture_output=True,
      text=True)
  assert done.returncode == 0, done.stderr
  here = digests(NAMES)
  there = dict(zip(NAMES[::-1], done.stdout.split(), strict=True))
  assert {name for name, one in zip(NAMES, here) if there[name] != one} == set()


@pytest.mark.parametrize('name', NAMES)
def test_the_right_answer_scores_one_and_no_answer_nothing(name):
  for one in many(name)[:8]:
    assert TASKS[name].score(one.target.decode(), one) == 1
    assert TASKS[name].score('', one) == 0
    assert TASKS[name].score(one.without_context.decode(), one) < 1


@pytest.mark.parametrize('name', NAMES)
def test_needles_hold_the_answer_and_nothing_else_does(name):
  for one in many(name)[:8]:
    assert all(0 <= start < stop <= one.question for start, stop in one.needles)
    if not one.needles:
      assert one.depth is None
      continue
    said = ' '.join(one.prompt[start:stop].decode() for start, stop in one.needles)
    if name in ELSEWHERE:
      continue
    assert [ref for ref in one.references if ref in outside_needles(one)] == []
    if name not in SPREAD:
      assert [ref for ref in one.references if ref not in said] == []


# The reference is made of what stands in several needles.
SPREAD = {'mqar': 'four pairs', 'segment_recall': 'four pairs', 'segment_rewrite': 'four pairs'}


@pytest.mark.parametrize('name', NAMES)
def test_depths_are_uniform_and_where_they_were_asked_for(name):
  found = [one.depth for one in many(name)]
  assert (found[0] is not None) == TASKS[name].placed
  if not TASKS[name].placed:   # nor is anything else at the depth
    assert draw(name, long(name), depth=0.0) == draw(name, long(name), depth=1.0)
    return
  if name not in NOT_UNIFORM:
    found, grid = np.sort(found), np.arange(MANY + 1) / MANY
    assert max(np.abs(found - grid[1:]).max(), np.abs(found - grid[:-1]).max()) < SURE
  asked = np.linspace(0, 1, 6)
  met = [draw(name, 4 * long(name), depth=depth) for depth in asked]
  assert np.abs([one.depth for one in met] - asked).max() < 0.08
  starts = [one.needles[0][0] for one in met]
  assert starts == sorted(set(starts))


GUESSED = 200   # examples by which guessing is judged: no model is needed, a length that just fits will do
WITH_CHOICES = [name for name in NAMES if 'choices' in draw(name, short(name)).info]
# Whose examples do not all have as many choices, all alike likely; the score of naming one varies.
VARIED = {*(f'babilong_qa{number}' for number in (5, 7, 8, 20)), 'mrcr_2', 'mrcr_4', 'mrcr_8'}


@pytest.mark.parametrize('name', WITH_CHOICES)
def test_who_names_any_choice_scores_the_floor(name):
  task = TASKS[name]
  made = [draw(name, short(name), index) for index in range(GUESSED // 2 if 'mrcr' in name else GUESSED)]
  scores = [np.mean([task.score(said, one) for said in one.info['choices']]) for one in made]
  if name in VARIED:
    assert np.std(scores) > 0
    assert abs(np.mean(scores) - task.floor) < 3.5 * np.std(scores) / np.sqrt(len(made))
    return
  np.testing.assert_allclose(scores, task.floor, rtol=1e-12)
  places = [one.info['choices'].index(one.references[0]) for one in made]
  assert even(places, len(made[0].info['choices'])), 'one choice is right more often than another'


def even(drawn, options):
  """Whether numbers below `options` may have been drawn evenly: Pearson's statistic, six deviations."""
  counts = np.bincount(drawn, minlength=options)
  expected = len(drawn) / options
  return ((counts - expected) ** 2 / expected).sum() <= options - 1 + 6 * np.sqrt(2 * (options - 1))


DIGIT, LETTER, HEX = string.digits, string.ascii_lowercase, '0123456789abcdef'
whole_number = lambda digits: [DIGIT[1:], *[DIGIT] * (digits - 1)]   # without a zero before it
UUID = [*[HEX] * 8, '-', *[HEX] * 4, '-', '4', *[HEX] * 3, '-', '89ab', *[HEX] * 3, '-', *[HEX] * 12]   # version 4
TOWN = (range(1100, 2000), paragraphs.GOODS, paragraphs.RIVERS, paragraphs.MONTHS)
values_of = lambda one: [re.sub(r' ?[a-z]{3}=', '', one.references[0])]
# What an answer is drawn from, symbol by symbol; and how many guesses one who guesses has, each of which is
# right wherever it is said: as many as answers are asked for.
SPELT = {
    'passkey': (whole_number(5), 1), 'niah': (whole_number(7), 1), 'niah_multi': (whole_number(7), 2),
    'corpus_in_context': (whole_number(6), 1), 'json_kv': (UUID, 1),
    'mqar': ([DIGIT] * 4, 1), 'segment_recall': ([DIGIT] * 4, 1), 'segment_rewrite': ([DIGIT] * 4, 1),
    'selective_copy': ([LETTER.upper()] * 8, 1), 'induction': ([LETTER], 1),
    'parity': ([('odd', 'even')], 1), 's3': ([('abc', 'acb', 'bac', 'bca', 'cab', 'cba')], 1),
    'ruler_vt': ([LETTER.upper()] * 5, 5), 'ruler_fwe': ([LETTER] * 6, 3),
    'ruler_cwe': ([words.vocabulary()], 10),
    **{f'ruler_niah_{name}': (whole_number(7), count) for name, count in dict(
        single_1=1, single_2=1, multikey_1=1, multikey_2=1, multivalue=4, multiquery=4).items()},
    **{f'ruler_niah_{name}': (UUID, 1) for name in ('single_3', 'multikey_3')},
}
OTHERWISE = {'listops': 'tests/test_task_reasoning.py', **dict.fromkeys(
    ('ruler_qa_1', 'ruler_qa_2'), 'tests/test_task_questions.py')}


def test_every_floor_is_held_by_a_test():
  assert sorted([*WITH_CHOICES, *SPELT, *OTHERWISE]) == NAMES


@pytest.mark.parametrize('name', SPELT)
def test_the_floor_is_what_guessing_each_symbol_expects(name):
  alphabets, guesses = SPELT[name]
  assert TASKS[name].floor == pytest.approx(guesses * np.prod([1 / len(a) for a in alphabets]), rel=1e-9, abs=0)
  said = []
  for index in range(GUESSED):
    one = draw(name, short(name), index)
    said += values_of(one) if name in ('mqar', 'segment_recall', 'segment_rewrite') else one.references
  for answer in said:
    assert len(alphabets) == 1 or len(answer) == len(alphabets)
  for place, alphabet in enumerate(alphabets):
    drawn = np.array([alphabet.index(answer if len(alphabets) == 1 else answer[place]) for answer in said])
    few = min(len(alphabet), 26)   # of thousands of words, in as many parts
    assert even(drawn * few // len(alphabet), few), f'symbol {place} is not drawn evenly'


@pytest.fixture(scope='module')
def books(tmp_path_factory):
  folder = tmp_path_factory.mktemp('books')
  numbered = lambda text: ''.join(f'{text} Line {i} of them all ends here. ' for i in range(40))
  for name, text in {'prose': PROSE, **OTHER_SCRIPTS}.items():
    (folder / f'{name}.txt').write_text(numbered(text))
  return folder


@pytest.mark.parametrize('name', NAMES)
def test_any_text_can_be_the_haystack(name, books):
  for tok, files in (('bytes', 'prose'), ('sentencepiece', 'greek'), ('sentencepiece', 'emoji'),
                     ('bytes', 'chinese')):
    length = short(name, tok) + 512
    own, one = (draw(name, length, tok=tok, haystack=hay) for hay in ('', f'{books}/{files}.txt'))
    encoded = TOKENIZERS[tok]().encode(one.prompt)
    assert 1 + len(encoded) + one.new_tokens == length
    one.prompt.decode('utf-8')   # no character is cut
    assert (one == own) == ('haystack' not in TASKS[name].reads)
    if one == own:
      return
    assert ' Line ' in one.prompt.decode()
    assert TASKS[name].score(one.target.decode(), one) == 1
  for setting in ('eval.{}', 'data.task_{}', '--{}'):   # the one that its user knows
    with pytest.raises(ConfigError, match=rf"^{setting.format('haystack')}='.*none\*': no file matches; give a glob"):
      draw(name, length, haystack=f'{books}/none*', setting=setting)


@pytest.mark.parametrize('name', NAMES)
def test_paragraphs_are_read_where_the_task_says_so(name):
  try:
    same = draw(name, short(name), paragraphs='none*.json') == draw(name, short(name))
  except ConfigError as e:
    same = not str(e).startswith("eval.paragraphs='none*.json': no file matches")
  assert same == ('paragraphs' not in TASKS[name].reads)
