"""Intervals of held-out scores: by documents, against NumPy and loops, and whether they hold the truth."""

import json
import math

import jax
import numpy as np
import pytest
from flax import nnx

from longctx.data.tokenizer import Bytes
from longctx.evaluation import course, longppl, perplexity, ratio, result
from longctx.parallel import mesh
from tests import oracles, test_eval_course, test_longppl, toy_models
from tests.test_perplexity import SEP, VOCAB, Documents, evaluate, make_documents

SIZES = [1, 40, 7, 16, 17, 33, 2, 8, 100]
STUDENT = {1: 12.706205, 2: 4.302653, 3: 3.182446, 4: 2.776445, 5: 2.570582, 10: 2.228139, 30: 2.042272,
           1000: 1.962339}


def half_of(x_D, y_D):
  """By definition; None where documents are too few."""
  x_D, y_D = np.array(x_D, np.float64), np.array(y_D, np.float64)
  n = np.count_nonzero(y_D)
  if n < 2 or (worth := y_D.sum()**2 / (y_D**2).sum()) < 1.25:
    return None
  residual_D = x_D - x_D.sum() / y_D.sum() * y_D
  error = math.sqrt(n / (n - 1) * (residual_D**2).sum()) / y_D.sum()
  return ratio.student(max(1, worth - 1)) * error


def by_document(rows, sizes):
  """{bin or None: [(nats, tokens, bytes) of each document]} of (document, input, position, nats)."""
  sums = {}
  for d, i, position, nats in rows:
    for index in (None, test_longppl.bin_of(position)):
      of = sums.setdefault(index, np.zeros((len(sizes), 3)))
      of[d] += nats, 1, i + 1 < sizes[d]
  return sums


def check(score, sums):
  nats, tokens, num_bytes = sums.T
  for found, below in ((score.byte_half, num_bytes), (score.token_half, tokens)):
    expected = half_of(nats, below)
    assert (found is None) == (expected is None)
    if found is not None:
      np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)
  assert score.documents == (tokens > 0).sum()


@pytest.mark.parametrize('length, stride, segment, batch_size, seq', [
    (16, 5, 7, 3, 0), (16, 8, 64, 1, 0), (10, 1, 3, 4, 0), (64, 64, 16, 2, 0), (16, 5, 8, 4, 2)])
def test_intervals_are_those_of_documents(length, stride, segment, batch_size, seq):
  """Windows of a document stand in several batches, and several in one."""
  documents, layout = make_documents(SIZES), None
  model = toy_models.CountModel(VOCAB)
  graphdef, params = nnx.split(model)
  if seq:
    layout = mesh.make_layout(mesh.Config(data=2, seq=seq, layout='sequence'), jax.devices()[:2 * seq])
    params = layout.replicate(params)
  found = perplexity.evaluate(graphdef, params, Documents(documents), Bytes(), perplexity.Config(
      length=length, stride=stride, segment=segment, batch_size=batch_size), layout=layout)
  for mode, step in (('full', length), ('sliding', stride)):
    rows = oracles.windowed_scores(documents, length, step, lambda x, y: oracles.count_model_nll(x, y, VOCAB))
    sums = by_document(rows, SIZES)
    check(found.passes[mode].total, sums[None])
    assert found.passes[mode].total.byte_half > 0
    for i, score in enumerate(found.passes[mode].bins):
      check(score, sums.get(i, np.zeros((1, 3))))


@pytest.mark.parametrize('chunk', [1 << 18, 50])
def test_intervals_of_key_tokens_and_gains_are_those_of_documents(chunk, monkeypatch):
  monkeypatch.setattr(longppl, 'CHUNK', chunk)
  documents = test_longppl.repetitive([700, 500, 7, 1, 620]) + make_documents([150, 90])
  found = evaluate(toy_models.CountModel(VOCAB), documents, short_context=16, short_stride=4, batch_size=3)
  keys, by_bin = found.keys, {}
  of_keys = np.zeros((2, len(documents)))
  for d, document in enumerate(documents):
    for position, full, less in test_longppl.expected([document], 0, 16, 4):
      for index in (None, test_longppl.bin_of(position)):
        by_bin.setdefault(index, np.zeros((2, len(documents))))[:, d] += less - full, 1
      if less - full > 2 and full < 2:
        of_keys[:, d] += full, 1
  half = half_of(*of_keys)
  assert half > 0 and keys.key_half == pytest.approx(half, rel=1e-4)
  assert keys.key_documents == np.count_nonzero(of_keys[1]) == 4
  assert keys.all_gain_half == pytest.approx(half_of(*by_bin[None]), rel=1e-4)
  expected = [half_of(*by_bin[i]) for i in range(len(keys.tokens))]
  np.testing.assert_allclose(keys.gain_half, np.array(expected, np.float64), rtol=1e-3, atol=1e-5)
  assert not np.isnan(keys.gain_half).any()   # of three documents of about one size
  told = json.loads(json.dumps(found.to_json(), allow_nan=False))['key_tokens']
  loss = math.log(keys.perplexity)
  assert told['perplexity_low'] == pytest.approx(math.exp(max(0, loss - half)), rel=1e-4)
  assert told['perplexity_high'] == pytest.approx(math.exp(min(2, loss + half)), rel=1e-4)
  assert told['gain_high'] - told['gain'] == pytest.approx(keys.all_gain_half)
  row = told['positions'][9]
  assert row['gain'] - row['gain_low'] == pytest.approx(keys.gain_half[9]) and row['documents'] == 3   # of 256 tokens and more
  assert f'({told["perplexity_low"]:,.3f} to {told["perplexity_high"]:,.3f} with 95 % confidence)' in found.table()
  assert [line.split()[-1] for line in found.keys.table().splitlines()[2:]] == [
      f'{x:.4f}' for x in (*keys.gain_half, keys.all_gain_half)]


@pytest.mark.parametrize('documents, spread', [(3, 0.5), (10, 0.0), (10, 1.0), (30, 1.5), (200, 1.0)])
def test_the_interval_holds_the_truth(documents, spread):
  """Of 500 texts; sizes are log-normal, and each document has a loss of its own about 2 nats."""
  rng, held, drawn = np.random.default_rng(0), 0, 0
  while drawn < 500:
    sizes = np.ceil(np.exp(rng.normal(5, spread, documents)))
    nats = sizes * rng.normal(2, 0.5, documents)
    sums = ratio.Moments(2, 1)
    sums.add(np.stack([nats, sizes], 1)[:, :, None])
    half = sums.half_widths(0, 1)[-1]
    if half is None:   # no interval is given
      continue
    drawn, held = drawn + 1, held + (abs(nats.sum() / sizes.sum() - 2) <= half)
  assert 0.90 <= held / drawn <= 0.99


def test_students_quantile():
  for freedom, expected in STUDENT.items():
    assert ratio.student(freedom) == pytest.approx(expected, rel=1e-3)
  assert 6.016663 <= ratio.student(1.5) < 1.03 * 6.016663   # between whole numbers: not too few


@pytest.mark.parametrize('sizes', [[200], [200, 9]], ids=['one', 'one of nearly all'])
def test_too_few_documents_have_no_interval(sizes):
  found = evaluate(toy_models.CountModel(VOCAB), make_documents(sizes), length=64, short_context=16, batch_size=2)
  for one in found.passes.values():
    assert one.total.byte_half is None and one.total.token_half is None
  told = json.loads(json.dumps(found.to_json(), allow_nan=False))
  for name in ('bits_per_byte', 'perplexity', 'loss'):
    assert told['modes']['full'][name] > 0 and told['modes']['full'][f'{name}_low'] is None
  assert told['key_tokens']['gain_low'] is None and told['key_tokens']['perplexity_high'] is None
  cells = next(line for line in found.table().splitlines() if line.startswith('all')).split()
  assert cells[3] == '-' and float(cells[2]) > 0


def test_documents_that_are_alike_have_an_interval_of_no_width():
  found = evaluate(toy_models.CountModel(VOCAB), [np.array([SEP, 97, 98, 97], np.uint16)] * 5, length=8)
  assert found.passes['full'].total.byte_half == pytest.approx(0, abs=1e-7)


def test_a_loss_that_is_not_finite_has_no_interval():
  for nats in (math.nan, math.inf):
    sums = ratio.Moments(2, 1)
    sums.add(np.array([[[nats], [0.0]], [[1.0], [3.0]], [[2.0], [3.0]]]))
    assert sums.half_widths(0, 1) == [None, None]


def test_no_end_of_an_interval_is_below_nothing():
  told = result.Score(nats=4.0, tokens=8, bytes=8, byte_half=1.0, token_half=1000.0).to_json()
  assert (told['bits_per_byte_low'], told['loss_low'], told['perplexity_low']) == (0, 0, 1)
  assert told['bits_per_byte_high'] == pytest.approx(1.5 / math.log(2)) and told['perplexity_high'] is None


@pytest.mark.parametrize('batches', [4, 11])
def test_intervals_of_a_killed_evaluation_are_the_same_bits(tmp_path, monkeypatch, batches):
  """Killed where documents are read in part."""
  monkeypatch.setattr(course.Course, 'EVERY', -1.0)
  monkeypatch.setattr(course.Course, 'SHARE', 1e9)
  whole = test_eval_course.by_position()
  with pytest.raises(test_eval_course.KilledError):
    test_eval_course.by_position(test_eval_course.killed_after(course.Course(tmp_path, 'a'), batches))
  found = test_eval_course.by_position(course.Course(tmp_path, 'a'))
  halves = lambda one: [(x.documents, x.byte_half, x.token_half) for mode in one.passes.values()
                        for x in (mode.total, *mode.bins)] + [one.keys.all_gain_half]
  assert halves(found) == halves(whole) and all(x is not None for x in halves(whole)[0])


def test_sums_of_an_earlier_version_are_not_used(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(course.Course, 'EVERY', -1.0)
  monkeypatch.setattr(course.Course, 'SHARE', 1e9)
  with monkeypatch.context() as earlier:
    earlier.setattr(course, 'FORMAT', course.FORMAT - 1)
    with pytest.raises(test_eval_course.KilledError):
      test_eval_course.by_position(test_eval_course.killed_after(course.Course(tmp_path, 'a'), 3))
    assert course.Course(tmp_path, 'a').before(0)[0] == 3
  test_eval_course.by_position(course.Course(tmp_path, 'a'))
  assert 'carries on' not in capsys.readouterr().out
