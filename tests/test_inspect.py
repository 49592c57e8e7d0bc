"""What an answer drew on: maps against NumPy, watched passes against plain ones, occlusion of a
known model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import watch
from longctx.data.tokenizer import Bytes
from longctx.errors import ConfigError
from longctx.evaluation import inspect, inspect_pair, reads
from longctx.evaluation.subject import Scored
from longctx.models import (
  decoder,
  encoder_config,
  encoder_decoder,
  memory_config,
  memory_decoder,
  recurrent,
)

VOCAB, C, P, A = 23, 4, 18, 4
TOKENS = np.random.default_rng(0).integers(1, VOCAB, P + A).astype(np.int32)

small = functools.partial(decoder.Config, vocab_size=VOCAB, num_layers=2, embed_dim=16, num_heads=4,
                          max_length=64, init_std=0.4)
def memory(long_term, **settings):
  return memory_config.Config(
    **dict(
      vocab_size=VOCAB,
      num_layers=1,
      embed_dim=16,
      num_heads=2,
      segment=C,
      init_std=0.4,
      mlp='none',
      long_term=long_term,
    )
    | settings
  )

MODELS = {
  'stacked': small(num_kv_heads=2, remat='full', window=(0, 6), num_layers=2),
  'hybrid': small(
    layers=('gated_delta', 'attention'), layer_loop='unrolled', mlp='none', num_heads=2
  ),
  'short': memory('none', short_term=6, num_heads=4, num_kv_heads=2),
  'relative': memory('none', short_term=3, position='relative'),
  'memorizing': memory(
    'memorizing', memory_size=8, memory_top=3, short_term=3, num_heads=4, num_kv_heads=2
  ),
  'infini': memory('infini', num_heads=4, num_kv_heads=2),
  'caching': memory('memory_caching', memory_size=3),
  'caching behind a window': memory('memory_caching', memory_size=3, short_term=6),
  'states': memory('block_recurrent', memory_tokens=3),
  'compressive': memory('compressive', short_term=4, memory_size=3, memory_rate=2),
  'armt': memory('armt', memory_tokens=2, memory_width=8),
  'rmt': memory('rmt', memory_tokens=2),
  'titans': memory('titans', memory_chunk=2, memory_variant='mac'),
  'ttt': memory('ttt', memory_chunk=2),
  'lstm': recurrent.Config(vocab_size=VOCAB, name='lstm', num_layers=1, embed_dim=8, hidden_dim=8),
}


@functools.cache
def model(name):
  config = MODELS[name]
  kind = {decoder.Config: decoder.Decoder, memory_config.Config: memory_decoder.MemoryDecoder,
          recurrent.Config: recurrent.Recurrent}[type(config)]
  made = kind(config, rngs=nnx.Rngs(1))
  # Gates and whatever begins at 0 would hide what they gate.
  graphdef, params = nnx.split(made)
  keys = iter(jax.random.split(jax.random.key(2), 100))
  params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), params)
  return graphdef, params, nnx.merge(graphdef, params)


@functools.cache
def inspected(name):
  graphdef, params, _ = model(name)
  return inspect.inspect(graphdef, params, TOKENS[:P], TOKENS[P:], chunk=8)


def softmax(x, seen):
  x = np.where(seen, x, -np.inf)
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def turned(x_TNH, base=10_000.0):
  """By the positions 0, 1, ..: halves of a head are the two parts of pairs."""
  T, _, H = x_TNH.shape
  angle = np.arange(T)[:, None, None] * base ** (-np.arange(H // 2) * 2 / H)
  a, b = np.split(x_TNH, 2, axis=-1)
  return np.concatenate(
    [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1
  )


def first_heads(name):
  """q, k of the first layer over the whole text, kv heads repeated, not turned; float64."""
  _, _, made = model(name)
  block = made.blocks[0]
  x = made.embedding(TOKENS[None], jnp.float32)
  if MODELS[name].name == 'decoder':   # stacked
    graphdef, params = nnx.split(block)
    block = nnx.merge(graphdef, jax.tree.map(lambda p: p[0], params))
  q, k, _ = block.mixer.heads(block.mixer_norm(x))
  heads = lambda x: np.repeat(np.asarray(x[0], np.float64), q.shape[2] // x.shape[2], axis=1)
  return heads(q), heads(k), block


ROWS = np.arange(P - 1, P + A - 1)[:, None]   # the tokens that ask
KEYS = np.arange(P + A)


def expected_attention(name, seen_RT):
  q, k, _ = first_heads(name)
  q, k = turned(q)[ROWS[:, 0]], turned(k)
  return softmax(np.einsum('rnh,tnh->nrt', q, k) * q.shape[-1] ** -0.5, seen_RT)


FAST = ('stacked', 'short', 'memorizing', 'infini', 'lstm')   # what other tests look into too


@pytest.mark.parametrize(
  'name', [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_the_watched_answer_is_as_likely_as_the_plain_one(name):
  _, _, made = model(name)
  found = inspected(name)
  hidden, _ = jax.jit(lambda t: made(t))(TOKENS[None])
  logprobs = np.asarray(jax.nn.log_softmax(made.logits(hidden)[0]))
  np.testing.assert_allclose(found.logprobs, logprobs[ROWS[:, 0], TOKENS[P:]], rtol=2e-4, atol=2e-4)
  for layer in found.layers:
    for read in layer.maps.values():
      np.testing.assert_allclose(read.tokens_NRT.sum(-1) + read.other_NR, 1, atol=1e-5)
      future = KEYS > ROWS
      assert not read.tokens_NRT[:, future].any() or 'segments' in layer.maps
    for numbers in layer.numbers_NR.values():
      assert numbers.shape[1] == A and np.isfinite(numbers).all()


def test_attention_of_a_decoder_is_the_definition():
  found = inspected('stacked').layers[0].maps['attention']
  np.testing.assert_allclose(
    found.tokens_NRT, expected_attention('stacked', ROWS >= KEYS), atol=1e-5
  )
  assert np.abs(found.other_NR).max() < 1e-5


def test_a_window_reads_nothing_before_it():
  read = inspected('stacked').layers[1].maps['attention'].tokens_NRT
  outside = (ROWS >= KEYS + 6) | (KEYS > ROWS)
  assert not read[:, outside].any() and (read[:, ~outside] > 0).all()


def test_attention_of_a_segment_reaches_as_far_as_the_short_term_memory():
  found = inspected('short').layers[0].maps['attention']
  seen = (KEYS <= ROWS) & (ROWS // C * C - 6 <= KEYS)
  np.testing.assert_allclose(found.tokens_NRT, expected_attention('short', seen), atol=1e-5)


def test_what_a_memorizing_layer_retrieved_is_named_by_its_token():
  found = inspected('memorizing').layers[0]
  q, k, block = first_heads('memorizing')
  unit = lambda x: x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)
  score = np.einsum('rnh,tnh->nrt', unit(q[ROWS[:, 0]]), unit(k))
  fallen = np.maximum(ROWS // C * C - 3, 0)  # tokens that the short-term memory no longer holds
  kept = (fallen > KEYS) & (fallen - 8 <= KEYS)
  top = np.sort(np.where(kept, score, -np.inf), axis=-1)[..., -3:-2]
  scale = np.asarray(block.store.scale.get_value())[:, None, None]
  expected = softmax(scale * score, kept & (score >= top))
  np.testing.assert_allclose(found.maps['retrieved'].tokens_NRT, expected, atol=1e-5)
  gate = 1 / (1 + np.exp(-np.asarray(block.gate.get_value(), np.float64)))
  np.testing.assert_allclose(found.numbers_NR['gate'], np.repeat(gate[:, None], A, 1), atol=1e-6)


def test_the_read_strength_of_infini_attention():
  q, k, _ = first_heads('infini')
  phi = lambda x: np.where(x > 0, x, np.exp(np.minimum(x, 0)) - 1) + 1
  expected = [[phi(q[r, n]) @ phi(k[:r // C * C, n]).sum(0) for r in ROWS[:, 0]] for n in range(4)]
  np.testing.assert_allclose(
    inspected('infini').layers[0].numbers_NR['read strength'], expected, rtol=1e-4
  )


@pytest.mark.slow
@pytest.mark.parametrize('name, short', [('caching', 0), ('caching behind a window', 6)])
def test_gates_of_cached_segments_stand_at_their_tokens(name, short):
  read, = inspected(name).layers[0].maps['segments'].tokens_NRT
  for row, at in zip(read, ROWS[:, 0]):
    fallen = at // C * C - short  # cached as three segments, the oldest of tokens 0 .. 1 perhaps
    own = slice(at // C * C, None) if not short else slice(0, 0)
    cached = row[max(0, fallen - 3 * C):fallen]
    assert (cached > 0).all()
    assert cached.sum() + row[own].sum() == pytest.approx(row.sum())
    assert row.sum() == pytest.approx(1, abs=1e-5) if not short else 0 < row.sum() < 1
    for low in range(fallen - C, max(0, fallen - 3 * C), -C):
      assert np.ptp(row[max(0, low):low + C]) < 1e-6


@pytest.mark.slow
def test_states_and_tokens_of_a_memory_are_told_apart():
  states = inspected('states').layers[0].states_NRS
  assert states.shape == (2, A, 3)
  np.testing.assert_allclose(states.sum(-1), 1, atol=1e-5)
  for name in ('rmt', 'titans'):   # tokens of their own, which stand nowhere in the text
    other = inspected(name).layers[0].maps['attention'].other_NR
    assert (other > 1e-4).all() and (other < 1 - 1e-4).all()


@pytest.mark.parametrize('number', [0, 1, 2, 5])
@pytest.mark.parametrize('short', [0, 3, 6])
def test_places_of_compressed_tokens(number, short):
  """By a queue of what falls out, every two of which become one, of which three are kept."""
  queue, compressed = [], []
  for token in range(number * 6):
    queue.append(token)
    if len(queue) > short:
      fallen = queue.pop(0)
      if fallen % 2:
        compressed.append((fallen - 1, 2))
  places = reads.Places(length=60, segment=6, short_term=short, number=number, slots=3, rate=2)
  kept = [key for key in places.keys(3 + short + 6)[:3] if key[1]]
  assert kept == compressed[-3:]
  past = [first for first, _ in places.keys(3 + short + 6)[3:3 + short] if first >= 0]
  assert past == list(range(max(0, number * 6 - short), number * 6))


def test_only_the_layers_asked_for_are_kept():
  graphdef, params, _ = model('stacked')
  found = inspect.inspect(graphdef, params, TOKENS[:P], TOKENS[P:], layers=(1,), chunk=8)
  assert [layer.index for layer in found.layers] == [1]
  np.testing.assert_array_equal(found.layers[0].maps['attention'].tokens_NRT,
                                inspected('stacked').layers[1].maps['attention'].tokens_NRT)
  with pytest.raises(ConfigError, match=r'--layers=2: must be at least 0 and at most 1'):
    inspect.inspect(graphdef, params, TOKENS[:P], TOKENS[P:], layers=(2,))
  with pytest.raises(ConfigError, match='the answer is empty'):
    inspect.inspect(graphdef, params, TOKENS[:P], TOKENS[:0])


def test_norms_are_those_of_the_state():
  found = inspected('infini').norms
  assert found.tokens.tolist() == [
    8,
    16,
  ]  # whole segments; the rest of the prompt is read with the answer
  _, k, _ = first_heads('infini')
  phi = (
    np.where(k > 0, k, np.exp(np.minimum(k, 0)) - 1)[:16, ::2] + 1
  )  # one of each two heads that share
  np.testing.assert_allclose(found.series[0, 'store.z'],
                             [np.linalg.norm(phi[:n].sum(0)) for n in (8, 16)], rtol=1e-4)
  caches = inspected('stacked').norms
  assert caches.tokens.tolist() == [8, 16, 17]
  assert caches.series[0, 'keys kept'].tolist() == [8, 16, 17]
  assert caches.series[1, 'keys kept'].tolist() == [5, 5, 5]   # a window of 6 and the token itself


def test_what_a_model_has_not_got_is_said():
  assert 'has neither attention nor slots' in inspected('lstm').notes[0]
  assert set(inspected('lstm').norms.series) == {(0, 'h'), (0, 'c')}


@pytest.mark.slow
def test_layers_without_attention_are_named_and_their_states_measured():
  _, _, made = model('hybrid')
  found = inspected('hybrid')
  agreement = found.layers[0].numbers_NR['agreement']
  assert agreement.shape == (2, A) and (agreement > 0).all() and (agreement <= 1 + 1e-5).all()
  assert 'gated_delta' in found.notes[0] and not found.layers[0].maps and found.layers[1].maps
  _, state = jax.jit(lambda t: made(t, made.init_state(1, capacity=24)))(TOKENS[None, :P - 1])
  assert found.norms.series[0, 'memory'][-1] == pytest.approx(
    np.linalg.norm(state.layers[0].memory), rel=1e-4
  )


class Reader:
  """3 nats less sure of its answer for each of the tokens at `at` that is not as it was."""

  tokenizer, max_length = Bytes(), 0

  def __init__(self, row, at):
    self.row, self.at, self.scored = row, at, 0

  def score(self, rows):
    self.scored += len(rows)
    lost = [3.0 * sum(row[i] != self.row[i] for i in self.at) for row in rows]
    return [
      Scored(np.full(len(row) - 1, -x / 2), np.ones(len(row) - 1, bool))
      for row, x in zip(rows, lost)
    ]


def test_occlusion_finds_the_tokens_that_the_answer_needs():
  prompt, answer = np.arange(40, 140, dtype=np.int32), np.array([7, 8], np.int32)
  row = np.concatenate([prompt, answer])
  subject = Reader(row, at=(30, 77))
  lost = inspect.occlude(subject, prompt, answer, pieces=10)
  expected = np.zeros(102)
  expected[[30, 77]] = 3
  np.testing.assert_allclose(lost, expected)
  assert subject.scored <= 1 + 10 * 4


def test_agreement_is_one_where_a_memory_holds_the_key_alone():
  key, value = np.array([.6, .8]), np.array([1., 2., 2.])
  S = np.outer(key, value)
  ask = np.stack([5 * key, np.array([.8, -.6])])  # the key, and what is orthogonal to it
  said = watch.Told(
    'delta',
    dict(
      q_BTHK=jnp.array(ask)[None, :, None],
      memory=jnp.array(S)[None, None],
      said_BTHV=jnp.array(ask @ S)[None, :, None],
    ),
  )
  numbers = reads.found([said], slice(0, 2), block=None).numbers_NR
  np.testing.assert_allclose(numbers['agreement'], [[1, 0]], atol=1e-6)


@functools.cache
def pair():
  """With kv heads for two, and what a rematerialised layer tells."""
  config = encoder_config.PairConfig(
    vocab_size=VOCAB, num_layers=2, encoder_layers=1, embed_dim=16, num_heads=4, num_kv_heads=2, max_length=16,
    source_length=12, init_std=0.3, layer_loop='unrolled', remat='full')
  return nnx.split(encoder_decoder.EncoderDecoder(config, rngs=nnx.Rngs(3)))


@pytest.mark.slow
def test_a_target_reads_its_source_and_itself():
  graphdef, params = pair()
  source, target = TOKENS[:9], TOKENS[9:15]
  found = inspect_pair.inspect_pair(graphdef, params, source, target)
  assert found.prompt == 10 and found.tokens_T.tolist() == TOKENS[:15].tolist()
  # All rows in one call, without caches; nothing is compiled, so that what is told are numbers.
  model = nnx.merge(graphdef, params)
  model.layers_config = dataclasses.replace(model.layers_config, remat='none')
  with watch.told() as calls:
    hidden, _ = model(target[None, :-1], None, source_BS=source[None])
  logprobs = jax.nn.log_softmax(model.logits(hidden)[0])
  np.testing.assert_allclose(found.logprobs, logprobs[np.arange(5), target[1:]], rtol=1e-4, atol=1e-5)
  attended = [call.values for call in calls if call.name == 'attention'][-4:]
  seen = {'attention': np.tri(5, dtype=bool), 'cross attention': np.ones((5, 9), bool)}
  for i, layer in enumerate(found.layers):
    assert list(layer.maps) == ['attention', 'cross attention'] and layer.index == i
    for j, (name, read) in enumerate(layer.maps.items()):
      q, k = (np.asarray(attended[2 * i + j][one][0], np.float64) for one in 'qk')
      scores = np.einsum('rnh,tnh->nrt', q, np.repeat(k, 2, axis=1)) * 4 ** -0.5
      expected = np.zeros((4, 5, 15))
      part = slice(9, 14) if name == 'attention' else slice(0, 9)
      expected[..., part] = softmax(scores, seen[name])
      np.testing.assert_allclose(read.tokens_NRT, expected, atol=2e-5)
      np.testing.assert_allclose(read.other_NR, 0, atol=1e-5)
  one, = inspect_pair.inspect_pair(graphdef, params, source, target, layers=(1,)).layers
  np.testing.assert_array_equal(one.maps['attention'].tokens_NRT, found.layers[1].maps['attention'].tokens_NRT)
  with pytest.raises(ConfigError, match='the answer is empty'):
    inspect_pair.inspect_pair(graphdef, params, source, target[:1])
