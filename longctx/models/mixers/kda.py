"""Kimi Delta Attention: the delta rule that forgets by a number for each key channel.

  a = exp(-exp(a_log) softplus(x W_a1 W_a2 + dt_bias))          beta = sigmoid(x W_beta)
  S_t = diag(a_t) S_{t-1} + beta_t k_t^T (v_t - k_t diag(a_t) S_{t-1})
  y = (rmsnorm(q_t S_t) * sigmoid(x W_g1 W_g2 + bias_gate)) W_out

W_a1 W_a2 and W_g1 W_g2 have the rank of a head's values; a_log is one number a head.
Source: Kimi Linear, arXiv:2510.26692, as in fla. Dims 0: those of attention heads. `negative`: beta
in (0, 2). Differs: projections are drawn as the model's others; softplus(dt_bias) is log-uniform in
[0.001, 0.1], as in Gated DeltaNet (fla has started both from there and from dt_bias = 0).
Held by: tests/test_delta.py, tests/test_models.py.

B batch  T tokens  D model  H heads  K key dim  V value dim, also the rank R
"""

import jax
import jax.numpy as jnp
from flax import nnx

from longctx import watch
from longctx.models.context import Context
from longctx.models.layers import RMSNorm, constant, linear, normal, param, shifted
from longctx.models.mixers.base import Cost, Settings
from longctx.models.mixers.gated_delta import State, rate_init, step_init
from longctx.models.mixers.qkv import QKV, check_chunk, head_dims, merge, project
from longctx.parallel.state_scan import Run, over_sequence
from longctx.recurrence.delta import Delta, Inputs, flops

RATES = (1.0, 16.0)    # of the initial exp(a_log)


class KDA(nnx.Module):
  """y, state = mixer(x, state, context)."""

  dependency = 'P0'
  reads = QKV.reads

  @staticmethod
  def cost(settings: Settings) -> Cost:
    H, K, V = dims = head_dims(settings, 'kda')
    check_chunk(settings)
    D = settings.dim
    matrices, conv, tail = QKV.cost(settings, dims)
    matrices += D * (2 * V + H + H * V) + V * H * (K + V)
    return Cost(parameters=matrices + conv + H + H * K + H * V + V, matrices=matrices,
                flops=2 * conv + H * flops(K, V, settings.form, settings.chunk, channels=True),
                state=H * K * V + tail, wire=H * K * (K + V), tail=tail)

  def __init__(self, settings: Settings, *, rngs: nnx.Rngs):
    H, K, V = self.dims = head_dims(settings, 'kda')
    D, weight = settings.dim, normal(settings.std)
    self.kernel = Delta('chunked' if settings.form == 'auto' else settings.form, settings.chunk)
    self.most = 2.0 if settings.negative else 1.0
    self.qkv = QKV(settings, self.dims, rngs=rngs)
    self.w_beta = param(rngs, weight, (D, H), ('embed', 'heads'))
    self.w_decay_in = param(rngs, weight, (D, V), ('embed', None))
    self.w_decay_out = param(rngs, weight, (V, H, K), (None, 'heads', None))
    self.a_log = param(rngs, rate_init(*RATES), (H,), ('heads',))
    self.dt_bias = param(rngs, step_init, (H * K,), ('heads',))
    self.w_gate_in = param(rngs, weight, (D, V), ('embed', None))
    self.w_gate_out = param(rngs, weight, (V, H, V), (None, 'heads', None))
    self.bias_gate = param(rngs, constant(0.0), (H * V,), ('heads',))
    self.norm = RMSNorm(V, settings.norm_epsilon, rngs=rngs)
    self.w_out = param(rngs, normal(settings.out_std), (H, V, D), ('heads', None, 'embed'))

  def init_state(self, batch_size: int) -> State:
    return State(jnp.zeros((batch_size, *self.dims), jnp.float32), self.qkv.init_state(batch_size))

  def __call__(self, x_BTD: jax.Array, state: State, context: Context,
               run: Run = over_sequence) -> tuple[jax.Array, State]:
    H, K, V = self.dims
    q, k, v, tail = self.qkv(x_BTD, state.conv, context)
    beta = self.most * jax.nn.sigmoid(linear(x_BTD, self.w_beta.get_value()).astype(jnp.float32))
    low_rank = lambda first, second: project(linear(x_BTD, first.get_value()), second.get_value())
    step = jax.nn.softplus(shifted(low_rank(self.w_decay_in, self.w_decay_out).astype(jnp.float32),
                                   self.dt_bias.get_value().reshape(H, K)))
    log_decay = -jnp.exp(self.a_log.get_value())[:, None] * step
    out_BTHV, memory = run(
        self.kernel, Inputs(q, k, v, beta, log_decay, context.reset_BT, context.valid_BT),
        state.memory)
    watch.tell('delta', q_BTHK=q, said_BTHV=out_BTHV, memory=memory)
    gate_BTHV = jax.nn.sigmoid(shifted(low_rank(self.w_gate_in, self.w_gate_out),
                                       self.bias_gate.get_value().reshape(H, V)))
    return merge(self.norm(out_BTHV) * gate_BTHV, self.w_out.get_value()), State(memory, tail)
