"""The Block-Recurrent Transformer: a set of state vectors that attend to each segment, and are attended to.

  down      tokens attend to the tokens before them, and to the states; both outputs side by side are
            projected into the residual; then the MLP
  along     states attend to each other, and to the segment's tokens; both outputs side by side go
            through a gate into the next states (longctx/memory/block_recurrent.py)
  states enter as rms_norm(s) + id: an id is learned for each, or all states would stay alike
  variant         '' or 'fixed': the paper's best (Rec:fixed:skip); 'lstm'
  memory_tokens   M, states (512)

Both directions share keys and values: those of tokens are the attention's, those of states are of the
states before the segment, never of the first ones. Each of the four attentions has queries of its own;
only tokens among tokens have positions. 'skip': there is no MLP along. A document begins with learned
states; gradients go through the states of all segments of a call (model.truncate cuts them).
The paper has one such layer of 12, the tenth: model.memory_layers=(9,), and with it a window of the
segment's length: model.short_term. That window is why states hear each segment when it is read, not when
it falls out: published with one, they are what passes a segment on while the window still holds it.
Can begin as the plain layer: with model.gate='tanh', which shuts the states' part of the projection at first
(models/memories/base.py); the published start has it open.
Class P2: a segment's states are no affine map of those before it.
Source: arXiv:2203.07852; google-research/meliad.
Differs: rope for T5's biases; token i of a segment sees short_term + i tokens before it, where the paper's
window slides and is the same for all; queries and keys have the length 1 with a learned scale only where
model.qk_norm says so (RMS norms, shared by tokens and states), else 1/sqrt(H); states attend to their
own segment's tokens, not to the window before it too; the gates' z is a plain projection (meliad), with
the paper's tanh for 'lstm'.
Held by: tests/test_models.py, tests/test_block_recurrent.py.

B batch  C slots of a cell  M states  N query heads  K kv heads  H head dim  D model
"""

import jax
import jax.numpy as jnp
from flax import nnx

from longctx.errors import check_choice
from longctx.memory import block_recurrent
from longctx.memory.cross_attention import attend
from longctx.models.layers import RMSNorm, constant, linear, normal, param
from longctx.models.memories.base import Block, Cell, Cost, Memory, Settings

FIXED, LSTM = 'fixed', 'lstm'


def projections(settings: Settings) -> int:
  """How many maps of what states attended to their gate needs."""
  return 3 if settings.variant == LSTM else 1


class BlockRecurrent(Block):
  """Memory.store is the states, [B, M, D] float32."""

  dependency = 'P2'
  reads = ('variant', 'tokens', 'gate')
  falls = False

  @classmethod
  def cost(cls, settings: Settings) -> Cost:
    s, M = settings, settings.tokens or 512
    check_choice('model.memory_variant', s.variant, ('', FIXED, LSTM))
    heads, pairs, maps = s.num_heads * s.head_dim, 2 * s.num_kv_heads * s.head_dim, projections(s)
    of_state = s.dim * (pairs + 2 * heads + maps * 2 * heads)
    of_token = 2 * s.dim * heads
    biases = s.dim * (maps + (maps == 1))
    along = M / s.segment * (2.0 * of_state + 4.0 * heads * (M + s.segment))
    gate = int(s.gate == 'tanh')
    return Cost(parameters=of_state + of_token + biases + (2 * M + 1) * s.dim + gate, matrices=of_token,
                flops=4.0 * heads * M + along, state=M * s.dim)

  def __init__(self, settings: Settings, *, rngs: nnx.Rngs):
    super().__init__(settings, rngs=rngs)
    s, M, maps = settings, settings.tokens or 512, projections(settings)
    D, N, K, H = s.dim, s.num_heads, s.num_kv_heads, s.head_dim
    make = lambda std, shape, dims: param(rngs, normal(std), shape, dims)
    self.state_norm = RMSNorm(D, s.norm_epsilon, rngs=rngs)
    self.states = make(0.1, (M, D), (None, 'embed'))
    self.state_ids = make(1.0, (M, D), (None, 'embed'))
    self.w_q_to_states = make(s.std, (D, N, H), ('embed', 'heads', None))
    self.w_out_of_states = make(s.out_std, (N, H, D), ('heads', None, 'embed'))
    self.w_state_q = make(s.std, (D, 2, N, H), ('embed', None, 'heads', None))
    self.w_state_kv = make(s.std, (D, 2, K, H), ('embed', None, 'kv_heads', None))
    wide = (2, N, H, D), (None, 'heads', None, 'embed')
    self.w_z = make((2 * N * H) ** -0.5, *wide)
    self.b_z = param(rngs, constant(0.0), (D,), (None,))
    # Gates: a tenth of a plain matrix's variance, and biases near 0 but not at it.
    gate = lambda: make((0.1 / (2 * N * H)) ** 0.5, *wide)
    bias = lambda: make(0.1, (D,), (None,))
    if maps == 1:
      self.b_keep = bias()
    else:
      self.w_input, self.b_input, self.w_forget, self.b_forget = gate(), bias(), gate(), bias()

  def init_store(self, batch_size: int) -> jax.Array:
    states_MD = self.states.get_value()
    return jnp.broadcast_to(states_MD, (batch_size, *states_MD.shape))

  def mix(self, x_BCD: jax.Array, memory: Memory, cell: Cell) -> tuple[jax.Array, Memory]:
    s, mixer, states_BMD = self.settings, self.mixer, memory.store
    q, k, v = self.project(x_BCD, memory.past)
    near_BCNH = self.attend(q, k, v, memory.past, cell)
    normed = lambda norm, x: x if norm is None else norm(x)
    split = lambda x, w: linear(x, w.reshape(s.dim, -1)).reshape(*x.shape[:2], *w.shape[1:])

    in_BMD = self.state_norm(states_BMD) + self.state_ids.get_value()
    in_BMD = in_BMD.astype(x_BCD.dtype)
    w_kv, w_q = self.w_state_kv.get_value(), self.w_state_q.get_value()
    state_k, state_v = normed(mixer.k_norm, split(in_BMD, w_kv[:, 0])), split(in_BMD, w_kv[:, 1])
    q_BCNH = normed(mixer.q_norm, split(self.mixer_norm(x_BCD), self.w_q_to_states.get_value()))
    far_BCNH = attend(q_BCNH, state_k, state_v, None, s.attention)
    y_BCD = mixer.merged(near_BCNH) + self.let_in(projected(far_BCNH, self.w_out_of_states.get_value()))

    to_states, to_tokens = (normed(mixer.q_norm, split(in_BMD, w_q[:, i])) for i in range(2))
    C = x_BCD.shape[1]
    heard = jnp.stack([attend(to_states, state_k, state_v, None, s.attention),
                       attend(to_tokens, k[:, -C:], v[:, -C:], cell.valid_BC, s.attention)], axis=2)
    return y_BCD, Memory(self.remember(x_BCD, memory.past, cell), self.next_states(states_BMD, heard))

  def next_states(self, states_BMD: jax.Array, heard_BM2NH: jax.Array) -> jax.Array:
    linear_of = lambda w, b: (projected(heard_BM2NH, w.get_value()).astype(states_BMD.dtype)
                              + b.get_value())
    z_BMD = linear_of(self.w_z, self.b_z)
    if self.settings.variant != LSTM:
      return block_recurrent.fixed(states_BMD, z_BMD, self.b_keep.get_value())
    return block_recurrent.lstm(states_BMD, z_BMD, linear_of(self.w_input, self.b_input),
                                linear_of(self.w_forget, self.b_forget))


def projected(heads: jax.Array, w: jax.Array) -> jax.Array:
  """[B, T, ..heads] by w [..heads, D]."""
  return linear(heads.reshape(*heads.shape[:2], -1), w.reshape(-1, w.shape[-1]))
