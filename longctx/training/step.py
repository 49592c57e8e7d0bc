"""One update, pure: all it needs comes in, all it makes goes out.

The loss is the mean over the target tokens of the whole global batch, whatever its cut into
microbatches or over devices. A step whose loss or gradient is not finite, or leaps out of those
before (spikes.py), leaves parameters and optimiser as they were, and is counted; the carried state
goes on with the data, but for rows where it is not finite itself.
Held by: tests/test_step.py, tests/test_mesh.py.

B rows  T tokens  A microbatches
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from longctx.models.memories.auxiliary import share_of_batch
from longctx.parallel import mesh
from longctx.training import loss as loss_lib
from longctx.training import optim, spikes


class TrainState(NamedTuple):
  """All that a run carries from step to step; saved whole."""

  step: jax.Array         # int32: steps done, the skipped ones included
  params: Any
  opt: Any
  ema: Any                # averaged parameters, or None
  memory: Any             # the model's state of a segment stream, batch first, or None
  bad_in_a_row: jax.Array
  skipped: jax.Array      # steps skipped in all
  dropout_key: jax.Array
  recent: spikes.Recent | None = None   # what spikes are judged by, or None


def init_state(model_init: Callable[[jax.Array], nnx.Module], tx: Callable, *, seed: int,
               batch_size: int, carries: bool, ema: float, spike_window: int = 0) -> TrainState:
  """The state before the first step; `seed` gives one seed each to init and dropout.

  `tx` takes the parameters and gives the optax transformation; `carries` keeps a model state of
  `batch_size` rows; `spike_window` losses are kept, where it is not 0.
  """
  init_key, dropout_key = jax.random.split(jax.random.key(seed))
  model = model_init(init_key)
  params = nnx.state(model, nnx.Param)
  zero = lambda: jnp.zeros((), jnp.int32)   # one buffer each: the state is donated
  return TrainState(
      step=zero(), params=params, opt=tx(params).init(params),
      ema=jax.tree.map(jnp.copy, params) if ema else None,
      memory=model.init_state(batch_size) if carries else None,
      bad_in_a_row=zero(), skipped=zero(), dropout_key=dropout_key,
      recent=spikes.no_history(spike_window) if spike_window else None)


def model_inputs(batch: dict[str, jax.Array]) -> dict[str, Any]:
  """What a model is told of a batch's tokens, by the names of its arguments."""
  given = dict(positions_BT=batch['positions'], segment_ids_BT=batch['segment_ids'])
  if 'index' in batch:
    given['places'] = (batch['index'], batch['start'])
  if 'source' in batch:
    given |= dict(source_BS=batch['source'], source_valid_BS=batch['source_valid'])
  return given


def train_step(graphdef: nnx.GraphDef, tx: optax.GradientTransformation, config: loss_lib.Config,
               accumulate: int, ema_decay: float, state: TrainState, batch: dict[str, jax.Array], *,
               aligned: bool = False, spike_sigmas: float = 0.0
               ) -> tuple[TrainState, dict[str, jax.Array]]:
  """The state after one batch, and scalars: loss (nats per token), grad_norm, good (finite and no
  spike: the update was made), bad_in_a_row, skipped, tokens (targets), keys (of each window of the
  model: what a query with a target sees on average), gates (of memories that have one, as the loss met
  them: by layer the mean and the largest |gate| of its heads, or its one), and grad_squares (one sum of squares a
  parameter, to name the first that is not finite). `aligned`: the model is told that documents begin
  rows (data.align). `spike_sigmas` is read where the state has `recent`.
  """
  weights_BT = batch['loss_mask'] / jnp.maximum(batch['loss_mask'].sum(), 1.0)
  key = jax.random.fold_in(state.dropout_key, state.step)
  before_BT = batch['positions'] + 1   # keys of its document up to itself
  model = nnx.merge(graphdef, state.params)
  keys = {w: (weights_BT * (jnp.minimum(before_BT, w) if w else before_BT)).sum()
          for w in model.config.windows}
  gates = {i: (jnp.abs(g).mean(), jnp.abs(g).max()) for i, g in getattr(model, 'gates', dict)().items()}

  def loss_fn(params, batch, weights_BT, memory, key):
    model = nnx.merge(graphdef, params)
    given = dict(model_inputs(batch), **(dict(aligned=True) if aligned else {}))
    hidden_BTD, memory = model(batch['tokens'], memory, dropout_key=key, **given)
    layout = mesh.current()
    # Whole along D before the loss: cut along it, it would be gathered for every chunk.
    table_VD = mesh.gathered(model.output_embedding_VD().astype(hidden_BTD.dtype),
                             ('vocab', 'embed'), ('vocab', None))
    total, nll_BT = loss_lib.cross_entropy(
        hidden_BTD, table_VD, batch['targets'],
        weights_BT, chunk=config.chunk, z_loss=config.z_loss,
        label_smoothing=config.label_smoothing,
        batch_shards=layout.size('batch') if layout else 1,
        length_shards=layout.size('length') if layout else 1)
    return total, ((weights_BT * nll_BT).sum(), memory)

  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
  if accumulate == 1:
    (_, (loss, memory)), grads = grad_fn(state.params, batch, weights_BT, state.memory, key)
  else:
    def one(carry, inputs):
      grads, loss = carry
      i, batch, weights_BT, memory = inputs
      with share_of_batch(1 / accumulate):
        (_, (part, memory)), more = grad_fn(state.params, batch, weights_BT, memory,
                                            jax.random.fold_in(key, i))
      return (jax.tree.map(jnp.add, grads, more), loss + part), memory
    # Row r goes to microbatch r mod A, so that each device keeps its own rows.
    cut = lambda x: jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0)
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    (grads, loss), memory = jax.lax.scan(
        one, (zeros, jnp.zeros(())),
        (jnp.arange(accumulate), *jax.tree.map(cut, (batch, weights_BT, state.memory))))
    memory = jax.tree.map(join, memory)

  grad_squares = jnp.stack([optim.sum_of_squares(g) for g in jax.tree.leaves(grads)])
  grad_norm = jnp.sqrt(grad_squares.sum())
  updates, opt = tx.update(grads, state.opt, state.params)
  params = optax.apply_updates(state.params, updates)
  updates_before = state.step - state.skipped
  ema = optim.update_ema(state.ema, params, ema_decay, updates_before) if ema_decay else None

  good, recent = jnp.isfinite(loss) & jnp.isfinite(grad_norm), state.recent
  if recent is not None:
    spike, recent = spikes.judge(recent, loss, grad_norm, spike_sigmas)
    good &= ~spike
  keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
  bad = jnp.where(good, 0, state.bad_in_a_row + 1)
  skipped = state.skipped + jnp.where(good, 0, 1)
  state = TrainState(
      step=state.step + 1, params=keep(params, state.params), opt=keep(opt, state.opt),
      ema=keep(ema, state.ema), memory=keep_finite_rows(memory, state.memory), bad_in_a_row=bad,
      skipped=skipped, dropout_key=state.dropout_key, recent=recent)
  return state, dict(loss=loss, grad_norm=grad_norm, good=good, bad_in_a_row=bad,
                     skipped=skipped, tokens=(batch['loss_mask'] > 0).sum(), keys=keys,
                     gates=gates, grad_squares=grad_squares)


def keep_finite_rows(new: Any, old: Any) -> Any:
  """Row by row the new carried state, or all of the old one where any of it is not finite."""
  inexact = [x for x in jax.tree.leaves(new) if jnp.issubdtype(x.dtype, jnp.inexact)]
  if not inexact:
    return new
  ok_B = functools.reduce(jnp.logical_and, (
      jnp.isfinite(x).reshape(x.shape[0], -1).all(1) for x in inexact))
  return jax.tree.map(
      lambda a, b: jnp.where(ok_B.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)
