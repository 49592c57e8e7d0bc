"""Attention by JAX's splash kernel, for TPUs: any mask of intervals, on one device or as a ring's hop.

Plain causal masks and full ones are static: the kernel knows which tiles to visit. For all others
the table of tiles is made from the intervals as the program runs, and inside a tile each query
brings the range of keys that it sees, as two places of 16 bits in one number; hence keys are cut
into runs of MAX_KEYS, whose results are merged. The backward pass takes lse and delta =
rowsum(out * dout) from outside, so (out, lse) may be those over more keys than these (a ring). dq
has a pass of its own: the fused one keeps dq unreduced in memory.

Source: jax.experimental.pallas.ops.tpu.splash_attention, jax 0.10; its functions with a leading
underscore are private to jax, hence `cannot` looks at their arguments first.
lse: natural base, float32. out in q's type (float32 if runs were merged); dq, dk, dv likewise.
Differs from the definition: q is multiplied by the scale and rounded to its type before the product.
Held by: tests/test_attention_kernels.py (interpret mode on a CPU, against the float64 loops).
Unverified on hardware: values and speed (it is compiled ahead of time for v5e, v5p and v6e).

B batch  T queries  S keys  N query heads  K kv heads  H head dim  I query tiles  J key tiles
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as tables

from longctx.attention import kernel_checks
from longctx.attention.intervals import Intervals, Options
from longctx.attention.key_ranges import key_ranges

LSE_GRADIENT = True
KNOWS_KINDS = False   # its hops read the vectors
NEG_INF = -1e30     # lse of a row that sees nothing
LANES = 128         # a TPU's vector is as wide; tiles are multiples of it
MAX_TILE = 1024     # queries and keys of a tile brought into the core's memory
MAX_STRIP = 512     # keys of a tile whose scores are made at once
MAX_KEYS = 1 << 16  # places that 16 bits tell apart
HEAD_DIMS = 256     # above, the tiles outgrow the core's memory

FORWARD = ('fwd_mask_info', 'q', 'k', 'v', 'segment_ids', 'sinks', 'mask_value', 'is_mqa',
           'block_sizes', 'residual_checkpoint_name', 'save_residuals', 'mask_function',
           'attn_logits_soft_cap', 'interpret')
ARRAYS = ('q', 'k', 'v', 'segment_ids', 'sinks', 'logsumexp', 'do', 'di')
LAYOUTS = ('q_layout', 'k_layout', 'v_layout', 'mask_function', 'interpret')
BACKWARD_DQ = (*ARRAYS, 'bq', 'bkv', 'is_mqa', 'mask_info', 'mask_value', 'attn_logits_soft_cap',
               *LAYOUTS)
BACKWARD_DKV = (*ARRAYS, 'bq', 'bkv', 'bkv_compute', 'is_mqa', 'mask_info', 'mask_value',
                'attn_logits_soft_cap', 'use_fused_bwd_kernel', *LAYOUTS)


def cannot(q_BTNH, k_BSKH, v_BSKH, mask: Intervals, options: Options) -> str:
  """'' when splash serves the call; else the sentence why not."""
  refusal = (
      kernel_checks.cannot_call(kernel._splash_attention_forward, FORWARD)
      or kernel_checks.cannot_call(kernel._splash_attention_bwd_dq, BACKWARD_DQ)
      or kernel_checks.cannot_call(kernel._splash_attention_bwd_dkv, BACKWARD_DKV)
      or kernel_checks.cannot_shape(q_BTNH, k_BSKH, v_BSKH, mask)
      or kernel_checks.cannot_score(mask, options, softcap=True,
                                    kinds=('causal', 'ordered', 'full', 'any')))
  if refusal:
    return refusal
  if q_BTNH.dtype not in (jnp.bfloat16, jnp.float32):
    return f'serves bfloat16 and float32, not {q_BTNH.dtype}'
  if q_BTNH.shape[-1] > HEAD_DIMS:
    return f'a head dim of {q_BTNH.shape[-1]} is above {HEAD_DIMS}'
  return ''


def forward(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Intervals,
            options: Options, *, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
  """(out_BTNH, lse_BTN float32 natural base); rows that see nothing: out 0, lse -1e30."""
  kernel_checks.demand('splash', cannot(q_BTNH, k_BSKH, v_BSKH, mask, options))
  T = q_BTNH.shape[1]
  q_BNTH = _rows(_scaled(q_BTNH, options), _tile(T))

  def visit(result, run):
    def one_row(q_NTH, k_KSH, v_KSH, plan):
      out_NTH, (lse_NT,) = kernel._splash_attention_forward(
          plan.by_queries, q_NTH, k_KSH, v_KSH, None, None, is_mqa=False, block_sizes=run.sizes,
          residual_checkpoint_name=None, save_residuals=True,
          **_shared(run.function, options, interpret))
      return out_NTH, lse_NT

    out_BNTH, lse_BNT = jax.vmap(one_row, in_axes=(0, 0, 0, run.axes))(
        q_BNTH, run.k_BKSH, run.v_BKSH, run.plan)
    out_BTNH, lse_BTN = out_BNTH.swapaxes(1, 2)[:, :T], lse_BNT.swapaxes(1, 2)[:, :T]
    if run.sees_BT is not None:
      out_BTNH = jnp.where(run.sees_BT[..., None, None], out_BTNH, 0.0).astype(out_BTNH.dtype)
      lse_BTN = jnp.where(run.sees_BT[..., None], lse_BTN, NEG_INF)
    return ((out_BTNH, lse_BTN) if result is None else _merged(result, (out_BTNH, lse_BTN))), ()

  nothing = (jnp.zeros(q_BTNH.shape, jnp.float32), jnp.full(q_BTNH.shape[:3], NEG_INF))
  return _over_runs(visit, nothing, mask, T, k_BSKH, v_BSKH)[0]


def backward(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Intervals,
             options: Options, out_BTNH: jax.Array, lse_BTN: jax.Array, dout_BTNH: jax.Array,
             dlse_BTN: jax.Array | None = None, *, interpret: bool = False
             ) -> tuple[jax.Array, jax.Array, jax.Array, None]:
  """(dq, dk, dv, None), with probabilities exp(score - lse) and delta = rowsum(out * dout) - dlse."""
  kernel_checks.demand('splash', cannot(q_BTNH, k_BSKH, v_BSKH, mask, options))
  T, tile = q_BTNH.shape[1], _tile(q_BTNH.shape[1])
  dout_BTNH = dout_BTNH.astype(v_BSKH.dtype)
  delta_BTN = (out_BTNH.astype(jnp.float32) * dout_BTNH.astype(jnp.float32)).sum(-1)
  delta_BTN = delta_BTN if dlse_BTN is None else delta_BTN - dlse_BTN
  numbers = lambda x_BTN: _rows(x_BTN[..., None], tile)[..., 0]
  q_BNTH, dout_BNTH = _rows(_scaled(q_BTNH, options), tile), _rows(dout_BTNH, tile)
  lse_BNT, delta_BNT = numbers(lse_BTN), numbers(delta_BTN)

  def visit(dq_BTNH, run):
    def one_row(q_NTH, k_KSH, v_KSH, lse_NT, dout_NTH, delta_NT, plan):
      arrays = (q_NTH, k_KSH, v_KSH, None, None, lse_NT, dout_NTH, delta_NT)
      sizes = run.sizes
      shared = dict(_shared(run.function, options, interpret), is_mqa=False, bq=sizes.block_q,
                    bkv=sizes.block_kv, q_layout=sizes.q_layout, k_layout=sizes.k_layout,
                    v_layout=sizes.v_layout)
      dq_NTH = kernel._splash_attention_bwd_dq(*arrays, mask_info=plan.by_queries, **shared)
      _, dk_KSH, dv_KSH = kernel._splash_attention_bwd_dkv(
          *arrays, mask_info=plan.by_keys, bkv_compute=sizes.block_kv_compute,
          use_fused_bwd_kernel=False, **shared)
      return dq_NTH, dk_KSH, dv_KSH

    grads = jax.vmap(one_row, in_axes=(0,) * 6 + (run.axes,))(
        q_BNTH, run.k_BKSH, run.v_BKSH, lse_BNT, dout_BNTH, delta_BNT, run.plan)
    more, dk_BSKH, dv_BSKH = (x.swapaxes(1, 2) for x in grads)
    more = more[:, :T]
    return (more if dq_BTNH is None else dq_BTNH + more.astype(jnp.float32),
            (dk_BSKH[:, :run.num_keys], dv_BSKH[:, :run.num_keys]))

  dq_BTNH, (dk_BSKH, dv_BSKH) = _over_runs(
      visit, jnp.zeros(q_BTNH.shape, jnp.float32), mask, T, k_BSKH, v_BSKH)
  return _scaled(dq_BTNH, options), dk_BSKH, dv_BSKH, None


def _shared(function, options, interpret):
  return dict(mask_value=kernel.DEFAULT_MASK_VALUE, mask_function=function, interpret=interpret,
              attn_logits_soft_cap=options.softcap or None)


def _scaled(x: jax.Array, options: Options) -> jax.Array:
  return (options.scale * x.astype(jnp.float32)).astype(x.dtype)


def _rows(x_BTNH: jax.Array, tile: int) -> jax.Array:
  """[B, T, N, H] to [B, N, T filled up to whole tiles, H]."""
  x_BNTH = x_BTNH.swapaxes(1, 2)
  return jnp.pad(x_BNTH, ((0, 0), (0, 0), (0, -x_BNTH.shape[2] % tile), (0, 0)))


def _merged(a, b):
  (out_a, lse_a), (out_b, lse_b) = a, b
  lse = jnp.logaddexp(lse_a, lse_b)
  weigh = lambda out, part: out.astype(jnp.float32) * jnp.exp(part - lse)[..., None]
  return weigh(out_a, lse_a) + weigh(out_b, lse_b), lse


def _tile(length: int) -> int:
  """Tile for so many tokens: the largest that fills up by at most a sixteenth."""
  whole = -(-length // LANES) * LANES
  if whole <= MAX_TILE:
    return whole
  sizes = [LANES * 2**i for i in range(8) if LANES * 2**i <= MAX_TILE]
  return max(x for x in sizes if -(-length // x) * x <= whole * 17 / 16)


class Plan(NamedTuple):
  """Tables of the tiles to visit."""

  by_queries: tables.MaskInfo   # for out and dq: each query tile walks its key tiles
  by_keys: tables.MaskInfo      # for dk and dv: the reverse


class Run(NamedTuple):
  """A run of keys, and what a call of the kernel on them needs."""

  k_BKSH: jax.Array
  v_BKSH: jax.Array
  num_keys: int
  sizes: kernel.BlockSizes
  function: object              # the mask inside a tile; None: all of it
  plan: Plan
  axes: int | None              # 0: each row of the batch has a plan of its own
  sees_BT: jax.Array | None     # None: every row sees some of these keys


def _over_runs(visit, nothing, mask: Intervals, T: int, k_BSKH: jax.Array, v_BSKH: jax.Array):
  """(result, parts): visit(result, run) -> (result, arrays of the run's keys) for each run in turn.

  The result before is `nothing`, or None where one run is all. Runs of MAX_KEYS stand in a scan:
  one after the other in the program, XLA would hold several runs' results at once.
  """
  S, block_q = k_BSKH.shape[1], _tile(T)

  def sizes(num_keys):
    block_k = _tile(num_keys)
    strip = max(x for x in range(LANES, min(MAX_STRIP, block_k) + 1, LANES) if block_k % x == 0)
    return kernel.BlockSizes(block_q=block_q, block_kv=block_k, block_kv_compute=strip)

  # A causal mask goes by places, which is right wherever the keys are the queries' own.
  if (mask.kind == 'causal' and not mask.reach) or (mask.kind == 'full' and S % _tile(S) == 0):
    plan, function = _static_plan(mask.kind, T, S, block_q, _tile(S))
    keys = [_rows(x, _tile(S)) for x in (k_BSKH, v_BSKH)]
    return visit(None, Run(*keys, S, sizes(S), function, plan, None, None))

  ranges = key_ranges(mask, S)
  k_BSKH, v_BSKH = ranges.ordered(k_BSKH), ranges.ordered(v_BSKH)

  def one(result, low, num_keys):
    start_BT = jnp.clip(ranges.start_BT - low, 0, num_keys)
    end_BT = jnp.clip(ranges.end_BT - low, 0, num_keys)
    size = sizes(num_keys)
    plan = jax.vmap(functools.partial(_plan, size, num_keys))(start_BT, end_BT)
    keys = [_rows(jax.lax.dynamic_slice_in_dim(x, low, num_keys, axis=1), size.block_kv)
            for x in (k_BSKH, v_BSKH)]
    return visit(result, Run(*keys, num_keys, size, _within, plan, 0, start_BT < end_BT))

  num_keys = k_BSKH.shape[1]
  whole, rest = divmod(num_keys, MAX_KEYS)
  if num_keys <= MAX_KEYS:
    result, parts = one(None, 0, num_keys)
  else:
    result, parts = jax.lax.scan(lambda result, i: one(result, i * MAX_KEYS, MAX_KEYS), nothing,
                                 jnp.arange(whole))
    parts = jax.tree.map(   # [runs, B, keys of a run, K, H]
        lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:]), parts)
  if rest and whole:
    result, last = one(result, whole * MAX_KEYS, rest)
    parts = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), parts, last)
  return result, jax.tree.map(lambda x: ranges.restored(x[:, :S]), parts)


@functools.lru_cache(maxsize=64)
def _static_plan(kind: str, T: int, S: int, block_q: int, block_k: int):
  """(plan, function of the mask inside a tile), made by splash; one plan serves every head."""
  shape = (-(-T // block_q) * block_q, -(-S // block_k) * block_k)
  mask = masks.MultiHeadMask([(masks.FullMask if kind == 'full' else masks.CausalMask)(shape)])
  whole = dict(head_shards=1, q_seq_shards=1)
  by_queries, function = tables.process_mask(mask, (block_q, block_k), **whole)
  by_keys, _ = tables.process_mask_dkv(mask, (block_q, block_k), **whole)
  return Plan(by_queries, by_keys), function


def _plan(sizes: kernel.BlockSizes, num_keys: int, start_T: jax.Array, end_T: jax.Array) -> Plan:
  """The tiles between the first key that a tile of queries sees and the last."""
  sees_T = start_T < end_T
  tiles = lambda x_T, fill: jnp.pad(x_T, (0, -x_T.size % sizes.block_q), constant_values=fill
                                    ).reshape(-1, sizes.block_q)
  first_I = tiles(jnp.where(sees_T, start_T, num_keys), num_keys).min(1)
  stop_I = tiles(jnp.where(sees_T, end_T, 0), 0).max(1)
  low_J = jnp.arange(0, num_keys, sizes.block_kv)
  needed_IJ = (low_J < stop_I[:, None]) & (first_I[:, None] < low_J + sizes.block_kv)
  # Places that a row of no keys gets: from 1 to 0.
  packed_T = jnp.where(sees_T, start_T << 16 | end_T - 1, 1 << 16)
  packed_T = tiles(packed_T, 1 << 16).reshape(-1).astype(jnp.int32)
  table = lambda axis: tables.MaskInfo(
      data_next=_visited(needed_IJ, axis)[None], mask_next=None,
      block_mask=needed_IJ.astype(jnp.int32)[None], partial_mask_blocks=None, q_sequence=packed_T)
  return Plan(table(1), table(0))


def _visited(needed_IJ: jax.Array, axis: int) -> jax.Array:
  """The tile to have in memory at each step along `axis`: of those needed, the last, or the first."""
  tile_IJ = jnp.broadcast_to(jnp.expand_dims(jnp.arange(needed_IJ.shape[axis]), 1 - axis),
                             needed_IJ.shape)
  last_IJ = jax.lax.cummax(jnp.where(needed_IJ, tile_IJ, -1), axis=axis)
  first_IJ = jnp.argmax(needed_IJ, axis=axis, keepdims=True)
  return jnp.where(last_IJ < 0, first_IJ, last_IJ).astype(jnp.int32)


def _within(packed: jax.Array, place: jax.Array) -> jax.Array:
  """The mask inside a tile: from the upper 16 bits to the lower ones."""
  return ((jax.lax.shift_right_logical(packed, np.int32(16)) <= place)
          & (place <= (packed & np.int32(0xFFFF))))
