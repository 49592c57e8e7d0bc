"""TTT-Linear against loops over tokens: values, gradients, corners; the layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.errors import ConfigError
from longctx.memory import ttt
from longctx.models.memories.base import Cell, Memory, Settings
from longctx.models.memories.ttt import TTT
from longctx.models.memory_config import Config

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


def test_layer_equals_loops():
  rng = np.random.default_rng(1)
  C, D = 6, 5
  settings = Settings(dim=D, num_heads=N, num_kv_heads=N, head_dim=H, segment=C, chunk=3, rate=2,
                      std=0.5, out_std=0.5, norm_epsilon=1e-3, mlp='none')
  graphdef, params = nnx.split(TTT(settings, rngs=nnx.Rngs(0)))
  params = jax.tree.map(lambda x: x + 0.3 * jnp.asarray(rng.standard_normal(x.shape), x.dtype), params)
  block = nnx.merge(graphdef, params)
  x = jnp.asarray(rng.standard_normal((2, C, D)), jnp.float32)
  cell = Cell(jnp.arange(C) < jnp.asarray([C, 4])[:, None], jnp.zeros((2,), jnp.int32))
  out, after = jax.jit(lambda x: block.mix(x, Memory(None, block.init_store(2)), cell))(x)
  p = jax.tree.map(lambda y: np.asarray(y, np.float64), nnx.to_pure_dict(params))
  for b, length in enumerate((C, 4)):
    u = np.asarray(x[b], np.float64)
    u = u / np.sqrt((u * u).mean(-1, keepdims=True) + 1e-3) * p['mixer_norm']['scale']
    y = np.zeros((C, N, H))
    for n in range(N):
      q, k, v = (u @ p['w_qkv'][:, i, n] for i in range(3))
      eta = 2 / H / (1 + np.exp(-(u @ p['w_eta'][:, n] + p['b_eta'][n])))
      y[:, n], W, bias = loops(p['start_W'][n], p['start_b'][n], q, k, v,
                               np.where(np.arange(C) < length, eta, 0), p['norm_scale'][n],
                               p['norm_bias'][n], 3)
      near(jax.tree.map(lambda z: z[b, n], after.store), ttt.State(W, bias), atol=1e-4)  # noqa: B023
    for t in range(length):
      said = layer_norm(y[t].ravel(), p['out_scale'].ravel(), p['out_bias'].ravel())
      np.testing.assert_allclose(out[b, t], said @ p['w_out'].reshape(-1, D), atol=2e-4)


@pytest.mark.parametrize('field,value,words', [
    ('memory_chunk', 4, 'must divide model.segment=6'), ('short_term', 4, 'has no attention'),
    ('position', 'relative', 'has no attention'), ('memory_depth', 2, 'is not read')])
def test_mistakes_are_named(field, value, words):
  with pytest.raises(ConfigError, match=words):
    Config(**dict(vocab_size=9, embed_dim=8, num_heads=2, segment=6, long_term='ttt') | {field: value})
