"""Reasoning: answers against solvers that read the text back, floors against what guessing gives."""

import random
import re
import statistics

import numpy as np
import pytest

from longctx.data.tasks import example, listops
from longctx.data.tokenizer import Bytes

NESTED = '[MAX 4 3 [MIN 2 3 ] 1 0 [SM 8 9 2 ] ]'


def reduced(text):
  """The value of a ListOps text, from the inside out."""
  of = {'MIN': min, 'MAX': max, 'MED': lambda xs: int(statistics.median(xs)), 'SM': lambda xs: sum(xs) % 10}
  while '[' in text:
    text, count = re.subn(r'\[(\w+) ([\d ]+) \]', lambda m: str(of[m[1]]([int(x) for x in m[2].split()])), text)
    assert count
  return int(text)


def depth_of(text):
  deep = np.cumsum([(word[0] == '[') - (word == ']') for word in text.split()])
  assert deep[-1] == 0 and deep.min() == 0
  return int(deep.max())


def draw(name, task, length=1000, index=0, **kwargs):
  return example.example(name, task, Bytes(), length=length, index=index, **kwargs)


def expression(one):
  return one.prompt[:one.question].decode().split('\n')[1]


def test_listops_by_hand():
  assert reduced(NESTED) == 9 and reduced('[MED 1 2 4 9 ]') == 3 and reduced('[MED 5 0 ]') == 2
  assert reduced('[SM 9 9 [MED 3 4 ] ]') == 1 and depth_of(NESTED) == 2


@pytest.mark.parametrize('length', [142, 300, 2000])
def test_the_value_of_the_lists_that_are_written(length):
  task = listops.TASKS['listops']
  for index in range(12):
    one = draw('listops', task, length, index)
    text = expression(one)
    assert one.target == b' %d' % reduced(text) and one.prompt.endswith(b'\nIts value is')
    assert depth_of(text) <= 9   # ten levels with the digits
    assert all(len(part.split()) >= 4 for part in re.findall(r'\[[^\[\]]*\]', text))
    assert length < 1000 or len(text) > 0.8 * length


def test_trees_of_long_range_arena_have_its_sizes_and_its_labels():
  rng = np.random.default_rng(0)
  trees = [listops.tree(rng, 500, 2000) for _ in range(150)]
  sizes = [len(text.split()) for text, _ in trees]
  assert min(sizes) > 500 and max(sizes) < 2000 and max(depth_of(text) for text, _ in trees) == 9
  assert all(value == reduced(text) for text, value in trees[:20])
  arguments = re.findall(r'\[\w+((?: \d)+) \]', ' '.join(text for text, _ in trees))
  counts = [len(found.split()) for found in arguments]
  assert min(counts) == 2 and max(counts) == 10
  names = re.findall(r'\[(\w+)', ' '.join(text for text, _ in trees))
  for name in ('MIN', 'MAX', 'MED', 'SM'):
    assert abs(names.count(name) / len(names) - 0.25) < 0.02
  # Lists among all things but the roots: one in four at nine of ten levels.
  assert 0.13 < (len(names) - len(trees)) / (sum(sizes) - 2 * len(names)) < 0.27


def grown(rng, depth, size):
  """The value of a tree that is grown as the paper says, one thing after the other; its symbols in size[0]."""
  if depth == 10 or rng.random() > 0.25:
    size[0] += 1
    if size[0] >= 2000:
      raise OverflowError
    return rng.randrange(10)
  size[0] += 2
  things = [grown(rng, depth + 1, size) for _ in range(rng.randint(2, 10))]
  return rng.choice([min, max, lambda of: int(statistics.median(of)), lambda of: sum(of) % 10])(things)


@pytest.mark.slow
def test_labels_are_those_of_trees_grown_one_thing_after_the_other():
  count, other, rng = 3000, [], random.Random(0)
  while len(other) < count:
    size = [0]
    try:
      value = grown(rng, 1, size)
    except OverflowError:
      continue
    if size[0] > 500:
      other.append(value)
  draws = np.random.default_rng(1)
  ours = np.bincount([listops.tree(draws, 500, 2000)[1] for _ in range(count)], minlength=10) / count
  theirs = np.bincount(other, minlength=10) / count
  assert (np.abs(ours - theirs) < 4 * np.sqrt(2 * theirs * (1 - theirs) / count)).all()
  floor = listops.TASKS['listops'].floor
  assert abs(max(theirs) - floor) < 4 * np.sqrt(floor * (1 - floor) / count)


def test_the_floor_of_listops_is_that_of_always_zero():
  # 0 and 9 are as frequent as each other, and together twice the floor.
  task, count = listops.TASKS['listops'], 200
  drawn = [draw('listops', task, 3000, index) for index in range(count)]
  hits = np.mean([task.score('0', one) + task.score('9', one) for one in drawn])
  both = 2 * task.floor
  assert abs(hits - both) < 3.5 * np.sqrt(both * (1 - both) / count)


def test_longer_texts_have_deeper_trees():
  one = draw('listops', listops.TASKS['listops'], 20_000)
  assert len(expression(one)) > 16_000 and one.target == b' %d' % reduced(expression(one))
