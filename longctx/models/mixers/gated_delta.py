"""Gated DeltaNet: the delta rule with a forgetting number a head and a gated, normed output.

  a = exp(-exp(a_log) softplus(x W_a + dt_bias))          beta = sigmoid(x W_beta)
  S_t = a_t S_{t-1} + beta_t k_t^T (v_t - k_t a_t S_{t-1})
  y = (rmsnorm(q_t S_t) * silu(x W_gate)) W_out

Source: arXiv:2412.06464, as in Qwen3-Next and fla. Dims 0: keys of 3/4 of the model's width in all,
values twice as wide (fla). `negative`: beta in (0, 2), arXiv:2411.12537.
Differs: projections are drawn as the model's others; every head has keys of its own.
Held by: tests/test_delta.py (the layer of transformers' qwen3_next), tests/test_models.py.

B batch  T tokens  D model  H heads  K key dim  V value dim
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from longctx import watch
from longctx.models.context import Context
from longctx.models.layers import RMSNorm, linear, normal, param
from longctx.models.mixers.base import Cost, Settings
from longctx.models.mixers.qkv import QKV, check_chunk, head_dims, merge, project
from longctx.parallel.state_scan import Run, over_sequence
from longctx.recurrence.delta import Delta, Inputs, flops

STEPS = (1e-3, 1e-1)    # of the initial softplus(dt_bias)
STEP_FLOOR = 1e-4
RATES = (0.01, 16.0)    # of the initial exp(a_log)


class State(NamedTuple):
  """float32, batch first."""

  memory: jax.Array   # [B, H, K, V]
  conv: jax.Array     # [B, W - 1, H (2K + V)]


def rate_init(low: float, high: float):
  return lambda key, shape, dtype: jnp.log(jax.random.uniform(key, shape, dtype, low, high))


def step_init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
  """softplus of it is log-uniform in STEPS."""
  low, high = jnp.log(jnp.asarray(STEPS))
  step = jnp.exp(jax.random.uniform(key, shape, dtype, low, high)).clip(STEP_FLOOR)
  return step + jnp.log(-jnp.expm1(-step))


class GatedDelta(nnx.Module):
  """y, state = mixer(x, state, context)."""

  dependency = 'P0'
  reads = QKV.reads

  @staticmethod
  def cost(settings: Settings) -> Cost:
    H, K, V = dims = head_dims(settings, 'gated_delta', parts=3, value_factor=2)
    check_chunk(settings)
    matrices, conv, tail = QKV.cost(settings, dims)
    matrices += settings.dim * H * (2 * V + 2)
    return Cost(parameters=matrices + conv + 2 * H + V, matrices=matrices,
                flops=2 * conv + H * flops(K, V, settings.form, settings.chunk, channels=False),
                state=H * K * V + tail, wire=H * K * (K + V), tail=tail)

  def __init__(self, settings: Settings, *, rngs: nnx.Rngs):
    H, _, V = self.dims = head_dims(settings, 'gated_delta', parts=3, value_factor=2)
    D, weight = settings.dim, normal(settings.std)
    self.kernel = Delta('chunked' if settings.form == 'auto' else settings.form, settings.chunk)
    self.most = 2.0 if settings.negative else 1.0
    self.qkv = QKV(settings, self.dims, rngs=rngs)
    self.w_decay = param(rngs, weight, (D, H), ('embed', 'heads'))
    self.w_beta = param(rngs, weight, (D, H), ('embed', 'heads'))
    self.a_log = param(rngs, rate_init(*RATES), (H,), ('heads',))
    self.dt_bias = param(rngs, step_init, (H,), ('heads',))
    self.w_gate = param(rngs, weight, (D, H, V), ('embed', 'heads', None))
    self.norm = RMSNorm(V, settings.norm_epsilon, rngs=rngs)
    self.w_out = param(rngs, normal(settings.out_std), (H, V, D), ('heads', None, 'embed'))

  def init_state(self, batch_size: int) -> State:
    return State(jnp.zeros((batch_size, *self.dims), jnp.float32), self.qkv.init_state(batch_size))

  def __call__(self, x_BTD: jax.Array, state: State, context: Context,
               run: Run = over_sequence) -> tuple[jax.Array, State]:
    q, k, v, tail = self.qkv(x_BTD, state.conv, context)
    number = lambda w: linear(x_BTD, w.get_value()).astype(jnp.float32)   # [B, T, H]
    beta = self.most * jax.nn.sigmoid(number(self.w_beta))
    log_decay = -jnp.exp(self.a_log.get_value()) * jax.nn.softplus(
        number(self.w_decay) + self.dt_bias.get_value())
    out_BTHV, memory = run(
        self.kernel, Inputs(q, k, v, beta, log_decay, context.reset_BT, context.valid_BT),
        state.memory)
    watch.tell('delta', q_BTHK=q, said_BTHV=out_BTHV, memory=memory)
    gate_BTHV = project(x_BTD, self.w_gate.get_value())
    return merge(self.norm(out_BTHV) * jax.nn.silu(gate_BTHV), self.w_out.get_value()), State(
        memory, tail)
