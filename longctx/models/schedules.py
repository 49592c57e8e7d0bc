"""The orders in which whole segments may be read; each gives what `sequential` gives, dropout included.

  sequential   a scan over segments, each through all layers                          any class
  parallel     a layer over all segments: the memories before them are known from     P0, P1
               its input (Block.before), then each segment is a row. With remat a device holds what a
               layer makes of AT_ONCE tokens, and of each segment the layers' inputs and memories (of
               memories that share a line of keys or states, Block.deals, what a layer makes of all)
  wavefront    cell (layer l, segment s) in step l + s, the cells of a step side by   P2
               side: S + L - 1 steps of up to L cells instead of S L

Source of the wavefront: diagonal batching, arXiv:2506.05229.
Held by: tests/test_schedules.py.

B batch  S segments  C slots of a cell  D model  L layers
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from longctx.models.decoder_config import REMAT
from longctx.models.layers import of_each, rows_where
from longctx.models.memories.base import Cell
from longctx.models.segments import detach
from longctx.parallel import mesh

AT_ONCE = 16_384   # tokens of a device that fill an accelerator, and hardly its memory


def sequential(model: Any, tokens_BSC: jax.Array, valid_BSC: jax.Array, number_B: jax.Array,
               memory: Any, key: jax.Array | None) -> tuple[jax.Array, Any]:
  """Hidden states [B, S, C, D] and the memory after; see MemoryDecoder.read_segments."""
  read, truncate = model._read(), model.config.truncate
  if model.config.remat != 'none':
    read = jax.checkpoint(read, policy=REMAT[model.config.remat])

  def one(memory, inputs):
    tokens_BC, valid_BC, s = inputs
    number = number_B + s
    part = None if key is None else jax.random.fold_in(key, s)
    hidden_BCD, after = read(tokens_BC, Cell(valid_BC, number), detach(memory, number, truncate), part)
    return after, hidden_BCD

  by_segment = lambda x: jnp.moveaxis(x, 1, 0)
  memory, hidden = jax.lax.scan(one, memory, (by_segment(tokens_BSC), by_segment(valid_BSC),
                                              jnp.arange(tokens_BSC.shape[1])))
  return jnp.moveaxis(hidden, 0, 1), memory


def cuts_at_groups(S: int, truncate: int, every: int) -> bool:
  """Whether the gradients of S segments after a multiple of `every` others (0: after none) are cut only
  before the first segment of each group of `truncate`, or before the first of all."""
  if truncate >= S:
    return every % truncate == 0 or every % S == truncate % S == 0
  return every % truncate == S % truncate == 0


def parallel(model: Any, tokens_BSC: jax.Array, valid_BSC: jax.Array, number_B: jax.Array,
             memory: Any, key: jax.Array | None) -> tuple[jax.Array, Any]:
  """As `sequential`. Where gradients are truncated (see cuts_at_groups), a group at once and no more."""
  S, truncate = tokens_BSC.shape[1], model.config.truncate
  if not truncate or truncate >= S:
    memory = detach(memory, number_B, truncate)
    return _at_once(model, tokens_BSC, valid_BSC, number_B, memory, _keys(key, jnp.arange(S)))
  groups = lambda x: jnp.moveaxis(x.reshape(x.shape[0], -1, truncate, *x.shape[2:]), 1, 0)

  def one(memory, inputs):
    tokens, valid, g = inputs
    first = g * truncate
    number = number_B + first
    hidden, memory = _at_once(model, tokens, valid, number, detach(memory, number, 1),
                              _keys(key, first + jnp.arange(truncate)))
    return memory, hidden

  memory, hidden = jax.lax.scan(
      one, memory, (groups(tokens_BSC), groups(valid_BSC), jnp.arange(S // truncate)))
  hidden = jnp.moveaxis(hidden, 0, 1)
  return hidden.reshape(hidden.shape[0], S, *hidden.shape[3:]), memory


def _keys(key: jax.Array | None, s: jax.Array) -> jax.Array | None:
  """The key of each segment s of the call."""
  return None if key is None else jax.vmap(lambda s: jax.random.fold_in(key, s))(s)


def _at_once(model, tokens_BSC, valid_BSC, number_B, memory, key_S):
  B, S, C = tokens_BSC.shape
  rows = lambda x: x.reshape(B * S, *x.shape[2:])
  cell = Cell(rows(valid_BSC), (number_B[:, None] + jnp.arange(S)).reshape(-1), parts=S)
  x_RCD, cell = model.enter(rows(tokens_BSC), cell, (), key_S)
  keep = lambda f: f if model.config.remat == 'none' else jax.checkpoint(f, policy=REMAT[model.config.remat])
  after = []
  for i, (block, before) in enumerate(zip(model.blocks, memory.layers)):
    graphdef, params = nnx.split(block)

    def known(params, x_RCD, before, graphdef=graphdef):
      block = nnx.merge(graphdef, params)
      befores, last = block.before(x_RCD.reshape(B, S, C, -1), before, valid_BSC)
      return jax.tree.map(rows, befores), last

    def layer(params, x_RCD, befores, cell, key_S, graphdef=graphdef):
      return nnx.merge(graphdef, params)(x_RCD, befores, cell, key_S)[0]

    def whole(params, x_RCD, before, key_S, known=known, layer=layer):
      befores, last = known(params, x_RCD, before)
      return layer(params, x_RCD, befores, cell, key_S), last

    own_S = None if key_S is None else of_each(lambda key, i=i: jax.random.fold_in(key, i), key_S)
    number = _groups(B, S, C) if block.deals and model.config.remat != 'none' else 1
    if number == 1:
      x_RCD, last = keep(whole)(params, x_RCD, before, own_S)
    else:
      befores, last = keep(known)(params, x_RCD, before)
      x_RCD = _by_groups(functools.partial(keep(layer), params), B, number, x_RCD, befores, cell, own_S)
    after.append(last)
  hidden_RCD, _ = model.leave(x_RCD)
  return hidden_RCD.reshape(B, S, C, -1), memory._replace(layers=tuple(after))


def _groups(B: int, S: int, C: int) -> int:
  """Into how many groups a row's segments are dealt, so that a device holds about AT_ONCE tokens of one."""
  layout = mesh.current()
  cuts, shards = (layout.size('length'), layout.size('batch')) if layout else (1, 1)
  if S % cuts:
    return 1
  wanted = B * S * C / (shards * cuts * AT_ONCE)
  return next(g for g in range(1, S // cuts + 1) if S // cuts % g == 0 and (g >= wanted or g == S // cuts))


def _by_groups(layer, B, number, x_RCD, befores, cell, key_S):
  """layer(rows, their memories, their cell, keys), a group of each row's segments after the other.

  Group g has segments g, g + number, ..: of each device that a row is cut over as many.
  """
  S = x_RCD.shape[0] // B
  deal = lambda x: jnp.moveaxis(x.reshape(B, -1, number, *x.shape[1:]), 2, 0).reshape(number, -1, *x.shape[1:])
  back = lambda x: jnp.moveaxis(x.reshape(number, B, S // number, *x.shape[2:]), 0, 2).reshape(B * S, *x.shape[2:])
  keys = None if key_S is None else jnp.moveaxis(key_S.reshape(-1, number), 1, 0)
  each = jax.tree.map(deal, (x_RCD, befores, cell.valid_BC, cell.number_B))

  def one(inputs):
    (x_RCD, befores, valid_RC, number_R), keys = inputs
    return layer(x_RCD, befores, Cell(valid_RC, number_R, parts=S // number), keys)

  return back(jax.lax.map(one, (each, keys)))


def wavefront(model: Any, tokens_BSC: jax.Array, valid_BSC: jax.Array, number_B: jax.Array,
              memory: Any, key: jax.Array | None) -> tuple[jax.Array, Any]:
  """As `sequential`, for layers that are all alike."""
  S = tokens_BSC.shape[1]
  L, truncate = model.config.num_layers, model.config.truncate
  stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
  graphdefs, params = zip(*(nnx.split(block) for block in model.blocks))
  params_L, memory_L = stack(params), stack(memory.layers)
  by_segment = lambda x: jnp.moveaxis(x, 1, 0)
  tokens_SBC, valid_SBC = by_segment(tokens_BSC), by_segment(valid_BSC)
  whole = Cell(valid_SBC[0], number_B)
  x_BCD, _ = model.enter(tokens_SBC[0], whole, memory.tokens, None)

  def layer(params, x_BCD, memory, valid_BC, number_B, key):
    return nnx.merge(graphdefs[0], params)(x_BCD, memory, Cell(valid_BC, number_B), key)
  if model.config.remat != 'none':
    layer = jax.checkpoint(layer, policy=REMAT[model.config.remat])

  def step(carry, d):
    x_LBCD, memory_L = carry      # x: what each layer reads in this step
    s_L = d - jnp.arange(L)       # which segment each layer is at
    at = s_L.clip(0, S - 1)
    first, _ = model.enter(tokens_SBC[at[0]], whole, memory.tokens,
                           None if key is None else jax.random.fold_in(key, at[0]))
    x_LBCD = x_LBCD.at[0].set(first)
    valid_LBC = jax.vmap(lambda s: model.enter(tokens_SBC[s], Cell(valid_SBC[s], number_B),
                                               memory.tokens, None)[1].valid_BC)(at)
    number_LB = number_B + at[:, None]
    before_L = jax.vmap(lambda m, n: detach(m, n, truncate))(memory_L, number_LB)
    keys = None if key is None else jax.vmap(
        lambda s, i: jax.random.fold_in(jax.random.fold_in(key, s), i))(at, jnp.arange(L))
    y_LBCD, after_L = jax.vmap(layer)(params_L, x_LBCD, before_L, valid_LBC, number_LB, keys)
    memory_L = rows_where((s_L >= 0) & (s_L < S), after_L, memory_L)
    return (jnp.roll(y_LBCD, 1, axis=0), memory_L), y_LBCD[-1]

  start = jnp.zeros((L, *x_BCD.shape), x_BCD.dtype)
  (_, memory_L), out = jax.lax.scan(step, (start, memory_L), jnp.arange(S + L - 1))
  hidden_SBCD = jax.vmap(lambda x: model.leave(x)[0])(out[L - 1:])
  layers = tuple(jax.tree.map(lambda x, i=i: x[i], memory_L) for i in range(L))
  return jnp.moveaxis(hidden_SBCD, 0, 1), memory._replace(layers=layers)
