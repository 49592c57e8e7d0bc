"""The Memorizing Transformer's memory against a list of tokens and loops, in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.errors import ConfigError
from longctx.memory import memorizing
from longctx.models import memory_config, memory_decoder
from longctx.models.memories.base import Block, Cell, Settings
from longctx.models.memories.memorizing import Memorizing, MemorizingStore
from longctx.parallel import aot
from tests import oracles

B, C, N, K, H, M, TOP, BLOCK = 2, 3, 4, 2, 5, 7, 3, 4   # the last block of keys is met in part
SETTINGS = Settings(dim=8, num_heads=4, num_kv_heads=2, head_dim=4, segment=4, mlp='none', size=6,
                    top=2, std=0.5, out_std=0.5)


def unit(x):
  return x / np.sqrt(np.sum(x * x) + 1e-6)


def oracle_read(tokens, q, scale, top):
  """tokens: [(k [K, H], v [K, H])] that are kept; q [C, N, H] -> [C, N, H]."""
  out = np.zeros_like(q)
  for t, n in np.ndindex(*q.shape[:2]):
    head = n // (N // K)
    found = sorted(((unit(k[head]) @ unit(q[t, n]), v[head]) for k, v in tokens),
                   key=lambda pair: -pair[0])[:top]
    if found:
      weights = np.exp([scale[n] * score for score, _ in found])
      out[t, n] = sum(w * v for w, (_, v) in zip(weights, found)) / sum(weights)
  return out


def document(segments, seed=0):
  """q, k, v of so many segments of each row, and which tokens are valid: the rows' numbers differ."""
  draw = np.random.default_rng(seed).normal
  q, k, v = draw(size=(segments, B, C, N, H)), *draw(size=(2, segments, B, C, K, H))
  valid = np.ones((segments, B, C), bool)
  valid[0, 0, 0] = valid[1, 1] = False   # nothing fell out of the short-term memory
  return q, k, v, valid


@functools.cache
def compiled():
  read = functools.partial(memorizing.read, top=TOP, approximate=False, block=BLOCK)
  return jax.jit(read), jax.jit(memorizing.write)


@functools.partial(jax.jit, static_argnums=0)
def mix(graphdef, params, x, memory):
  """A layer's whole cell of valid tokens."""
  cell = Cell(jnp.ones(x.shape[:2], bool), jnp.zeros(len(x), jnp.int32))
  return nnx.merge(graphdef, params).mix(x, memory, cell)


def empty(dtype=jnp.float64):
  return memorizing.empty(B, M, K, H, dtype)


def test_reads_and_writes_are_those_of_a_list_of_the_last_tokens():
  """Thirteen segments of three: the ring of seven is turned five times, and its counter wraps."""
  read, write = compiled()
  scale = np.array([1.0, 3.0, -2.0, 10.0])
  with jax.enable_x64(True):
    state, tokens = empty(), [[] for _ in range(B)]
    for q, k, v, valid in zip(*document(13)):
      expected = np.stack([oracle_read(tokens[b], q[b], scale, TOP) for b in range(B)])
      np.testing.assert_allclose(read(state, q, scale), expected, atol=1e-12)
      state = write(state, k, v, valid)
      for b, t in zip(*np.nonzero(valid)):
        tokens[b] = [*tokens[b], (k[b, t], v[b, t])][-M:]
    assert (np.asarray(state.written) < 2 * M).all() and (np.asarray(state.written) >= M).all()
    # More than M at once: the last M of them stay.
    k, v = np.random.default_rng(1).normal(size=(2, B, 2 * M + 1, K, H))
    state = memorizing.write(state, k, v, np.ones((B, 2 * M + 1), bool))
    expected = np.stack([oracle_read(list(zip(k[b, -M:], v[b, -M:])), q[b], scale, TOP)
                         for b in range(B)])
    np.testing.assert_allclose(read(state, q, scale), expected, atol=1e-12)


@pytest.mark.parametrize('parts', [(5, 8), (1, 12)])
def test_windows_of_one_array_are_the_memories_before_each_segment(parts):
  """Some segments one by one, then the others at once: values, gradients, the memory after."""
  read, write = compiled()
  with jax.enable_x64(True):
    first, count = parts
    scale, (q, k, v, valid) = jnp.asarray([1.0, 3.0, -2.0, 10.0]), document(first + count)
    valid[1, 1] = True   # what is invalid comes before all else
    state = empty()
    for s in range(first):
      state = write(state, k[s], v[s], valid[s])
    start, later = state, [jnp.asarray(x[first:]) for x in (q, k, v, valid)]
    seen = np.random.default_rng(5).normal(size=later[0].shape)

    def one_by_one(q, scale):
      out, state = [], start
      for s in range(count):
        out.append(read(state, q[s], scale))
        state = write(state, *(x[s] for x in later[1:]))
      return (jnp.stack(out) * seen).sum(), (jnp.stack(out), state)

    @jax.jit
    def at_once(q, scale):
      by_row = lambda x: jnp.moveaxis(x, 0, 1)
      windows, after = memorizing.before(start, *map(by_row, later[1:]))
      rows = lambda x: x.reshape(-1, *x.shape[2:])
      out = memorizing.read(jax.tree.map(rows, windows), rows(by_row(q)), scale, TOP,
                            approximate=False, block=BLOCK)
      out = jnp.moveaxis(out.reshape(B, count, C, N, H), 1, 0)
      return (out * seen).sum(), (out, after)

    run = lambda f: jax.value_and_grad(f, (0, 1), has_aux=True)(later[0], scale)
    for a, b in zip(jax.tree.leaves(run(one_by_one)), jax.tree.leaves(run(at_once))):
      np.testing.assert_allclose(a, b, atol=1e-12)


def test_gradients_are_those_of_queries_and_scale_alone():
  read, write = compiled()
  with jax.enable_x64(True):
    q, k, v, valid = document(3, seed=2)
    seen, scale = np.random.default_rng(3).normal(size=q[0].shape), np.array([1.0, 3.0, -2.0, 10.0])
    state = write(write(empty(), k[0], v[0], valid[0]), k[1], v[1], valid[1])
    tokens = [[(k[s, b, t], v[s, b, t]) for s in range(2) for t in range(C) if valid[s, b, t]]
              for b in range(B)]
    loss = lambda q, scale: (read(state, q, scale) * seen).sum()
    dq, dscale = jax.jit(jax.grad(loss, (0, 1)))(jnp.asarray(q[2]), jnp.asarray(scale))
    expected = lambda q, scale: sum((oracle_read(tokens[b], q[b], scale, TOP) * seen[b]).sum()
                                    for b in range(B))
    step = 1e-6
    for at in [(0, 0, 0, 0), (0, 1, 2, 4), (1, 2, 3, 1), (1, 0, 1, 3)]:
      other = [q[2].copy() for _ in range(2)]
      other[0][at], other[1][at] = q[2][at] + step, q[2][at] - step
      slope = (expected(other[0], scale) - expected(other[1], scale)) / (2 * step)
      np.testing.assert_allclose(dq[at], slope, rtol=1e-6, atol=1e-8)
    for n in range(N):
      up, down = (scale + sign * step * np.eye(N)[n] for sign in (1, -1))
      slope = (expected(q[2], up) - expected(q[2], down)) / (2 * step)
      np.testing.assert_allclose(dscale[n], slope, rtol=1e-6, atol=1e-8)
    kept = lambda k, v: (read(write(state, k, v, valid[2]), q[2], scale) * seen).sum()
    for gradient in jax.jit(jax.grad(kept, (0, 1)))(k[2], v[2]):
      assert (np.asarray(gradient) == 0).all()


def test_slots_without_a_token_are_never_found():
  """meliad's DenseKVMemory lets zero keys that nobody wrote share the softmax: against a key that is
  unlike the query, score -1, an empty slot's 0 wins."""
  read, write = compiled()
  k = np.ones((B, C, K, H), np.float32)
  v = np.random.default_rng(4).normal(size=(B, C, K, H)).astype(np.float32)
  valid = np.array([[False, False, True]] * B)
  state = write(empty(jnp.float32), k, v, valid)
  out = read(state, -np.ones((B, C, N, H), np.float32), np.full(N, 5, np.float32))
  np.testing.assert_allclose(out, np.broadcast_to(np.repeat(v[:, 2:], N // K, axis=2), out.shape),
                             rtol=1e-6)


def test_a_memory_of_262144_tokens_is_searched_and_written_in_place(optimized):
  """Scores of all keys never exist, and a write's only large arrays are its argument's own."""
  slots, queries, heads, width = 2 ** 18, 64, 2, 8
  abstract = jax.eval_shape(lambda: memorizing.empty(1, slots, heads, width, jnp.float32))
  token = lambda n: jax.ShapeDtypeStruct((1, n, heads, width), jnp.float32)
  scale = jax.ShapeDtypeStruct((heads,), jnp.float32)
  read = jax.jit(functools.partial(memorizing.read, top=8, approximate=False))
  reading = read.lower(abstract, token(queries), scale).compile()
  scores = queries * heads * slots * 4
  assert aot.memory_of(reading).temporary < scores / 16
  write = jax.jit(memorizing.write, donate_argnums=0)
  writing = write.lower(abstract, token(queries), token(queries),
                        jax.ShapeDtypeStruct((1, queries), bool)).compile()
  memory = 2 * slots * heads * width * 4
  assert writing.memory_analysis().alias_size_in_bytes >= memory
  assert aot.memory_of(writing).temporary < memory / 64
  k, v = jax.random.normal(jax.random.key(0), (2, 1, slots, heads, width))
  state = memorizing.State(memorizing.unit(k), v, jnp.asarray([slots], jnp.int32))
  q = jax.random.normal(jax.random.key(1), (1, queries, heads, width))
  out = np.asarray(reading(state, q, jnp.full((heads,), 4.0)))
  for t, n in ((0, 0), (63, 1)):
    s = np.asarray(state.k[0, :, n], np.float64) @ unit(np.asarray(q[0, t, n], np.float64))
    found = np.argsort(-s)[:8]
    weights = np.exp(4 * s[found])
    np.testing.assert_allclose(out[0, t, n], weights / weights.sum() @ np.asarray(v[0, found, n]),
                               rtol=1e-4, atol=1e-5)


TINY = memory_config.Config(vocab_size=11, num_layers=1, embed_dim=8, num_heads=2, mlp='none', segment=3,
                            long_term='memorizing', memory_size=5, memory_top=2, init_std=0.5,
                            attention='reference', remat='none')


def call(config):
  """(its parameters, a call of the model as chat makes them)."""
  graphdef, params = nnx.split(memory_decoder.MemoryDecoder(config, rngs=nnx.Rngs(0)))
  def run(params, state, tokens, valid, ids=None):
    return nnx.merge(graphdef, params)(tokens, state, valid_BT=valid, segment_ids_BT=ids)
  return params, nnx.merge(graphdef, params).init_state, run


@pytest.mark.parametrize('tokens', [1, 6], ids=['a token', 'two segments'])
def test_a_model_with_a_memory_of_262144_tokens_copies_nothing_of_it(optimized, tokens):
  """A token made and a text read touch the slots they fill: all else of a call is small."""
  params, init_state, run = call(dataclasses.replace(TINY, memory_size=2 ** 18, short_term=2))
  state = jax.eval_shape(lambda: init_state(1))
  shape = lambda dtype: jax.ShapeDtypeStruct((1, tokens), dtype)
  compiled = jax.jit(run, donate_argnums=1).lower(params, state, shape(jnp.int32), shape(bool)).compile()
  memory = 2 * 2 ** 18 * TINY.embed_dim * 4
  assert compiled.memory_analysis().alias_size_in_bytes >= memory
  assert aot.memory_of(compiled).temporary < memory / 32


@pytest.mark.parametrize('short_term', [pytest.param(0, marks=pytest.mark.slow), 2])
def test_written_in_place_is_made_anew_for_each_cell_bit_for_bit(monkeypatch, short_term):
  """Documents of all lengths, padding, cells that end in mid-segment, and memories that others left."""
  rng, B, T = np.random.default_rng(0), 3, 11
  ids = np.cumsum(rng.random((B, 2 * T)) < 0.2, axis=1)
  tokens, valid = rng.integers(0, 11, (B, 2 * T)), rng.random((B, 2 * T)) < 0.8

  def found():
    params, init_state, run = call(dataclasses.replace(TINY, short_term=short_term, truncate=2))

    @jax.jit
    def graded(params, state, tokens, valid, ids):
      def loss(params):
        hidden, after = run(params, state, tokens, valid, ids)
        return (hidden ** 3).sum(), (hidden, after)
      return jax.value_and_grad(loss, has_aux=True)(params)

    out, state = [], jax.tree.map(lambda x: x + 3, init_state(B))   # 3: nobody's
    state = state._replace(count=state.count * 0, number=state.number * 0)
    for part in (slice(0, T), slice(T, 2 * T)):
      out.append(graded(params, state, tokens[:, part], valid[:, part], ids[:, part]))
      state = out[-1][0][1][1]
    step = jax.jit(run)
    for t in range(4):
      out.append(step(params, state, tokens[:, t:t + 1], valid[:, t:t + 1]))
      state = out[-1][1]
    return jax.tree.leaves(out)

  in_place = found()
  for name in ('begin', 'keep', 'write'):
    monkeypatch.setattr(Memorizing, name, getattr(Block, name))
  monkeypatch.setattr(MemorizingStore, 'when_read', lambda self, memory, out: memory)
  anew = found()
  assert len(in_place) == len(anew)
  for a, b in zip(in_place, anew):
    np.testing.assert_array_equal(a, b)


def test_what_a_failed_step_has_left_in_slots_without_a_token_is_not_met():
  q, k, v, valid = (jnp.asarray(x[2]) for x in document(3))
  junk = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), empty(jnp.float32)._replace(written=None))
  read = functools.partial(memorizing.read, top=TOP, approximate=False, block=BLOCK)

  @jax.jit
  def found(state):
    state = memorizing.write(state, k, v, valid)
    return jax.value_and_grad(lambda q, scale: (read(state, q, scale) ** 2).sum(), (0, 1))(q, jnp.ones(N))

  clean, dirty = found(empty(jnp.float32)), found(junk._replace(written=jnp.zeros(B, jnp.int32)))
  jax.tree.map(np.testing.assert_array_equal, clean, dirty)


def test_the_approximate_search_asks_for_an_approximate_maximum():
  read = functools.partial(memorizing.read, top=TOP, block=BLOCK)
  call = lambda approximate: jax.make_jaxpr(functools.partial(read, approximate=approximate))(
      empty(jnp.float32), jnp.ones((B, C, N, H)), jnp.ones(N))
  assert f'reduction_input_size_override={M}' in str(call(True)) and 'approx' not in str(call(False))
  q, k, v, valid = (jnp.asarray(x[2]) for x in document(3))
  state = memorizing.write(empty(jnp.float32), k, v, valid)
  # On a CPU the approximation is exact.
  np.testing.assert_allclose(read(state, q, jnp.ones(N), approximate=True),
                             read(state, q, jnp.ones(N), approximate=False), rtol=1e-6)


def test_a_segment_does_not_find_itself():
  """Written before it is read, a token finds its own key first (a gate of 1 hides all else)."""
  block = Memorizing(SETTINGS, rngs=nnx.Rngs(0))
  block.gate[...] = jnp.full((4,), 40.0)
  x = jax.random.normal(jax.random.key(0), (1, 4, 8))
  y, memory = mix(*nnx.split(block), x, block.init_memory(1))
  assert (np.asarray(y) == 0).all() and memory.store.written[0] == 4
  y, memory = mix(*nnx.split(block), x, memory)
  assert np.abs(y).max() > 0.1 and memory.store.written[0] == 8


def test_only_attention_turns_queries_and_keys_by_their_positions():
  """As published, the memory has no positions: how long ago a key was written changes nothing."""
  segment, short_term = SETTINGS.segment, 2
  block = Memorizing(dataclasses.replace(SETTINGS, short_term=short_term), rngs=nnx.Rngs(0))
  block.gate[...] = jnp.asarray([-1.0, 0.0, 1.0, 2.0])
  block.store.scale[...] = jnp.asarray([1.0, 2.0, 3.0, 4.0])
  x = np.random.default_rng(5).normal(size=(3 * segment, SETTINGS.dim))

  number = lambda x: np.asarray(x.get_value(), np.float64)
  w_kv, gate = number(block.mixer.w_kv), 1 / (1 + np.exp(-number(block.gate)))[:, None]
  p = dict(norm=number(block.mixer_norm.scale), w_q=number(block.mixer.w_q), w_k=w_kv[:, 0],
           w_v=w_kv[:, 1])
  plain, turned, near = oracles.segment_attention(
      x, p, segment=segment, short_term=short_term, base=SETTINGS.rope_base,
      epsilon=SETTINGS.norm_epsilon)
  def expected(q, k):
    out = []
    for start in range(0, len(x), segment):
      kept = list(zip(k, plain[2]))[:max(0, start - short_term)][-SETTINGS.size:]
      here = slice(start, start + segment)
      far = oracle_read(kept, q[here], number(block.store.scale), SETTINGS.top)
      out.append(gate * far + (1 - gate) * near[here])
    return np.einsum('tnh,nhd->td', np.concatenate(out), number(block.mixer.w_out))

  memory, said = block.init_memory(1), []
  for start in range(0, len(x), segment):
    here = jnp.asarray(x[None, start:start + segment], jnp.float32)
    y, memory = mix(*nnx.split(block), here, memory)
    said.append(y[0])
  said = np.concatenate(said)
  np.testing.assert_allclose(said, expected(*plain[:2]), atol=1e-4, rtol=1e-4)
  assert np.abs(said - expected(*turned)).max() > 1e-2   # and the difference would be seen


def test_closed_gates_begin_as_the_plain_layer():
  settings = dataclasses.replace(SETTINGS, gate='tanh')
  block, plain = Memorizing(settings, rngs=nnx.Rngs(0)), Block(settings, rngs=nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(0), (1, 4, 8))
  _, memory = mix(*nnx.split(block), x, block.init_memory(1))
  np.testing.assert_array_equal(mix(*nnx.split(block), -x, memory)[0],
                                mix(*nnx.split(plain), -x, plain.init_memory(1))[0])


def test_zeros_saturation_and_rows_of_padding_are_finite():
  block = Memorizing(SETTINGS, rngs=nnx.Rngs(0))
  graphdef, params = nnx.split(block)

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def run(params, scale, valid_BC):
    block = nnx.merge(graphdef, params)
    block.store.scale[...] = scale
    cell = Cell(valid_BC, jnp.zeros((2,), jnp.int32))
    memory, x = block.init_memory(2), jnp.zeros((2, 4, 8)).at[:, 1].set(1e4)
    for _ in range(2):
      y, memory = block.mix(x, memory, cell)
    return (y ** 2).sum(), (y, memory)

  for scale in (1e4, -1e4, 0.0):
    for valid in ([True] * 4, [False] * 4):
      out = run(params, jnp.full((4,), scale), jnp.asarray([[True] * 4, valid]))
      assert all(np.isfinite(x).all() for x in jax.tree.leaves(out))


@pytest.mark.parametrize('size,top', [(6, 2), (0, 0)])
def test_costs_are_what_is_there(size, top):
  settings = dataclasses.replace(SETTINGS, size=size, top=top)
  cost = Memorizing.cost(settings)
  block, plain = Memorizing(settings, rngs=nnx.Rngs(0)), Block(settings, rngs=nnx.Rngs(0))
  count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  assert count(jax.eval_shape(lambda: block.init_memory(1))) == cost.state
  assert count(nnx.state(block)) - count(nnx.state(plain)) == cost.parameters


def test_impossible_sizes_are_refused():
  with pytest.raises(ConfigError, match=r'memory_top=7: must be at most model.memory_size=6'):
    Memorizing.cost(dataclasses.replace(SETTINGS, top=7))
  with pytest.raises(ConfigError, match='memory_variant'):
    Memorizing.cost(dataclasses.replace(SETTINGS, variant='aproximate'))
