"""TTT-Linear: a layer in attention's place whose hidden state is a linear model that learns as it reads.

  q, k, v = x W_q, x W_k, x W_v          eta = rate sigmoid(x W_eta + b_eta) / H
  out = LN(M_t(q_t)) W_out               M: longctx/memory/ttt.py, learned a mini-batch at a time

With short_term there is attention beside it, over the window and the segment, and the model learns a token
when it falls out of the window: y = Attn(x) + LN(M_before(q)) W_out, M_before as it was before the segment.
So it can begin as the plain layer: with model.gate='tanh', which shuts what is added (models/memories/base.py).

memory_chunk: tokens of a mini-batch (0: 16, or the segment if shorter); memory_rate: rate (0: 1).
What a document begins with, W and b of each head, is learned.
Source: Sun et al. 2024, arXiv:2407.04620 (TTT-Linear, the transformer's backbone: no convolution).
Differs: queries and keys are not turned by positions; no window is published.
Held by: tests/test_models.py, tests/test_ttt.py.

B batch  C slots of a cell  N heads  H head dim  D model
"""

import jax
import jax.numpy as jnp
from flax import nnx

from longctx import watch
from longctx.memory import ttt
from longctx.models.layers import constant, linear, normal, param
from longctx.models.memories.base import Block, Cell, Cost, Memory, Settings
from longctx.models.memories.titans import check_no_attention, chunk_of

MINIBATCH = 16


class TTT(Block):
  dependency = 'P2'
  reads = ('chunk', 'rate', 'gate')

  @classmethod
  def cost(cls, settings: Settings) -> Cost:
    s = settings
    check_no_attention(s, "model.long_term='ttt'")
    D, N, H = s.dim, s.num_heads, s.head_dim
    matrices, state = D * N * (4 * H + 1), N * H * (H + 1)
    flops = N * ttt.flops(H, chunk_of(s, MINIBATCH), apart=s.short_term > 0)
    gate = int(s.gate == 'tanh')
    return Cost(parameters=matrices + N + 4 * N * H + state + gate, matrices=matrices, flops=flops,
                state=state, attends=s.short_term > 0)

  def __init__(self, settings: Settings, *, rngs: nnx.Rngs):
    super().__init__(settings, rngs=rngs)
    s = settings
    D, N, H = s.dim, s.num_heads, s.head_dim
    self.chunk, self.rate = chunk_of(s, MINIBATCH), (s.rate or 1) / H
    self.w_qkv = param(rngs, normal(s.std), (D, 3, N, H), ('embed', None, 'heads', None))
    self.w_eta = param(rngs, normal(s.std), (D, N), ('embed', 'heads'))
    self.b_eta = param(rngs, constant(0.0), (N,), ('heads',))
    self.start_W = param(rngs, normal(s.std), (N, H, H), ('heads', None, None))
    self.start_b = param(rngs, constant(0.0), (N, H), ('heads', None))
    self.norm_scale = param(rngs, constant(1.0), (N, H), ('heads', None))
    self.norm_bias = param(rngs, constant(0.0), (N, H), ('heads', None))
    self.out_scale = param(rngs, constant(1.0), (N, H), ('heads', None))
    self.out_bias = param(rngs, constant(0.0), (N, H), ('heads', None))
    self.w_out = param(rngs, normal(s.out_std), (N, H, D), ('heads', None, 'embed'))

  def init_store(self, batch_size: int) -> ttt.State:
    rows = lambda x: jnp.broadcast_to(x, (batch_size, *x.shape))
    return ttt.State(rows(self.start_W.get_value()), rows(self.start_b.get_value()))

  def mix(self, x_BCD: jax.Array, memory: Memory, cell: Cell) -> tuple[jax.Array, Memory]:
    past, store = memory
    norm = ttt.Norm(self.norm_scale.get_value(), self.norm_bias.get_value())
    u_BCD = self.mixer_norm(x_BCD)
    if past is None:
      tokens = self.tokens(u_BCD, cell.valid_BC)
      y_BNCH, store = ttt.segment(store, tokens, norm, self.chunk)
      watch.tell('ttt', said_BNCH=y_BNCH, asked_BNCH=tokens.q)
      return self.output(y_BNCH, u_BCD), Memory(None, store)
    asked = self.tokens(u_BCD, cell.valid_BC).q
    y_BNCH = ttt.read(store, asked, norm)
    watch.tell('ttt', said_BNCH=y_BNCH, asked_BNCH=asked)
    q, k, v = self.project(x_BCD, past)
    near_BCD = self.mixer.merged(self.attend(q, k, v, past, cell))
    old_BCD, valid_BC = self.leaving(x_BCD, past, cell)
    tokens = self.tokens(self.mixer_norm(old_BCD), valid_BC)._replace(q=None)
    _, store = ttt.segment(store, tokens, norm, self.chunk)
    return near_BCD + self.let_in(self.output(y_BNCH, u_BCD)), Memory(self.remember(x_BCD, past, cell), store)

  def tokens(self, u_BCD: jax.Array, valid_BC: jax.Array) -> ttt.Tokens:
    B, C, D = u_BCD.shape
    w_qkv = self.w_qkv.get_value()
    qkv = linear(u_BCD, w_qkv.reshape(D, -1)).reshape(B, C, *w_qkv.shape[1:]).astype(jnp.float32)
    eta_BCN = linear(u_BCD, self.w_eta.get_value()).astype(jnp.float32) + self.b_eta.get_value()
    eta_BCN = jnp.where(valid_BC[..., None], self.rate * jax.nn.sigmoid(eta_BCN), 0.0)
    q, k, v = (jnp.moveaxis(qkv[:, :, i], 2, 1) for i in range(3))   # [B, N, C, H]
    return ttt.Tokens(q, k, v, jnp.moveaxis(eta_BCN, 2, 1))

  def output(self, y_BNCH: jax.Array, like_BCD: jax.Array) -> jax.Array:
    B, C, D = like_BCD.shape
    y_BCE = jnp.moveaxis(y_BNCH, 1, 2).reshape(B, C, -1)
    y_BCE = ttt.standard(y_BCE)[0] * self.out_scale.get_value().reshape(-1)
    y_BCE += self.out_bias.get_value().reshape(-1)
    return linear(y_BCE.astype(like_BCD.dtype), self.w_out.get_value().reshape(-1, D))
