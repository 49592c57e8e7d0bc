"""Attention in tiles of queries x keys: memory grows with T, and tiles that nobody sees cost nothing.

Each query block walks the key blocks it needs with the online softmax; the backward pass makes
each tile's probabilities again from (out, lse). Which tiles are needed is read from the intervals
(`Plan`), so causal masks, packed documents, windows and padding are one case; a tile that all its
queries see whole skips the mask.

Sources: Rabe & Staats 2021, arXiv:2112.05682; FlashAttention, Dao et al. 2022, arXiv:2205.14135
(the backward pass from lse and delta = sum(out * dout)).
Held by: tests/test_attention.py.

B batch  T queries  S keys  N query heads  K kv heads  G = N / K  H head dim
I query blocks  J key blocks  P queries of a block  R keys of a block  M = G P rows of a tile
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

NEG_INF = -1e30   # finite: a row that sees nothing gives 0, not NaN
BLOCK = 128       # queries and keys of a tile: its scores and probabilities stay in a core's cache
NEVER = np.iinfo(np.int32).max   # index of a key that pads a block: no interval holds it


class Plan(NamedTuple):
  """The tiles to compute. `inner` lists those seen whole, `edge` those that need the mask."""

  inner_BIJ: jax.Array         # int32: key blocks, the needed ones first
  inner_count_BI: jax.Array
  edge_BIJ: jax.Array
  edge_count_BI: jax.Array


def make_plan(start_BIP: jax.Array, end_BIP: jax.Array, index_BJR: jax.Array) -> Plan:
  """Compares each query block's intervals with each key block's indices; never [T, S]."""
  real_BIP = start_BIP < end_BIP
  first_BI = jnp.where(real_BIP, start_BIP, NEVER).min(-1)   # first key that anybody sees
  last_BI = jnp.where(real_BIP, end_BIP, -NEVER).max(-1)
  low_BJ, high_BJ = index_BJR.min(-1), index_BJR.max(-1)
  needed_BIJ = (low_BJ[:, None] < last_BI[..., None]) & (first_BI[..., None] <= high_BJ[:, None])
  whole_BIJ = ((start_BIP.max(-1)[..., None] <= low_BJ[:, None])
               & (high_BJ[:, None] < end_BIP.min(-1)[..., None]))
  listed = lambda which: (jnp.argsort(~which, axis=-1, stable=True).astype(jnp.int32),
                          which.sum(-1, dtype=jnp.int32))
  return Plan(*listed(whole_BIJ), *listed(needed_BIJ & ~whole_BIJ))


def causal_plan(batch: int, blocks: int) -> Plan:
  """The plan of one causal document with as many queries as keys: known without looking."""
  column = np.arange(blocks, dtype=np.int32)
  rows = lambda x: jnp.broadcast_to(jnp.asarray(x, jnp.int32), (batch, *x.shape))
  return Plan(rows(np.tile(column, (blocks, 1))), rows(column),
              rows(np.tile(column[:, None], (1, blocks))), rows(np.ones(blocks, np.int32)))


def attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, start_BT: jax.Array,
           end_BT: jax.Array, k_index_BS: jax.Array | None = None, *, scale: float,
           causal: bool = False, whole: bool = False, block: int = BLOCK
           ) -> tuple[jax.Array, jax.Array]:
  """(out_BTNH in q's type, lse_BTN float32 in natural base); softmax and sums in float32.

  Query t of row b sees key s iff start_BT[b, t] <= k_index_BS[b, s] < end_BT[b, t]; one that sees
  nothing gives out 0, lse -1e30 and gradient 0. `causal` and `whole` as in `attention.attend`.
  Differentiable in q, k and v, through out and through lse.
  """
  B, T, N, H = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  G = N // K
  if k_index_BS is None:
    k_index_BS = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
  P = min(block, T)
  R = P if causal else min(block, S)
  q_BTKGH = _cut(q_BTNH, P).reshape(B, -1, P, K, G, H)
  q_BKIMH = q_BTKGH.transpose(0, 3, 1, 4, 2, 5).reshape(B, K, -1, G * P, H)
  k_BKJRH, v_BKJRH = (_cut(x, R).transpose(0, 3, 1, 2, 4) for x in (k_BSKH, v_BSKH))
  start_BIP, end_BIP = _cut(start_BT, P), _cut(end_BT, P)
  index_BJR = _cut(k_index_BS, R, NEVER)
  plan = (causal_plan(B, q_BKIMH.shape[2]) if causal and whole
          else make_plan(start_BIP, end_BIP, index_BJR))
  out_BKIMH, lse_BKIM = _attention(scale, q_BKIMH, k_BKJRH, v_BKJRH,
                                   (start_BIP, end_BIP, index_BJR, plan))

  def rows(x_BKIM):
    x_BIPKG = x_BKIM.reshape(B, K, -1, G, P, *x_BKIM.shape[4:])
    x_BIPKG = jnp.moveaxis(x_BIPKG, (2, 4), (1, 2))
    return x_BIPKG.reshape(B, -1, N, *x_BKIM.shape[4:])[:, :T]

  return rows(out_BKIMH), rows(lse_BKIM)


def _cut(x: jax.Array, size: int, fill: int = 0) -> jax.Array:
  """[B, T, ...] to [B, blocks, size, ...], filled up at the end."""
  pad = [(0, 0)] * x.ndim
  pad[1] = (0, -x.shape[1] % size)
  x = jnp.pad(x, pad, constant_values=fill)
  return x.reshape(x.shape[0], -1, size, *x.shape[2:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(scale, q_BKIMH, k_BKJRH, v_BKJRH, mask):
  """(out, lse) of every row and kv head. `mask`: (start_BIP, end_BIP, index_BJR, Plan)."""
  return _every_head(functools.partial(_head_forward, scale), (q_BKIMH, k_BKJRH, v_BKJRH), mask)


def _forward(scale, q_BKIMH, k_BKJRH, v_BKJRH, mask):
  out_BKIMH, lse_BKIM = _attention(scale, q_BKIMH, k_BKJRH, v_BKJRH, mask)
  return (out_BKIMH, lse_BKIM), (q_BKIMH, k_BKJRH, v_BKJRH, mask, out_BKIMH, lse_BKIM)


def _backward(scale, residuals, cotangents):
  q_BKIMH, k_BKJRH, v_BKJRH, mask, out_BKIMH, lse_BKIM = residuals
  dout_BKIMH, dlse_BKIM = cotangents
  delta_BKIM = jnp.einsum('BKIMH,BKIMH->BKIM', out_BKIMH.astype(jnp.float32),
                          dout_BKIMH.astype(jnp.float32)) - dlse_BKIM
  # A row that saw nothing has p = exp(-1e30 - lse): its lse becomes +1e30, so that p is 0.
  lse_BKIM = jnp.where(lse_BKIM > NEG_INF / 2, lse_BKIM, -NEG_INF)
  dq, dk, dv = _every_head(functools.partial(_head_backward, scale),
                           (q_BKIMH, k_BKJRH, v_BKJRH, dout_BKIMH, lse_BKIM, delta_BKIM), mask)
  return dq, dk, dv, None


_attention.defvjp(_forward, _backward)


def _every_head(function, arrays_BK, mask):
  """Applies `function(arrays, mask)` of one row and kv head to all of them.

  A CPU takes them in turn: the tiles of one head stay in cache, and a product of two matrices is
  fast there where a batch of small products is not. Other devices take them at once.
  """
  B, K = arrays_BK[0].shape[:2]

  def in_turn(arrays_BK, mask):
    flat = jax.tree.map(lambda x: x.reshape(B * K, *x.shape[2:]), arrays_BK)
    row = lambda i: jax.tree.map(lambda x: x[i // K], mask)
    out = jax.lax.map(lambda x: function(x[1], row(x[0])), (jnp.arange(B * K), flat))
    return jax.tree.map(lambda x: x.reshape(B, K, *x.shape[1:]), out)

  at_once = jax.vmap(jax.vmap(function, (0, None)), (0, 0))
  return jax.lax.platform_dependent(arrays_BK, mask, cpu=in_turn, default=at_once)


def _tiles(plan, i, body, carry):
  """body(j, masked, carry) for each key block j that query block i needs."""
  inner_IJ, inner_count_I, edge_IJ, edge_count_I = plan
  inner = lambda n, carry: body(inner_IJ[i, n], False, carry)
  edge = lambda n, carry: body(edge_IJ[i, n], True, carry)
  carry = jax.lax.fori_loop(0, inner_count_I[i], inner, carry)
  return jax.lax.fori_loop(0, edge_count_I[i], edge, carry)


def _scores(scale, q_MH, k_RH, masked, start_P, end_P, index_R):
  scores_MR = scale * jnp.einsum('MH,RH->MR', q_MH, k_RH, preferred_element_type=jnp.float32)
  if not masked:
    return scores_MR
  sees_PR = (start_P[:, None] <= index_R) & (index_R < end_P[:, None])
  P, R = sees_PR.shape
  return jnp.where(sees_PR, scores_MR.reshape(-1, P, R), NEG_INF).reshape(-1, R)


def _head_forward(scale, arrays, mask):
  q_IMH, k_JRH, v_JRH = arrays
  start_IP, end_IP, index_JR, plan = mask
  _, M, H = q_IMH.shape

  def query_block(i):
    def tile(j, masked, carry):
      max_M, sum_M, acc_MH = carry
      scores_MR = _scores(scale, q_IMH[i], k_JRH[j], masked, start_IP[i], end_IP[i], index_JR[j])
      new_max_M = jnp.maximum(max_M, scores_MR.max(-1))
      # Rows that have seen nothing yet gather exp(0) here; the first key they see weighs it away.
      p_MR = jnp.exp(scores_MR - new_max_M[:, None])
      shrink_M = jnp.exp(max_M - new_max_M)
      part_MH = jnp.einsum('MR,RH->MH', p_MR.astype(v_JRH.dtype), v_JRH[j],
                           preferred_element_type=jnp.float32)
      return (new_max_M, sum_M * shrink_M + p_MR.sum(-1), acc_MH * shrink_M[:, None] + part_MH)

    zeros_M = jnp.zeros(M, jnp.float32)
    max_M, sum_M, acc_MH = _tiles(plan, i, tile,
                                  (zeros_M + NEG_INF, zeros_M, jnp.zeros((M, H), jnp.float32)))
    some_M = max_M > NEG_INF / 2
    safe_M = jnp.where(some_M, sum_M, 1.0)
    out_MH = jnp.where(some_M[:, None], acc_MH / safe_M[:, None], 0.0)
    return out_MH.astype(q_IMH.dtype), jnp.where(some_M, max_M + jnp.log(safe_M), NEG_INF)

  return jax.lax.map(query_block, jnp.arange(q_IMH.shape[0]))


def _head_backward(scale, arrays, mask):
  q_IMH, k_JRH, v_JRH, dout_IMH, lse_IM, delta_IM = arrays
  start_IP, end_IP, index_JR, plan = mask
  J, R, H = k_JRH.shape

  def query_block(carry, i):
    q_MH, dout_MH = q_IMH[i], dout_IMH[i]

    def tile(j, masked, carry):
      dq_MH, dk_JHR, dv_JHR = carry
      scores_MR = _scores(scale, q_MH, k_JRH[j], masked, start_IP[i], end_IP[i], index_JR[j])
      p_MR = jnp.exp(scores_MR - lse_IM[i][:, None])
      dp_MR = jnp.einsum('MH,RH->MR', dout_MH, v_JRH[j], preferred_element_type=jnp.float32)
      ds_MR = (p_MR * (dp_MR - delta_IM[i][:, None])).astype(q_MH.dtype)
      dq_MH += jnp.einsum('MR,RH->MH', ds_MR, k_JRH[j], preferred_element_type=jnp.float32)
      # [H, R] and not [R, H]: a CPU then transposes the thin operand and not the tile (2x faster).
      dk_HR = jnp.einsum('MH,MR->HR', q_MH, ds_MR, preferred_element_type=jnp.float32)
      dv_HR = jnp.einsum('MH,MR->HR', dout_MH, p_MR.astype(dout_MH.dtype),
                         preferred_element_type=jnp.float32)
      return dq_MH, dk_JHR.at[j].add(dk_HR), dv_JHR.at[j].add(dv_HR)

    zeros_MH = jnp.zeros(q_MH.shape, jnp.float32)
    dq_MH, dk_JHR, dv_JHR = _tiles(plan, i, tile, (zeros_MH, *carry))
    return (dk_JHR, dv_JHR), (scale * dq_MH).astype(q_IMH.dtype)

  zeros_JHR = jnp.zeros((J, H, R), jnp.float32)
  (dk_JHR, dv_JHR), dq_IMH = jax.lax.scan(query_block, (zeros_JHR, zeros_JHR),
                                          jnp.arange(q_IMH.shape[0]))
  dk_JRH = (scale * dk_JHR).swapaxes(1, 2).astype(k_JRH.dtype)
  return dq_IMH, dk_JRH, dv_JHR.swapaxes(1, 2).astype(v_JRH.dtype)
