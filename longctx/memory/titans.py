"""Titans' neural memory: an MLP that learns each token as it is read, a chunk of tokens at a time.

  M(x) = act(.. act(x W_1) ..) W_n                       act: GELU; n = 1: a matrix
  g_t = clip(grad |M_0(k_t) - v_t|^2)                    M_0: the memory at the chunk's start
  S_t = eta_t S_{t-1} - theta_t g_t                      momentum: "surprise" that lasts
  M_t = (1 - alpha_t) M_{t-1} + S_t                      y_t = M_t(q_t)

No token's weights are ever made. With a_i the activations of k and d_i the gradients at z_i = a_{i-1} W_i,
both at the chunk's start, a token's gradient of W_i is the outer product a_{i-1}^T d_i, and so

  h_i = act(keep_t h_{i-1} W_i + push_t h_{i-1} S_i - ((h_{i-1} a_{i-1}^T) * coef) d_i),   h_0 = q
  A_tj = prod_{j<r<=t} (1 - alpha_r)     E_ji = prod_{i<r<=j} eta_r     coef = A E diag(theta)
  keep_t = prod_{r<=t} (1 - alpha_r)     push = A cumprod(eta)

is what all weights up to t say to q_t: O(C^2 + |W|) memory instead of O(C |W|). Gradients are written
out, so a backward pass goes through them as through any layer.

The clip: over all matrices together a token's gradient has norm at most MAX_NORM, |g| <= 1. Steps from
one start do not see each other: C of them with one key are one step C times as long, and past
theta = 1 / C a memory without a clip is thrown further at each chunk, to infinity. With it a chunk moves the
memory by a bounded length whatever theta is. The norm costs no tensor: |g|^2 = sum_i |a_{i-1}|^2 |d_i|^2.
It bounds the memory and not what goes back through it: where steps overshoot, the true gradient still
grows from chunk to chunk (16 tokens of 4 keys, theta 0.3: past float32 within 100 chunks), so a large rate
wants smaller chunks or model.truncate.
Published code clips by a shifted tanh that lifts a gradient of norm 0 to 1/2 and divides by 0; here a
gradient below the bound is left as it is.

Source: Behrouz et al. 2025, arXiv:2501.00663 (section 3); the form without weights of tokens is not in it.
Differs: the paper leaves act and the clip open.
Held by: tests/test_titans.py (loops over tokens and matrices in NumPy).

B batch  N heads  C tokens of a chunk  T tokens of a segment  H head dim
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp

MAX_NORM = 1.0

product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class State(NamedTuple):
  """The memory itself: a matrix of each layer and head, and its momentum; float32, batch first."""

  weights: tuple[jax.Array, ...]   # [B, N, in, out]
  momenta: tuple[jax.Array, ...]


class Tokens(NamedTuple):
  """What tokens ask and teach; float32."""

  q: jax.Array | None   # [..., C, H]; None: they only teach
  k: jax.Array       # [..., C, H]
  v: jax.Array       # [..., C, H]
  alpha: jax.Array   # [..., C] forgetting, 0 to 1
  eta: jax.Array     # [..., C] momentum, 0 to 1
  theta: jax.Array   # [..., C] step, at least 0
  valid: jax.Array   # [..., C] bool: False for padding, which changes neither weights nor momenta


def _share(z: jax.Array) -> jax.Array:
  return 0.5 * (1 + jax.lax.erf(z * 0.5 ** 0.5))


def act(z: jax.Array) -> jax.Array:
  return z * _share(z)


def slope(z: jax.Array) -> jax.Array:
  """act'(z)."""
  return _share(z) + z * jnp.exp(-0.5 * z * z) * (2 * jnp.pi) ** -0.5


def read(weights: tuple[jax.Array, ...], q: jax.Array) -> jax.Array:
  """M(q) [..., C, H] by weights [..., in, out] that stand still."""
  for i, W in enumerate(weights):
    q = product('...tp,...pf->...tf', act(q) if i else q, W)
  return q


def gradients(weights: tuple[jax.Array, ...], k: jax.Array, v: jax.Array, max_norm: float = MAX_NORM
              ) -> tuple[list[jax.Array], list[jax.Array]]:
  """(a_0 .. a_{n-1}, d_1 .. d_n): a token's clipped gradient of W_i is a_{i-1}^T d_i."""
  inputs, zs = [k], []
  for W in weights:
    zs.append(product('...tp,...pf->...tf', inputs[-1], W))
    inputs.append(act(zs[-1]))
  d = [2 * (zs[-1] - v)]
  for W, z in zip(weights[:0:-1], zs[-2::-1]):
    d.insert(0, product('...tf,...pf->...tp', d[0], W) * slope(z))
  inputs = inputs[:-1]
  square = lambda x: jnp.sum(x * x, axis=-1)
  norm2 = sum(square(a) * square(x) for a, x in zip(inputs, d)) / max_norm ** 2
  scale = jax.lax.rsqrt(jnp.maximum(norm2, 1.0))[..., None]
  return inputs, [x * scale for x in d]


def _between(factor: jax.Array) -> jax.Array:
  """[..., C] -> [..., t, j]: the product of factors j+1 .. t; 0 for j > t. Factors may be 0."""
  C = factor.shape[-1]
  after = jnp.arange(C)[:, None] > jnp.arange(C)
  return jnp.tril(jnp.cumprod(jnp.where(after, factor[..., :, None], 1.0), axis=-2))


def chunk(state: State, tokens: Tokens, max_norm: float = MAX_NORM
          ) -> tuple[jax.Array | None, State]:
  """(y [..., C, H] of each token after its own step, or None; the state after the chunk)."""
  q, k, v, *gates, valid = tokens
  alpha, eta, theta = (jnp.where(valid, x, rest) for x, rest in zip(gates, (0.0, 1.0, 0.0)))
  inputs, d = gradients(state.weights, k, v, max_norm)
  factors = jnp.stack([1 - alpha, eta])
  kept, lasting = between = _between(factors)
  keep, rolled = between[..., 0] * factors[..., :1]   # from the chunk's start on
  kept *= valid[..., None, :]   # nor does padding add the momentum to the weights once more
  coef = product('...tj,...ji->...ti', kept, lasting * theta[..., None, :])
  push = product('...tj,...j->...t', kept, rolled)
  last = lasting[..., -1, :] * theta
  h, weights, momenta = q, [], []
  for i, (W, S, a, x) in enumerate(zip(state.weights, state.momenta, inputs, d)):
    if q is not None:
      h = act(h) if i else h
      pairs = product('...tp,...ip->...ti', h, a) * coef
      h = (keep[..., None] * product('...tp,...pf->...tf', h, W)
           + push[..., None] * product('...tp,...pf->...tf', h, S)
           - product('...ti,...if->...tf', pairs, x))
    step = lambda weight, a=a, x=x: product('...ip,...if->...pf', a * weight[..., None], x)
    end = lambda y: y[..., -1, None, None]
    weights.append(end(keep) * W + end(push) * S - step(coef[..., -1, :]))
    momenta.append(end(rolled) * S - step(last))
  return h, State(tuple(weights), tuple(momenta))


def segment(state: State, tokens: Tokens, size: int) -> tuple[jax.Array | None, State]:
  """(y [B, N, T, H] or None, the state after) of a segment [B, N, T, ...] in chunks of `size` tokens."""
  B, N, T = tokens.alpha.shape
  if size == T:
    return chunk(state, tokens)
  cut = lambda x: jnp.moveaxis(x.reshape(B, N, T // size, size, *x.shape[3:]), 2, 0)
  def one(state, tokens):
    y, state = chunk(state, tokens)
    return state, y
  state, y = jax.lax.scan(one, state, jax.tree.map(cut, tokens))
  return None if y is None else jnp.moveaxis(y, 0, 2).reshape(B, N, T, -1), state


def shapes(head_dim: int, width: int, depth: int) -> list[tuple[int, int]]:
  """(in, out) of the matrices of a memory of so many layers."""
  dims = [head_dim, *[width] * (depth - 1), head_dim]
  return list(itertools.pairwise(dims))


def flops(head_dim: int, width: int, depth: int, size: int, *, apart: bool = False) -> float:
  """Of a token and head, forward, 2 a multiply-add. `apart`: read by weights that stand still."""
  count = float(size * size)   # coef
  for i, (p, f) in enumerate(shapes(head_dim, width, depth)):
    # Gradients, the ends of W and S; reads of W, or of both and of pairs.
    count += (4 + (i > 0)) * p * f if apart else (5 + (i > 0)) * p * f + size * (p + f)
  return 2 * count
