"""The time mixing of RWKV-7: a state that decays by channel and is erased and written by the delta rule.

  x_r, x_w, .. = x_t + mix_r (x_{t-1} - x_t), ..             r, k, v = x_r W_r, x_k W_k, x_v W_v
  log w = -e^-1/2 sigmoid(bias_w + tanh(x_w W1) W2)          a = sigmoid(bias_a + x_a A1 A2)
  c = unit(k * k_k)     k~ = k (1 + (a - 1) k_a)             g = sigmoid(x_g G1) G2
  S_t = diag(w) S_{t-1} - (c * a)^T (c S_{t-1}) + k~^T v     o = groupnorm(r S_t) + (r * r_k . k~) v
  y = (o * g) W_out

Source: arXiv:2503.14456, BlinkDL/RWKV-LM (rwkv_v7_numpy.py; initialisation and ranks of train_temp), with
fla's epsilon inside the root of unit. Dims 0: those of attention heads.
Differs: a layer knows nothing of the others, so that there is no value residual (v is not mixed with
the first layer's), and what starts by depth starts as in the middle layer; W_r, W_k, W_v and W_out
are drawn as the model's other projections; low-rank matrices decay as other matrices do; the channel
mixing is the model's MLP.
Held by: tests/test_diagonal_low_rank.py, tests/test_models.py.

B batch  T tokens  D model  H heads  K key dim  V value dim  R rank
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from longctx.models.context import Context
from longctx.models.layers import constant, linear, normal, param, scaled, shifted
from longctx.models.mixers.base import Cost, Settings
from longctx.models.mixers.qkv import check_chunk, head_dims, merge, project, unit
from longctx.models.mixers.short_conv import empty_tail, previous
from longctx.parallel.state_scan import Run, over_sequence
from longctx.recurrence.diagonal_low_rank import DiagonalLowRank, Inputs, flops

SCALE = math.exp(-0.5)       # no decay is below e^-0.61
DEPTH = 0.5                  # of the middle layer, 0 to 1
MIXES = dict(r=0.2, w=0.9, k=0.7, v=0.7, a=0.9, g=0.2)   # exponents of the initial mixes
NORM_EPSILON = 1e-5          # of the group norm, times the head's width


class State(NamedTuple):
  """float32, batch first."""

  memory: jax.Array     # [B, H, K, V]
  previous: jax.Array   # [B, 1, D]


def ranks(dim: int, key_dim: int) -> dict[str, int]:
  """Of the low-rank parts of the decay, the rate and the gate: multiples of 32."""
  of = lambda factor: max(32, 32 * round(factor * dim ** 0.5 / 32))
  wide = max(1.0, key_dim / 64)
  return {'decay': of(2.5 * wide), 'rate': of(2.5 * wide), 'gate': of(5.0)}


def curves(size: int, head: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Over the channels: 0 to 1; -1 to 1 in each head, squared with its sign; straight from -1/2 to 1/2."""
  n = jnp.arange(size, dtype=jnp.float32)
  middle = max((head - 1) / 2, 0.5)
  zigzag = (n % head - (head - 1) / 2) / middle
  ramp = n / max(size - 1, 1)
  return ramp, zigzag * jnp.abs(zigzag), ramp - 0.5


class RWKV7(nnx.Module):
  """y, state = mixer(x, state, context)."""

  dependency = 'P0'
  reads = ('key_dim', 'value_dim')

  @staticmethod
  def cost(settings: Settings) -> Cost:
    H, K, V = head_dims(settings, 'rwkv7')
    check_chunk(settings)
    D, rank = settings.dim, ranks(settings.dim, K)
    matrices = 2 * D * H * (K + V) + sum(
        r * (D + H * (V if name == 'gate' else K)) for name, r in rank.items())
    return Cost(parameters=matrices + 6 * D + 5 * H * K + 2 * H * V, matrices=matrices,
                flops=H * flops(K, V, settings.form, settings.chunk),
                state=H * K * V + D, wire=H * K * (K + V), tail=D)

  def __init__(self, settings: Settings, *, rngs: nnx.Rngs):
    H, K, V = self.dims = head_dims(settings, 'rwkv7')
    D, weight, rank = settings.dim, normal(settings.std), ranks(settings.dim, K)
    self.dim = D
    self.kernel = DiagonalLowRank('chunked' if settings.form == 'auto' else settings.form,
                                  settings.chunk)
    ramp, zigzag, straight = curves(H * K, K)
    vector = lambda x, dims='heads': param(rngs, lambda *_: x, x.shape, (dims,))
    flat = lambda value, size: param(rngs, constant(value), (size,), ('heads',))
    place = jnp.arange(D, dtype=jnp.float32) / D
    self.mix = nnx.Dict({name: vector(1 - place ** (power * (1 - DEPTH)), None)
                         for name, power in MIXES.items()})
    self.w_r = param(rngs, weight, (D, H, K), ('embed', 'heads', None))
    self.w_k = param(rngs, weight, (D, H, K), ('embed', 'heads', None))
    self.w_v = param(rngs, weight, (D, H, V), ('embed', 'heads', None))
    self.w_out = param(rngs, normal(settings.out_std), (H, V, D), ('heads', None, 'embed'))
    narrow = lambda r: param(rngs, constant(0.0), (D, r), ('embed', None))
    wide = lambda r, size: param(rngs, nnx.initializers.orthogonal(0.1, column_axis=0),
                                 (r, H, size), (None, 'heads', None))
    self.w_decay_in, self.w_decay_out = narrow(rank['decay']), wide(rank['decay'], K)
    self.w_rate_in, self.w_rate_out = narrow(rank['rate']), wide(rank['rate'], K)
    self.w_gate_in, self.w_gate_out = narrow(rank['gate']), wide(rank['gate'], V)
    self.bias_decay = vector(-5.5 + 6 * ramp ** (1 + DEPTH ** 0.3) + 2.5 * zigzag)
    self.bias_rate = vector(-0.19 + 0.3 * zigzag + 0.4 * straight)
    self.k_k = vector(0.71 - 0.1 * straight)
    self.k_a, self.r_k = flat(1.02, H * K), flat(-0.04, H * K)
    self.scale, self.bias = flat(1.0, H * V), flat(0.0, H * V)

  def init_state(self, batch_size: int) -> State:
    return State(jnp.zeros((batch_size, *self.dims), jnp.float32),
                 empty_tail(batch_size, 2, self.dim))

  def __call__(self, x_BTD: jax.Array, state: State, context: Context,
               run: Run = over_sequence) -> tuple[jax.Array, State]:
    H, K, V = self.dims
    dtype = x_BTD.dtype
    wide = lambda x: x.astype(jnp.float32)
    by_head = lambda p, size: p.get_value().reshape(H, size)
    (before_BTD,), tail = previous(x_BTD, state.previous, context)
    mixed = lambda name: x_BTD + scaled(before_BTD - x_BTD, self.mix[name].get_value())
    low_rank = lambda x, first, second, between=lambda z: z: project(
        between(linear(x, first.get_value())), second.get_value())
    r = wide(project(mixed('r'), self.w_r.get_value()))
    k = wide(project(mixed('k'), self.w_k.get_value()))
    v = project(mixed('v'), self.w_v.get_value())
    log_decay = -SCALE * jax.nn.sigmoid(shifted(wide(
        low_rank(mixed('w'), self.w_decay_in, self.w_decay_out, jnp.tanh)), by_head(self.bias_decay, K)))
    rate = jax.nn.sigmoid(shifted(wide(
        low_rank(mixed('a'), self.w_rate_in, self.w_rate_out)), by_head(self.bias_rate, K)))
    gate = low_rank(mixed('g'), self.w_gate_in, self.w_gate_out, jax.nn.sigmoid)
    erase = unit(scaled(k, by_head(self.k_k, K)))
    k = k * (1 + scaled(rate - 1, by_head(self.k_a, K)))
    out_BTHV, memory = run(
        self.kernel, Inputs(r.astype(dtype), k.astype(dtype), v, erase.astype(dtype), rate,
                            log_decay, context.reset_BT, context.valid_BT), state.memory)
    bonus = jnp.sum(scaled(r * k, by_head(self.r_k, K)), axis=-1, keepdims=True) * wide(v)
    out = scaled(self._norm(wide(out_BTHV)), by_head(self.scale, V))
    out = shifted(out, by_head(self.bias, V)) + bonus
    return merge(out.astype(dtype) * gate, self.w_out.get_value()), State(memory, tail)

  def _norm(self, out_BTHV: jax.Array) -> jax.Array:
    out = out_BTHV - out_BTHV.mean(-1, keepdims=True)
    epsilon = NORM_EPSILON * out.shape[-1]
    return out * jax.lax.rsqrt(jnp.mean(out * out, axis=-1, keepdims=True) + epsilon)
