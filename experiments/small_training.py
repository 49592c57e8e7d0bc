"""Trains small models on tasks; the programs of a model are compiled once for all rates and seeds.

In experiments 03 and 04 each token's vector is its own and a map of the one before it in its segment,

    x_t = e_t + W e_{t-1}        0 in place of e_{t-1} at a segment's first token

so that a key stands beside its value: without it, what is measured is whether two layers find the
induction circuit in so few steps, and full attention itself stays near chance (Olsson et al. 2022,
arXiv:2209.11895).

B batch  T tokens of whole segments from the first on, or of one  D model
"""

import functools
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from longctx.assembly import make_model
from longctx.data.tasks.token_batches import UNSCORED
from longctx.models.layers import linear, normal, param
from longctx.parallel import mesh
from longctx.training import optim

# How a program that runs once is compiled on a CPU: a third of the time.
ONCE = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}


class ShiftedEmbedding(nnx.Module):
  """An embedding and, added to each token's vector, a map of the one before it in its segment."""

  def __init__(self, embedding: nnx.Module, segment: int, *, rngs: nnx.Rngs):
    D = embedding.table.get_value().shape[1]
    self.table, self.segment = embedding.table, segment
    self.w_shift = param(rngs, normal(D ** -0.5), (D, D), (None, 'embed'))

  def __call__(self, tokens_BT: jax.Array, dtype: Any) -> jax.Array:
    e_BTD = self.table.get_value().astype(dtype)[tokens_BT]
    before_BTD = jnp.pad(e_BTD, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    first_T = jnp.arange(tokens_BT.shape[1]) % self.segment == 0
    return e_BTD + linear(jnp.where(first_T[:, None], 0, before_BTD), self.w_shift.get_value())


def make(config: Any, segment: int, key: jax.Array) -> nnx.Module:
  """The config's model with its embedding so shifted."""
  model = make_model(config, key)
  rngs = nnx.Rngs(jax.random.fold_in(key, 1))
  model.embedding = ShiftedEmbedding(model.embedding, segment, rngs=rngs)
  return model


def state_floats(config: Any, tokens: int) -> int:
  """Numbers that a row remembers of a document of `tokens`; token ids and counts are not numbers."""
  model = nnx.eval_shape(lambda: make_model(config, jax.random.key(0)))
  graphdef, params = nnx.split(model)
  state = jax.eval_shape(lambda params: nnx.merge(graphdef, params).init_state(1, capacity=tokens),
                         params)
  return sum(x.size for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating))


class Programs(NamedTuple):
  graphdef: nnx.GraphDef
  init: Any     # seed -> params, optimiser
  step: Any     # params, optimiser, learning rate, tokens, targets -> params, optimiser, loss
  score: Any    # params, tokens, targets -> nats [B, T], answered right, bool [B, T]


def losses(model: nnx.Module, tokens: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(nats, whether the likeliest answer is right) at each token; 0 and False where nothing is asked."""
  hidden_BTD, _ = model(tokens, None)
  logits_BTV = model.logits(hidden_BTD)
  asked = targets != UNSCORED
  nats = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, jnp.where(asked, targets, 0))
  return nats * asked, (logits_BTV.argmax(-1) == targets) & asked


@functools.cache
def programs(config: Any, segment: int, steps: int) -> Programs:
  new = lambda seed: nnx.split(make(config, segment, jax.random.key(seed)))
  graphdef, abstract = nnx.split(nnx.eval_shape(lambda: make(config, segment, jax.random.key(0))))
  # The rate is linear in an update: 1 here, so that one program serves all.
  tx = optim.make_optimizer(optim.Config(
      learning_rate=1.0, warmup_steps=steps // 20, weight_decay=0.01, final_fraction=0.05,
      beta2=0.99), steps, abstract)
  options = mesh.compiler_options(mesh.make_layout(mesh.Config(layout='single')))

  @functools.partial(jax.jit, donate_argnums=(0, 1), compiler_options=options)
  def step(params, opt, learning_rate, tokens, targets):
    def loss(params):
      nats, _ = losses(nnx.merge(graphdef, params), tokens, targets)
      return nats.sum() / (targets != UNSCORED).sum()
    value, grads = jax.value_and_grad(loss)(params)
    updates, opt = tx.update(grads, opt, params)
    updates = jax.tree.map(lambda x: learning_rate * x, updates)
    return optax.apply_updates(params, updates), opt, value

  @functools.partial(jax.jit, compiler_options=ONCE if jax.default_backend() == 'cpu' else None)
  def init(seed):
    params = new(seed)[1]
    return params, tx.init(params)

  score = jax.jit(lambda params, tokens, targets: losses(nnx.merge(graphdef, params), tokens, targets))
  return Programs(graphdef, init, step, score)


class Trained(NamedTuple):
  params: Any
  loss: float      # mean over the last tenth of the steps
  seconds: float   # of this process's CPU, compilation too where it was not done before


def train(p: Programs, batches: Iterator[tuple[np.ndarray, np.ndarray]], steps: int,
          learning_rate: float, seed: int) -> Trained:
  """`steps` updates, a batch each."""
  begin, values = time.process_time(), []
  params, opt = p.init(seed)
  for _ in range(steps):
    params, opt, loss = p.step(params, opt, learning_rate, *next(batches))
    values.append(loss)
  last = float(np.mean([float(x) for x in values[-max(1, steps // 10):]]))
  return Trained(params, last, time.process_time() - begin)


def right(p: Programs, params: Any, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
  """[B]: how much of what a row asks is right; 64 rows at once, for memories that are large a row."""
  return np.concatenate([np.asarray(p.score(params, tokens[i:i + 64], targets[i:i + 64])[1]).sum(axis=1)
                         for i in range(0, len(tokens), 64)])


def accuracy(p: Programs, params: Any, tokens: np.ndarray, targets: np.ndarray) -> float:
  """Of all that is asked, how much is right."""
  return float(right(p, params, tokens, targets).sum() / (targets != UNSCORED).sum())


def count(params: Any) -> int:
  """Numbers in all of them."""
  return sum(x.size for x in jax.tree.leaves(params))
