"""minGRU and minLSTM: gates that read the input alone, so that the recurrence is element-wise.

  minGRU    z = sigmoid(u W_z + b_z)                     h_t = (1 - z) h_{t-1} + z g(u W_h + b_h)
  minLSTM   f, i = sigmoid(u W_f + b_f), sigmoid(u W_i + b_i)
            h_t = f / (f + i) h_{t-1} + i / (f + i) g(u W_h + b_h)

  g(x) = x + 1/2 for x >= 0, else sigmoid(x)        u = conv(x), each channel by itself
  y = h W_out

The paper has two versions: its vanilla one without g, and the one in log space, with g, which its
experiments use. This is the function of the second; h is nevertheless computed as it stands here, since
a recurrence that never divides by a product of gates needs no logarithms. The gate of minLSTM is
sigmoid(softplus(-i) - softplus(-f)) of the logits: it does not become 0/0 where both saturate.
Source: Feng et al. 2024, arXiv:2410.01201 (convolution of width 4 before the cell: its appendix on
language modelling). Width 0: twice the model's. Differs: the convolution has no residual of its own.
Held by: tests/test_mixers.py (loops in NumPy), tests/test_models.py.

B batch  T tokens  D model  E recurrent width
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from longctx.models.context import Context
from longctx.models.layers import constant, linear, normal, param
from longctx.models.mixers.base import Cost, Settings
from longctx.models.mixers.short_conv import ShortConv, empty_tail
from longctx.parallel.mesh import constrain
from longctx.parallel.state_scan import Run, over_sequence
from longctx.recurrence.elementwise import Elementwise, Inputs


class State(NamedTuple):
  """float32, batch first."""

  h: jax.Array      # [B, E]
  conv: jax.Array   # [B, W - 1, D]


def positive(x: jax.Array) -> jax.Array:
  """g of the paper: continuous, increasing, above 0."""
  return jnp.where(x >= 0, x + 0.5, jax.nn.sigmoid(x))


class Minimal(nnx.Module):
  """What both cells share; `gates` logits stand before the candidate's."""

  dependency = 'P0'
  reads = ('width', 'conv')
  gates: int

  @classmethod
  def cost(cls, settings: Settings) -> Cost:
    D, E, W = settings.dim, settings.width or 2 * settings.dim, settings.conv
    matrices = (cls.gates + 2) * D * E
    conv = (W + 1) * D if W > 1 else 0
    return Cost(parameters=matrices + conv + (cls.gates + 1) * E, matrices=matrices,
                flops=2.0 * W * D * (W > 1) + E * (2 if settings.form == 'sequential' else 5),
                state=E + (W - 1) * D, wire=2 * E, tail=(W - 1) * D)

  def __init__(self, settings: Settings, *, rngs: nnx.Rngs):
    D, E = settings.dim, settings.width or 2 * settings.dim
    self.kernel = Elementwise(settings.form, settings.chunk)
    self.dim, self.width, self.taps = D, E, settings.conv
    self.conv = ShortConv(D, settings.conv, rngs=rngs) if settings.conv > 1 else None
    self.w_in = param(rngs, normal(settings.std), (D, self.gates + 1, E),
                      ('embed', None, 'recurrent'))
    self.biases = nnx.List([param(rngs, constant(0.0), (E,), ('recurrent',))
                            for _ in range(self.gates + 1)])
    self.w_out = param(rngs, normal(settings.out_std), (E, D), ('recurrent', 'embed'))

  def init_state(self, batch_size: int) -> State:
    return State(jnp.zeros((batch_size, self.width), jnp.float32),
                 empty_tail(batch_size, self.taps, self.dim))

  def __call__(self, x_BTD: jax.Array, state: State, context: Context,
               run: Run = over_sequence) -> tuple[jax.Array, State]:
    u_BTD, tail = x_BTD, state.conv
    if self.conv is not None:
      u_BTD, tail = self.conv(x_BTD, tail, context)
    w_in = self.w_in.get_value()
    *gates, candidate = (
        constrain(linear(u_BTD, w_in[:, n]).astype(jnp.float32) + bias.get_value(),
                  'batch', 'length', 'recurrent') for n, bias in enumerate(self.biases))
    write = self.write_gate(*gates)
    h_BTE, h_BE = run(
        self.kernel, Inputs(jax.nn.sigmoid(-write), jax.nn.sigmoid(write) * positive(candidate),
                            context.reset_BT, context.valid_BT), state.h)
    y_BTD = linear(h_BTE.astype(x_BTD.dtype), self.w_out.get_value())
    return constrain(y_BTD, 'batch', 'length', None), State(h_BE, tail)


class MinGRU(Minimal):
  """y, state = mixer(x, state, context)."""

  gates = 1

  def write_gate(self, z: jax.Array) -> jax.Array:
    """The logit of what is written; what is kept has its negative."""
    return z


class MinLSTM(Minimal):
  """y, state = mixer(x, state, context)."""

  gates = 2

  def write_gate(self, f: jax.Array, i: jax.Array) -> jax.Array:
    """sigmoid of it is i / (f + i), both after their sigmoid."""
    return jax.nn.softplus(-f) - jax.nn.softplus(-i)
