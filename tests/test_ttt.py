"""TTT-Linear against loops over tokens: values, gradients, corners; the layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.errors import ConfigError
from longctx.memory import ttt
from longctx.models.memories.base import Cell, Memory, Past, Settings
from longctx.models.memories.ttt import TTT
from longctx.models.memory_config import Config
from tests import oracles

B, N, T, H = 2, 2, 12, 4


def layer_norm(z, scale, bias):
  return scale * (z - z.mean()) / np.sqrt(z.var() + 1e-6) + bias


def slope(z, target, scale, bias):
  """The gradient of |LN(z) - target|^2 by the whole matrix of LN's derivatives."""
  H, deviation = len(z), np.sqrt(z.var() + 1e-6)
  matrix = np.zeros((H, H))
  for i in range(H):      # of output i
    for j in range(H):    # by input j
      centred = (i == j) - 1 / H
      matrix[i, j] = scale[i] * (centred - (z[i] - z.mean()) * (z[j] - z.mean()) / (H * deviation ** 2)
                                 ) / deviation
  return 2 * (layer_norm(z, scale, bias) - target) @ matrix


def loops(W, b, q, k, v, eta, scale, bias, size):
  """(y [T, H], W, b) of one head: the primal form, every token's weights."""
  W, b, y = W.copy(), b.copy(), np.zeros(q.shape)
  for t in range(len(q)):
    if t % size == 0:
      W0, b0 = W.copy(), b.copy()
    g = slope(k[t] @ W0 + b0, v[t] - k[t], scale, bias)
    W -= eta[t] * np.outer(k[t], g)
    b -= eta[t] * g
    y[t] = q[t] + layer_norm(q[t] @ W + b, scale, bias)
  return y, W, b


@functools.cache
def case():
  """(state, tokens, norm) in float64, a token of padding among them."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal(shape)
  eta = 0.5 * rng.random((B, N, T))
  eta[:, :, 6] = 0
  return (ttt.State(0.5 * normal(B, N, H, H), 0.2 * normal(B, N, H)),
          ttt.Tokens(*normal(3, B, N, T, H), eta), ttt.Norm(1 + 0.3 * normal(N, H), 0.3 * normal(N, H)))


def by_loops(state, tokens, norm, size):
  y, W, b = np.zeros(tokens.q.shape), np.zeros(state.W.shape), np.zeros(state.b.shape)
  for r in range(len(y)):
    for n in range(N):
      y[r, n], W[r, n], b[r, n] = loops(state.W[r, n], state.b[r, n], *(x[r, n] for x in tokens),
                                        norm.scale[n], norm.bias[n], size)
  return y, ttt.State(W, b)


segment = jax.jit(ttt.segment, static_argnums=3)


def near(got, expected, **tolerance):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), got, expected)


def single(tree):
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def test_equals_loops():
  expected = by_loops(*case(), 4)
  with jax.enable_x64(True):
    near(segment(*jax.tree.map(jnp.asarray, case()), 4), expected, atol=1e-10)
  near(segment(*single(case()), 4), expected, atol=3e-5)


def test_gradients_are_those_of_the_loops():
  """Along random directions, float64: the loops' differences against the backward pass."""
  rng = np.random.default_rng(0)
  weigh = [rng.standard_normal(x.shape) for x in jax.tree.leaves(by_loops(*case(), 4))]
  loss = lambda out: sum((w * x).sum() for w, x in zip(weigh, jax.tree.leaves(out)))
  with jax.enable_x64(True):
    slopes = jax.jit(jax.grad(lambda x: loss(ttt.segment(*x, 4))))(jax.tree.map(jnp.asarray, case()))
    slopes = [np.asarray(x) for x in jax.tree.leaves(slopes)]
  for _ in range(3):
    way = jax.tree.map(lambda x: rng.standard_normal(x.shape), case())
    moved = lambda h: loss(by_loops(*jax.tree.map(lambda x, d: x + h * d, case(), way), 4))  # noqa: B023
    expected = (moved(1e-6) - moved(-1e-6)) / 2e-6
    got = sum((a * b).sum() for a, b in zip(slopes, jax.tree.leaves(way)))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@functools.cache
def sloped():
  def both(inputs):
    out = ttt.segment(*inputs, 4)
    return sum(jnp.sum(x ** 2) for x in jax.tree.leaves(out)), out
  return jax.jit(jax.value_and_grad(both, has_aux=True))


CORNERS = {
    'nothing known, zero keys': lambda s, t, n: (jax.tree.map(jnp.zeros_like, s),
                                                 t._replace(q=0 * t.q, k=0 * t.k), n),
    'padding': lambda s, t, n: (s, t._replace(eta=0 * t.eta), n),
    'large values': lambda s, t, n: (s, t._replace(v=1e4 * t.v), n),
}


@pytest.mark.parametrize('corner', CORNERS)
def test_corners_are_finite(corner):
  """No deviation at all: the root of a variance of 0 has no slope without its epsilon."""
  state, tokens, norm = CORNERS[corner](*single(case()))
  (_, (y, after)), slopes = sloped()((state, tokens, norm))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves((y, after, slopes)))
  if corner == 'padding':
    near(after, state, rtol=0, atol=0)


# The layer.

C, D, LENGTH = 6, 5, (6, 6, 4)
COUNT = {0: (0, 0, 0), 3: (3, 1, 2), 7: (7, 4, 2)}   # tokens in each row's window, by its size


def layer_loops(p, x, held, count, length, W, b):
  """One row: (what is added to the residual, W, b). With a window M_before speaks, and what falls learns."""
  norm = lambda y: oracles.rms_norm(y, p['mixer_norm']['scale'], 1e-3)
  def project(y):
    u = norm(y)
    return [np.einsum('td,dinh->itnh', u, p['w_qkv']), 2 / H / (1 + np.exp(-(u @ p['w_eta'] + p['b_eta'])))]
  window, (qkv, eta) = len(held), project(x)
  stream = np.concatenate([held, x])[:C]
  there = np.array([j >= window - count for j in range(window)] + [i < length for i in range(C)])[:C]
  if window:
    (_, k, v), eta = project(stream)
  else:
    k, v = qkv[1:]
  said, after = np.zeros((C, N, H)), []
  for n in range(N):
    learn = lambda q: loops(W[n], b[n], q, k[:, n], v[:, n], np.where(there, eta[:, n], 0),  # noqa: B023
                            p['norm_scale'][n], p['norm_bias'][n], 3)  # noqa: B023
    said[:, n], *end = learn(qkv[0][:, n])
    after.append(end)
    if window:
      said[:, n] = [q + layer_norm(q @ W[n] + b[n], p['norm_scale'][n], p['norm_bias'][n])
                    for q in qkv[0][:, n]]
  out = np.array([layer_norm(y.ravel(), p['out_scale'].ravel(), p['out_bias'].ravel()) for y in said])
  out = out @ p['w_out'].reshape(-1, D)
  if window:
    all_ = norm(np.concatenate([held[window - count:], x]))
    out += oracles.heads_of(all_, all_, p['mixer'], lambda t, s: s <= t, 1e4)[-C:]
  return out, *map(np.stack, zip(*after))


@functools.cache
def layer(window):
  rng = np.random.default_rng(1)
  settings = Settings(dim=D, num_heads=N, num_kv_heads=N, head_dim=H, segment=C, chunk=3, rate=2,
                      std=0.5, out_std=0.5, norm_epsilon=1e-3, mlp='none', short_term=window)
  graphdef, params = nnx.split(TTT(settings, rngs=nnx.Rngs(0)))
  noisy = lambda x: x + 0.3 * jnp.asarray(rng.standard_normal(x.shape), x.dtype)
  params = jax.tree.map(noisy, params)
  x, held = noisy(jnp.zeros((3, C, D))) / 0.3, noisy(jnp.zeros((3, window, D)))
  store = jax.tree.map(noisy, nnx.merge(graphdef, params).init_store(3))
  cell = Cell(jnp.arange(C) < jnp.asarray(LENGTH)[:, None], jnp.zeros((3,), jnp.int32))
  past = lambda held: Past(held, jnp.asarray(COUNT[window])) if window else None
  mix = lambda params, x, held, store: nnx.merge(graphdef, params).mix(x, Memory(past(held), store), cell)
  return mix, (params, x, held, store)


def rows_by_loops(params, x, held, store, window):
  return [layer_loops(params, x[b], held[b], COUNT[window][b], LENGTH[b], store.W[b], store.b[b])
          for b in range(3)]


def wide(params, *rest):
  return jax.tree.map(lambda y: np.asarray(y, np.float64), (nnx.to_pure_dict(params), *rest))


@pytest.mark.parametrize('window', [0, 3, pytest.param(7, marks=pytest.mark.slow)])
def test_layer_equals_loops(window):
  mix, at = layer(window)
  out, after = jax.jit(mix)(*at)
  for b, (expected, W, bias) in enumerate(rows_by_loops(*wide(*at), window)):
    np.testing.assert_allclose(out[b, :LENGTH[b]], expected[:LENGTH[b]], atol=3e-4)
    if LENGTH[b] == C:   # an unfinished segment's memory is dropped by who called
      near(jax.tree.map(lambda z: z[b], after.store), ttt.State(W, bias), atol=2e-4)  # noqa: B023
  if window:
    np.testing.assert_array_equal(after.past.count, [min(window, c + C) for c in COUNT[window]])
    np.testing.assert_array_equal(after.past.hidden, np.concatenate([at[2], at[1]], axis=1)[:, -window:])


def test_gradients_behind_a_window_are_those_of_the_loops():
  """Along a direction of all parameters, tokens and the store; what a window holds has none."""
  mix, at = layer(3)
  rng = np.random.default_rng(2)
  weigh = rng.standard_normal((2, C, D))
  total = lambda rows: sum((y * w).sum() + (W ** 2).sum() + (b ** 2).sum()
                           for (y, W, b), w in zip(rows, weigh))
  def loss(*at):
    out, after = mix(*at)
    return total((out[b], after.store.W[b], after.store.b[b]) for b in range(2))
  slopes = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*at)
  assert not np.asarray(slopes[2]).any()
  start = wide(*at)
  way = jax.tree.map(lambda y: rng.standard_normal(y.shape), start)
  way[2][:] = 0
  moved = lambda h: total(rows_by_loops(*jax.tree.map(lambda y, d: y + h * d, start, way), 3))
  got = sum((a * b).sum() for a, b in zip(jax.tree.leaves(wide(*slopes)), jax.tree.leaves(way), strict=True))
  np.testing.assert_allclose(got, (moved(1e-5) - moved(-1e-5)) / 2e-5, rtol=2e-3)


@pytest.mark.parametrize('field,value,words', [
    ('memory_chunk', 4, 'must divide model.segment=6'), ('qk_norm', True, 'has no attention'),
    ('position', 'relative', 'without model.short_term'), ('memory_depth', 2, 'is not read')])
def test_mistakes_are_named(field, value, words):
  with pytest.raises(ConfigError, match=words):
    Config(**dict(vocab_size=9, embed_dim=8, num_heads=2, segment=6, long_term='ttt') | {field: value})
