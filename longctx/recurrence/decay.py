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
from longctx.recurrence.triangular import between, decayed_pairs, sums_around

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
  """S -> kept S + write; float32."""

  kept: jax.Array    # [B, H, 1 or K, 1]
  write: jax.Array   # [B, H, K, V]


class Chunks(NamedTuple):
  """What needs no state. The heads of a group stand beside the values: one product serves them."""

  q: jax.Array             # [N, B, G, C, K], decayed from the chunk's start where channels decay
  seen: jax.Array | None   # [N, B, G, C, R]: the decay from the chunk's start where heads decay
  out: jax.Array           # [N, B, G, C, R, V] float32: of the chunk's own tokens
  map: Map                 # kept [N, B, G, 1 or K, R, 1], write [N, B, G, K, R, V]


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
      _, write = _carry(parts.map, jnp.zeros_like(parts.map.write[0]))
      return Map(_from_groups(jnp.prod(parts.map.kept, axis=0)), _from_groups(write))
    B, T, H, V = inputs.v.shape
    empty = jnp.zeros((B, H, inputs.k.shape[3], V), jnp.float32)
    silent = inputs._replace(v=jnp.zeros((B, T, H, 1), inputs.v.dtype))
    ones = jnp.ones((*empty.shape[:3], 1), jnp.float32)
    return Map(_one_by_one(silent, ones)[1], _one_by_one(inputs, empty)[1])

  def join(self, first: Map, second: Map) -> Map:
    return Map(second.kept * first.kept, second.kept * first.write + second.write)

  def apply(self, transition: Map, state: jax.Array) -> jax.Array:
    return transition.kept * state + transition.write

  def finish(self, prepared: Any, state_BHKV: jax.Array) -> tuple[jax.Array, jax.Array]:
    inputs, parts = prepared
    if parts is None:
      return _one_by_one(inputs, state_BHKV)
    B, H, K, V = state_BHKV.shape
    G, dtype = parts.q.shape[2], inputs.v.dtype
    state = jnp.moveaxis(state_BHKV.reshape(B, G, H // G, K, V), 2, 3)
    if self.form == 'scan':
      joined = jax.lax.associative_scan(self.join, parts.map)
      after = self.apply(joined, state)
      before, state = jnp.concatenate([state[None], after[:-1]]), after[-1]
    else:
      before, state = _carry(parts.map, state)
    old = product('nbgck,nbgkrv->nbgcrv', parts.q, before.astype(dtype))
    if parts.seen is not None:
      old *= parts.seen[..., None]
    out_BTGRV = from_chunks((parts.out + old).astype(dtype), inputs.v.shape[1])
    return out_BTGRV.reshape(inputs.v.shape), _from_groups(state)

  def read(self, inputs: Inputs, states_BSHKV: jax.Array) -> jax.Array:
    """[B, T, S, H, V] float32: what S states that stand still say to each token."""
    B, S, H, K, V = states_BSHKV.shape
    G = inputs.q.shape[2]
    said = product('btgk,bsgrkv->btsgrv', inputs.q, states_BSHKV.reshape(B, S, G, H // G, K, V))
    return said.reshape(*said.shape[:3], H, V)


def _from_groups(state_BGKRV: jax.Array) -> jax.Array:
  """[B, H, K, V]."""
  state = jnp.moveaxis(state_BGKRV, 3, 2)
  return jax.lax.collapse(state, 1, 3)


def _carry(maps: Map, state: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The state before each chunk, [N, ...], and after the last."""
  def step(state, chunk):
    return chunk.kept * state + chunk.write, state
  after, before = jax.lax.scan(step, state, maps)
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


def _chunks(inputs: Inputs, size: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """q and k [N, B, G, C, K], v [N, B, G, C, R, V], reset [N, B, 1, C]."""
  (B, T, G, _), (*_, H, V) = inputs.q.shape, inputs.v.shape
  q, k = to_chunks(inputs.q, size), to_chunks(inputs.k, size)
  v = to_chunks(inputs.v.reshape(B, T, G, H // G, V), size)
  reset = (jnp.zeros((*q.shape[:2], 1, size), bool) if inputs.reset_BT is None else
           to_chunks(inputs.reset_BT, size))
  return q, k, v, reset


def _writes(k_NBGCK: jax.Array, v_NBGCRV: jax.Array) -> jax.Array:
  """k^T v, [N, B, G, K, R, V]. One dim R V: XLA:CPU has no such product of bfloat16 with two."""
  write = product('nbgik,nbgij->nbgkj', k_NBGCK, jax.lax.collapse(v_NBGCRV, 4))
  return write.reshape(*write.shape[:4], *v_NBGCRV.shape[4:])


def _by_head(inputs: Inputs, size: int) -> Chunks:
  q, k, v, reset = _chunks(inputs, size)
  dtype = v.dtype
  N, B, G, C, R = v.shape[:5]
  if inputs.log_decay is None:
    log_decay = jnp.zeros(reset.shape, jnp.float32)
  else:
    log_decay = to_chunks(inputs.log_decay, size)                  # [N, B, H, C]
    dropped = log_decay <= FLOOR
    reset |= dropped
    log_decay = jnp.where(dropped, 0.0, log_decay)
  docs = documents(reset)
  b, pairs = jnp.cumsum(log_decay, axis=-1), between(log_decay)
  every = lambda x, allowed: jnp.exp(jnp.where(allowed, x, -jnp.inf))
  # H heads, or one that stands for all, as groups.
  split = lambda x: x.reshape(N, B, *((G, R) if x.shape[2] > 1 else (1, 1)), *x.shape[3:])
  beside = lambda x: jnp.moveaxis(split(x), 3, -1)
  decay = split(every(pairs, docs.pair))                           # [N, B, G, R, C, C]
  left = beside(every(pairs[..., -1, :], docs.last))[..., None]    # [N, B, G, C, R, 1]
  kept = beside(jnp.where(docs.open, jnp.exp(b[..., -1]), 0.0))    # [N, B, G, R]
  scores = product('nbgtk,nbgik->nbgti', q, k)
  weights = jnp.broadcast_to((scores[:, :, :, None] * decay).astype(dtype), (N, B, G, R, C, C))
  out = product('nbgrti,nbgirv->nbgtrv', weights, v)
  write = _writes(k, (v * left).astype(dtype))
  return Chunks(q=q, seen=beside(every(b, docs.first)), out=out,
                map=Map(kept[:, :, :, None, :, None], write))


def _by_channel(inputs: Inputs, size: int) -> Chunks:
  q, k, v, reset = _chunks(inputs, size)
  dtype = v.dtype
  docs = documents(reset)
  log_decay = jnp.maximum(to_chunks(inputs.log_decay, size), FLOOR)   # [N, B, H, C, K]
  _, b, behind = sums_around(log_decay)
  every = lambda x, allowed: jnp.exp(jnp.where(allowed[..., None], x, -jnp.inf))
  pairs = decayed_pairs(q[..., None, :, :], k, log_decay, (True,))[..., 0, :, :]
  pairs = jnp.where(docs.pair, pairs, 0.0)
  out = product('nbgti,nbgirv->nbgtrv', pairs.astype(dtype), v)
  left = (k * every(behind, docs.last)).astype(dtype)
  write = _writes(left, v)
  kept = jnp.where(docs.open[..., None], jnp.exp(b[..., -1, :]), 0.0)
  return Chunks(q=(q * every(b, docs.first)).astype(dtype), seen=None, out=out,
                map=Map(kept[..., None, None], write))


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
