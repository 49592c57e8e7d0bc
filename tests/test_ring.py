"""Every strategy, order of the tokens, mask and ring size held to the definition.

Masks and orders are data, so one compiled program a strategy and ring size serves them all.

B batch  T tokens  N query heads  K kv heads  H head dim  R ring
"""

import dataclasses
import functools
import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from longctx.attention import attention, intervals
from longctx.attention.blockwise import Blockwise
from longctx.attention.intervals import Options
from longctx.errors import ConfigError
from longctx.parallel import layouts, mesh, sequence
from tests import oracles

B, T, PADDED, N, K, H, UNIT = 2, 45, 48, 8, 4, 4, 2
SCALE = H ** -0.5
KERNEL = Blockwise(block=4)
OPTIONS = Options(scale=SCALE)
FAST = {'xla_llvm_disable_expensive_passes': True}


def documents():
  ids = np.zeros((B, T), np.int32)
  ids[0, [1, 2, 3, 20, 31]] = 1   # documents of one token among them
  ids[1, [7, 44]] = 1
  return jnp.asarray(ids.cumsum(axis=1))


def holes():
  """Rows that see nothing: the first ones, and one amid others."""
  mask = intervals.causal(B, T)
  end = np.array(mask.end_BT)
  end[0, :5], end[1, 30] = 0, 0
  return dataclasses.replace(mask, end_BT=jnp.asarray(end), kind='any')


MASKS = {
    'causal': intervals.causal(B, T),
    'packed': intervals.packed(documents()),
    'packed, both ways': intervals.packed(documents(), causal=False),
    'window': intervals.sliding_window(B, T, 7),
    'window longer than the row': intervals.sliding_window(B, T, 100),
    'packed in windows': intervals.intersect(intervals.packed(documents()),
                                             intervals.sliding_window(B, T, 9)),
    'chunks': intervals.chunked(B, T, 10),
    'prefix': intervals.prefix_lm(jnp.array([13, 0]), T),
    'bidirectional': intervals.bidirectional(B, T),
    'rows that see nothing': holes(),
}


def without_sinks(mask):
  """The same mask with an empty second interval: every mask is one compiled program."""
  if mask.has_sinks:
    return mask
  return dataclasses.replace(mask, sink_start_BT=mask.start_BT, sink_end_BT=mask.start_BT)


MASKS = {name: without_sinks(mask) for name, mask in MASKS.items()} | {
    'window with sinks': intervals.with_sinks(intervals.sliding_window(B, T, 5), 3)}


def layout_of(strategy, size, order='contiguous', ulysses=1, model=1):
  config = mesh.Config(data=1, seq=size, model=model, layout='sequence', strategy=strategy,
                       ulysses=ulysses, order=order, unit=UNIT)
  return mesh.make_layout(config, jax.devices()[:size * model])


def laid_out(mask, slots, order='contiguous'):
  """The mask with its tokens in the slots' order; slots beyond T are padding."""
  row = lambda x, fill: jnp.pad(x, ((0, 0), (0, PADDED - T)), constant_values=fill)[:, slots]
  return intervals.Intervals(
      start_BT=row(mask.start_BT, 0), end_BT=row(mask.end_BT, 0), index_BT=row(mask.index_BT, -1),
      sink_start_BT=row(mask.sink_start_BT, 0), sink_end_BT=row(mask.sink_end_BT, 0), order=order)


@functools.cache
def inputs():
  r = np.random.RandomState(0)
  qkv = tuple(r.randn(B, T, heads, H) for heads in (N, K, K))
  return qkv, (r.randn(B, T, N, H), r.randn(B, T, N))


@functools.cache
def expected(name):
  qkv, cotangents = inputs()
  mask = MASKS[name]
  sees = np.asarray(intervals.sees(mask))
  out, lse = oracles.masked_attention(*qkv, sees, SCALE)
  return (out, np.maximum(lse, -1e30)), oracles.masked_gradients(*qkv, sees, SCALE, *cotangents)[:3]


@functools.cache
def program(strategy, size, ulysses, overlap=False):
  """Values and gradients, jitted. Ulysses's own sorting apart, the order of the tokens is data."""
  layout = dataclasses.replace(layout_of(strategy, size, ulysses=ulysses), overlap=overlap)
  def run(qkv, mask, cotangents):
    attend = lambda *qkv: sequence.attend(KERNEL, layout, *qkv, mask, OPTIONS)
    out, pull = jax.vjp(attend, *qkv)
    return out, pull(cotangents)
  return jax.jit(mesh.under(layout, run), compiler_options=FAST)


def run(compiled, size, name, order, dtype):
  slots = layouts.permutation(order, PADDED, size, UNIT)
  put = lambda x: np.pad(x, [(0, 0), (0, PADDED - T)] + [(0, 0)] * (x.ndim - 2))[:, slots]
  back = lambda x: np.asarray(x, np.float64)[:, np.argsort(slots)][:, :T]
  qkv, cotangents = jax.tree.map(lambda x: jnp.asarray(put(x), dtype), inputs())
  out, grads = compiled(qkv, laid_out(MASKS[name], slots), cotangents)
  return jax.tree.map(back, (out, grads))


def check(got, want, tolerance):
  names = ('out', 'lse', 'dq', 'dk', 'dv')
  for name, a, b in zip(names, (*got[0], *got[1]), (*want[0], *want[1])):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=name)


STRATEGIES = [('ring', 1, 1), ('ring', 2, 1), ('ring', 3, 1), ('ring', 4, 1), ('ring', 8, 1),
              ('bidirectional', 2, 1), ('bidirectional', 3, 1), ('bidirectional', 8, 1),
              ('allgather', 3, 1), ('allgather', 8, 1), ('ulysses', 2, 1), ('ulysses', 4, 1),
              ('ulysses', 8, 1), ('hybrid', 4, 2), ('hybrid', 8, 2), ('hybrid', 8, 4)]


FAST_ONES = [('ring', 1, 1), ('ring', 3, 1), ('ring', 8, 1), ('bidirectional', 3, 1), ('allgather', 3, 1),
             ('ulysses', 4, 1), ('hybrid', 8, 2)]


@pytest.mark.parametrize('strategy,size,ulysses', [
    case if case in FAST_ONES else pytest.param(*case, marks=pytest.mark.slow)
    for case in STRATEGIES])
def test_every_mask_and_order_is_the_definition(strategy, size, ulysses):
  """float64 to 1e-12; the orders share one program, Ulysses's own sorting is tested below."""
  compiled = program(strategy, size, ulysses)
  with jax.enable_x64(True):
    for name in MASKS:
      for order in layouts.ORDERS:
        check(run(compiled, size, name, order, jnp.float64), expected(name), 1e-12)


@pytest.mark.parametrize('strategy,size', [
    ('ring', 3), pytest.param('bidirectional', 4, marks=pytest.mark.slow),
    pytest.param('ring', 2, marks=pytest.mark.slow),
    pytest.param('ring', 8, marks=pytest.mark.slow)])
def test_a_ring_that_hides_its_transfers_is_the_definition_too(strategy, size):
  """As on a TPU or GPU: the local work in halves, gradients that arrive added afterwards."""
  compiled = program(strategy, size, 1, overlap=True)
  with jax.enable_x64(True):
    for name in ('packed', 'window with sinks', 'bidirectional', 'rows that see nothing'):
      check(run(compiled, size, name, 'striped', jnp.float64), expected(name), 1e-12)


@pytest.mark.parametrize('strategy,size,ulysses', [('ring', 8, 1), ('bidirectional', 4, 1),
                                                   ('hybrid', 8, 2)])
def test_float32_is_the_definition_too(strategy, size, ulysses):
  compiled = program(strategy, size, ulysses)
  for name in ('packed', 'window with sinks', 'rows that see nothing'):
    check(run(compiled, size, name, 'striped', jnp.float32), expected(name), 5e-6)


@pytest.mark.parametrize('strategy,order,ulysses', [('ulysses', 'zigzag', 4), ('hybrid', 'zigzag', 2),
                                                    ('hybrid', 'striped', 2)])
def test_a_group_sorts_what_its_devices_hold(strategy, order, ulysses):
  """The all-to-all brings tokens together out of order; sorted, the tiles skip again."""
  size, slots = 4, layouts.permutation(order, PADDED, 4, UNIT)
  sort = layouts.sorting(order, PADDED, size, ulysses, UNIT)
  held = np.take_along_axis(slots.reshape(size // ulysses, -1), sort, axis=1)
  assert (np.diff(held, axis=1) > 0).all()
  layout = layout_of(strategy, size, order, 1 if strategy == 'ulysses' else ulysses)
  put = lambda x: jnp.asarray(np.pad(x, [(0, 0), (0, PADDED - T), (0, 0), (0, 0)])[:, slots],
                              jnp.float32)
  qkv, mask = [put(x) for x in inputs()[0]], laid_out(MASKS['packed'], slots, order)
  attend = mesh.under(layout, lambda qkv: sequence.attend(KERNEL, layout, *qkv, mask, OPTIONS))
  out, lse = jax.jit(attend, compiler_options=FAST)(qkv)
  back = lambda x: np.asarray(x)[:, np.argsort(slots)][:, :T]
  np.testing.assert_allclose(back(out), expected('packed')[0][0], atol=5e-6)
  np.testing.assert_allclose(back(lse), expected('packed')[0][1], atol=5e-6)


@functools.cache
def half_precision_error(strategy, size, num_kv_heads=K, ulysses=1):
  (q, k, v), (dout, _) = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), inputs())
  qkv = q, k[:, :, :num_kv_heads], v[:, :, :num_kv_heads]
  layout = layout_of(strategy, size, ulysses=ulysses)
  mask = intervals.causal(B, T)
  run = mesh.under(layout, lambda *qkv: sequence.attend(
      KERNEL, layout, *qkv, mask, OPTIONS, lse_gradient=False)[0])
  def both(qkv, dout):
    out, pull = jax.vjp(run, *qkv)
    return out.astype(jnp.bfloat16), pull(dout.astype(out.dtype))   # as attention() gives it
  out, grads = jax.jit(both, compiler_options=FAST)(qkv, dout)
  exact = [np.asarray(x, np.float64) for x in (*qkv, dout)]
  sees = np.asarray(intervals.sees(mask))
  want = (oracles.masked_attention(*exact[:3], sees, SCALE)[0],
          *oracles.masked_gradients(*exact[:3], sees, SCALE, exact[3],
                                    np.zeros((B, T, N)))[:3])
  error = lambda a, b: np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)
  return [error(a, b) for a, b in zip((out, *grads), want)]


@pytest.mark.parametrize('strategy,num_kv_heads,ulysses', [
    ('ring', K, 1), ('allgather', 2, 1), ('hybrid', 2, 4),
    pytest.param('bidirectional', 2, 1, marks=pytest.mark.slow),
    pytest.param('ulysses', 2, 1, marks=pytest.mark.slow)])
def test_the_error_of_bfloat16_does_not_grow_with_the_devices(strategy, num_kv_heads, ulysses):
  """Two kv heads are copied for devices that share heads: their gradients are float32 sums."""
  one = half_precision_error('ring', 1, num_kv_heads)
  for alone, eight in zip(one, half_precision_error(strategy, 8, num_kv_heads, ulysses)):
    assert eight <= 1.05 * alone


def test_the_future_and_other_documents_move_nothing_bit_for_bit():
  """Of a striped ring of 8: keys that a query may not see are changed; out, lse and dq stay."""
  slots = layouts.permutation('striped', PADDED, 8, UNIT)
  compiled = program('ring', 8, 1)
  put = lambda x: np.pad(x, [(0, 0), (0, PADDED - T)] + [(0, 0)] * (x.ndim - 2))[:, slots]
  (q, k, v), cotangents = jax.tree.map(lambda x: put(x).astype(np.float32), inputs())
  mask = laid_out(MASKS['packed'], slots)
  sees = np.asarray(intervals.sees(MASKS['packed']))
  at = 30   # the token whose key and value change
  blind = ~sees[:, :, at]
  moved = slots == at
  k2, v2 = k.copy(), v.copy()
  k2[:, moved] += 100
  v2[:, moved] -= 100
  first, second = (compiled((q, *kv), mask, cotangents) for kv in ((k, v), (k2, v2)))
  back = lambda x: np.asarray(x)[:, np.argsort(slots)][:, :T]
  for a, b in ((first[0][0], second[0][0]), (first[0][1], second[0][1]),
               (first[1][0], second[1][0])):
    assert (back(a)[blind] == back(b)[blind]).all()
    assert (back(a)[~blind] != back(b)[~blind]).any()


def test_the_same_bits_every_time():
  compiled = program('ring', 8, 1)
  twice = [run(compiled, 8, 'packed', 'striped', jnp.float32) for _ in range(2)]
  for a, b in zip(*map(jax.tree.leaves, twice)):
    assert (a == b).all()


@pytest.mark.parametrize('strategy,ulysses', [('ring', 1), ('bidirectional', 1), ('hybrid', 2)])
@pytest.mark.parametrize('window', [9, pytest.param(3, marks=pytest.mark.slow)])
def test_hops_that_a_window_does_not_reach_are_not_missed(window, strategy, ulysses):
  """The ring of a static window stops early; its values are the definition's, in every order."""
  mask = intervals.sliding_window(B, PADDED, window)
  qkv = [jnp.asarray(np.pad(x, [(0, 0), (0, 3), (0, 0), (0, 0)]), jnp.float32) for x in inputs()[0]]
  want, _ = oracles.masked_attention(*[np.asarray(x, np.float64) for x in qkv],
                                     np.asarray(intervals.sees(mask)), SCALE)
  for order in layouts.ORDERS:
    layout = layout_of(strategy, 4, order, ulysses)
    slots = layouts.permutation(order, PADDED, 4, UNIT)
    row = lambda x, slots=slots: x[:, slots]
    laid = intervals.Intervals(start_BT=row(mask.start_BT), end_BT=row(mask.end_BT),
                               index_BT=row(mask.index_BT), reach=window, order=order)
    attend = mesh.under(layout, lambda qkv, mask, layout=layout: sequence.attend(
        KERNEL, layout, *qkv, mask, OPTIONS)[0])
    out = jax.jit(attend, compiler_options=FAST)([x[:, slots] for x in qkv], laid)
    np.testing.assert_allclose(np.asarray(out)[:, np.argsort(slots)], want, atol=5e-6)


@pytest.mark.parametrize('length', [8, 24])
def test_one_kv_head_goes_half_its_keys_each_way(length):
  """Where a device has but one key, all go one way."""
  layout, mask = layout_of('bidirectional', 8), intervals.causal(B, length)
  qkv, (dout, dlse) = jax.tree.map(lambda x: jnp.asarray(x[:, :length], jnp.float32), inputs())
  qkv = qkv[0], qkv[1][:, :, :1], qkv[2][:, :, :1]
  def run(qkv):
    out, pull = jax.vjp(mesh.under(layout, lambda *qkv: sequence.attend(
        KERNEL, layout, *qkv, mask, OPTIONS)), *qkv)
    return out, pull((dout, dlse))
  got = jax.jit(run, compiler_options=FAST)(qkv)
  wide = [np.asarray(x, np.float64) for x in (*qkv, dout, dlse)]
  sees = np.asarray(intervals.sees(mask))
  want = (oracles.masked_attention(*wide[:3], sees, SCALE),
          oracles.masked_gradients(*wide[:3], sees, SCALE, *wide[3:])[:3])
  check(got, want, 2e-5)


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(data=strategies.data())
def test_any_intervals_through_a_ring(data):
  """Drawn: lengths, tiny documents, empty rows, windows longer than the row, in any order of slots."""
  length = data.draw(strategies.integers(1, PADDED))
  number = strategies.integers(0, PADDED + 3)
  row = strategies.lists(number, min_size=PADDED, max_size=PADDED)
  start, end = (np.array([data.draw(row) for _ in range(B)]) for _ in range(2))
  index = np.where(np.arange(PADDED) < length, np.arange(PADDED), -1)
  slots = np.array(data.draw(strategies.permutations(range(PADDED))))
  put = lambda x: jnp.asarray(np.broadcast_to(x, (B, PADDED))[:, slots])
  mask = intervals.Intervals(start_BT=put(start), end_BT=put(end), index_BT=put(index),
                             sink_start_BT=put(0 * start), sink_end_BT=put(0 * start))
  wide = lambda x: np.pad(x, [(0, 0), (0, PADDED - T)] + [(0, 0)] * (x.ndim - 2))[:, slots]
  qkv, cotangents = jax.tree.map(lambda x: jnp.asarray(wide(x), jnp.float32), inputs())
  got = program('ring', 4, 1)(qkv, mask, cotangents)
  qkv, cotangents = jax.tree.map(lambda x: np.asarray(x, np.float64), (qkv, cotangents))
  sees = np.asarray(intervals.sees(mask))
  out, lse = oracles.masked_attention(*qkv, sees, SCALE)
  want = (out, np.maximum(lse, -1e30)), oracles.masked_gradients(*qkv, sees, SCALE,
                                                                 *cotangents)[:3]
  check(got, want, 2e-5)


@pytest.mark.parametrize('num_kv_heads,model', [(4, 2), (2, 4)])
def test_heads_and_sequence_are_cut_together(num_kv_heads, model):
  """Scores with a learned bias and sink; fewer kv heads than devices that share the heads."""
  from longctx.attention import biases
  r = np.random.RandomState(5)
  qkv = [jnp.asarray(r.randn(B, T, heads, H), jnp.float32) for heads in (N, num_kv_heads,
                                                                       num_kv_heads)]
  table, sink = (jnp.asarray(r.randn(*shape), jnp.float32) for shape in ((N, 8), (N,)))
  mask = MASKS['packed']
  def loss(qkv, table, sink):
    out = attention(*qkv, mask, softcap=4.0, bias=biases.T5Buckets(table, max_distance=20),
                    sink_N=sink, implementation='blockwise')
    return (out * jnp.asarray(inputs()[1][0], jnp.float32)).sum()
  gradients = jax.value_and_grad(loss, (0, 1, 2))
  layout = layout_of('ring', 2, model=model)
  alone = jax.jit(gradients, compiler_options=FAST)(qkv, table, sink)
  cut = jax.jit(mesh.under(layout, gradients), compiler_options=FAST)(qkv, table, sink)
  for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(cut)):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_cross_attention_over_a_ring():
  """Other numbers of queries and of keys, neither a multiple of the ring."""
  r = np.random.RandomState(6)
  q, k, v = (r.randn(B, *shape, H) for shape in ((13, N), (30, K), (30, K)))
  layout, mask = layout_of('ring', 4), intervals.bidirectional(B, 13, 30)
  run = mesh.under(layout, lambda *qkv: attention(*qkv, mask, implementation='blockwise'))
  with jax.enable_x64(True):
    out = jax.jit(run, compiler_options=FAST)(q, k, v)
  want, _ = oracles.masked_attention(q, k, v, np.ones((B, 13, 30), bool), SCALE)
  np.testing.assert_allclose(out, want, atol=1e-12)


def test_heads_that_ulysses_cannot_deal_out_are_refused():
  layout = layout_of('ulysses', 8)
  with pytest.raises(ConfigError, match=re.escape(
      "with 8 devices to share 4 query and 2 kv heads of each: the number must divide both, or be "
      "a multiple of the kv heads; set mesh.strategy='hybrid' with mesh.ulysses=2 or 4")):
    sequence.check_heads(layout, 4, 2)
  with pytest.raises(ConfigError, match=re.escape("set mesh.strategy='ring'")):
    sequence.check_heads(layout, 3, 1)


def temp_bytes(size, backward, num_heads):
  """Compiled temporary memory of a device, 512 tokens on each."""
  layout, length = layout_of('ring', size), 512 * size
  mask = intervals.causal(1, length)
  run = mesh.under(layout, lambda q, k, v: sequence.attend(
      Blockwise(), layout, q, k, v, mask, OPTIONS, lse_gradient=False)[0].sum())
  spec = layout.sharding('batch', 'length', None, None)
  shape = lambda heads: jax.ShapeDtypeStruct((1, length, heads, 32), jnp.float32, sharding=spec)
  program = jax.jit(jax.grad(run, (0, 1, 2)) if backward else run)
  lowered = program.lower(shape(num_heads), shape(2), shape(2))
  return lowered.compile(compiler_options=FAST).memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize('backward,num_heads,growth', [(False, 8, 1.05), (True, 8, 1.15),
                                                       pytest.param(True, 4, 1.3,
                                                                    marks=pytest.mark.slow)])
def test_memory_of_a_device_does_not_grow_with_the_ring(backward, num_heads, growth):
  """None at all from 4 devices to 8. A ring of 2 has one hop and nothing in flight beside it: keys
  and sums of gradients are held once, which counts the less the more queries share them."""
  two, four, eight = (temp_bytes(size, backward, num_heads) for size in (2, 4, 8))
  assert eight <= 1.01 * four
  assert eight <= growth * two
