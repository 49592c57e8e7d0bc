"""A loss of a layer's own, where only hidden states go on to the model's loss.

`add_loss(x, loss, weight)` is x; its backward pass adds the gradient of weight * loss to that of whatever
the caller derives from x. The loss itself shows nowhere, and what the caller multiplies its own loss by
does not reach it: whoever adds up the gradients of microbatches says with `share_of_batch` how much of the batch
each is. Where nothing is differentiated, the loss is not computed.

Source: Megatron-LM's MoEAuxLossAutoScaler does the same.
Held by: tests/test_compressive.py.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

_share = contextvars.ContextVar('share', default=1.0)


@contextlib.contextmanager
def share_of_batch(part: float) -> Iterator[None]:
  """What is traced inside reads `part` of a batch's rows: a mean over them counts so much."""
  token = _share.set(part)
  yield
  _share.reset(token)


def add_loss(x: jax.Array, loss: jax.Array, weight: float) -> jax.Array:
  """x; the scalar `loss`, a mean over the rows that are read, enters gradients alone."""
  return _add(x, loss, weight * _share.get())


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _add(x: jax.Array, loss: jax.Array, weight: float) -> jax.Array:
  del loss, weight
  return x


def _forward(x, loss, weight):
  return x, loss


def _backward(weight, loss, grad):
  return grad, jnp.full_like(loss, weight)


_add.defvjp(_forward, _backward)
