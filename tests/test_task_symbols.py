"""Symbols as text: what is asked is answered by reading the prompt back; floors by guessing."""

import re

import numpy as np
import pytest

from longctx.data.tasks import example, symbols
from longctx.data.tokenizer import Bytes

LENGTHS = (256, 1001, 5000)   # odd ones too, or zeros are as odd as ones


def draw(name, length=1000, index=0, **kwargs):
  return example.example(name, symbols.TASKS[name], Bytes(), length=length, index=index, **kwargs)


def parts(one):
  """(the line of instruction, the context, the question)."""
  head, context = one.prompt[:one.question].decode().split('\n', 1)
  return head, context, one.prompt[one.question:].decode()


def looked_up(context, question):
  """The last value of each key asked for."""
  said = {}
  for word in context.split():
    if '=' in word:
      key, value = word.split('=')
      said[key] = value
  return ' '.join(f'{key}={said[key]}' for key in question.strip(' \n:').split())


def walked(context):
  """One letter at a time, the moves spelt out by hand."""
  a, b, c = 'abc'
  for move in context:
    if move == 'l':
      a, b, c = b, c, a
    if move == 'r':
      a, b, c = c, a, b
    if move == 'x':
      a, b = b, a
    if move == 'y':
      b, c = c, b
    if move == 'z':
      a, c = c, a
  return a + b + c


SOLVERS = {
    'mqar': looked_up,
    'segment_recall': looked_up,
    'segment_rewrite': looked_up,
    'selective_copy': lambda context, question: re.sub('[^A-Z]', '', context),
    'induction': lambda context, question: re.search('#(.)', context)[1],
    'parity': lambda context, question: 'odd' if sum(map(int, re.sub('[^01]', '', context))) % 2 else 'even',
    's3': lambda context, question: walked(context),
}


@pytest.mark.parametrize('name', sorted(SOLVERS))
def test_the_prompt_read_back_gives_the_answer(name):
  for length in LENGTHS:
    for index in range(5):
      one = draw(name, length, index)
      _, context, question = parts(one)
      said = SOLVERS[name](context, question)
      assert one.references == (said,) and one.target.decode().strip() == said
      assert symbols.TASKS[name].score(said, one) == 1
      assert symbols.TASKS[name].score(said + ' and more', one) == 0
      assert symbols.TASKS[name].score(said[::-1] + '!', one) == 0


def test_moves_by_hand():
  assert symbols.moved('') == symbols.moved('e') == 'abc'
  assert symbols.moved('l') == 'bca' and symbols.moved('lll') == symbols.moved('rl') == 'abc'
  assert symbols.moved('lx') == 'cba' and symbols.moved('xl') == 'acb'   # the order of moves matters
  assert symbols.moved('x .') == 'bac'


@pytest.mark.parametrize('name, pattern', [('mqar', '[a-z]{3}=[0-9] '), ('segment_recall', '[a-z]{3}=[0-9] '),
                                           ('segment_rewrite', '[a-z]{3}=[0-9] '),
                                           ('selective_copy', '[A-Z] '), ('induction', '#[a-z] ')])
def test_needles_are_what_the_answer_is_read_from(name, pattern):
  for index in range(5):
    one = draw(name, index=index)
    for start, stop in one.needles:
      assert re.fullmatch(pattern, one.prompt[start:stop].decode())
    spelt = ' '.join(one.prompt[start:stop].decode().strip() for start, stop in one.needles)
    answer = one.references[0]
    assert spelt.replace('#', '') == (' '.join(answer) if name == 'selective_copy' else answer)
    begin = one.prompt.index(b'\n') + 1
    assert one.depth == (one.needles[0][0] - begin) / (one.question - begin)


@pytest.mark.parametrize('name', ['mqar', 'segment_recall', 'segment_rewrite', 'selective_copy', 'induction'])
def test_depths_are_where_they_are_asked_for(name):
  # The first of a key's two lines stands before the second; seven capitals stand after the first.
  for depth in (0.1, 0.35, 0.6, 0.85, 1.0):
    assert abs(draw(name, 4000, depth=depth).depth - depth) < 0.03


def test_every_line_holds_one_fact_and_a_key_is_never_written_with_the_same_value_again():
  for name, times in (('segment_recall', 1), ('segment_rewrite', 2)):
    _, context, _ = parts(draw(name, 3000))
    lines = context.split('\n')
    facts = [re.findall(r'(\w{3})=(\d)', line) for line in lines]
    assert all(len(fact) == 1 for fact in facts) and len(lines) == times * (3000 // (64 * times))
    keys = [fact[0][0] for fact in facts]
    assert all(keys.count(key) == times for key in keys)
    assert len({fact[0] for fact in facts}) == len(facts)


def test_a_longer_prompt_holds_more_pairs():
  pairs = [len(re.findall('=', parts(draw('mqar', length))[1])) for length in (320, 640, 6400)]
  assert pairs == [10, 20, 200]


@pytest.mark.parametrize('name', ['induction', 'parity', 's3'])
def test_floors_by_guessing(name):
  task, guesses = symbols.TASKS[name], {'induction': 'abcdefghijklmnopqrstuvwxyz', 'parity': ['odd', 'even'],
                                        's3': ['abc', 'acb', 'bac', 'bca', 'cab', 'cba']}[name]
  rng, count = np.random.default_rng(0), 1000
  scores = [task.score(guesses[rng.integers(len(guesses))], draw(name, 200, i)) for i in range(count)]
  assert abs(np.mean(scores) - task.floor) < 3 * np.sqrt(task.floor * (1 - task.floor) / count)


@pytest.mark.parametrize('name', ['mqar', 'segment_recall', 'segment_rewrite', 'selective_copy'])
def test_floors_of_answers_of_several_symbols_by_guessing_each(name):
  # All right by chance is too seldom to see: each symbol is, and they are guessed one by one.
  rng, hits = np.random.default_rng(0), []
  for index in range(250):
    symbols_said = re.sub('[a-z]{3}=| ', '', draw(name, 300, index).references[0])
    low, high = (65, 91) if name == 'selective_copy' else (48, 58)
    hits += [ord(symbol) == rng.integers(low, high) for symbol in symbols_said]
  chance = symbols.TASKS[name].floor ** (1 / len(symbols_said))
  assert abs(np.mean(hits) - chance) < 3 * np.sqrt(chance * (1 - chance) / len(hits))
