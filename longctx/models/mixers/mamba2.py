"""Mamba-2: state space duality, a decayed sum whose decay is a number a head and a token.

  z, x, B, C, dt = x_in W        x, B, C = silu(conv(x, B, C))        dt = softplus(dt + dt_bias)
  S_t = exp(-exp(A_log) dt_t) S_{t-1} + B_t^T (dt_t x_t)              y_t = C_t S_t + D x_t
  out = norm(y * silu(z)) W_out

B and C are shared by equal groups of heads; the norm (rms, after the gate) is by group too.
Sources: Dao & Gu 2024, arXiv:2405.21060; state-spaces/mamba (initialisation).
0: inner width 2 D = heads x value_dim, key_dim (state size) 128; one group unless given. Differs:
the projections are drawn as the others of the model; norm_epsilon is the model's (published: 1e-5).
Held by: tests/test_mixers.py (the mixer of transformers' mamba2), tests/test_models.py.

B batch  T tokens  D model  H heads  P value dim of a head  G groups  N key dim (state size)
"""

import math
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
from longctx.parallel import mesh
from longctx.parallel.state_scan import Run, over_sequence
from longctx.recurrence import decay

STATE_SIZE = 128
DT_RANGE = (1e-3, 1e-1)
DT_FLOOR = 1e-4
A_RANGE = (1.0, 16.0)


class State(NamedTuple):
  """float32, batch first."""

  S: jax.Array         # [B, H, N, P]
  conv_x: jax.Array    # [B, W - 1, H P]
  conv_bc: jax.Array   # [B, W - 1, 2 G N]


def dt_init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
  """softplus of it is log-uniform in DT_RANGE."""
  low, high = (math.log(x) for x in DT_RANGE)
  dt = jnp.maximum(jnp.exp(jax.random.uniform(key, shape, dtype, low, high)), DT_FLOOR)
  return dt + jnp.log(-jnp.expm1(-dt))


def decay_init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
  return jnp.log(jax.random.uniform(key, shape, dtype, *A_RANGE))


def sizes(settings: Settings, groups: int) -> tuple[int, int, int]:
  """(heads, value dim of a head, state size)."""
  H, width = settings.num_heads, 2 * settings.dim
  check(settings.value_dim or width % H == 0,
        f'model.num_heads={H}: must divide the inner width of mamba2, {width}; '
        'or set model.mixer_value_dim')
  check_chunk(settings)
  check(H % groups == 0, f'groups={groups}: must divide model.num_heads={H}')
  return H, settings.value_dim or width // H, settings.key_dim or STATE_SIZE


class Mamba2(nnx.Module):
  """y, state = mixer(x, state, context)."""

  dependency = 'P0'
  reads = ('key_dim', 'value_dim', 'conv')

  @staticmethod
  def cost(settings: Settings, groups: int = 1) -> Cost:
    H, P, N = sizes(settings, groups)
    D, W, channels = settings.dim, settings.conv, H * P + 2 * groups * N
    matrices = D * (2 * H * P + 2 * groups * N + H) + H * P * D
    conv = (W + 1) * channels if W > 1 else 0
    recurrence = decay.flops(H, groups, N, P, False, settings.form, settings.chunk)
    return Cost(parameters=matrices + conv + 3 * H + H * P, matrices=matrices,
                flops=2.0 * W * channels * (W > 1) + recurrence,
                state=H * N * P + (W - 1) * channels, wire=H * (1 + N * P),
                tail=(W - 1) * channels)

  def __init__(self, settings: Settings, *, groups: int = 1, rngs: nnx.Rngs):
    H, P, N = sizes(settings, groups)
    D, W = settings.dim, settings.conv
    self.heads, self.groups, self.value_dim, self.key_dim, self.width = H, groups, P, N, W
    self.epsilon = settings.norm_epsilon
    self.kernel = decay.Decay('chunked' if settings.form == 'auto' else settings.form,
                              settings.chunk)
    self.w_zx = param(rngs, normal(settings.std), (D, 2, H, P), ('embed', None, 'heads', None))
    self.w_bc = param(rngs, normal(settings.std), (D, 2, groups, N), ('embed', None, None, None))
    self.w_dt = param(rngs, normal(settings.std), (D, H), ('embed', 'heads'))
    conv = lambda channels, dims: (
        ShortConv(channels, W, dims=dims, rngs=rngs) if W > 1 else None)
    self.conv_x, self.conv_bc = conv(H * P, 'heads'), conv(2 * groups * N, None)
    self.dt_bias = param(rngs, dt_init, (H,), ('heads',))
    self.A_log = param(rngs, decay_init, (H,), ('heads',))
    self.D = param(rngs, constant(1.0), (H,), ('heads',))
    self.norm_scale = param(rngs, constant(1.0), (H * P,), ('heads',))
    self.w_out = param(rngs, normal(settings.out_std), (H, P, D), ('heads', None, 'embed'))

  def init_state(self, batch_size: int) -> State:
    shape = (batch_size, self.heads, self.key_dim, self.value_dim)
    tail = lambda channels: empty_tail(batch_size, self.width, channels)
    return State(jnp.zeros(shape, jnp.float32), tail(self.heads * self.value_dim),
                 tail(2 * self.groups * self.key_dim))

  def __call__(self, u_BTD: jax.Array, state: State, context: Context,
               run: Run = over_sequence) -> tuple[jax.Array, State]:
    B, T, D = u_BTD.shape
    dtype = u_BTD.dtype
    flat = lambda w: linear(u_BTD, w.reshape(D, -1))
    w_zx = self.w_zx.get_value()
    z, x, bc = flat(w_zx[:, 0]), flat(w_zx[:, 1]), flat(self.w_bc.get_value())
    tails = state[1:]
    if self.conv_x is not None:
      x, tail_x = self.conv_x(x, state.conv_x, context)
      bc, tail_bc = self.conv_bc(bc, state.conv_bc, context)
      tails = (tail_x, tail_bc)
    x_BTHP = jax.nn.silu(x).reshape(B, T, self.heads, self.value_dim)
    bc_BT2GN = jax.nn.silu(bc).reshape(B, T, 2, self.groups, self.key_dim)
    k_BTGN, q_BTGN = jnp.unstack(bc_BT2GN, axis=2)
    dt_BTH = jax.nn.softplus(flat(self.w_dt.get_value()).astype(jnp.float32)
                             + self.dt_bias.get_value())
    layout = mesh.current()
    if layout is not None and self.groups % layout.size('heads'):
      # Groups cannot be cut as the heads are: every head gets its own copy.
      k_BTGN, q_BTGN = (jnp.repeat(t, self.heads // self.groups, axis=2) for t in (k_BTGN, q_BTGN))
    y_BTHP, S = run(self.kernel, decay.Inputs(
        q_BTGN, k_BTGN, (dt_BTH[..., None] * x_BTHP).astype(dtype),
        -jnp.exp(self.A_log.get_value()) * dt_BTH, context.reset_BT, context.valid_BT), state.S)
    D_HP = jnp.broadcast_to(self.D.get_value()[:, None], x_BTHP.shape[2:])
    y_BTHP += scaled(x_BTHP, D_HP)
    w_out = self.w_out.get_value()
    out_BTD = linear(self.norm(jax.lax.collapse(y_BTHP, 2), z), w_out.reshape(-1, D))
    return mesh.constrain(out_BTD, 'batch', 'length', None), State(S, *tails)

  def norm(self, y: jax.Array, z: jax.Array) -> jax.Array:
    """rms norm of y * silu(z), group by group; float32 inside."""
    gated = y.astype(jnp.float32) * jax.nn.silu(z.astype(jnp.float32))
    grouped = gated.reshape(*y.shape[:2], self.groups, y.shape[2] // self.groups)
    grouped *= jax.lax.rsqrt(jnp.mean(grouped * grouped, axis=-1, keepdims=True) + self.epsilon)
    return scaled(grouped.reshape(y.shape), self.norm_scale.get_value()).astype(y.dtype)
