"""A layer that reads its document in segments, with a memory from segment to segment.

A layer sees one segment of each row at a time, a *cell*, with what it remembered before it:

    x_BCD, memory = block(x_BCD, memory, cell, key)            key: of dropout; see layers.dropout

All tokens of a cell are of one document and stand from its first slot on; padding, if any, comes last.
`memory` is what was known before the segment: a token never reads what its own segment writes. What is
returned is the memory after a whole segment; the caller (models/segments.py) drops it while the segment
is unfinished, and gives `init_memory` where a document begins. So no memory layer ever meets a document's
edge, a split or a call's length: those laws are kept in one place for all.

`Block` is the layer of a transformer: pre-norm attention over the segment and the `short_term` tokens
before it, whose hidden states are kept exactly and get no gradient (Transformer-XL), then an MLP. A
long-term memory is a subclass, or a `Store` that the attention's heads read and write:

    memory    = store.init_memory(batch_size)
    out_BCNH  = store.read(q_BCNH, memory)              q: normed, not turned by positions
    memory    = store.write(memory, k_BSKH, v_BSKH, valid_BS)

`begin` and `keep` say what a cell reads and what stays of what it wrote: chosen row by row, both memories
being there. A memory too large for that is written in place, nowhere by a cell that is not kept (memorizing.py).

What is written is what falls out of the short-term memory, or, without one, the segment itself. So it is
for every long-term memory whose class says `falls`: with a window each token is in one of both stores, a
segment reads what the long-term memory knew before it, and no gradient enters through what the window held.
A memory that is added to attention (its class reads `gate`, and it is no store) has a gate too where
model.gate='tanh': a number g of the layer, y = Attn(x) + tanh(g) M(x), 0 at first. As published it has none.
Sources: Transformer-XL arXiv:1901.02860; the gate of a store: Memorizing Transformer arXiv:2203.08913,
Infini-attention arXiv:2404.07143; of what is added: Flamingo arXiv:2204.14198.
Differs: pre-norm, RMSNorm, gated MLP; rotary positions are the default, the paper's relative bias is
model.position='relative', with u and v of each layer where the official default shares them; a window is as
wide as Transformer-XL's, short_term + i tokens before token i of a segment, also for memories published with a
sliding window, the same for every token.
Held by: tests/test_models.py and tests/test_memory_laws.py (all laws).

B batch  C slots of a cell  F, K tokens that a memory adds before and after a segment's  M short_term
N query heads  K kv heads  H head dim  D model
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longctx.attention import Intervals, attention
from longctx.memory import relative
from longctx.models.attention_layer import Attention, cut_heads
from longctx.models.layers import (
  DTYPES,
  MLP,
  RMSNorm,
  constant,
  dropout,
  normal,
  of_each,
  param,
  rotary_angles,
  rotate,
  rows_where,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What the model's config says of its memory layers, derived sizes written out."""

  dim: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  segment: int                 # tokens
  short_term: int = 0          # tokens before the segment whose hidden states are kept
  position: str = 'rope'       # rope | relative | none
  rope_base: float = 10_000.0
  qk_norm: bool = False
  mlp: str = 'swiglu'
  mlp_dim: int = 0
  num_layers: int = 1
  dropout: float = 0.0
  norm_epsilon: float = 1e-6
  std: float = 0.02
  out_std: float = 0.02        # of the projections back into the residual
  dtype: str = 'float32'       # of the arithmetic, and of hidden states that are kept
  attention: str = 'auto'
  gate: str = 'sigmoid'        # of what a store says: sigmoid | tanh (0 at first: nothing); what is added: tanh or none
  variant: str = ''            # these are the memory's own; '' and 0: as published
  tokens: int = 0
  size: int = 0
  width: int = 0
  depth: int = 0
  chunk: int = 0
  rate: float = 0.0
  top: int = 0


class Cell(NamedTuple):
  """One segment of each row, as the layers see it."""

  valid_BC: jax.Array    # bool: a token of the row (or of the memory's own) stands here
  number_B: jax.Array    # int32: segments of the document before this one
  parts: int = 1         # cells side by side that a row was cut into
  kept_B: jax.Array | None = None   # bool: whose memory after it is kept (Block.keep); None: of all


class Cost(NamedTuple):
  """Closed form of what a memory adds to a layer. FLOPs of a token, forward, 2 a multiply-add."""

  parameters: int
  matrices: int          # of them, those that multiply every token
  flops: float           # besides the matrices
  state: int             # numbers that a row remembers
  attends: bool = True   # False: it stands in the place of attention


class Past(NamedTuple):
  """The short-term memory of a layer: what its last tokens were before it; oldest first."""

  hidden: jax.Array      # [B, M, D] in the compute type
  count: jax.Array       # int32 [B]: how many of them, the newest, are there


class Memory(NamedTuple):
  """Of one layer; batch first."""

  past: Past | None
  store: Any             # what the long-term memory keeps, float32 where it adds up; () for none


NO_COST = Cost(0, 0, 0.0, 0)


class Store(nnx.Module):
  """A long-term memory of keys and values; see the head of this file."""

  dependency: ClassVar[str] = 'P1'
  reads: ClassVar[tuple[str, ...]] = ()   # fields of Settings that mean something to it

  def when_read(self, memory: Any, out_BCNH: jax.Array) -> Any:
    """The memory, to be written once `out` was read from it."""
    del out_BCNH
    return memory


class Block(nnx.Module):
  """A transformer layer over segments: attention (and a store, if one is given) and an MLP."""

  dependency: ClassVar[str] = 'P0'
  reads: ClassVar[tuple[str, ...]] = ()
  falls: ClassVar[bool] = True       # with short_term, is written what falls out; else each segment
  deals: ClassVar[bool] = True       # some of the memories of `before` may be taken without the others

  @staticmethod
  def extra_tokens(settings: Settings) -> tuple[int, int]:
    """How many tokens of its own the memory has before and after those of each segment."""
    del settings
    return 0, 0

  @classmethod
  def identity(cls, settings: Settings) -> bool:
    """Whether it begins as the plain transformer's layer: with its gate shut, or saying nothing at first."""
    return settings.gate == 'tanh' or 'gate' not in cls.reads

  @classmethod
  def cost(cls, settings: Settings) -> Cost:
    """What the memory adds; the attention, MLP and short-term memory are counted by the model."""
    return NO_COST

  def __init__(self, settings: Settings, *, store: type | None = None, rngs: nnx.Rngs):
    s = self.settings = settings
    attends = self.cost(s).attends
    self.front, self.back = self.extra_tokens(s)
    self.mixer_norm = RMSNorm(s.dim, s.norm_epsilon, rngs=rngs)
    self.mixer = Attention(
        dim=s.dim, num_heads=s.num_heads, num_kv_heads=s.num_kv_heads, head_dim=s.head_dim,
        qk_norm=s.qk_norm, norm_epsilon=s.norm_epsilon, implementation=s.attention, std=s.std,
        out_std=s.out_std, rngs=rngs) if attends else None
    self.mlp_norm = None if s.mlp == 'none' else RMSNorm(s.dim, s.norm_epsilon, rngs=rngs)
    self.mlp = None if s.mlp == 'none' else MLP(s.dim, s.mlp_dim, s.mlp, s.std, s.out_std, rngs=rngs)
    self.relative = relative_bias(s, rngs) if s.position == 'relative' else None
    self.store = store(s, rngs=rngs) if store else None
    # Named `gate`: the optimiser gives gates a rate of their own (optimizer.gate_rate).
    one = 'gate' in self.reads and s.gate == 'tanh'
    self.gate = (param(rngs, constant(0.0), (s.num_heads,), ('heads',)) if store else
                 param(rngs, constant(0.0), (1,), (None,)) if one else None)

  def init_memory(self, batch_size: int) -> Memory:
    """What a document begins with."""
    return Memory(self.init_past(batch_size), self.init_store(batch_size))

  def init_past(self, batch_size: int) -> Past | None:
    s = self.settings
    return Past(jnp.zeros((batch_size, s.short_term, s.dim), DTYPES[s.dtype]),
                jnp.zeros((batch_size,), jnp.int32)) if s.short_term else None

  def init_store(self, batch_size: int) -> Any:
    return self.store.init_memory(batch_size) if self.store is not None else ()

  def begin(self, new_B: jax.Array, fresh: Memory, memory: Memory) -> Memory:
    """What a cell reads: of new rows what a document begins with."""
    return rows_where(new_B, fresh, memory)

  def keep(self, kept_B: jax.Array, after: Memory, memory: Memory) -> Memory:
    """The memory after a cell: what it was before where the cell is not kept."""
    return rows_where(kept_B, after, memory)

  def __call__(self, x_BCD: jax.Array, memory: Memory, cell: Cell, key: jax.Array | None
               ) -> tuple[jax.Array, Memory]:
    halves = None if key is None else of_each(jax.random.split, key)
    keys = (None, None) if key is None else (halves[..., 0], halves[..., 1])
    y_BCD, after = self.mix(x_BCD, memory, cell)
    x_BCD += dropout(y_BCD, self.settings.dropout, keys[0])
    return self.feed_forward(x_BCD, keys[1]), after

  def feed_forward(self, x_BCD: jax.Array, key: jax.Array | None) -> jax.Array:
    if self.mlp is None:
      return x_BCD
    return x_BCD + dropout(self.mlp(self.mlp_norm(x_BCD)), self.settings.dropout, key)

  def mix(self, x_BCD: jax.Array, memory: Memory, cell: Cell) -> tuple[jax.Array, Memory]:
    """What attention and the store add to the residual, and the memory after."""
    q, k, v = self.project(x_BCD, memory.past)
    out_BCNH = self.attend(q, k, v, memory.past, cell)
    store = memory.store
    if self.store is not None:
      far_BCNH = self.store.read(q, store)
      store = self.store.when_read(store, far_BCNH)
      far_BCNH = far_BCNH.astype(out_BCNH.dtype)
      g = gate_of(self.gate.get_value(), self.settings.gate).astype(out_BCNH.dtype)[:, None]
      out_BCNH = out_BCNH + g * (far_BCNH - out_BCNH)
      store = self.write(store, k, v, memory.past, cell)
    return self.mixer.merged(out_BCNH), Memory(self.remember(x_BCD, memory.past, cell), store)

  def let_in(self, said_BCD: jax.Array) -> jax.Array:
    """What is added to attention, of what the memory says."""
    if self.gate is None:
      return said_BCD
    return gate_of(self.gate.get_value(), self.settings.gate).astype(said_BCD.dtype) * said_BCD

  def before(self, x_BSCD: jax.Array, memory: Memory, valid_BSC: jax.Array
             ) -> tuple[Memory, Memory]:
    """(the memory before each of S segments that follow each other, [B, S, ...]; the one after).

    For memories of class P0 and P1: what enters them is known from the layer's input alone.
    """
    B, S, C, _ = x_BSCD.shape
    past = memory.past
    x_BTD, valid_BT = x_BSCD.reshape(B, S * C, -1), valid_BSC.reshape(B, S * C)
    pasts, after = None, None
    if past is not None:
      M = past.hidden.shape[1]
      all_BTD = jnp.concatenate([past.hidden, x_BTD.astype(past.hidden.dtype)], axis=1)
      starts_S = np.arange(S) * C
      pasts = Past(all_BTD[:, starts_S[:, None] + np.arange(M)],
                   jnp.minimum(past.count[:, None] + starts_S, M))
      after = Past(all_BTD[:, S * C:], jnp.minimum(past.count + S * C, M))
    if self.store is None:
      return Memory(pasts, ()), Memory(after, ())
    segments = lambda x: x.reshape(B, S, C, *x.shape[2:])
    k_from, valid_BT = falling_of_all(x_BTD, valid_BT, past, C)
    _, k, v = self.mixer.heads(self.mixer_norm(k_from))
    stores, store = self.store.before(memory.store, segments(k), segments(v), segments(valid_BT))
    return Memory(pasts, stores), Memory(after, store)

  def project(self, x_BCD: jax.Array, past: Past | None
              ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q of the segment, k and v of the past and the segment, none of them turned by positions."""
    if past is None:
      return self.mixer.heads(self.mixer_norm(x_BCD))
    old_BMD = jax.lax.stop_gradient(past.hidden)
    q, k, v = self.mixer.heads(self.mixer_norm(jnp.concatenate([old_BMD, x_BCD], axis=1)))
    return q[:, old_BMD.shape[1]:], k, v

  def attend(self, q_BCNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, past: Past | None,
             cell: Cell) -> jax.Array:
    """Attention of the segment over the past and itself, causal."""
    s, mask = self.settings, self.mask(past, cell)
    if s.position == 'rope':
      # Positions are counted from the segment's first slot: only differences matter.
      C, S = q_BCNH.shape[1], k_BSKH.shape[1]
      at = lambda low, high: rotary_angles(jnp.arange(low, high)[None], s.head_dim, s.rope_base)
      q_BCNH, k_BSKH = rotate(q_BCNH, at(0, C)), rotate(k_BSKH, at(C - S, C))
    if self.relative is not None:
      return relative.attention(q_BCNH, k_BSKH, v_BSKH, mask, *self.relative())
    q, k, v = cut_heads(q_BCNH, k_BSKH, v_BSKH)
    return attention(q, k, v, mask, scale=s.head_dim ** -0.5, implementation=s.attention)

  def mask(self, past: Past | None, cell: Cell) -> Intervals:
    """Of the keys that `project` gives."""
    return attention_mask(past, cell)

  def write(self, store: Any, k_BSKH: jax.Array, v_BSKH: jax.Array, past: Past | None, cell: Cell
            ) -> Any:
    """The store after what falls out of the short-term memory was written."""
    k, v, valid = (self.falling(x, past, cell) for x in (k_BSKH, v_BSKH, None))
    return self.store.write(store, k, v, valid)

  def falling(self, x_BS: jax.Array | None, past: Past | None, cell: Cell) -> jax.Array:
    """Of arrays [B, S, ...] over the past and the segment, the part [B, segment, ...] that the
    short-term memory will no longer hold; of None, which of those tokens there are."""
    middle = slice(self.front, self.front + self.settings.segment)
    if past is None:
      return cell.valid_BC[:, middle] if x_BS is None else x_BS[:, middle]
    if x_BS is None:
      x_BS = jnp.concatenate([there(past), cell.valid_BC], axis=1)
    M, own = past.hidden.shape[1], x_BS[:, past.hidden.shape[1]:][:, middle]
    return jnp.concatenate([x_BS[:, :M], own], axis=1)[:, :self.settings.segment]

  def leaving(self, x_BCD: jax.Array, past: Past | None, cell: Cell) -> tuple[jax.Array, jax.Array]:
    """`falling` of hidden states, and which of them there are. 0 where there is none; what the
    short-term memory held has no gradient, as in `project`."""
    if past is not None:
      old_BMD = jax.lax.stop_gradient(past.hidden).astype(x_BCD.dtype)
      x_BCD = jnp.concatenate([old_BMD, x_BCD], axis=1)
    valid_BC = self.falling(None, past, cell)
    return jnp.where(valid_BC[..., None], self.falling(x_BCD, past, cell), 0), valid_BC

  def remember(self, x_BCD: jax.Array, past: Past | None, cell: Cell) -> Past | None:
    """The short-term memory after this segment."""
    if past is None:
      return None
    own_BCD = x_BCD[:, self.front:self.front + self.settings.segment]
    M = past.hidden.shape[1]
    hidden_BMD = jnp.concatenate([past.hidden, own_BCD.astype(past.hidden.dtype)], axis=1)[:, -M:]
    return Past(hidden_BMD, jnp.minimum(past.count + own_BCD.shape[1], M))


def there(past: Past) -> jax.Array:
  """[B, M] bool: which slots of a short-term memory hold a token."""
  M = past.hidden.shape[1]
  return jnp.arange(M) >= M - past.count[:, None]


def falling_of_all(x_BTD: jax.Array, valid_BT: jax.Array, past: Past | None, segment: int
                   ) -> tuple[jax.Array, jax.Array]:
  """What falls out of the short-term memory during segments that follow each other, as many tokens as
  they have, and which of them there are; without one the segments themselves."""
  if past is None:
    return x_BTD, valid_BT
  T, M = valid_BT.shape[1], past.hidden.shape[1]
  # It is the row, M tokens late.
  old_BTD = jnp.concatenate([past.hidden.astype(x_BTD.dtype), x_BTD], axis=1)[:, :T]
  # What passed through the memory has no gradient, as in `project`; the rest is of the segment itself.
  passed_T1 = (np.arange(T) % segment < M)[:, None]
  old_BTD = jnp.where(passed_T1, jax.lax.stop_gradient(old_BTD), old_BTD)
  return old_BTD, jnp.concatenate([there(past), valid_BT], axis=1)[:, :T]


def attention_mask(past: Past | None, cell: Cell) -> Intervals:
  """Causal, over what the past holds and the segment's tokens; padding sees and is seen by nothing."""
  M = 0 if past is None else past.hidden.shape[1]
  slot_C = M + jnp.arange(cell.valid_BC.shape[1], dtype=jnp.int32)
  index_BC = jnp.where(cell.valid_BC, slot_C, -1)
  if past is None:
    return Intervals(start_BT=jnp.zeros_like(index_BC), end_BT=index_BC + 1, index_BT=index_BC)
  old_BM = jnp.where(there(past), jnp.arange(M, dtype=jnp.int32), -1)
  return Intervals(start_BT=jnp.zeros_like(index_BC), end_BT=index_BC + 1, index_BT=index_BC,
                   key_index_BS=jnp.concatenate([old_BM, index_BC], axis=1))


def gate_of(gate_N: jax.Array, kind: str) -> jax.Array:
  """How much of what a memory says enters each head, or the layer, float32."""
  return jax.nn.sigmoid(gate_N) if kind == 'sigmoid' else jnp.tanh(gate_N)


class RelativeBias(nnx.Module):
  """u, v and the keys of distances of Transformer-XL, section 3.3."""

  def __init__(self, settings: Settings, *, rngs: nnx.Rngs):
    s = self.settings = settings
    self.u_bias = param(rngs, constant(0.0), (s.num_heads, s.head_dim), ('heads', None))
    self.v_bias = param(rngs, constant(0.0), (s.num_heads, s.head_dim), ('heads', None))
    self.w_distance = param(rngs, normal(s.std), (s.dim, s.num_heads, s.head_dim),
                            ('embed', 'heads', None))

  def __call__(self) -> tuple[jax.Array, jax.Array, jax.Array]:
    return self.u_bias.get_value(), self.v_bias.get_value(), self.w_distance.get_value()


def relative_bias(settings: Settings, rngs: nnx.Rngs) -> RelativeBias:
  return RelativeBias(settings, rngs=rngs)
