"""A matrix state that decays by channel and is erased along one direction and written along another.

  S_t = diag(w_t) S_{t-1} - p_t^T (c_t S_{t-1}) + k_t^T v_t          o_t = q_t S_t

the rule of RWKV-7, with c the erasing key, p = c * rate and k the writing key; c reads the state as it
was before the decay. In a chunk, b the cumulative log decay up to and with a token, b' up to the token
before, and A_xy = (x_t y_i) decayed from i to t, for i <= t where x is q and i < t where x is c:

  T = (I + A_cp)^-1        W = T e^{b'} c           Y = T A_ck V
  read = e^b q - A_qp W                             out = A_qk V - A_qp Y
  map = e^{b_C} I - (e^{b_C - b} p)^T W             write = (e^{b_C - b} k)^T V - (e^{b_C - b} p)^T Y

A log decay is held at FLOOR, whose exponential is 0.
Source: RWKV-7, arXiv:2503.14456 (its state is the transpose). Held by: tests/test_diagonal_low_rank.py.

B batch  T tokens  H heads  N chunks  C tokens of a chunk  K key dim  V value dim
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from longctx.recurrence import affine, chunks
from longctx.recurrence.affine import product
from longctx.recurrence.delta import FLOOR
from longctx.recurrence.documents import chunk_size, documents, from_chunks, to_chunks
from longctx.recurrence.triangular import decayed_pairs, inverse, sums_around

CHUNKS = {'cpu': 32, '': 64}


class Inputs(NamedTuple):
  """Of each token and head. q, k, v in the compute type."""

  q: jax.Array                        # [B, T, H, K]
  k: jax.Array                        # [B, T, H, K]
  v: jax.Array                        # [B, T, H, V]
  erase: jax.Array                    # [B, T, H, K] c; of length at most 1, else the memory may grow
  rate: jax.Array                     # [B, T, H, K] float32; p = c * rate
  log_decay: jax.Array                # [B, T, H, K] float32, <= 0
  reset_BT: jax.Array | None = None   # True where a document begins
  valid_BT: jax.Array | None = None   # False for padding


@dataclasses.dataclass(frozen=True)
class DiagonalLowRank:
  """The rule in one of its forms; see longctx/parallel/state_scan.py for the methods."""

  form: str = 'chunked'   # sequential: token by token; chunked; scan: chunks joined in log2(N) rounds
  chunk: int = 0          # tokens, a power of two; 0: by platform
  cut: ClassVar[str] = 'heads'

  def prepare(self, inputs: Inputs) -> tuple[Inputs, affine.Chunks | None]:
    if inputs.valid_BT is not None:
      keep = lambda x: jnp.where(inputs.valid_BT[..., None, None], x, 0)
      inputs = inputs._replace(k=keep(inputs.k), rate=keep(inputs.rate),
                               log_decay=keep(inputs.log_decay))
    if self.form == 'sequential' or inputs.q.shape[1] == 1:
      return inputs, None
    return inputs, _chunks(inputs, chunks.choose(self.chunk, CHUNKS))

  def transition(self, prepared) -> affine.Map:
    inputs, by_chunk = prepared
    if by_chunk is not None:
      return affine.transition(by_chunk)
    B, _, H, K = inputs.k.shape   # what the tokens make of the state (I, 0), the values (0, v)
    state = jnp.broadcast_to(jnp.eye(K, K + inputs.v.shape[-1]), (B, H, K, K + inputs.v.shape[-1]))
    v = jnp.concatenate([jnp.zeros_like(inputs.k, inputs.v.dtype), inputs.v], axis=-1)
    _, state = _one_by_one(inputs._replace(v=v), state)
    return affine.Map(state[..., :K], state[..., K:])

  join = staticmethod(affine.join)
  apply = staticmethod(affine.apply)

  def finish(self, prepared, state_BHKV: jax.Array) -> tuple[jax.Array, jax.Array]:
    inputs, by_chunk = prepared
    if by_chunk is None:
      return _one_by_one(inputs, state_BHKV)
    out, state_BHKV = affine.finish(by_chunk, state_BHKV, self.form)
    return from_chunks(out, inputs.q.shape[1]), state_BHKV

  def read(self, inputs: Inputs, states_BSHKV: jax.Array) -> jax.Array:
    """[B, T, S, H, V] float32: what S states that stand still say to each token."""
    return product('bthk,bshkv->btshv', inputs.q, states_BSHKV)


def _one_by_one(inputs: Inputs, state_BHKV: jax.Array) -> tuple[jax.Array, jax.Array]:
  def step(S_BHKV, token):
    q, k, v, erase, rate, log_decay, reset = token
    q, k, values, erase = (x.astype(jnp.float32) for x in (q, k, v, erase))
    if reset is not None:
      S_BHKV = jnp.where(reset[:, None, None, None], 0, S_BHKV)
    old = product('bhk,bhkv->bhv', erase, S_BHKV)
    S_BHKV = (jnp.exp(log_decay)[..., None] * S_BHKV + k[..., None] * values[..., None, :]
              - (rate * erase)[..., None] * old[..., None, :])
    return S_BHKV, product('bhk,bhkv->bhv', q, S_BHKV).astype(v.dtype)

  tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tuple(inputs[:7]))
  state_BHKV, out = jax.lax.scan(step, state_BHKV, tokens)
  return jnp.moveaxis(out, 0, 1), state_BHKV


def _chunks(inputs: Inputs, chunk: int) -> affine.Chunks:
  size = chunk_size(inputs.q.shape[1], chunk)
  q, k, v, erase, rate, log_decay = (to_chunks(x, size) for x in inputs[:6])
  reset = jnp.zeros((*q.shape[:2], 1, size), bool)
  if inputs.reset_BT is not None:
    reset = to_chunks(inputs.reset_BT, size)
  docs, dtype, V = documents(reset), v.dtype, v.shape[-1]
  log_decay = jnp.maximum(log_decay.astype(jnp.float32), FLOOR)
  p = rate * erase
  before, upto, behind = sums_around(log_decay)
  lefts, allowed = jnp.stack([q, erase], axis=-3), docs.pair[..., None, :, :]
  pairs = lambda y: jnp.moveaxis(
      jnp.where(allowed, decayed_pairs(lefts, y, log_decay, (True, False)), 0), -3, 0)
  (A_qp, A_cp), (A_qk, A_ck) = pairs(p), pairs(k)
  every = lambda x, seen: jnp.exp(jnp.where(seen[..., None], x, -jnp.inf))
  times = lambda a, b: product('...ti,...ij->...tj', a, b)
  YW = times(inverse(A_cp), jnp.concatenate(
      [times(A_ck, v.astype(jnp.float32)), erase * every(before, docs.first)], axis=-1))
  out = times(A_qp.astype(dtype), YW.astype(dtype))
  left = every(behind, docs.last)        # at the chunk's end
  turned = product('...ck,...cj->...kj', p * left, YW)
  kept = jnp.where(docs.open[..., None], jnp.exp(upto[..., -1, :]), 0)
  return affine.Chunks(
      read=(q * every(upto, docs.first) - out[..., V:]).astype(dtype),
      out=(times(A_qk.astype(dtype), v) - out[..., :V]).astype(dtype),
      map=jnp.eye(k.shape[-1]) * kept[..., None] - turned[..., V:],
      write=product('...ck,...cv->...kv', k * left, v.astype(jnp.float32)) - turned[..., :V])


def flops(K: int, V: int, form: str, chunk: int) -> float:
  """Of the products for a token and head, forward; 2 a multiply-add."""
  if form == 'sequential':
    return 8.0 * K * V
  C = chunks.choose(chunk, CHUNKS)
  inverted = (C * C - 16) / 3 + 32 if C >= 4 else 2.0 * C * C
  carried = K * K * V / C * (3 + 2 * K / V if form == 'scan' else 1)   # joined twice, then applied
  return 2.0 * (2 * C * K + inverted + 2 * C * (K + V) + 2 * C * V + K * (K + V) + carried + 2 * K * V)
