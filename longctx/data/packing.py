"""Which part of which document goes where in a batch: integer arithmetic, no tokens.

A document of n tokens is stored as SEP b1 .. b(n-1) and gives n pairs (input, target), for its last
token's target is SEP. Three ways of laying the pairs out in rows of T:

    SplitRows  all documents in one shuffled line, chopped every T: no padding, pieces anywhere
    WholeRows  each document, trimmed to T or dropped when longer, by best fit into padded rows
    Lanes      the shuffled line in B equal lanes; row b walks along lane b from batch to batch;
               `align`: each document begins a row, and its last row is padded

Every pair that is left out of an epoch is counted in `accounting()`:
    tokens == tokens_per_epoch + trimmed_tokens + dropped_tokens + tail_tokens.
Held by: tests/test_data_packing.py.

B batch  T tokens of a row
"""

import bisect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from longctx.errors import check


class Piece(NamedTuple):
  """`count` tokens of a document, from its token `offset` on."""
  document: int
  offset: int
  count: int
  position: int  # of the first token, counted from where the document starts or re-starts
  segment: int   # the segment id


def shuffled(n: int, *seed: int) -> np.ndarray:
  """A permutation of range(n); from RandomState, whose numbers NumPy promises never to change."""
  result = np.arange(n, dtype=np.int32 if n < 2**31 else np.int64)
  words = np.random.SeedSequence(seed).generate_state(4)
  np.random.RandomState(words).shuffle(result)
  return result


class PerEpoch:
  """make(epoch), remembered for the latest two epochs, between which readers ahead may stand."""

  def __init__(self, make: Callable[[int], Any]):
    self._make = make
    self._made: dict[int, Any] = {}

  def __call__(self, epoch: int) -> Any:
    value = self._made.get(epoch)
    if value is None:  # two threads may both make it: the values are equal
      value = self._make(epoch)
      self._made = {e: v for e, v in self._made.items() if e == epoch - 1} | {epoch: value}
    return value


class Line:
  """Documents one after the other, in a given order."""

  def __init__(self, lengths: np.ndarray, order: np.ndarray):
    self.order = order
    self.ends = np.cumsum(lengths[order])

  def span(self, low: int, high: int) -> Iterator[tuple[int, int, int, int]]:
    """(place in the order, document, offset, count) of what lies in [low, high)."""
    j = int(np.searchsorted(self.ends, low, side='right'))
    start = int(self.ends[j - 1]) if j else 0
    while low < high:
      end = int(self.ends[j])
      count = min(end, high) - low
      yield j, int(self.order[j]), low - start, count
      low, start, j = low + count, end, j + 1

  def num_cut(self, every: int, limit: int) -> int:
    """Documents with a cut inside, when the line is cut at every, 2 * every, ... up to limit."""
    starts = np.concatenate([[0], self.ends[:-1]])
    inside = np.minimum((self.ends - 1) // every, limit // every)
    return int(np.sum(inside > starts // every))


class SplitRows:
  """Rows of exactly T tokens; a document is cut wherever a row ends."""

  def __init__(self, lengths: np.ndarray, length: int, seed: int):
    self.line = Line(lengths, shuffled(len(lengths), seed))
    self.length = length
    self.total = int(self.line.ends[-1])
    self.num_rows = self.total // length
    check(self.num_rows > 0, f'data.length={length}: the split has only {self.total} tokens, not '
          'one row; choose a shorter length or a larger split')

  def pieces(self, row: int) -> list[Piece]:
    span = self.line.span(row * self.length, (row + 1) * self.length)
    return [Piece(document, offset, count, 0, i)
            for i, (_, document, offset, count) in enumerate(span, start=1)]

  def accounting(self) -> dict:
    trained = self.num_rows * self.length
    return _accounting(tokens_per_epoch=trained, tail_tokens=self.total - trained,
                       rows_per_epoch=self.num_rows,
                       documents_cut=self.line.num_cut(self.length, trained))


class WholeRows:
  """Rows of documents that fit whole, best fit in order of falling length; the rest is padding."""

  def __init__(self, lengths: np.ndarray, length: int, seed: int, *, trim: bool):
    lengths = np.asarray(lengths)
    order = shuffled(len(lengths), seed)
    long = lengths > length
    if not trim:
      order = order[~long[order]]
    self._kept = np.minimum(lengths, length)
    order = order[np.argsort(-self._kept[order], kind='stable')]
    row_of = best_fit(self._kept[order], length)
    self.num_rows = int(row_of.max()) + 1 if len(order) else 0
    check(self.num_rows > 0, f"data.long_documents='drop': all {len(lengths)} documents of the "
          f"split are longer than data.length={length}; choose 'split', 'trim' or a longer length")
    self._documents = order[np.argsort(row_of, kind='stable')]
    self._ends = np.cumsum(np.bincount(row_of))
    trained = int(self._kept[order].sum())
    lost = int(lengths[long].sum()) - int(long.sum()) * length * trim
    counts = (('trimmed_tokens', 'documents_cut') if trim else
              ('dropped_tokens', 'dropped_documents'))
    self._accounting = _accounting(
        tokens_per_epoch=trained, rows_per_epoch=self.num_rows,
        padding_fraction=1 - trained / (self.num_rows * length),
        **dict(zip(counts, (lost, int(long.sum())))))

  def pieces(self, row: int) -> list[Piece]:
    low = self._ends[row - 1] if row else 0
    documents = self._documents[low:self._ends[row]].tolist()
    return [Piece(d, 0, int(self._kept[d]), 0, i) for i, d in enumerate(documents, start=1)]

  def accounting(self) -> dict:
    return self._accounting


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
  """The row of each item: the open row with the least room that still holds it, else a new one."""
  rooms: list[int] = []              # the distinct rooms left, in order
  rows: dict[int, list[int]] = {}    # room -> rows that have it left
  row_of = np.empty(len(lengths), np.int64)
  num_rows = 0
  for i, n in enumerate(lengths.tolist()):
    at = bisect.bisect_left(rooms, n)
    if at < len(rooms):
      room = rooms[at]
      row = rows[room].pop()
      if not rows[room]:
        del rows[room], rooms[at]
    else:
      room, row = capacity, num_rows
      num_rows += 1
    row_of[i] = row
    left = room - n
    if left and left not in rows:
      bisect.insort(rooms, left)
      rows[left] = []
    if left:
      rows[left].append(row)
  return row_of


class Lanes:
  """Row b of batch i has tokens [i T, (i + 1) T) of lane b; an epoch has a new order and new lanes.

  A document that a lane or an epoch begins within starts there as if anew: its positions count from
  there. Segment ids run on, so that neighbours differ across batches and epochs too.
  """

  def __init__(self, lengths: np.ndarray, length: int, batch_size: int, seed: int, *,
               align: bool = False):
    self._lengths = lengths   # of their tokens; in the line they are padded
    lengths = -(-lengths // length) * length if align else lengths
    self._num_documents = len(lengths)
    self.length = length
    self.batch_size = batch_size
    self.total = int(np.sum(lengths))
    self.num_batches = self.total // batch_size // length
    check(self.num_batches > 0, f'data.batch_size={batch_size}: the split has only {self.total} '
          f'tokens, less than one batch of {batch_size} x {length}; choose a smaller batch or '
          'length')
    self.line = PerEpoch(lambda e: Line(lengths, shuffled(len(lengths), seed, e)))

  def pieces(self, batch: int, lane: int) -> list[Piece]:
    epoch, i = divmod(batch, self.num_batches)
    lane_start = lane * self.num_batches * self.length
    low = lane_start + i * self.length
    result = []
    for j, document, offset, count in self.line(epoch).span(low, low + self.length):
      position = min(offset, low - lane_start)
      segment = 1 + (epoch * self._num_documents + j) % (2**31 - 2)
      there = min(count, int(self._lengths[document]) - offset)
      result.append(Piece(document, offset, there, position, segment))
      low += count
    return result

  def accounting(self) -> dict:
    """Of the first epoch; `documents_cut` counts lane ends, for within a lane state is carried."""
    lane = self.num_batches * self.length
    slots = lane * self.batch_size
    tail = sum(min(count, max(0, int(self._lengths[document]) - offset))
               for _, document, offset, count in self.line(0).span(slots, self.total))
    trained = int(np.sum(self._lengths)) - tail
    return _accounting(tokens_per_epoch=trained, tail_tokens=tail,
                       rows_per_epoch=self.num_batches * self.batch_size,
                       padding_fraction=1 - trained / slots,
                       documents_cut=self.line(0).num_cut(lane, slots))


def _accounting(**values) -> dict:
  zero = {'tokens_per_epoch': 0, 'rows_per_epoch': 0, 'trimmed_tokens': 0, 'dropped_tokens': 0,
          'dropped_documents': 0, 'tail_tokens': 0, 'documents_cut': 0, 'padding_fraction': 0.0}
  return zero | values
