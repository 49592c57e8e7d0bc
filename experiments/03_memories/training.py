"""Trains one small model on a task; the programs are compiled once for all rates and seeds."""

import functools
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
from flax import nnx

from longctx.data.tasks.symbolic import UNSCORED
from longctx.parallel import mesh
from longctx.training import optim


class Programs(NamedTuple):
  graphdef: nnx.GraphDef
  init: Any     # seed -> params, optimiser
  step: Any     # params, optimiser, learning rate, tokens, targets -> params, optimiser, loss
  right: Any    # params, tokens, targets -> bool [B, T]: asked and answered


def losses(model: nnx.Module, tokens: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(mean nats over what is asked, whether it is asked and the likeliest answer is right)."""
  hidden_BTD, _ = model(tokens, None)
  logits_BTV = model.logits(hidden_BTD)
  asked = targets != UNSCORED
  nats = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, jnp.where(asked, targets, 0))
  return (nats * asked).sum() / asked.sum(), (logits_BTV.argmax(-1) == targets) & asked


@functools.cache
def programs(config: Any, segment: int, steps: int) -> Programs:
  new = lambda seed: nnx.split(models.make(config, segment, jax.random.key(seed)))
  graphdef, abstract = nnx.split(nnx.eval_shape(
      lambda: models.make(config, segment, jax.random.key(0))))
  # The rate is linear in an update: 1 here, so that one program serves all.
  tx = optim.make_optimizer(optim.Config(
      learning_rate=1.0, warmup_steps=steps // 20, weight_decay=0.01, final_fraction=0.05,
      beta2=0.99), steps, abstract)
  options = mesh.compiler_options(mesh.make_layout(mesh.Config(layout='single')))

  @functools.partial(jax.jit, donate_argnums=(0, 1), compiler_options=options)
  def step(params, opt, learning_rate, tokens, targets):
    loss = lambda params: losses(nnx.merge(graphdef, params), tokens, targets)[0]
    value, grads = jax.value_and_grad(loss)(params)
    updates, opt = tx.update(grads, opt, params)
    updates = jax.tree.map(lambda x: learning_rate * x, updates)
    return optax.apply_updates(params, updates), opt, value

  @jax.jit
  def init(seed):
    params = new(seed)[1]
    return params, tx.init(params)

  right = jax.jit(lambda params, tokens, targets: losses(
      nnx.merge(graphdef, params), tokens, targets)[1])
  return Programs(graphdef, init, step, right)


class Trained(NamedTuple):
  params: Any
  loss: float      # mean over the last tenth of the steps
  seconds: float


def train(p: Programs, batches: Iterator[tuple[np.ndarray, np.ndarray]], steps: int,
          learning_rate: float, seed: int) -> Trained:
  """`steps` updates, a batch each; compilation counts where it was not done before."""
  begin, values = time.perf_counter(), []
  params, opt = p.init(seed)
  for _ in range(steps):
    params, opt, loss = p.step(params, opt, learning_rate, *next(batches))
    values.append(loss)
  last = float(np.mean([float(x) for x in values[-max(1, steps // 10):]]))
  return Trained(params, last, time.perf_counter() - begin)


def accuracy(p: Programs, params: Any, tokens: np.ndarray, targets: np.ndarray) -> float:
  """Of all that is asked, how much is right."""
  return float(np.asarray(p.right(params, tokens, targets)).sum() / (targets != UNSCORED).sum())


def count(params: Any) -> int:
  """Numbers in all of them."""
  return sum(x.size for x in jax.tree.leaves(params))
