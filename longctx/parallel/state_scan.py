"""Recurrent state over a sequence that is cut over the mesh axis `seq`, exact.

The tokens of a shard map the state before them to the state after them. Each device makes the map of
its shard from the tokens alone, all devices exchange their maps (one all-gather, float32), each joins
those of the shards before its own, and does with the true incoming state what depends on it.

A kernel is what `over_sequence` asks of a recurrence (longctx/recurrence):

    prepared   = kernel.prepare(inputs)            what needs no state
    transition = kernel.transition(prepared)       the map of the state that these tokens make
    transition = kernel.join(first, second)        the map of `first`, then `second`
    state      = kernel.apply(transition, state)
    out, state = kernel.finish(prepared, state)    the outputs, from the true state before

Besides, `kernel.read(inputs, states)` is what states that stand still say to each token, for memories that
keep them (longctx/models/memories/cached_mixer.py).

`kernel.cut` names the meaning of the third dim of inputs ('heads' or 'recurrent').
Sources: affine maps under composition, as in Mamba-2 (arXiv:2405.21060, section 8) and fla's
context parallelism. Held by: tests/test_recurrent_mesh.py, tests/test_short_conv.py, and the tests of each recurrence.

B batch  T tokens  R devices of `seq`
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from longctx.parallel import mesh

Run = Callable[[Any, Any, Any], tuple[Any, Any]]   # of a mixer: (kernel, inputs, state) as over_sequence


def over_sequence(kernel: Any, inputs: Any, state: Any) -> tuple[Any, Any]:
  """(out, state after) of a kernel; inputs [B, T, ...] (None allowed), state [B, ...] leaves.

  Under a layout each device has its rows, its heads and its tokens; without one, or where `seq` does
  not divide the tokens (one token at a time), every device has all tokens of its rows and heads.
  """
  layout = mesh.current()
  if layout is None or layout.mesh.size == 1:
    return kernel.finish(kernel.prepare(inputs), state)
  length = jax.tree.leaves(inputs)[0].shape[1]
  size = layout.size('length')
  cut = size > 1 and length % size == 0
  rest = lambda x, known: (None,) * (x.ndim - known)
  token_spec = lambda x: layout.spec('batch', 'length' if cut else None,
                                     *((kernel.cut,) if x.ndim > 2 else ()), *rest(x, min(x.ndim, 3)))
  state_spec = lambda x: layout.spec('batch', kernel.cut, *rest(x, 2))
  states = jax.tree.map(state_spec, state)
  out = jax.eval_shape(lambda i, s: kernel.finish(kernel.prepare(i), s)[0], inputs, state)
  local = _local(kernel, layout.rules['length'], size) if cut else (
      lambda inputs, state: kernel.finish(kernel.prepare(inputs), state))
  return jax.shard_map(
      local, mesh=layout.mesh, in_specs=(jax.tree.map(token_spec, inputs), states),
      out_specs=(jax.tree.map(token_spec, out), states), check_vma=False)(inputs, state)


def _local(kernel, axis: str, size: int):
  def run(inputs, state):
    prepared = kernel.prepare(inputs)
    gathered = jax.lax.all_gather(kernel.transition(prepared), axis)   # [R, ...] leaves
    states = [state]   # before each shard, and after the last
    for r in range(size):
      states.append(kernel.apply(jax.tree.map(lambda x, r=r: x[r], gathered), states[-1]))
    me = jax.lax.axis_index(axis)
    incoming = jax.tree.map(lambda *x: jax.lax.select_n(me, *x), *states[:-1])
    out, _ = kernel.finish(prepared, incoming)
    return out, states[-1]
  return run


def earlier(x_BTC: jax.Array, tail_BWC: jax.Array, channels: str | None = None
            ) -> tuple[list[jax.Array], jax.Array]:
  """[x_{t-1}, .., x_{t-W}] for every token, after the W tokens of the tail; and the last W of all.

  Where `seq` cuts the tokens, each device has the W before its own from its left neighbour, and
  nothing else is sent. `channels`: the meaning of the last dim.
  """
  layout, length = mesh.current(), x_BTC.shape[1]
  count = tail_BWC.shape[1]
  size = layout.size('length') if layout else 1
  if size == 1 or length % size or length // size < count or not count:
    return _shifted(x_BTC, tail_BWC)
  axis = layout.rules['length']
  row, tail = layout.spec('batch', 'length', channels), layout.spec('batch', None, channels)

  def local(x, tail):
    me, last = jax.lax.axis_index(axis), x[:, -count:]
    left = jax.lax.ppermute(last, axis, [(i, i + 1) for i in range(size - 1)])
    shifted, _ = _shifted(x, jnp.where(me == 0, tail, left))
    return shifted, jax.lax.psum(jnp.where(me == size - 1, last, 0), axis)

  return jax.shard_map(local, mesh=layout.mesh, in_specs=(row, tail),
                       out_specs=([row] * count, tail), check_vma=False)(x_BTC, tail_BWC)


def _shifted(x_BTC, tail_BWC):
  count, length = tail_BWC.shape[1], x_BTC.shape[1]
  all_BSC = jnp.concatenate([tail_BWC, x_BTC], axis=1)
  return [all_BSC[:, count - j:count - j + length] for j in range(1, count + 1)], all_BSC[:, length:]
