"""Associative Recurrent Memory Transformer: memory tokens at a segment's end write a memory in each layer.

  x <- x + read(x W_query)                  every token, before the layer; nothing in a first segment
  y = layer([x; mem])                       mem: m learned tokens, the last of the segment
  write keys y_mem W_key, values y_mem W_value, beta sigmoid(y_mem W_beta)

Tokens of the segment never see the memory tokens. With short_term the memory tokens see, in every layer,
what falls out of the window and nothing of what stays, so that a token is written when it leaves the
window and no sooner; they are as many for any window, and say nothing while nothing falls. W_value begins
at 0: so does what is read, and the model begins as the plain transformer.
memory_tokens: m (0: 16); memory_width: of queries and keys (0: 64).
Source: arXiv:2407.04841; the mathematics: longctx/memory/armt.py.
Differs: published without a window; W_beta has no bias; the attention's positions are counted by slot, so
that memory tokens stand behind a whole segment wherever an unfinished one ends (what they say is dropped
there).
Held by: tests/test_models.py, tests/test_armt.py, tests/test_truncation.py.

B batch  C slots of a cell  M memory tokens  A width  D model
"""

import jax
import jax.numpy as jnp
from flax import nnx

from longctx.attention import Intervals
from longctx.memory import armt
from longctx.models.layers import constant, linear, normal, param
from longctx.models.memories.base import (
  Block,
  Cell,
  Cost,
  Memory,
  Past,
  Settings,
  attention_mask,
)

TOKENS, WIDTH = 16, 64


class ARMT(Block):
  dependency = 'P2'
  reads = ('tokens', 'width')

  @staticmethod
  def extra_tokens(settings: Settings) -> tuple[int, int]:
    return 0, settings.tokens or TOKENS

  @classmethod
  def cost(cls, settings: Settings) -> Cost:
    D, A, C = settings.dim, settings.width or WIDTH, settings.segment
    M, F = settings.tokens or TOKENS, armt.features(A)
    look_up = F * (D + 1)
    written = D * (A + D + 1) + 2 * look_up        # of a memory token: k, v, beta; old, W and z
    extra = M / C * (D * A + look_up + written)    # memory tokens read as others do
    return Cost(parameters=D * (2 * A + D + 1), matrices=D * A, flops=2.0 * (look_up + extra),
                state=look_up)

  def __init__(self, settings: Settings, *, rngs: nnx.Rngs):
    super().__init__(settings, rngs=rngs)
    D, self.width = settings.dim, settings.width or WIDTH
    self.w_query = param(rngs, normal(settings.std), (D, self.width), ('embed', None))
    self.w_key = param(rngs, normal(settings.std), (D, self.width), ('embed', None))
    self.w_value = param(rngs, constant(0.0), (D, D), ('embed', None))
    self.w_beta = param(rngs, normal(settings.std), (D, 1), ('embed', None))

  def init_store(self, batch_size: int) -> armt.State:
    return armt.empty(batch_size, self.width, self.settings.dim)

  def __call__(self, x_BCD: jax.Array, memory: Memory, cell: Cell, key: jax.Array | None
               ) -> tuple[jax.Array, Memory]:
    times = lambda x, w: linear(x, w.get_value())
    x_BCD += armt.read(memory.store, times(x_BCD, self.w_query)).astype(x_BCD.dtype)
    x_BCD, after = super().__call__(x_BCD, memory, cell, key)
    own_BMD = x_BCD[:, -self.back:]
    beta_BM1 = jax.nn.sigmoid(times(own_BMD, self.w_beta).astype('float32'))
    store = armt.write(memory.store, times(own_BMD, self.w_key), times(own_BMD, self.w_value), beta_BM1)
    if memory.past is not None:
      fell_B = self.falling(None, memory.past, cell).any(1)
      store = armt.State(jnp.where(fell_B[:, None, None], store.W, memory.store.W),
                         jnp.where(fell_B[:, None], store.z, memory.store.z))
    return x_BCD, after._replace(store=store)

  def mask(self, past: Past | None, cell: Cell) -> Intervals:
    """With a window its memory tokens have the first indices, the last of them 0, before those of all
    other slots in their order: token j's interval ends where what stays in the window begins."""
    plain, m = attention_mask(past, cell), self.back
    if past is None:
      return plain
    behind = lambda index: jnp.where(index >= 0, index + m, -1)[:, :-m]
    own_BM = jnp.broadcast_to(jnp.arange(m - 1, -1, -1, dtype=jnp.int32), (len(plain.index_BT), m))
    index_BC = behind(plain.index_BT)
    with_own = lambda tokens: jnp.concatenate([tokens, own_BM], axis=1)
    return Intervals(
        start_BT=with_own(jnp.full_like(index_BC, m)), index_BT=with_own(index_BC),
        end_BT=jnp.concatenate([index_BC + 1, jnp.full_like(own_BM, m + self.settings.segment)], axis=1),
        key_index_BS=with_own(behind(plain.keys_BS)))
