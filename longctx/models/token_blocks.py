"""A feed-forward layer a block of tokens at a time: its inner activations never exist whole.

    h = activation(x W_1, ...)      y = h W_out

Forward keeps x and nothing else; the backward pass makes a block's h again and turns it back at
once. Live memory: B x block x F numbers in place of B x T x F, whatever the length, and a float32
gradient of the weights. Every device walks its own tokens: no block moves tokens between devices,
the weights are gathered once and their gradients summed over devices once, not once a block.

Source: blockwise feed-forward, Liu and Abbeel 2023, arXiv:2305.19370.
Held by: tests/test_layers.py, tests/test_decoder_memory.py (compiled memory, exchanges).

B batch  T tokens  C tokens of a block  D model  F mlp  X shards of the batch  R of the length
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from longctx.parallel import mesh


def cuts(x_BTD: jax.Array) -> tuple[int, int]:
  """Shards of the batch and of the length under the current layout, where they divide."""
  layout = mesh.current()
  sizes = (layout.size('batch'), layout.size('length')) if layout else (1, 1)
  return tuple(n if size % n == 0 else 1 for n, size in zip(sizes, x_BTD.shape))


def feed_forward(activation: Callable, x_BTD: jax.Array, w_ins: tuple[jax.Array, ...],
                 w_out_FD: jax.Array, block: int) -> jax.Array:
  """activation(x @ w for each of w_ins) @ w_out, `block` tokens of each row of a device at a time."""
  (B, T, D), (X, R) = x_BTD.shape, cuts(x_BTD)
  x_XBRTD = x_BTD.reshape(X, B // X, R, T // R, D)
  return _in_blocks(activation, block, x_XBRTD, w_ins, w_out_FD).reshape(B, T, D)


# Below this line B is the batch of one shard and T the length of one.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_blocks(activation, block, x_XBRTD, w_ins, w_out_FD):
  w_ins, w_out_FD = _whole(w_ins, w_out_FD, x_XBRTD.dtype)
  def visit(at, put, y_XBRTD):
    h_XBRCF = activation(*(at(x_XBRTD) @ w for w in w_ins))
    return put(y_XBRTD, h_XBRCF @ w_out_FD)
  return _walk(visit, jnp.zeros_like(x_XBRTD), x_XBRTD.shape[3], block)


def _forward(activation, block, x_XBRTD, w_ins, w_out_FD):
  return _in_blocks(activation, block, x_XBRTD, w_ins, w_out_FD), (x_XBRTD, w_ins, w_out_FD)


def _backward(activation, block, residuals, dy_XBRTD):
  x_XBRTD, *weights = residuals
  w_ins, w_out_FD = _whole(*weights, x_XBRTD.dtype)
  X, _, R, T, _ = x_XBRTD.shape
  product = functools.partial(jnp.einsum, 'XBRCI,XBRCJ->XRIJ', preferred_element_type=jnp.float32)

  def visit(at, put, carry):
    dx_XBRTD, dw_ins, dw_out = carry
    x, dy = at(x_XBRTD), at(dy_XBRTD)
    h, pull = jax.vjp(activation, *(x @ w for w in w_ins))
    dinner = pull(dy @ w_out_FD.T)
    dx = sum(d @ w.T for d, w in zip(dinner, w_ins))
    dw_ins = tuple(dw + product(x, d) for dw, d in zip(dw_ins, dinner))
    return put(dx_XBRTD, dx), dw_ins, dw_out + product(h, dy)

  zeros = lambda w: jnp.zeros((X, R, *w.shape), jnp.float32)
  dx_XBRTD, *dweights = _walk(
      visit, (jnp.zeros_like(x_XBRTD), tuple(map(zeros, w_ins)), zeros(w_out_FD)), T, block)
  total = lambda dw, w, *dims: mesh.summed(dw, *dims).astype(w.dtype)
  dw_ins, dw_out = dweights
  return (dx_XBRTD, tuple(total(dw, w, 'embed', 'mlp') for dw, w in zip(dw_ins, weights[0])),
          total(dw_out, weights[1], 'mlp', 'embed'))


_in_blocks.defvjp(_forward, _backward)


def _whole(w_ins, w_out_FD, dtype):
  """The weights in the arithmetic's type and whole but for F: cut, each block would gather them."""
  return (tuple(mesh.constrain(w.astype(dtype), None, 'mlp') for w in w_ins),
          mesh.constrain(w_out_FD.astype(dtype), 'mlp', None))


def _walk(visit: Callable, carry: Any, length: int, block: int) -> Any:
  """visit(at, put, carry) for each block; at(x) is an array's block, put(x, part) writes it."""
  def one(start, size, carry):
    at = lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis=3)
    put = lambda x, part: jax.lax.dynamic_update_slice_in_dim(x, part, start, axis=3)
    return visit(at, put, carry)

  blocks, rest = divmod(length, block)
  carry, _ = jax.lax.scan(lambda carry, i: (one(i * block, block, carry), None), carry,
                          jnp.arange(blocks))
  return one(length - rest, rest, carry) if rest else carry
