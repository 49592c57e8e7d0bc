"""A decayed sum of outer products, read by a query; the decay is a number a head or one a key channel.

  S_t = diag(exp g_t) S_{t-1} + k_t^T v_t          o_t = q_t S_t

A chunk of C tokens, b the cumulative log decay in it, S its incoming state:

  one number a head    o = e^b (q S) + ((q k^T) * G) v     G_ti = exp(b_t - b_i), i <= t
                       S' = e^{b_C} S + k^T (e^{b_C - b} v)
  one a key channel    o = (q e^b) S + P v                 P_ti = sum_k q_tk k_ik exp(b_tk - b_ik)
                       S' = diag(e^{b_C}) S + (k e^{b_C - b})^T v

Every exponent is at most 0: pairs are masked before the exponential, and P is made by halves (see
triangular.py). All chunks are worked on side by side; only S' stands in a scan. A token whose decay is 0
begins a new document for its head; a channel's log decay is held at FLOOR, whose exponential is 0.
Queries and keys may be shared by equal groups of heads where the decay is a number a head.
Sources: GLA arXiv:2312.06635, Mamba-2 arXiv:2405.21060, RetNet arXiv:2307.08621.
Held by: tests/test_decay.py.

B batch  T tokens  H heads  G groups of heads, R heads of a group  N chunks  C tokens of a chunk
K key dim  V value dim
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from longctx.recurrence import chunks
from longctx.recurrence.affine import product
from longctx.recurrence.documents import chunk_size, documents, from_chunks, to_chunks
from longctx.recurrence.triangular import decayed_products

FLOOR = -88.0   # exp of it is below the smallest normal float32
CHUNKS = {'cpu': 64, '': 64}
CHANNEL_CHUNKS = {'cpu': 32, '': 64}   # where decays have channels


class Inputs(NamedTuple):
  """Of each token. q, k, v in the compute type; q already scaled."""

  q: jax.Array                      # [B, T, G, K]
  k: jax.Array                      # [B, T, G, K]
  v: jax.Array                      # [B, T, H, V]
  log_decay: jax.Array | None       # [B, T, H] or [B, T, H, K] float32, <= 0; None: no decay
  reset_BT: jax.Array | None = None   # True where a document begins
  valid_BT: jax.Array | None = None   # False for padding


class Map(NamedTuple):
  """S -> kept S + write; float32. kept [..., H, 1, 1] or [..., H, K, 1]."""

  kept: jax.Array
  write: jax.Array   # [..., H, K, V]


class Chunks(NamedTuple):
  """What needs no state."""

  q: jax.Array           # [N, B, G, C, K], decayed from the chunk's start where decays have channels
  seen: jax.Array | None   # [N, B, H, C]: the decay from the chunk's start where it is a number
  out: jax.Array         # [N, B, H, C, V] float32: of the chunk's own tokens
  map: Map               # [N, B, H, ...]


@dataclasses.dataclass(frozen=True)
class Decay:
  """The kernel that `state_scan.over_sequence` runs; its state is S [B, H, K, V], float32."""

  form: str = 'chunked'   # sequential: token by token; chunked; scan: chunks joined in log2(N) rounds
  chunk: int = 0          # a power of two; 0: by platform

  cut: ClassVar[str] = 'heads'

  def prepare(self, inputs: Inputs) -> tuple[Inputs, Chunks | None]:
    inputs = _without_padding(inputs)
    length = inputs.q.shape[1]
    if self.form == 'sequential' or length == 1:
      return inputs, None
    by_channel = inputs.log_decay is not None and inputs.log_decay.ndim == 4
    size = chunk_size(length, chunks.choose(self.chunk, CHANNEL_CHUNKS if by_channel else CHUNKS))
    return inputs, (_by_channel if by_channel else _by_head)(inputs, size)

  def transition(self, prepared: Any) -> Map:
    inputs, parts = prepared
    if parts is not None:
      zeros = jnp.zeros_like(parts.map.write[0])
      _, write = _carry(parts.map, zeros)
      return Map(jnp.prod(parts.map.kept, axis=0), write)
    B, T, H, V = inputs.v.shape
    empty = jnp.zeros((B, H, inputs.k.shape[3], V), jnp.float32)
    ones = jnp.ones((*empty.shape[:3], 1), jnp.float32)
    silent = inputs._replace(v=jnp.zeros((B, T, H, 1), inputs.v.dtype))
    return Map(_one_by_one(silent, ones)[1], _one_by_one(inputs, empty)[1])

  def join(self, first: Map, second: Map) -> Map:
    return Map(second.kept * first.kept, second.kept * first.write + second.write)

  def apply(self, transition: Map, state: jax.Array) -> jax.Array:
    return transition.kept * state + transition.write

  def finish(self, prepared: Any, state_BHKV: jax.Array) -> tuple[jax.Array, jax.Array]:
    inputs, parts = prepared
    if parts is None:
      return _one_by_one(inputs, state_BHKV)
    if self.form == 'scan':
      joined = jax.lax.associative_scan(self.join, parts.map)
      after = self.apply(joined, state_BHKV)
      before, state_BHKV = jnp.concatenate([state_BHKV[None], after[:-1]]), after[-1]
    else:
      before, state_BHKV = _carry(parts.map, state_BHKV)
    dtype = inputs.v.dtype
    N, B, G, _, K = parts.q.shape
    grouped = before.astype(dtype).reshape(N, B, G, -1, K, before.shape[-1])
    old = product('nbgck,nbgrkv->nbgrcv', parts.q, grouped).reshape(parts.out.shape)
    if parts.seen is not None:
      old *= parts.seen[..., None]
    return from_chunks((parts.out + old).astype(dtype), inputs.v.shape[1]), state_BHKV


def _carry(maps: Map, state_BHKV: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The state before each chunk [N, B, H, K, V], and after the last."""
  def step(state, chunk):
    return chunk.kept * state + chunk.write, state
  after, before = jax.lax.scan(step, state_BHKV, maps)
  return before, after


def _without_padding(inputs: Inputs) -> Inputs:
  """Padding decays nothing and writes nothing. The decay is float32 from here on."""
  decay, valid_BT = inputs.log_decay, inputs.valid_BT
  if decay is not None:
    decay = decay.astype(jnp.float32)
  if valid_BT is not None:
    seen = lambda x: valid_BT.reshape(*valid_BT.shape, *[1] * (x.ndim - 2))
    inputs = inputs._replace(v=jnp.where(seen(inputs.v), inputs.v, 0))
    decay = None if decay is None else jnp.where(seen(decay), decay, 0.0)
  return inputs._replace(log_decay=decay)


def _one_by_one(inputs: Inputs, state_BHKV: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The definition, token by token."""
  repeats = inputs.v.shape[2] // inputs.q.shape[2]
  heads = lambda x: jnp.repeat(x.astype(jnp.float32), repeats, axis=1)
  def step(S_BHKV, token):
    q, k, v, log_decay, reset = token
    if reset is not None:
      S_BHKV = jnp.where(reset[:, None, None, None], 0.0, S_BHKV)
    if log_decay is not None:
      decay = jnp.exp(log_decay)[..., None]
      S_BHKV *= decay if decay.ndim == 4 else decay[..., None]
    S_BHKV += heads(k)[..., None] * v.astype(jnp.float32)[..., None, :]
    return S_BHKV, product('bhk,bhkv->bhv', heads(q), S_BHKV).astype(v.dtype)
  tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tuple(inputs[:5]))
  state_BHKV, out = jax.lax.scan(step, state_BHKV, tokens)
  return jnp.moveaxis(out, 0, 1), state_BHKV


def _resets(inputs: Inputs, shape: tuple[int, ...], size: int) -> jax.Array:
  if inputs.reset_BT is None:
    return jnp.zeros((*shape[:2], 1, size), bool)
  return to_chunks(inputs.reset_BT, size)


def _by_head(inputs: Inputs, size: int) -> Chunks:
  q, k, v = (to_chunks(x, size) for x in inputs[:3])
  N, B, G, C, K = k.shape
  dtype, V = v.dtype, v.shape[-1]
  reset = _resets(inputs, k.shape, size)
  if inputs.log_decay is None:
    b = jnp.zeros((*reset.shape[:3], C), jnp.float32)
  else:
    log_decay = to_chunks(inputs.log_decay, size)                  # [N, B, H, C]
    dropped = log_decay <= FLOOR
    reset |= dropped
    b = jnp.cumsum(jnp.where(dropped, 0.0, log_decay), axis=-1)
  docs = documents(reset)
  every = lambda x, allowed: jnp.exp(jnp.where(allowed, x, -jnp.inf))
  decay = every(b[..., :, None] - b[..., None, :], docs.pair)      # [N, B, H or 1, C, C]
  left = every(b[..., -1:] - b, docs.last)                         # at the chunk's end
  scores = product('...tk,...ik->...ti', q, k)                     # [N, B, G, C, C]
  split = lambda x: x.reshape(N, B, *((G, -1) if x.shape[2] > 1 else (1, 1)), *x.shape[3:])
  v = split(v) if v.shape[2] > 1 else v.reshape(N, B, G, -1, C, V)
  weights = (scores[:, :, :, None] * split(decay)).astype(dtype)
  out = product('nbgrti,nbgriv->nbgrtv', jnp.broadcast_to(weights, (*v.shape[:4], C, C)), v)
  write = product('nbgik,nbgriv->nbgrkv', k, (v * split(left)[..., None]).astype(dtype))
  kept = jnp.where(docs.open, jnp.exp(b[..., -1]), 0.0)[..., None, None]
  return Chunks(q=q, seen=every(b, docs.first), out=out.reshape(N, B, -1, C, V),
                map=Map(kept, write.reshape(N, B, -1, K, V)))


def _by_channel(inputs: Inputs, size: int) -> Chunks:
  q, k, v, log_decay = (to_chunks(x, size) for x in inputs[:4])
  dtype = v.dtype
  docs = documents(_resets(inputs, k.shape, size))
  b = jnp.cumsum(jnp.maximum(log_decay, FLOOR), axis=-2)           # [N, B, H, C, K]
  every = lambda x, allowed: jnp.exp(jnp.where(allowed[..., None], x, -jnp.inf))
  pairs = decayed_products(q[..., None, :, :], b, k, b, diagonal=True)[..., 0, :, :]
  pairs = jnp.where(docs.pair, pairs, 0.0)
  out = product('...ti,...iv->...tv', pairs.astype(dtype), v)
  left = (k * every(b[..., -1:, :] - b, docs.last)).astype(dtype)
  write = product('...ik,...iv->...kv', left, v)
  kept = jnp.where(docs.open[..., None], jnp.exp(b[..., -1, :]), 0.0)[..., None]
  return Chunks(q=(q * every(b, docs.first)).astype(dtype), seen=None, out=out,
                map=Map(kept, write))


def flops(heads: int, groups: int, key_dim: int, value_dim: int, by_channel: bool, form: str,
          chunk: int) -> float:
  """Of a token, forward, in products and decays; see Cost in longctx/models/mixers/base.py."""
  state = heads * key_dim * value_dim
  if form == 'sequential':
    return 5.0 * state   # decay 1, write 2, read 2
  size = chunks.choose(chunk, CHANNEL_CHUNKS if by_channel else CHUNKS)
  # By halves a chunk's pairs need the products of its lower triangle alone.
  pairs = size * (groups * key_dim / (2 if by_channel else 1) + heads * value_dim)
  return 2.0 * pairs + 4.0 * state + 2.0 * state / size
