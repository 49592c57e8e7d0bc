"""The mLSTM: a matrix memory with exponential input gates, held in range by a running maximum.

  C_t = f_t C_{t-1} + i_t k_t^T v_t      n_t = f_t n_{t-1} + i_t k_t
  h_t = q_t C_t / max(|q_t n_t|, 1)

with i = exp(.) unbounded, so that C and n are kept times e^-m: h = q C / max(|q n|, e^-m), which no choice
of m changes. Here

  m_t = max(log f_t + m_{t-1}, log i_t, 0)

In a chunk, with F_ti the log of f_{i+1} .. f_t, all from sums over the tokens between, never a
difference of two long sums:  m'_t = max_i(F_ti + log i_i, 0), the numerators and denominators at m', and
the map of the state (F, m, C, n); maps join as (F1 + F2, max(F2 + m1, m2), ..). Only the rescaling by
m_t = max(F_t + m_0, m'_t) and q C_0 wait for the state.
Source: xLSTM, arXiv:2405.04517 (equations 19 to 27; appendix A.3). Differs: m is at least 0, so that
e^-m never overflows, and e^-m at least e^-FLOOR, which rounding hides; the official code adds 1e-6 to
the denominator, which makes h depend on m.
Held by: tests/test_mlstm.py.

B batch  T tokens  H heads  N chunks  C tokens of a chunk  K key dim  V value dim  U = V + 1
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from longctx.recurrence import chunks
from longctx.recurrence.affine import product
from longctx.recurrence.documents import chunk_size, documents, from_chunks, to_chunks

CHUNKS = {'cpu': 64, '': 64}
NOTHING = -1e30   # log of a gate that lets nothing through; finite, so that it may be added up
FLOOR = 30.0      # |q n| below e^-30 is rounding: the largest weight in n is 1


class Inputs(NamedTuple):
  """Of each token and head. q, k, v in the compute type; k already scaled."""

  q: jax.Array                        # [B, T, H, K]
  k: jax.Array                        # [B, T, H, K]
  v: jax.Array                        # [B, T, H, V]
  log_input: jax.Array                # [B, T, H] float32
  log_forget: jax.Array               # [B, T, H] float32, <= 0
  reset_BT: jax.Array | None = None   # True where a document begins
  valid_BT: jax.Array | None = None   # False for padding


class State(NamedTuple):
  """float32. The memory is (C, n) e^m; empty: all zeros."""

  C: jax.Array   # [B, H, K, V]
  n: jax.Array   # [B, H, K]
  m: jax.Array   # [B, H]


class Map(NamedTuple):
  """What some tokens do to a state, float32; C has n as its last column."""

  forget: jax.Array   # [..., H]: log of the product of the forget gates
  m: jax.Array        # [..., H]
  C: jax.Array        # [..., H, K, U]


class Chunks(NamedTuple):
  """What needs no state; out has the denominator as its last column."""

  q: jax.Array        # [N, B, H, C, K]
  forget: jax.Array   # [N, B, H, C]: log of what is left of the state before the chunk
  m: jax.Array        # [N, B, H, C]
  out: jax.Array      # [N, B, H, C, U] float32
  map: Map


@dataclasses.dataclass(frozen=True)
class MLSTM:
  """The mLSTM in one of its forms; see longctx/parallel/state_scan.py for the methods."""

  form: str = 'chunked'   # sequential: token by token; chunked; scan: chunks joined in log2(N) rounds
  chunk: int = 0          # tokens, a power of two; 0: by platform
  cut: ClassVar[str] = 'heads'

  def prepare(self, inputs: Inputs) -> tuple[Inputs, Chunks | None]:
    valid = True if inputs.valid_BT is None else inputs.valid_BT[..., None]
    inputs = inputs._replace(
        log_input=jnp.where(valid, inputs.log_input.astype(jnp.float32), NOTHING),
        log_forget=jnp.where(valid, jnp.maximum(inputs.log_forget.astype(jnp.float32), -1e4), 0))
    if self.form == 'sequential' or inputs.q.shape[1] == 1:
      return inputs, None
    return inputs, _chunks(inputs, chunks.choose(self.chunk, CHUNKS))

  def transition(self, prepared) -> Map:
    inputs, by_chunk = prepared
    if by_chunk is not None:
      empty = Map(*(jnp.zeros_like(x[0]) for x in by_chunk.map))
      return jax.lax.scan(lambda a, b: (join(a, b), None), empty, by_chunk.map)[0]
    B, _, H, K = inputs.k.shape
    zeros = State(jnp.zeros((B, H, K, inputs.v.shape[-1])), jnp.zeros((B, H, K)), jnp.zeros((B, H)))
    after = _one_by_one(inputs, zeros)[1]
    forget = inputs.log_forget
    if inputs.reset_BT is not None:
      forget = jnp.where(inputs.reset_BT[..., None], NOTHING, forget)
    return Map(forget.sum(1), after.m, _wide(after))

  def join(self, first: Map, second: Map) -> Map:
    return join(first, second)

  def apply(self, transition: Map, state: State) -> State:
    return _narrow(join(Map(jnp.zeros_like(state.m), state.m, _wide(state)), transition))

  def finish(self, prepared, state: State) -> tuple[jax.Array, State]:
    inputs, by_chunk = prepared
    if by_chunk is None:
      return _one_by_one(inputs, state)
    first = Map(jnp.zeros_like(state.m), state.m, _wide(state))
    if self.form == 'scan':
      maps = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, by_chunk.map)
      joined = jax.lax.associative_scan(join, maps)
      before, last = jax.tree.map(lambda x: x[:-1], joined), jax.tree.map(lambda x: x[-1], joined)
    else:
      last, before = jax.lax.scan(lambda a, b: (join(a, b), a), first, by_chunk.map)
    return from_chunks(_outputs(by_chunk, before, inputs.v.dtype), inputs.q.shape[1]), _narrow(last)

  def read(self, inputs: Inputs, states: State) -> jax.Array:
    """[B, T, S, H, V] float32: what S states [B, S, ...] that stand still say to each token."""
    wide = product('bthk,bshku->btshu', inputs.q, _wide(states))
    return _read(wide, states.m[:, None])


def join(first: Map, second: Map) -> Map:
  m = jnp.maximum(second.forget + first.m, second.m)
  scaled = lambda log, C: jnp.exp(log - m)[..., None, None] * C
  return Map(first.forget + second.forget, m,
             scaled(second.forget + first.m, first.C) + scaled(second.m, second.C))


def _wide(state: State) -> jax.Array:
  return jnp.concatenate([state.C, state.n[..., None]], axis=-1)


def _narrow(last: Map) -> State:
  return State(last.C[..., :-1], last.C[..., -1], last.m)


def _read(wide: jax.Array, m: jax.Array) -> jax.Array:
  """Numerators over denominators, the last column."""
  floor = jnp.exp(-jnp.minimum(m, FLOOR))[..., None]
  return wide[..., :-1] / jnp.maximum(jnp.abs(wide[..., -1:]), floor)


def _one_by_one(inputs: Inputs, state: State) -> tuple[jax.Array, State]:
  def step(state, token):
    q, k, v, log_input, log_forget, reset = token
    if reset is not None:
      state = jax.tree.map(lambda x: jnp.where(jnp.expand_dims(reset, range(1, x.ndim)), 0, x), state)
    wide = jnp.concatenate([v.astype(jnp.float32), jnp.ones((*v.shape[:-1], 1))], axis=-1)
    m = jnp.maximum(jnp.maximum(log_forget + state.m, log_input), 0)
    kept, new = jnp.exp(log_forget + state.m - m), jnp.exp(log_input - m)
    C_BHKU = kept[..., None, None] * _wide(state) + (
        new[..., None] * k)[..., None] * wide[..., None, :]
    out = _read(product('bhk,bhku->bhu', q.astype(jnp.float32), C_BHKU), m)
    return State(C_BHKU[..., :-1], C_BHKU[..., -1], m), out.astype(v.dtype)

  tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tuple(inputs[:6]))
  state, out = jax.lax.scan(step, state, tokens)
  return jnp.moveaxis(out, 0, 1), state


def _chunks(inputs: Inputs, chunk: int) -> Chunks:
  size = chunk_size(inputs.q.shape[1], chunk)
  q, k, v = (to_chunks(x, size) for x in inputs[:3])
  filled = -inputs.q.shape[1] % size
  log_input = to_chunks(jnp.pad(inputs.log_input, ((0, 0), (0, filled), (0, 0)),
                                constant_values=NOTHING), size)
  log_forget = to_chunks(inputs.log_forget, size)
  reset = jnp.zeros((*q.shape[:2], 1, size), bool)
  if inputs.reset_BT is not None:
    reset = to_chunks(inputs.reset_BT, size)
  docs, dtype = documents(reset), v.dtype
  upto = jnp.tri(size)                                    # [t, r]: r <= t
  after = jnp.tri(size, k=-1)                             # [r, i]: r > i
  forgets = product('tr,nbhri->nbhti', upto, log_forget[..., None] * after)
  logs = jnp.where(docs.pair, forgets + log_input[..., None, :], NOTHING)
  m = jnp.maximum(logs.max(-1), 0)                        # [N, B, H, C]
  scores = product('nbhtk,nbhik->nbhti', q, k) * jnp.exp(logs - m[..., None])
  wide = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
  # The denominator in float32: it is a sum of numbers of either sign.
  out = jnp.concatenate([product('nbhti,nbhiv->nbhtv', scores.astype(dtype), v),
                         scores.sum(-1, keepdims=True)], axis=-1)
  forget = jnp.where(docs.first, product('tr,nbhr->nbht', upto, log_forget), NOTHING)
  left = jnp.exp(logs[..., -1, :] - m[..., -1:])          # 0 for tokens of earlier documents
  C_NBHKU = product('nbhik,nbhiu->nbhku', k * left[..., None], wide.astype(jnp.float32))
  return Chunks(q, forget, m, out, Map(forget[..., -1], m[..., -1], C_NBHKU))


def _outputs(by_chunk: Chunks, before: Map, dtype: jnp.dtype) -> jax.Array:
  old = by_chunk.forget + before.m[..., None]
  m = jnp.maximum(old, by_chunk.m)
  scaled = lambda log, x: jnp.exp(log - m)[..., None] * x
  memory = product('nbhck,nbhku->nbhcu', by_chunk.q.astype(jnp.float32), before.C)
  return _read(scaled(by_chunk.m, by_chunk.out) + scaled(old, memory), m).astype(dtype)


def flops(K: int, V: int, form: str, chunk: int) -> float:
  """Of the products for a token and head, forward; 2 a multiply-add."""
  if form == 'sequential':
    return 5.0 * K * (V + 1)
  C = chunks.choose(chunk, CHUNKS)
  return 2.0 * (C * (C + K + V + 1) + 2 * K * (V + 1))
