"""A model as tasks see it: against its full forward pass, one by one, in batches, over meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import progress
from longctx.data.tokenizer import Bytes
from longctx.errors import ConfigError
from longctx.evaluation import subject
from longctx.evaluation.subject import Constant, ModelSubject
from longctx.models import decoder, memory_config, memory_decoder, recurrent
from longctx.parallel import mesh
from tests import toy_models

VOCAB = 264   # seven more than the tokenizer has
SEP = Bytes.separator
ROOM = 64


@functools.cache
def model_of(which):
  sizes = dict(vocab_size=VOCAB, num_layers=1, embed_dim=16)
  if which == 'lstm':
    build = lambda: recurrent.Recurrent(recurrent.Config(hidden_dim=16, **sizes), rngs=nnx.Rngs(0))
  elif which == 'infini':
    build = lambda: memory_decoder.MemoryDecoder(
        memory_config.Config(segment=8, long_term='infini', num_heads=2, **sizes), rngs=nnx.Rngs(0))
  else:
    build = lambda: decoder.Decoder(
        decoder.Config(max_length=ROOM, num_heads=2, layer_loop='unrolled', **sizes), rngs=nnx.Rngs(0))
  graphdef = nnx.split(nnx.eval_shape(build))[0]
  # Larger weights than at birth: what is likeliest leads by more than rounding.
  params = jax.jit(lambda: jax.tree.map(lambda x: 8 * x, nnx.state(build())))()
  return graphdef, params


def subject_of(which, batch_size=3, segment=16, layout=None):
  graphdef, params = model_of(which)
  if layout is not None:
    params = jax.device_put(params, layout.params_sharding(params))
  return ModelSubject(graphdef, params, Bytes(), layout=layout, batch_size=batch_size, segment=segment)


@functools.cache
def forward_of(which):
  graphdef, params = model_of(which)

  @jax.jit
  def forward(tokens_BT):
    model = nnx.merge(graphdef, params)
    return model.logits(model(tokens_BT, None)[0])
  return forward


def logits_of(which, tokens):
  """float64 [n, 257] of the full forward pass; what comes later cannot change what came before."""
  padded = np.zeros((1, ROOM), np.int32)
  padded[0, :len(tokens)] = tokens
  return np.asarray(forward_of(which)(padded))[0, :len(tokens), :257].astype(np.float64)


def rows_of(lengths, seed=0):
  rng = np.random.default_rng(seed)
  return [np.concatenate([[SEP], rng.integers(0, 256, n - 1)]).astype(np.int32) for n in lengths]


ROWS = rows_of([5, 41, 1, 17, 58, 16, 2])
MODELS = ['decoder', 'lstm', 'infini']


@pytest.mark.parametrize('which', [
    'decoder', 'lstm', pytest.param('infini', marks=pytest.mark.slow)])
def test_generation_is_argmax_of_the_full_forward_pass(which):
  found = subject_of(which).generate(ROWS, 6)
  assert len({tuple(row) for row in found}) > 3   # the prompt matters
  for prompt, written in zip(ROWS, found):
    assert written.dtype == np.int32
    text, lead = list(prompt), np.inf
    while len(text) < len(prompt) + 6:
      logits = logits_of(which, text)[-1]
      top = np.sort(logits)[::-1]
      lead = min(lead, top[0] - top[1])
      if (token := int(np.argmax(logits))) == SEP:
        break
      text.append(token)
    assert lead > 1e-4, 'the case cannot tell rounding from a bug'
    assert written.tolist() == text[len(prompt):]


@pytest.mark.parametrize('which, segment', [*((which, 16) for which in MODELS), ('decoder', 128)])
def test_scores_are_the_log_softmax_of_the_full_forward_pass(which, segment):
  for row, (logprobs, greedy) in zip(ROWS, subject_of(which, segment=segment).score(ROWS)):
    logits = logits_of(which, row)[:-1]
    of_all = logits - logits.max(-1, keepdims=True)
    of_all -= np.log(np.exp(of_all).sum(-1, keepdims=True))   # 257 symbols and not 264
    want = of_all[np.arange(len(row) - 1), row[1:]]
    assert logprobs.dtype == np.float64 and greedy.dtype == bool and len(logprobs) == len(row) - 1
    np.testing.assert_allclose(logprobs, want, rtol=2e-5, atol=2e-5)
    assert greedy.tolist() == (logits.argmax(-1) == row[1:]).tolist()


def test_what_is_written_is_greedy_when_it_is_scored():
  """And each token that is written, and each call that scores, is told to who waits."""
  one, moves = subject_of('decoder'), []
  with progress.told(lambda: moves.append(1)):
    written = one.generate(ROWS[:2], 6)
    assert len(moves) >= max(map(len, written))
    del moves[:]
    scored = one.score([np.concatenate(pair) for pair in zip(ROWS, written)])
    assert moves
  for prompt, new, (_, greedy) in zip(ROWS, written, scored):
    assert len(new) and greedy[len(prompt) - 1:].all()


def test_batched_is_one_by_one():
  many, single = subject_of('lstm'), subject_of('lstm', batch_size=1)
  assert [w.tolist() for w in many.generate(ROWS, 6)] == [
      single.generate([row], 6)[0].tolist() for row in ROWS]
  for ours, row in zip(many.score(ROWS), ROWS):
    np.testing.assert_allclose(ours.logprobs, single.score([row])[0].logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('which, data, seq', [
    ('decoder', 2, 4), pytest.param('lstm', 8, 1, marks=pytest.mark.slow),
    pytest.param('infini', 4, 2, marks=pytest.mark.slow)])
def test_a_mesh_of_eight_devices_changes_nothing(which, data, seq):
  layout = mesh.make_layout(mesh.Config(data=data, seq=seq, layout='sequence'), jax.devices())
  whole, cut = subject_of(which), subject_of(which, 8, layout=layout)
  assert [w.tolist() for w in cut.generate(ROWS, 6)] == [w.tolist() for w in whole.generate(ROWS, 6)]
  for ours, theirs in zip(cut.score(ROWS), whole.score(ROWS)):
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs, rtol=2e-5, atol=2e-5)
    assert ours.greedy.tolist() == theirs.greedy.tolist()


def counting(vocab_size=257, **settings):
  """Of a model that writes what it read most often."""
  graphdef, params = nnx.split(toy_models.CountModel(vocab_size))
  return ModelSubject(graphdef, params, Bytes(), layout=None, **settings)


def prompt_of(text):
  return np.concatenate([[SEP], Bytes().encode(text)])


def test_writing_ends_with_the_separator_and_with_the_token_that_completes_a_stop():
  one = counting(batch_size=2, segment=16)
  ended = np.array([SEP, SEP, 7], np.int32)
  a, b, c = one.generate([prompt_of(b'aaab'), ended, prompt_of(b'bb')], 5, stops=(b'aa',))
  assert Bytes().decode(a) == b'aa' and b.tolist() == [] and Bytes().decode(c) == b'bbbbb'
  assert subject.before_stop(b'one, two.', (b'.', b', ')) == b'one'
  assert subject.before_stop(b'one', (b'.',)) == b'one'


def test_few_programs_serve_prompts_of_any_length():
  toy_models.TRACES.clear()
  one = counting(vocab_size=258, batch_size=2, segment=128)   # of no other test
  for length in (300, 9_000, 129):
    one.generate([prompt_of(b'x' * length)], 2)
    one.score([prompt_of(b'x' * length)])
  assert sorted(set(toy_models.TRACES)) == [(2, 1), (2, 128)]
  assert len(toy_models.TRACES) == 3   # the call of two programs, and the step


def test_live_memory_does_not_grow_with_the_prompt(monkeypatch):
  live, read = [], subject.sampling.read_chunk
  def spy(*args):
    live.append(sum(x.nbytes for x in jax.live_arrays()))
    return read(*args)
  monkeypatch.setattr(subject.sampling, 'read_chunk', spy)
  one, peaks = counting(batch_size=2, segment=128), []
  for length in (1_000, 100_000):
    live.clear()
    one.generate([prompt_of(b'x' * length)] * 2, 1)
    assert len(live) == -(-(length + 1) // 128)
    peaks.append(max(live[2:]))
  assert peaks[0] == peaks[1]


def test_room_is_at_most_half_more_than_is_needed_and_comes_in_few_sizes():
  sizes = {subject.room(n) for n in range(1, 100_000)}
  assert len(sizes) == 23
  assert all(n <= subject.room(n) <= max(64, 1.5 * n) for n in range(1, 5_000))


def test_what_a_model_cannot_take_is_refused():
  one = subject_of('decoder')
  assert len(one.score(rows_of([ROOM + 1]))[0].logprobs) == ROOM   # the last is scored and not read
  for call in (lambda: one.generate(rows_of([58]), 7), lambda: one.score(rows_of([ROOM + 2]))):
    with pytest.raises(ConfigError, match=r'65: must be at most model\.max_length=64'):
      call()
  with pytest.raises(ValueError, match='at least 1, the separator'):
    one.generate([np.zeros(0, np.int32)], 3)
  layout = mesh.make_layout(mesh.Config(data=2, seq=4, layout='sequence'), jax.devices())
  for settings, field in ((dict(batch_size=3), 'batch_size=3'), (dict(segment=6), 'segment=6')):
    with pytest.raises(ConfigError, match=field):
      subject_of('decoder', layout=layout, **(dict(batch_size=4) | settings))


def test_logits_that_are_not_finite_are_an_error():
  graphdef, params = model_of('decoder')
  broken = ModelSubject(graphdef, jax.tree.map(lambda x: x * jnp.nan, params), Bytes(), layout=None,
                        batch_size=3, segment=16)
  with pytest.raises(FloatingPointError, match='hold NaN'):
    broken.generate(ROWS[:1], 3)


def test_a_constant_subject_is_a_uniform_model():
  one = Constant(Bytes(), b'seven 7.')
  assert [Bytes().decode(w) for w in one.generate(ROWS[:2], 5)] == [b'seven', b'seven']
  logprobs, greedy = one.score([np.array([SEP, 3, 0, 9])])[0]
  np.testing.assert_allclose(np.exp(-logprobs), 257)
  assert greedy.tolist() == [False, True, False]
