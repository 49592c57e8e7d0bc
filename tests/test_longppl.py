"""Key tokens and gains of a long context, against a model whose answer is known and loops."""

import json
import math

import numpy as np
import pytest

from longctx.errors import ConfigError
from longctx.evaluation import longppl, perplexity, windows
from tests import oracles, toy_models
from tests.test_perplexity import SEP, VOCAB, evaluate, make_documents


def scored(document, start, stop):
  """Nats of the count model for inputs start..stop of a document, read from an empty state."""
  targets = [*document[1:], document[0]]
  return oracles.count_model_nll(document[start:stop], targets[start:stop], VOCAB)


def expected(documents, length, short, stride):
  """[(position, full nats, short nats)] of every token; short contexts begin in the window."""
  rows = []
  for document in documents:
    for low in range(0, len(document), length or len(document)):
      high = min(low + (length or len(document)), len(document))
      full = scored(document, low, high)
      for i in range(low, high):
        # The first window inside that ends behind i.
        back = 0
        while low + back * stride + short <= i:
          back += 1
        start = low + back * stride
        rows.append((i - low, full[i - low], scored(document, start, i + 1)[-1]))
  return rows


def bin_of(position):
  return 0 if position == 0 else int(math.log2(position)) + 1


def repetitive(sizes):
  """Documents of one letter each: what has been seen for long is well foretold."""
  return [np.array([SEP] + [97 + i] * (size - 1), np.uint16) for i, size in enumerate(sizes)]


@pytest.mark.parametrize('length, short, stride, segment', [
    (0, 16, 4, 64), (300, 16, 4, 64), (300, 20, 7, 9), (128, 40, 40, 16)])
def test_keys_and_gains_are_those_of_the_definition(length, short, stride, segment):
  documents = repetitive([400, 7, 1, 130]) + make_documents([150])
  found = evaluate(toy_models.CountModel(VOCAB), documents, length=length, short_context=short,
                   short_stride=stride, segment=segment, batch_size=3).keys
  rows = expected(documents, length, short, stride)
  sums = [np.zeros(3) for _ in found.tokens]
  key = [full for _, full, less in rows if less - full > 2 and full < 2]
  for position, full, less in rows:
    sums[bin_of(position)] += [1, less - full > 2 and full < 2, less - full]
  np.testing.assert_array_equal(found.tokens, [one[0] for one in sums])
  np.testing.assert_array_equal(found.keys, [one[1] for one in sums])
  np.testing.assert_allclose(found.gain, [one[2] for one in sums], rtol=1e-4, atol=1e-3)
  assert found.share == pytest.approx(len(key) / len(rows))
  if key:
    assert found.perplexity == pytest.approx(math.exp(np.mean(key)), rel=1e-5)
  else:
    assert math.isnan(found.perplexity)


def test_one_letter_over_and_over():
  """After n of one letter, its nats are log((257 + n) / n); short contexts of 16 know 12 to 16."""
  found = evaluate(toy_models.CountModel(VOCAB), repetitive([1025]), short_context=16,
                   short_stride=1)
  # of SEP and n - 1 letters, and the next one: 1 + (n - 1) of 257 + n
  nats = lambda n: math.log((257 + n) / n)
  full = [nats(n) for n in range(1, 1025)]
  short = [nats(n) if n <= 16 else math.log((257 + 16) / 17) for n in range(1, 1025)]
  key = [a for a, b in zip(full, short) if b - a > 2 and a < 2]
  assert 700 < len(key) < 1000
  assert int(found.keys.keys.sum()) == len(key)
  assert found.keys.perplexity == pytest.approx(math.exp(np.mean(key)), rel=1e-5)
  assert found.keys.keys[:7].sum() == 0 and found.keys.keys[9] == 256   # all of 256 to 511
  assert f'{len(key):,} key tokens' in found.table()
  assert 'last 15 to 16 tokens alone' in found.table()
  told = json.loads(json.dumps(found.to_json(), allow_nan=False))['key_tokens']
  assert (told['keys'], told['short_context'], told['stride']) == (len(key), 16, 1)
  assert told['positions'][9]['keys'] == 256 and told['positions'][9]['gain'] > 2


def test_a_model_of_the_last_tokens_gains_nothing():
  found = evaluate(toy_models.TailModel(VOCAB), make_documents([200, 90]), length=128,
                   short_context=16,
                   segment=16, batch_size=2).keys
  assert (found.stride, int(found.keys.sum())) == (4, 0)
  np.testing.assert_allclose(found.gain, 0, atol=1e-3)
  assert math.isnan(found.perplexity)
  assert 'LongPPL - (none)' in found.table()
  told = json.loads(json.dumps(found.to_json(), allow_nan=False))
  assert told['perplexity'] is None and told['keys'] == 0


def test_the_other_passes_are_as_they_were():
  documents = make_documents([300, 40, 9])
  model = toy_models.CountModel(VOCAB)
  for modes in (('full', 'sliding'), ('sliding',)):
    settings = dict(length=64, segment=32, batch_size=2, modes=modes, max_tokens=320)
    plain, found = (evaluate(model, documents, **settings, **more)
                    for more in ({}, dict(short_context=20)))
    assert plain.keys is None and found.keys.tokens.sum() == 320
    assert list(plain.passes) == list(found.passes) == list(modes)
    for mode in modes:
      assert plain.passes[mode].bins == found.passes[mode].bins
    assert 'key_tokens' not in plain.to_json()


@pytest.mark.parametrize('short, stride', [(1, 1), (4, 1), (4, 4), (7, 3)])
def test_windows_inside_score_the_same_tokens_from_within(short, stride):
  full = windows.cut(np.array([1, 30, 0, 17]), 12, 12)
  found = longppl.inside(full, short, stride)
  covered = lambda one: [(d, i) for d, low, high in zip(one.document, one.scored, one.stop)
                         for i in range(low, high)]
  assert sorted(covered(found)) == sorted(covered(full))
  assert len(covered(found)) == len(set(covered(found)))
  for d, start, first, stop in zip(*found):
    assert stop - start <= short
    around = [(a, b) for e, a, b in zip(full.document, full.start, full.stop) if e == d
              and a <= start < b]
    (low, high), = around
    assert stop <= high
    assert start == low or first - start >= short - stride


def test_bins_follow_the_windows():
  full = windows.cut(np.array([1, 9, 4]), 5, 5)
  assert longppl.bins(full).tolist() == [0, 0, 1, 2, 2, 3, 0, 1, 2, 2, 0, 1, 2, 2]


def test_long_texts_are_compared_in_pieces(monkeypatch):
  rng = np.random.default_rng(0)
  full, short = rng.exponential(3, (2, 1000)).astype(np.float32)
  bins = rng.integers(0, 5, 1000).astype(np.int8)
  sizes = np.array([300, 0, 1, 1, 13, 685])
  whole = longppl.compare(full, short, bins, sizes, short=4, stride=1)
  monkeypatch.setattr(longppl, 'CHUNK', 7)
  pieces = longppl.compare(full, short, bins, sizes, short=4, stride=1)
  np.testing.assert_array_equal(whole.keys, pieces.keys)
  np.testing.assert_allclose(whole.gain, pieces.gain)
  np.testing.assert_array_equal(whole.documents, pieces.documents)
  np.testing.assert_allclose([*whole.gain_half, whole.all_gain_half, whole.key_half],
                             [*pieces.gain_half, pieces.all_gain_half, pieces.key_half])
  assert whole.key_nats == pytest.approx(pieces.key_nats) and whole.keys.sum() > 50


@pytest.mark.parametrize('settings, message', [
    (dict(short_context=-1), r'short_context=-1: must be at least 0'),
    (dict(short_context=4, short_stride=5), r'perplexity\.short_stride=5: must be at most '
                                            r'perplexity\.short_context=4'),
    (dict(short_context=0, short_stride=5), r'perplexity\.short_stride=5: must be at most '
                                            r'perplexity\.short_context=0')])
def test_mistakes(settings, message):
  with pytest.raises(ConfigError, match=message):
    perplexity.Config(**settings)


def test_a_short_context_must_be_shorter():
  for length, longest in ((16, 0), (0, 16)):
    with pytest.raises(ConfigError, match=r'perplexity\.short_context=16: must be less than '
                                          r'.*length, 16 tokens'):
      evaluate(toy_models.CountModel(VOCAB, max_length=longest), make_documents([40]),
               length=length,
               short_context=16)
