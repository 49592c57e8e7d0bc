"""DeltaNet: a memory written with what it gets wrong, without forgetting.

  beta = sigmoid(x W_beta)          S_t = S_{t-1} + beta_t k_t^T (v_t - k_t S_{t-1})
  y = rmsnorm(q_t S_t) W_out

Source: arXiv:2406.06484, as in fla. Dims 0: those of attention heads. `negative`: beta in (0, 2), with
which it can track states, arXiv:2411.12537. Differs: projections are drawn as the model's others.
Held by: tests/test_delta.py, tests/test_models.py.

B batch  T tokens  D model  H heads  K key dim  V value dim
"""

import jax
import jax.numpy as jnp
from flax import nnx

from longctx import watch
from longctx.models.context import Context
from longctx.models.layers import RMSNorm, linear, normal, param
from longctx.models.mixers.base import Cost, Settings
from longctx.models.mixers.gated_delta import State
from longctx.models.mixers.qkv import QKV, check_chunk, head_dims, merge
from longctx.parallel.state_scan import Run, over_sequence
from longctx.recurrence.delta import Delta, Inputs, flops


class DeltaNet(nnx.Module):
  """y, state = mixer(x, state, context)."""

  dependency = 'P0'
  reads = QKV.reads

  @staticmethod
  def cost(settings: Settings) -> Cost:
    H, K, V = dims = head_dims(settings, 'delta_net')
    check_chunk(settings)
    matrices, conv, tail = QKV.cost(settings, dims)
    matrices += settings.dim * H * (V + 1)
    return Cost(parameters=matrices + conv + V, matrices=matrices,
                flops=2 * conv + H * flops(K, V, settings.form, settings.chunk, channels=False),
                state=H * K * V + tail, wire=H * K * (K + V), tail=tail)

  def __init__(self, settings: Settings, *, rngs: nnx.Rngs):
    H, _, V = self.dims = head_dims(settings, 'delta_net')
    self.kernel = Delta('chunked' if settings.form == 'auto' else settings.form, settings.chunk)
    self.most = 2.0 if settings.negative else 1.0
    self.qkv = QKV(settings, self.dims, rngs=rngs)
    self.w_beta = param(rngs, normal(settings.std), (settings.dim, H), ('embed', 'heads'))
    self.norm = RMSNorm(V, settings.norm_epsilon, rngs=rngs)
    self.w_out = param(rngs, normal(settings.out_std), (H, V, settings.dim),
                       ('heads', None, 'embed'))

  def init_state(self, batch_size: int) -> State:
    return State(jnp.zeros((batch_size, *self.dims), jnp.float32), self.qkv.init_state(batch_size))

  def __call__(self, x_BTD: jax.Array, state: State, context: Context,
               run: Run = over_sequence) -> tuple[jax.Array, State]:
    q, k, v, tail = self.qkv(x_BTD, state.conv, context)
    beta = self.most * jax.nn.sigmoid(linear(x_BTD, self.w_beta.get_value()).astype(jnp.float32))
    out_BTHV, memory = run(
        self.kernel, Inputs(q, k, v, beta, None, context.reset_BT, context.valid_BT), state.memory)
    watch.tell('delta', q_BTHK=q, said_BTHV=out_BTHV, memory=memory)
    return merge(self.norm(out_BTHV), self.w_out.get_value()), State(memory, tail)
