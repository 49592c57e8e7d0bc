"""Memory Caching: a recurrent layer in attention's place that keeps its past segments' memories.

  q, k, v = silu(x W_q), silu(x W_k), silu(x W_v)      q of length H^-1/2, k of length 1
  a segment's memory, from 0        delta   S_t = S_{t-1} + beta_t k_t^T (v_t - k_t S_{t-1})
                                    linear  S_t = S_{t-1} + k_t^T v_t
  y = rmsnorm(what S_t and the cached memories say) W_out

memory_variant names the recurrence, 'delta' ('') or 'linear' as above or a mixer of models/mixers
(cached_mixer.py), and how memories are put together: by gates, or with '_residual' behind it by addition.
memory_size: segments cached (0: 32); memory_top: how many of them a token selects (0: all; gates only);
memory_width: of a mixer's keys, or of the mixer where it has none (0: as published for it).

With short_term there is attention beside it, over the window and the segment; what falls out of the window,
a segment's length at a time, makes a memory, and the cached memories alone are read:
y = Attn(x) + rmsnorm(what the cached memories say) W_out. So it can begin as the plain layer: with
model.gate='tanh', which shuts what is added (models/memories/base.py), and not by the gates of its own.

Source: arXiv:2602.24281; the mathematics: longctx/memory/caching.py.
Differs: the paper's other backbones are deep memories, which are not wrapped, nor are the cells of
models/recurrent (their state has no reading by a query); beta = sigmoid(x W_beta) does not forget, and
'delta' and 'linear' have no convolution. The gate's pooled inputs are normed. No window is published.
Held by: tests/test_models.py, tests/test_memory_caching.py, tests/test_cached_mixer.py,
tests/test_truncation.py.

B batch  C slots of a cell  R segments  N heads  H head dim  D model  K inputs that a mixer looks back at
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longctx.errors import check, check_choice
from longctx.memory import caching
from longctx.models.layers import DTYPES, RMSNorm, linear, normal, param
from longctx.models.memories import cached_mixer
from longctx.models.memories.base import (
  Block,
  Cell,
  Cost,
  Memory,
  Past,
  Settings,
  falling_of_all,
  there,
)
from longctx.models.memories.cached_mixer import CachedMixer
from longctx.models.memories.titans import check_no_attention
from longctx.models.mixers import MIXERS
from longctx.models.mixers.qkv import merge, unit
from longctx.recurrence import decay, delta

SLOTS = 32
WRITERS = ('delta', 'linear', *MIXERS)
VARIANTS = (*WRITERS, *(f'{writer}_residual' for writer in WRITERS))


class Heard(NamedTuple):
  """What a segment says."""

  y: jax.Array       # [B, C, D], what is added to the residual
  S: Any             # the recurrence's state at its end, from nothing
  mean: jax.Array    # [B, D] float32, of its inputs


class MemoryCaching(Block):
  """Memory.store is a caching.State."""

  dependency = 'P1'
  deals = False   # one line of states for all segments
  reads = ('variant', 'size', 'width', 'top', 'gate')

  @classmethod
  def cost(cls, settings: Settings) -> Cost:
    s, slots = settings, settings.size or SLOTS
    check_choice('model.memory_variant', s.variant, ('', *VARIANTS))
    check_no_attention(s, "model.long_term='memory_caching'")
    writer, gated = choices(s)
    check(gated or not s.top, f'model.memory_top={s.top}: is not read with model.memory_variant='
          f'{s.variant!r}, which adds up all memories; set {writer!r}')
    check(s.top <= slots, f'model.memory_top={s.top}: must be at most model.memory_size={slots}')
    check(not s.width or writer in MIXERS, f'model.memory_width={s.width}: is not read with '
          f'model.memory_variant={s.variant!r}, whose heads are the model\'s; leave it out')
    D, N, H = s.dim, s.num_heads, s.head_dim
    check(writer not in MIXERS or s.short_term or H == D // N, f'model.head_dim={H}: is not read with '
          f'model.memory_variant={s.variant!r} without model.short_term: there is no attention, and the '
          "mixer's heads are model.memory_width wide; set that, and leave model.head_dim out")
    if writer in MIXERS:
      mixer, K = cached_mixer.cost(writer, s), cached_mixer.looks_back(writer, s)
      parameters, matrices, kept = mixer.parameters, mixer.matrices, mixer.state - mixer.tail
      tail, said = K * D + 1 if K else 0, kept
      own = mixer.flops + (2.0 * matrices if s.short_term else 0)   # what falls goes through it too
    else:
      matrices = 4 * D * N * H + (D * N if writer == 'delta' else 0)
      parameters, kept, tail, said = matrices + H, N * H * H, 0, N * H
      own = (delta.flops(H, H, 'chunked', 0, channels=False) * N if writer == 'delta' else
             decay.flops(N, N, H, H, by_channel=False, form='chunked', chunk=0))
    cached = slots * (kept + said + D) if gated else kept
    gate = D * D if gated else 0
    return Cost(parameters=parameters + gate + int(s.gate == 'tanh'), matrices=matrices + gate, flops=own + 2.0 * cached,
                state=slots * (kept + D) + 1 + tail, attends=s.short_term > 0)

  def __init__(self, settings: Settings, *, rngs: nnx.Rngs):
    super().__init__(settings, rngs=rngs)
    s = settings
    D, N, H = s.dim, s.num_heads, s.head_dim
    writer, gated = choices(s)
    self.cached = CachedMixer(writer, s, rngs=rngs) if writer in MIXERS else None
    self.looks_back = cached_mixer.looks_back(writer, s) if writer in MIXERS else 0
    if self.cached is None:
      self.w_qkv = param(rngs, normal(s.std), (D, 3, N, H), ('embed', None, 'heads', None))
      self.w_beta = (param(rngs, normal(s.std), (D, N), ('embed', 'heads')) if writer == 'delta' else
                     None)
    self.w_u = param(rngs, normal(s.std), (D, D), ('embed', None)) if gated else None
    if self.cached is None:
      self.out_norm = RMSNorm(H, s.norm_epsilon, rngs=rngs)
      self.w_out = param(rngs, normal(s.out_std), (N, H, D), ('heads', None, 'embed'))

  def init_store(self, batch_size: int) -> caching.State:
    s, K = self.settings, self.looks_back
    S = (jnp.zeros((1, s.num_heads, s.head_dim, s.head_dim)) if self.cached is None else
         self.cached.empty(1))
    tail = Past(jnp.zeros((batch_size, K, s.dim), DTYPES[s.dtype]),
                jnp.zeros((batch_size,), jnp.int32)) if K else None
    return caching.empty(batch_size, s.size or SLOTS, S, s.dim, tail)

  def mix(self, x_BCD: jax.Array, memory: Memory, cell: Cell) -> tuple[jax.Array, Memory]:
    past, cache = memory
    if past is None:
      own = self.hear(x_BCD, cell.valid_BC, cache.tail, cache)
      return own.y, Memory(None, self.push(cache, own, x_BCD, cell.valid_BC))
    q, k, v = self.project(x_BCD, past)
    near_BCD = self.mixer.merged(self.attend(q, k, v, past, cell))
    far_BCD = self.hear(x_BCD, cell.valid_BC, last(cache.tail, past), cache, apart=True).y
    old_BCD, valid_BC = self.leaving(x_BCD, past, cell)
    cache = self.push(cache, self.hear(old_BCD, valid_BC, cache.tail, None), old_BCD, valid_BC)
    return near_BCD + self.let_in(far_BCD), Memory(self.remember(x_BCD, past, cell), cache)

  def push(self, cache: caching.State | caching.Windows, heard: Heard, x_BCD: jax.Array,
           valid_BC: jax.Array) -> caching.State | caching.Windows:
    """The cache after a segment."""
    if isinstance(cache, caching.Windows):
      return cache   # what comes after each is known: it is the next window
    after = caching.push(cache, heard.S, heard.mean, valid_BC.any(1))
    return after._replace(tail=tails(cache.tail, x_BCD, valid_BC, 1)[1])

  def before(self, x_BSCD: jax.Array, memory: Memory, valid_BSC: jax.Array
             ) -> tuple[Memory, Memory]:
    (pasts, _), (past, _) = super().before(x_BSCD, memory, valid_BSC)
    cache, (B, S, C, D) = memory.store, x_BSCD.shape
    rows = lambda x: x.reshape(B * S, *x.shape[2:])
    x_BTD, valid_BT = falling_of_all(x_BSCD.reshape(B, S * C, D), valid_BSC.reshape(B, S * C),
                                     memory.past, C)
    x_BTD = jnp.where(valid_BT[..., None], x_BTD, 0)
    tails_S, tail = tails(cache.tail, x_BTD, valid_BT, S)
    heard = self.hear(x_BTD.reshape(B * S, C, D), valid_BT.reshape(B * S, C),
                      jax.tree.map(rows, tails_S), None)
    segments = lambda x: x.reshape(B, S, *x.shape[1:])
    befores, after = caching.before(cache, jax.tree.map(segments, heard.S), segments(heard.mean),
                                    valid_BT.reshape(B, S, C).any(2))
    befores = dataclasses.replace(befores, tail=tails_S)
    return Memory(pasts, befores), Memory(past, after._replace(tail=tail))

  def hear(self, x_BCD: jax.Array, valid_BC: jax.Array, left: Past | None,
           cache: caching.State | caching.Windows | None, apart: bool = False) -> Heard:
    """A segment read from an empty memory, beside those of the cache, if one is given; `apart`: with
    nothing of its own. `left`: the inputs before it."""
    u_BCD = self.mixer_norm(x_BCD)
    alone = self.rule(u_BCD, valid_BC) if self.cached is None else None
    mean_BCD = caching.running_mean(u_BCD, valid_BC)
    gates = own = None
    if self.w_u is not None and cache is not None:
      gates = caching.gates(cache, linear(u_BCD, self.w_u.get_value()), mean_BCD, self.settings.top)
      gates, own = gates[..., :-1], gates[..., -1]

    def together(near, far):
      if apart:
        return jnp.broadcast_to(far, near.shape)
      near = near.astype(jnp.float32)
      return far + (near if own is None else near * own.reshape(*own.shape, *[1] * (near.ndim - 2)))

    if alone is not None:
      q_BCNH, out_BCNH, S = alone
      if cache is not None:
        out_BCNH = together(out_BCNH, caching.read(cache, q_BCNH, gates))
      out_BCNH = self.out_norm(out_BCNH).astype(x_BCD.dtype)
      return Heard(merge(out_BCNH, self.w_out.get_value()), S, mean_BCD[:, -1])

    def speak(near, read):
      return near if cache is None else together(near, caching.weigh(cache, read, gates))

    around = None if left is None else (self.mixer_norm(left.hidden.astype(x_BCD.dtype)), there(left))
    return Heard(*self.cached(u_BCD, valid_BC, around, speak), mean_BCD[:, -1])

  def rule(self, u_BCD: jax.Array, valid_BC: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The delta rule, or the sum: (q, what S_t says, S at the segment's end)."""
    B, C, D = u_BCD.shape
    w_qkv = self.w_qkv.get_value()
    N, H = w_qkv.shape[2:]
    qkv = jax.nn.silu(linear(u_BCD, w_qkv.reshape(D, -1)).reshape(B, C, 3, N, H))
    q, k = ((scale * unit(qkv[:, :, i])).astype(u_BCD.dtype) for i, scale in ((0, H ** -0.5), (1, 1.0)))
    v = qkv[:, :, 2]
    if self.w_beta is None:
      kernel, inputs = decay.Decay(), decay.Inputs(q, k, v, None, valid_BT=valid_BC)
    else:
      beta_BCN = jax.nn.sigmoid(linear(u_BCD, self.w_beta.get_value()).astype(jnp.float32))
      kernel, inputs = delta.Delta(), delta.Inputs(q, k, v, beta_BCN, None, valid_BT=valid_BC)
    return q, *kernel.finish(kernel.prepare(inputs), jnp.zeros((B, N, H, H), jnp.float32))


def last(tail: Past | None, past: Past) -> Past | None:
  """The inputs before a segment: of the window and what fell out of it last, as many as `tail` has."""
  if tail is None:
    return None
  K = tail.hidden.shape[1]
  old_BMD = jax.lax.stop_gradient(past.hidden)   # as all that reads the window
  return Past(jnp.concatenate([tail.hidden, old_BMD], axis=1)[:, -K:],
              jnp.minimum(tail.count + past.count, K))


def tails(tail: Past | None, x_BTD: jax.Array, valid_BT: jax.Array, segments: int
          ) -> tuple[Past | None, Past | None]:
  """(the inputs before each of so many segments side by side in a row; those after it)."""
  if tail is None:
    return None, None
  K, C = tail.hidden.shape[1], x_BTD.shape[1] // segments
  all_BTD = jnp.concatenate([tail.hidden, x_BTD.astype(tail.hidden.dtype)], axis=1)
  hidden_BSKD = all_BTD[:, np.arange(segments + 1)[:, None] * C + np.arange(K)]
  new_BS = jnp.cumsum(valid_BT.reshape(len(valid_BT), segments, C).sum(2, dtype=jnp.int32), axis=1)
  count_BS = jnp.minimum(tail.count[:, None] + jnp.pad(new_BS, ((0, 0), (1, 0))), K)
  return Past(hidden_BSKD[:, :-1], count_BS[:, :-1]), Past(hidden_BSKD[:, -1], count_BS[:, -1])


def choices(settings: Settings) -> tuple[str, bool]:
  """(the recurrence, whether memories are put together by gates)."""
  variant = settings.variant or WRITERS[0]
  writer = variant.removesuffix('_residual')
  return writer, writer == variant
