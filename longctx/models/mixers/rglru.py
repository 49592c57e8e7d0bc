"""The recurrent block of Griffin: a gated, diagonal linear recurrence (RG-LRU) beside a GeLU branch.

  u = conv(x W_x + b_x)                      r, i = sigmoid(u W_r + b_r), sigmoid(u W_i + b_i)
  log a = -8 r softplus(decay)               h_t = a h_{t-1} + sqrt(1 - a^2) (i u)
  y = (gelu(x W_y + b_y) * h) W_out + b_out

W_r and W_i are block-diagonal, num_heads blocks. At a document's first token the factor of the input
is 1 and nothing is kept. The gradient of the square root is bounded by 1000, as at a = 1 it has none.
Sources: De et al. 2024, arXiv:2402.19427; google-deepmind/recurrentgemma (initialisation, bound).
Width 0: that of the model, as RecurrentGemma. Differs: W_x, W_y and W_out are drawn as the other
projections of the model.
Held by: tests/test_mixers.py (the block of transformers' recurrent_gemma), tests/test_models.py.

B batch  T tokens  D model  E recurrent width  H blocks  I, J width of a block
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from longctx.errors import check
from longctx.models.context import Context
from longctx.models.layers import constant, linear, normal, param, scaled, shifted
from longctx.models.mixers.base import Cost, Settings
from longctx.models.mixers.short_conv import ShortConv, empty_tail
from longctx.parallel.mesh import constrain
from longctx.parallel.state_scan import Run, over_sequence
from longctx.recurrence.elementwise import Elementwise, Inputs

SCALE = 8.0              # c of the paper
RADII = (0.9, 0.999)     # of the initial decays at r = 1 / SCALE
MAX_SLOPE = 1000.0


class State(NamedTuple):
  """float32, batch first."""

  h: jax.Array      # [B, E]
  conv: jax.Array   # [B, W - 1, E]


@jax.custom_vjp
def bounded_sqrt(x: jax.Array) -> jax.Array:
  return jnp.sqrt(x)


def _sqrt_backward(x, grad):
  return (grad * jax.lax.rsqrt(jnp.maximum(4 * x, MAX_SLOPE ** -2)),)


bounded_sqrt.defvjp(lambda x: (jnp.sqrt(x), x), _sqrt_backward)


def decay_init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
  """softplus of it is -log a, with a^2 uniform between the squares of RADII."""
  low, high = (r * r for r in RADII)
  square = jax.random.uniform(key, shape, dtype, low, high)
  return jnp.log(jnp.expm1(-0.5 * jnp.log(square)))


def width(settings: Settings) -> int:
  found = settings.width or settings.dim
  field = 'mixer_width' if settings.width else 'embed_dim'
  check(found % settings.num_heads == 0,
        f'model.num_heads={settings.num_heads}: must divide the width of rglru, model.{field}='
        f'{found}; each head is a block of its gates')
  return found


class RGLRU(nnx.Module):
  """y, state = mixer(x, state, context)."""

  dependency = 'P0'
  reads = ('width', 'conv')

  @staticmethod
  def cost(settings: Settings) -> Cost:
    D, E, H, W = settings.dim, width(settings), settings.num_heads, settings.conv
    matrices = 3 * D * E + 2 * E * E // H
    conv = (W + 1) * E if W > 1 else 0
    return Cost(parameters=matrices + conv + 5 * E + D, matrices=matrices,
                flops=E * (2.0 * W * (W > 1) + (2 if settings.form == 'sequential' else 5)),
                state=W * E, wire=2 * E, tail=(W - 1) * E)

  def __init__(self, settings: Settings, *, rngs: nnx.Rngs):
    D, E, H = settings.dim, width(settings), settings.num_heads
    zeros = lambda size, dims: param(rngs, constant(0.0), (size,), (dims,))
    self.kernel = Elementwise(settings.form, settings.chunk)
    self.width, self.taps = E, settings.conv
    self.w_in = param(rngs, normal(settings.std), (D, 2, E), ('embed', None, 'recurrent'))
    self.bias_x, self.bias_y = zeros(E, 'recurrent'), zeros(E, 'recurrent')
    self.conv = (ShortConv(E, settings.conv, dims='recurrent', rngs=rngs) if settings.conv > 1
                 else None)
    if self.conv is not None:   # drawn as RecurrentGemma's, not as torch's
      self.conv.taps = param(rngs, normal((0.01 / settings.conv) ** 0.5), (settings.conv, E),
                             (None, 'recurrent'))
      self.conv.bias = zeros(E, 'recurrent')
    block = E // H
    self.w_gates = param(rngs, normal(block ** -0.5), (block, 2, H, block),
                         (None, None, 'recurrent', None))
    self.bias_r, self.bias_i = zeros(E, 'recurrent'), zeros(E, 'recurrent')
    self.decay = param(rngs, decay_init, (E,), ('recurrent',))
    self.w_out = param(rngs, normal(settings.out_std), (E, D), ('recurrent', 'embed'))
    self.bias_out = zeros(D, None)

  def init_state(self, batch_size: int) -> State:
    return State(jnp.zeros((batch_size, self.width), jnp.float32),
                 empty_tail(batch_size, self.taps, self.width))

  def __call__(self, x_BTD: jax.Array, state: State, context: Context,
               run: Run = over_sequence) -> tuple[jax.Array, State]:
    dtype = x_BTD.dtype
    w_in = self.w_in.get_value()
    u_BTE = constrain(shifted(linear(x_BTD, w_in[:, 0]), self.bias_x.get_value()), 'batch', 'length',
                      'recurrent')
    y_BTE = jax.nn.gelu(shifted(linear(x_BTD, w_in[:, 1]), self.bias_y.get_value()))
    tail = state.conv
    if self.conv is not None:
      u_BTE, tail = self.conv(u_BTE, tail, context)
    first_BT1 = (context.index_BT == context.start_BT)[..., None]
    a_BTE, b_BTE = self.coefficients(u_BTE, first_BT1)
    h_BTE, h_BE = run(
        self.kernel, Inputs(a_BTE, b_BTE, context.reset_BT, context.valid_BT), state.h)
    out_BTD = shifted(linear(h_BTE.astype(dtype) * y_BTE, self.w_out.get_value()),
                      self.bias_out.get_value())
    return constrain(out_BTD, 'batch', 'length', None), State(h_BE, tail)

  def coefficients(self, u_BTE: jax.Array, first_BT1: jax.Array) -> tuple[jax.Array, jax.Array]:
    """a_t and what is added, sqrt(1 - a^2) i u; float32 [B, T, E]."""
    w_IGHJ = self.w_gates.get_value()
    H, E = w_IGHJ.shape[2], u_BTE.shape[2]
    u_BTHI = u_BTE.reshape(*u_BTE.shape[:2], H, E // H)
    gates = jnp.einsum('BTHI,IGHJ->GBTHJ', u_BTHI, w_IGHJ.astype(u_BTE.dtype),
                       preferred_element_type=jnp.float32).reshape(2, *u_BTE.shape[:2], E)
    r_BTE = jax.nn.sigmoid(shifted(gates[0], self.bias_r.get_value()))
    i_BTE = jax.nn.sigmoid(shifted(gates[1], self.bias_i.get_value()))
    log_a_BTE = scaled(r_BTE, -SCALE * jax.nn.softplus(self.decay.get_value()))
    factor = jnp.where(first_BT1, 1.0, bounded_sqrt(-jnp.expm1(2 * log_a_BTE)))
    return jnp.exp(log_a_BTE), factor * i_BTE * u_BTE.astype(jnp.float32)
