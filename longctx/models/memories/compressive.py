"""The Compressive Transformer: what falls out of the short-term memory is kept, every c tokens as one.

  attention over   [compressed memory; short-term memory; segment]
  f_c              old hidden states -> compressed ones, c at a time
  its loss         | Attn(h, old) - Attn(h, f_c(old)) |^2, with Wq, Wk, Wv as they are
  variant          '' or 'conv': kernel and stride c; 'mean', 'max': of each number, nothing is learned
  memory_rate      c (3)
  memory_size      compressed slots (as many as short_term, as the paper has everywhere)

The loss is each layer's own: its gradient, times RECONSTRUCTION_WEIGHT, is added where a segment is whole
(models/memories/auxiliary.py), goes to f_c alone, and is all that f_c gets: compressed states enter
attention without gradient. It is a mean over the batch (of all microbatches), summed over layers and segments; Adam's rate
makes its weight nearly meaningless, but for the norm that clipping sees.
Positions count slots, as the paper's do: compressed slot i of m stands m - i before the short-term
memory, both for rope and for the relative bias, so that a slot's distance is not that of its tokens.
Reach of a layer: short_term + c memory_size tokens.
Can begin as the plain transformer: no. Attention over an empty memory is plain, but the memory fills.
Class P0: what is compressed is the layer's own input, so all segments' memories are made at once.
Source: arXiv:1911.05507; the mathematics: longctx/memory/compressive.py.
Differs: the layer's (models/memories/base.py); scores of the loss are divided by sqrt(H), as all others.
Held by: tests/test_models.py, tests/test_compressive.py.

B batch  S segments  C slots of a cell  M short_term  U compressed at once  D model
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longctx.errors import check, check_choice
from longctx.memory import compressive
from longctx.memory.compressive import CONV
from longctx.memory.cross_attention import attend
from longctx.models.layers import DTYPES, constant, normal, param
from longctx.models.memories.auxiliary import add_loss
from longctx.models.memories.base import Block, Cell, Cost, Memory, Past, Settings, there

RECONSTRUCTION_WEIGHT = 1.0


def sizes(settings: Settings) -> tuple[int, int]:
  """(compressed slots, tokens that make one)."""
  return settings.size or settings.short_term, int(settings.rate) or 3


class Compressive(Block):
  """Memory.store is a Past of compressed hidden states."""

  dependency = 'P0'
  reads = ('variant', 'size', 'rate')

  @classmethod
  def identity(cls, settings: Settings) -> bool:
    return False

  @classmethod
  def cost(cls, settings: Settings) -> Cost:
    s, (slots, rate) = settings, sizes(settings)
    check_choice('model.memory_variant', s.variant, ('', CONV, 'mean', 'max'))
    check(s.rate == int(s.rate), f'model.memory_rate={s.rate}: must be a whole number; so many tokens that '
          'fall out are kept as one')
    check(slots > 0, f'model.memory_size={s.size}: must be at least 1 where model.short_term='
          f'{s.short_term}; 0 means as many compressed slots as short_term')
    both = math.gcd(s.segment, s.short_term)
    fits = min((r for r in range(1, both + 1) if both % r == 0), key=lambda r: (abs(r - rate), r == 1))
    for name, tokens in (('segment', s.segment), ('short_term', s.short_term)):
      check(tokens % rate == 0, f'model.{name}={tokens}: must be a multiple of model.memory_rate='
            f'{f"0 ({rate} here)" if not s.rate else rate}; every {rate} tokens that fall out are kept as one; '
            + (f'set model.memory_rate={fits}' if fits > 1 else 'give both a common divisor'))
    heads, pairs = s.num_heads * s.head_dim, 2 * s.num_kv_heads * s.head_dim
    learned = s.variant in ('', CONV)
    flops = 2.0 * slots / s.segment * s.dim * pairs + 4.0 * heads * slots
    if learned:   # and learning: the old and the new are attended to once more
      share = 1 + 1 / rate
      flops += 2.0 * s.dim * (s.dim + heads + share * pairs) + 4.0 * heads * share * s.segment
    return Cost(parameters=(rate * s.dim + 1) * s.dim if learned else 0, matrices=0, flops=flops,
                state=slots * s.dim + 1)

  def __init__(self, settings: Settings, *, rngs: nnx.Rngs):
    super().__init__(settings, rngs=rngs)
    s = settings
    self.slots, self.rate = sizes(s)
    self.kind = s.variant or CONV
    # Of the size of a token: no projection back, but a hidden state like those beside it.
    self.w_compress = param(rngs, normal((self.rate * s.dim) ** -0.5), (self.rate, s.dim, s.dim),
                            (None, None, 'embed')) if self.kind == CONV else None
    self.b_compress = param(rngs, constant(0.0), (s.dim,), (None,)) if self.kind == CONV else None

  def init_store(self, batch_size: int) -> Past:
    return Past(jnp.zeros((batch_size, self.slots, self.settings.dim), DTYPES[self.settings.dtype]),
                jnp.zeros((batch_size,), jnp.int32))

  def mix(self, x_BCD: jax.Array, memory: Memory, cell: Cell) -> tuple[jax.Array, Memory]:
    past = joined(memory.store, memory.past)
    q, k, v = self.project(x_BCD, past)
    y_BCD = self.mixer.merged(self.attend(q, k, v, past, cell))
    all_BTD = x_BCD if memory.past is None else jnp.concatenate([memory.past.hidden, x_BCD], axis=1)
    old_BTD = jax.lax.stop_gradient(self.falling(all_BTD, memory.past, cell))
    valid_BT = self.falling(None, memory.past, cell)
    new_BUD, valid_BU = self.compress(old_BTD), compressive.compressed(valid_BT, self.rate)
    if self.kind == CONV:
      loss = self.reconstruction(x_BCD, old_BTD, valid_BT, new_BUD, valid_BU, cell)
      y_BCD = add_loss(y_BCD, loss, RECONSTRUCTION_WEIGHT)
    hidden_BMD = jnp.concatenate([memory.store.hidden, kept(new_BUD, memory.store)], axis=1)
    store = Past(hidden_BMD[:, -self.slots:],
                 jnp.minimum(memory.store.count + valid_BU.sum(1, dtype=jnp.int32), self.slots))
    return y_BCD, Memory(self.remember(x_BCD, memory.past, cell), store)

  def before(self, x_BSCD: jax.Array, memory: Memory, valid_BSC: jax.Array
             ) -> tuple[Memory, Memory]:
    (pasts, _), (after, _) = super().before(x_BSCD, memory, valid_BSC)
    B, S, C, D = x_BSCD.shape
    x_BTD, valid_BT, M = x_BSCD.reshape(B, S * C, D), valid_BSC.reshape(B, S * C), self.slots
    if memory.past is not None:
      x_BTD = jnp.concatenate([memory.past.hidden, x_BTD.astype(memory.past.hidden.dtype)], axis=1)
      valid_BT = jnp.concatenate([there(memory.past), valid_BT], axis=1)
    new_BUD = self.compress(jax.lax.stop_gradient(x_BTD[:, :S * C]))
    all_BUD = jnp.concatenate([memory.store.hidden, kept(new_BUD, memory.store)], axis=1)
    valid_BSU = compressive.compressed(valid_BT[:, :S * C], self.rate).reshape(B, S, -1)
    counts_BS = memory.store.count[:, None] + jnp.cumsum(valid_BSU.sum(2, dtype=jnp.int32), axis=1)
    counts_BS = jnp.minimum(jnp.concatenate([memory.store.count[:, None], counts_BS], axis=1), M)
    starts_S = np.arange(S) * (C // self.rate)
    stores = Past(all_BUD[:, starts_S[:, None] + np.arange(M)], counts_BS[:, :-1])
    return Memory(pasts, stores), Memory(after, Past(all_BUD[:, -M:], counts_BS[:, -1]))

  def compress(self, x_BTD: jax.Array) -> jax.Array:
    if self.kind != CONV:
      return compressive.compress(x_BTD, self.rate, self.kind)
    return compressive.compress(x_BTD, self.rate, CONV, self.w_compress.get_value(),
                                self.b_compress.get_value())

  def reconstruction(self, x_BCD: jax.Array, old_BTD: jax.Array, valid_BT: jax.Array,
                     new_BUD: jax.Array, valid_BU: jax.Array, cell: Cell) -> jax.Array:
    """How far attention over the compressed is from attention over the old; only `new` is learned."""
    graphdef, params = nnx.split((self.mixer_norm, self.mixer))
    # Copies: the layer's own parameters go on learning from the model's loss.
    norm, mixer = nnx.merge(graphdef, jax.lax.stop_gradient(params))
    q_BCNH, _, _ = mixer.heads(norm(jax.lax.stop_gradient(x_BCD)))
    def said(hidden_BSD, valid_BS):
      _, k, v = mixer.heads(norm(hidden_BSD.astype(x_BCD.dtype)))
      return attend(q_BCNH, k, v, valid_BS, self.settings.attention)
    return cell.parts * compressive.distance(said(old_BTD, valid_BT), said(new_BUD, valid_BU),
                                             cell.valid_BC.all(1))


def joined(store: Past, past: Past | None) -> Past:
  """Both memories as one: nothing is compressed before the short-term memory is full, so that the
  slots that hold something are the newest here too."""
  if past is None:
    return store
  return Past(jnp.concatenate([store.hidden, past.hidden], axis=1), store.count + past.count)


def kept(new_BUD: jax.Array, store: Past) -> jax.Array:
  """What enters the memory, in its type; stopped here too, so that a scan carries no tangents."""
  return jax.lax.stop_gradient(new_BUD).astype(store.hidden.dtype)
