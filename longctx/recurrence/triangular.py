"""Inverse of a unit lower triangular matrix, and products decayed from one token to another, by halves.

  (I + L)^-1 = [[A, 0], [-D L21 A, D]]     A, D the inverses of the two diagonal halves

from blocks of four, where the inverse is (I - L)(I + L^2), upwards: log2(C) - 2 rounds of products. The
doubling of the whole Neumann series takes as many rounds, but loses all digits where keys repeat:
the powers of L then grow as binomial coefficients and cancel (with C = 64 and one key, 1e18).
The backward pass is dL = -T^T dT T^T. Always float32.
Sources: UT transform, arXiv:2406.06484; decays by halves keep every exponent <= 0.
Held by: tests/test_decay.py, tests/test_delta.py, tests/test_diagonal_low_rank.py.

G all chunks of all rows and heads  X left sides  M blocks  C tokens of a chunk  K key dim
"""

import jax
import jax.numpy as jnp

from longctx.recurrence.affine import product

GRID = 2.0 ** -8   # multiples of it up to 2^16 are float32 numbers: sums of 700 log decays of -88


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
  return _inverse(jax.lax.collapse(lower_CC, 0, -2)).reshape(lower_CC.shape)


def _inverse_forward(lower_CC):
  inverse_CC = inverse(lower_CC)
  return inverse_CC, inverse_CC


def _inverse_backward(inverse_CC, grad_CC):
  left = product('...ji,...jk->...ik', inverse_CC, grad_CC)
  return -product('...ik,...lk->...il', left, inverse_CC),


inverse.defvjp(_inverse_forward, _inverse_backward)


def decayed_pairs(x_XCK: jax.Array, y_CK: jax.Array, log_decay_CK: jax.Array,
                  own: tuple[bool, ...]) -> jax.Array:
  """[..., X, t, i] = sum_k x_tk y_ik exp(log decay from i to t), for X left sides [..., X, C, K].

  The decay counts the tokens i + 1 .. t, and pairs are i <= t, for a side that is its `own`; without,
  the tokens i + 1 .. t - 1 and pairs i < t. All else is 0. log_decay <= 0 and finite. Between two halves
  it is summed from the end of the first to either side: no factor overflows, and no sum is the
  difference of two long ones, so that a decay of nearly 0 costs its neighbours no digits.
  """
  C, K = y_CK.shape[-2:]
  # All leading dims in one: XLA:CPU fails on products of rank 8.
  x = jax.lax.collapse(x_XCK, 0, -3)
  y, g = jax.lax.collapse(y_CK, 0, -2), jax.lax.collapse(log_decay_CK, 0, -2)
  with_own = jnp.asarray(own, jnp.float32)[:, None, None]
  blocks = (jnp.sum(x * y[:, None], axis=-1) * with_own[..., 0])[..., None, None]
  before, behind, total = jnp.zeros_like(g), jnp.zeros_like(g), g   # of each token's block
  size = 1
  while size < C:
    half = lambda z, i, s=size: z.reshape(*z.shape[:-2], C // (2 * s), 2, s, K)[..., i, :, :]
    first, second = total[:, 0::2, None], total[:, 1::2, None]
    upto = half(before, 1)[:, None] + half(g, 1)[:, None] * with_own[..., None]
    left = half(x, 1) * jnp.exp(upto)
    right = half(y, 0) * jnp.exp(half(behind, 0))
    corner = product('gxmtk,gmik->gxmti', left, right)
    blocks = _halves(blocks[:, :, 0::2], corner, blocks[:, :, 1::2])
    whole = lambda a, b: jnp.stack([a, b], axis=2).reshape(g.shape)
    before = whole(half(before, 0), half(before, 1) + first)
    behind = whole(half(behind, 0) + second, half(behind, 1))
    total = (first + second)[:, :, 0]
    size *= 2
  return blocks.reshape(*x_XCK.shape[:-1], C)


def between(log_decay_C: jax.Array) -> jax.Array:
  """[..., t, i]: the log decay from token i to t, of the tokens i + 1 .. t; means nothing for i > t.

  The difference of two sums from the chunk's start, without the rounding that strong decays leave in
  them: the multiples of GRID in the log decays sum up exactly, and what remains of them is small.
  """
  coarse = jax.lax.stop_gradient(jnp.round(log_decay_C / GRID) * GRID)
  pairs = lambda b: b[..., :, None] - b[..., None, :]
  upto = lambda x: jnp.cumsum(x, axis=-1)
  return pairs(upto(coarse)) + pairs(upto(log_decay_C - coarse))


def sums_around(log_decay_CK: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Sums over the chunk's tokens before each, up to and with it, and behind it."""
  rest = jnp.zeros_like(log_decay_CK[..., :1, :])
  axis = log_decay_CK.ndim - 2
  before = jnp.cumsum(jnp.concatenate([rest, log_decay_CK[..., :-1, :]], axis=-2), axis=axis)
  behind = jax.lax.cumsum(jnp.concatenate([log_decay_CK[..., 1:, :], rest], axis=-2), axis=axis,
                          reverse=True)
  return before, before + log_decay_CK, behind
