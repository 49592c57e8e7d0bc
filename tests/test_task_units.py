"""Prompts of whole units: exact in any tokenizer, as many as fit, golds where their depths say."""

import functools
import re

import numpy as np
import pytest

from longctx.data.tasks import units
from longctx.data.tasks.example import Draw
from longctx.data.tokenizer import Bytes
from longctx.errors import ConfigError


class Awkward:
  """Tokens go over the ends of words, 'b c' is one, so that a cut changes those before it."""

  def encode(self, data):
    return np.array(re.findall(rb'[a-z] [a-z]|[A-Za-z0-9]{1,4}|.', data, re.DOTALL), object)


class Each:
  """So many bytes a token, from the start of the text: what stands near a cut says not all of it."""

  def __init__(self, size):
    self.size = size

  def encode(self, data):
    return np.zeros(-(-len(data) // self.size))


def draw(length, tok):
  return Draw(rng=np.random.default_rng(0), tokenizer=tok, length=length, index=0)


@functools.cache
def words(n):
  rng = np.random.default_rng(1)
  return [bytes(rng.integers(97, 123, size=rng.integers(1, 30)).astype(np.uint8)) for _ in range(n)]


def fitted(length, tok, made=4096, **kwargs):
  pool = words(made)
  return units.fitted(draw(length, tok), 'a task', lay=lambda n: b'HEAD ' + b' '.join(pool[:n]),
                      tail=lambda n: b' ' + pool[n], after=b' tail?', **{'new_tokens': 7, **kwargs})


@pytest.mark.parametrize('tok', [Bytes(), Awkward(), Each(2), Each(3)])
def test_prompts_have_exactly_the_tokens_asked_for_and_as_many_units_as_fit(tok):
  pool = words(4096)
  count = lambda n: len(tok.encode(b'HEAD ' + b' '.join(pool[:n]) + b' tail?'))
  for length in (40, 41, 99, 100, 101, 1000, 3001, 3002):
    prompt, n = fitted(length, tok)
    assert 1 + len(tok.encode(prompt)) + 7 == length
    assert count(n) <= length - 8 < count(n + 1)
    begin = b'HEAD ' + b' '.join(pool[:n])
    assert prompt.startswith(begin) and prompt.endswith(b' tail?')
    left = prompt[len(begin):-len(b' tail?')].rstrip(b'.').rstrip(b' ')
    assert (b' ' + pool[n]).startswith(left.split(b' .')[0])


def test_few_counts_of_a_long_prompt_are_needed():
  calls = []

  class Counted(Bytes):
    def encode(self, data, name=''):
      calls.append(len(data))
      return super().encode(data, name)

  fitted(30_000, Counted())
  assert sum(size > 20_000 for size in calls) <= 8


def test_what_is_too_short_says_what_would_do():
  with pytest.raises(ConfigError, match=r'a task: length=18: must be at least 19 .* .7 of them'):
    fitted(18, Bytes())
  assert fitted(19, Bytes())[1] == 0


def test_units_that_come_to_an_end_are_no_endless_loop():
  with pytest.raises(AssertionError, match='came to an end'):
    fitted(100_000, Bytes(), made=16)


def test_every_gap_between_units_is_as_likely():
  others = [b'0', b'1', b'2']
  for depth, gap in ((0.0, 0), (0.249, 0), (0.251, 1), (0.74, 2), (0.76, 3), (1.0, 3)):
    found, places = units.among(others, [b'gold'], [depth])
    assert places == [gap] and found == [*others[:gap], b'gold', *others[gap:]]


def test_golds_of_one_gap_stand_in_the_order_of_their_depths():
  found, places = units.among([b'x', b'y'], [b'A', b'B', b'C'], [0.9, 0.35, 0.5])
  assert found == [b'x', b'B', b'C', b'y', b'A'] and places == [4, 1, 2]
  assert units.spans(found, places, b'--', 10) == [(22, 23), (13, 14), (16, 17)]
  whole = b'*' * 10 + b'--'.join(found)
  assert [whole[a:b] for a, b in units.spans(found, places, b'--', 10)] == [b'A', b'B', b'C']


def test_a_pool_makes_its_units_once_and_in_order():
  made = iter(range(100))
  pool = units.Pool(lambda: [b'%d' % next(made) for _ in range(3)])
  assert pool[4] == b'4' and pool.first(2) == [b'0', b'1']
  assert pool.first(7)[-1] == b'6' and pool[0] == b'0'
  assert next(made) == 9
