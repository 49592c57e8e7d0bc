"""What the Compressive Transformer makes of old hidden states, and how it learns to.

  compress      every c tokens become one:  conv   W [x_1; ..; x_c] + b   (stride c)
                                            mean, max   of each number
  reconstruct   | Attn(h, old) - Attn(h, compressed) |^2, no positions, no mask but what is there

Source: Rae et al. 2019, arXiv:1911.05507, section 3.1 and algorithm 2.
Held by: tests/test_compressive.py.

B batch  T tokens, c of which make one of U  C queries  N query heads  K kv heads  H head dim  D model
"""

import jax
import jax.numpy as jnp

CONV, MEAN, MAX = 'conv', 'mean', 'max'


def compress(x_BTD: jax.Array, rate: int, kind: str, w_cDD: jax.Array | None = None,
             b_D: jax.Array | None = None) -> jax.Array:
  """[B, T / rate, D] in x's type."""
  B, T, D = x_BTD.shape
  if kind == CONV:
    w = w_cDD.reshape(rate * D, D).astype(x_BTD.dtype)
    return x_BTD.reshape(B, T // rate, rate * D) @ w + b_D.astype(x_BTD.dtype)
  x_BUcD = x_BTD.reshape(B, T // rate, rate, D)
  return x_BUcD.mean(2) if kind == MEAN else x_BUcD.max(2)


def compressed(valid_BT: jax.Array, rate: int) -> jax.Array:
  """[B, T / rate] bool: which of them are made of tokens alone."""
  return valid_BT.reshape(len(valid_BT), -1, rate).all(-1)


def distance(a_BCNH: jax.Array, b_BCNH: jax.Array, counts_B: jax.Array) -> jax.Array:
  """Mean square of what two attentions say differently, over the batch; rows not counted give 0."""
  wide = jnp.promote_types(jnp.float32, a_BCNH.dtype)
  squares_B = jnp.square(a_BCNH.astype(wide) - b_BCNH.astype(wide)).mean((1, 2, 3))
  return jnp.where(counts_B, squares_B, 0).mean()
