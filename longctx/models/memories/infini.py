"""Infini-attention: each head's compressive memory beside its local attention, mixed by a gate.

  out = sigmoid(b) A_mem + (1 - sigmoid(b)) A_local        b: a number a head
  variant '' or 'delta': what the memory gets wrong is written; 'linear': all is added

Queries and keys meet the memory before they are turned by positions.
Source: arXiv:2404.07143; the mathematics: longctx/memory/infini.py.
Differs: with kv heads shared by groups of query heads, a group shares a memory; short_term > 0 writes
what falls out of it, short_term tokens later.
Held by: tests/test_models.py, tests/test_infini.py.

B batch  S segments or keys  C slots of a cell  N query heads  K kv heads  H head dim
"""

import jax
from flax import nnx

from longctx.errors import check_choice
from longctx.memory import infini
from longctx.models.memories.base import Block, Cost, Settings, Store


class InfiniStore(Store):
  """M and z of each kv head."""

  def __init__(self, settings: Settings, *, rngs: nnx.Rngs):
    del rngs   # it has no parameters: queries, keys and values are the attention's
    self.shape = settings.num_kv_heads, settings.head_dim
    self.delta = settings.variant != 'linear'

  def init_memory(self, batch_size: int) -> infini.State:
    return infini.empty(batch_size, *self.shape)

  def read(self, q_BCNH: jax.Array, memory: infini.State) -> jax.Array:
    return infini.read(memory, q_BCNH)

  def write(self, memory: infini.State, k_BSKH: jax.Array, v_BSKH: jax.Array, valid_BS: jax.Array
            ) -> infini.State:
    return infini.write(memory, k_BSKH, v_BSKH, valid_BS, delta=self.delta)

  def before(self, memory: infini.State, k_BSCKH: jax.Array, v_BSCKH: jax.Array,
             valid_BSC: jax.Array) -> tuple[infini.State, infini.State]:
    return infini.before(memory, k_BSCKH, v_BSCKH, valid_BSC, delta=self.delta)


class Infini(Block):
  dependency = 'P1'
  reads = ('variant', 'gate')

  @classmethod
  def cost(cls, settings: Settings) -> Cost:
    s = settings
    check_choice('model.memory_variant', s.variant, ('', 'delta', 'linear'))
    square = s.head_dim * (s.head_dim + 1)
    writes = s.num_kv_heads * square * (1 if s.variant == 'linear' else 2)
    return Cost(parameters=s.num_heads, matrices=0, flops=2.0 * (s.num_heads * square + writes),
                state=s.num_kv_heads * square)

  def __init__(self, settings: Settings, *, rngs: nnx.Rngs):
    super().__init__(settings, store=InfiniStore, rngs=rngs)
