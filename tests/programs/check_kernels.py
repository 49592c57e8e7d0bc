"""The adapters of foreign attention kernels against the float64 loops, on the hardware they are for.

    python -m tests.programs.check_kernels cudnn mosaic_gpu     # on an NVIDIA GPU, Hopper or later
    python -m tests.programs.check_kernels splash               # on a TPU

Prints, for each mask and array, the largest error over the array's largest entry. Exit status 1
where one is above LIMITS, or a kernel refuses a mask that it should serve.
"""

import functools
import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from longctx.attention import intervals
from longctx.attention.intervals import Intervals, Options
from tests import oracles

LIMITS = {'bfloat16': 2e-2, 'float16': 4e-3, 'float32': 5e-6}   # rounded inputs, outputs, products
SERVED = {'splash': ('causal', 'full', 'packed', 'window', 'packed window', 'padding', 'any order'),
          'cudnn': ('causal', 'full', 'one window'),
          'mosaic_gpu': ('causal', 'full', 'packed', 'window', 'packed window', 'padding',
                         'any order')}


def make_mask(case: str, T: int, S: int) -> Intervals:
  """Two rows of T queries and S keys (S counts for 'full' and 'any order' alone)."""
  r = np.random.RandomState(3)
  segments_BT = jnp.asarray(np.sort(r.randint(0, 4, (2, T)), axis=1), jnp.int32)
  window = max(1, T // 5)
  match case:
    case 'causal':
      return intervals.causal(2, T)
    case 'full':
      return intervals.bidirectional(2, T, S)
    case 'packed':
      return intervals.packed(segments_BT)
    case 'window':
      return intervals.sliding_window(2, T, window)
    case 'one window':   # known to be one document
      index_BT = intervals.causal(2, T).index_BT
      return Intervals(start_BT=jnp.maximum(index_BT + 1 - window, 0), end_BT=index_BT + 1,
                       index_BT=index_BT, kind='causal', reach=window)
    case 'packed window':
      return intervals.intersect(intervals.packed(segments_BT),
                                 intervals.sliding_window(2, T, window))
    case 'padding':
      return intervals.padding(jnp.arange(T)[None] < jnp.asarray([[T], [T // 3]]))
    case 'any order':   # as in a ring: keys in any order, queries that see nothing
      start_BT = jnp.asarray(r.randint(0, S, (2, T)), jnp.int32)
      index_BS = jnp.asarray([r.permutation(S) for _ in range(2)], jnp.int32)
      return Intervals(start_BT=start_BT, end_BT=start_BT + r.randint(-3, S // 2, (2, T)),
                       index_BT=intervals.causal(2, T).index_BT,
                       key_index_BS=index_BS.at[1, S - 3:].set(-1))
  raise ValueError(case)


def draw(T: int, S: int, heads: tuple[int, int], head_dim: int, dtype) -> list[jax.Array]:
  """q, k, v and dout, rounded to their type."""
  r, (N, K) = np.random.RandomState(0), heads
  return [jnp.asarray(r.normal(size=(2, length, n, head_dim)), dtype)
          for length, n in ((T, N), (S, K), (S, K), (T, N))]


def error(found, expected) -> float:
  """Largest difference over the largest entry; infinite where there is a NaN."""
  found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
  difference = np.abs(found - expected).max() / max(1.0, np.abs(expected).max())
  return float(np.where(np.isnan(difference), np.inf, difference))


def compare(kernel, mask: Intervals, arrays: list[jax.Array], options: Options, **keywords) -> dict:
  """Errors of out, lse, dq, dk, dv of one call against the loops."""
  q, k, v, dout = arrays
  out, lse = jax.jit(functools.partial(kernel.forward, options=options, **keywords))(q, k, v, mask)
  sees = oracles.interval_mask(*(np.asarray(x) for x in (mask.start_BT, mask.end_BT, mask.keys_BS)))
  wide = [np.asarray(x, np.float64) for x in (q, k, v)]
  true_out, true_lse = oracles.masked_attention(*wide, sees, options.scale, options.softcap)
  some = np.isfinite(true_lse)
  errors = dict(out=error(out, true_out), lse=error(np.where(some, lse, 0), np.where(some, true_lse, 0)),
                empty=error(np.where(some, 0, lse), np.where(some, 0, np.float32(-1e30))))
  dlse = np.random.RandomState(1).normal(size=lse.shape) * kernel.LSE_GRADIENT
  given = (jnp.asarray(dlse, jnp.float32),) if kernel.LSE_GRADIENT else ()
  grads = _backward(kernel, options, keywords)(q, k, v, mask, out, lse, dout, *given)
  true = oracles.masked_gradients(*wide, sees, options.scale, np.asarray(dout, np.float64), dlse,
                                  options.softcap)
  return errors | {f'd{n}': error(x, y) for n, x, y in zip('qkv', grads, true)}


def compare_parts(kernel, before: int, arrays: list[jax.Array], options: Options, **keywords) -> dict:
  """Keys in two parts: `before` that all see, and the queries' own, causal. A ring's two hops.

  Both backward passes get the merged (out, lse); their gradients must be the whole's.
  """
  q, k, v, dout = arrays
  T, S = q.shape[1], k.shape[1]
  masks = [intervals.bidirectional(2, T, before), intervals.causal(2, T)]
  parts = [(k[:, :before], v[:, :before]), (k[:, before:], v[:, before:])]
  forward = jax.jit(functools.partial(kernel.forward, options=options, **keywords))
  (out_a, lse_a), (out_b, lse_b) = (forward(q, *kv, m) for kv, m in zip(parts, masks))
  lse = jnp.logaddexp(lse_a, lse_b)
  out = (out_a.astype(jnp.float32) * jnp.exp(lse_a - lse)[..., None]
         + out_b.astype(jnp.float32) * jnp.exp(lse_b - lse)[..., None])
  backward = _backward(kernel, options, keywords)
  (dq_a, dk_a, dv_a), (dq_b, dk_b, dv_b) = (
      backward(q, *kv, m, out, lse, dout) for kv, m in zip(parts, masks))
  join = lambda a, b: np.concatenate([np.asarray(a, np.float64), np.asarray(b, np.float64)], axis=1)
  sees = np.broadcast_to(np.tril(np.ones((T, S), bool), before), (2, T, S))
  wide = [np.asarray(x, np.float64) for x in (q, k, v)]
  true_out, true_lse = oracles.masked_attention(*wide, sees, options.scale)
  true = oracles.masked_gradients(*wide, sees, options.scale, np.asarray(dout, np.float64),
                                  np.zeros(lse.shape))
  found = (np.asarray(dq_a, np.float64) + np.asarray(dq_b, np.float64), join(dk_a, dk_b),
           join(dv_a, dv_b))
  return dict(out=error(out, true_out), lse=error(lse, true_lse)) | {
      f'd{n}': error(x, y) for n, x, y in zip('qkv', found, true)}


def _backward(kernel, options, keywords):
  return jax.jit(lambda q, k, v, mask, *rest: kernel.backward(
      q, k, v, mask, options, *rest, **keywords)[:3])


def check(kernel, case: str, head_dim: int, dtype: str) -> dict:
  """Errors of one case, or {refusal: infinity}."""
  T, S = 200, 233 if case in ('full', 'any order') else 200
  options = Options(scale=head_dim ** -0.5)
  if case == 'two parts':
    return compare_parts(kernel, 130, draw(T, S + 130, (2, 1), head_dim, dtype), options)
  arrays, mask = draw(T, S, (2, 1), head_dim, dtype), make_mask(case, T, S)
  refusal = kernel.cannot(*arrays[:3], mask, options)
  return {refusal: np.inf} if refusal else compare(kernel, mask, arrays, options)


def main(names: list[str]) -> int:
  wrong = 0
  for name in names:
    kernel = importlib.import_module(f'longctx.attention.{name}')
    other = 'float32' if name == 'splash' else 'float16'
    for case in (*SERVED[name], 'two parts'):
      for dtype, head_dim in (('bfloat16', 128), ('bfloat16', 256), (other, 64)):
        errors = check(kernel, case, head_dim, dtype)
        bad = max(errors.values()) > LIMITS[dtype]
        wrong += bad
        print(f'{name:11} {case:14} {dtype:9} head dim {head_dim:3} '
              + '  '.join(f'{key} {value:.1e}' for key, value in errors.items())
              + ('   WRONG' if bad else ''), flush=True)
  return 1 if wrong else 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
