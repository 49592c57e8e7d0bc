"""Laws of every text task: exact length in any tokenizer, seeds, a right answer scores 1, needles where said."""

import numpy as np
import pytest

from longctx.data.tasks import example
from longctx.data.tasks.table import TASKS
from longctx.data.tokenizer import Bytes
from longctx.errors import ConfigError

NAMES = sorted(TASKS)


def draw(name, length=4096, index=0, **kwargs):
  return example.example(name, TASKS[name], Bytes(), length=length, index=index, **kwargs)


@pytest.mark.parametrize('name', NAMES)
def test_an_example_is_what_its_seed_says(name):
  one, again, other = draw(name), draw(name), draw(name, index=1)
  assert one == again and one.prompt != other.prompt
  assert draw(name, seed=1).prompt != one.prompt


@pytest.mark.parametrize('name', NAMES)
def test_the_right_answer_scores_one_and_the_empty_one_nothing(name):
  for index in range(3):
    one = draw(name, index=index)
    assert TASKS[name].score(one.target.decode(), one) == 1
    assert TASKS[name].score('', one) == 0


@pytest.mark.parametrize('name', NAMES)
def test_the_answer_fits_and_is_not_in_the_question(name):
  for index in range(3):
    one = draw(name, index=index)
    assert len(one.target) <= one.new_tokens
    assert TASKS[name].score(one.without_context.decode(), one) < 1


@pytest.mark.parametrize('name', NAMES)
def test_what_is_too_short_is_refused_with_the_least_length(name):
  with pytest.raises(ConfigError, match=r'length=8: must be at least \d+'):
    draw(name, length=8)


def test_the_depth_is_where_it_was_asked_for():
  depths = np.linspace(0, 1, 11)
  found = [draw('passkey', depth=d).depth for d in depths]
  assert np.abs(np.array(found) - depths).max() < 0.03


def test_a_needle_stands_whole_between_two_sentences():
  one = draw('passkey')
  (start, stop), = one.needles
  assert one.prompt[start:stop].startswith(b'The pass key is ') and one.prompt[start - 2:start] in (b'. ', b'.\n')
