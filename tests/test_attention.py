"""Attention of every kind held to the definition: values, gradients, causality, merge, memory.

B batch  T queries  S keys  N query heads  K kv heads  H head dim
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.attention import IMPLEMENTATIONS, attend, blockwise, merge
from tests import oracles

H, SCALE = 8, 8 ** -0.5


def causal(batch, length):
  return (np.zeros((batch, length), np.int32),
          np.tile(np.arange(1, length + 1, dtype=np.int32), (batch, 1)),
          np.tile(np.arange(length, dtype=np.int32), (batch, 1)))


def packed(batch, length):
  """Documents of uneven lengths, other ones in each row."""
  start, end, index = causal(batch, length)
  for b in range(batch):
    cuts = sorted({0, *np.random.RandomState(b).randint(1, length, 4)})
    start[b] = [max(c for c in cuts if c <= t) for t in range(length)]
  return start, end, index


def window(batch, length, size=11):
  start, end, index = causal(batch, length)
  return np.maximum(start, end - size), end, index


def padding(batch, length):
  """Some queries see nothing, whole blocks of them too; some keys (index -1) nobody sees."""
  start, end, index = causal(batch, length)
  end[0, 5:8] = start[0, 5:8]
  end[-1, :length // 2] = 0
  index[0, length - 3:] = -1
  return start, end, index


def cross(batch, queries, keys):
  """Keys before and after the queries in any order, as in a ring cache; prefix and suffix seen."""
  r = np.random.RandomState(7)
  index = np.stack([r.permutation(keys) for _ in range(batch)]).astype(np.int32)
  start = r.randint(0, keys // 2, (batch, queries)).astype(np.int32)
  return start, (start + r.randint(0, keys, (batch, queries))).astype(np.int32), index


LENGTH = 45   # neither a multiple of a block nor less than one; one shape compiles once
MASKS = {'causal': causal(2, LENGTH), 'packed': packed(2, LENGTH), 'window': window(2, LENGTH),
         'padding': padding(2, LENGTH), 'any order': cross(2, LENGTH, LENGTH)}
CROSS = {'short': cross(2, 9, 43), 'long': cross(2, 43, 17), 'one query': cross(2, 1, 33),
         'one key': causal(2, 1)}
HEADS = {'MHA': (2, 2), 'GQA': (6, 2), 'MQA': (4, 1)}
RUNS = {'reference': IMPLEMENTATIONS['reference'],
        'blockwise': functools.partial(blockwise.attend, block=16)}


def arrays(seed, queries, keys, heads, batch=2):
  r = np.random.RandomState(seed)
  n, k = HEADS[heads]
  return tuple(r.randn(batch, *shape, H).astype(np.float32)
               for shape in ((queries, n), (keys, k), (keys, k)))


@functools.partial(jax.jit, static_argnums=(0, 1),
                   compiler_options={'xla_llvm_disable_expensive_passes': True})   # compile faster
def values_and_gradients(run, options, qkv, mask, cotangents):
  both = lambda *qkv: run(*qkv, *mask, scale=SCALE, **dict(options))
  out, pull = jax.vjp(both, *qkv)
  return out, pull(cotangents)


def cotangents_of(q):
  r = np.random.RandomState(1)
  return r.randn(*q.shape).astype(np.float32), r.randn(*q.shape[:3]).astype(np.float32)


def expected(qkv, mask, cotangents):
  qkv64 = [x.astype(np.float64) for x in qkv]
  out, lse = oracles.attention(*qkv64, *mask, SCALE)
  return (out, np.maximum(lse, -1e30)), oracles.attention_gradients(*qkv64, *mask, SCALE, *cotangents)


def check_close(got, want, tolerance):
  for name, a, b in zip(('out', 'lse', 'dq', 'dk', 'dv'), (*got[0], *got[1]), (*want[0], *want[1])):
    np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=tolerance, atol=tolerance,
                               err_msg=name)


@pytest.mark.parametrize('name', RUNS)
@pytest.mark.parametrize('heads', HEADS)
@pytest.mark.parametrize('mask', MASKS)
def test_values_and_gradients_are_the_definition(mask, heads, name):
  mask, qkv = MASKS[mask], arrays(0, LENGTH, LENGTH, heads)
  cotangents = cotangents_of(qkv[0])
  got = values_and_gradients(RUNS[name], (), qkv, mask, cotangents)
  check_close(got, expected(qkv, mask, cotangents), 1e-5)


@pytest.mark.parametrize('name', RUNS)
@pytest.mark.parametrize('mask', CROSS)
def test_queries_and_keys_of_different_numbers(mask, name):
  mask = CROSS[mask]
  qkv = arrays(1, mask[0].shape[1], mask[2].shape[1], 'GQA')
  cotangents = cotangents_of(qkv[0])
  got = values_and_gradients(RUNS[name], (), qkv, mask, cotangents)
  check_close(got, expected(qkv, mask, cotangents), 1e-5)


@pytest.mark.parametrize('name', RUNS)
@pytest.mark.parametrize('whole', [False, True])
def test_what_the_caller_knows_changes_nothing(whole, name):
  """`causal` for packed documents, `causal` and `whole` for one document."""
  mask = MASKS['causal' if whole else 'packed']
  options = (('causal', True), ('whole', whole))
  qkv = arrays(2, LENGTH, LENGTH, 'GQA')
  cotangents = cotangents_of(qkv[0])
  got = values_and_gradients(RUNS[name], options, qkv, mask, cotangents)
  check_close(got, expected(qkv, mask, cotangents), 1e-5)


@pytest.mark.parametrize('name', RUNS)
def test_a_query_that_sees_nothing_gives_zero_and_no_gradient(name):
  qkv = arrays(3, LENGTH, LENGTH, 'GQA')
  start, _, index = causal(2, LENGTH)
  end = start.copy()
  end[0, 20] = 21   # one row sees; all else is padding
  (out, lse), (dq, dk, dv) = values_and_gradients(RUNS[name], (), qkv, (start, end, index),
                                                  cotangents_of(qkv[0]))
  seen = np.zeros((2, LENGTH), bool)
  seen[0, 20] = True
  assert (np.asarray(out)[~seen] == 0).all()
  assert (np.asarray(dq)[~seen] == 0).all()
  assert (np.asarray(lse)[~seen] == np.float32(-1e30)).all()
  assert (np.asarray(dk)[0, 21:] == 0).all()
  assert (np.asarray(dv)[1] == 0).all()
  assert np.isfinite(np.asarray(dq)).all()
  assert np.isfinite(np.asarray(lse)[0, 20]).all()
  assert (np.asarray(lse)[0, 20] > -100).all()


@pytest.mark.parametrize('name', RUNS)
@pytest.mark.parametrize('options', [(), (('causal', True), ('whole', True))])
def test_the_future_moves_nothing_bit_for_bit(name, options):
  q, k, v = arrays(4, LENGTH, LENGTH, 'GQA')
  mask, cotangents = causal(2, LENGTH), cotangents_of(q)
  (out, lse), (dq, _, _) = values_and_gradients(RUNS[name], options, (q, k, v), mask, cotangents)
  k2, v2 = k.copy(), v.copy()
  k2[:, 30:] += 100
  v2[:, 30:] -= 100
  (out2, lse2), (dq2, _, _) = values_and_gradients(RUNS[name], options, (q, k2, v2), mask,
                                                   cotangents)
  for a, b in ((out, out2), (lse, lse2), (dq, dq2)):
    assert (np.asarray(a)[:, :30] == np.asarray(b)[:, :30]).all()
    assert (np.asarray(a)[:, 30:] != np.asarray(b)[:, 30:]).any(axis=-1).all()


@pytest.mark.parametrize('name', RUNS)
def test_large_scores_do_not_overflow(name):
  q, k, v = arrays(5, LENGTH, LENGTH, 'GQA')
  qkv, mask = (300 * q, k, v), causal(2, LENGTH)
  cotangents = cotangents_of(q)
  check_close(values_and_gradients(RUNS[name], (), qkv, mask, cotangents),
              expected(qkv, mask, cotangents), 2e-3)


@pytest.mark.parametrize('name', RUNS)
def test_bfloat16_is_as_good_as_its_rounding(name):
  """The softmax and its sums run in float32: errors stay within a few roundings of the inputs."""
  qkv, mask = arrays(6, LENGTH, LENGTH, 'GQA'), causal(2, LENGTH)
  half = tuple(jnp.asarray(x, jnp.bfloat16) for x in qkv)
  dout, dlse = cotangents_of(qkv[0])
  got = values_and_gradients(RUNS[name], (), half, mask, (jnp.asarray(dout, jnp.bfloat16), dlse))
  assert got[0][0].dtype == jnp.bfloat16
  assert got[0][1].dtype == jnp.float32
  assert all(x.dtype == jnp.bfloat16 for x in got[1])
  want = expected([np.asarray(x, np.float32) for x in half], mask,
                  (np.asarray(jnp.asarray(dout, jnp.bfloat16), np.float64), dlse))
  for a, b in zip((*got[0], *got[1]), (*want[0], *want[1])):
    error = np.asarray(a, np.float64) - b
    assert np.linalg.norm(error) <= 5e-3 * np.linalg.norm(b)


@pytest.mark.parametrize('name', RUNS)
def test_merge_of_two_parts_is_the_whole(name):
  """Values and gradients, through out and lse of both parts; each has rows that see nothing."""
  mask = MASKS['padding']
  qkv, cut = arrays(8, LENGTH, LENGTH, 'GQA'), 19

  def run(q, k, v, start, end, index, *, scale):
    part = lambda s: RUNS[name](q, k[:, s], v[:, s], start, end, index[:, s], scale=scale)
    return merge(part(slice(0, cut)), part(slice(cut, None)))

  cotangents = cotangents_of(qkv[0])
  want = expected(qkv, mask, cotangents)
  got = values_and_gradients(run, (), qkv, mask, cotangents)
  seen = want[0][1] > -1e29
  np.testing.assert_allclose(np.asarray(got[0][1])[seen], want[0][1][seen], rtol=1e-5, atol=1e-5)
  assert (np.asarray(got[0][1])[~seen] < -1e29).all()
  lse = np.where(seen, want[0][1], np.asarray(got[0][1]))
  check_close(got, ((want[0][0], lse), want[1]), 1e-5)


def test_blocks_that_nobody_sees_are_not_computed():
  """The plan lists every tile with a visible pair once, none without; the inner ones need no mask."""
  size = 8
  for start, end, index in (packed(3, 64), window(3, 64), padding(3, 64), cross(3, 24, 64)):
    sees = (start[:, :, None] <= index[:, None]) & (index[:, None] < end[:, :, None])
    tiles = sees.reshape(3, -1, size, 64 // size, size)
    some, every = tiles.any((2, 4)), tiles.all((2, 4))
    cut = lambda x: jnp.asarray(x).reshape(3, -1, size)
    plan = jax.tree.map(np.asarray, blockwise.make_plan(cut(start), cut(end), cut(index)))
    for b in range(3):
      for i in range(some.shape[1]):
        inner = plan.inner_BIJ[b, i, :plan.inner_count_BI[b, i]].tolist()
        edge = plan.edge_BIJ[b, i, :plan.edge_count_BI[b, i]].tolist()
        assert sorted(inner) == np.flatnonzero(every[b, i]).tolist()
        assert len(set(edge)) == len(edge)
        assert set(np.flatnonzero(some[b, i] & ~every[b, i])) <= set(edge)
        assert not set(edge) & set(inner)
  start, end, index = packed(1, 64)   # in order, an interval's blocks are exact
  plan = blockwise.make_plan(*(jnp.asarray(x).reshape(1, -1, size) for x in (start, end, index)))
  sees = (start[:, :, None] <= index[:, None]) & (index[:, None] < end[:, :, None])
  some = sees.reshape(1, 8, size, 8, size).any((2, 4))
  assert int(plan.inner_count_BI.sum() + plan.edge_count_BI.sum()) <= some.sum() + 8


def test_the_causal_plan_is_what_looking_finds():
  start, end, index = causal(2, 48)
  cut = lambda x: jnp.asarray(x).reshape(2, -1, 8)
  looked = blockwise.make_plan(cut(start), cut(end), cut(index))
  known = blockwise.causal_plan(2, 6)
  for a, b in zip(known[1::2], looked[1::2]):
    assert (np.asarray(a) == np.asarray(b)).all()
  for which in (0, 2):
    for i in range(6):
      count = int(known[which + 1][0, i])
      assert (np.asarray(known[which][0, i, :count])
              == np.asarray(looked[which][0, i, :count])).all()


def gradient_temp_bytes(run, length):
  shape = lambda heads: jax.ShapeDtypeStruct((1, length, heads, 32), jnp.float32)
  row = jax.ShapeDtypeStruct((1, length), jnp.int32)
  loss = lambda q, k, v, *mask: run(q, k, v, *mask, scale=SCALE)[0].sum()
  lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape(4), shape(2), shape(2), row, row, row)
  return lowered.compile().memory_analysis().temp_size_in_bytes


def test_memory_is_linear_in_length():
  short, long = (gradient_temp_bytes(blockwise.attend, n) for n in (4096, 8192))
  assert long <= 2.1 * short
  assert long <= 4 * 8192 * 8192 * 4 / 40   # one set of scores, 4 heads, would be 1 GiB


def test_auto_takes_tiles_for_long_queries_and_refuses_uneven_groups():
  qkv, mask = arrays(9, 130, 130, 'GQA'), causal(2, 130)
  auto = attend(*qkv, *mask, scale=SCALE, causal=True, whole=True)
  want = RUNS['reference'](*qkv, *mask, scale=SCALE)
  for a, b in zip(auto, want):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  with pytest.raises(ValueError, match='3 query heads must be a multiple of 2'):
    attend(qkv[0][:, :, :3], *qkv[1:], *mask, scale=SCALE)
  with pytest.raises(ValueError, match='must be auto or one of'):
    attend(*qkv, *mask, scale=SCALE, implementation='fast')
