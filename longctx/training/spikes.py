"""Steps whose loss or gradient leaps out of those before: seen on the device, and not taken.

    spike = x > mean + sigmas * std     x the loss, or the gradient's norm, over its last W values

and never while fewer than W/2 are known. The rule is OLMo-core's SkipStepOptimizer, which has
sigmas = 6 and W = 128. Differs from it: what is not finite leaves no mark, and a spike enters the
history as the limit that it broke, so that one leap does not hide the next and a lasting change of
level is taken after a while. All of it is part of the state: a run carried on judges alike.
Held by: tests/test_spikes.py.

W window
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Recent(NamedTuple):
  """The last W losses and gradient norms, each in the slot count mod W."""

  loss_W: jax.Array
  grad_norm_W: jax.Array
  count: jax.Array   # int32: how many were entered in all


def no_history(window: int) -> Recent:
  zeros = lambda: jnp.zeros(window, jnp.float32)   # one buffer each: the state is donated
  return Recent(zeros(), zeros(), jnp.zeros((), jnp.int32))


def judge(recent: Recent, loss: jax.Array, grad_norm: jax.Array, sigmas: float
          ) -> tuple[jax.Array, Recent]:
  """(whether this step is a spike, the history with it); neither number need be finite."""
  loss_limit = _limit(recent.loss_W, recent.count, sigmas)
  norm_limit = _limit(recent.grad_norm_W, recent.count, sigmas)
  finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
  spike = finite & ((loss > loss_limit) | (grad_norm > norm_limit))
  at = recent.count % recent.loss_W.size
  enter = lambda x_W, x, limit: x_W.at[at].set(jnp.where(finite, jnp.minimum(x, limit), x_W[at]))
  return spike, Recent(enter(recent.loss_W, loss, loss_limit),
                       enter(recent.grad_norm_W, grad_norm, norm_limit), recent.count + finite)


def _limit(x_W: jax.Array, count: jax.Array, sigmas: float) -> jax.Array:
  """mean + sigmas * std of the entered values; infinite where they are too few."""
  known_W = jnp.arange(x_W.size) < count
  n = jnp.maximum(jnp.minimum(count, x_W.size), 1)
  mean = jnp.where(known_W, x_W, 0).sum() / n
  variance = jnp.where(known_W, (x_W - mean) ** 2, 0).sum() / n
  return jnp.where(count >= max(2, x_W.size // 2), mean + sigmas * jnp.sqrt(variance), jnp.inf)
