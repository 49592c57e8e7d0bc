"""Tokens of a call as segments of documents: where the laws of every segment memory are kept.

A document is read in segments of C tokens, counted from its own first token. A call may begin or end
inside a segment, hold several documents, and padding anywhere. `plan` puts the tokens of each row into
*cells*: a cell holds the tokens of one segment, from slot 0 on, those of the segment's begin that came
in earlier calls (the state's `tail`) included. `walk` reads the cells one after the other,

    hidden_BCD, memory = read(tokens_BC, cell, memory, key)

and keeps the memory of a cell that is whole: how it does so, and what a document begins with, say `keep` and
`begin`, since a large memory is written in place. So a memory only ever meets whole segments from their first
token, and for each of them: whole == any split == token by token; packed == separate; padding is unseen.
The price is that a call which ends inside a segment reads its begin again.

Cells that need no memory of the row (the first segment of a document, unfinished) are read apart, since
there may be as many as tokens; what a cell of nobody costs is a branch.
Held by: tests/test_segments.py (by loops), tests/test_models.py (whole == split).

B batch  T tokens of a call  C tokens of a segment  R cells of a row  D model
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from longctx.models.context import NO_SEGMENT
from longctx.models.layers import rows_where
from longctx.models.memories.base import Cell


class State(NamedTuple):
  """What a row has read: whole segments are in its memory, the one it is in is its tail."""

  tail: jax.Array      # int32 [B, C]: tokens of the unfinished segment, from slot 0 on
  count: jax.Array     # int32 [B]: how many of them there are, fewer than C
  number: jax.Array    # int32 [B]: whole segments of the document so far, those in `memory`
  segment: jax.Array   # int32 [B]: segment id of the last token seen; NO_SEGMENT before any
  memory: Any          # of the layers, batch first; means nothing where `number` is 0


def new_state(batch_size: int, size: int, memory: Any) -> State:
  zeros = lambda *shape: jnp.zeros((batch_size, *shape), jnp.int32)
  return State(zeros(size), zeros(), zeros(), jnp.full((batch_size,), NO_SEGMENT, jnp.int32), memory)


class Cells(NamedTuple):
  """Some cells of each row, in their order; one that nobody has is of length 0. int32 [B, R]."""

  first: jax.Array    # which of the row's valid tokens of this call is its first
  old: jax.Array      # how many tokens of the state's tail stand before it
  length: jax.Array   # tokens in it, those of the tail included
  number: jax.Array   # segments of the document before it


class Plan(NamedTuple):
  """Where each token of a call goes."""

  order_BT: jax.Array      # slot of the j-th valid token; T past the last
  cells: Cells             # that follow each other through the memory
  islands: Cells | None    # that need none, and leave none
  island_BT: jax.Array     # of the j-th valid token: whether its cell is one
  cell_BT: jax.Array       # which cell, of its kind
  slot_BT: jax.Array       # and where in it
  last: 'Last'


class Last(NamedTuple):
  """The cell that each row is in after the call. [B]."""

  first: jax.Array
  old: jax.Array
  length: jax.Array
  number: jax.Array
  segment: jax.Array
  none: jax.Array          # bool: the row had no token


def plan(shape: tuple[int, int], size: int, state: State, segment_ids_BT: jax.Array | None,
         valid_BT: jax.Array | None) -> Plan:
  """Cells of a call of [B, T] tokens in segments of `size`."""
  B, T = shape
  j_T = jnp.arange(T, dtype=jnp.int32)
  if valid_BT is None:
    order_BT, total_B = jnp.broadcast_to(j_T, (B, T)), jnp.full((B,), T, jnp.int32)
  else:
    place_BT = jnp.where(valid_BT, jnp.cumsum(valid_BT, axis=1) - 1, T)
    rows_B1 = jnp.arange(B)[:, None]
    order_BT = jnp.full((B, T), T, jnp.int32).at[rows_B1, place_BT].set(j_T, mode='drop')
    total_B = valid_BT.sum(1, dtype=jnp.int32)
  there_BT = j_T < total_B[:, None]

  begins_BT = jnp.zeros((B, T), bool)   # of a document that is not the state's
  segment_B = state.segment
  if segment_ids_BT is not None:
    ids_BT = jnp.take_along_axis(segment_ids_BT, jnp.minimum(order_BT, T - 1), axis=1)
    before_BT = jnp.concatenate([state.segment[:, None], ids_BT[:, :-1]], axis=1)
    begins_BT = (ids_BT != before_BT) & there_BT
    segment_B = jnp.take_along_axis(ids_BT, jnp.maximum(total_B - 1, 0)[:, None], axis=1)[:, 0]
    segment_B = jnp.where(total_B > 0, segment_B, state.segment)
  # Offsets within documents, those of the state's document counted from its unfinished segment.
  start_BT = jax.lax.cummax(jnp.where(begins_BT, j_T, -1), axis=1)
  own_BT = start_BT < 0
  offset_BT = jnp.where(own_BT, state.count[:, None] + j_T, j_T - start_BT)
  number_BT = offset_BT // size + jnp.where(own_BT, state.number[:, None], 0)
  slot_BT = offset_BT % size

  opens_BT = there_BT & ((slot_BT == 0) | (j_T == 0))   # its cell's first token of this call
  # A cell's length, from its last token: the one before another opens, or the row's last.
  closes_BT = there_BT & jnp.concatenate(
      [opens_BT[:, 1:] | (j_T[1:] == total_B[:, None]), jnp.ones((B, 1), bool)], axis=1)
  # What closes the run that is open at j: the next closing token. Reversed running minimum.
  end_BT = jax.lax.cummin(jnp.where(closes_BT, j_T, T), axis=1, reverse=True)
  length_BT = jnp.take_along_axis(slot_BT, jnp.minimum(end_BT, T - 1), axis=1) + 1

  alone = segment_ids_BT is not None and T > 1
  island_BT = (number_BT == 0) & (length_BT < size) if alone else jnp.zeros((B, T), bool)
  counts = lambda which_BT: jnp.cumsum(opens_BT & which_BT, axis=1, dtype=jnp.int32) - 1
  cell_BT = jnp.where(island_BT, counts(island_BT), counts(~island_BT))
  whole = -(-(T - 1) // size)    # cells that a row may fill or end after a first one
  at_most = whole + 1 if not alone else min(T, 2 * whole + 2)
  j_BT = jnp.broadcast_to(j_T, (B, T))
  values = (j_BT, jnp.where(j_BT == 0, slot_BT, 0), length_BT, number_BT)

  def gather(which_BT: jax.Array, count: int) -> Cells:
    to_BT = jnp.where(opens_BT & which_BT, cell_BT, count)
    rows = jnp.arange(B)[:, None]
    put = lambda x: jnp.zeros((B, count), jnp.int32).at[rows, to_BT].set(x, mode='drop')
    return Cells(*map(put, values))

  final_B1 = jnp.maximum(total_B - 1, 0)[:, None]
  pick = lambda x: jnp.take_along_axis(x, final_B1, axis=1)[:, 0]
  opened_B = pick(jax.lax.cummax(jnp.where(opens_BT, j_BT, 0), axis=1))
  last = Last(first=opened_B, old=pick(slot_BT) - (pick(j_BT) - opened_B), length=pick(slot_BT) + 1,
              number=pick(number_BT), segment=segment_B, none=total_B == 0)
  return Plan(order_BT, gather(~island_BT, at_most), gather(island_BT, T) if alone else None,
              island_BT, cell_BT, slot_BT, last)


Read = Callable[[jax.Array, Cell, Any, jax.Array | None], tuple[jax.Array, Any]]
Begin = Callable[[jax.Array, Any], Any]
Keep = Callable[[jax.Array, Any, Any], Any]


def walk(read: Read, begin: Begin, size: int, dim: int, dtype: Any,
         tokens_BT: jax.Array, state: State, segment_ids_BT: jax.Array | None = None,
         valid_BT: jax.Array | None = None, *, keep: Keep = rows_where, truncate: int = 0,
         key: jax.Array | None = None, remat: Callable | None = None) -> tuple[jax.Array, State]:
  """Hidden states [B, T, D] of the tokens (0 for padding) and the state after them.

  Args:
    read: reads one cell of each row; see the head of this file. Rows without one are padding.
    begin: of (new_B, memory) the memory that cells read: of new rows what a document begins with.
    size: tokens of a segment.
    keep: of (whole_B, after, memory) the memory after cells: `after` of whole ones.
    truncate: no gradient goes back through the memory beyond so many segments of a document, counted
      from its begin (truncated backpropagation through time); 0: through all of the call.
    key: of dropout.
    remat: what the backward pass keeps of a cell, a jax.checkpoint policy; None: all.
  """
  B, T = tokens_BT.shape
  p = plan((B, T), size, state, segment_ids_BT, valid_BT)
  packed_BT = jnp.take_along_axis(tokens_BT, jnp.minimum(p.order_BT, T - 1), axis=1)
  slot_C = jnp.arange(size)

  def tokens_of(first_B, old_B):
    from_call = jnp.take_along_axis(
        packed_BT, (first_B[:, None] + slot_C - old_B[:, None]).clip(0, T - 1), axis=1)
    return jnp.where(slot_C < old_B[:, None], state.tail, from_call)

  def visit(memory, cells, key):
    """One cell of each row; the memory after it, where it is whole."""
    before = detach(begin(cells.number == 0, memory), cells.number, truncate)
    whole_B = cells.length == size
    cell = Cell(slot_C < cells.length[:, None], cells.number, kept_B=whole_B)
    hidden_BCD, after = read(tokens_of(cells.first, cells.old), cell, before, key)
    return hidden_BCD, keep(whole_B, after, memory)

  kept = functools.partial(jax.checkpoint,
                           policy=remat or jax.checkpoint_policies.everything_saveable)

  # With what decides inside: of a branch that is kept, each turn of a scan would keep its own copy of all
  # that the branch reads, parameters and memory.
  @kept
  def turn(memory, cells, i):
    part = None if key is None else jax.random.fold_in(key, i)
    return jax.lax.cond((cells.length > 0).any(), lambda: visit(memory, cells, part),
                        lambda: (jnp.zeros((B, size, dim), dtype), memory))

  def one(memory, inputs):
    hidden_BCD, memory = turn(memory, *inputs)
    return memory, hidden_BCD

  by_cell = lambda cells: jax.tree.map(lambda x: x.T, cells)
  count = p.cells.first.shape[1]
  rows_B1 = jnp.arange(B)[:, None]
  if count == 1:
    part = None if key is None else jax.random.fold_in(key, 0)
    hidden_BCD, memory = kept(visit)(state.memory, jax.tree.map(lambda x: x[:, 0], p.cells), part)
    hidden_RBCD = hidden_BCD[None]
  else:
    memory, hidden_RBCD = jax.lax.scan(one, state.memory, (by_cell(p.cells), jnp.arange(count)))
  hidden_BTD = hidden_RBCD[jnp.minimum(p.cell_BT, count - 1), rows_B1, p.slot_BT]
  if p.islands is not None:
    apart_BTD = _islands(visit, state.memory, by_cell(p.islands), p, key, (B, T, size, dim, dtype))
    hidden_BTD = jnp.where(p.island_BT[..., None], apart_BTD, hidden_BTD)
  if valid_BT is not None:   # back to where they stand in the call; T: dropped
    hidden_BTD = jnp.zeros_like(hidden_BTD).at[rows_B1, p.order_BT].set(hidden_BTD, mode='drop')

  last = p.last
  full_B = last.length == size
  after = State(
      tail=tokens_of(last.first, last.old), count=jnp.where(full_B, 0, last.length),
      number=jnp.where(full_B, last.number + 1, last.number), segment=last.segment, memory=memory)
  moved = lambda new, old: rows_where(last.none, old, new)
  return hidden_BTD, State(*(moved(new, old) for new, old in zip(after[:4], state[:4])), memory)


BUNCH = 64   # islands that one branch may pass over


def _islands(visit, memory, cells, p, key, sizes) -> jax.Array:
  """Hidden states [B, T, D] of tokens in unfinished first segments, 0 elsewhere; by bunches of cells."""
  B, T, size, dim, dtype = sizes
  rows_B1, slot_C = jnp.arange(B)[:, None], jnp.arange(size)

  @jax.checkpoint   # with what decides, as in `walk`
  def read(cells, i):
    part = None if key is None else jax.random.fold_in(key, T + i)
    return jax.lax.cond((cells.length > 0).any(), lambda: visit(memory, cells, part)[0],
                        lambda: jnp.zeros((B, size, dim), dtype))

  def one(hidden_BTD, inputs):
    cells, i = inputs
    place_BC = cells.first[:, None] + slot_C - cells.old[:, None]
    mine_BC = (slot_C >= cells.old[:, None]) & (slot_C < cells.length[:, None])
    place_BC = jnp.where(mine_BC, place_BC, T)
    return hidden_BTD.at[rows_B1, place_BC].add(read(cells, i), mode='drop'), None

  @jax.checkpoint
  def read_bunch(cells, i):
    none_BTD = jnp.zeros((B, T, dim), dtype)
    return jax.lax.cond((cells.length > 0).any(),
                        lambda: jax.lax.scan(one, none_BTD, (cells, i))[0], lambda: none_BTD)

  def bunch(hidden_BTD, inputs):
    return hidden_BTD + read_bunch(*inputs), None

  count = -(-T // BUNCH)
  def in_bunches(x):
    x = jnp.pad(x, ((0, count * BUNCH - T),) + ((0, 0),) * (x.ndim - 1)) if count > 1 else x
    return x.reshape(count, -1, *x.shape[1:])
  return jax.lax.scan(bunch, jnp.zeros((B, T, dim), dtype),
                      jax.tree.map(in_bunches, (cells, jnp.arange(T))))[0]


def detach(memory: Any, number_B: jax.Array, truncate: int) -> Any:
  """The memory before segment `number`, cut off from its past at every `truncate`-th; 0: never.

  The one place where backpropagation through time is truncated. What a document begins with has no past:
  where it is learned it keeps its gradient.
  """
  if not truncate:
    return memory
  cut_B = (number_B > 0) & (number_B % truncate == 0)
  return rows_where(cut_B, jax.lax.stop_gradient(memory), memory)


