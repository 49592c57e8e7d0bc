"""Synthetic tasks: hand-made examples, properties of every draw, the same draw from the same seed."""

import numpy as np
import pytest

from longctx.data.tasks import token_batches
from longctx.data.tasks.token_batches import TASKS, UNSCORED
from longctx.errors import ConfigError


def draw(name, rows=200, length=0, seed=0):
  length = length or (60 if name == 'segment_rewrite' else 64)
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


def test_noise_of_mqar_holds_as_many_keys_as_is_said():
  """Read token by token: a key in the noise, and a question behind one of its own."""
  rows, behind, tokens, targets = 0, 0, *draw('mqar', rows=2000)
  for row, answers in zip(tokens.tolist(), targets.tolist()):
    keys, strays, found = set(row[0:16:2]), set(), 0
    for token, answer in zip(row[16:], answers[16:]):
      if answer != UNSCORED:
        found += token in strays
      elif token in keys:
        strays.add(token)
    rows, behind = rows + bool(strays), behind + found
  # Of 40 tokens of noise each is one of 8 keys among 256 symbols: 1 - (1 - 8 / 256) ** 40 = 0.719
  assert abs(rows / 2000 - 0.72) < 0.03 and abs(behind / 16000 - 0.042) < 0.006
  assert '72 %' in token_batches.mqar.__doc__ and '4.2 %' in token_batches.mqar.__doc__


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
      p = token_batches.PERMUTATIONS[token]
      things = [p[thing] for thing in things]
      assert tuple(things) == token_batches.PERMUTATIONS[answer]
  assert not np.array_equal(token_batches.PRODUCT, token_batches.PRODUCT.T)   # the order matters


@pytest.mark.parametrize('name, times', [('segment_recall', 1), ('segment_rewrite', 2)])
def test_the_last_value_of_each_key_is_asked(name, times):
  """Read by hand, pair after pair: a pair never lies across two segments of two tokens."""
  tokens, targets = draw(name, rows=50, length=10 * (times + 1) * 2)
  for row, answers in zip(tokens, targets):
    memory, writes, asked = {}, 0, []
    for (key, said), (nothing, answer) in zip(row.reshape(-1, 2), answers.reshape(-1, 2)):
      assert key < 32 <= said <= 48 and nothing == UNSCORED
      if said < 48:
        assert answer == UNSCORED and not asked   # all is written before anything is asked
        memory[key], writes = said, writes + 1
      else:
        assert answer == memory[key]
        asked.append(key)
    assert writes == 10 * times and sorted(asked) == sorted(memory) and len(memory) == 10
  orders = tokens[:, :20:2], tokens[:, -20::2]
  assert (orders[0] != orders[1]).any(1).all()


def test_a_key_is_rewritten_with_another_value_in_another_order():
  tokens, _ = draw('segment_rewrite')
  first, second = tokens[:, 0:20:2], tokens[:, 20:40:2]
  assert (np.sort(first, 1) == np.sort(second, 1)).all() and (first != second).any(1).all()
  # Whose first value is said is right by chance alone.
  values = lambda keys, low: np.take_along_axis(tokens[:, low + 1:low + 20:2], np.argsort(keys, 1), 1)
  same = (values(first, 0) == values(second, 20)).mean()
  assert 0.03 < same < 0.1


@pytest.mark.parametrize('segments', [1, 2, 5])
def test_the_passkey_lies_in_one_segment_before_the_last(segments):
  tokens, targets = draw('passkey', rows=400, length=64 * segments)
  places = []
  for row, answers in zip(tokens, targets):
    at, question = np.flatnonzero(row == 42)
    key = row[at + 1:at + 6]
    assert len(set(key)) == 5 and key.max() < 10 and question == 64 * segments - 5
    assert at + 5 < question and at // 64 == (at + 5) // 64
    assert answers[question:].tolist() == key.tolist() and (answers[:question] == UNSCORED).all()
    assert row[question + 1:].tolist() == key[:4].tolist()
    others = np.delete(row, [*range(at, at + 6), *range(question, question + 5)])
    assert others.min() >= 10 and others.max() < 42
    places.append(at)
  found = np.bincount(np.array(places) // 64, minlength=segments)
  before = max(1, segments - 1)
  assert found[before:].sum() == 0 and found[:before].min() > 0.7 * 400 / before
  assert {0, 53 if segments == 1 else 58} <= {at % 64 for at in places}   # to the edges


@pytest.mark.parametrize('name', TASKS)
def test_draws(name):
  task = TASKS[name]
  first, again, other = draw(name), draw(name), draw(name, seed=1)
  for a, b, c in zip(first, again, other):
    assert a.shape == (200, 60 if name == 'segment_rewrite' else 64) and a.dtype == np.int32
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
  for length in (10, 132):
    with pytest.raises(ConfigError, match=rf'segment_recall: length={length}: must be 4 tokens for'):
      draw('segment_recall', length=length)
  with pytest.raises(ConfigError, match=r'passkey: length=65: must be segments of 64'):
    draw('passkey', length=65)
  with pytest.raises(ConfigError, match=r'selective_copy: length=10.*at least twice items=8'):
    draw('selective_copy', length=10)
