"""Infini-attention's memory: its equations in loops, all segments at once, corners, rotary keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.memory import infini
from tests import oracles

B, S, C, N, K, H = 2, 4, 5, 4, 2, 3


def draw(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape)


def filled(seed=9):
  """A state as some segments leave it: z is positive."""
  return infini.State(jnp.asarray(draw(B, K, H, H, seed=seed)), jnp.asarray(draw(B, K, H, seed=seed) ** 2 + 1))


@pytest.mark.parametrize('delta', [False, True])
def test_segments_equal_loops(delta):
  q, k, v = draw(B, S, C, N, H, seed=1), draw(B, S, C, K, H, seed=2), draw(B, S, C, K, H, seed=3)
  valid = np.ones((B, C), bool)
  valid[1, 3:] = False
  state = infini.empty(B, K, H)
  M, z = np.zeros((B, K, H, H)), np.zeros((B, K, H))
  for s in range(S):
    out = infini.read(state, jnp.asarray(q[:, s], jnp.float32))
    for b in range(B):
      for n in range(N):
        kv = n // (N // K)
        np.testing.assert_allclose(out[b, :, n], oracles.infini_read(M[b, kv], z[b, kv], q[b, s, :, n]),
                                   atol=2e-5, rtol=2e-5)
    state = infini.write(state, jnp.asarray(k[:, s], jnp.float32), jnp.asarray(v[:, s], jnp.float32),
                         jnp.asarray(valid), delta=delta)
    for b in range(B):
      for h in range(K):
        count = valid[b].sum()   # padding stands last
        M[b, h], z[b, h] = oracles.infini_write(M[b, h], z[b, h], k[b, s, :count, h], v[b, s, :count, h],
                                                delta)
    np.testing.assert_allclose(state.M, M, atol=2e-5, rtol=2e-5)
    np.testing.assert_allclose(state.z, z, atol=2e-5, rtol=2e-5)
  assert np.abs(M).max() > 0.3


@pytest.mark.parametrize('delta', [False, True])
@pytest.mark.parametrize('start', ['empty', 'filled'])
def test_all_segments_at_once_equal_one_by_one(start, delta):
  k, v = (jnp.asarray(draw(B, S, C, K, H, seed=i), jnp.float32) for i in (2, 3))
  valid = jnp.asarray(np.arange(S * C).reshape(S, C) < S * C - 2) & jnp.ones((B, 1, 1), bool)
  first = jax.tree.map(lambda x: x.astype(jnp.float32), filled() if start == 'filled' else infini.empty(B, K, H))

  def at_once(state, k, v):
    return infini.before(state, k, v, valid, delta=delta)

  def one_by_one(state, k, v):
    befores = []
    for s in range(S):
      befores.append(state)
      state = infini.write(state, k[:, s], v[:, s], valid[:, s], delta=delta)
    return jax.tree.map(lambda *x: jnp.stack(x, 1), *befores), state

  def check(function):
    weigh = lambda tree: sum((x * jnp.cos(jnp.arange(x.size).reshape(x.shape))).sum()
                             for x in jax.tree.leaves(tree))
    out = function(first, k, v)
    return out, jax.grad(lambda *args: weigh(function(*args)), (0, 1, 2))(first, k, v)

  for a, b in zip(jax.tree.leaves(jax.jit(lambda: check(at_once))()),
                  jax.tree.leaves(jax.jit(lambda: check(one_by_one))())):
    np.testing.assert_allclose(a, b, atol=3e-5, rtol=3e-5)


def test_an_empty_memory_reads_zero_with_a_finite_gradient():
  """The first segment: z is 0, and 0 / 0 or an epsilon in its place would be something."""
  state, q = infini.empty(1, 1, H), jnp.asarray(draw(1, C, 1, H), jnp.float32)
  assert (np.asarray(infini.read(state, q)) == 0).all()
  grads = jax.grad(lambda state, q: infini.read(state, q).sum(), (0, 1))(state, q)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
  # Keys so negative that phi of them is 0 in float32 write and find nothing.
  k = jnp.full((1, C, 1, H), -200.0)
  after = infini.write(state, k, jnp.ones_like(k), jnp.ones((1, C), bool), delta=True)
  assert (np.asarray(infini.read(after, q)) == 0).all()


def test_what_is_written_in_bfloat16_is_summed_in_float32():
  """Sums in bfloat16 stop growing at 256 tokens of phi = 1 (a public bug: infinite or stuck memories)."""
  state = infini.empty(1, 1, 1)
  k = jnp.zeros((1, 512, 1, 1), jnp.bfloat16)
  for _ in range(4):
    state = infini.write(state, k, jnp.ones_like(k), jnp.ones((1, 512), bool), delta=False)
  assert state.z.dtype == state.M.dtype == jnp.float32
  assert float(state.z[0, 0, 0]) == float(state.M[0, 0, 0, 0]) == 2048


def test_the_delta_rule_writes_what_the_memory_gets_wrong():
  """A key that stood for 1 is written with 5: the sum holds 1 + 5 for it, the delta rule 1 + (5 - 1).

  Both are read over z, which has seen the key twice.
  """
  key = jnp.asarray([[[[3.0, -30.0, -30.0]]]])
  for delta, answer in ((True, 5 / 2), (False, 6 / 2)):
    state = infini.empty(1, 1, H)
    for value in (1.0, 5.0):
      state = infini.write(state, key, jnp.full((1, 1, 1, H), value), jnp.ones((1, 1), bool),
                           delta=delta)
    assert float(infini.read(state, key)[0, 0, 0, 0]) == pytest.approx(answer, abs=1e-4)
