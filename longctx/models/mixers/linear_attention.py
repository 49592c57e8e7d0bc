"""Sums of outer products read by queries: linear attention, retention, gated linear attention.

  linear_attention   o = phi(q) S / phi(q) z      S_t = S_{t-1} + phi(k_t)^T v_t, z_t = z_{t-1} + phi(k_t)
                     phi(x) = elu(x) + 1          y = o W_out
  retention          S_t = gamma S_{t-1} + k_t^T v_t, gamma = 1 - 2^-(5 + h) for head h, o = q S K^-1/2
                     y = (norm(o) * silu(x W_g)) W_out; the norm is rms, of each head, without a scale
  gla                S_t = diag(alpha_t) S_{t-1} + k_t^T v_t, o = q S K^-1/2
                     alpha = sigmoid(x W_1 W_2 + b)^(1/16), W_1 of rank 16
                     y = (norm(o) * silu(x W_g)) W_out; the norm is rms, of each head, with one scale

None has a convolution as published: `model.mixer_conv` is not read.
Sources: Katharopoulos et al. 2020, arXiv:2006.16236; Sun et al. 2023, arXiv:2307.08621 and torchscale
(the norm); Yang et al. 2023, arXiv:2312.06635 and fla-org/flash-linear-attention (norm, no bias of W_g).
Sizes at 0: keys and values D / H a head; retention's values twice that; gla's keys half of it.
Differs: retention has no xPos; projections are drawn as the others of the model.
Held by: tests/test_mixers.py (loops in NumPy), tests/test_models.py.

B batch  T tokens  D model  H heads  K key dim  V value dim
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longctx.errors import check
from longctx.models.context import Context
from longctx.models.layers import constant, linear, normal, param, scaled, shifted
from longctx.models.mixers.base import Cost, Settings
from longctx.models.mixers.qkv import check_chunk, merge, project
from longctx.parallel.mesh import constrain
from longctx.parallel.state_scan import Run, over_sequence
from longctx.recurrence import decay

NORMALISER_EPSILON = 1e-6   # of the published code; phi is positive but may be as small as it likes
GATE_RANK, GATE_ROOT = 16, 16


class State(NamedTuple):
  """float32, batch first."""

  S: jax.Array   # [B, H, K, V]; linear attention's z stands as one column more


def sizes(settings: Settings, mixer: str, key_factor: float = 1, value_factor: int = 1
          ) -> tuple[int, int, int]:
  """(heads, key dim, value dim)."""
  H, D = settings.num_heads, settings.dim
  check(bool(settings.key_dim) or D * key_factor % H == 0,
        f'model.num_heads={H}: must divide the keys of {mixer}, {key_factor:g} times model.embed_dim='
        f'{D}; or set model.mixer_key_dim')
  check(bool(settings.value_dim) or D * value_factor % H == 0,
        f'model.num_heads={H}: must divide the values of {mixer}, {value_factor} times model.embed_dim='
        f'{D}; or set model.mixer_value_dim')
  check_chunk(settings)
  return H, settings.key_dim or int(D * key_factor) // H, settings.value_dim or D * value_factor // H


class Decayed(nnx.Module):
  """What the three share: projections to heads and back, and the sum itself."""

  dependency = 'P0'
  reads = ('key_dim', 'value_dim')
  name: str
  key_factor, value_factor = 1.0, 1
  gated = True         # whether silu(x W_g) multiplies the normed output
  by_channel = False   # whether decays have channels
  decays = True
  extra_values = 0     # columns that the state has besides the values

  @classmethod
  def sizes(cls, settings: Settings) -> tuple[int, int, int]:
    return sizes(settings, cls.name, cls.key_factor, cls.value_factor)

  @classmethod
  def cost(cls, settings: Settings) -> Cost:
    H, K, V = cls.sizes(settings)
    columns = V + cls.extra_values
    matrices = settings.dim * H * (2 * K + (3 if cls.gated else 2) * V)
    # Of a map: without decays only documents end a sum, that of all heads at once.
    kept = H * K if cls.by_channel else H if cls.decays else 1
    return Cost(parameters=matrices, matrices=matrices,
                flops=decay.flops(H, H, K, columns, cls.by_channel, settings.form, settings.chunk),
                state=H * K * columns, wire=kept + H * K * columns, tail=0)

  def __init__(self, settings: Settings, *, rngs: nnx.Rngs):
    D, (H, K, V) = settings.dim, self.sizes(settings)
    self.dims, self.epsilon = (H, K, V), settings.norm_epsilon
    self.kernel = decay.Decay('chunked' if settings.form == 'auto' else settings.form,
                              settings.chunk)
    heads = lambda width: param(rngs, normal(settings.std), (D, H, width), ('embed', 'heads', None))
    self.w_q, self.w_k, self.w_v = heads(K), heads(K), heads(V)
    self.w_g = heads(V) if self.gated else None
    self.w_out = param(rngs, normal(settings.out_std), (H, V, D), ('heads', None, 'embed'))

  def init_state(self, batch_size: int) -> State:
    H, K, V = self.dims
    return State(jnp.zeros((batch_size, H, K, V + self.extra_values), jnp.float32))

  def __call__(self, x_BTD: jax.Array, state: State, context: Context,
               run: Run = over_sequence) -> tuple[jax.Array, State]:
    q, k, v = (project(x_BTD, w.get_value()) for w in (self.w_q, self.w_k, self.w_v))
    out, S = self.mix(x_BTD, q, k, v, lambda q, k, v, log_decay: run(
        self.kernel, decay.Inputs(q, k, v, log_decay, context.reset_BT, context.valid_BT), state.S))
    if self.gated:
      out = (self.norm(out) * jax.nn.silu(project(x_BTD, self.w_g.get_value()))).astype(x_BTD.dtype)
    return merge(out, self.w_out.get_value()), State(S)

  def norm(self, out_BTHV: jax.Array) -> jax.Array:
    """rms norm of each head, float32."""
    out = out_BTHV.astype(jnp.float32)
    return out * jax.lax.rsqrt(jnp.mean(out * out, axis=-1, keepdims=True) + self.epsilon)


class LinearAttention(Decayed):
  """y, state = mixer(x, state, context)."""

  name, gated, decays, extra_values = 'linear_attention', False, False, 1
  adds = True   # a state is a plain sum over its tokens: those of two texts may be added

  def mix(self, x_BTD, q, k, v, run):
    del x_BTD
    ones = jnp.ones((*v.shape[:3], 1), v.dtype)
    feature = lambda x: jax.nn.elu(x) + 1
    sums, S = run(feature(q), feature(k), jnp.concatenate([v, ones], axis=-1), None)
    sums = sums.astype(jnp.float32)
    return (sums[..., :-1] / (sums[..., -1:] + NORMALISER_EPSILON)).astype(v.dtype), S


class Retention(Decayed):
  """y, state = mixer(x, state, context)."""

  name, value_factor = 'retention', 2

  def mix(self, x_BTD, q, k, v, run):
    H, K, _ = self.dims
    log_decay = jnp.asarray(np.log1p(-np.exp2(-5.0 - np.arange(H))), jnp.float32)
    log_decay = constrain(jnp.broadcast_to(log_decay, (*x_BTD.shape[:2], H)),
                          'batch', 'length', 'heads')
    return run(q * K ** -0.5, k, v, log_decay)


class GLA(Decayed):
  """y, state = mixer(x, state, context)."""

  name, key_factor, by_channel = 'gla', 0.5, True

  @classmethod
  def cost(cls, settings: Settings) -> Cost:
    (H, K, V), plain = cls.sizes(settings), super().cost(settings)
    gate = GATE_RANK * (settings.dim + H * K)
    return plain._replace(parameters=plain.parameters + gate + H * K + V,
                          matrices=plain.matrices + gate)

  def __init__(self, settings: Settings, *, rngs: nnx.Rngs):
    super().__init__(settings, rngs=rngs)
    H, K, V = self.dims
    weight = normal(settings.std)
    self.w_gate_in = param(rngs, weight, (settings.dim, GATE_RANK), ('embed', None))
    self.w_gate_out = param(rngs, weight, (GATE_RANK, H, K), (None, 'heads', None))
    self.gate_bias = param(rngs, constant(0.0), (H * K,), ('heads',))
    self.norm_scale = param(rngs, constant(1.0), (V,), (None,))

  def mix(self, x_BTD, q, k, v, run):
    H, K, _ = self.dims
    low_BTR = linear(x_BTD, self.w_gate_in.get_value())
    logits = project(low_BTR, self.w_gate_out.get_value()).astype(jnp.float32)
    logits = shifted(logits, self.gate_bias.get_value().reshape(H, K))
    return run(q * K ** -0.5, k, v, jax.nn.log_sigmoid(logits) / GATE_ROOT)

  def norm(self, out_BTHV):
    return scaled(super().norm(out_BTHV), self.norm_scale.get_value())
