"""Synthetic tasks: hand-made examples, properties of every draw, the same draw from the same seed."""

import numpy as np
import pytest

from longctx.data import tasks
from longctx.data.tasks import TASKS, UNSCORED
from longctx.errors import ConfigError


def draw(name, rows=200, length=64, seed=0):
  return TASKS[name].make(np.random.default_rng(seed), rows, length)


def test_every_key_of_mqar_is_asked_once_and_answered_by_its_value():
  tokens, targets = draw('mqar')
  for row, answers in zip(tokens, targets):
    value_of = dict(zip(row[0:16:2].tolist(), row[1:16:2].tolist()))
    asked = np.flatnonzero(answers != UNSCORED)
    assert len(value_of) == len(asked) == 8 and (asked >= 16).all() and (asked % 2 == 0).all()
    assert sorted(row[asked].tolist()) == sorted(value_of)
    assert [value_of[k] for k in row[asked].tolist()] == answers[asked].tolist()
    assert max(value_of) < 128 <= min(value_of.values())


def test_questions_of_mqar_follow_the_power_law():
  """Slot n is asked in proportion to 1/n nearly: the first far more often than the last."""
  _, targets = draw('mqar', rows=4000)
  asked = (targets[:, 16::2] != UNSCORED).mean(0)
  assert asked[0] > 0.95 and asked[0] > asked[3] > asked[-1] and 0.1 < asked[-1] < 0.4


def test_selective_copy_asks_for_the_data_in_their_order():
  tokens, targets = draw('selective_copy')
  for row, answers in zip(tokens, targets):
    data = row[row >= 2]
    assert len(data) == 8 and (row[-8:] == 1).all() and (row[:-8] != 1).all()
    assert answers[-8:].tolist() == data.tolist() and (answers[:-8] == UNSCORED).all()
  where = (tokens[:, :-8] >= 2).mean(0)
  assert where.max() - where.min() < 0.2   # anywhere, alike


def test_parity_by_hand():
  tokens, targets = draw('parity', rows=3, length=9)
  for row, answers in zip(tokens, targets):
    assert [row[:i + 1].sum() % 2 for i in range(9)] == answers.tolist()


def test_s3_applies_permutations_to_things():
  """Things are moved about one permutation after the other; the product moves them so at once."""
  tokens, targets = draw('s3', rows=20, length=12)
  for row, answers in zip(tokens, targets):
    things = [0, 1, 2]
    for token, answer in zip(row, answers):
      p = tasks.PERMUTATIONS[token]
      things = [p[thing] for thing in things]
      assert tuple(things) == tasks.PERMUTATIONS[answer]
  assert not np.array_equal(tasks.PRODUCT, tasks.PRODUCT.T)   # the order matters


@pytest.mark.parametrize('name', TASKS)
def test_draws(name):
  task = TASKS[name]
  first, again, other = draw(name), draw(name), draw(name, seed=1)
  for a, b, c in zip(first, again, other):
    assert a.shape == (200, 64) and a.dtype == np.int32
    assert (a == b).all() and (a != c).any()
  tokens, targets = first
  assert tokens.min() >= 0 and max(tokens.max(), targets.max()) < task.vocab_size
  counts = np.bincount(targets[targets != UNSCORED], minlength=task.vocab_size)
  answers = counts[counts > 0]
  if name != 'mqar':   # whose chance is to pick one of the values in the row
    assert len(answers) == round(1 / task.chance)
    assert answers.max() < 1.3 * answers.mean()


def test_rows_without_room_are_refused():
  with pytest.raises(ConfigError, match=r'mqar: length=20.*room for 8 pairs twice'):
    draw('mqar', length=20)
  with pytest.raises(ConfigError, match=r'selective_copy: length=10.*at least twice items=8'):
    draw('selective_copy', length=10)
