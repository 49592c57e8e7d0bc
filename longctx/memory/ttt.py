"""TTT-Linear's memory: a matrix and a bias that learn each token as it is read, a mini-batch at a time.

  M(x) = x + LN(x W + b)                        LN with a scale and a bias that are learned and stand still
  g_t = grad |LN(z_t) - (v_t - k_t)|^2 at z_t = k_t W_0 + b_0      W_0, b_0: at the mini-batch's start
  W_t = W_{t-1} - eta_t k_t^T g_t,  b_t = b_{t-1} - eta_t g_t      y_t = M_t(q_t)

No token's weights are made: q_t W_t = q_t W_0 - sum_{i<=t} eta_i (q_t . k_i) g_i, one product with a
triangle for a mini-batch (the dual form). The gradient is written out, LN's included.
Source: Sun et al. 2024, arXiv:2407.04620, section 2.
Differs: the public code halves the loss and divides the step of the t-th token of a mini-batch by t; the
paper's equations do neither.
Held by: tests/test_ttt.py (loops over tokens, with the matrix of LN's derivatives).

B batch  N heads  C tokens of a mini-batch  T tokens of a segment  H head dim
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

EPSILON = 1e-6   # of the public code

product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class State(NamedTuple):
  """float32, batch first."""

  W: jax.Array   # [B, N, H, H]: keys by values
  b: jax.Array   # [B, N, H]


class Tokens(NamedTuple):
  """float32. eta is 0 for padding, which then changes nothing."""

  q: jax.Array | None   # [..., C, H]; None: they only teach
  k: jax.Array     # [..., C, H]
  v: jax.Array     # [..., C, H]
  eta: jax.Array   # [..., C]


class Norm(NamedTuple):
  scale: jax.Array   # [N, H]
  bias: jax.Array    # [N, H]


def standard(z: jax.Array) -> tuple[jax.Array, jax.Array]:
  """((z - mean) / deviation, 1 / deviation [..., 1]) over the last dim."""
  z -= jnp.mean(z, axis=-1, keepdims=True)
  inverse = jax.lax.rsqrt(jnp.mean(z * z, axis=-1, keepdims=True) + EPSILON)
  return z * inverse, inverse


def gradient(z: jax.Array, target: jax.Array, norm: Norm) -> jax.Array:
  """Of |LN(z) - target|^2 by z; [..., N, C, H]."""
  scale, bias = (x[:, None] for x in norm)
  unit, inverse = standard(z)
  d = 2 * (scale * unit + bias - target) * scale
  mean = lambda x: jnp.mean(x, axis=-1, keepdims=True)
  return (d - mean(d) - unit * mean(d * unit)) * inverse


def read(state: State, q: jax.Array, norm: Norm) -> jax.Array:
  """M(q) [B, N, C, H] of a model that stands still."""
  return _said(q, product('...tp,...pf->...tf', q, state.W) + state.b[..., None, :], norm)


def _said(q: jax.Array, z: jax.Array, norm: Norm) -> jax.Array:
  return q + norm.scale[:, None] * standard(z)[0] + norm.bias[:, None]


def minibatch(state: State, tokens: Tokens, norm: Norm) -> tuple[jax.Array | None, State]:
  """(y [..., N, C, H] of each token after its own step, or None; the state after)."""
  (W, b), (q, k, v, eta) = state, tokens
  b = b[..., None, :]
  g = gradient(product('...tp,...pf->...tf', k, W) + b, v - k, norm)
  C, y = eta.shape[-1], None
  if q is not None:
    steps = jnp.tril(jnp.broadcast_to(eta[..., None, :], (*eta.shape, C)))
    pairs = (product('...tp,...ip->...ti', q, k) + 1) * steps   # 1: the bias
    z = product('...tp,...pf->...tf', q, W) + b - product('...ti,...if->...tf', pairs, g)
    y = _said(q, z, norm)
  g *= eta[..., None]
  return y, State(W - product('...tp,...tf->...pf', k, g), state.b - g.sum(-2))


def segment(state: State, tokens: Tokens, norm: Norm, size: int) -> tuple[jax.Array | None, State]:
  """(y [B, N, T, H] or None, the state after) of a segment [B, N, T, ...] in mini-batches of `size`."""
  B, N, T = tokens.eta.shape
  cut = lambda x: jnp.moveaxis(x.reshape(B, N, T // size, size, *x.shape[3:]), 2, 0)
  def one(state, tokens):
    y, state = minibatch(state, tokens, norm)
    return state, y
  state, y = jax.lax.scan(one, state, jax.tree.map(cut, tokens))
  return None if y is None else jnp.moveaxis(y, 0, 2).reshape(B, N, T, -1), state


def flops(head_dim: int, size: int, *, apart: bool = False) -> float:
  """Of a token and head, forward, 2 a multiply-add. `apart`: read while it stands still."""
  return 2.0 * (3 * head_dim * head_dim + (0 if apart else 2 * size * head_dim))
