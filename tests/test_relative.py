"""Transformer-XL's relative attention: loops over its equation, the shift of its scores, empty pasts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.memory import relative
from longctx.models.memories.base import Cell, Past, attention_mask
from tests import oracles

B, C, M, N, K, H, D = 2, 5, 4, 4, 2, 6, 8


def draw(*shape, seed):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def mask(counts, valid):
  past = Past(jnp.zeros((B, M, D)), jnp.asarray(counts, jnp.int32))
  return attention_mask(past, Cell(jnp.asarray(valid), jnp.zeros((B,), jnp.int32)))


@pytest.mark.parametrize('counts', [(M, M), (0, 2)])
def test_scores_equal_loops(counts):
  q, k, v = draw(B, C, N, H, seed=1), draw(B, M + C, K, H, seed=2), draw(B, M + C, K, H, seed=3)
  u, bias, w = draw(N, H, seed=4), draw(N, H, seed=5), draw(D, N, H, seed=6)
  valid = np.array([[True] * C, [True] * 3 + [False] * 2])
  out = relative.attention(*map(jnp.asarray, (q, k, v)), mask(counts, valid), u, bias, w)
  for b in range(B):
    slot = np.arange(M + C)
    there = np.concatenate([np.arange(M) >= M - counts[b], valid[b]])
    sees = there & (slot <= M + np.arange(C)[:, None]) & valid[b][:, None]
    for n in range(N):
      kv = n // (N // K)
      expected = oracles.relative_attention(
          *(np.asarray(x, np.float64) for x in (q[b, :, n], k[b, :, kv], v[b, :, kv])), sees, u[n],
          w[:, n].astype(np.float64), bias[n])
      np.testing.assert_allclose(out[b, :, n], expected, atol=2e-5, rtol=2e-5)
  assert np.abs(out).max() > 0.3


def test_the_first_row_is_dropped_by_the_shift_and_not_the_last():
  """labml's copy drops the last (issue 185): every distance is then off by one."""
  x = jnp.arange(3 * 5, dtype=jnp.float32).reshape(1, 1, 3, 5)   # query i, distance 4 - n
  shifted = relative.shift(x)[0, 0]
  for i in range(3):
    for j in range(3 + i):   # key j is at distance i + 2 - j
      assert shifted[i, j] == x[0, 0, i, 4 - (i + 2 - j)]


def test_what_sees_nothing_gives_0_and_a_finite_gradient():
  q, k, v = draw(B, C, N, H, seed=1), draw(B, M + C, K, H, seed=2), draw(B, M + C, K, H, seed=3)
  u, bias, w = draw(N, H, seed=4), draw(N, H, seed=5), draw(D, N, H, seed=6)
  none = mask((0, 0), np.zeros((B, C), bool))
  run = lambda *args: relative.attention(*args[:3], none, *args[3:])
  args = tuple(map(jnp.asarray, (q, k, v, u, bias, w)))
  assert (np.asarray(run(*args)) == 0).all()
  grads = jax.grad(lambda *args: run(*args).sum(), tuple(range(6)))(*args)
  assert all((np.asarray(g) == 0).all() for g in grads)
