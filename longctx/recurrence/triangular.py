"""Inverse of a unit lower triangular matrix, and products decayed from one token to another, by halves.

  (I + L)^-1 = [[A, 0], [-D L21 A, D]]     A, D the inverses of the two diagonal halves

from blocks of four, where the inverse is (I - L)(I + L^2), upwards: log2(C) - 2 rounds of products. The
doubling of the whole Neumann series takes as many rounds, but loses all digits where keys repeat:
the powers of L then grow as binomial coefficients and cancel (with C = 64 and one key, 1e18).
The backward pass is dL = -T^T dT T^T. Always float32.
Sources: UT transform, arXiv:2406.06484; decays by halves keep every exponent <= 0.
Held by: tests/test_delta.py.

G all chunks of all rows and heads  X left sides  M blocks  C tokens of a chunk  K key dim
"""

import jax
import jax.numpy as jnp

from longctx.recurrence.affine import product


def _halves(first: jax.Array, corner: jax.Array, second: jax.Array) -> jax.Array:
  """[..., s, s] blocks [[first, 0], [corner, second]] -> [..., 2s, 2s]."""
  top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
  return jnp.concatenate([top, jnp.concatenate([corner, second], axis=-1)], axis=-2)


def _inverse(lower_GCC: jax.Array) -> jax.Array:
  C, h = lower_GCC.shape[-1], lower_GCC.shape[-1] // 2
  if C <= 4:
    eye = jnp.eye(C, dtype=jnp.float32)
    return product('gij,gjk->gik', eye - lower_GCC, eye + product('gij,gjk->gik', lower_GCC, lower_GCC))
  halves = _inverse(jnp.concatenate([lower_GCC[:, :h, :h], lower_GCC[:, h:, h:]]))
  first, second = jnp.split(halves, 2)
  right = product('gjk,gkl->gjl', lower_GCC[:, h:, :h], first)
  return _halves(first, -product('gij,gjl->gil', second, right), second)


@jax.custom_vjp
def inverse(lower_CC: jax.Array) -> jax.Array:
  """(I + lower)^-1 of [..., C, C] strictly lower triangular float32 matrices, C a power of two."""
  return _inverse(lower_CC.reshape(-1, *lower_CC.shape[-2:])).reshape(lower_CC.shape)


def _inverse_forward(lower_CC):
  inverse_CC = inverse(lower_CC)
  return inverse_CC, inverse_CC


def _inverse_backward(inverse_CC, grad_CC):
  left = product('...ji,...jk->...ik', inverse_CC, grad_CC)
  return -product('...ik,...lk->...il', left, inverse_CC),


inverse.defvjp(_inverse_forward, _inverse_backward)


def decayed_products(x: jax.Array, to_CK: jax.Array, y_CK: jax.Array, from_CK: jax.Array,
                     diagonal: bool) -> jax.Array:
  """[..., t, i] = sum_k x_tk y_ik exp(to_tk - from_ik) for i <= t (i < t without `diagonal`), else 0.

  x is [..., C, K], or [..., X, C, K] for X left sides at once. `from` is the log decay from the
  start of the chunk up to and with each token, `to` the same or, without `diagonal`, up to the
  token before. Between two halves the decay is counted from the end of the first, so that neither
  factor ever overflows.
  """
  C, K = y_CK.shape[-2:]
  flat = lambda x: x.reshape(-1, C, K)   # of low rank: XLA:CPU fails on rank 8
  x_GXCK = x.reshape(-1, x.shape[-3] if x.ndim > y_CK.ndim else 1, C, K)
  to_GCK, y_GCK, from_GCK = flat(to_CK), flat(y_CK), flat(from_CK)
  own = jnp.sum(x_GXCK * (y_GCK * jnp.exp(to_GCK - from_GCK))[:, None], axis=-1) if diagonal else (
      jnp.zeros(x_GXCK.shape[:-1], jnp.float32))
  blocks = own[..., None, None]   # [G, X, M, s, s], from the diagonal upwards
  size = 1
  while size < C:
    half = lambda x, i, s=size: x.reshape(*x.shape[:-2], C // (2 * s), 2, s, K)[..., i, :, :]
    middle = half(from_GCK, 0)[..., -1:, :]
    left = half(x_GXCK, 1) * jnp.exp(half(to_GCK, 1) - middle)[:, None]
    right = half(y_GCK, 0) * jnp.exp(middle - half(from_GCK, 0))
    corner = product('gxmtk,gmik->gxmti', left, right)
    blocks = _halves(blocks[:, :, 0::2], corner, blocks[:, :, 1::2])
    size *= 2
  return blocks.reshape(*x.shape[:-1], C)
