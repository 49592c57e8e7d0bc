"""What the adapters of foreign kernels ask before they serve: sentences that say why not.

Held by: tests/test_attention_kernels.py (every sentence).

B batch  T queries  S keys  N query heads  K kv heads  H head dim
"""

import inspect
from collections.abc import Callable

import jax

from longctx.attention.intervals import Intervals, Options


def cannot_call(function: Callable, expected: tuple[str, ...]) -> str:
  """Whether `function`, which is private to its library, still takes these arguments."""
  found = tuple(inspect.signature(function).parameters)
  if found == expected:
    return ''
  return (f'jax {jax.__version__} calls {function.__name__} with '
          f'({", ".join(found)}); this adapter knows ({", ".join(expected)})')


def cannot_shape(q_BTNH, k_BSKH, v_BSKH, mask: Intervals) -> str:
  """Whether the arrays belong together as `mask.kind` says."""
  if q_BTNH.ndim != 4 or k_BSKH.shape != v_BSKH.shape or k_BSKH.ndim != 4:
    return (f'q {q_BTNH.shape}, k {k_BSKH.shape} and v {v_BSKH.shape} must be '
            '[B, T, N, H], [B, S, K, H] and [B, S, K, H]')
  (B, T, N, H), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
  if k_BSKH.shape != (B, S, K, H):
    return f'q {q_BTNH.shape} and k {k_BSKH.shape} differ in rows or head dim'
  if N % K:
    return f'{N} query heads must be a multiple of {K} kv heads'
  if not q_BTNH.dtype == k_BSKH.dtype == v_BSKH.dtype:
    return (f'q, k and v are {q_BTNH.dtype}, {k_BSKH.dtype} and {v_BSKH.dtype}; '
            'it needs one type for the three')
  if mask.kind in ('causal', 'ordered') and T != S:
    return f'a mask of kind {mask.kind} needs as many keys as queries, not {S} and {T}'
  return ''


def cannot_score(mask: Intervals, options: Options, *, kinds: tuple[str, ...],
                 softcap: bool) -> str:
  """Whether the kernel knows this kind of mask and this way to make a score."""
  if mask.has_sinks:
    return 'the mask has sinks; its kernel takes one range of keys a query'
  if mask.kind not in kinds:
    return f'serves masks of kind {" or ".join(kinds)}, not {mask.kind}'
  if options.bias is not None:
    return 'cannot add a bias block by block'
  if options.softcap and not softcap:
    return f'its kernel has no soft cap (softcap={options.softcap:g})'
  return ''


def demand(name: str, refusal: str) -> None:
  """NotImplementedError where an adapter is called with what it cannot serve."""
  if refusal:
    raise NotImplementedError(f'{name}: {refusal}')


def capability() -> float:
  """Compute capability of the first GPU (9.0 is Hopper); 0.0 where there is none to ask."""
  if jax.default_backend() != 'gpu':
    return 0.0
  return float(jax.local_devices(backend='gpu')[0].compute_capability)
