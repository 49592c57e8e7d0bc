"""The Memorizing Transformer: heads look up the keys most like their queries among the last M tokens.

  out = g V_m + (1 - g) V_c      V_c: attention over the segment, V_m: over the `memory_top` keys found
                                 g: a number a head; queries and keys of length 1, times a learned scale
  memory_size   M, tokens kept (8192); memory_top: keys found (32)
  variant       '' or 'exact'; 'approximate': finds each of them with probability 0.95 (a TPU needs no sort
                of each block of keys then; exact elsewhere)

The paper has one such layer, at three quarters of the depth: model.memory_layers=(8,) of 12. Keys have
no position, and no gradient enters what is kept, nor goes to it from later segments. A segment looks up
before it is written, so no token finds itself.
What a layer keeps depends on its own input alone: class P0, all segments of a row look up at once in one
array of M + T tokens. Read one by one, training keeps a copy of the memory for each segment of a call.
Source: arXiv:2203.08913; google-research/meliad; the mathematics: longctx/memory/memorizing.py.
Differs: local attention has rotary positions (or Transformer-XL's) where the paper has T5's bias; the scale
and the length 1 are of the memory's queries and keys alone (the local ones have model.qk_norm); with kv heads
shared by groups of query heads, a group shares a memory; with short_term > 0 what falls out of it is written
(the paper writes a segment at once), so that no token is in both.
Held by: tests/test_models.py, tests/test_memorizing.py.

B batch  S keys  C slots of a cell  N query heads  K kv heads  H head dim
"""

import jax
import jax.numpy as jnp
from flax import nnx

from longctx.errors import check, check_choice
from longctx.memory import memorizing
from longctx.models.layers import DTYPES, constant, param, rows_where
from longctx.models.memories.base import Block, Cell, Cost, Memory, Past, Settings, Store


def sizes(settings: Settings) -> tuple[int, int]:
  """(tokens kept, keys found)."""
  return settings.size or 8192, settings.top or 32


class MemorizingStore(Store):
  """The last tokens' keys and values of each kv head."""

  def __init__(self, settings: Settings, *, rngs: nnx.Rngs):
    slots, self.top = sizes(settings)
    self.shape = slots, settings.num_kv_heads, settings.head_dim, DTYPES[settings.dtype]
    self.approximate = settings.variant == 'approximate'
    self.scale = param(rngs, constant(1.0), (settings.num_heads,), ('heads',))

  def init_memory(self, batch_size: int) -> memorizing.State:
    return memorizing.empty(batch_size, *self.shape)

  def read(self, q_BCNH: jax.Array, memory: memorizing.State | memorizing.Windows) -> jax.Array:
    return memorizing.read(memory, q_BCNH, self.scale.get_value(), self.top,
                           approximate=self.approximate)

  def write(self, memory: memorizing.State, k_BSKH: jax.Array, v_BSKH: jax.Array,
            valid_BS: jax.Array) -> memorizing.State:
    if isinstance(memory, memorizing.Windows):
      return memory   # what comes after each is known: it is the next window
    return memorizing.write(memory, k_BSKH, v_BSKH, valid_BS)

  def when_read(self, memory: memorizing.State | memorizing.Windows, out_BCNH: jax.Array
                ) -> memorizing.State | memorizing.Windows:
    return memorizing.when_read(memory, out_BCNH) if isinstance(memory, memorizing.State) else memory

  def before(self, memory: memorizing.State, k_BSCKH: jax.Array, v_BSCKH: jax.Array,
             valid_BSC: jax.Array) -> tuple[memorizing.Windows, memorizing.State]:
    return memorizing.before(memory, k_BSCKH, v_BSCKH, valid_BSC)


class Memorizing(Block):
  """Can begin as the plain layer: model.gate='tanh' is closed at first."""

  dependency = 'P0'
  deals = False   # one line of keys for all segments
  reads = ('variant', 'size', 'top', 'gate')

  @classmethod
  def cost(cls, settings: Settings) -> Cost:
    s, (slots, top) = settings, sizes(settings)
    check_choice('model.memory_variant', s.variant, ('', 'exact', 'approximate'))
    check(top <= slots, f'model.memory_top={top}: must be at most model.memory_size={slots}; so many '
          'keys are looked for among so many')
    # Of a full memory. The search has no backward pass, but is counted as if it had one.
    return Cost(parameters=2 * s.num_heads, matrices=0,
                flops=2.0 * s.num_heads * s.head_dim * (slots + 2 * top),
                state=2 * slots * s.num_kv_heads * s.head_dim + 1)

  def __init__(self, settings: Settings, *, rngs: nnx.Rngs):
    super().__init__(settings, store=MemorizingStore, rngs=rngs)

  # A cell that fills no slot touches none, whatever M is: its counter alone says what stands there.

  def begin(self, new_B: jax.Array, fresh: Memory, memory: Memory) -> Memory:
    store = memory.store._replace(written=jnp.where(new_B, 0, memory.store.written))
    return Memory(rows_where(new_B, fresh.past, memory.past), store)

  def keep(self, kept_B: jax.Array, after: Memory, memory: Memory) -> Memory:
    written_B = jnp.where(kept_B, after.store.written, memory.store.written)
    return Memory(rows_where(kept_B, after.past, memory.past), after.store._replace(written=written_B))

  def write(self, store: memorizing.State | memorizing.Windows, k_BSKH: jax.Array, v_BSKH: jax.Array,
            past: Past | None, cell: Cell) -> memorizing.State | memorizing.Windows:
    k, v, valid_BS = (self.falling(x, past, cell) for x in (k_BSKH, v_BSKH, None))
    if cell.kept_B is not None:
      # What another document left is cleared once, by the first segment that is kept.
      store = memorizing.clear(store, cell.kept_B & (cell.number_B == 0))
      valid_BS &= cell.kept_B[:, None]
    return self.store.write(store, k, v, valid_BS)
