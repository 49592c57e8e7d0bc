"""Laws of every text task: exact length in any tokenizer, seeds, scores, needles, depths, floors,
haystacks.

A task joins by its entry in the table. What cannot hold for it is said here, once, with the reason.
"""

import functools
import hashlib
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from longctx.data import tokenizer
from longctx.data.tasks import example, haystack
from longctx.data.tasks.table import TASKS
from longctx.errors import ConfigError

ROOT = pathlib.Path(__file__).parent.parent
# Of ruler_compat_* lengths are bounds and examples come one after another, as in what they repeat
# byte for byte: tests/test_task_ruler_compat.py.
# What reads a benchmark's own files is held by the tests of its file, with such files.
NAMES = sorted(name for name in TASKS if TASKS[name].exact and 'files' not in TASKS[name].reads)
MANY = 48                      # examples by which depths and floors are judged
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
  if found[0] is None:
    return
  if name not in NOT_UNIFORM:
    found, grid = np.sort(found), np.arange(MANY + 1) / MANY
    assert max(np.abs(found - grid[1:]).max(), np.abs(found - grid[:-1]).max()) < SURE
  asked = np.linspace(0, 1, 6)
  met = [draw(name, 4 * long(name), depth=depth) for depth in asked]
  assert np.abs([one.depth for one in met] - asked).max() < 0.08
  starts = [one.needles[0][0] for one in met]
  assert starts == sorted(set(starts))


@pytest.mark.parametrize('name', NAMES)
def test_a_guesser_scores_the_floor(name):
  task, half = TASKS[name], MANY // 2
  assert 0 <= task.floor < 1
  if 'choices' in many(name)[0].info:
    scores = [np.mean([task.score(said, one) for said in one.info['choices']])
              for one in many(name)]
    sure = 3.5 * np.std(scores) / np.sqrt(MANY) + 1e-9
  else:
    said = [one.target.decode() for one in many(name)]
    scores = [task.score(max(set(said[:half]), key=said[:half].count), one)
              for one in many(name)[half:]]
    # once by chance, if hardly ever
    sure = 3.5 * np.sqrt(task.floor * (1 - task.floor) / half) + 1.5 / half
  assert task.floor - sure <= np.mean(scores) <= task.floor + sure


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
  with pytest.raises(ConfigError,
                     match=r"^eval\.haystack='.*none\*': no file matches; give a glob"):
    draw(name, length, haystack=f'{books}/none*')


@pytest.mark.parametrize('name', NAMES)
def test_paragraphs_are_read_where_the_task_says_so(name):
  try:
    same = draw(name, short(name), paragraphs='none*.json') == draw(name, short(name))
  except ConfigError as e:
    same = not str(e).startswith("eval.paragraphs='none*.json': no file matches")
  assert same == ('paragraphs' not in TASKS[name].reads)
