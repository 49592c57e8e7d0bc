"""The mLSTM block of xLSTM: a matrix memory with exponential gates between two projections.

  u, z = x W_up                     c = silu(conv(u))
  q, k, v = c W_q, c W_k, u W_v     block-diagonal, blocks of four
  log i, f = [q, k, v] W_gates + b  log f = log sigmoid(f)
  y = ((norm(mlstm(q, k / sqrt(K), v)) + skip * c) * silu(z)) W_down

`norm` is a layer norm of each head. The block stands without an MLP (model.mlp='none').
Source: xLSTM, arXiv:2405.04517 (figure 11), NX-AI/xlstm. Width 0: twice the model's. Keys and values
have the width of a head; key_dim and value_dim are not read.
Differs: W_up and W_down are drawn as the model's other projections.
Held by: tests/test_mlstm.py, tests/test_models.py.

B batch  T tokens  D model  E width  H heads  K width of a head  G blocks of I = J = 4
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from longctx.errors import check
from longctx.models.context import Context
from longctx.models.layers import constant, linear, normal, param, scaled
from longctx.models.mixers.base import Cost, Settings
from longctx.models.mixers.qkv import check_chunk
from longctx.models.mixers.short_conv import ShortConv, empty_tail
from longctx.parallel.mesh import constrain
from longctx.parallel.state_scan import Run, over_sequence
from longctx.recurrence import mlstm

BLOCK = 4
FORGET_BIAS = (3.0, 6.0)   # over the heads: short memories and long ones
INPUT_BIAS_STD = 0.1


class State(NamedTuple):
  """float32, batch first."""

  memory: mlstm.State
  conv: jax.Array     # [B, W - 1, E]


def width(settings: Settings) -> int:
  E, H = settings.width or 2 * settings.dim, settings.num_heads
  name = 'model.mixer_width' if settings.width else 'twice model.embed_dim,'
  check(E % H == 0 and E // H % BLOCK == 0,
        f'model.num_heads={H}: must divide {name}={E} into heads of a multiple of {BLOCK}; '
        'set model.mixer_heads or model.mixer_width')
  return E


class MLSTMBlock(nnx.Module):
  """y, state = mixer(x, state, context)."""

  dependency = 'P0'
  reads = ('width', 'conv')

  @staticmethod
  def cost(settings: Settings) -> Cost:
    D, E, H, W = settings.dim, width(settings), settings.num_heads, settings.conv
    check_chunk(settings)
    K = E // H
    matrices = 3 * D * E + 3 * BLOCK * E + 6 * E * H
    conv = (W + 1) * E if W > 1 else 0
    return Cost(parameters=matrices + conv + 2 * E + 2 * H, matrices=matrices,
                flops=2.0 * W * E * (W > 1) + H * mlstm.flops(K, K, settings.form, settings.chunk),
                state=H * (K * K + K + 1) + (W - 1) * E, wire=H * (K * (K + 1) + 2),
                tail=(W - 1) * E)

  def __init__(self, settings: Settings, *, rngs: nnx.Rngs):
    D, E, H = settings.dim, width(settings), settings.num_heads
    self.kernel = mlstm.MLSTM('chunked' if settings.form == 'auto' else settings.form,
                              settings.chunk)
    self.heads, self.width, self.taps = H, E, settings.conv
    self.epsilon = settings.norm_epsilon
    self.w_up = param(rngs, normal(settings.std), (D, 2, E), ('embed', None, 'heads'))
    self.conv = (ShortConv(E, settings.conv, dims='heads', rngs=rngs) if settings.conv > 1 else None)
    small = normal((0.4 / D) ** 0.5)
    blocks = lambda: param(rngs, small, (BLOCK, E // BLOCK, BLOCK), (None, 'heads', None))
    self.w_q, self.w_k, self.w_v = blocks(), blocks(), blocks()
    self.w_gates = param(rngs, constant(0.0), (3, E, 2, H), (None, 'heads', None, None))
    self.bias_input = param(rngs, normal(INPUT_BIAS_STD), (H,), ('heads',))
    spread = lambda key, shape, dtype: jnp.linspace(*FORGET_BIAS, *shape, dtype=dtype)
    self.bias_forget = param(rngs, spread, (H,), ('heads',))
    self.scale = param(rngs, constant(1.0), (E,), ('heads',))
    self.skip = param(rngs, constant(1.0), (E,), ('heads',))
    self.w_down = param(rngs, normal(settings.out_std), (E, D), ('heads', 'embed'))

  def init_state(self, batch_size: int) -> State:
    B, H, K = batch_size, self.heads, self.width // self.heads
    zeros = lambda *shape: jnp.zeros(shape, jnp.float32)
    return State(mlstm.State(zeros(B, H, K, K), zeros(B, H, K), zeros(B, H)),
                 empty_tail(B, self.taps, self.width))

  def __call__(self, x_BTD: jax.Array, state: State, context: Context,
               run: Run = over_sequence) -> tuple[jax.Array, State]:
    u_BTE, z_BTE = (constrain(linear(x_BTD, self.w_up.get_value()[:, i]), 'batch', 'length', 'heads')
                    for i in range(2))
    c_BTE, tail = u_BTE, state.conv
    if self.conv is not None:
      c_BTE, tail = self.conv(u_BTE, tail, context)
      c_BTE = jax.nn.silu(c_BTE)
    q, k, v = (self._blocks(x, w) for x, w in ((c_BTE, self.w_q), (c_BTE, self.w_k),
                                               (u_BTE, self.w_v)))
    log_input, forget = self._gates(q, k, v)
    K = self.width // self.heads
    heads = lambda x: constrain(x.reshape(*x.shape[:2], self.heads, K), 'batch', 'length', 'heads',
                                None)
    h_BTHK, memory = run(
        self.kernel, mlstm.Inputs(heads(q), heads(k) * K ** -0.5, heads(v), log_input,
                                  jax.nn.log_sigmoid(forget), context.reset_BT, context.valid_BT),
        state.memory)
    y_BTE = (self._norm(h_BTHK) + scaled(c_BTE, self.skip.get_value())) * jax.nn.silu(z_BTE)
    y_BTD = linear(y_BTE, self.w_down.get_value())
    return constrain(y_BTD, 'batch', 'length', None), State(memory, tail)

  def _blocks(self, x_BTE: jax.Array, w_IGJ: nnx.Param) -> jax.Array:
    x_BTGI = x_BTE.reshape(*x_BTE.shape[:2], self.width // BLOCK, BLOCK)
    return jnp.einsum('BTGI,IGJ->BTGJ', x_BTGI, w_IGJ.get_value().astype(x_BTE.dtype)
                      ).reshape(x_BTE.shape)

  def _gates(self, q, k, v) -> tuple[jax.Array, jax.Array]:
    """Logs of the input gates, and the forget gates before the sigmoid; float32 [B, T, H]."""
    w_3EGH = self.w_gates.get_value()
    gates = sum(linear(x, w.reshape(w.shape[0], -1)).astype(jnp.float32)
                for x, w in zip((q, k, v), w_3EGH))
    log_input, forget = jnp.split(gates, 2, axis=-1)
    return log_input + self.bias_input.get_value(), forget + self.bias_forget.get_value()

  def _norm(self, h_BTHK: jax.Array) -> jax.Array:
    h = h_BTHK.astype(jnp.float32)
    h -= h.mean(-1, keepdims=True)
    h *= jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + self.epsilon)
    return scaled(jax.lax.collapse(h, 2), self.scale.get_value()).astype(h_BTHK.dtype)
