"""Sampling against its definition; generation against the full forward pass."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.errors import ConfigError
from longctx.inference import sampling
from longctx.inference.sampling import ENDED, Sampling, filter_logits, generate, generate_batch
from longctx.models import decoder, recurrent
from tests import oracles, toy_models

VOCAB = 11

SETTINGS = [
    dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0),
    dict(temperature=0.3, top_k=0, top_p=1.0, min_p=0.0),
    dict(temperature=2.5, top_k=4, top_p=1.0, min_p=0.0),
    dict(temperature=1.0, top_k=1, top_p=1.0, min_p=0.0),
    dict(temperature=1.0, top_k=99, top_p=1.0, min_p=0.0),
    dict(temperature=1.0, top_k=0, top_p=0.7, min_p=0.0),
    dict(temperature=0.8, top_k=0, top_p=0.05, min_p=0.0),
    dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.3),
    dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.99),
    dict(temperature=1.4, top_k=6, top_p=0.8, min_p=0.2),
    dict(temperature=0.6, top_k=3, top_p=0.5, min_p=0.5),
]


def kept(logits, **settings):
  filtered = np.asarray(filter_logits(jnp.asarray([logits], jnp.float32), **settings))[0]
  return set(np.flatnonzero(filtered > -np.inf)), np.asarray(jax.nn.softmax(filtered))


@pytest.mark.parametrize('settings', SETTINGS, ids=str)
def test_kept_tokens_and_probabilities_equal_the_definition(settings):
  rng = np.random.default_rng(0)
  for scale in (0.1, 1.0, 5.0):
    for _ in range(10):
      logits = rng.normal(size=VOCAB) * scale + rng.normal() * 20
      found, probabilities = kept(logits, **settings)
      want, want_probabilities = oracles.kept_tokens(np.float32(logits), **settings)
      assert found == want
      np.testing.assert_allclose(probabilities, want_probabilities, rtol=3e-5, atol=1e-30)
      assert all(probabilities[i] == 0 for i in range(VOCAB) if i not in want)


@pytest.mark.parametrize('settings, want', [
    # probabilities 1/4, 1/8, 1/4, 1/8, 1/4: exact in binary
    (dict(top_k=1), {0, 2, 4}),  # all that tie with the k-th stay
    (dict(top_k=4), {0, 1, 2, 3, 4}),
    (dict(top_p=0.25), {0}),  # of equal ones the lowest id, until top_p is reached
    (dict(top_p=0.26), {0, 2}),  # the token that crosses stays
    (dict(top_p=0.5), {0, 2}),
    (dict(top_p=0.75), {0, 2, 4}),
    (dict(top_p=0.8), {0, 1, 2, 4}),
    (dict(min_p=0.5), {0, 1, 2, 3, 4}),  # exactly at the floor stays
    (dict(min_p=0.51), {0, 2, 4}),
    (dict(top_k=1, top_p=0.34), {0, 2}),  # top_p counts the mass that top_k has left
    (dict(top_p=1e-9), {0}),
    (dict(min_p=0.999), {0, 2, 4}),
])
def test_ties_and_edges(settings, want):
  logits = np.log([0.25, 0.125, 0.25, 0.125, 0.25])
  assert kept(logits, **settings)[0] == want
  assert oracles.kept_tokens(
      logits, **(dict(temperature=1, top_k=0, top_p=1.0, min_p=0.0) | settings))[0] == want


def test_temperature_comes_before_the_filters():
  """At temperature 1/2 the largest holds 0.64 / 0.7 of the mass, at 1 only 0.8."""
  logits = np.log([0.8, 0.1, 0.1])
  assert kept(logits, temperature=1.0, top_p=0.9)[0] == {0, 1}
  assert kept(logits, temperature=0.5, top_p=0.9)[0] == {0}


@pytest.mark.parametrize('settings', SETTINGS[1:], ids=str)
def test_draws_follow_the_filtered_distribution(settings):
  logits = np.random.default_rng(3).normal(size=VOCAB) * 1.5
  want, probabilities = oracles.kept_tokens(np.float32(logits), **settings)
  draws = 4000
  tokens = sampling.sample_token(jnp.tile(jnp.float32(logits), (draws, 1)), jax.random.key(1),
                                 **settings)
  share = np.bincount(np.asarray(tokens), minlength=VOCAB) / draws
  assert set(np.flatnonzero(share)) <= want
  np.testing.assert_allclose(share, probabilities, atol=5 * 0.5 / draws**0.5)


def test_temperature_zero_takes_the_first_largest():
  logits = jnp.array([[1.0, 3.0, 3.0], [-5.0, -9.0, -7.0]])
  for seed in range(5):
    token_B = sampling.sample_token(logits, jax.random.key(seed), temperature=0, top_k=1)
    assert token_B.tolist() == [1, 0]


def test_a_tiny_temperature_does_not_overflow():
  for logits in ([1e4, 0.0, 1e4], [-1e30, 1e30, 1e30]):
    filtered = np.asarray(filter_logits(jnp.array([logits]), temperature=1e-30, top_p=0.9))
    assert not np.isnan(filtered).any()
    assert np.isfinite(filtered).any()


@pytest.mark.parametrize('settings, message', [
    (dict(temperature=-0.1), 'temperature=-0.1'), (dict(temperature=float('nan')), 'temperature'),
    (dict(temperature=float('inf')), 'finite'), (dict(top_k=-1), 'top_k=-1'),
    (dict(top_p=0.0), 'top_p=0.0'), (dict(top_p=1.01), 'top_p=1.01'),
    (dict(top_p=float('nan')), 'top_p=nan'), (dict(min_p=1.0), 'min_p=1.0'),
    (dict(min_p=-0.1), 'min_p=-0.1'), (dict(min_p=float('nan')), 'min_p=nan')])
def test_settings_out_of_range_are_refused(settings, message):
  with pytest.raises(ConfigError, match=message):
    Sampling(**settings)


# --- Generation --------------------------------------------------------------------------------


ROOM = 26  # tokens: the longest prompt below and what follows it


def greedy_by_full_forward(forward, prompt, steps):
  """The definition: at every step the whole text from nothing, and the argmax of its last logits.

  Returns the tokens and the smallest lead that a chosen logit had over the next.
  """
  text, lead, length = list(prompt), np.inf, ROOM
  for _ in range(steps):
    padded = np.zeros((1, length), np.int32)  # what comes later cannot change what came before
    padded[0, :len(text)] = text
    logits = np.asarray(forward(padded))[0, len(text) - 1]
    top = np.sort(logits)[::-1]
    lead = min(lead, top[0] - top[1])
    text.append(int(np.argmax(logits)))
  return text[len(prompt):], lead


GREEDY = Sampling(temperature=0)
PROMPTS = [[7, 1, 2, 1, 3, 2, 2, 5, 8, 1, 0, 4, 4], [9], [3, 3, 6, 6, 6]]


def build_toy(which):
  return {'count': toy_models.CountModel, 'tail': toy_models.TailModel}[which](VOCAB)


def build_real(which):
  def build():
    if which == 'lstm':
      config = recurrent.Config(vocab_size=VOCAB, num_layers=2, embed_dim=16, hidden_dim=16)
      return recurrent.Recurrent(config, rngs=nnx.Rngs(0))
    window = which == 'window'
    config = decoder.Config(
        vocab_size=VOCAB, max_length=64, num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=1,
        window=(4, 0) if window else (0,), position='learned' if window else 'rope',
        layer_loop='unrolled' if window else 'scan')
    return decoder.Decoder(config.resolved(VOCAB), rngs=nnx.Rngs(0))
  graphdef = nnx.split(nnx.eval_shape(build))[0]
  # Larger weights than at birth: the largest logit leads by more than rounding.
  params = jax.jit(lambda: jax.tree.map(lambda x: 6 * x, nnx.state(build())))()
  return nnx.merge(graphdef, params)


BUILDS = [(build_toy, 'count'), (build_toy, 'tail'), (build_real, 'lstm'), (build_real, 'decoder'),
          pytest.param(build_real, 'window', marks=pytest.mark.slow)]


@pytest.mark.parametrize('build, which', BUILDS, ids=['count', 'tail', 'lstm', 'decoder', 'window'])
def test_greedy_is_argmax_of_the_full_forward_pass(build, which):
  model = build(which)
  graphdef, params = nnx.split(model)
  forward = jax.jit(lambda tokens_BT: model.logits(
      model(tokens_BT, model.init_state(1, capacity=ROOM))[0]))
  wanted = []
  for prompt in PROMPTS:
    want, lead = greedy_by_full_forward(forward, prompt, 12)
    assert lead > 1e-4 or which in ('count', 'tail'), 'the case cannot tell rounding from a bug'
    for chunk in (1, 3, 16):
      found = list(generate(graphdef, params, prompt, max_new_tokens=12, sampling=GREEDY,
                            chunk=chunk, capacity=ROOM))
      assert found == want, f'chunk {chunk}, prompt of {len(prompt)}'
    wanted.append(want)
  assert len({tuple(want) for want in wanted}) > 1  # the prompt matters
  batch = np.stack(list(generate_batch(graphdef, params, PROMPTS, max_new_tokens=12,
                                       sampling=GREEDY, chunk=4, capacity=ROOM)))
  assert batch.T.tolist() == wanted


@dataclasses.dataclass(frozen=True)
class InSegments(toy_models.Config):
  segment: int = 0


@pytest.mark.parametrize('chunk, segment, whole', [(4, 6, 6), (6, 3, 6), (7, 5, 10)])
def test_a_model_of_segments_reads_whole_ones(chunk, segment, whole):
  """A call that ends within one has it computed again by the next: 8 times at 256 of 2,048 tokens."""
  model = toy_models.CountModel(VOCAB)
  model.config = InSegments(VOCAB, segment=segment)
  toy_models.TRACES.clear()
  tokens_of(model, range(9), max_new_tokens=2, chunk=chunk)
  assert set(toy_models.TRACES) == {(1, whole), (1, 1)}
  assert sampling.whole_segments(chunk, toy_models.Config(VOCAB)) == chunk


def tokens_of(model, prompt=(9, 1, 2), **settings):
  graphdef, params = nnx.split(model)
  return list(generate(graphdef, params, prompt, **settings))


def test_the_same_seed_draws_the_same_text_and_another_seed_another():
  model = build_toy('count')
  texts = [tokens_of(model, max_new_tokens=30, seed=seed) for seed in (0, 0, 1)]
  assert texts[0] == texts[1] != texts[2]
  shorter = tokens_of(model, max_new_tokens=10, seed=0)
  assert shorter == texts[0][:10]


def test_draws_at_successive_steps_are_independent():
  """A key that is not changed from step to step would draw one quantile for ever."""
  model = toy_models.CountModel(VOCAB)
  model.eye.set_value(jnp.zeros((VOCAB, VOCAB)))  # uniform, whatever was read
  counts = collections.Counter(tokens_of(model, max_new_tokens=550))
  assert len(counts) == VOCAB
  assert max(counts.values()) < 50 + 5 * 50**0.5
  rows = np.stack(list(generate_batch(*nnx.split(model), [[1], [1]], max_new_tokens=50)))
  assert (rows[:, 0] != rows[:, 1]).sum() > 30


def test_generation_stops_before_the_stop_token():
  model = build_toy('count')
  prompt = [4, 4, 4, 7, 7]
  assert tokens_of(model, prompt, max_new_tokens=9, sampling=GREEDY, stop_token=4) == []
  assert tokens_of(model, prompt, max_new_tokens=9, sampling=GREEDY, stop_token=7) == [4] * 9
  for seed in range(5):
    free = tokens_of(model, prompt, max_new_tokens=40, seed=seed)
    stopped = tokens_of(model, prompt, max_new_tokens=40, seed=seed, stop_token=7)
    assert stopped == (free[:free.index(7)] if 7 in free else free)


def test_a_row_that_stopped_does_not_disturb_the_others():
  model = build_toy('count')
  graphdef, params = nnx.split(model)
  prompts = [[4, 4, 1, 1, 1], [2, 2], [5, 5, 5, 4, 4, 4, 4]]
  rows = np.stack(list(generate_batch(graphdef, params, prompts, max_new_tokens=6,
                                      sampling=GREEDY, stop_token=4)))
  assert rows.T.tolist() == [[1] * 6, [2] * 6, [ENDED] * 6]


def test_a_row_that_stopped_stays_stopped():
  prompts = [[1, 2, 3, 4, 5, 6, 7, 8]] * 8
  rows = np.stack(list(generate_batch(*nnx.split(build_toy('count')), prompts, max_new_tokens=40,
                                      stop_token=7))).T
  ends = [int(np.argmax(row == ENDED)) for row in rows if (row == ENDED).any()]
  assert len(set(ends)) > 2  # rows stop at different times
  for row in rows:
    ended = row == ENDED
    assert (ended == np.maximum.accumulate(ended)).all()
    assert 7 not in row


def test_banned_tokens_are_never_chosen():
  model = build_toy('count')
  for setting in (GREEDY, Sampling(), Sampling(top_k=1)):
    text = tokens_of(model, [4] * 9 + [5], max_new_tokens=60, sampling=setting, banned=(4,))
    assert 4 not in text
    assert len(text) == 60


def test_two_traces_serve_every_prompt_and_call():
  toy_models.TRACES.clear()
  model = build_toy('count')
  for prompt in ([1], [1, 2, 3, 4], [1] * 9):
    tokens_of(model, prompt, max_new_tokens=5, chunk=4, sampling=Sampling(top_p=0.123))
  assert toy_models.TRACES == [(1, 4), (1, 1)]


def test_one_token_needs_no_step():
  toy_models.TRACES.clear()
  model = toy_models.CountModel(VOCAB + 3)
  assert tokens_of(model, [5, 5], max_new_tokens=1, sampling=GREEDY) == [5]
  assert toy_models.TRACES == [(1, 256)]


def test_text_is_handed_out_while_it_is_made():
  model = build_toy('count')
  graphdef, params = nnx.split(model)
  stream = generate(graphdef, params, [4], max_new_tokens=10**6, capacity=10**6 + 1,
                    sampling=GREEDY)
  assert [next(stream) for _ in range(3)] == [4, 4, 4]


def test_logits_that_are_not_finite_are_an_error_not_a_token():
  model = build_toy('count')
  model.eye.set_value(model.eye.get_value().at[5].set(jnp.nan))
  with pytest.raises(FloatingPointError, match='new token 1 hold NaN'):
    tokens_of(model, max_new_tokens=3)


def test_an_empty_prompt_and_too_little_room_are_errors():
  model = build_toy('tail')
  with pytest.raises(ValueError, match='at least 1'):
    tokens_of(model, [], max_new_tokens=3)
  with pytest.raises(ValueError, match=r'capacity=5.*need 6'):
    tokens_of(model, [1, 2, 3], max_new_tokens=3, capacity=5)
