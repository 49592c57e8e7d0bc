"""Attention by JAX's splash kernel, for TPUs: causal masks, packed documents, windows, full hops.

The kernel skips tiles that a static mask rules out; documents are segment ids, compared inside the
tiles. Its backward pass takes lse and delta = rowsum(out * dout) from outside, so (out, lse) may be
those over more keys than these (a ring). dq has a pass of its own: the fused one keeps dq unreduced
in memory.

Source: jax.experimental.pallas.ops.tpu.splash_attention, jax 0.10; its functions with a leading
underscore are private to jax, hence `cannot` looks at their arguments first.
lse: natural base, float32. out in q's type; dq, dk, dv in the types of q, k, v.
Differs from the definition: q is multiplied by the scale and rounded to its type before the product.
Held by: tests/test_attention_kernels.py (interpret mode on a CPU, against the float64 loops).
Unverified on hardware: speed; whether the tile sizes are the best ones.

B batch  T queries  S keys  N query heads  K kv heads  H head dim
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as tables

from longctx.attention import kernel_checks
from longctx.attention.intervals import Intervals, Options

LSE_GRADIENT = True
LANES = 128       # a TPU's vector is as wide; tiles are multiples of it
MAX_TILE = 1024   # queries and keys of a tile brought into the core's memory
MAX_STRIP = 512   # keys of a tile whose scores are made at once
HEAD_DIMS = 256   # above, the tiles outgrow the core's memory

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
                                    kinds=('causal', 'ordered', 'full')))
  if refusal:
    return refusal
  if q_BTNH.dtype not in (jnp.bfloat16, jnp.float32):
    return f'serves bfloat16 and float32, not {q_BTNH.dtype}'
  if q_BTNH.shape[-1] > HEAD_DIMS:
    return f'a head dim of {q_BTNH.shape[-1]} is above {HEAD_DIMS}'
  return ''


def forward(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Intervals,
            options: Options, *, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
  """(out_BTNH in q's type, lse_BTN float32 natural base).

  A mask of kind 'ordered' is taken for documents cut by a window of `reach`; rows whose start says
  otherwise come back NaN, rather than wrong.
  """
  T, S = q_BTNH.shape[1], k_BSKH.shape[1]
  sizes, info, function = _tables(mask.kind, mask.reach, T, S)

  shared = _shared(function, options, interpret)

  def one_row(q_NTH, k_KSH, v_KSH, ids):
    out_NTH, (lse_NT,) = kernel._splash_attention_forward(
        info[0], q_NTH, k_KSH, v_KSH, ids, None, save_residuals=True,
        is_mqa=False, block_sizes=sizes, residual_checkpoint_name=None, **shared)
    return out_NTH, lse_NT

  out_BNTH, lse_BNT = jax.vmap(one_row)(
      _rows(_scaled(q_BTNH, options), sizes.block_q), _rows(k_BSKH, sizes.block_kv),
      _rows(v_BSKH, sizes.block_kv), _segments(mask, sizes, T, S))
  out_BTNH, lse_BTN = out_BNTH.swapaxes(1, 2)[:, :T], lse_BNT.swapaxes(1, 2)[:, :T]
  if mask.kind == 'ordered':
    kept_BT = mask.start_BT == _start(mask)
    out_BTNH = jnp.where(kept_BT[..., None, None], out_BTNH, jnp.nan)
    lse_BTN = jnp.where(kept_BT[..., None], lse_BTN, jnp.nan)
  return out_BTNH, lse_BTN


def backward(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Intervals,
             options: Options, out_BTNH: jax.Array, lse_BTN: jax.Array, dout_BTNH: jax.Array,
             dlse_BTN: jax.Array | None = None, *, interpret: bool = False
             ) -> tuple[jax.Array, jax.Array, jax.Array, None]:
  """(dq, dk, dv, None), with probabilities exp(score - lse) and delta = rowsum(out * dout) - dlse."""
  T, S = q_BTNH.shape[1], k_BSKH.shape[1]
  sizes, info, function = _tables(mask.kind, mask.reach, T, S)
  dout_BTNH = dout_BTNH.astype(v_BSKH.dtype)
  delta_BTN = (out_BTNH.astype(jnp.float32) * dout_BTNH.astype(jnp.float32)).sum(-1)
  delta_BTN = delta_BTN if dlse_BTN is None else delta_BTN - dlse_BTN
  shared = dict(_shared(function, options, interpret), is_mqa=False, bq=sizes.block_q,
                bkv=sizes.block_kv, q_layout=sizes.q_layout, k_layout=sizes.k_layout,
                v_layout=sizes.v_layout)

  def one_row(q_NTH, k_KSH, v_KSH, ids, lse_NT, dout_NTH, delta_NT):
    arrays = (q_NTH, k_KSH, v_KSH, ids, None, lse_NT, dout_NTH, delta_NT)
    dq_NTH = kernel._splash_attention_bwd_dq(*arrays, mask_info=info[0], **shared)
    _, dk_KSH, dv_KSH = kernel._splash_attention_bwd_dkv(
        *arrays, mask_info=info[1], bkv_compute=sizes.block_kv_compute,
        use_fused_bwd_kernel=False, **shared)
    return dq_NTH, dk_KSH, dv_KSH

  numbers = lambda x_BTN: _rows(x_BTN[..., None], sizes.block_q)[..., 0]
  grads = jax.vmap(one_row)(
      _rows(_scaled(q_BTNH, options), sizes.block_q), _rows(k_BSKH, sizes.block_kv),
      _rows(v_BSKH, sizes.block_kv), _segments(mask, sizes, T, S), numbers(lse_BTN),
      _rows(dout_BTNH, sizes.block_q), numbers(delta_BTN))
  dq_BTNH, dk_BSKH, dv_BSKH = (x.swapaxes(1, 2) for x in grads)
  return _scaled(dq_BTNH[:, :T], options), dk_BSKH[:, :S], dv_BSKH[:, :S], None


def _shared(function, options, interpret):
  return dict(mask_value=kernel.DEFAULT_MASK_VALUE, mask_function=function, interpret=interpret,
              attn_logits_soft_cap=options.softcap or None)


def _tile(length: int) -> int:
  """Tile for so many tokens: the largest that fills up by at most a sixteenth."""
  whole = -(-length // LANES) * LANES
  if whole <= MAX_TILE:
    return whole
  sizes = [LANES * 2**i for i in range(8) if LANES * 2**i <= MAX_TILE]
  return max(x for x in sizes if -(-length // x) * x <= whole * 17 / 16)


@functools.lru_cache(maxsize=64)
def _tables(kind: str, reach: int, T: int, S: int):
  """(tile sizes, tables of tiles to visit by queries and by keys, function of the mask)."""
  block_q, block_k = _tile(T), _tile(S)
  strip = max(x for x in range(LANES, min(MAX_STRIP, block_k) + 1, LANES) if block_k % x == 0)
  sizes = kernel.BlockSizes(block_q=block_q, block_kv=block_k, block_kv_compute=strip)
  shape = (-(-T // block_q) * block_q, -(-S // block_k) * block_k)
  if kind == 'full':
    mask = masks.FullMask(shape)
  elif reach:
    mask = masks.LocalMask(shape, (reach - 1, 0), 0)
  else:
    mask = masks.CausalMask(shape)
  heads = masks.MultiHeadMask([mask])   # one table serves every head
  whole = dict(head_shards=1, q_seq_shards=1)
  by_queries, function = tables.process_mask(heads, (block_q, block_k), **whole)
  by_keys, _ = tables.process_mask_dkv(heads, (block_q, block_k), **whole)
  return sizes, (by_queries, by_keys), function


def _rows(x_BTNH: jax.Array, tile: int) -> jax.Array:
  """[B, T, N, H] to [B, N, T filled up to whole tiles, H]."""
  x_BNTH = x_BTNH.swapaxes(1, 2)
  return jnp.pad(x_BNTH, ((0, 0), (0, 0), (0, -x_BNTH.shape[2] % tile), (0, 0)))


def _scaled(x: jax.Array, options: Options) -> jax.Array:
  return (options.scale * x.astype(jnp.float32)).astype(x.dtype)


def _document(mask: Intervals) -> jax.Array:
  """Number of each token's document: one begins at a token that sees nothing before itself."""
  return jnp.cumsum(mask.start_BT == mask.index_BT, axis=1, dtype=jnp.int32)


def _start(mask: Intervals) -> jax.Array:
  """start_BT as the segment ids and the window of `reach` make it."""
  begins_BT = jnp.where(mask.start_BT == mask.index_BT, mask.index_BT, 0)
  start_BT = jax.lax.cummax(begins_BT, axis=1)
  return jnp.maximum(start_BT, mask.index_BT + 1 - mask.reach) if mask.reach else start_BT


def _segments(mask: Intervals, sizes, T: int, S: int):
  """SegmentIds [B, filled length] where documents or filled-up keys need them, else None."""
  if mask.kind == 'ordered':
    ids_BT = jnp.pad(_document(mask), ((0, 0), (0, -T % sizes.block_q)), mode='edge')
    return kernel.SegmentIds(ids_BT, ids_BT)
  if mask.kind == 'full' and S % sizes.block_kv:
    B = mask.start_BT.shape[0]
    filled_q, filled_k = T + -T % sizes.block_q, S + -S % sizes.block_kv
    real_S = (jnp.arange(filled_k) < S).astype(jnp.int32)
    return kernel.SegmentIds(jnp.ones((B, filled_q), jnp.int32),
                             jnp.broadcast_to(real_S, (B, filled_k)))
  return None
