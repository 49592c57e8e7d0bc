"""Titans' layers against loops, each row, token and head by itself; with a window and without."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.errors import ConfigError
from longctx.memory import titans
from longctx.models.memories import titans as layer
from longctx.models.memories.base import Cell, Memory, Past, Settings
from longctx.models.memory_config import Config
from tests import oracles
from tests.compilation import quick_compilation  # noqa: F401
from tests.test_titans import H, loops, mlp, near

pytestmark = pytest.mark.usefixtures('quick_compilation')

ROWS, C, D, N_LAYER, KV, P = 3, 6, 5, 2, 1, 2
SETTINGS = dict(dim=D, num_heads=N_LAYER, num_kv_heads=KV, head_dim=H, segment=C, chunk=3, rate=2, std=0.5,
                out_std=0.5, norm_epsilon=1e-3, mlp='none')
LENGTH = (C, C, 4)                      # tokens of each row's segment
COUNT = {3: (3, 1, 2), 7: (7, 5, 2)}    # and of its window, by the window's size; some that fall are none
slow = lambda *args: pytest.param(*args, marks=pytest.mark.slow)
# (variant, window)
CASES = [('mag', 0), ('mac', 0), slow('mal', 0), slow('memory', 0), ('mag', 3), ('mac', 3), ('mal', 7),
         slow('memory', 3), slow('mac', 7)]

sigmoid = lambda x: 1 / (1 + np.exp(-x))
silu = lambda x: x * sigmoid(x)
rms = lambda x, scale: oracles.rms_norm(x, scale, SETTINGS['norm_epsilon'])


def unit(x):
  return x / np.sqrt((x * x).sum() + 1e-6)


def projected(p, u, tail, part):
  """silu(conv(u W)) of q, k or v, [T, N, H], one tap at a time; the tail after all tokens."""
  inputs = np.concatenate([tail, np.einsum('td,dnh->tnh', u, p['w_qkv'][:, part])])
  y = np.zeros((len(u), *inputs.shape[1:]))
  for t in range(len(u)):
    for j in range(4):
      y[t] += p['taps'][j, part] * inputs[t + 3 - j]
  return silu(y), inputs[-3:]


def learned(p, u, state, valid, size, parts=(0, 1, 2)):
  """What a memory says to u [T, D] token by token, and the state after. parts: 1, 2 if nothing is asked."""
  found = {part: projected(p, u, state.tail[:, i], part) for i, part in enumerate(parts)}
  q, k, v = (found.get(part, (np.zeros((len(u), N_LAYER, H)),))[0] for part in range(3))
  tail = np.stack([found[part][1] for part in parts], axis=1)
  gates = np.einsum('td,dgn->gtn', u, p['w_gates'])
  said, W, S = np.zeros_like(u), [], []
  for n in range(N_LAYER):
    alpha, eta, theta = (sigmoid(g[:, n] + p[name][n])
                         for g, name in zip(gates, ('forget', 'momentum', 'step')))
    y, weights, momenta = loops(
        [x[n] for x in state.memory.weights], [x[n] for x in state.memory.momenta],
        np.array([unit(x) for x in q[:, n]]), np.array([unit(x) for x in k[:, n]]), v[:, n], alpha, eta,
        theta * 2 / H, valid, size)
    said += y @ p['w_out'][n]
    W.append(weights)
    S.append(momenta)
  pack = lambda heads: tuple(np.stack(x) for x in zip(*heads))
  return said, state._replace(memory=titans.State(pack(W), pack(S)), tail=tail)


def recalled(p, u, state, stream):
  """What the memory before says to u, and the state after."""
  q, asked = projected(p, u, state.asked[:, stream], 0)
  said = np.zeros_like(u)
  for t in range(len(u)):
    for n in range(N_LAYER):
      said[t] += mlp([W[n] for W in state.memory.weights], unit(q[t, n]))[0] @ p['w_out'][n]
  all_asked = state.asked.copy()
  all_asked[:, stream] = asked
  return said, state._replace(asked=all_asked)


def attended(p, x, past, count, length, heard=None):
  """Each token over P, what was heard up to it, the past and the tokens up to it."""
  own = p.get('persistent', np.zeros((0, D)))
  others = [own] + ([] if heard is None else [heard]) + [past]
  tokens = rms(np.concatenate([*others, x]), p['mixer_norm']['scale'])
  S, M = len(tokens), len(past)
  w = p['mixer']
  out = np.zeros_like(x)
  for n in range(N_LAYER):
    place = np.arange(C - S, C)
    q = oracles.rope(tokens @ w['w_q'][:, n], place, 10_000.0)[S - C:]
    k = oracles.rope(tokens @ w['w_kv'][:, 0, 0], place, 10_000.0)
    v = tokens @ w['w_kv'][:, 1, 0]
    for i in range(length):
      keys = list(range(len(own)))
      if heard is not None:
        keys += [len(own) + j for j in range(i + 1)]
      keys += [S - C - M + j for j in range(M - count, M)] + [S - C + j for j in range(i + 1)]
      weights = np.exp([k[j] @ q[i] / math.sqrt(H) for j in keys])
      out[i] += (weights / weights.sum()) @ v[keys] @ w['w_out'][n]
  return out


def layer_loops(p, variant, x, past, count, length, state):
  """(what is added to the residual, the state after, what the short-term memory takes)."""
  m, valid = p['memory'], np.arange(C) < length
  normed = rms(x, p['mixer_norm']['scale'])
  if len(past):
    return behind_a_window(p, variant, x, past, count, length, state)
  if variant == 'memory':
    return *learned(m, normed, state, valid, 3), x
  if variant == 'mal':
    said, state = learned(m, rms(x, p['memory_norm']['scale']), state, valid, 3)
    return said + attended(p, x + said, past, count, length), state, x + said
  if variant == 'mag':
    seen = rms(attended(p, x, past, count, length), p['seen_norm']['scale'])
    said, state = learned(m, normed, state, valid, 3)
  else:
    heard, state = recalled(m, normed, state, 0)
    seen = rms(attended(p, x, past, count, length, heard), p['seen_norm']['scale'])
    said, state = learned(m, seen, state, valid, 3)
  return p['gain'] * seen * sigmoid(rms(said, p['said_norm']['scale'])), state, x


def behind_a_window(p, variant, x, past, count, length, state):
  """What is read is read of the memory before; what the window no longer holds is learned after."""
  m, M, here = p['memory'], len(past), lambda y: rms(y, p['mixer_norm']['scale'])
  if variant == 'mal':
    here = lambda y: rms(y, p['memory_norm']['scale'])
  said, state = recalled(m, here(x), state, 0)
  if variant == 'mac':
    seen = rms(attended(p, x, past, count, length, said), p['seen_norm']['scale'])
    said, state = recalled(m, seen, state, 1)
    out, stream = p['gain'] * seen * sigmoid(rms(said, p['said_norm']['scale'])), [*state.waiting.hidden, *seen]
    kept = Past(np.array(stream[-M:]), min(M, count + C))
    state, norm = state._replace(waiting=kept), lambda y: y
  else:
    x = x + said if variant == 'mal' else x
    seen, norm, stream = attended(p, x, past, count, length), here, [*past, *x]
    out = (p['gain'] * rms(seen, p['seen_norm']['scale']) * sigmoid(rms(said, p['said_norm']['scale']))
           if variant == 'mag' else said + seen)
  there = [j >= M - count for j in range(M)] + [i < length for i in range(C)]
  falls = np.array([norm(y) if known else np.zeros(D) for y, known in zip(stream[:C], there)])
  return out, learned(m, falls, state, np.array(there[:C]), 3, parts=(1, 2))[1], x


@functools.cache
def parts(variant, window):
  """(parameters, graphdef, x, memory, cell): nothing is 0 that begins as 0, absent tokens are not either."""
  rng = np.random.default_rng(0)
  own = dict(tokens=P) if variant != 'memory' else {} if window else dict(num_kv_heads=N_LAYER)
  settings = Settings(**SETTINGS | own, short_term=window, variant=variant)
  block = layer.Titans(settings, rngs=nnx.Rngs(0))
  noisy = lambda tree: jax.tree.map(
      lambda x: x + 0.3 * jnp.asarray(rng.standard_normal(x.shape), jnp.float32), tree)
  graphdef, params = nnx.split(block)
  params = noisy(params)
  held = lambda: (Past(noisy(jnp.zeros((ROWS, window, D))), jnp.asarray(COUNT[window])) if window else
                  None)
  store = nnx.merge(graphdef, params).init_store(ROWS)
  waiting = held() if store.waiting is not None else None
  store = noisy(store._replace(waiting=None))._replace(waiting=waiting)
  cell = Cell(jnp.arange(C) < jnp.asarray(LENGTH)[:, None], jnp.zeros((ROWS,), jnp.int32))
  x = jnp.asarray(rng.standard_normal((ROWS, C, D)), jnp.float32)
  return params, graphdef, x, Memory(held(), store), cell


@functools.cache
def made(variant, window):
  """(parameters by name, mix compiled, x, memory)."""
  params, graphdef, x, memory, cell = parts(variant, window)
  mix = jax.jit(lambda x, memory: nnx.merge(graphdef, params).mix(x, memory, cell))
  return nnx.to_pure_dict(params), mix, x, memory


def wide(tree):
  return jax.tree.map(lambda y: np.asarray(y, np.float64 if y.dtype == np.float32 else y.dtype), tree)


def by_loops(p, variant, x, memory):
  """Of each row: (out, state, kept, count)."""
  for b in range(ROWS):
    row = lambda tree: jax.tree.map(lambda y: y[b], tree)  # noqa: B023
    past, count = (np.zeros((0, D)), 0) if memory.past is None else row(memory.past)
    yield b, row, *layer_loops(p, variant, x[b], past, int(count), LENGTH[b], row(memory.store))


@pytest.mark.parametrize('variant, window', CASES)
def test_layer_equals_loops(variant, window):
  p, mix, x, memory = made(variant, window)
  out, after = mix(x, memory)
  for b, row, expected, state, kept in by_loops(wide(p), variant, wide(x), wide(memory)):
    near(out[b, :LENGTH[b]], expected[:LENGTH[b]], atol=2e-4)
    if LENGTH[b] == C:   # an unfinished segment's memory is dropped by who called
      near(row(after.store), state, atol=2e-4)
      if window:
        all_kept = np.concatenate([memory.past.hidden[b], kept])[-window:]
        near(after.past.hidden[b], all_kept, atol=2e-5)
        assert after.past.count[b] == min(window, memory.past.count[b] + C)


@pytest.mark.parametrize('variant, window', [('mac', 3), slow('mag', 3), slow('mal', 7), slow('memory', 3)])
def test_gradients_behind_a_window_are_those_of_the_loops(variant, window):
  """Along a direction of all parameters, tokens and stores; what a window holds has none."""
  params, graphdef, x, memory, cell = parts(variant, window)
  rng = np.random.default_rng(1)
  weigh = rng.standard_normal(x.shape)
  whole = [b for b in range(ROWS) if LENGTH[b] == C]
  floats = lambda tree: [y for y in jax.tree.leaves(tree) if y.dtype.kind == 'f']

  def total(out, stores, xp):
    """Of what whole rows say, and of all that they learned."""
    return sum((xp.asarray(out[b]) * weigh[b]).sum() for b in whole) + sum(
        sum((y ** 2).sum() for y in floats(store)) for store in stores)

  def loss(params, x, memory):
    out, after = nnx.merge(graphdef, params).mix(x, memory, cell)
    return total(out, [jax.tree.map(lambda y: y[b], after.store) for b in whole], jnp)  # noqa: B023

  slopes = jax.jit(jax.grad(loss, argnums=(0, 1, 2), allow_int=True))(params, x, memory)
  assert not np.asarray(slopes[2].past.hidden).any()
  at = wide((nnx.to_pure_dict(params), x, memory))
  way = jax.tree.map(lambda y: rng.standard_normal(y.shape) * (y.dtype.kind == 'f'), at)
  way[2].past.hidden[:] = 0
  if at[2].store.waiting is not None:
    way[2].store.waiting.hidden[:] = 0

  def moved(step):
    p, x, memory = jax.tree.map(lambda y, d: y + step * d if y.dtype.kind == 'f' else y, at, way)
    out, stores = {}, []
    for b, _, y, state, _ in by_loops(p, variant, x, memory):
      out[b] = y
      if b in whole:
        stores.append(state._replace(waiting=state.waiting and state.waiting._replace(count=np.array(0))))
    return total(out, stores, np)

  got = sum((a * b).sum() for a, b in zip(
      floats(jax.tree.map(np.asarray, (nnx.to_pure_dict(slopes[0]), *slopes[1:]))),
      [d for d, y in zip(jax.tree.leaves(way), jax.tree.leaves(at)) if y.dtype.kind == 'f'], strict=True))
  np.testing.assert_allclose(got, (moved(1e-5) - moved(-1e-5)) / 2e-5, rtol=2e-3)


@pytest.mark.parametrize('window', [0, 3])
def test_mac_hears_nothing_of_the_future(window):
  """A listed public bug: all of h stands before the segment and is seen whole; h_j is made of x_j."""
  _, mix, x, memory = made('mac', window)
  for j in range(1, C):
    out, _ = mix(x.at[0, j].add(1.0), memory)
    moved = np.any(np.asarray(out != mix(x, memory)[0]), axis=-1)
    assert not moved[0, :j].any() and moved[0, j] and not moved[1].any()


@pytest.mark.parametrize('field,value,words', [
    ('memory_chunk', 4, 'must divide model.segment=6'), ('memory_variant', 'mak', 'did you mean'),
    ('memory_width', 8, 'memory_depth=1'), ('memory_tokens', 3, 'has none of its own'),
    ('position', 'relative', 'without model.short_term'),
    ('qk_norm', True, 'without model.short_term')])
def test_mistakes_are_named(field, value, words):
  right = dict(vocab_size=9, embed_dim=8, num_heads=2, segment=6, long_term='titans',
               memory_variant='memory', memory_depth=1)
  Config(**right)
  with pytest.raises(ConfigError, match=words):
    Config(**right | {field: value})


def test_what_a_document_begins_with_is_learned():
  """All parameters of the memory have a gradient from the first segment of a document on."""
  params, graphdef, x, memory, cell = parts('mac', 0)
  def loss(params):
    block = nnx.merge(graphdef, params)
    out, _ = block.mix(x, memory._replace(store=block.init_store(ROWS)), cell)
    return jnp.sum(jnp.where(cell.valid_BC[..., None], out, 0) ** 2)
  for path, slopes in jax.tree.leaves_with_path(jax.jit(jax.grad(loss))(params)):
    assert np.isfinite(slopes).all() and (np.any(slopes != 0) or 'mlp' in str(path)), path
