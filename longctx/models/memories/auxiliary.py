"""A loss of a layer's own, where only hidden states go on to the model's loss.

`add_loss(x, loss, weight)` is x; its backward pass adds the gradient of weight * loss to that of whatever
the caller derives from x. The loss itself shows nowhere, and what the caller multiplies its own loss by
does not reach it. Where nothing is differentiated, the loss is not computed.

Source: Megatron-LM's MoEAuxLossAutoScaler does the same.
Held by: tests/test_compressive.py.
"""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def add_loss(x: jax.Array, loss: jax.Array, weight: float) -> jax.Array:
  """x; the scalar `loss` enters gradients alone."""
  del loss, weight
  return x


def _forward(x, loss, weight):
  return add_loss(x, loss, weight), loss


def _backward(weight, loss, grad):
  return grad, jnp.full_like(loss, weight)


add_loss.defvjp(_forward, _backward)
