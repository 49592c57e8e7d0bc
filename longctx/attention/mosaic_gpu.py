"""Attention by tokamax's Hopper kernel: any mask of intervals, packed and windowed ones fastest.

Each query row brings the range [k_start, k_end) of keys that it sees, and tiles outside the ranges
are not visited in the forward pass (the backward pass visits all, and masks). Its backward pass takes the residuals (m, l) of the softmax
from outside: with m = lse and l = 1 its probabilities are exp(score - lse), so (out, lse) may be
those over more keys than these (a ring).

Source: tokamax 0.0.12, PallasMosaicGpuFlashAttention and its Vjp (optional: `pip install tokamax`).
lse: made here of the kernel's natural-base m and l, float32. out in float32 where q is bfloat16
(the kernel's out has the type of its q, which it rounds itself); gradients in q's type.
Held by: tests/test_attention_kernels.py (the ranges against loops; values with tokamax's plain
implementation in the kernel's place; the kernels themselves lowered for CUDA from a CPU).
Unverified on hardware: everything but the lowering; first of all float32 out from bfloat16 q.

B batch  T queries  S keys  N query heads  K kv heads  H head dim
"""

import importlib.util
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from longctx.attention import kernel_checks
from longctx.attention.intervals import Intervals, Options
from longctx.attention.key_ranges import key_ranges

LSE_GRADIENT = False   # its backward pass makes delta itself
KNOWS_KINDS = False
NEG_INF = -1e30   # lse of a row that sees nothing
HOPPER = 9.0
ROWS = 256        # the kernels share a range among as many rows, so T is filled up to it
KEYS = 128        # keys of a tile; the backward pass cannot read a part of one
UNUSED = dict(bias=None, dropout_mask=None, dropout_rate=0.0, paging_info=None, q_indices=None,
              k_indices=None, normalize_output=True)
INSTALL = 'pip install "tokamax>=0.0.12,<0.1"'


class Tokamax(NamedTuple):
  """The three things used of tokamax."""

  mask: type         # Mask(k_start=, k_end=, is_causal=)
  forward: object    # (q, k, v, **options) -> out, (m_BNT, l_BNT)
  backward: object   # ((m, l), out, dout, q, k, v, **options) -> dict(q=, k=, v=)


def load() -> Tokamax:
  """Imports tokamax, which is optional and slow to import."""
  from absl import flags
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()   # tokamax would parse the program's whole command line
  from tokamax._src.ops.attention import base, pallas_mosaic_gpu, pallas_mosaic_gpu_vjp
  return Tokamax(base.Mask, pallas_mosaic_gpu.PallasMosaicGpuFlashAttention(),
                 pallas_mosaic_gpu_vjp.PallasMosaicGpuFlashAttentionVjp())


def cannot(q_BTNH, k_BSKH, v_BSKH, mask: Intervals, options: Options) -> str:
  """'' when the kernel serves the call; else the sentence why not."""
  if importlib.util.find_spec('tokamax') is None:
    return f'tokamax is not installed; {INSTALL}'
  refusal = (kernel_checks.cannot_shape(q_BTNH, k_BSKH, v_BSKH, mask)
             or kernel_checks.cannot_score(mask, options, softcap=True,
                                           kinds=('causal', 'ordered', 'full', 'any')))
  if refusal:
    return refusal
  if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
    return f'serves bfloat16 and float16, not {q_BTNH.dtype}'
  head_dim, capability = q_BTNH.shape[-1], kernel_checks.capability()
  if head_dim % 8 or head_dim > 256:
    return f'a head dim of {head_dim} must be a multiple of 8 up to 256'
  if 0 < capability < HOPPER:
    return (f'needs a GPU of compute capability {HOPPER} or later, not {capability}')
  return ''


def forward(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Intervals,
            options: Options) -> tuple[jax.Array, jax.Array]:
  """(out_BTNH, lse_BTN float32 natural base); rows that see nothing: out 0, lse -1e30."""
  kernel_checks.demand('mosaic_gpu', cannot(q_BTNH, k_BSKH, v_BSKH, mask, options))
  tokamax, T = load(), q_BTNH.shape[1]
  ranges = key_ranges(mask, k_BSKH.shape[1])
  keys = [_filled(ranges.ordered(x), KEYS) for x in (k_BSKH, v_BSKH)]   # no range holds the zeros
  # The kernel's out has the type of its q: float32 here, rounded to bfloat16 within.
  wide = jnp.float32 if q_BTNH.dtype == jnp.bfloat16 else q_BTNH.dtype
  out_BTNH, (m_BNT, l_BNT) = tokamax.forward(
      _filled(q_BTNH).astype(wide), *keys, mask=_mask(tokamax, mask, ranges, T),
      return_residuals=True, **_static(options, q_BTNH.dtype))
  out_BTNH, m_BTN, l_BTN = out_BTNH[:, :T], *(x.swapaxes(1, 2)[:, :T] for x in (m_BNT, l_BNT))
  sees_BT1 = (ranges.start_BT < ranges.end_BT)[..., None]
  lse_BTN = jnp.where(sees_BT1, m_BTN + jnp.log(jnp.where(sees_BT1, l_BTN, 1.0)), NEG_INF)
  return jnp.where(sees_BT1[..., None], out_BTNH, 0.0).astype(out_BTNH.dtype), lse_BTN


def backward(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Intervals,
             options: Options, out_BTNH: jax.Array, lse_BTN: jax.Array, dout_BTNH: jax.Array,
             dlse_BTN: None = None) -> tuple[jax.Array, jax.Array, jax.Array, None]:
  """(dq, dk, dv, None), with probabilities exp(score - lse) and delta = rowsum(out * dout)."""
  if dlse_BTN is not None:
    raise NotImplementedError('mosaic_gpu: no gradient through lse; call attention(), which '
                              'returns none')
  kernel_checks.demand('mosaic_gpu', cannot(q_BTNH, k_BSKH, v_BSKH, mask, options))
  tokamax, T = load(), q_BTNH.shape[1]
  ranges = key_ranges(mask, k_BSKH.shape[1])
  keys = [_filled(ranges.ordered(x), KEYS) for x in (k_BSKH, v_BSKH)]   # no range holds the zeros
  m_BNT = _filled(lse_BTN).swapaxes(1, 2)   # -1e30 is far above a masked score: probability 0
  grads = tokamax.backward(
      (m_BNT, jnp.ones_like(m_BNT)), _filled(out_BTNH), _filled(dout_BTNH.astype(q_BTNH.dtype)),
      _filled(q_BTNH), *keys, mask=_mask(tokamax, mask, ranges, T),
      return_residuals=False, **_static(options, q_BTNH.dtype))
  dk_BSKH, dv_BSKH = (ranges.restored(grads[n][:, :k_BSKH.shape[1]]) for n in 'kv')
  return grads['q'][:, :T], dk_BSKH, dv_BSKH, None


def _mask(tokamax: Tokamax, mask: Intervals, ranges, T: int):
  if mask.kind == 'causal' and not mask.reach:
    return tokamax.mask(is_causal=True)   # by place, which is right wherever keys are the queries' own
  filled = lambda x_BT, value: jnp.pad(x_BT, ((0, 0), (0, -T % ROWS)), constant_values=value)
  start_BT = filled(ranges.start_BT, np.iinfo(np.int32).max)
  return tokamax.mask(k_start=start_BT[:, None], k_end=filled(ranges.end_BT, 0)[:, None])


def _filled(x_BT: jax.Array, multiple: int = ROWS) -> jax.Array:
  return jnp.pad(x_BT, [(0, -n % multiple if d == 1 else 0) for d, n in enumerate(x_BT.shape)])


def _static(options: Options, dtype) -> dict:
  presets = jax.lax.DotAlgorithmPreset
  preset = presets.BF16_BF16_F32 if dtype == jnp.bfloat16 else presets.F16_F16_F32
  return dict(precision=(preset, preset), logits_dtype=jnp.dtype(jnp.float32),
              logits_scale=options.scale, logits_soft_cap=options.softcap or None, **UNUSED)

