"""The delta rule, plain, gated and with a decay for each channel: write what the memory gets wrong.

  S_t = a_t S_{t-1} + beta_t k_t^T (v_t - k_t a_t S_{t-1})        o_t = q_t S_t

a_t in [0, 1] is 1 (DeltaNet), a number a head (Gated DeltaNet) or one for each key channel (KDA);
beta_t in [0, 2] is held to 2 / |k_t|^2 where rounding has made a key longer than 1.
In a chunk, with b the cumulative log decay and G_ti = exp(b_t - b_i) for i <= t:

  T = (I + tril(beta K K^T * G, -1))^-1    U = T beta V    W = T beta e^b K
  read = e^b Q - A W    out = A U    A = tril(Q K^T * G)
  map = e^{b_C} I - (e^{b_C - b} K)^T W    write = (e^{b_C - b} K)^T U

A token whose decay is 0 begins a new document for its head; a pair of tokens of different documents
is masked before the exponential, and only the first document sees the state before the chunk.
A channel's log decay is held at FLOOR, whose exponential is 0.
Sources: DeltaNet arXiv:2406.06484, Gated DeltaNet arXiv:2412.06464, KDA arXiv:2510.26692, beta in (0, 2)
arXiv:2411.12537. Held by: tests/test_delta.py.

B batch  T tokens  H heads  N chunks  C tokens of a chunk  K key dim  V value dim  A 1 or K
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from longctx.recurrence import affine, chunks
from longctx.recurrence.affine import product
from longctx.recurrence.documents import (
    Documents,
    chunk_size,
    documents,
    from_chunks,
    to_chunks,
)
from longctx.recurrence.triangular import between, decayed_pairs, inverse, sums_around

CHUNKS = {'cpu': 32, '': 64}
CHANNEL_CHUNKS = {'cpu': 32, '': 64}   # where decays have channels
FLOOR = -88.0   # exp of it is below the smallest normal float32


class Inputs(NamedTuple):
  """Of each token and head. q, k, v in the compute type; q already scaled."""

  q: jax.Array                      # [B, T, H, K]
  k: jax.Array                      # [B, T, H, K]; of length at most 1, but for rounding
  v: jax.Array                      # [B, T, H, V]
  beta: jax.Array                   # [B, T, H] float32
  log_decay: jax.Array | None       # [B, T, H] or [B, T, H, K] float32, <= 0; None: no decay
  reset_BT: jax.Array | None = None   # True where a document begins: the state before it is dropped
  valid_BT: jax.Array | None = None   # False: padding, changes nothing


@dataclasses.dataclass(frozen=True)
class Delta:
  """The delta rule in one of its forms; see longctx/parallel/state_scan.py for the methods."""

  form: str = 'chunked'   # sequential: token by token; chunked; scan: chunks joined in log2(N) rounds
  chunk: int = 0             # tokens, a power of two; 0: by platform
  cut: ClassVar[str] = 'heads'

  def prepare(self, inputs: Inputs) -> tuple[Inputs, affine.Chunks | None]:
    inputs = inputs._replace(log_decay=_log_decay(inputs), beta=_bounded(inputs.beta, inputs.k))
    if inputs.valid_BT is not None:
      inputs = inputs._replace(beta=jnp.where(inputs.valid_BT[..., None], inputs.beta, 0))
    one_by_one = self.form == 'sequential' or inputs.q.shape[1] == 1
    if one_by_one:
      return inputs, None
    by_platform = CHUNKS if inputs.log_decay.shape[-1] == 1 else CHANNEL_CHUNKS
    return inputs, _chunks(inputs, chunks.choose(self.chunk, by_platform))

  def transition(self, prepared) -> affine.Map:
    inputs, by_chunk = prepared
    if by_chunk is not None:
      return affine.transition(by_chunk)
    return affine.Map(*_map_of_tokens(inputs))

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


def _bounded(beta: jax.Array, k: jax.Array) -> jax.Array:
  """beta at most 2 / |k|^2 where |k| > 1: I - beta k^T k then stretches nothing that lies along k.

  In bfloat16 |k|^2 of a key of length 1 is up to 4e-3 more, and with beta = 2 a memory that forgets
  nothing would grow by twice as much with each token. The gradient is that of the beta given: a
  key's rounding is no reason for another.
  """
  beta, length = beta.astype(jnp.float32), jnp.sum(jnp.square(k.astype(jnp.float32)), axis=-1)
  most = 2 / jnp.maximum(length, 1)
  return beta - jax.lax.stop_gradient(jnp.maximum(beta - most, 0))


def _log_decay(inputs: Inputs) -> jax.Array:
  """[B, T, H, A] float32, 0 for padding."""
  if inputs.log_decay is None:
    return jnp.zeros((*inputs.beta.shape, 1), jnp.float32)
  log_decay = inputs.log_decay.astype(jnp.float32)
  if log_decay.ndim == 3:
    log_decay = log_decay[..., None]
  if inputs.valid_BT is None:
    return log_decay
  return jnp.where(inputs.valid_BT[..., None, None], log_decay, 0)


def _one_by_one(inputs: Inputs, state_BHKV: jax.Array) -> tuple[jax.Array, jax.Array]:
  def step(S_BHKV, token):
    q, k, v, beta, log_decay, reset = token
    if reset is not None:
      S_BHKV = jnp.where(reset[:, None, None, None], 0, S_BHKV)
    S_BHKV = S_BHKV * jnp.exp(log_decay)[..., None]
    error = v.astype(jnp.float32) - product('bhk,bhkv->bhv', k.astype(jnp.float32), S_BHKV)
    S_BHKV += k[..., None] * (beta[..., None] * error)[..., None, :]
    return S_BHKV, product('bhk,bhkv->bhv', q.astype(jnp.float32), S_BHKV).astype(v.dtype)

  tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tuple(inputs[:6]))
  state_BHKV, out = jax.lax.scan(step, state_BHKV, tokens)
  return jnp.moveaxis(out, 0, 1), state_BHKV


def _map_of_tokens(inputs: Inputs) -> tuple[jax.Array, jax.Array]:
  """(map, write): what the tokens make of the state (I, 0), the values beside (0, v)."""
  K = inputs.k.shape[-1]
  eye = jnp.broadcast_to(jnp.eye(K), (*inputs.k.shape[:1], inputs.k.shape[2], K, K))
  empty = jnp.zeros((*eye.shape[:3], inputs.v.shape[-1]))
  v = jnp.concatenate([jnp.zeros_like(inputs.k, inputs.v.dtype), inputs.v], axis=-1)
  _, state = _one_by_one(inputs._replace(v=v), jnp.concatenate([eye, empty], axis=-1))
  return state[..., :K], state[..., K:]


def _chunks(inputs: Inputs, chunk: int) -> affine.Chunks:
  size = chunk_size(inputs.q.shape[1], chunk)
  q, k, v, beta, log_decay = (to_chunks(x, size) for x in inputs[:5])
  reset = jnp.zeros((*q.shape[:2], 1, size), bool)
  if inputs.reset_BT is not None:
    reset = to_chunks(inputs.reset_BT, size)
  if log_decay.shape[-1] == 1:   # a decay of 0 drops the state of its head
    dropped = log_decay <= FLOOR
    reset = reset | dropped[..., 0]
    log_decay = jnp.where(dropped, 0, log_decay)
  else:
    log_decay = jnp.maximum(log_decay, FLOOR)
  docs, dtype = documents(reset), v.dtype
  _, b, behind = sums_around(log_decay)                                  # [N, B, H, C, A]
  pairs = _pairs(q, k, log_decay, docs)
  A, L = pairs[..., :size, :], pairs[..., size:, :]
  beta = beta[..., None]
  T = inverse(jnp.where(jnp.tri(size, k=-1, dtype=bool), beta * L, 0))
  seen = jnp.exp(jnp.where(docs.first[..., None], b, -jnp.inf))          # of the state before
  left = jnp.exp(jnp.where(docs.last[..., None], behind, -jnp.inf))      # at the chunk's end
  kept = jnp.where(docs.open[..., None], jnp.exp(b[..., -1, :]), 0)
  # One product for both: U | W.
  UW = product('...ti,...ij->...tj', T, beta * jnp.concatenate([v, k * seen], axis=-1))
  out = product('...ti,...ij->...tj', A.astype(dtype), UW.astype(dtype))
  writes = product('...ck,...cj->...kj', k * left, UW)
  V = v.shape[-1]
  return affine.Chunks(
      read=(q * seen - out[..., V:]).astype(dtype), out=out[..., :V].astype(dtype),
      map=jnp.eye(k.shape[-1]) * kept[..., None] - writes[..., V:], write=writes[..., :V])


def _pairs(q, k, log_decay, docs: Documents) -> jax.Array:
  """q k^T above k k^T, [N, B, H, 2C, C], decayed, 0 where the pair is none."""
  if log_decay.shape[-1] > 1:
    both = decayed_pairs(jnp.stack([q, k], axis=-3), k, log_decay, (True, True))
    both = jnp.where(docs.pair[..., None, :, :], both, 0)
    return jax.lax.collapse(both, -3, -1)
  decay = jnp.exp(jnp.where(docs.pair, between(log_decay[..., 0]), -jnp.inf))
  scores = product('...tk,...ik->...ti', jnp.concatenate([q, k], axis=-2), k)
  return scores * jnp.concatenate([decay, decay], axis=-2)


def flops(K: int, V: int, form: str, chunk: int, channels: bool) -> float:
  """Of the products for a token and head, forward; 2 a multiply-add."""
  if form == 'sequential':
    return 6.0 * K * V
  C = chunks.choose(chunk, CHANNEL_CHUNKS if channels else CHUNKS)
  pairs = C * K * (1 if channels else 2)
  inverted = (C * C - 16) / 3 + 32 if C >= 4 else 2.0 * C * C
  carried = K * K * V / C * (3 + 2 * K / V if form == 'scan' else 1)   # joined twice, then applied
  return 2.0 * (pairs + inverted + 2 * C * (K + V) + K * (K + V) + carried + K * V)
