"""The associative memory of ARMT: few memory tokens write it, every token reads it.

  phi(x)  u = [relu(x); relu(-x)]     phi = unit([u * roll(u, 1); .. ; u * roll(u, nu)])      (DPFP-nu)
  read    phi(q) W / (phi(q) . z + e)                                  e = 1e-5; 0 where W and z are 0
  write   k = phi(key)    old = k W / (k . z + e)    gamma = sg(clip(1 - k . z / (|k|^2 + e), 0, 1))
          W' = W + sum_m k_m^T beta_m (v_m - old_m)        z' = z + sum_m gamma_m k_m

The m tokens of a segment all read the old W. gamma keeps what z says of a key at one however often the
key is written, so that a value written over is read back whole.
Source: Rodkin et al. 2024, arXiv:2407.04841; DPFP: Schlag et al. 2021, arXiv:2102.11174.
Differs: phi has length 1, as in the authors' code: the paper's is of the fourth power of the
activations' scale in k . z, which e would drown.
Held by: tests/test_armt.py.

B batch  T tokens  M memory tokens  A width of a key  F = 2 nu A features  D model
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from longctx import watch
from longctx.recurrence.affine import product

NU = 3
EPSILON = 1e-5
SMALLEST = 1e-24   # of a squared length: below it phi is 0, and 1 / length would not be finite


class State(NamedTuple):
  """float32; batch first."""

  W: jax.Array   # [B, F, D]
  z: jax.Array   # [B, F]


def features(width: int) -> int:
  return 2 * NU * width


def empty(batch_size: int, width: int, dim: int) -> State:
  F = features(width)
  return State(jnp.zeros((batch_size, F, dim), jnp.float32), jnp.zeros((batch_size, F), jnp.float32))


def dpfp(x_BTA: jax.Array) -> jax.Array:
  """[B, T, F] float32, of length 1 or 0."""
  x = x_BTA.astype(jnp.float32)
  u = jnp.concatenate([jax.nn.relu(x), jax.nn.relu(-x)], axis=-1)
  phi = jnp.concatenate([u * jnp.roll(u, j, axis=-1) for j in range(1, NU + 1)], axis=-1)
  return phi * jax.lax.rsqrt(jnp.maximum((phi * phi).sum(-1, keepdims=True), SMALLEST))


def _look_up(state: State, phi_BTF: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(what is read [B, T, D], phi . z [B, T, 1])."""
  known_BT1 = product('btf,bf->bt', phi_BTF, state.z)[..., None]
  return product('btf,bfd->btd', phi_BTF, state.W) / (known_BT1 + EPSILON), known_BT1


def read(state: State, q_BTA: jax.Array) -> jax.Array:
  """[B, T, D] float32."""
  said_BTD, known_BT1 = _look_up(state, dpfp(q_BTA))
  watch.tell('armt', known_BC1=known_BT1)
  return said_BTD


def write(state: State, k_BMA: jax.Array, v_BMD: jax.Array, beta_BM1: jax.Array) -> State:
  """The state after a segment whose memory tokens say k, v and beta."""
  k_BMF = dpfp(k_BMA)
  old_BMD, known_BM1 = _look_up(state, k_BMF)
  square_BM1 = (k_BMF * k_BMF).sum(-1, keepdims=True)
  gamma_BM1 = jax.lax.stop_gradient((1 - known_BM1 / (square_BM1 + EPSILON)).clip(0, 1))
  new_BMD = beta_BM1 * (v_BMD.astype(jnp.float32) - old_BMD)
  return State(state.W + product('bmf,bmd->bfd', k_BMF, new_BMD),
               state.z + (gamma_BM1 * k_BMF).sum(1))
