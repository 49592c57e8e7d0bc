"""Attention of every kind held to the definition: values, gradients, causality, merge, memory.

B batch  T queries  S keys  N query heads  K kv heads  H head dim
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.attention import Intervals, attend, attention, biases, blockwise, merge
from longctx.attention import intervals as intervals_module
from longctx.attention.blockwise import Blockwise
from longctx.attention.intervals import Options, sliding_window, with_sinks
from longctx.attention.reference import Reference
from longctx.parallel import sequence
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
KERNELS = {'reference': Reference(), 'blockwise': Blockwise(block=16)}


def intervals(start, end, index):
  return Intervals(start_BT=start, end_BT=end, index_BT=np.arange(start.shape[1]) + 0 * start,
                   key_index_BS=index)


def arrays(seed, queries, keys, heads, batch=2):
  r = np.random.RandomState(seed)
  n, k = HEADS[heads]
  return tuple(r.randn(batch, *shape, H).astype(np.float32)
               for shape in ((queries, n), (keys, k), (keys, k)))


def run_kernel(name, q, k, v, start, end, index, *, options=None):
  options = options or Options(scale=SCALE)
  arguments = jax.tree.map(jnp.asarray, (q, k, v, intervals(start, end, index), options))
  return sequence.one_device(KERNELS[name], True, *arguments)


RUNS = {name: functools.partial(run_kernel, name) for name in KERNELS}


def pulled(run, inputs, cotangents):
  """(run(*inputs), its gradients): one compiled program, where each operation by itself would be one."""
  @functools.partial(jax.jit, compiler_options={'xla_llvm_disable_expensive_passes': True})
  def both(inputs, cotangents):
    out, pull = jax.vjp(run, *inputs)
    return out, pull(cotangents)
  return both(inputs, cotangents)


@functools.partial(jax.jit, static_argnums=0,
                   compiler_options={'xla_llvm_disable_expensive_passes': True})   # compile faster
def values_and_gradients(run, qkv, mask, cotangents):
  both = lambda *qkv: run(*qkv, *mask)
  out, pull = jax.vjp(both, *qkv)
  return out, pull(tuple(d.astype(x.dtype) for d, x in zip(cotangents, out)))


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
  got = values_and_gradients(RUNS[name], qkv, mask, cotangents)
  check_close(got, expected(qkv, mask, cotangents), 1e-5)


@pytest.mark.parametrize('name', RUNS)
@pytest.mark.parametrize('mask', CROSS)
def test_queries_and_keys_of_different_numbers(mask, name):
  mask = CROSS[mask]
  qkv = arrays(1, mask[0].shape[1], mask[2].shape[1], 'GQA')
  cotangents = cotangents_of(qkv[0])
  got = values_and_gradients(RUNS[name], qkv, mask, cotangents)
  check_close(got, expected(qkv, mask, cotangents), 1e-5)


@pytest.mark.parametrize('name', RUNS)
def test_a_query_that_sees_nothing_gives_zero_and_no_gradient(name):
  qkv = arrays(3, LENGTH, LENGTH, 'GQA')
  start, _, index = causal(2, LENGTH)
  end = start.copy()
  end[0, 20] = 21   # one row sees; all else is padding
  (out, lse), (dq, dk, dv) = values_and_gradients(RUNS[name], qkv, (start, end, index),
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
def test_the_future_moves_nothing_bit_for_bit(name):
  q, k, v = arrays(4, LENGTH, LENGTH, 'GQA')
  mask, cotangents = causal(2, LENGTH), cotangents_of(q)
  (out, lse), (dq, _, _) = values_and_gradients(RUNS[name], (q, k, v), mask, cotangents)
  k2, v2 = k.copy(), v.copy()
  k2[:, 30:] += 100
  v2[:, 30:] -= 100
  (out2, lse2), (dq2, _, _) = values_and_gradients(RUNS[name], (q, k2, v2), mask, cotangents)
  for a, b in ((out, out2), (lse, lse2), (dq, dq2)):
    assert (np.asarray(a)[:, :30] == np.asarray(b)[:, :30]).all()
    assert (np.asarray(a)[:, 30:] != np.asarray(b)[:, 30:]).any(axis=-1).all()


@pytest.mark.parametrize('name', RUNS)
def test_large_scores_do_not_overflow(name):
  q, k, v = arrays(5, LENGTH, LENGTH, 'GQA')
  qkv, mask = (300 * q, k, v), causal(2, LENGTH)
  cotangents = cotangents_of(q)
  check_close(values_and_gradients(RUNS[name], qkv, mask, cotangents),
              expected(qkv, mask, cotangents), 2e-3)


@pytest.mark.parametrize('name', RUNS)
def test_bfloat16_is_as_good_as_its_rounding(name):
  """The softmax and its sums run in float32: errors stay within a few roundings of the inputs."""
  qkv, mask = arrays(6, LENGTH, LENGTH, 'GQA'), causal(2, LENGTH)
  half = tuple(jnp.asarray(x, jnp.bfloat16) for x in qkv)
  dout, dlse = cotangents_of(qkv[0])
  got = values_and_gradients(RUNS[name], half, mask, (jnp.asarray(dout, jnp.bfloat16), dlse))
  assert got[0][0].dtype == jnp.float32   # a ring merges parts before anything is rounded
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

  def run(q, k, v, start, end, index):
    part = lambda s: RUNS[name](q, k[:, s], v[:, s], start, end, index[:, s])
    return merge(part(slice(0, cut)), part(slice(cut, None)))

  cotangents = cotangents_of(qkv[0])
  want = expected(qkv, mask, cotangents)
  got = values_and_gradients(run, qkv, mask, cotangents)
  seen = want[0][1] > -1e29
  np.testing.assert_allclose(np.asarray(got[0][1])[seen], want[0][1][seen], rtol=1e-5, atol=1e-5)
  assert (np.asarray(got[0][1])[~seen] < -1e29).all()
  lse = np.where(seen, want[0][1], np.asarray(got[0][1]))
  check_close(got, ((want[0][0], lse), want[1]), 1e-5)


def counted_tiles(start, end, index, size):
  """(the plan's tiles, whether it calls them whole), [B, I, J] bool each."""
  cut = lambda x: jnp.asarray(x).reshape(x.shape[0], -1, size)
  plan = jax.tree.map(np.asarray, blockwise.make_plan([(cut(start), cut(end))], cut(index)))
  number = np.arange(index.shape[1] // size)
  inside = lambda first, last: (first[..., None] <= number) & (number < last[..., None])
  return inside(plan.left, plan.right), inside(plan.inner_first, plan.inner_end), plan


def test_blocks_that_nobody_sees_are_not_computed():
  size = 8
  for name, mask in dict(packed=packed(3, 64), window=window(3, 64), padding=padding(3, 64),
                         cross=cross(3, 24, 64)).items():
    tiles = oracles.interval_mask(*mask).reshape(3, -1, size, 64 // size, size)
    some, every = tiles.any((2, 4)), tiles.all((2, 4))
    computed, whole, plan = counted_tiles(*mask, size)
    assert (computed | ~some).all(), name
    assert (every | ~whole).all(), name
    assert (plan.count() == computed.sum(-1)).all(), name
    if name in ('packed', 'window'):   # keys in order: exact
      assert (computed == some).all(), name
      assert (whole == every).all(), name
  # A striped order of the tokens leaves the tiles exact too.
  start, end, index = packed(1, 64)
  order = np.concatenate([np.arange(64).reshape(-1, size)[d::2].reshape(-1) for d in range(2)])
  mine = order[:32]
  computed, _, _ = counted_tiles(start[:, mine], end[:, mine], index[:, order[32:]], size)
  sees = oracles.interval_mask(start[:, mine], end[:, mine], index[:, order[32:]])
  some = sees.reshape(1, 4, size, 4, size).any((2, 4))
  assert (computed == some).all()


SCORES = {'softcap': dict(softcap=2.0), 'alibi': dict(bias=biases.alibi(6)),
          't5': dict(bias=biases.T5Buckets(
              np.random.RandomState(3).randn(6, 8).astype(np.float32), max_distance=20)),
          't5 both ways, capped': dict(softcap=3.0, bias=biases.T5Buckets(
              np.random.RandomState(4).randn(6, 8).astype(np.float32), max_distance=20,
              bidirectional=True))}


@pytest.mark.parametrize('name', RUNS)
@pytest.mark.parametrize('scores', SCORES)
def test_soft_caps_and_biases_are_the_definition(scores, name):
  settings = SCORES[scores]
  mask, qkv = MASKS['any order' if 'both' in scores else 'packed'], arrays(10, LENGTH, LENGTH, 'GQA')
  cotangents = cotangents_of(qkv[0])
  options = Options(scale=SCALE, **settings)

  @functools.partial(jax.jit, compiler_options={'xla_llvm_disable_expensive_passes': True})
  def run(qkv, options):
    out, pull = jax.vjp(lambda qkv, options: RUNS[name](*qkv, *mask, options=options), qkv, options)
    return out, pull(cotangents)

  out, (dqkv, doptions) = run(qkv, options)
  sees = oracles.interval_mask(*mask)
  bias, table = None, settings.get('bias')
  if table is not None:
    bias = np.asarray([oracle_bias(table, n, np.arange(LENGTH), mask[2][0]) for n in range(6)])
    if 'both' in scores:   # the keys' order differs between rows
      sees, qkv, dqkv, out = sees[:1], [x[:1] for x in qkv], [x[:1] for x in dqkv], [x[:1] for x in out]
      cotangents = [x[:1] for x in cotangents]
  qkv64 = [x.astype(np.float64) for x in qkv]
  want = oracles.masked_attention(*qkv64, sees, SCALE, settings.get('softcap', 0.0), bias)
  *grads, dbias, _ = oracles.masked_gradients(*qkv64, sees, SCALE, *cotangents,
                                              settings.get('softcap', 0.0), bias)
  check_close((out, dqkv), ((want[0], np.maximum(want[1], -1e30)), grads), 1e-5)
  if scores == 't5':   # each bucket gathers its scores' gradients
    expected_table = np.zeros((6, 8))
    for n, t, s in np.ndindex(*dbias.shape):
      expected_table[n, oracle_bucket(t - s, 8, 20)] += dbias[n, t, s]
    np.testing.assert_allclose(doptions.bias.table_NX, expected_table, rtol=1e-4, atol=1e-4)
  if scores == 'alibi':
    expected_slope = [-(dbias[n] * np.abs(np.subtract.outer(np.arange(LENGTH), np.arange(LENGTH))))
                      .sum() for n in range(6)]
    np.testing.assert_allclose(doptions.bias.slope_N, expected_slope, rtol=1e-4, atol=1e-3)


def oracle_bucket(distance, buckets, far):
  """T5: half the buckets exact, the others log-spaced up to `far` (arXiv:1910.10683)."""
  distance, exact = max(distance, 0), buckets // 2
  if distance < exact:
    return distance
  step = np.float32(np.log(np.float32(distance / exact))) / np.float32(np.log(far / exact))
  return min(buckets - 1, exact + int(step * (buckets - exact)))


def oracle_bias(table, n, q_index, k_index):
  rows = np.zeros((len(q_index), len(k_index)))
  for (i, t), (j, s) in itertools.product(enumerate(q_index), enumerate(k_index)):
    if isinstance(table, biases.Alibi):
      rows[i, j] = -2.0 ** -[2, 4, 6, 8, 1, 3][n] * abs(t - s)
    elif table.bidirectional:
      rows[i, j] = table.table_NX[n, oracle_bucket(abs(t - s), 4, 20) + (4 if s > t else 0)]
    else:
      rows[i, j] = table.table_NX[n, oracle_bucket(t - s, 8, 20)]
  return rows


@pytest.mark.parametrize('name', ['reference', 'blockwise'])
def test_learned_sink_logits_take_their_share_and_learn(name):
  """The extra logit, its gradient, and a query that sees nothing but the sink: out 0."""
  mask, qkv = MASKS['padding'], arrays(11, LENGTH, LENGTH, 'GQA')
  dout, _ = cotangents_of(qkv[0])
  sink = np.random.RandomState(0).randn(6).astype(np.float32)
  run = lambda sink, *qkv: attention(*qkv, intervals(*mask), scale=SCALE, sink_N=sink,
                                     implementation=name)
  out, (dsink, *grads) = pulled(run, (sink, *qkv), dout)
  qkv64, sees = [x.astype(np.float64) for x in qkv], oracles.interval_mask(*mask)
  want, _ = oracles.masked_attention(*qkv64, sees, SCALE, sink=sink)
  *want_grads, _, want_sink = oracles.masked_gradients(
      *qkv64, sees, SCALE, dout, np.zeros(dout.shape[:3]), sink=sink)
  for a, b in zip((out, *grads, dsink), (want, *want_grads, want_sink)):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=pytest.mark.slow) if name == 'reference' else name for name in RUNS])
def test_first_tokens_stay_in_sight_of_a_window(name):
  """Attention sinks: a second interval; the kernel walks its blocks too, and no others."""
  masks = [with_sinks(sliding_window(2, LENGTH, 5), 3),
           with_sinks(intervals_module.packed(jnp.asarray(packed(2, LENGTH)[0])), 2,
                      jnp.asarray(packed(2, LENGTH)[0]))]
  qkv = arrays(12, LENGTH, LENGTH, 'GQA')
  cotangents = cotangents_of(qkv[0])
  for mask in masks:
    run = lambda *qkv, mask=mask: sequence.one_device(KERNELS[name], True, *qkv, mask,
                                                      Options(scale=SCALE))
    found = pulled(run, qkv, cotangents)
    sees = oracles.interval_mask(mask.start_BT, mask.end_BT, mask.index_BT)
    sees |= oracles.interval_mask(mask.sink_start_BT, mask.sink_end_BT, mask.index_BT)
    qkv64 = [x.astype(np.float64) for x in qkv]
    want = oracles.masked_attention(*qkv64, sees, SCALE)
    grads = oracles.masked_gradients(*qkv64, sees, SCALE, *cotangents)[:3]
    check_close(found, (want, grads), 1e-5)


def gradient_temp_bytes(length):
  shape = lambda heads: jax.ShapeDtypeStruct((1, length, heads, 32), jnp.float32)
  loss = lambda q, k, v: attention(q, k, v, intervals_module.causal(1, length),
                                   implementation='blockwise').sum()
  lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape(4), shape(2), shape(2))
  return lowered.compile().memory_analysis().temp_size_in_bytes


def test_memory_is_linear_in_length():
  short, long = (gradient_temp_bytes(n) for n in (4096, 8192))
  assert long <= 2.1 * short
  assert long <= 4 * 8192 * 8192 * 4 / 40   # one set of scores, 4 heads, would be 1 GiB


def test_auto_takes_tiles_for_long_queries_and_bad_calls_are_refused():
  qkv, mask = arrays(9, 130, 130, 'GQA'), intervals_module.causal(2, 130)
  auto = jax.jit(lambda *qkv: attend(*qkv, mask))(*qkv)
  want = jax.jit(lambda *qkv: sequence.one_device(Reference(), True, *qkv, mask, Options(scale=SCALE)))(*qkv)
  for a, b in zip(auto, want):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  with pytest.raises(ValueError, match='3 query heads must be a multiple of 2'):
    attend(qkv[0][:, :, :3], *qkv[1:], mask)
  with pytest.raises(NotImplementedError, match="'splash' cannot serve this call: it runs on TPUs"):
    attend(*qkv, mask, implementation='splash')
  with pytest.raises(ValueError, match='must be auto or one of'):
    attend(*qkv, mask, implementation='fast')
  with pytest.raises(ValueError, match=r'the mask is of \(2, 100\) queries'):
    attend(*qkv, intervals_module.causal(2, 100))
  with pytest.raises(ValueError, match='must be'):
    attend(qkv[0], qkv[1], qkv[2][:, :5], mask)


def test_heads_at_once_are_the_definition_too(monkeypatch):
  """What other platforms than a CPU run: all heads of a row together."""
  monkeypatch.setattr(jax.lax, 'platform_dependent', lambda *args, cpu, default: default(*args))
  mask, qkv = MASKS['packed'], arrays(13, LENGTH, LENGTH, 'GQA')
  cotangents = cotangents_of(qkv[0])
  table = biases.T5Buckets(np.random.RandomState(3).randn(6, 8).astype(np.float32), max_distance=20)
  run = lambda *qkv: RUNS['blockwise'](*qkv[:3], *mask, options=Options(scale=SCALE, bias=qkv[3]))
  out, (*grads, dtable) = pulled(run, (*qkv, table), cotangents)
  bias = np.asarray([oracle_bias(table, n, np.arange(LENGTH), mask[2][0]) for n in range(6)])
  qkv64, sees = [x.astype(np.float64) for x in qkv], oracles.interval_mask(*mask)
  want = oracles.masked_attention(*qkv64, sees, SCALE, bias=bias)
  *want_grads, dbias, _ = oracles.masked_gradients(*qkv64, sees, SCALE, *cotangents, bias=bias)
  check_close((out, grads), (want, want_grads), 1e-5)
  want_table = np.zeros((6, 8))
  for n, t, s in np.ndindex(*dbias.shape):
    want_table[n, oracle_bucket(t - s, 8, 20)] += dbias[n, t, s]
  np.testing.assert_allclose(dtable.table_NX, want_table, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('length', [
    1025, pytest.param(1000, marks=pytest.mark.slow), pytest.param(1024, marks=pytest.mark.slow),
    pytest.param(1300, marks=pytest.mark.slow)])
def test_tiles_are_chosen_by_length_alike_before_and_after_filling_up(length):
  """Lengths about where tiles grow: the last tile is part padding, of queries and of keys."""
  kernel = Blockwise()
  assert kernel.size(length) == kernel.size(length + -length % kernel.size(length))
  r = np.random.RandomState(0)
  q, k, v, dout = (jnp.asarray(r.randn(1, length, 1, 4), jnp.float32) for _ in range(4))
  mask = intervals_module.sliding_window(1, length, 300)
  results = []
  for implementation in ('blockwise', 'reference'):
    out, grads = pulled(lambda *qkv, name=implementation: attention(*qkv, mask, implementation=name), (q, k, v), dout)
    results.append((out, *grads))
  for a, b in zip(*results):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize('strategy,length,kind,seen', [
    ('allgather', 512, 'causal', 'any'), ('ulysses', 512, 'causal', None),
    ('ulysses', 509, 'causal', 'any'), ('ring', 512, 'full', 'full'), ('ring', 509, 'full', 'any'),
    ('hybrid', 512, 'causal', 'any'), ('ring', 3, 'causal', None)])
def test_a_kernel_is_chosen_for_what_it_will_be_given(strategy, length, kind, seen):
  """A kernel of causal or full masks alone must not be chosen for hops and padding of no kind."""
  from longctx.attention import dispatch
  from longctx.parallel import mesh
  layout = mesh.make_layout(mesh.Config(
      data=1, seq=4, layout='sequence', strategy=strategy,
      ulysses=2 if strategy == 'hybrid' else 1), jax.devices()[:4])
  q = jax.ShapeDtypeStruct((1, length, 4, 8), jnp.bfloat16)
  make = {'causal': intervals_module.causal, 'full': intervals_module.bidirectional}[kind]
  hop = dispatch._mask_of_a_hop(layout, q, q, make(1, length), cached=False)
  assert (None if hop is None else hop.kind) == seen


def test_many_keys_are_not_scored_at_once():
  """'auto' takes the dense form for few queries of few keys alone."""
  from longctx.attention import dispatch
  def chosen(queries, keys):
    q, k = (jax.ShapeDtypeStruct((1, n, 1, 8), jnp.float32) for n in (queries, keys))
    mask = intervals_module.bidirectional(1, queries, keys)
    return dispatch.choose('auto', q, k, k, mask, Options(scale=1.0), False)
  assert chosen(64, 2 ** 14) is dispatch.IMPLEMENTATIONS['reference']
  assert chosen(64, 2 ** 14 + 1) is dispatch.IMPLEMENTATIONS['blockwise']
  assert chosen(1, 2 ** 20) is dispatch.IMPLEMENTATIONS['reference']
