"""Attention with the relative positions of Transformer-XL, as published.

  score_ij = ((q_i + u) . k_j + (q_i + v) . r_{i - j}) / sqrt(H)     r_n = R_n W
  R_n = [sin(n w_0) .. sin(n w_last), cos(n w_0) .. cos(n w_last)], w_m = 10000^(-2m / D)

Dense: the scores [B, N, C, S] exist at once; segments are short.
Source: Dai et al. 2019, arXiv:1901.02860, section 3.3; kimiyoung/transformer-xl.
Differs: u and v are given with each call, and each layer has its own (models/memories/base.py), as the
official code's --untie_r; its default shares them over the layers. Its --same_length and --clamp_len, with which
the published figures were evaluated, are not there: the last token of a segment sees further back than the first.
Held by: tests/test_relative.py (loops in NumPy).

B batch  C queries  S keys, the last C of them the queries' own tokens  N query heads  K kv heads
H head dim  D model
"""

import jax
import jax.numpy as jnp

from longctx import watch
from longctx.attention.intervals import Intervals, sees

NEG_INF = -1e30   # finite: a query that sees nothing gives 0, not NaN


def distances(count: int, dim: int) -> jax.Array:
  """R_n for n = count - 1 .. 0, float32 [count, dim]."""
  n_S1 = jnp.arange(count - 1, -1, -1, dtype=jnp.float32)[:, None]
  angle = n_S1 * 10_000.0 ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
  return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)[:, :dim]


def shift(x_BNCS: jax.Array) -> jax.Array:
  """Scores of query i with distance S - 1 - n at n -> with key j at j = i + S - C - distance.

  A zero column on the left, the rows read anew one longer, and the first of them dropped.
  """
  B, N, C, S = x_BNCS.shape
  x = jnp.pad(x_BNCS, ((0, 0), (0, 0), (0, 0), (1, 0))).reshape(B, N, S + 1, C)
  return x[:, :, 1:].reshape(B, N, C, S)


def attention(q_BCNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Intervals,
              u_NH: jax.Array, v_NH: jax.Array, w_DNH: jax.Array) -> jax.Array:
  """out_BCNH in q's type; `mask` must be causal: distances below 0 do not exist."""
  N, H = q_BCNH.shape[2:]
  S, K = k_BSKH.shape[1:3]
  r_SNH = jnp.einsum('sd,dnh->snh', distances(S, w_DNH.shape[0]), w_DNH)
  heads = lambda x: jnp.repeat(x, N // K, axis=2).astype(jnp.float32)
  q = q_BCNH.astype(jnp.float32)
  scores = jnp.einsum('bcnh,bsnh->bncs', q + u_NH, heads(k_BSKH))
  scores += shift(jnp.einsum('bcnh,snh->bncs', q + v_NH, r_SNH))
  seen = sees(mask)[:, None]
  scores = jnp.where(seen, scores * H ** -0.5, NEG_INF)
  weights = jnp.where(seen, jnp.exp(scores - scores.max(-1, keepdims=True)), 0.0)
  total = weights.sum(-1, keepdims=True)
  weights /= jnp.where(total > 0, total, 1.0)
  watch.tell('weights', weights_BNCS=weights, mask=mask)
  return jnp.einsum('bncs,bsnh->bcnh', weights, heads(v_BSKH)).astype(q_BCNH.dtype)
