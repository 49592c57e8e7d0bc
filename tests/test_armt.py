"""ARMT: its memory against loops, what gamma and the old W are for, corners; the layer's closed start."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.errors import ConfigError
from longctx.memory import armt
from longctx.models.memories.armt import ARMT
from longctx.models.memories.base import Cell, Settings
from longctx.models.memory_config import Config
from longctx.models.memory_decoder import MemoryDecoder
from tests import oracles
from tests.kernel_laws import wave

B, T, M, A, D, F = 2, 4, 3, 4, 3, 24
SEGMENTS = 3


@functools.cache
def case():
  """[segments, B, ...] of what a few segments say; keys that come again, one of zeros."""
  draw = np.random.default_rng(0)
  q, k, v = (draw.normal(size=(SEGMENTS, B, *shape)) for shape in ((T, A), (M, A), (M, D)))
  k[1, 0, 1] = k[0, 0, 2]
  k[2, 1, 0] = k[1, 1, 2] = k[0, 1, 1]
  k[2, 0, 0] = q[1, 1, 0] = 0
  return q, k, v, draw.uniform(size=(SEGMENTS, B, M))


@jax.jit
def run(q, k, v, beta, state):
  """What each segment reads, and the state after the last."""
  out = []
  for s in range(SEGMENTS):
    out.append(armt.read(state, q[s]))
    state = armt.write(state, k[s], v[s], beta[s][..., None])
  return jnp.stack(out), state


write, read = jax.jit(armt.write), jax.jit(armt.read)


def loops(q, k, v, beta, gammas=None):
  out, kept = np.zeros((SEGMENTS, B, T, D)), np.zeros((SEGMENTS, B, M))
  W, z = np.zeros((B, F, D)), np.zeros((B, F))
  for b in range(B):
    for s in range(SEGMENTS):
      out[s, b] = oracles.associative_read(W[b], z[b], q[s, b])
      W[b], z[b], kept[s, b] = oracles.associative_write(
          W[b], z[b], k[s, b], v[s, b], beta[s, b], None if gammas is None else gammas[s, b])
  return out, W, z, kept


def test_equals_loops():
  inputs = case()
  out, state = run(*inputs, armt.empty(B, A, D))
  expected, W, z, gammas = loops(*inputs)
  assert (gammas > 0).any() and (gammas < 1e-4).any() and (gammas == 1).any()
  np.testing.assert_allclose(out, expected, atol=1e-5, rtol=1e-4)
  np.testing.assert_allclose(state.W, W, atol=1e-5, rtol=1e-4)
  np.testing.assert_allclose(state.z, z, atol=1e-5, rtol=1e-4)


def test_gradients_are_those_of_finite_differences():
  """In float64 of the loops, with gamma held: no gradient goes through it."""
  inputs = case()
  gammas = loops(*inputs)[3]
  def ours(inputs):
    out, state = run(*inputs, armt.empty(B, A, D))
    return sum((x * wave(x)).sum() for x in (out, *state))
  grads = jax.jit(jax.grad(ours))(tuple(jnp.asarray(x, jnp.float32) for x in inputs))
  theirs = lambda inputs: sum((x * np.asarray(wave(x), np.float64)).sum()
                              for x in loops(*inputs, gammas)[:3])
  draw, step = np.random.default_rng(1), 1e-5
  for i, grad in enumerate(grads):
    assert np.isfinite(grad).all()
    for _ in range(4):
      # A direction that leaves zeros alone: relu has a corner there.
      along = draw.normal(size=inputs[i].shape) * (inputs[i] != 0)
      moved = [theirs(tuple(x + sign * step * along if i == j else x for j, x in enumerate(inputs)))
               for sign in (1, -1)]
      np.testing.assert_allclose((grad * along).sum(), (moved[0] - moved[1]) / (2 * step), rtol=2e-3,
                                 atol=2e-3)


def test_a_value_written_over_is_read_back_whole():
  """Without gamma z counts a key as often as it is written: the second value would come back by half."""
  key = jnp.asarray([[[0.3, -0.2, 0.5, 0.1]]])
  values = [jnp.asarray([[[1.0, 2.0, 3.0]]]), jnp.asarray([[[-4.0, 0.5, 1.0]]])]
  state = armt.empty(1, A, D)
  for value in values * 3:
    state = write(state, key, value, jnp.ones((1, 1, 1)))
    np.testing.assert_allclose(read(state, key), value, rtol=1e-3)
  np.testing.assert_allclose(jnp.linalg.norm(state.z), 1, rtol=1e-3)


def test_the_tokens_of_a_segment_read_the_old_memory():
  """Their order means nothing, and two that say the same key do not see each other."""
  _, k, v, beta = (x[0] for x in case())
  k, beta = np.stack([k[:, 0], k[:, 1], k[:, 0]], axis=1), beta[..., None]
  empty = armt.empty(B, A, D)
  state, turned = write(empty, k, v, beta), write(empty, k[:, ::-1], v[:, ::-1], beta[:, ::-1])
  np.testing.assert_allclose(state.W, turned.W, atol=1e-6)
  alone = [write(empty, k, v, beta * (np.arange(M) == m)[:, None]).W for m in range(M)]
  np.testing.assert_allclose(state.W, sum(alone), atol=1e-6)


def test_an_empty_memory_says_exactly_nothing_and_small_keys_count():
  state = armt.empty(B, A, D)
  assert not read(state, case()[0][0]).any()
  # Without a unit phi e would drown what keys of this size say: k . z is of their fourth power.
  _, k, v, beta = (x[0, :, :1] for x in case())
  beta = np.ones((B, 1, 1))
  small = write(state, 1e-3 * k, v, beta)
  np.testing.assert_allclose(read(small, 1e-3 * k), v, rtol=1e-3)


# The layer.


@functools.cache
def model(long_term='armt', **settings):
  own = dict(memory_tokens=3, memory_width=4) if long_term == 'armt' else {}
  config = Config(vocab_size=13, num_layers=2, embed_dim=8, num_heads=2, segment=4, init_std=0.5,
                  long_term=long_term, **own, **settings)
  return MemoryDecoder(config, rngs=nnx.Rngs(0))


def plain_twin(armt_model):
  """The plain transformer with the same parameters, as far as it has them."""
  twin = model('none')
  own = dict(nnx.to_flat_state(nnx.state(armt_model)))
  nnx.update(twin, nnx.from_flat_state({path: own[path] for path, _ in nnx.to_flat_state(nnx.state(twin))}))
  return twin


def shaken(armt_model, value=1.0):
  """With W_value drawn."""
  graphdef, state = nnx.split(armt_model)
  other = nnx.merge(graphdef, jax.tree.map(lambda x: x, state))
  for i, block in enumerate(other.blocks):
    block.w_value[...] = value * jax.random.normal(jax.random.key(i), block.w_value.shape)
  return other


TOKENS = jax.random.randint(jax.random.key(3), (2, 12), 0, 13)


def logits(m, tokens=TOKENS):
  graphdef, params = nnx.split(m)
  return _logits(graphdef, params, tokens)


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef, params, tokens):
  m = nnx.merge(graphdef, params)
  return m.logits(m(tokens)[0])


@functools.partial(jax.jit, static_argnums=0)
def _state(graphdef, params, tokens, state):
  return nnx.merge(graphdef, params)(tokens, state)


def test_it_begins_as_the_plain_transformer():
  np.testing.assert_allclose(logits(model()), logits(plain_twin(model())), atol=1e-5, rtol=1e-5)


def test_a_first_segment_is_the_plain_transformers_and_later_ones_are_not():
  ours, plain = logits(shaken(model())), logits(plain_twin(model()))
  np.testing.assert_allclose(ours[:, :4], plain[:, :4], atol=1e-5, rtol=1e-5)
  assert (np.abs(ours[:, 4:] - plain[:, 4:]).max(-1) > 1e-2).all()


def test_what_a_memory_token_says_reaches_the_next_segment_alone():
  m = shaken(model())
  before = logits(m)
  m.tokens[...] = m.tokens[...].at[1].add(1.0)
  moved = np.abs(logits(m) - before).max((0, 2))
  assert not moved[:4].any() and (moved[4:] > 0).all()


def test_a_layer_reads_before_it_and_is_written_by_what_it_says():
  """The first layer through two segments: the plain layer between the loops' reads and writes."""
  m, plain = shaken(model()), plain_twin(model()).blocks[0]
  _, state = _state(*nnx.split(m), TOKENS[:, :8], m.init_state(2))
  block, layer = m.blocks[0], nnx.jit(plain)
  number = lambda p: np.asarray(p[...], np.float64)
  W, z, cell = np.zeros((2, 24, 8)), np.zeros((2, 24)), Cell(jnp.ones((2, 7), bool), jnp.zeros(2, jnp.int32))
  for tokens in (TOKENS[:, :4], TOKENS[:, 4:8]):
    x = np.concatenate([number(m.embedding.table)[tokens], np.tile(number(m.tokens), (2, 1, 1))], axis=1)
    x += [oracles.associative_read(W[b], z[b], x[b] @ number(block.w_query)) for b in range(2)]
    y = np.asarray(layer(jnp.asarray(x, jnp.float32), plain.init_memory(2), cell, None)[0], np.float64)[:, 4:]
    for b in range(2):
      beta = 1 / (1 + np.exp(-y[b] @ number(block.w_beta)[:, 0]))
      W[b], z[b], _ = oracles.associative_write(
          W[b], z[b], y[b] @ number(block.w_key), y[b] @ number(block.w_value), beta)
  np.testing.assert_allclose(state.memory.layers[0].store.W, W, atol=1e-3, rtol=1e-3)
  np.testing.assert_allclose(state.memory.layers[0].store.z, z, atol=1e-3, rtol=1e-3)


# Behind a window.

ROW = (4, 3, 8)   # segments, their tokens, D
OWN = 2


def window_loops(p, x, window, held=None, gammas=None):
  """One layer without an MLP over the segments of a row; memory tokens hear what falls out, and no more.

  Returns what tokens say, W, z, what the window keeps of each token, and the gammas of the writes. `held`
  and `gammas` are given where they are no function of x (gradients).
  """
  R, C, D = x.shape
  width = p['w_query'].shape[1]
  W, z = np.zeros((6 * width, D)), np.zeros(6 * width)
  norm = lambda h: oracles.rms_norm(h, p['mixer_norm']['scale'], 1e-6)
  out, kept, found = [], np.zeros((R * C, D)), []
  for r in range(R):
    h = np.concatenate([x[r], p['own']])
    h = h + oracles.associative_read(W, z, h @ p['w_query'])
    kept[r * C:(r + 1) * C] = h[:C]
    first = max(0, r * C - window)
    old = (kept if held is None else held)[first:r * C]
    falls = (r + 1) * C - window - first    # so many of `old` and the segment, from the first on
    M = len(old)
    def sees(t, s, own=M + C, falls=falls):
      return s <= t if t < own else s < falls or own <= s <= t
    around = norm(np.concatenate([old, h]))
    y = h + oracles.heads_of(around, around, p['mixer'], sees, 1e4)[M:]
    out.append(y[:C])
    if falls > 0:
      mine = y[C:]
      W, z, gamma = oracles.associative_write(
          W, z, mine @ p['w_key'], mine @ p['w_value'], 1 / (1 + np.exp(-mine @ p['w_beta'][:, 0])),
          None if gammas is None else gammas[len(found)])
      found.append(gamma)
  return np.array(out), W, z, kept, found


@functools.cache
def behind(window):
  """(read(params, x [R, C, D]) -> (what tokens say, W, z), params, x)."""
  settings = Settings(dim=ROW[2], num_heads=2, num_kv_heads=1, head_dim=4, segment=ROW[1], mlp='none',
                      std=0.5, out_std=0.5, short_term=window, tokens=OWN, width=4, attention='reference')
  graphdef, params = nnx.split(ARMT(settings, rngs=nnx.Rngs(0)))
  draw = np.random.default_rng(3)
  # Memory tokens are the model's; the layer here has them beside its parameters.
  drawn = lambda *shape: jnp.asarray(draw.normal(size=shape), jnp.float32)
  shaken = jax.tree.map(lambda x: x + 0.3 * (np.ptp(x) == 0) * drawn(*x.shape), params)
  params = {'layer': shaken, 'own': drawn(OWN, ROW[2])}
  cell = Cell(jnp.ones((1, ROW[1] + OWN), bool), jnp.zeros(1, jnp.int32))

  def read(params, x):
    block = nnx.merge(graphdef, params['layer'])
    def one(memory, x_CD):
      y, memory = block(jnp.concatenate([x_CD, params['own']])[None], memory, cell, None)
      return memory, y[0, :ROW[1]]
    memory, y = jax.lax.scan(one, block.init_memory(1), x)
    return y, memory.store.W[0], memory.store.z[0]
  return read, params, drawn(*ROW)


def flat(params):
  return jax.tree.map(lambda x: np.asarray(x, np.float64),
                      nnx.to_pure_dict(params['layer']) | {'own': params['own']})


@pytest.mark.parametrize('window', [2, pytest.param(4, marks=pytest.mark.slow)])
def test_behind_a_window_memory_tokens_write_what_falls_out_of_it(window):
  """By loops; a window shorter than a segment, and one that nothing falls out of at first."""
  read, params, x = behind(window)
  found = jax.jit(read)(params, x)
  for a, b in zip(found, window_loops(flat(params), np.asarray(x, np.float64), window)):
    np.testing.assert_allclose(a, b, atol=1e-3, rtol=1e-3)


def test_gradients_behind_a_window_are_those_of_finite_differences():
  """In float64 of the loops; what the window keeps is held, and so are the gammas."""
  window = 2
  read, params, x = behind(window)
  total = lambda out: sum((y * np.asarray(wave(y), np.float64)).sum() for y in out)
  grads = jax.jit(jax.grad(lambda params, x: sum((y * wave(y)).sum() for y in read(params, x)),
                           argnums=(0, 1)))(params, x)
  at, draw = (flat(params), np.asarray(x, np.float64)), np.random.default_rng(4)
  *_, held, gammas = window_loops(*at, window)
  way = jax.tree.map(lambda y: draw.normal(size=y.shape), at)
  moved = lambda h: total(window_loops(*jax.tree.map(lambda y, d: y + h * d, at, way), window, held,
                                       gammas)[:3])
  got = sum((a * b).sum() for a, b in zip(jax.tree.leaves((flat(grads[0]), grads[1])), jax.tree.leaves(way),
                                          strict=True))
  np.testing.assert_allclose(got, (moved(1e-6) - moved(-1e-6)) / 2e-6, rtol=5e-3)


def test_its_state_is_as_counted_and_its_sizes_as_published():
  m = model()
  counted = sum(x.size for x in jax.tree.leaves(m.init_state(1).memory.layers))
  assert counted == sum(f.state for f in m.config.layer_facts(12)) == 2 * 24 * 9
  published = Config(long_term='armt', num_layers=12, embed_dim=1024)
  assert published.layer_facts(256)[0].state == 384 * 1025
  assert (published.memory_cost().parameters, m.dependency) == (1024 * (64 + 64 + 1024 + 1), 'P2')
  assert published.num_parameters() > 0


def test_a_schedule_that_cannot_be_is_refused():
  with pytest.raises(ConfigError, match='dependency class P2'):
    Config(long_term='armt', schedule='parallel')
