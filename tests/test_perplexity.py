"""Evaluation against a model whose loss is known exactly, and its counts, bins and failures."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.data.tokenizer import Bytes
from longctx.errors import ConfigError
from longctx.evaluation import perplexity, result, windows
from longctx.models import decoder, recurrent
from longctx.parallel import mesh
from tests import oracles, toy_models

VOCAB, SEP = 257, 256


def make_documents(lengths, seed=0):
  """Documents of these numbers of tokens (the separator is one), of few letters."""
  rng = np.random.default_rng(seed)
  return [np.concatenate([[SEP], rng.choice([97, 98, 98, 98, 99, 32], n - 1)]).astype(np.uint16)
          for n in lengths]


class Documents:
  """As longctx.data.stream.Documents, over arrays."""

  def __init__(self, arrays):
    self.arrays = arrays
    self.lengths = np.array([len(x) for x in arrays], np.int64)
    self.total_tokens = int(self.lengths.sum())

  def document(self, i):
    return self.arrays[i].astype(np.int32)


def evaluate(model, documents, layout=None, **settings):
  graphdef, params = nnx.split(model)
  return perplexity.evaluate(graphdef, params, Documents(documents), Bytes(),
                             perplexity.Config(**settings), layout=layout)


def expected(documents, length, stride, limit=None):
  """{bin: (nats, tokens, bytes)} of the count model, by loops."""
  rows = oracles.windowed_scores(documents, length, stride,
                                 lambda x, y: oracles.count_model_nll(x, y, VOCAB))
  sums = {}
  for number, (d, i, position, nats) in enumerate(sorted(rows)):
    if limit is not None and number >= limit:
      continue
    is_byte = i + 1 < len(documents[d])
    index = 0 if position == 0 else int(math.log2(position)) + 1
    old = sums.get(index, (0, 0, 0))
    sums[index] = (old[0] + nats, old[1] + 1, old[2] + is_byte)
  return sums


def check_pass(found, sums, rtol=2e-6):
  assert len(found.bins) == max(sums) + 1
  for i, score in enumerate(found.bins):
    nats, tokens, num_bytes = sums.get(i, (0, 0, 0))
    assert (score.tokens, score.bytes) == (tokens, num_bytes), f'bin {i}'
    np.testing.assert_allclose(score.nats, nats, rtol=rtol)
  np.testing.assert_allclose(found.total.nats, sum(s[0] for s in sums.values()), rtol=rtol)


LENGTHS = [1, 40, 7, 16, 17, 33, 2, 8, 100]


@pytest.mark.parametrize('segment', [1, 5, 16, 64])
@pytest.mark.parametrize('length, stride', [(16, 8), (16, 3), (16, 16), (10, 1), (64, 5), (200, 7)])
def test_loss_counts_and_bins_are_exact(segment, length, stride):
  documents = make_documents(LENGTHS)
  model = toy_models.CountModel(VOCAB)
  found = evaluate(model, documents, length=length, stride=stride, segment=segment, batch_size=4)
  assert list(found.passes) == ['full', 'sliding']
  check_pass(found.passes['full'], expected(documents, length, length))
  check_pass(found.passes['sliding'], expected(documents, length, stride))
  for one in found.passes.values():
    assert one.total.tokens == sum(LENGTHS)
    assert one.total.bytes == sum(LENGTHS) - len(LENGTHS)


def test_whole_documents_when_the_state_does_not_grow():
  documents = make_documents(LENGTHS)
  found = evaluate(toy_models.CountModel(VOCAB), documents, segment=16, batch_size=2)
  assert found.length == 0
  check_pass(found.passes['full'], expected(documents, 1000, 1000))
  assert found.passes['sliding'] is found.passes['full']  # the same windows, read once
  assert 'whole document' in found.table()
  assert 'sliding: the same windows' in found.table()
  assert found.stride == 0


def test_length_zero_is_the_models_max_length():
  documents = make_documents(LENGTHS)
  found = evaluate(toy_models.CountModel(VOCAB, max_length=20), documents, segment=8)
  assert (found.length, found.stride) == (20, 10)
  check_pass(found.passes['sliding'], expected(documents, 20, 10))


def test_the_growing_state_gets_enough_room():
  """TailModel says NaN beyond its capacity."""
  documents = make_documents([50, 3, 30])
  for segment in (7, 16, 64):
    found = evaluate(toy_models.TailModel(VOCAB), documents, length=30, segment=segment,
                     batch_size=2)
    assert found.passes['full'].total.not_finite == 0
    assert found.passes['sliding'].total.tokens == 83


@pytest.mark.parametrize('limit', [1, 5, 41, 60, 10_000])
def test_max_tokens_scores_the_same_prefix_in_both_modes(limit):
  documents = make_documents([40, 7, 33])
  found = evaluate(toy_models.CountModel(VOCAB), documents, length=16, stride=4, segment=8,
                   max_tokens=limit)
  for mode, stride in (('full', 16), ('sliding', 4)):
    check_pass(found.passes[mode], expected(documents, 16, stride, limit))
    assert found.passes[mode].total.tokens == min(limit, 80)


def test_context_helps_the_count_model_and_the_bins_show_it():
  documents = make_documents([600] * 4)
  found = evaluate(toy_models.CountModel(VOCAB), documents, length=512, segment=128, batch_size=2)
  bits = [score.bits_per_byte for score in found.passes['full'].bins]
  assert bits[0] > bits[4] > bits[7] > bits[9]
  assert found.passes['sliding'].total.bits_per_byte < found.passes['full'].total.bits_per_byte


@pytest.mark.parametrize('which', ['decoder', 'lstm'])
def test_segments_of_real_models_add_up_to_the_full_forward_pass(which):
  """Whole windows without a state, and segments with one, against logits by definition."""
  documents = make_documents([1, 30, 9, 44])
  if which == 'decoder':
    config = decoder.Config(max_length=20, num_layers=1, embed_dim=16, num_heads=2)
    model = decoder.Decoder(config.resolved(VOCAB), rngs=nnx.Rngs(0))
  else:
    config = recurrent.Config(vocab_size=VOCAB, num_layers=1, embed_dim=16, hidden_dim=16)
    model = recurrent.Recurrent(config, rngs=nnx.Rngs(0))
  graphdef, params = nnx.split(model)
  model = nnx.merge(graphdef, jax.tree.map(lambda x: 5 * x, params))
  forward = jax.jit(lambda tokens_BT: model.logits(model(tokens_BT, None)[0]))

  def nll_of(tokens, targets):
    padded = np.zeros((1, 20), np.int32)
    padded[0, :len(tokens)] = tokens
    logits = np.asarray(forward(padded))[0, :len(tokens)].astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(tokens)), targets]

  for segment in (6, 20):
    found = evaluate(model, documents, length=20, stride=7, segment=segment, batch_size=3)
    for mode, stride in (('full', 20), ('sliding', 7)):
      rows = oracles.windowed_scores(documents, 20, stride, nll_of)
      total = found.passes[mode].total
      np.testing.assert_allclose(total.nats, sum(row[3] for row in rows), rtol=2e-6)
      last = found.passes[mode].bins[5]
      np.testing.assert_allclose(last.nats, sum(row[3] for row in rows if row[2] >= 16), rtol=5e-6)


def test_uniform_model_has_the_entropy_of_a_uniform_choice():
  model = toy_models.CountModel(VOCAB)
  model.eye.set_value(jnp.zeros((VOCAB, VOCAB)))
  found = evaluate(model, make_documents([64, 64]), length=32, segment=16)
  total = found.passes['full'].total
  np.testing.assert_allclose(total.perplexity, VOCAB, rtol=1e-6)
  np.testing.assert_allclose(total.bits_per_byte, 128 * math.log2(VOCAB) / 126, rtol=1e-6)


def test_sums_do_not_lose_small_terms():
  """A float32 sum of a million terms of 0.1 is off in the third digit; float64 is not."""
  one = np.zeros(1, int)
  sums = perplexity._Sums(windows.Windows(one, one, one, one + 1), rows=1, bins=1)
  segment = perplexity._Segment(True, one, *[np.zeros((1, 1000), np.int32)] * 2,
                                *[np.ones((1, 1000), bool)] * 2, *[np.zeros((1, 1000), int)] * 2)
  for _ in range(1000):
    sums.add(segment, np.full((1, 1000), 0.1, np.float32), np.ones(1))
  sums.end_batch(one)
  np.testing.assert_allclose(sums.scores()[0].nats, 1e6 * float(np.float32(0.1)), rtol=1e-9)


def test_one_trace_for_all_batches_modes_and_evaluations():
  toy_models.TRACES.clear()
  model = toy_models.CountModel(VOCAB)
  for seed in range(3):
    evaluate(model, make_documents([50, 20, 9, 30], seed), length=24, segment=9, batch_size=3)
  assert toy_models.TRACES == [(3, 9)]


def test_live_memory_does_not_grow_with_the_document(monkeypatch):
  """Between two calls nothing is kept but one state and the scores of two segments."""
  live, add = [], perplexity._Sums.add
  def spy(self, *args):
    live.append(sum(x.nbytes for x in jax.live_arrays()))
    add(self, *args)
  monkeypatch.setattr(perplexity._Sums, 'add', spy)
  model, peaks = toy_models.CountModel(VOCAB), []
  for size in (200, 2000):
    live.clear()
    evaluate(model, make_documents([size]), segment=50, batch_size=1)
    assert len(live) == size // 50
    peaks.append(max(live))
  assert peaks[1] == peaks[0]


@pytest.mark.parametrize('data, seq', [(2, 1), (2, 2), (4, 2)])
def test_the_mesh_changes_nothing(data, seq):
  layout = mesh.make_layout(mesh.Config(data=data, seq=seq, layout='sequence'),
                            jax.devices()[:data * seq])
  documents = make_documents(LENGTHS)
  model = toy_models.CountModel(VOCAB)
  graphdef, params = nnx.split(model)
  params = layout.replicate(params)
  found = perplexity.evaluate(graphdef, params, Documents(documents), Bytes(),
                              perplexity.Config(length=16, segment=8, batch_size=4), layout=layout)
  check_pass(found.passes['full'], expected(documents, 16, 16))
  check_pass(found.passes['sliding'], expected(documents, 16, 8))


def test_a_window_that_the_mesh_cannot_cut_is_padded():
  layout = mesh.make_layout(mesh.Config(data=1, seq=4, layout='sequence'), jax.devices()[:4])
  documents = make_documents(LENGTHS)
  graphdef, params = nnx.split(toy_models.CountModel(VOCAB))
  found = perplexity.evaluate(
      graphdef, layout.replicate(params), Documents(documents), Bytes(),
      perplexity.Config(length=10, segment=64, batch_size=4), layout=layout)
  check_pass(found.passes['full'], expected(documents, 10, 10))


def test_batch_that_the_mesh_does_not_divide_is_refused():
  layout = mesh.make_layout(mesh.Config(data=2, seq=2, layout='sequence'), jax.devices()[:4])
  documents = make_documents([9])
  with pytest.raises(ConfigError, match=r'perplexity\.batch_size=3'):
    evaluate(toy_models.CountModel(VOCAB), documents, layout, length=8, batch_size=3)
  with pytest.raises(ConfigError, match=r'perplexity\.segment=7'):
    evaluate(toy_models.CountModel(VOCAB), documents, layout, length=8, segment=7)


def test_a_loss_that_is_not_finite_is_shown_and_located():
  model = toy_models.CountModel(VOCAB)
  model.eye.set_value(model.eye.get_value().at[99].set(jnp.nan))
  documents = [np.array([SEP, 97, 98], np.int32), np.array([SEP, 97, 99, 97], np.int32)]
  found = evaluate(model, documents, length=8, segment=4)
  total = found.passes['full'].total
  assert math.isnan(total.bits_per_byte)
  assert total.not_finite == 7
  assert 'nan' in found.table()
  assert '7 tokens have a loss that is not finite' in found.table()
  values = json.loads(json.dumps(found.to_json(), allow_nan=False))
  assert values['bits_per_byte'] is None
  assert values['modes']['full']['not_finite'] == 7


def test_json_holds_what_the_table_shows():
  documents = make_documents(LENGTHS)
  found = evaluate(toy_models.CountModel(VOCAB), documents, length=16, segment=8)
  values = json.loads(json.dumps(found.to_json(), allow_nan=False))
  full = values['modes']['full']
  assert values['length'] == 16
  assert values['stride'] == 8
  assert values['documents'] == len(LENGTHS)
  assert [(row['first'], row['last']) for row in full['positions']] == [
      (0, 0), (1, 1), (2, 3), (4, 7), (8, 15)]
  assert sum(row['tokens'] for row in full['positions']) == full['tokens'] == sum(LENGTHS)
  table = found.table().splitlines()
  for row, line in zip(full['positions'], table[3:]):
    cells = line.split()
    assert cells[0] == (str(row['first']) if row['first'] == row['last']
                        else f'{row["first"]}-{row["last"]}')
    assert int(cells[1].replace(',', '')) == row['tokens']
    assert abs(float(cells[2]) - row['bits_per_byte']) <= 5e-5
    half = (row['bits_per_byte_high'] - row['bits_per_byte_low']) / 2
    assert row['bits_per_byte_low'] > 0 and abs(float(cells[3]) - half) <= 5e-5
    assert abs(float(cells[4].replace(',', '')) - row['perplexity']) <= 5e-4
  assert values['modes']['sliding']['tokens_per_second'] > 0
  assert values['bits_per_byte'] == full['bits_per_byte']


def test_bins_that_sliding_reaches_at_the_starts_of_documents_alone_are_not_shown():
  found = evaluate(toy_models.CountModel(VOCAB), make_documents([1500]), length=16, segment=8)
  sliding = found.passes['sliding']
  assert [score.tokens for score in sliding.bins] == [1, 1, 2, 4, 1492]
  shown = [[cell.strip() for cell in (line[59:70], line[70:80], line[89:])]
           for line in found.table().splitlines()[3:8]]
  assert shown[:4] == [[str(n), '-', '-'] for n in (1, 1, 2, 4)]
  assert shown[4] == ['1,492', f'{sliding.bins[4].bits_per_byte:.4f}',
                      f'{sliding.bins[4].perplexity:.3f}']
  assert 'bins with under 1% of the tokens of sliding' in found.table()
  modes = found.to_json()['modes']
  assert [row['few'] for row in modes['sliding']['positions']] == [True] * 4 + [False]
  assert not any(row['few'] for row in modes['full']['positions'])   # of every window, all over
  # Where all documents are short their starts are what there is.
  found = evaluate(toy_models.CountModel(VOCAB), make_documents([9] * 300), length=16, segment=8)
  assert not any(row['few'] for row in found.to_json()['modes']['sliding']['positions'])
  assert 'bins with under' not in found.table()


def test_a_bin_of_separators_alone_has_no_bits_per_byte():
  found = evaluate(toy_models.CountModel(VOCAB), [np.array([SEP], np.int32)], length=8)
  score = found.passes['full'].total
  assert (score.tokens, score.bytes) == (1, 0)
  assert math.isnan(score.bits_per_byte)
  np.testing.assert_allclose(score.nats, math.log(258 / 2), rtol=1e-6)
  json.dumps(found.to_json(), allow_nan=False)
  assert '-' in found.table().splitlines()[3]


def test_perplexity_of_a_hopeless_model_is_infinite_not_an_error():
  assert result.Score(nats=1e6, tokens=1, bytes=1).perplexity == math.inf


@pytest.mark.parametrize('length, stride', [(1, 1), (4, 1), (4, 3), (8, 8), (5, 2)])
def test_windows_score_every_token_once_with_the_promised_context(length, stride):
  lengths = np.array([1, 0, 3, 4, 5, 8, 9, 23])
  seen = [np.zeros(n, int) for n in lengths]
  for d, start, scored, stop in zip(*windows.cut(lengths, length, stride)):
    assert stop - start <= length
    assert start <= scored < stop
    assert start % stride == 0
    assert start == 0 or scored - start >= length - stride
    seen[d][scored:stop] += 1
  assert all((one == 1).all() for one in seen)


def test_position_bins():
  assert windows.position_bin(np.array([0, 1, 2, 3, 4, 7, 8, 2**40 - 1, 2**40])).tolist() == [
      0, 1, 2, 2, 3, 3, 4, 40, 41]
  assert [windows.bin_edges(i) for i in range(4)] == [(0, 0), (1, 1), (2, 3), (4, 7)]


@pytest.mark.parametrize('settings, field', [
    (dict(length=-1), 'perplexity.length=-1'), (dict(segment=0), 'perplexity.segment=0'),
    (dict(batch_size=0), 'perplexity.batch_size=0'), (dict(stride=-2), 'perplexity.stride=-2'),
    (dict(length=8, stride=9), 'perplexity.stride=9'), (dict(modes=()), 'perplexity.modes=()'),
    (dict(modes=('slide',)), 'did you mean "sliding"'), (dict(modes='full'), 'perplexity.modes='),
    (dict(max_tokens=-1), 'perplexity.max_tokens=-1'),
    (dict(split='valid'), 'did you mean "validation"'),
])
def test_mistakes_in_the_config_are_named(settings, field):
  with pytest.raises(ConfigError) as caught:
    perplexity.Config(**settings)
  assert field in str(caught.value)
  assert '\n' not in str(caught.value)


def test_mistakes_that_only_the_model_shows():
  documents = make_documents([9])
  with pytest.raises(ConfigError, match=r'perplexity\.length=21.*max_length=20'):
    evaluate(toy_models.CountModel(VOCAB, max_length=20), documents, length=21)
  with pytest.raises(ConfigError, match=r'perplexity\.length=0.*grows'):
    evaluate(toy_models.TailModel(VOCAB), documents)
  with pytest.raises(ConfigError, match=r"perplexity\.split='validation'.*no document"):
    evaluate(toy_models.CountModel(VOCAB), [], length=8)


def test_config_is_plain_values():
  for field in dataclasses.fields(perplexity.Config):
    assert isinstance(getattr(perplexity.Config(), field.name), int | float | bool | str | tuple)
