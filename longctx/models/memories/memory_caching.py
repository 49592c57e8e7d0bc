"""Memory Caching: a recurrent layer in attention's place that keeps its past segments' memories.

  q, k, v = silu(x W_q), silu(x W_k), silu(x W_v)      q of length H^-1/2, k of length 1
  a segment's memory, from 0        delta   S_t = S_{t-1} + beta_t k_t^T (v_t - k_t S_{t-1})
                                    linear  S_t = S_{t-1} + k_t^T v_t
  y = rmsnorm(what S_t and the cached memories say) W_out

memory_variant names the recurrence and how memories are put together: 'delta' ('') and 'linear' by gates,
'delta_residual' and 'linear_residual' by addition. memory_size: segments cached (0: 32); memory_top: how
many of them a token selects (0: all; gates only).
Source: arXiv:2602.24281; the mathematics: longctx/memory/caching.py.
Differs: the paper's other backbones are deep memories; beta = sigmoid(x W_beta) does not forget, and there
is no convolution. The gate's pooled inputs are normed.
Held by: tests/test_models.py, tests/test_memory_caching.py, tests/test_truncation.py.

B batch  C slots of a cell  R segments  N heads  H head dim  D model
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from longctx.errors import check, check_choice
from longctx.memory import caching
from longctx.models.layers import RMSNorm, linear, normal, param
from longctx.models.memories.base import Block, Cell, Cost, Memory, Settings
from longctx.models.memories.titans import check_no_attention
from longctx.models.mixers.qkv import merge, unit
from longctx.recurrence import decay, delta

SLOTS = 32
VARIANTS = ('delta', 'linear', 'delta_residual', 'linear_residual')


class Segment(NamedTuple):
  """What a segment says without its past."""

  x: jax.Array       # [B, C, D], normed
  q: jax.Array       # [B, C, N, H]
  out: jax.Array     # [B, C, N, H] q_t S_t
  mean: jax.Array    # [B, C, D] float32, of the tokens so far
  S: jax.Array       # [B, N, H, H] float32, at its end


class MemoryCaching(Block):
  dependency = 'P1'
  reads = ('variant', 'size', 'top')
  identity = False

  @classmethod
  def cost(cls, settings: Settings) -> Cost:
    s, slots = settings, settings.size or SLOTS
    check_choice('model.memory_variant', s.variant, ('', *VARIANTS))
    check_no_attention(s, "model.long_term='memory_caching'")
    writer, gated = choices(s)
    check(gated or not s.top, f'model.memory_top={s.top}: is not read with model.memory_variant='
          f'{s.variant!r}, which adds up all memories; set {writer!r}')
    check(s.top <= slots, f'model.memory_top={s.top}: must be at most model.memory_size={slots}')
    D, N, H = s.dim, s.num_heads, s.head_dim
    matrices = 4 * D * N * H + (D * N if writer == 'delta' else 0) + (D * D if gated else 0)
    own = (delta.flops(H, H, 'chunked', 0, channels=False) * N if writer == 'delta' else
           decay.flops(N, N, H, H, by_channel=False, form='chunked', chunk=0))
    cached = slots * (N * H * (H + 1) + D) if gated else N * H * H
    return Cost(parameters=matrices + H, matrices=matrices, flops=own + 2.0 * cached,
                state=slots * (N * H * H + D) + 1, attends=False)

  def __init__(self, settings: Settings, *, rngs: nnx.Rngs):
    super().__init__(settings, rngs=rngs)
    s = settings
    D, N, H = s.dim, s.num_heads, s.head_dim
    writer, gated = choices(s)
    self.w_qkv = param(rngs, normal(s.std), (D, 3, N, H), ('embed', None, 'heads', None))
    self.w_beta = param(rngs, normal(s.std), (D, N), ('embed', 'heads')) if writer == 'delta' else None
    self.w_u = param(rngs, normal(s.std), (D, D), ('embed', None)) if gated else None
    self.out_norm = RMSNorm(H, s.norm_epsilon, rngs=rngs)
    self.w_out = param(rngs, normal(s.out_std), (N, H, D), ('heads', None, 'embed'))

  def init_store(self, batch_size: int) -> caching.State:
    s = self.settings
    return caching.empty(batch_size, s.size or SLOTS, s.num_heads, s.head_dim, s.dim)

  def mix(self, x_BCD: jax.Array, memory: Memory, cell: Cell) -> tuple[jax.Array, Memory]:
    own, cache = self.segment(x_BCD, cell.valid_BC), memory.store
    out_BCNH, gates = own.out.astype(jnp.float32), None
    if self.w_u is not None:
      gates = caching.gates(cache, linear(own.x, self.w_u.get_value()), own.mean, self.settings.top)
      out_BCNH *= gates[..., -1, None, None]
      gates = gates[..., :-1]
    out_BCNH = self.out_norm(out_BCNH + caching.read(cache, own.q, gates)).astype(x_BCD.dtype)
    return (merge(out_BCNH, self.w_out.get_value()),
            Memory(None, caching.push(cache, own.S, own.mean[:, -1])))

  def before(self, x_BSCD: jax.Array, memory: Memory, valid_BSC: jax.Array
             ) -> tuple[Memory, Memory]:
    rows = lambda x: x.reshape(-1, *x.shape[2:])
    own = self.segment(rows(x_BSCD), rows(valid_BSC))
    segments = lambda x: x.reshape(*x_BSCD.shape[:2], *x.shape[1:])
    befores, after = caching.before(memory.store, segments(own.S), segments(own.mean[:, -1]))
    return Memory(None, befores), Memory(None, after)

  def segment(self, x_BCD: jax.Array, valid_BC: jax.Array) -> Segment:
    """A segment read from an empty memory."""
    x_BCD = self.mixer_norm(x_BCD)
    B, C, D = x_BCD.shape
    w_qkv = self.w_qkv.get_value()
    N, H = w_qkv.shape[2:]
    qkv = jax.nn.silu(linear(x_BCD, w_qkv.reshape(D, -1)).reshape(B, C, 3, N, H))
    q, k = ((scale * unit(qkv[:, :, i])).astype(x_BCD.dtype) for i, scale in ((0, H ** -0.5), (1, 1.0)))
    v = qkv[:, :, 2]
    if self.w_beta is None:
      kernel, inputs = decay.Decay(), decay.Inputs(q, k, v, None, valid_BT=valid_BC)
    else:
      beta_BCN = jax.nn.sigmoid(linear(x_BCD, self.w_beta.get_value()).astype(jnp.float32))
      kernel, inputs = delta.Delta(), delta.Inputs(q, k, v, beta_BCN, None, valid_BT=valid_BC)
    out_BCNH, S_BNHH = kernel.finish(kernel.prepare(inputs), jnp.zeros((B, N, H, H), jnp.float32))
    return Segment(x_BCD, q, out_BCNH, caching.running_mean(x_BCD), S_BNHH)


def choices(settings: Settings) -> tuple[str, bool]:
  """(the recurrence, whether memories are put together by gates)."""
  writer, _, rest = (settings.variant or VARIANTS[0]).partition('_')
  return writer, not rest
