"""A decoder that reads documents in segments and remembers them: short term exactly, long term by kind.

Embedding, layers of models/memories, a last norm, and logits by a table that may be tied. Documents of
any length, in calls of any length: models/segments.py. Whole rows from their begin (no state, no
documents inside) are read in the order that the memory's dependency class allows, model.schedule:

    sequential   segment by segment, each through all layers
    parallel     layer by layer, each over all segments at once (P0 and P1)
    wavefront    layers and segments in diagonals, all cells of one side by side (P2)

Positions are counted from each segment's first token, and mean differences only: `positions_BT` is not
read. Held by: tests/test_models.py, tests/test_memory_laws.py, tests/test_schedules.py.

B batch  T tokens  S segments  C tokens of one  D model  V vocab
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from longctx import watch
from longctx.errors import check
from longctx.models import schedules, segments
from longctx.models.decoder_config import REMAT
from longctx.models.layers import (
  DTYPES,
  Embedding,
  RMSNorm,
  dropout,
  normal,
  of_each,
  param,
  rows_where,
)
from longctx.models.memories import MEMORIES
from longctx.models.memories.base import Cell, gate_of
from longctx.models.memory_config import Config


class Memory(NamedTuple):
  """All that a model remembers of whole segments; batch first."""

  tokens: Any            # [B, m, D] what memory tokens said last, where they carry it; else ()
  layers: tuple[Any, ...]


class MemoryDecoder(nnx.Module):
  """hidden, state = decoder(tokens, state, ...); logits = decoder.logits(hidden)."""

  state_grows = False

  def __init__(self, config: Config, *, rngs: nnx.Rngs):
    config = self.config = config.resolved(config.vocab_size)
    settings = config.settings()
    self.embedding = Embedding(config.vocab_size, config.embed_dim, config.init_std, rngs=rngs)
    self.front, self.back = MEMORIES[config.long_term].extra_tokens(settings)
    self.tokens = (param(rngs, normal(config.init_std), (max(self.front, self.back), config.embed_dim),
                         (None, 'embed')) if self.front or self.back else None)
    self.blocks = nnx.List([MEMORIES[config.kind(i)](settings, rngs=nnx.Rngs(rngs.params()))
                            for i in range(config.num_layers)])
    self.norm = RMSNorm(config.embed_dim, config.norm_epsilon, rngs=rngs)
    self.head = (None if config.tied else
                 Embedding(config.vocab_size, config.embed_dim, config.init_std, rngs=rngs))

  @property
  def dependency(self) -> str:
    return max(MEMORIES[kind].dependency for kind in self.config.kinds())

  def fresh(self, batch_size: int) -> Memory:
    """What a document begins with."""
    tokens = ()
    if self.front:
      tokens = jnp.broadcast_to(self.tokens.get_value(), (batch_size, *self.tokens.get_value().shape))
    return Memory(tokens, tuple(block.init_memory(batch_size) for block in self.blocks))

  def begin(self, new_B: jax.Array, memory: Memory) -> Memory:
    """What cells read: the memory, and of new rows what a document begins with."""
    fresh = self.fresh(len(new_B))
    return Memory(rows_where(new_B, fresh.tokens, memory.tokens), tuple(
        block.begin(new_B, *pair) for block, *pair in zip(self.blocks, fresh.layers, memory.layers)))

  def keep(self, kept_B: jax.Array, after: Memory, memory: Memory) -> Memory:
    """The memory after cells, of those that are kept."""
    return Memory(rows_where(kept_B, after.tokens, memory.tokens), tuple(
        block.keep(kept_B, *pair) for block, *pair in zip(self.blocks, after.layers, memory.layers)))

  def init_state(self, batch_size: int, capacity: int = 0) -> segments.State:
    """An empty state; `capacity` means nothing to a state that does not grow.

    It holds no parameter: the walk gives what a document begins with, as it is learned by then.
    """
    del capacity
    graphdef, params = nnx.split(self)
    memory = jax.eval_shape(lambda params: nnx.merge(graphdef, params).fresh(batch_size), params)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), memory)
    return segments.new_state(batch_size, self.config.segment, zeros)

  def __call__(self, tokens_BT: jax.Array, state: segments.State | None = None, *,
               positions_BT: jax.Array | None = None, segment_ids_BT: jax.Array | None = None,
               valid_BT: jax.Array | None = None, dropout_key: jax.Array | None = None,
               aligned: bool = False) -> tuple[jax.Array, segments.State | None]:
    """Hidden states [B, T, D] in the compute type, and the state after these tokens.

    `aligned` promises that each row is of one document, from the first token of a segment of it on, a
    multiple of T of them (data.align): whole segments, which are read in the order of model.schedule.
    """
    del positions_BT
    config, B = self.config, tokens_BT.shape[0]
    if state is None and segment_ids_BT is None and valid_BT is None:
      return self._whole(tokens_BT, dropout_key), None
    before = self.init_state(B) if state is None else state
    if aligned:
      hidden_BTD, after = self._aligned(tokens_BT, before, segment_ids_BT, dropout_key)
      return hidden_BTD, None if state is None else after
    hidden_BTD, after = segments.walk(
        self._read(), self.begin, config.segment, config.embed_dim, DTYPES[config.dtype], tokens_BT,
        before, segment_ids_BT, valid_BT, keep=self.keep, truncate=config.truncate, key=dropout_key,
        remat=REMAT[config.remat])
    return hidden_BTD, None if state is None else after

  def gates(self) -> dict[int, jax.Array]:
    """How much of what its memory says enters each head, or the layer, by layer; of those that have a gate."""
    return {i: gate_of(block.gate.get_value(), self.config.gate)
            for i, block in enumerate(self.blocks) if block.gate is not None}

  # One cell.

  def _read(self) -> segments.Read:
    """The function that reads a cell."""
    graphdef, params = nnx.split(self)
    def read(params, tokens_BC, cell, memory, key):
      model = nnx.merge(graphdef, params)
      x_BCD, cell = model.enter(tokens_BC, cell, memory.tokens, key)
      layers = []
      for i, (block, before) in enumerate(zip(model.blocks, memory.layers)):
        watch.tell('layer', index=i)
        x_BCD, after = block(x_BCD, before, cell, None if key is None else jax.random.fold_in(key, i))
        layers.append(after)
      hidden_BCD, tokens = model.leave(x_BCD)
      return hidden_BCD, Memory(tokens, tuple(layers))
    return functools.partial(read, params)

  def enter(self, tokens_BC: jax.Array, cell: Cell, carried: Any, key: jax.Array | None
            ) -> tuple[jax.Array, Cell]:
    """The first layer's input, with the memory's own tokens before and after those of the segment."""
    config, B = self.config, tokens_BC.shape[0]
    x_BCD = self.embedding(tokens_BC, DTYPES[config.dtype])
    if key is not None:
      own = of_each(lambda key: jax.random.fold_in(key, config.num_layers), key)
      x_BCD = dropout(x_BCD, config.dropout, own)
    if not self.front and not self.back:
      return x_BCD, cell
    own = (carried if self.front else
           jnp.broadcast_to(self.tokens.get_value(), (B, *self.tokens.get_value().shape)))
    own_BMD = own.astype(x_BCD.dtype)
    x_BCD = jnp.concatenate([own_BMD[:, :self.front], x_BCD, own_BMD[:, :self.back]], axis=1)
    valid_BC = jnp.pad(cell.valid_BC, ((0, 0), (self.front, self.back)), constant_values=True)
    return x_BCD, cell._replace(valid_BC=valid_BC)

  def leave(self, x_BCD: jax.Array) -> tuple[jax.Array, Any]:
    """(hidden states of the segment's tokens, what memory tokens carry on) of the last layer's output."""
    C = x_BCD.shape[1] - self.front - self.back
    x_BCD = self.norm(x_BCD)   # of what is carried too: the residual would grow with every segment
    carried = x_BCD[:, self.front + C:].astype(jnp.float32) if self.front else ()
    return x_BCD[:, self.front:self.front + C], carried

  # Whole rows.

  def schedule(self) -> str:
    """The order in which whole rows are read."""
    if self.config.schedule != 'auto':
      return self.config.schedule
    return 'parallel' if self.dependency in ('P0', 'P1') else 'sequential'

  def _whole(self, tokens_BT: jax.Array, key: jax.Array | None) -> jax.Array:
    B, T = tokens_BT.shape
    C = self.config.segment
    S = -(-T // C)
    tokens_BSC = jnp.pad(tokens_BT, ((0, 0), (0, S * C - T))).reshape(B, S, C)
    valid_BSC = jnp.broadcast_to((jnp.arange(S * C) < T).reshape(S, C), (B, S, C))
    hidden_BSCD, _ = self.read_segments(tokens_BSC, valid_BSC, jnp.zeros((B,), jnp.int32),
                                        self.fresh(B), key, every=0)
    return hidden_BSCD.reshape(B, S * C, -1)[:, :T]

  def _aligned(self, tokens_BT: jax.Array, state: segments.State, segment_ids_BT: jax.Array,
               key: jax.Array | None) -> tuple[jax.Array, segments.State]:
    (B, T), C = tokens_BT.shape, self.config.segment
    check(T % C == 0, f'model.segment={C}: must divide the {T} tokens of an aligned row')
    new_B = segment_ids_BT[:, 0] != state.segment
    number_B = jnp.where(new_B, 0, state.number)
    memory = rows_where(number_B == 0, self.fresh(B), state.memory)
    tokens_BSC = tokens_BT.reshape(B, -1, C)
    valid_BSC = (segment_ids_BT == segment_ids_BT[:, :1]).reshape(tokens_BSC.shape)   # padding ends a row
    hidden_BSCD, memory = self.read_segments(tokens_BSC, valid_BSC, number_B, memory, key, every=T // C)
    after = state._replace(number=number_B + T // C, segment=segment_ids_BT[:, 0], memory=memory)
    return hidden_BSCD.reshape(B, T, -1), after

  def read_segments(self, tokens_BSC: jax.Array, valid_BSC: jax.Array, number_B: jax.Array,
                    memory: Memory, key: jax.Array | None = None, schedule: str = '', every: int = 1
                    ) -> tuple[jax.Array, Memory]:
    """Segments of one document a row that follow each other, after `number_B` others.

    The segment driver: hidden states [B, S, C, D] and the memory after the last segment, which must
    be whole if the memory is to be read again. `every` promises that number_B are multiples of it, or
    all 0.
    """
    order = schedule or self.schedule()
    truncate, S = self.config.truncate, tokens_BSC.shape[1]
    if order == 'parallel' and truncate and not schedules.cuts_at_groups(S, truncate, every):
      order = 'sequential'
    return getattr(schedules, order)(self, tokens_BSC, valid_BSC, number_B, memory, key)

  def check_merge(self, *tokens: int) -> None:
    """ConfigError where texts of so many tokens cannot be added: `merge_states` is no sum then."""
    c = self.config
    why = ''
    if c.long_term != 'infini' or c.memory_variant != 'linear':
      why = (f'model.long_term={c.long_term!r}, model.memory_variant={c.memory_variant!r}: is no '
             "plain sum over what was read; only infini's 'linear' is")
    elif c.short_term:
      why = (f'model.short_term={c.short_term}: it holds the last tokens of one text, and two have '
             'no common last; only 0 adds')
    check(not why, f'merge: {why}. Read both texts into one context')
    for count in tokens:
      over = count % c.segment
      check(not over, f'merge: a text of {count:,} tokens ends {over} tokens into a segment of '
            f'{c.segment}, and a segment is remembered when it is whole; read {c.segment - over} '
            'tokens more into it')

  def merge_states(self, a: segments.State, b: segments.State) -> segments.State:
    """The state after two texts, each read from an empty one: what follows reads the sum of both.

    Exact for Infini-attention's linear memory, M and z. In one layer it is the state after one text
    and then the other; above it, the layers below read each text without the other.
    """
    self.check_merge(*(int(count) for state in (a, b) for count in state.count))
    # Before its first whole segment a state's memory means nothing.
    none = jax.tree.map(jnp.zeros_like, a.memory)
    known = [rows_where(state.number > 0, state.memory, none) for state in (a, b)]
    return a._replace(number=a.number + b.number, segment=jnp.maximum(a.segment, b.segment),
                      memory=jax.tree.map(jnp.add, *known))

  def output_embedding_VD(self) -> jax.Array:
    return (self.embedding if self.head is None else self.head).table.get_value()

  def logits(self, hidden_BTD: jax.Array) -> jax.Array:
    """float32 logits [B, T, V]."""
    table = self.output_embedding_VD().astype(hidden_BTD.dtype)
    return jnp.einsum('BTD,VD->BTV', hidden_BTD, table, preferred_element_type=jnp.float32)
