"""Trains one small model on one task or text; the loop that experiment 02's parts share."""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from longctx.assembly import make_model
from longctx.data.tasks.token_batches import UNSCORED
from longctx.parallel import mesh
from longctx.training import optim


def losses(model: nnx.Module, tokens: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(mean nats over what is scored, whether each answer is the likeliest) of rows without a past."""
  hidden_BTD, _ = model(tokens, None)
  logits_BTV = model.logits(hidden_BTD)
  scored = targets != UNSCORED
  nll = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, jnp.where(scored, targets, 0))
  return (nll * scored).sum() / scored.sum(), (logits_BTV.argmax(-1) == targets) & scored


class Trained:
  """A model after `steps` batches of `batches`, with what it took: `seconds` are of CPU, after the first step."""

  def __init__(self, config: Any, batches: Iterator, steps: int, learning_rate: float, seed: int,
               report: Callable[[int, float, float], None] | None = None):
    self.graphdef, params = nnx.split(make_model(config, jax.random.key(seed)))
    tx = optim.make_optimizer(optim.Config(
        learning_rate=learning_rate, warmup_steps=steps // 20, weight_decay=0.01,
        final_fraction=0.05), steps, params)
    options = mesh.compiler_options(mesh.make_layout(mesh.Config(layout='single')))

    @functools.partial(jax.jit, donate_argnums=(0, 1), compiler_options=options)
    def step(params, opt, tokens, targets):
      loss = lambda params: losses(nnx.merge(self.graphdef, params), tokens, targets)[0]
      value, grads = jax.value_and_grad(loss)(params)
      updates, opt = tx.update(grads, opt, params)
      return optax.apply_updates(params, updates), opt, value

    opt, begin = jax.jit(tx.init)(params), None
    for i in range(steps):
      params, opt, loss = step(params, opt, *next(batches))
      if i == 0:
        jax.block_until_ready(loss)
        begin = time.process_time()
      if report is not None and (i + 1) % max(1, steps // 20) == 0:
        report(i + 1, float(loss), time.process_time() - begin)
    self.loss, self.params = float(loss), params
    self.seconds = time.process_time() - begin
    self._score = jax.jit(lambda params, tokens, targets: losses(
        nnx.merge(self.graphdef, params), tokens, targets))

  def score(self, tokens: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
    """(mean nats, accuracy at each position, NaN where nothing is asked)."""
    nats, right = self._score(self.params, tokens, targets)
    asked = (targets != UNSCORED).sum(0)
    return float(nats), np.where(asked, np.asarray(right).sum(0) / np.maximum(asked, 1), np.nan)
