"""Infini-attention's memory: its equations in loops, all segments at once, corners, rotary keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.memory import infini
from longctx.models.memories.base import Cell, Settings
from longctx.models.memories.infini import Infini
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
  def heard(k, v, q):
    return infini.read(infini.write(state, k, v, jnp.ones((1, C), bool), delta=True), q)
  assert (np.asarray(heard(k, jnp.ones_like(k), q)) == 0).all()
  grads = jax.grad(lambda *args: heard(*args).sum(), (0, 1, 2))(k, jnp.ones_like(k), q)
  assert all(np.isfinite(g).all() for g in grads)


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


def by_loops(block, x, short_term, turned):
  """A layer's segments of one row: what it adds to the residual, M and z after them.

  `turned`: the mistake that queries and keys meet the memory as they meet each other.
  """
  s, number = block.settings, lambda x: np.asarray(x.get_value(), np.float64)
  w_kv = number(block.mixer.w_kv)
  p = dict(norm=number(block.mixer_norm.scale), w_q=number(block.mixer.w_q), w_k=w_kv[:, 0],
           w_v=w_kv[:, 1])
  (q, k, v), (q_turned, k_turned), near = oracles.segment_attention(
      x, p, segment=C, short_term=short_term, base=s.rope_base, epsilon=s.norm_epsilon)
  if turned:
    q, k = q_turned, k_turned
  gate = 1 / (1 + np.exp(-number(block.gate)))
  M, z, out = np.zeros((K, 4, 4)), np.zeros((K, 4)), np.zeros_like(near)
  for start in range(0, len(x), C):
    here = slice(start, start + C)
    for n in range(N):
      head = n // (N // K)
      out[here, n] = ((1 - gate[n]) * near[here, n]
                      + gate[n] * oracles.infini_read(M[head], z[head], q[here, n]))
    falls = slice(max(0, start - short_term), start + C - short_term)
    for h in range(K):
      M[h], z[h] = oracles.infini_write(M[h], z[h], k[falls, h], v[falls, h], s.variant != 'linear')
  return np.einsum('tnh,nhd->td', out, number(block.mixer.w_out)), M, z


@pytest.mark.parametrize('variant, short_term', [('', 0), ('linear', 2)])
def test_only_attention_turns_queries_and_keys_by_their_positions(variant, short_term):
  """The memory has no positions: neither what is written nor what asks is turned."""
  settings = Settings(dim=8, num_heads=N, num_kv_heads=K, head_dim=4, segment=C, mlp='none',
                      std=0.5, out_std=0.5, variant=variant, short_term=short_term,
                      attention='reference')
  block = Infini(settings, rngs=nnx.Rngs(0))
  block.gate[...] = jnp.asarray([-1.0, 0.0, 1.0, 2.0])
  x = draw(3 * C, 8, seed=5)

  @jax.jit
  def read(x_STD):
    memory, said = block.init_memory(1), []
    cell = Cell(jnp.ones((1, C), bool), jnp.zeros(1, jnp.int32))
    for x_TD in x_STD:
      y, memory = block.mix(x_TD[None], memory, cell)
      said.append(y[0])
    return jnp.concatenate(said), memory.store.M[0], memory.store.z[0]

  found = read(jnp.asarray(x.reshape(3, C, 8), jnp.float32))
  for a, b in zip(found, by_loops(block, x, short_term, turned=False)):
    np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)
  for a, b in zip(found, by_loops(block, x, short_term, turned=True)):
    assert np.abs(a - b).max() > 1e-2   # and the difference would be seen
