"""RMT: a segment against loops, what sees what, what is carried, and the learned first memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.errors import ConfigError
from longctx.models.memory_config import Config
from longctx.models.memory_decoder import MemoryDecoder
from tests import oracles

VOCAB, D, N, M, C = 13, 8, 2, 2, 3
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 3 * C))


@functools.cache
def model(**settings):
  return MemoryDecoder(Config(**dict(
      vocab_size=VOCAB, num_layers=2, embed_dim=D, num_heads=N, segment=C, init_std=0.5, long_term='rmt',
      memory_tokens=M) | settings), rngs=nnx.Rngs(0))


@functools.partial(jax.jit, static_argnums=0)
def _read(graphdef, params, tokens, state):
  return nnx.merge(graphdef, params)(tokens, state)


def read(m, tokens, state=None):
  return _read(*nnx.split(m), tokens, state)


def loops(m, tokens):
  """One row, segment by segment: (hidden states after the last norm, memory after), float64."""
  number = lambda p: np.asarray(p[...], np.float64)
  layers = [dict(
      attention_norm=number(b.mixer_norm.scale), w_q=number(b.mixer.w_q), w_kv=number(b.mixer.w_kv),
      w_attention_out=number(b.mixer.w_out), mlp_norm=number(b.mlp_norm.scale),
      w_in=number(b.mlp.w_in), w_out=number(b.mlp.w_out)) for b in m.blocks]
  memory, out = number(m.tokens), []
  for s in range(0, len(tokens), C):
    x = np.concatenate([memory, number(m.embedding.table)[tokens[s:s + C]], memory])
    for p in layers:
      x = oracles.decoder_block(x, p, num_heads=N, num_kv_heads=N, positions=np.arange(len(x)),
                                base=10_000.0, epsilon=1e-6, window=0)
    x = oracles.rms_norm(x, number(m.norm.scale), 1e-6)
    out.append(x[M:-M])
    memory = x[-M:]
  return np.concatenate(out), memory


def test_equals_loops():
  hidden, state = read(model(), TOKENS, model().init_state(2))
  whole, _ = read(model(), TOKENS)
  for b in range(2):
    expected, memory = loops(model(), TOKENS[b])
    np.testing.assert_allclose(hidden[b], expected, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(whole[b], expected, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(state.memory.tokens[b], memory, atol=1e-4, rtol=1e-4)


def test_what_is_carried_stays_of_one_size_through_any_number_of_segments():
  """The residual behind the last layer, carried as it is, would grow without end."""
  m, state = model(), model().init_state(2)
  lengths = []
  for _ in range(30):
    _, state = read(m, TOKENS, state)
    lengths.append(float(jnp.sqrt(jnp.mean(state.memory.tokens ** 2))))
  np.testing.assert_allclose(lengths, 1, rtol=1e-3)   # its norm's scale is 1


@pytest.mark.parametrize('by', ['whole rows', 'the walk'])
def test_the_first_memory_learns_where_gradients_are_truncated(by):
  """A document's first memory has no past to be cut from."""
  m = model(truncate=1, num_layers=1, mlp='none', remat='none')
  graphdef, params = nnx.split(m)
  def loss(params):
    hidden, _ = nnx.merge(graphdef, params)(TOKENS[:, :C], m.init_state(2) if by == 'the walk' else None)
    return (hidden * jnp.arange(D)).sum()
  assert (jnp.abs(jax.jit(jax.grad(loss))(params).tokens[...]).max(-1) > 1e-4).all()


def test_the_first_memory_is_drawn_as_the_embeddings():
  m = model(embed_dim=64, vocab_size=100, memory_tokens=60, num_layers=1)
  np.testing.assert_allclose(jnp.std(m.tokens[...]), jnp.std(m.embedding.table[...]), rtol=0.05)


def test_an_empty_state_holds_no_parameter():
  """A state made before the first memory was learned on begins a document with what is learned by then;
  a model of shapes alone has a state too."""
  m = model(num_layers=1, mlp='none', remat='none')
  state = m.init_state(2)
  for i in range(2):
    m.tokens[...] = m.tokens[...] + i
    np.testing.assert_allclose(read(m, TOKENS, state)[0], read(m, TOKENS)[0], atol=1e-5)
  abstract = nnx.eval_shape(lambda: MemoryDecoder(m.config, rngs=nnx.Rngs(0)))
  assert jax.eval_shape(lambda: abstract.init_state(2)).memory.tokens.shape == (2, M, D)


def test_its_state_is_as_counted_and_its_tokens_as_published():
  m = model(short_term=2)
  counted = sum(x.size for x in jax.tree.leaves(m.init_state(1).memory))
  assert counted == sum(f.state for f in m.config.layer_facts(12)) == M * D + 2 * (2 * D + 1)
  assert m.dependency == 'P3'
  assert Config(long_term='rmt', embed_dim=1024, num_layers=12).layer_facts(256)[0].state == 10 * 1024


def test_what_cannot_be_is_refused():
  for schedule in ('parallel', 'wavefront'):
    with pytest.raises(ConfigError, match='P3'):
      Config(long_term='rmt', schedule=schedule)
  with pytest.raises(ConfigError, match='memory_layers'):
    Config(long_term='rmt', memory_layers=(1,))
