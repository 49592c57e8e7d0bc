"""Attention by cuDNN's fused kernel, for NVIDIA GPUs: causal masks, windows, full hops.

jax.nn.dot_product_attention rounds the lse to q's type and gives it no gradient, which a ring
cannot use; the primitives beneath it return it in float32, and their backward pass takes (out, lse)
from outside, so they may be those over more keys than these. The primitives are private to jax,
hence `cannot` looks at their arguments first.

Source: jax._src.cudnn.fused_attention_stablehlo, jax 0.10.
lse: natural base, float32, [B, N, T] in the primitives. out and the gradients in q's type.
Held by: tests/test_attention_kernels.py (lowered for CUDA from a CPU; values with the primitives
replaced by what they are documented to compute; the same tests run the true ones on a GPU).
Unverified on hardware: everything but the lowering; first of all the window's left edge (documented
as t - window < s <= t) and the base of the lse.

B batch  T queries  S keys  N query heads  K kv heads  H head dim
"""

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as primitives

from longctx.attention import kernel_checks
from longctx.attention.intervals import Intervals, Options

LSE_GRADIENT = False   # its backward pass makes delta itself
KNOWS_KINDS = True    # it needs the mask's kind; a ring's hops have none
HOPPER = 9.0
ARRAYS = ('query', 'key', 'value', 'bias', 'q_seqlen', 'kv_seqlen', 'q_offsets', 'kv_offsets',
          'page_table_k', 'page_table_v')
STATIC = ('scale', 'seed', 'dropout_rate', 'variadic_args', 'mask_type', 'layout',
          'sliding_window_length')
FORWARD = (*ARRAYS, *STATIC, 'is_training')
BACKWARD = (*ARRAYS, 'activation', 'fwd_output', 'grad_output', *STATIC)


def cannot(q_BTNH, k_BSKH, v_BSKH, mask: Intervals, options: Options) -> str:
  """'' when cuDNN serves the call; else the sentence why not."""
  refusal = (
      kernel_checks.cannot_call(primitives._dot_product_attention_fwd_impl, FORWARD)
      or kernel_checks.cannot_call(primitives._dot_product_attention_bwd_impl, BACKWARD)
      or kernel_checks.cannot_shape(q_BTNH, k_BSKH, v_BSKH, mask)
      or kernel_checks.cannot_score(mask, options, softcap=False,
                                    kinds=('causal', 'full')))
  if refusal:
    return refusal
  if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
    return f'serves bfloat16 and float16, not {q_BTNH.dtype}'
  head_dim, capability = q_BTNH.shape[-1], kernel_checks.capability()
  if head_dim % 8 or head_dim > 256:
    return f'a head dim of {head_dim} must be a multiple of 8 up to 256'
  if head_dim > 128 and 0 < capability < HOPPER:
    return (f'a head dim of {head_dim} above 128 needs a GPU of compute capability '
            f'{HOPPER} or later, not {capability}')
  if capability and primitives.cuda_versions is None:
    return 'this jax finds no cuDNN (install jax[cuda13])'
  return ''


def forward(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Intervals,
            options: Options) -> tuple[jax.Array, jax.Array]:
  """(out_BTNH in q's type, lse_BTN float32 natural base)."""
  kernel_checks.demand('cudnn', cannot(q_BTNH, k_BSKH, v_BSKH, mask, options))
  out_BTNH, lse_BNT = primitives._dot_product_attention_fwd_p_wrapper.bind(
      q_BTNH, k_BSKH, v_BSKH, *_unused(q_BTNH.dtype), **_static(mask, options), is_training=True)
  return out_BTNH, lse_BNT.swapaxes(1, 2)


def backward(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Intervals,
             options: Options, out_BTNH: jax.Array, lse_BTN: jax.Array, dout_BTNH: jax.Array,
             dlse_BTN: None = None) -> tuple[jax.Array, jax.Array, jax.Array, None]:
  """(dq, dk, dv, None), with probabilities exp(score - lse) and delta = rowsum(out * dout)."""
  if dlse_BTN is not None:
    raise NotImplementedError('cudnn: no gradient through lse; call attention(), which returns none')
  kernel_checks.demand('cudnn', cannot(q_BTNH, k_BSKH, v_BSKH, mask, options))
  dtype = q_BTNH.dtype
  dq_BTNH, dk_BSKH, dv_BSKH = primitives._dot_product_attention_bwd_p_wrapper.bind(
      q_BTNH, k_BSKH, v_BSKH, *_unused(dtype), lse_BTN.swapaxes(1, 2), out_BTNH.astype(dtype),
      dout_BTNH.astype(dtype), **_static(mask, options))
  return dq_BTNH, dk_BSKH, dv_BSKH, None


def _static(mask: Intervals, options: Options) -> dict:
  types = primitives.MaskType
  return dict(scale=options.scale, seed=0, dropout_rate=0.0, variadic_args=(False, False),
              mask_type=types.NO_MASK if mask.kind == 'full' else types.CAUSAL,
              layout=primitives.AttentionLayout.BTNH.value,
              sliding_window_length=mask.reach or None)


def _unused(dtype) -> list[jax.Array]:
  """Empty arrays for the bias, the lengths, the offsets and the page tables."""
  return [jnp.zeros(0, dtype)] + [jnp.zeros(0, jnp.int32)] * 6

