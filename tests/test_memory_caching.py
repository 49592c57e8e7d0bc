"""Memory Caching: the layer against loops and their finite differences, its cache, what it comes down to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.errors import ConfigError
from longctx.memory import caching
from longctx.models.memories.base import Cell, Settings
from longctx.models.memories.memory_caching import MemoryCaching
from longctx.models.memory_config import Config
from longctx.parallel import aot
from tests import oracles
from tests.kernel_laws import wave

B, R, C, D, N, H, SLOTS = 2, 4, 3, 8, 2, 4, 2
VARIANTS = {'delta': {}, 'selective': dict(top=1), 'linear': dict(variant='linear'),
            'residual': dict(variant='delta_residual'), 'sum': dict(variant='linear_residual', size=R),
            'behind a window': dict(short_term=2, num_kv_heads=1),
            'behind a long one': dict(short_term=C + 1, variant='linear_residual')}
VALID = jnp.ones((B, C), bool)


@functools.cache
def block(name):
  settings = Settings(**dict(dim=D, num_heads=N, num_kv_heads=N, head_dim=H, segment=C, mlp='none',
                             std=0.6, out_std=0.6, size=SLOTS) | VARIANTS[name])
  return MemoryCaching(settings, rngs=nnx.Rngs(1))


@functools.cache
def inputs():
  return np.random.default_rng(0).normal(size=(B, R, C, D))


@functools.partial(jax.jit, static_argnums=0)
def run(graphdef, params, x_BRCD):
  """(what the layer adds, segment by segment [B, R, C, D]; the memory after)."""
  layer = nnx.merge(graphdef, params)
  def one(memory, x_BCD):
    y_BCD, memory = layer.mix(x_BCD, memory, Cell(VALID, jnp.zeros(B, jnp.int32)))
    return memory, y_BCD
  memory, y = jax.lax.scan(one, layer.init_memory(B), jnp.moveaxis(x_BRCD, 1, 0))
  return jnp.moveaxis(y, 0, 1), memory


def loops(p, x_RCD, slots, top, gated, window=0, held=None):
  """One row in float64; cached memories are mixed before they are read, as in the paper's soup.

  held: [R C, D] what the window keeps of the tokens, where it is no function of x (gradients).
  """
  silu = lambda z: z / (1 + np.exp(-z))
  unit = lambda z: z / np.sqrt((z * z).sum(-1, keepdims=True) + 1e-6)
  norm = lambda x: oracles.rms_norm(x, p['mixer_norm'], 1e-6)
  held = x_RCD.reshape(R * C, D) if held is None else held

  def projected(x):
    qkv = silu(np.einsum('cd,dinh->cinh', x, p['w_qkv']))
    return unit(qkv[:, 0]) * H ** -0.5, unit(qkv[:, 1]), qkv[:, 2]

  def learned(S, k, v, x):
    for n in range(N):
      wrong, beta = v[n], 1.0
      if 'w_beta' in p:
        wrong, beta = v[n] - k[n] @ S[n], 1 / (1 + np.exp(-x @ p['w_beta'][:, n]))
      S[n] = S[n] + beta * np.outer(k[n], wrong)

  cache, out = [], []
  for r, x_CD in enumerate(x_RCD):
    x, S, seen = norm(x_CD), np.zeros((N, H, H)), cache[-slots:]
    q, k, v = projected(x)
    first = max(0, r * C - window)
    around = norm(np.concatenate([held[first:r * C], x_CD]))
    for t in range(C):
      if not window:
        learned(S, k[t], v[t], x[t])
      mean = x[:t + 1].mean(0)
      weights = np.ones(len(seen) + 1)
      if gated:
        u = x[t] @ p['w_u']
        scores = np.array([u @ m for _, m in seen] + [u @ mean])
        chosen = sorted(range(len(seen)), key=lambda i: -scores[i])[:top or slots] + [len(seen)]
        weights = np.zeros(len(seen) + 1)
        weights[chosen] = np.exp(scores[chosen] - scores[chosen].max())
        weights /= weights.sum()
      soup = sum(w * M for w, M in zip(weights, [M for M, _ in seen] + [S]))
      y = np.array([oracles.rms_norm(q[t, n] @ soup[n], p['out_norm'], 1e-6) for n in range(N)])
      out.append(np.einsum('nh,nhd->d', y, p['w_out']))
    if not window:
      cache.append((S, mean))
      continue
    heads = {name: p[f'mixer_{name}'] for name in ('w_q', 'w_kv', 'w_out')}
    out[-C:] += oracles.heads_of(around, around, heads, lambda t, s: s <= t, 1e4)[-C:]
    old = [held[t] if t < r * C else x_CD[t - r * C] for t in range(first, r * C + C - window)]
    if old:
      x = norm(np.array(old))
      for t, (_, k, v) in enumerate(zip(*projected(x))):
        learned(S, k, v, x[t])
      cache.append((S, x.mean(0)))
  return np.array(out).reshape(x_RCD.shape), cache[-slots:]


def numbers(layer):
  p = dict(w_qkv=layer.w_qkv, w_out=layer.w_out, mixer_norm=layer.mixer_norm.scale,
           out_norm=layer.out_norm.scale)
  p |= {name: getattr(layer, name) for name in ('w_beta', 'w_u') if getattr(layer, name) is not None}
  if layer.mixer is not None:
    p |= {f'mixer_{name}': getattr(layer.mixer, name) for name in ('w_q', 'w_kv', 'w_out')}
  return {name: np.asarray(value[...], np.float64) for name, value in p.items()}


def by_loops(layer, p, x, held=None):
  s = layer.settings
  return [loops(p, row, s.size, s.top, layer.w_u is not None, s.short_term,
                None if held is None else held[b].reshape(R * C, D)) for b, row in enumerate(x)]


@pytest.mark.parametrize('name', VARIANTS)
def test_equals_loops(name):
  layer = block(name)
  y, memory = run(*nnx.split(layer), jnp.asarray(inputs(), jnp.float32))
  for b, (expected, cache) in enumerate(by_loops(layer, numbers(layer), inputs())):
    np.testing.assert_allclose(y[b], expected, atol=1e-4, rtol=1e-4)
    kept = slice(-len(cache), None)
    assert memory.store.count[b] == len(cache) and not memory.store.S[b, :-len(cache)].any()
    np.testing.assert_allclose(memory.store.S[b, kept], [S for S, _ in cache], atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(memory.store.mean[b, kept], [mean for _, mean in cache], atol=1e-5,
                               rtol=1e-4)


@pytest.mark.parametrize('name', ['delta', 'selective', 'behind a window'])
def test_gradients_are_those_of_finite_differences(name):
  layer = block(name)
  graphdef, params = nnx.split(layer)
  weigh = np.asarray(wave(inputs()), np.float64)
  loss = lambda params, x: (run(graphdef, params, x)[0] * weigh.astype(np.float32)).sum()
  dparams, dx = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, jnp.asarray(inputs(), jnp.float32))
  grads = numbers(nnx.merge(graphdef, dparams)) | {'x': dx}
  at, draw, step = numbers(layer) | {'x': inputs()}, np.random.default_rng(2), 1e-5
  for field, grad in grads.items():
    along = draw.normal(size=grad.shape)
    def theirs(sign, field=field, along=along):
      p = at | {field: at[field] + sign * step * along}
      found = by_loops(layer, p, p['x'], held=inputs())   # nothing goes back through a window
      return sum((y * w).sum() for (y, _), w in zip(found, weigh))
    np.testing.assert_allclose((grad * along).sum(), (theirs(1) - theirs(-1)) / (2 * step), rtol=3e-3,
                               atol=3e-3, err_msg=field)


def test_a_residual_of_linear_memories_is_one_memory():
  """Each from 0 and none dropped, they add up to linear attention over the whole document."""
  layer = block('sum')
  x = np.asarray(inputs(), np.float32)
  y, _ = run(*nnx.split(layer), x)
  q, k, v = (np.asarray(a, np.float64).reshape(B, R * C, N, H) for a in _heads(layer, x))
  for b in range(B):
    out = np.stack([oracles.decayed_sum(q[b, :, n], k[b, :, n], v[b, :, n], np.zeros(R * C), np.zeros((H, H)),
                                        np.zeros(R * C, bool), np.ones(R * C, bool))[0] for n in range(N)], 1)
    out = oracles.rms_norm(out, 1.0, 1e-6)
    expected = np.einsum('tnh,nhd->td', out, numbers(layer)['w_out'])
    np.testing.assert_allclose(y[b].reshape(R * C, D), expected, atol=1e-4, rtol=1e-4)


def _heads(layer, x):
  p = numbers(layer)
  qkv = np.einsum('brcd,dinh->ibrcnh', oracles.rms_norm(x, p['mixer_norm'], 1e-6), p['w_qkv'])
  qkv = qkv / (1 + np.exp(-qkv))
  unit = lambda z: z / np.sqrt((z * z).sum(-1, keepdims=True) + 1e-6)
  return unit(qkv[0]) * H ** -0.5, unit(qkv[1]), qkv[2]


def at_segment(windows, r):
  """The cache before segment r, by itself."""
  def cut(x):
    line = x.reshape(len(x), -1, *x.shape[3:])
    return line[:, r:r + windows.slots]
  tail = jax.tree.map(lambda x: x[:, r], windows.tail)
  return caching.State(jax.tree.map(cut, windows.S), cut(windows.mean), windows.count[:, r], tail)


@functools.cache
def drawn():
  """A cache with an empty slot, five segments' states, and what ten segments of two tokens ask."""
  draw = np.random.default_rng(3)
  normal = lambda *shape: jnp.asarray(draw.normal(size=shape), jnp.float32)
  cache = caching.State(normal(2, 3, N, H, H), normal(2, 3, D), jnp.array([1, 3]))
  filled = caching.there(cache)
  cache = cache._replace(S=jnp.where(filled[..., None, None, None], cache.S, 0),
                         mean=jnp.where(filled[..., None], cache.mean, 0))
  return cache, (normal(2, 5, N, H, H), normal(2, 5, D), normal(10, 2, D), normal(10, 2, D),
                 normal(10, 2, N, H))


@pytest.mark.parametrize('top', [0, 2])
def test_windows_say_what_each_cache_by_itself_says(top):
  """Values and gradients of gates, of reads with and without them, and of what any state says."""
  cache, inputs = drawn()

  def all_that_is_said(make, S, mean, u, own, q):
    windows, _ = caching.before(cache, S, mean, jnp.ones((2, 5), bool))
    cached = make(windows)
    gates = caching.gates(cached, u, own, top)
    say = lambda S: jnp.tanh(jnp.einsum('bcnh,bsnhv->bcsnv', q, S))
    out = (gates, caching.read(cached, q, gates[..., :-1]), caching.read(cached, q, None),
           caching.weigh(cached, say, gates[..., :-1]), caching.weigh(cached, say, None),
           caching.weigh(cached, lambda S: S[:, None, :, 0], gates[..., :-1]))
    return sum((y * wave(y)).sum() for y in out), out

  rows = lambda windows: jax.tree.map(lambda x: x.reshape(10, *x.shape[2:]), windows)
  def copied(windows):
    each = [at_segment(windows, r) for r in range(5)]
    return rows(jax.tree.map(lambda *x: jnp.stack(x, axis=1), *each))
  slopes = [jax.jit(jax.value_and_grad(functools.partial(all_that_is_said, make), argnums=range(5),
                                       has_aux=True))(*inputs) for make in (rows, copied)]
  for a, b in zip(*map(jax.tree.leaves, slopes), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4)


def test_all_segments_at_once_need_no_cache_each(optimized):
  """The memory of a gradient: states of the segments and slots, not of one times the other."""
  segments = slots = 64
  def loss(S, mean, u, q):
    cache = caching.empty(1, slots, jnp.zeros((1, N, 16, 16)), D)
    windows, _ = caching.before(cache, S, mean, jnp.ones((1, segments), bool))
    cached = jax.tree.map(lambda x: x[0], windows)
    gates = caching.gates(cached, u, u)
    return (caching.read(cached, q, gates[..., :-1]) ** 2).sum()
  shapes = ((1, segments, N, 16, 16), (1, segments, D), (segments, 2, D), (segments, 2, N, 16))
  slope = jax.jit(jax.grad(loss, argnums=range(4)))
  made = slope.lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile()
  state = 4 * N * 16 * 16
  assert aot.memory_of(made).temporary < 8 * (segments + slots) * state < segments * slots * state / 2


@pytest.mark.parametrize('name', [
    'delta', 'behind a window', pytest.param('behind a long one', marks=pytest.mark.slow)])
def test_the_caches_before_all_segments_are_those_of_one_after_the_other(name):
  """From a cache that is partly filled; the segments' memories are made side by side."""
  layer, x = block(name), jnp.asarray(inputs(), jnp.float32)
  graphdef, params = nnx.split(layer)
  _, memory = run(graphdef, params, x[:, :1])
  every = jnp.ones((B, R - 1, C), bool)
  befores, after = jax.jit(lambda params, x, memory: nnx.merge(graphdef, params).before(x, memory, every))(
      params, x[:, 1:], memory)
  for r in range(R - 1):
    expected = run(graphdef, params, x[:, :r + 1])[1]
    found = jax.tree.map(lambda x: x[:, r], befores.past), at_segment(befores.store, r)  # noqa: B023
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-6)
  for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(run(graphdef, params, x)[1]), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_corners_are_finite():
  """Tokens of zeros, padding alone, gates far past saturation: values and gradients."""
  graphdef, params = nnx.split(block('selective'))
  def loss(params, x, scale):
    layer = nnx.merge(graphdef, params)
    layer.w_u[...] = layer.w_u[...] * scale
    def one(memory, inputs):
      y, memory = layer.mix(inputs[0], memory, Cell(inputs[1], jnp.zeros(B, jnp.int32)))
      return memory, y
    valid = jnp.stack([VALID, VALID, ~VALID, VALID])
    memory, y = jax.lax.scan(one, layer.init_memory(B), (jnp.moveaxis(x, 1, 0), valid))
    return (y * wave(y)).sum(), memory
  grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
  for x, scale in ((np.zeros((B, R, C, D), np.float32), 1.0), (np.float32(inputs()), 1e4)):
    for leaf in jax.tree.leaves(grad(params, x, scale)):
      assert np.isfinite(leaf).all()


def test_its_state_is_as_counted():
  config = Config(long_term='memory_caching', vocab_size=13, num_layers=2, embed_dim=8, num_heads=2)
  state = config.layer_facts(256)[0].state
  assert state == 32 * (2 * 4 * 4 + 8) + 1
  assert state == sum(x.size for x in jax.tree.leaves(MemoryCaching(config.settings(), rngs=nnx.Rngs(0))
                                                      .init_memory(1)))


@pytest.mark.parametrize('settings, says', [
    (dict(memory_variant='soup'), 'delta_residual'), (dict(qk_norm=True), 'without model.short_term'),
    (dict(memory_width=8), "whose heads are the model's"),
    (dict(num_kv_heads=2), r'model.num_kv_heads=2: is not read by .* without model.short_term'),
    (dict(head_dim=16, memory_variant='gated_delta'), r'model.head_dim=16: .* set that, and leave'),
    (dict(memory_variant='rglru', memory_width=9), r'model.memory_width=9 stands for model.mixer_key_dim'),
    (dict(memory_top=33), 'at most model.memory_size=32'),
    (dict(memory_top=2, memory_variant='linear_residual'), "set 'linear'")])
def test_what_cannot_be_is_refused(settings, says):
  with pytest.raises(ConfigError, match=says):
    Config(long_term='memory_caching', **settings)
