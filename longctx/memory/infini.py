"""Infini-attention's compressive memory: a sum of outer products, normalised, written a segment at a time.

  read      A = phi(q) M / (phi(q) . z)                  phi(x) = elu(x) + 1; 0 where z = 0
  linear    M' = M + phi(K)^T V                          z' = z + sum_t phi(k_t)
  delta     M' = M + phi(K)^T (V - phi(K) M / (phi(K) z))

z is a sum that needs no M, so the delta rule's map of M is affine with factors that are known from the
keys alone, and all segments are worked on side by side, exactly:

  M' = (I - phi(K)^T D phi(K)) M + phi(K)^T V            D = diag(1 / (phi(K) z)), 0 where z = 0

Source: Munkhdalai et al. 2024, arXiv:2404.07143 (equations 3 to 6); the map of a segment is not in it.
Held by: tests/test_infini.py (loops in NumPy; all at once == one by one).

B batch  S segments  C tokens of one  N query heads  K kv heads  G = N/K  H head dim
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from longctx import watch
from longctx.recurrence.affine import carry, product


class State(NamedTuple):
  """float32; batch first."""

  M: jax.Array   # [B, K, H, H]: keys by values
  z: jax.Array   # [B, K, H]


def empty(batch_size: int, kv_heads: int, head_dim: int) -> State:
  return State(jnp.zeros((batch_size, kv_heads, head_dim, head_dim), jnp.float32),
               jnp.zeros((batch_size, kv_heads, head_dim), jnp.float32))


def feature(x: jax.Array) -> jax.Array:
  return jax.nn.elu(x.astype(jnp.float32)) + 1


def inverse(x: jax.Array) -> jax.Array:
  """1 / x, and 0 where x is 0: nothing was written yet. Both gradients are finite."""
  there = x > 0
  return jnp.where(there, 1 / jnp.where(there, x, 1), 0)


def read(state: State, q_BCNH: jax.Array) -> jax.Array:
  """[B, C, N, H] float32; each kv head's memory serves its group of query heads."""
  B, C, N, H = q_BCNH.shape
  q = feature(q_BCNH).reshape(B, C, state.z.shape[1], -1, H)
  out = product('bckgh,bkhv->bckgv', q, state.M)
  known = product('bckgh,bkh->bckg', q, state.z)
  watch.tell('infini', known_BCKG=known)
  out *= inverse(known)[..., None]
  return out.reshape(B, C, N, H)


def _features(k: jax.Array, v: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
  """phi(K) and V with 0 where there is no token."""
  keep = valid[..., None, None]
  return jnp.where(keep, feature(k), 0), jnp.where(keep, v.astype(jnp.float32), 0)


def write(state: State, k_BCKH: jax.Array, v_BCKH: jax.Array, valid_BC: jax.Array, *, delta: bool
          ) -> State:
  """The state after a segment."""
  k, v = _features(k_BCKH, v_BCKH, valid_BC)
  if delta:
    known = inverse(product('bckh,bkh->bck', k, state.z))
    v -= product('bckh,bkhv->bckv', k, state.M) * known[..., None]
  return State(state.M + product('bckh,bckv->bkhv', k, v), state.z + k.sum(1))


def before(state: State, k_BSCKH: jax.Array, v_BSCKH: jax.Array, valid_BSC: jax.Array, *,
           delta: bool) -> tuple[State, State]:
  """(the state before each segment, [B, S, ...]; the state after the last), all side by side."""
  k, v = _features(k_BSCKH, v_BSCKH, valid_BSC)
  sums_BSKH = k.sum(2)
  ends_BSKH = state.z[:, None] + jnp.cumsum(sums_BSKH, axis=1)
  z_BSKH = jnp.concatenate([state.z[:, None], ends_BSKH[:, :-1]], axis=1)
  write_SBKHV = product('bsckh,bsckv->sbkhv', k, v)
  if not delta:
    ends = state.M + jnp.cumsum(write_SBKHV, axis=0)
    M = jnp.concatenate([state.M[None], ends[:-1]])
    after = ends[-1]
  else:
    known = inverse(product('bsckh,bskh->bsck', k, z_BSKH))
    map_SBKHH = jnp.eye(k.shape[-1]) - product('bsckh,bsckj->sbkhj', k, k * known[..., None])
    M, after = carry(map_SBKHH, write_SBKHV, state.M)
  return State(jnp.moveaxis(M, 0, 1), z_BSKH), State(after, ends_BSKH[:, -1])
