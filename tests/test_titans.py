"""Titans' memory against loops over tokens and matrices: values, gradients, corners."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.memory import titans
from longctx.parallel import aot

erf = np.vectorize(math.erf)
act = lambda z: z * 0.5 * (1 + erf(z / math.sqrt(2)))


def slope(z):
  return 0.5 * (1 + erf(z / math.sqrt(2))) + z * np.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def mlp(weights, x):
  """M(x) of one token and the input of each matrix; x [H]."""
  inputs = [x]
  for i, W in enumerate(weights):
    z = inputs[-1] @ W
    inputs.append(act(z) if i < len(weights) - 1 else z)
  return inputs.pop(), inputs


def loops(weights, momenta, q, k, v, alpha, eta, theta, valid, size, max_norm=1.0):
  """Token by token with every token's weights: (y [T, H], weights, momenta) of one head."""
  weights, momenta = [W.copy() for W in weights], [S.copy() for S in momenta]
  y = np.zeros(q.shape)
  for t in range(len(q)):
    if t % size == 0:
      start = [W.copy() for W in weights]
    y[t] = mlp(weights, q[t])[0]
    if not valid[t]:
      continue
    said, inputs = mlp(start, k[t])
    grads, d = [None] * len(start), 2 * (said - v[t])
    for i in reversed(range(len(start))):
      grads[i] = np.outer(inputs[i], d)
      if i:
        d = (start[i] @ d) * slope(inputs[i - 1] @ start[i - 1])
    norm = math.sqrt(sum((g ** 2).sum() for g in grads))
    for i, g in enumerate(grads):
      momenta[i] = eta[t] * momenta[i] - theta[t] * g * min(1.0, max_norm / max(norm, 1e-300))
      weights[i] = (1 - alpha[t]) * weights[i] + momenta[i]
    y[t] = mlp(weights, q[t])[0]
  return y, weights, momenta


B, N, T, H, WIDTH = 2, 2, 12, 4, 5
DEPTHS = (1, 2, 3)
slow = lambda *args: pytest.param(*args, marks=pytest.mark.slow)


@functools.cache
def case(depth):
  """State and tokens in float64. Gates of exactly 0 and 1, a zero key, padding in the middle."""
  rng = np.random.default_rng(depth)
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  shapes = titans.shapes(H, WIDTH, depth)
  state = titans.State(*(tuple(s * rng.standard_normal((B, N, *shape)) for shape in shapes)
                         for s in (0.5, 0.1)))
  q, k = unit(rng.standard_normal((2, B, N, T, H)))
  k[:, :, 5] = 0.0
  v = 0.4 * rng.standard_normal((B, N, T, H))
  alpha, eta, theta = rng.random((3, B, N, T)) * np.array([0.3, 1.0, 0.5])[:, None, None, None]
  alpha[:, 0, 2], alpha[:, 1, 3], eta[:, 0, 7], eta[:, 1, 8], theta[:, 1, 9] = 1, 0, 0, 1, 0
  return state, titans.Tokens(q, k, v, alpha, eta, theta, np.arange(T) + np.zeros((B, N, 1)) != 10)


def single(x):
  return jnp.asarray(x, bool if x.dtype == bool else jnp.float32)


@functools.cache
def low(depth):
  return jax.tree.map(single, case(depth))


def by_loops(state, tokens, size, max_norm=1.0):
  y, W, S = np.zeros(tokens.q.shape), *(jax.tree.map(np.zeros_like, x) for x in state)
  for b in range(B):
    for n in range(N):
      one = lambda tree: [x[b, n] for x in tree]   # noqa: B023
      y[b, n], weights, momenta = loops(one(state.weights), one(state.momenta), *one(tokens), size,
                                        max_norm)
      for into, values in ((W, weights), (S, momenta)):
        for to, value in zip(into, values):
          to[b, n] = value
  return y, titans.State(W, S)


segment = jax.jit(titans.segment, static_argnums=2)


@pytest.mark.parametrize('depth', [1, 2])
def test_no_token_has_weights_of_its_own(depth):
  """Forward and backward need a few copies of the memory, far from one for each token of a chunk."""
  C, wide = 64, 64
  row = lambda *shape: jax.ShapeDtypeStruct((1, 1, *shape), jnp.float32)
  weights = tuple(row(*shape) for shape in titans.shapes(wide, 4 * wide, depth))
  tokens = titans.Tokens(*[row(C, wide)] * 3, *[row(C)] * 3, jax.ShapeDtypeStruct((1, 1, C), bool))
  def loss(state, tokens):
    y, after = titans.segment(state, tokens, C)
    return (y ** 2).sum() + sum((x ** 2).sum() for x in jax.tree.leaves(after))
  compiled = jax.jit(jax.grad(loss, allow_int=True)).lower(titans.State(weights, weights), tokens).compile()
  of_one = sum(w.size * 4 for w in weights)
  assert aot.memory_of(compiled).temporary < 16 * of_one < C * of_one / 2


def near(got, expected, **tolerance):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), got, expected)


@pytest.mark.parametrize('depth,size', [(1, 12), (2, 4), slow(1, 4), slow(2, 12), slow(3, 4), slow(3, 12)])
def test_equals_loops(depth, size):
  state, tokens = case(depth)
  expected = by_loops(state, tokens, size)
  with jax.enable_x64(True):
    near(segment(*jax.tree.map(jnp.asarray, (state, tokens)), size), expected, atol=1e-10)
  near(segment(*low(depth), size), expected, atol=1e-5)


def test_the_case_has_gradients_on_both_sides_of_the_clip():
  for depth in DEPTHS:
    state, tokens = case(depth)
    inputs, d = titans.gradients(state.weights, tokens.k, tokens.v)
    norm = np.sqrt(sum((a ** 2).sum(-1) * (x ** 2).sum(-1) for a, x in zip(inputs, d)))
    assert (norm < 0.999).any() and (norm > 0.999).any()
    assert norm.max() <= 1 + 1e-5


@pytest.mark.parametrize('depth', [1, 2, slow(3)])
def test_gradients_are_those_of_the_loops(depth):
  """Along random directions, float64: the loops' differences against the backward pass."""
  rng = np.random.default_rng(0)
  state, tokens = case(depth)
  valid = tokens.valid
  start = state, floats(tokens)
  run = lambda f, x: f(x[0], x[1]._replace(valid=valid), 4)
  y, after = run(by_loops, start)
  weigh = [rng.standard_normal(x.shape) for x in jax.tree.leaves((y, after))]
  loss = lambda out: sum((w * x).sum() for w, x in zip(weigh, jax.tree.leaves(out)))
  with jax.enable_x64(True):
    slope_of = jax.jit(jax.grad(lambda x: loss(run(titans.segment, x))))
    slopes = jax.tree.map(np.asarray, slope_of(jax.tree.map(jnp.asarray, start)))
  for _ in range(3):
    way = jax.tree.map(lambda x: rng.standard_normal(x.shape), start)
    moved = lambda h: loss(run(by_loops, jax.tree.map(lambda x, d: x + h * d, start, way)))  # noqa: B023
    expected = (moved(1e-5) - moved(-1e-5)) / 2e-5
    got = sum((a * b).sum() for a, b in zip(jax.tree.leaves(slopes), jax.tree.leaves(way)))
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@functools.cache
def sloped(size):
  """(results, gradients of their sum)."""
  def both(inputs, valid):
    state, tokens = inputs
    out = titans.segment(state, tokens._replace(valid=valid), size)
    return sum(jnp.sum(x) for x in jax.tree.leaves(out)), out
  return jax.jit(jax.value_and_grad(both, has_aux=True))


def floats(x):
  """Without what has no gradient."""
  return x._replace(valid=())


def test_padding_changes_nothing():
  """Bit for bit, whatever stands in it; weights do not even follow the momentum."""
  state, tokens = low(2)
  valid = jnp.broadcast_to(jnp.arange(T) < 6, (B, N, T))
  hide = lambda fill: jax.tree.map(
      lambda x: x.at[:, :, 6:].set(fill), floats(tokens))._replace(valid=valid)
  y, after = segment(state, hide(0.5), 4)
  other_y, other = segment(state, hide(77.0), 4)
  near((other_y[:, :, :6], other), (y[:, :, :6], after), rtol=0, atol=0)
  _, nothing = segment(state, tokens._replace(valid=jnp.zeros_like(valid)), 4)
  near(nothing, state, rtol=0, atol=0)


def test_momentum_goes_on_from_chunk_to_chunk_and_segment_to_segment():
  """Public code forgot it between calls: without it the second half differs."""
  state, tokens = low(2)
  part = lambda a, b: jax.tree.map(lambda x: x[:, :, a:b], tokens)
  whole_y, whole = segment(state, tokens, 4)
  ys = []
  for a in (0, 4, 8):
    before, (y, state) = state, segment(state, part(a, a + 4), 4)
    ys.append(y)
  near((jnp.concatenate(ys, axis=2), state), (whole_y, whole), atol=1e-6)
  lost = before._replace(momenta=jax.tree.map(jnp.zeros_like, before.momenta))
  assert np.abs(segment(lost, part(8, 12), 4)[0] - ys[-1]).max() > 1e-2


CORNERS = {
    'nothing known, nothing taught': lambda s, t: (jax.tree.map(jnp.zeros_like, s),
                                                   t._replace(v=jnp.zeros_like(t.v))),
    'zero keys': lambda s, t: (s, t._replace(q=jnp.zeros_like(t.q), k=jnp.zeros_like(t.k))),
    'all forgotten': lambda s, t: (s, t._replace(alpha=jnp.ones_like(t.alpha),
                                                 eta=jnp.zeros_like(t.eta))),
    'nothing forgotten': lambda s, t: (s, t._replace(alpha=jnp.zeros_like(t.alpha),
                                                     eta=jnp.ones_like(t.eta))),
    'far too far': lambda s, t: (s, t._replace(v=1e4 * t.v)),
    'padding': lambda s, t: (s, t._replace(valid=jnp.zeros_like(t.valid))),
}


@pytest.mark.parametrize('corner', CORNERS)
def test_corners_are_those_of_the_loops_and_have_finite_gradients(corner):
  """The published clip divides by the norm: a memory that has nothing to learn gives NaN there."""
  state, tokens = CORNERS[corner](*low(2))
  (_, out), slopes = sloped(4)((state, floats(tokens)), tokens.valid)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(slopes))
  expected = by_loops(*jax.tree.map(np.asarray, (state, tokens)), 4)
  near(out, expected, atol=2e-5)


def test_a_thousand_chunks_at_a_rate_where_the_naive_form_is_lost():
  """theta = 1, chunks of 16 tokens that repeat their keys: without the clip, infinity and NaN."""
  rng = np.random.default_rng(0)
  keys = rng.standard_normal((1, 1, 4, H))
  keys = jnp.asarray(keys / np.linalg.norm(keys, axis=-1, keepdims=True), jnp.float32)
  v = jnp.asarray(rng.standard_normal((1, 1, 4, H)), jnp.float32)
  four = lambda x: jnp.tile(x, (1, 1, 4, 1))
  number = lambda value: jnp.full((1, 1, 16), value)
  tokens = titans.Tokens(four(keys), four(keys), four(v), number(0.02), number(0.5), number(1.0),
                         jnp.ones((1, 1, 16), bool))
  state = jax.tree.map(lambda x: x[:1, :1], low(2)[0])

  @functools.partial(jax.jit, static_argnums=1)
  def last(state, max_norm):
    after, y = jax.lax.scan(lambda s, _: titans.chunk(s, tokens, max_norm)[::-1], state, None, 1000)
    return y[-1], after
  y, after = last(state, titans.MAX_NORM)
  assert np.isfinite(y).all() and all(np.abs(x).max() < 1e3 for x in jax.tree.leaves(after))
  assert np.isnan(last(state, math.inf)[0]).all()
