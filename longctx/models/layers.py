"""The small parts that every model is made of: parameters, embedding, norm, positions, dropout.

A parameter is made by `param`, which names the meaning of each dim (`parallel.mesh.RULES` maps the
meanings to the mesh). Sources: RMSNorm arXiv:1910.07467; RoPE arXiv:2104.09864 (half layout, as
Llama); SwiGLU arXiv:2002.05202.
Held by: tests/test_layers.py.

B batch  T tokens  N heads  H head dim  D model  F mlp  V vocab
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from longctx.models import token_blocks
from longctx.models.lookup import lookup
from longctx.parallel.mesh import constrain

DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}


def param(rngs: nnx.Rngs, init: Callable, shape: tuple[int, ...],
          dims: tuple[str | None, ...]) -> nnx.Param:
  """A float32 parameter whose `dims` name the meaning of each dim of its shape."""
  return nnx.Param(init(rngs.params(), shape, jnp.float32), dims=dims)


def normal(std: float) -> Callable:
  return lambda key, shape, dtype: std * jax.random.normal(key, shape, dtype)


def constant(value: float) -> Callable:
  return lambda key, shape, dtype: jnp.full(shape, value, dtype)


@jax.custom_vjp
def linear(x: jax.Array, w_DF: jax.Array) -> jax.Array:
  """x [..., D] @ w [D, F] in x's type."""
  return x @ w_DF.astype(x.dtype)


def _linear_forward(x, w_DF):
  # The product itself and not a call of `linear`: the remat policies look for products.
  return x @ w_DF.astype(x.dtype), (x, w_DF)


def _linear_backward(residuals, grad):
  x, w_DF = residuals
  dx = grad @ w_DF.astype(grad.dtype).T
  # Over all leading dims at once: flattened first, dims that are cut over two mesh axes would be
  # gathered whole.
  dims = tuple(range(x.ndim - 1))
  product = lambda a, b: jax.lax.dot_general(a, b, ((dims, dims), ((), ())),
                                             preferred_element_type=jnp.float32)
  # A CPU transposes the left operand of this product: let it be the narrow one.
  D, F = w_DF.shape
  if D <= F:
    dw_DF = product(x, grad)
  else:
    dw_DF = jax.lax.optimization_barrier(product(grad, x)).T
  return dx, dw_DF.astype(w_DF.dtype)


linear.defvjp(_linear_forward, _linear_backward)


def _sum_rows(x: jax.Array, dims: int) -> jax.Array:
  """Sum over all but the last `dims` dims, float32, as a product with ones.

  The sum that XLA:CPU fuses with its factors walks down the columns and takes ten times as long; where
  such a product would be slow, compilers make a sum of it.
  """
  rows = tuple(range(x.ndim - dims))
  return jax.lax.dot_general(jnp.ones([x.shape[i] for i in rows], x.dtype), x, ((rows, rows), ((), ())),
                             precision=jax.lax.Precision.HIGHEST,
                             preferred_element_type=jnp.float32)


@jax.custom_vjp
def scaled(x: jax.Array, w: jax.Array) -> jax.Array:
  """x [..., C] * w [C] in x's type; w may have more of x's last dims. Its gradient is a `_sum_rows`."""
  return x * w.astype(x.dtype)


def _scaled_forward(x, w):
  return scaled(x, w), (x, w)


def _scaled_backward(residuals, grad):
  x, w = residuals
  return grad * w.astype(grad.dtype), _sum_rows(grad * x, w.ndim).astype(w.dtype)


@jax.custom_vjp
def shifted(x: jax.Array, bias: jax.Array) -> jax.Array:
  """x [..., C] + bias [C], as `scaled`."""
  return x + bias.astype(x.dtype)


def _shifted_forward(x, bias):
  return shifted(x, bias), bias


def _shifted_backward(bias, grad):
  return grad, _sum_rows(grad, bias.ndim).astype(bias.dtype)


scaled.defvjp(_scaled_forward, _scaled_backward)
shifted.defvjp(_shifted_forward, _shifted_backward)


class Embedding(nnx.Module):
  """A table [V, D]: tokens to vectors, and, where tied, vectors to logits."""

  def __init__(self, vocab_size: int, dim: int, std: float, *, rngs: nnx.Rngs):
    self.table = param(rngs, normal(std), (vocab_size, dim), ('vocab', 'embed'))

  def __call__(self, tokens_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return lookup(self.table.get_value(), tokens_BT, dtype)


class RMSNorm(nnx.Module):
  """x / rms(x) * scale over the last dim, in float32 whatever the input's type."""

  def __init__(self, dim: int, epsilon: float, *, rngs: nnx.Rngs):
    self.epsilon = epsilon
    self.scale = param(rngs, constant(1.0), (dim,), (None,))

  def __call__(self, x: jax.Array) -> jax.Array:
    y = x.astype(jnp.float32)
    y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
    return scaled(y, self.scale.get_value()).astype(x.dtype)


def rotary_angles(position_BT: jax.Array, head_dim: int, base: float
                  ) -> tuple[jax.Array, jax.Array]:
  """cos and sin of the angles position * base^(-2j / H), each [B, T, 1, H/2] float32."""
  frequency = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
  angle = position_BT[..., None, None].astype(jnp.float32) * frequency
  # The product by 1 is never fused: XLA:CPU would else compute every cosine again for every head,
  # layer and pass (5 ms instead of 0.3 for 3072 tokens).
  eye = jnp.eye(head_dim // 2, dtype=jnp.float32)
  kept = lambda x: jnp.einsum('BTNH,HJ->BTNJ', x, eye, precision=jax.lax.Precision.HIGHEST)
  return kept(jnp.cos(angle)), kept(jnp.sin(angle))


def rotate(x_BTNH: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
  """RoPE: turns the pair (x_j, x_{j + H/2}) by its angle."""
  cos, sin = angles
  a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
  """Inverted dropout; identity without a key or at rate 0.

  Of keys [S] each serves one of S segments that B rows were cut into, x [B S, ...] being all of them.
  """
  if key is None or rate == 0.0:
    return x
  S = key.size
  draw = lambda key: jax.random.bernoulli(key, 1.0 - rate, (x.shape[0] // S, *x.shape[1:]))
  keep = draw(key) if not key.ndim else jax.vmap(draw, out_axes=1)(key).reshape(x.shape)
  return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


def of_each(derive: Callable[[jax.Array], jax.Array], key: jax.Array) -> jax.Array:
  """derive(key); of keys [S] that of each of them."""
  return jax.vmap(derive)(key) if key.ndim else derive(key)


def rows_where(which_B: jax.Array, yes: Any, no: Any) -> Any:
  """Row by row one tree or the other."""
  wide = lambda x: which_B.reshape(-1, *[1] * (x.ndim - 1))
  return jax.tree.map(lambda a, b: jnp.where(wide(b), a, b), yes, no)


@jax.custom_vjp
def gated(gate: jax.Array, x: jax.Array) -> jax.Array:
  """silu(gate) * x, which keeps nothing but its two arguments for the backward pass."""
  return jax.nn.silu(gate) * x


def _gated_backward(residuals, grad):
  # The barrier: XLA would else find the forward's sigmoid again and keep it, and silu, in memory.
  gate, x, grad = jax.lax.optimization_barrier((*residuals, grad))
  sigmoid = jax.nn.sigmoid(gate)
  silu = gate * sigmoid
  return grad * x * (sigmoid + silu * (1 - sigmoid)), grad * silu


gated.defvjp(lambda gate, x: (gated(gate, x), (gate, x)), _gated_backward)


class MLP(nnx.Module):
  """The feed-forward layer: 'swiglu' W_o (silu(x W_g) * x W_i), or 'gelu' W_o gelu(x W_i).

  `block`: tokens of each row of a device at a time, made again for the backward pass; 0: all.
  """

  def __init__(self, dim: int, mlp_dim: int, kind: str, std: float, out_std: float, *,
               block: int = 0, rngs: nnx.Rngs):
    self.kind, self.block = kind, block
    if kind == 'swiglu':
      self.w_in = param(rngs, normal(std), (dim, 2, mlp_dim), ('embed', None, 'mlp'))
    else:
      self.w_in = param(rngs, normal(std), (dim, mlp_dim), ('embed', 'mlp'))
    self.w_out = param(rngs, normal(out_std), (mlp_dim, dim), ('mlp', 'embed'))

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    w_in, w_out = self.w_in.get_value(), self.w_out.get_value()
    w_ins = (w_in[:, 0], w_in[:, 1]) if self.kind == 'swiglu' else (w_in,)
    activation = gated if self.kind == 'swiglu' else jax.nn.gelu
    if 0 < self.block < x_BTD.shape[1] // token_blocks.cuts(x_BTD)[1]:
      y_BTD = token_blocks.feed_forward(activation, x_BTD, w_ins, w_out, self.block)
      return constrain(y_BTD, 'batch', 'length', None)
    h_BTF = constrain(activation(*(linear(x_BTD, w) for w in w_ins)), 'batch', 'length', 'mlp')
    return linear(h_BTF, w_out)
