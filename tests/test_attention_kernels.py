"""The adapters of foreign attention kernels, held to the float64 loops as far as a CPU can.

splash runs in interpret mode. cudnn and mosaic_gpu are lowered for CUDA, and their values are held
with the kernels replaced by NumPy written from the kernels' documents: what the adapters hand over
and what they make of the answer is tested, the kernels are not. `tests.programs.check_kernels`
makes the same comparisons on the hardware.

B batch  T queries  S keys  N query heads  K kv heads  H head dim
"""

import dataclasses
import functools
import importlib.util
import inspect
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.attention import cudnn, intervals, kernel_checks, mosaic_gpu, splash
from longctx.attention.intervals import Options
from longctx.attention.key_ranges import key_ranges
from tests import oracles
from tests.programs.check_kernels import SERVED, compare, compare_parts, draw, make_mask

MODULES = {'splash': splash, 'cudnn': cudnn, 'mosaic_gpu': mosaic_gpu}
SMALLEST = float(np.finfo(np.float32).min)
NO_TOKAMAX = importlib.util.find_spec('tokamax') is None
needs_tokamax = pytest.mark.skipif(NO_TOKAMAX, reason=f'tokamax: {mosaic_gpu.INSTALL}')


def plain_scores(q, k, sees_BTS, scale, cap=0.0):
  """(masked scores_BNTS, d capped score / d score), float64, and the kv heads repeated."""
  group = q.shape[2] // k.shape[2]
  s = scale * np.einsum('btnh,bsnh->bnts', np.float64(q), np.repeat(np.float64(k), group, axis=2))
  slope = 1.0
  if cap:
    tanh = np.tanh(s / cap)
    s, slope = cap * tanh, 1 - tanh ** 2
  return np.where(sees_BTS[:, None], s, SMALLEST), slope


def plain_forward(q, k, v, sees_BTS, scale, cap=0.0):
  """(out, m_BNT, l_BNT); rows that see nothing give what an online softmax leaves there."""
  s, _ = plain_scores(q, k, sees_BTS, scale, cap)
  m = s.max(-1)
  p = np.exp(s - m[..., None])
  v = np.repeat(np.float64(v), q.shape[2] // k.shape[2], axis=2)
  return np.einsum('bnts,bsnh->btnh', p / p.sum(-1, keepdims=True), v), m, p.sum(-1)


def plain_backward(q, k, v, sees_BTS, scale, cap, out, lse_BNT, dout):
  """(dq, dk, dv) from the lse and out given, both as in FlashAttention's backward pass."""
  K, group = k.shape[2], q.shape[2] // k.shape[2]
  s, slope = plain_scores(q, k, sees_BTS, scale, cap)
  p = np.exp(s - np.float64(lse_BNT)[..., None])
  out, dout = np.float64(out), np.float64(dout)
  wide = lambda x: np.repeat(np.float64(x), group, axis=2)
  dp = np.einsum('btnh,bsnh->bnts', dout, wide(v))
  ds = p * (dp - np.einsum('btnh,btnh->bnt', out, dout)[..., None]) * slope
  shared = lambda x: x.reshape(*x.shape[:2], K, group, -1).sum(3)
  return (scale * np.einsum('bnts,bsnh->btnh', ds, wide(k)),
          scale * shared(np.einsum('bnts,btnh->bsnh', ds, np.float64(q))),
          shared(np.einsum('bnts,btnh->bsnh', p, dout)))


def called_back(function, shapes, *arrays):
  """NumPy inside a jitted program."""
  rounded = lambda *x: tuple(np.asarray(y, s.dtype) for y, s in zip(function(*x), shapes))
  return jax.pure_callback(rounded, tuple(shapes), *arrays)


def like(x, shape=None, dtype=None):
  return jax.ShapeDtypeStruct(shape or x.shape, dtype or x.dtype)


# ---- splash, in interpret mode ----


@pytest.fixture
def small_tiles(monkeypatch):
  """Several tiles in a short row, some of them skipped."""
  monkeypatch.setattr(splash, 'MAX_TILE', 128)
  splash._static_plan.cache_clear()
  yield
  splash._static_plan.cache_clear()


@pytest.mark.parametrize('case, T, S', [
    ('causal', 1, 1), ('causal', 140, 140), ('full', 5, 150),
    ('packed window', 140, 140), ('padding', 140, 140), ('any order', 140, 140)])
def test_splash_gives_the_loops_values_and_gradients(small_tiles, case, T, S):
  arrays = draw(T, S, (1, 1), 16, jnp.float32)
  mask, options = make_mask(case, T, S), Options(scale=0.3)
  assert splash.cannot(*arrays[:3], mask, options) == ''
  errors = compare(splash, mask, arrays, options, interpret=True)
  assert max(errors.values()) < 3e-6, errors


@pytest.mark.parametrize('S', [200, 256, 330])   # the last run is a part of one, or none, or third
def test_splash_merges_runs_of_keys(monkeypatch, small_tiles, S):
  monkeypatch.setattr(splash, 'MAX_KEYS', 128)
  errors = compare(splash, make_mask('any order', 20, S), draw(20, S, (2, 1), 16, jnp.float32),
                   Options(scale=0.3), interpret=True)
  assert max(errors.values()) < 3e-6, errors


def test_places_of_16_bits_are_told_apart():
  places = jnp.asarray([0, 1, 2**15 - 1, 2**15, 2**16 - 1])
  packed = jnp.asarray([0 << 16 | 0, 1 << 16 | 2**15, -2**31 | 2**16 - 1, 1 << 16])
  seen = splash._within(packed[:, None], places[None])
  np.testing.assert_array_equal(seen, [[1, 0, 0, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 1, 1], [0] * 5])
  last = 2**16 - 1
  plan = splash._plan(splash.kernel.BlockSizes(block_q=128, block_kv=1024), 2**16,
                      jnp.asarray([0, 2**15, last, 2**16]), jnp.asarray([1, 2**16, 2**16, 0]))
  seen = splash._within(plan.by_queries.q_sequence[:4, None], places[None])
  np.testing.assert_array_equal(seen, [[1, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1], [0] * 5])


def test_splash_caps_the_scores_and_groups_the_heads():
  arrays = draw(12, 12, (6, 2), 8, jnp.float32)
  errors = compare(splash, make_mask('packed', 12, 12), arrays, Options(scale=1.5, softcap=2.0),
                   interpret=True)
  assert max(errors.values()) < 3e-6, errors


def test_splash_takes_bfloat16():
  arrays = draw(30, 30, (2, 1), 24, jnp.bfloat16)
  errors = compare(splash, make_mask('packed', 30, 30), arrays, Options(scale=0.25), interpret=True)
  assert errors['lse'] < 1e-5 and max(errors.values()) < 1e-2, errors   # 0.25 rounds nothing


def test_splash_takes_the_lse_of_more_keys():
  errors = compare_parts(splash, 128, draw(9, 137, (4, 2), 16, jnp.float32), Options(scale=0.4),
                         interpret=True)
  assert max(errors.values()) < 3e-6, errors


def test_the_plain_backward_is_the_gradient():
  """The NumPy that stands for the kernels, against differences of the loops' answers."""
  q, k, v, dout = (np.asarray(x, np.float64)[:1] for x in draw(4, 4, (2, 1), 2, jnp.float32))
  sees = np.tril(np.ones((1, 4, 4), bool))
  loss = lambda q, k, v: (plain_forward(q, k, v, sees, 0.7, 2.0)[0] * dout).sum()
  out, m, total = plain_forward(q, k, v, sees, 0.7, 2.0)
  grads = plain_backward(q, k, v, sees, 0.7, 2.0, out, m + np.log(total), dout)
  for i, grad in enumerate(grads):
    for at in np.ndindex(grad.shape):
      up, down = [q.copy(), k.copy(), v.copy()], [q.copy(), k.copy(), v.copy()]
      up[i][at] += 1e-5
      down[i][at] -= 1e-5
      assert abs((loss(*up) - loss(*down)) / 2e-5 - grad[at]) < 1e-8
  index = np.arange(4)[None]
  true_out, true_lse = oracles.attention(q, k, v, 0 * index, index + 1, index, 0.7)
  plain_out, m, total = plain_forward(q, k, v, sees, 0.7)
  np.testing.assert_allclose(plain_out, true_out, atol=1e-12)
  np.testing.assert_allclose((m + np.log(total)).swapaxes(1, 2), true_lse, atol=1e-12)


@pytest.mark.parametrize('keys', [300, 128])
def test_tiles_that_nobody_sees_are_not_visited_and_those_seen_are(small_tiles, keys):
  """Of every mask, by the loops; and what a tile brings into memory is no tile of no use."""
  mask = make_mask('any order', 300, keys)
  ranges = key_ranges(mask, keys)
  sizes = splash.kernel.BlockSizes(block_q=128, block_kv=128, block_kv_compute=128)
  for b in range(2):
    plan = splash._plan(sizes, keys, ranges.start_BT[b], ranges.end_BT[b])
    low, high = np.asarray(ranges.start_BT[b]), np.asarray(ranges.end_BT[b])
    visited = np.asarray(plan.by_queries.block_mask[0])
    assert visited.shape == (3, -(-keys // 128))
    for i, j in np.ndindex(*visited.shape):
      rows = slice(128 * i, 128 * (i + 1))
      some = low[rows] < high[rows]
      hull = (low[rows][some].min(initial=keys), high[rows][some].max(initial=0))
      assert visited[i, j] == (hull[0] < 128 * (j + 1) and 128 * j < hull[1])
    np.testing.assert_array_equal(visited, plan.by_keys.block_mask[0])
    for axis, table in ((0, plan.by_queries), (1, plan.by_keys)):
      lines = zip(np.moveaxis(visited, axis, 0), np.moveaxis(np.asarray(table.data_next[0]), axis, 0))
      for needed, fetched in lines:
        used = np.flatnonzero(needed)
        np.testing.assert_array_equal(fetched[used], used)
        assert set(fetched) <= (set(used) or {0})


@pytest.mark.parametrize('length', [1, 127, 128, 129, 1000, 1025, 2048, 2100, 5000, 131072])
def test_a_tile_fills_up_by_a_sixteenth_of_the_row_at_most(length):
  tile = splash._tile(length)
  whole = math.ceil(length / 128) * 128
  assert tile % 128 == 0 and tile <= 1024
  assert math.ceil(length / tile) * tile <= whole * 17 / 16
  assert tile == 1024 or length < 1024 or length % 1024


# ---- cudnn ----


class CuDNN:
  """The primitives as documented: natural-base lse [B, N, T], window t - W < s <= t."""

  def __init__(self, backward: bool):
    self.backward, self.calls = backward, []

  def bind(self, q, k, v, bias, *arrays, **static):
    self.calls.append(static)
    rest = arrays[6:]   # after the lengths, the offsets and the page tables, all empty
    assert all(x.size == 0 for x in (bias, *arrays[:6]))
    assert static['dropout_rate'] == 0 and static['layout'] == 0
    t, s = np.arange(q.shape[1])[:, None], np.arange(k.shape[1])
    sees = np.ones((t.size, s.size), bool) if static['mask_type'].name == 'NO_MASK' else s <= t
    if window := static['sliding_window_length']:
      sees = sees & (t - window < s)
    sees = np.broadcast_to(sees, (q.shape[0], *sees.shape))
    if self.backward:
      lse, out, dout = rest
      function = lambda q, k, v, lse, out, dout: plain_backward(
          q, k, v, sees, static['scale'], 0.0, out, lse, dout)
      return called_back(function, [like(q), like(k), like(v)], q, k, v, lse, out, dout)

    def function(q, k, v):
      out, m, total = plain_forward(q, k, v, sees, static['scale'])
      return out, m + np.log(total)

    stats = like(q, (q.shape[0], q.shape[2], q.shape[1]), jnp.float32)
    return called_back(function, [like(q), stats], q, k, v)


@pytest.fixture
def plain_cudnn(monkeypatch):
  monkeypatch.setattr(cudnn, 'primitives', SimpleNamespace(
      **{n: getattr(cudnn.primitives, n) for n in (
          'MaskType', 'AttentionLayout', 'cuda_versions', '_dot_product_attention_fwd_impl',
          '_dot_product_attention_bwd_impl')},
      _dot_product_attention_fwd_p_wrapper=CuDNN(False),
      _dot_product_attention_bwd_p_wrapper=CuDNN(True)))


@pytest.mark.parametrize('case, T, S', [('causal', 9, 9), ('full', 7, 10), ('one window', 13, 13)])
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_cudnn_gives_the_loops_values_and_gradients(plain_cudnn, case, T, S, dtype):
  errors = compare(cudnn, make_mask(case, T, S), draw(T, S, (4, 2), 8, dtype),
                   Options(scale=0.3))
  assert errors['lse'] < 1e-5 and max(errors.values()) < 1e-2, errors


def test_cudnn_takes_the_lse_of_more_keys(plain_cudnn):
  errors = compare_parts(cudnn, 5, draw(8, 13, (4, 2), 8, jnp.bfloat16), Options(scale=0.4))
  assert errors['lse'] < 1e-5 and max(errors.values()) < 1e-2, errors


@pytest.mark.parametrize('case, mask_type, window', [
    ('causal', 'CAUSAL', 0), ('full', 'NO_MASK', 0), ('one window', 'CAUSAL', 26)])
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_cudnn_is_lowered_for_cuda(case, mask_type, window, dtype):
  q, k, v, dout = draw(130, 130, (4, 2), 64, dtype)
  mask, options = make_mask(case, 130, 130), Options(scale=0.125)
  assert cudnn.cannot(q, k, v, mask, options) == ''
  forward = lambda q, k, v, mask: cudnn.forward(q, k, v, mask, options)
  backward = lambda *x: cudnn.backward(*x[:4], options, *x[4:])[:3]
  out, lse = jax.eval_shape(forward, q, k, v, mask)
  assert (out.shape, out.dtype) == (q.shape, q.dtype)
  assert (lse.shape, lse.dtype) == ((2, 130, 4), jnp.float32)
  grads = jax.eval_shape(backward, q, k, v, mask, out, lse, dout)
  assert [(x.shape, x.dtype) for x in grads] == [(x.shape, x.dtype) for x in (q, k, v)]
  for function, arrays, call in ((forward, (q, k, v, mask), '__cudnn$fmhaSoftmax('),
                                 (backward, (q, k, v, mask, out, lse, dout),
                                  '__cudnn$fmhaSoftmaxBackward(')):
    text = lowered(function, *arrays)
    assert call in text
    assert f'\\22mask_type\\22: \\22{mask_type}\\22' in text
    assert f'\\22sliding_window_length\\22: {window},' in text
    assert '\\22fmha_scale\\22: 0.125' in text


def lowered(function, *arrays) -> str:
  return jax.jit(function).trace(*arrays).lower(lowering_platforms=('cuda',)).as_text()


# ---- mosaic_gpu ----


@dataclasses.dataclass
class PlainMask:
  k_start: jax.Array | None = None
  k_end: jax.Array | None = None
  is_causal: bool = False

  def sees(self, batch, T, S):
    t, s = np.arange(T)[:, None], np.arange(S)
    if self.is_causal:
      assert self.k_start is None
      return jnp.broadcast_to(jnp.asarray(s <= t), (batch, T, S))
    assert self.k_start.shape == self.k_end.shape == (batch, 1, T)
    return (self.k_start[:, 0, :, None] <= s) & (s < self.k_end[:, 0, :, None])


def plain_tokamax():
  """The Hopper kernels as documented; what they leave in rows that see nothing, too."""

  def forward(q, k, v, *, mask, precision, logits_dtype, logits_scale, logits_soft_cap,
              return_residuals, **unused):
    assert return_residuals and logits_dtype == jnp.float32 and unused == mosaic_gpu.UNUSED
    assert q.shape[1] % 256 == k.shape[1] % 128 == 0   # a tile of rows shares its least start and largest end
    assert {jnp.dtype(x) for p in precision for x in p.supported_lhs_types} >= {k.dtype, q.dtype}

    def function(q, k, v, sees):
      out, m, total = plain_forward(q, k, v, sees, logits_scale, logits_soft_cap or 0.0)
      for b, t in np.ndindex(*sees.shape[:2]):
        if not sees[b, t // 128 * 128:(t // 128 + 1) * 128].any():   # no tile was visited
          out[b, t], m[b, :, t], total[b, :, t] = 0, -np.inf, 0
      return out, m, total

    B, T, N, _ = q.shape
    numbers = like(q, (B, N, T), jnp.float32)
    out, m, total = called_back(function, [like(q), numbers, numbers], q, k, v,
                            mask.sees(B, T, k.shape[1]))
    return out, (m, total)

  def backward(residuals, out, dout, q, k, v, *, mask, precision, logits_dtype, logits_scale,
               logits_soft_cap, return_residuals, **unused):
    assert not return_residuals and unused == mosaic_gpu.UNUSED
    assert q.dtype == k.dtype == v.dtype == dout.dtype
    function = lambda q, k, v, sees, out, m, total, dout: plain_backward(
        q, k, v, sees, logits_scale, logits_soft_cap or 0.0, out, m + np.log(total), dout)
    grads = called_back(function, [like(q), like(k), like(v)], q, k, v,
                        mask.sees(q.shape[0], q.shape[1], k.shape[1]), out, *residuals, dout)
    return dict(zip('qkv', grads))

  return mosaic_gpu.Tokamax(PlainMask, forward, backward)


@pytest.fixture
def installed(monkeypatch):
  """As if tokamax were installed, which only its own sentence asks about."""
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: object())


@pytest.fixture
def plain_mosaic(monkeypatch, installed):
  monkeypatch.setattr(mosaic_gpu, 'load', plain_tokamax)


MOSAIC_CASES = [('causal', 9, 9), ('full', 7, 10), ('packed', 20, 20), ('window', 13, 13),
                ('packed window', 20, 20), ('padding', 15, 15), ('any order', 260, 21)]


@pytest.mark.parametrize('case, T, S', MOSAIC_CASES)
def test_mosaic_gpu_gives_the_loops_values_and_gradients(plain_mosaic, case, T, S):
  errors = compare(mosaic_gpu, make_mask(case, T, S), draw(T, S, (4, 2), 8, jnp.bfloat16),
                   Options(scale=0.3))
  forward = {name: errors.pop(name) for name in ('out', 'lse', 'empty')}
  assert max(forward.values()) < 1e-5, forward   # out is float32: not rounded to bfloat16
  assert max(errors.values()) < 1e-2, errors


def test_mosaic_gpu_takes_the_lse_of_more_keys(plain_mosaic):
  errors = compare_parts(mosaic_gpu, 5, draw(8, 13, (4, 2), 8, jnp.bfloat16),
                         Options(scale=0.4))
  assert errors['lse'] < 1e-5 and max(errors.values()) < 1e-2, errors


def test_mosaic_gpu_hands_over_the_soft_cap(plain_mosaic):
  errors = compare(mosaic_gpu, make_mask('packed', 10, 10), draw(10, 10, (2, 1), 8, jnp.bfloat16),
                   Options(scale=1.5, softcap=2.0))
  assert errors['out'] < 1e-5 and max(errors.values()) < 1e-2, errors


@pytest.mark.parametrize('case, T, S', MOSAIC_CASES)
def test_key_ranges_hold_the_keys_that_the_loops_see(case, T, S):
  mask = make_mask(case, T, S)
  ranges = key_ranges(mask, S)
  sees = oracles.interval_mask(*(np.asarray(x) for x in (mask.start_BT, mask.end_BT, mask.keys_BS)))
  order = np.tile(np.arange(S), (2, 1)) if ranges.order_BS is None else np.asarray(ranges.order_BS)
  for b, t in np.ndindex(2, T):
    keys = np.flatnonzero(sees[b, t]).tolist()
    low, high = int(ranges.start_BT[b, t]), int(ranges.end_BT[b, t])
    assert sorted(order[b, low:high]) == keys
    if not keys:
      assert (low, high) == (S, 0)   # widens no tile's range of keys
  x = jnp.arange(2 * S).reshape(2, S, 1, 1)
  np.testing.assert_array_equal(ranges.ordered(x)[..., 0, 0], np.asarray(x)[:, :, 0, 0][
      np.arange(2)[:, None], order])
  np.testing.assert_array_equal(ranges.restored(ranges.ordered(x)), x)
  assert ranges.stands is None or bool(ranges.stands) == (case != 'any order')


@needs_tokamax
@pytest.mark.parametrize('case, T, S', [MOSAIC_CASES[i] for i in (0, 4, 6)])
def test_mosaic_gpu_with_tokamax_s_own_plain_implementation(monkeypatch, case, T, S):
  """The mask, the scale, the cap and the residuals (m, total) mean to tokamax what is thought here."""
  real = mosaic_gpu.load()
  from tokamax._src.ops.attention import base
  plain = base.DotProductAttention()
  monkeypatch.setattr(mosaic_gpu, 'load', lambda: real._replace(forward=plain))
  q, k, v, _ = draw(T, S, (4, 2), 8, jnp.bfloat16)
  mask, options = make_mask(case, T, S), Options(scale=0.5, softcap=3.0)
  forward = jax.jit(functools.partial(mosaic_gpu.forward, options=options))
  out, lse = forward(q, k, v, mask)
  sees = np.asarray(intervals.sees(mask))
  true_out, m, total = plain_forward(q, k, v, sees, 0.5, 3.0)
  some = sees.any(-1)
  np.testing.assert_allclose(out, np.where(some[..., None, None], true_out, 0), atol=2e-2)
  true_lse = np.where(some[..., None], (m + np.log(total)).swapaxes(1, 2), -1e30)
  np.testing.assert_allclose(lse, np.float32(true_lse), rtol=1e-5, atol=1e-5)


@needs_tokamax
@pytest.mark.parametrize('case', ['causal', 'packed'])
def test_mosaic_gpu_s_kernels_are_lowered_for_cuda(monkeypatch, case):
  from tokamax._src import gpu_utils
  for name, answer in (('has_mosaic_gpu_support', True), ('is_sm90', True), ('is_sm100', False)):
    monkeypatch.setattr(gpu_utils, name, lambda device=None, answer=answer: answer)
  q, k, v, dout = draw(130, 130, (4, 2), 64, jnp.bfloat16)
  mask, options = make_mask(case, 130, 130), Options(scale=0.125, softcap=50.0)
  forward = lambda q, k, v, mask: mosaic_gpu.forward(q, k, v, mask, options)
  backward = lambda *x: mosaic_gpu.backward(*x[:4], options, *x[4:])[:3]
  out, lse = jax.eval_shape(forward, q, k, v, mask)
  assert (out.shape, out.dtype) == (q.shape, jnp.float32)
  assert (lse.shape, lse.dtype) == ((2, 130, 4), jnp.float32)
  grads = jax.eval_shape(backward, q, k, v, mask, out, lse, dout)
  assert [(x.shape, x.dtype) for x in grads] == [(x.shape, x.dtype) for x in (q, k, v)]
  assert lowered(forward, q, k, v, mask).count('mosaic_gpu') >= 1
  assert lowered(backward, q, k, v, mask, out, lse, dout).count('mosaic_gpu') >= 2   # dq; dk, dv


# ---- the base of the lse, refusals ----


@pytest.mark.parametrize('name', list(MODULES))
def test_the_lse_has_natural_base(name, plain_cudnn, plain_mosaic):
  """Equal scores c over 7 keys: c + ln 7, and half the probability is an lse of ln 2 more."""
  ones = jnp.ones((2, 7, 1, 8), jnp.bfloat16)
  kernel, mask, options = MODULES[name], make_mask('full', 7, 7), Options(scale=0.25)
  if name == 'splash':
    kernel = SimpleNamespace(forward=functools.partial(splash.forward, interpret=True),
                             backward=functools.partial(splash.backward, interpret=True))
  out, lse = kernel.forward(ones, ones, ones, mask, options)
  np.testing.assert_allclose(lse, 2 + math.log(7), rtol=1e-6)
  dv = kernel.backward(ones, ones, ones, mask, options, out, lse + math.log(2), ones)[2]
  np.testing.assert_allclose(np.float32(dv), 0.5, rtol=1e-2)


def asked(name, case='causal', *, q=(2, 8, 4, 16), k=(2, 8, 2, 16), v=None, dtype=jnp.bfloat16,
          v_dtype=None, kind=None, sinks=False, **options):
  mask = make_mask(case, q[1], k[1])
  mask = intervals.with_sinks(mask, 2) if sinks else mask
  mask = dataclasses.replace(mask, kind=kind or mask.kind)
  shaped = jax.ShapeDtypeStruct
  return MODULES[name].cannot(shaped(q, dtype), shaped(k, dtype), shaped(v or k, v_dtype or dtype),
                              mask, Options(scale=1.0, **options))


EVERYWHERE = [
    (dict(q=(2, 8, 16)), '[B, T, N, H]'),
    (dict(v=(2, 8, 1, 16)), '[B, S, K, H]'),
    (dict(k=(2, 8, 2, 24)), 'differ in rows or head dim'),
    (dict(k=(3, 8, 2, 16)), 'differ in rows or head dim'),
    (dict(q=(2, 8, 5, 16)), '5 query heads must be a multiple of 2 kv heads'),
    (dict(v_dtype=jnp.float32), 'one type for the three'),
    (dict(k=(2, 9, 2, 16)), 'kind causal needs as many keys as queries, not 9 and 8'),
    (dict(case='packed', sinks=True, kind='ordered'), 'sinks; its kernel takes one range'),
    (dict(bias=object()), 'cannot add a bias'),
    (dict(q=(2, 8, 4, 264), k=(2, 8, 2, 264)), 'head dim of 264')]


@pytest.mark.parametrize('name', list(MODULES))
@pytest.mark.parametrize('call, sentence', EVERYWHERE)
def test_every_adapter_says_why_not(installed, name, call, sentence):
  assert sentence in asked(name, **call)


@pytest.mark.parametrize('name, call, sentence', [
    ('splash', dict(dtype=jnp.float16), 'bfloat16 and float32, not float16'),
    ('splash', dict(dtype=jnp.float64), 'bfloat16 and float32, not float'),
    ('cudnn', dict(kind='any'), 'causal or full, not any'),
    ('cudnn', dict(case='packed'), 'causal or full, not ordered'),
    ('cudnn', dict(dtype=jnp.float32), 'bfloat16 and float16, not float32'),
    ('cudnn', dict(softcap=30.0), 'no soft cap (softcap=30)'),
    ('cudnn', dict(q=(2, 8, 4, 20), k=(2, 8, 2, 20)), 'multiple of 8'),
    ('mosaic_gpu', dict(dtype=jnp.float32), 'bfloat16 and float16, not float32'),
    ('mosaic_gpu', dict(q=(2, 8, 4, 20), k=(2, 8, 2, 20)), 'multiple of 8')])
def test_what_one_adapter_cannot_serve(installed, name, call, sentence):
  assert sentence in asked(name, **call)


@pytest.mark.parametrize('name', list(MODULES))
def test_what_an_adapter_serves(installed, name):
  sizes = {'one window': (8, 8), 'full': (8, 12), 'any order': (8, 12)}
  for case in SERVED[name]:
    T, S = sizes.get(case, (8, 8))
    assert asked(name, case, q=(2, T, 4, 16), k=(2, S, 2, 16)) == '', case
  assert asked(name, q=(2, 8, 4, 256), k=(2, 8, 2, 256)) == ''


def test_tokamax_is_named_with_its_installation(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  assert asked('mosaic_gpu') == f'tokamax is not installed; {mosaic_gpu.INSTALL}'


@pytest.mark.parametrize('name, call, sentence', [
    ('cudnn', dict(q=(2, 8, 4, 256), k=(2, 8, 2, 256)), 'above 128 needs a GPU of compute'),
    ('mosaic_gpu', {}, 'capability 9.0 or later, not 8.0')])
def test_an_older_gpu_is_told_so(monkeypatch, installed, name, call, sentence):
  monkeypatch.setattr(kernel_checks, 'capability', lambda: 8.0)
  monkeypatch.setattr(cudnn.primitives, 'cuda_versions', object())
  assert sentence in asked(name, **call)
  assert asked('cudnn') == ''   # a head dim of 16 is none too many
  monkeypatch.setattr(kernel_checks, 'capability', lambda: 9.0)
  assert asked(name, **call) == ''


def test_a_gpu_without_cudnn_is_told_so(monkeypatch):
  monkeypatch.setattr(kernel_checks, 'capability', lambda: 9.0)
  monkeypatch.setattr(cudnn.primitives, 'cuda_versions', None)
  assert asked('cudnn') == 'this jax finds no cuDNN (install jax[cuda13])'


@pytest.mark.parametrize('name, module, function', [
    ('splash', splash.kernel, '_splash_attention_forward'),
    ('splash', splash.kernel, '_splash_attention_bwd_dq'),
    ('splash', splash.kernel, '_splash_attention_bwd_dkv'),
    ('cudnn', cudnn.primitives, '_dot_product_attention_fwd_impl'),
    ('cudnn', cudnn.primitives, '_dot_product_attention_bwd_impl')])
def test_a_jax_that_calls_its_kernel_otherwise_is_told_so(monkeypatch, name, module, function):
  true = getattr(module, function)
  other = lambda *x, **y: None
  other.__name__ = function
  other.__signature__ = inspect.signature(true).replace(
      parameters=list(inspect.signature(true).parameters.values())[1:])
  monkeypatch.setattr(module, function, other)
  assert f'jax {jax.__version__} calls {function} with (' in asked(name)


@pytest.mark.parametrize('name', list(MODULES))
def test_what_cannot_be_served_is_not_served(name):
  q, k, v, dout = draw(4, 4, (2, 1), 8, jnp.float16 if name == 'splash' else jnp.float32)
  call = (q, k, v, make_mask('causal', 4, 4), Options(scale=1.0))
  reason = 'is not installed' if name == 'mosaic_gpu' and NO_TOKAMAX else 'serves bfloat16'
  with pytest.raises(NotImplementedError, match=f'{name}: .*{reason}'):
    MODULES[name].forward(*call)
  with pytest.raises(NotImplementedError, match=f'{name}: .*{reason}'):
    MODULES[name].backward(*call, q, q[..., 0], dout)


@pytest.mark.parametrize('name', ['cudnn', 'mosaic_gpu'])
def test_no_gradient_through_lse_is_pretended(name):
  with pytest.raises(NotImplementedError, match='no gradient through lse'):
    MODULES[name].backward(*[None] * 8, jnp.zeros(()))
  assert not MODULES[name].LSE_GRADIENT and splash.LSE_GRADIENT
