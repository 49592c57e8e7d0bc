"""Joining attention over two sets of keys into attention over their union.

Source: the log-sum-exp identity of online softmax, Milakov & Gimelshein 2018, arXiv:1805.02867.
Held by: tests/test_attention.py.

B batch  T queries  N query heads  H head dim
"""

import jax
import jax.numpy as jnp

Part = tuple[jax.Array, jax.Array]


def merge(a: Part, b: Part) -> Part:
  """(out_BTNH, lse_BTN) over the keys of both; a part that saw nothing (lse -1e30) weighs 0."""
  (out_a, lse_a), (out_b, lse_b) = a, b
  top = jax.lax.stop_gradient(jnp.maximum(lse_a, lse_b))
  weight_a, weight_b = jnp.exp(lse_a - top), jnp.exp(lse_b - top)
  total = weight_a + weight_b   # at least 1: one of the two is exp(0)
  wide = lse_a.dtype
  out = (out_a.astype(wide) * (weight_a / total)[..., None]
         + out_b.astype(wide) * (weight_b / total)[..., None])
  return out.astype(out_a.dtype), top + jnp.log(total)
