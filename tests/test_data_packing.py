"""Packing: every pair of every document is in an epoch once, or counted as left out."""

import collections
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.data import packing
from longctx.errors import ConfigError
from tests import oracles

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def covered(pieces):
  """How often each (document, token) is in the pieces."""
  return collections.Counter((p.document, p.offset + k) for p in pieces for k in range(p.count))


def whole(lengths):
  return collections.Counter((d, k) for d, n in enumerate(lengths) for k in range(n))


@given(LENGTHS, st.integers(1, 40), st.integers(0, 3))
@settings(max_examples=80, deadline=None)
def test_split_rows_hold_each_pair_once(lengths, length, seed):
  if sum(lengths) < length:
    with pytest.raises(ConfigError, match='not one row'):
      packing.SplitRows(np.array(lengths), length, seed)
    return
  rows = packing.SplitRows(np.array(lengths), length, seed)
  pieces = [rows.pieces(r) for r in range(rows.num_rows)]
  count = covered(p for row in pieces for p in row)
  assert max(count.values()) == 1
  assert set(count) <= set(whole(lengths))
  account = rows.accounting()
  assert sum(count.values()) == account['tokens_per_epoch']
  assert account['tokens_per_epoch'] + account['tail_tokens'] == sum(lengths)
  assert account['tail_tokens'] < length
  for row in pieces:
    assert sum(p.count for p in row) == length
    assert [p.segment for p in row] == list(range(1, len(row) + 1))
    assert all(p.position == 0 for p in row)
  spread = collections.Counter(p.document for row in pieces for p in row)
  tail = {d for d, n in enumerate(lengths) if 0 < sum(count[d, k] for k in range(n)) < n}
  cut = {d for d in spread if spread[d] > 1} | tail
  assert account['documents_cut'] == len(cut)


@given(LENGTHS, st.integers(1, 40), st.booleans(), st.integers(0, 3))
@settings(max_examples=80, deadline=None)
def test_whole_rows_keep_or_count(lengths, length, trim, seed):
  if not trim and min(lengths) > length:
    with pytest.raises(ConfigError, match=r'data\.long_documents'):
      packing.WholeRows(np.array(lengths), length, seed, trim=trim)
    return
  rows = packing.WholeRows(np.array(lengths), length, seed, trim=trim)
  pieces = [rows.pieces(r) for r in range(rows.num_rows)]
  count = covered(p for row in pieces for p in row)
  kept = [min(n, length) if trim else (n if n <= length else 0) for n in lengths]
  assert count == whole(kept)
  account = rows.accounting()
  long = [n for n in lengths if n > length]
  assert account['tokens_per_epoch'] == sum(kept)
  assert account['trimmed_tokens'] == (sum(n - length for n in long) if trim else 0)
  assert account['documents_cut'] == (len(long) if trim else 0)
  assert account['dropped_tokens'] == (0 if trim else sum(long))
  assert account['dropped_documents'] == (0 if trim else len(long))
  assert account['rows_per_epoch'] == rows.num_rows
  np.testing.assert_allclose(account['padding_fraction'],
                             1 - sum(kept) / (rows.num_rows * length), atol=1e-12)
  fills = sorted(sum(p.count for p in row) for row in pieces)
  assert fills == oracles.best_fit_fills(sorted((n for n in kept if n), reverse=True), length)
  for row in pieces:
    assert [p.segment for p in row] == list(range(1, len(row) + 1))


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 30))
@settings(max_examples=80, deadline=None)
def test_best_fit_in_any_order(lengths, capacity):
  row_of = packing.best_fit(np.array(lengths, int), capacity)
  fills = collections.Counter()
  for row, n in zip(row_of.tolist(), lengths):
    fills[row] += n
  assert sorted(fills.values()) == oracles.best_fit_fills(lengths, capacity)


@given(LENGTHS, st.integers(1, 12), st.integers(1, 4), st.integers(0, 3), st.booleans())
@settings(max_examples=160, deadline=None)
def test_lanes_carry_on(lengths, length, batch_size, seed, align):
  total = sum(lengths)
  slots = sum(-(-n // length) * length for n in lengths) if align else total
  if slots < length * batch_size:
    with pytest.raises(ConfigError, match=r'data\.batch_size'):
      packing.Lanes(np.array(lengths), length, batch_size, seed, align=align)
    return
  lanes = packing.Lanes(np.array(lengths), length, batch_size, seed, align=align)
  for epoch in range(3):
    batches = range(epoch * lanes.num_batches, (epoch + 1) * lanes.num_batches)
    count = covered([p for i in batches for b in range(batch_size) for p in lanes.pieces(i, b)])
    account = lanes.accounting()
    assert max(count.values()) == 1
    assert account['tail_tokens'] < length * batch_size
    if epoch == 0 or not align:   # another order leaves other tails, padded otherwise
      assert sum(count.values()) == account['tokens_per_epoch']
      assert account['tokens_per_epoch'] + account['tail_tokens'] == total
      rows = account['rows_per_epoch']
      np.testing.assert_allclose(account['padding_fraction'],
                                 1 - account['tokens_per_epoch'] / (rows * length), atol=1e-12)
    if align:
      for i in batches:
        for b in range(batch_size):
          (piece,) = lanes.pieces(i, b)
          assert piece.offset % length == 0
          assert piece.count == min(length, lengths[piece.document] - piece.offset)
  for b in range(batch_size):
    walk = [p for i in range(3 * lanes.num_batches) for p in lanes.pieces(i, b)]
    for before, after in itertools.pairwise(walk):
      carries_on = after.position != 0
      assert carries_on == (before.segment == after.segment)
      if carries_on:
        assert after.position == before.position + before.count
        assert (after.document, after.offset) == (before.document, before.offset + before.count)


def test_cut_documents_of_lanes():
  lanes = packing.Lanes(np.array([10, 10, 10]), 3, 2, seed=0)  # lanes [0, 15) and [15, 30)
  assert lanes.accounting()['documents_cut'] == 1
  lanes = packing.Lanes(np.array([10, 10, 10, 10]), 5, 2, seed=0)  # [0, 20) and [20, 40)
  assert lanes.accounting()['documents_cut'] == 0


def test_shuffled_is_frozen():
  """A resumed run needs the same order years later."""
  assert packing.shuffled(8, 0).tolist() == [1, 3, 0, 7, 6, 5, 2, 4]
  assert packing.shuffled(8, 1).tolist() != packing.shuffled(8, 2).tolist()
  assert sorted(packing.shuffled(1000, 3, 4).tolist()) == list(range(1000))
  assert not np.array_equal(packing.shuffled(1000, 3), packing.shuffled(1000, 3, 1))


def test_segment_ids_stay_int32_after_many_epochs():
  lanes = packing.Lanes(np.array([5, 6, 7]), 3, 2, seed=0)
  far = 2**40
  for i in range(far, far + 10):
    for b in range(2):
      assert all(1 <= p.segment <= 2**31 - 1 for p in lanes.pieces(i, b))
