"""Where tokens go: the walk against loops over documents, whatever the packing, padding and splits.

The memory of these tests is a number that depends on every token of every whole segment, in order, so that
a segment read twice, too early, from a wrong token or into another document's memory changes all after it.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.models import segments
from longctx.models.layers import rows_where

B, T, PRIME, FIRST = 3, 26, 10_007, 5


def read(tokens_BC, cell, memory_B, key):
  """What stands before each token: (memory, segments before, tokens of the segment so far, itself)."""
  del key
  kept_BC = jnp.where(cell.valid_BC, tokens_BC, 0)
  powers = jnp.asarray([pow(3, i, PRIME) for i in range(tokens_BC.shape[1])])
  so_far_BC = jnp.cumsum(kept_BC * powers, axis=1) % PRIME
  wide = lambda x_B: jnp.broadcast_to(x_B[:, None], tokens_BC.shape)
  hidden = jnp.stack([wide(memory_B), wide(cell.number_B), so_far_BC, kept_BC], axis=-1)
  return hidden, (memory_B * 31 + so_far_BC[:, -1] + 1) % PRIME


def begins_with(fresh):
  return lambda new_B, memory: rows_where(new_B, fresh(), memory)


def by_loops(documents, size):
  """The same of each token of each document."""
  found = []
  for tokens in documents:
    memory = FIRST
    for start in range(0, len(tokens), size):
      so_far = 0
      for i, token in enumerate(tokens[start:start + size]):
        so_far = (so_far + token * pow(3, i, PRIME)) % PRIME
        found.append((memory, start // size, so_far, token))
      memory = (memory * 31 + so_far + 1) % PRIME
  return found


@functools.cache
def walker(size, with_ids, with_valid):
  begin = begins_with(lambda: jnp.full((B,), FIRST, jnp.int32))
  @jax.jit
  def run(tokens, state, ids, valid):
    return segments.walk(read, begin, size, 4, jnp.int32, tokens, state, ids if with_ids else None,
                         valid if with_valid else None)
  return run, segments.new_state(B, size, jnp.full((B,), 99, jnp.int32))   # 99: must never be read


def case(seed, documents, padding):
  """Random rows: tokens, segment ids, valid, and the documents that each row holds."""
  rng = np.random.default_rng(seed)
  tokens, ids = rng.integers(1, 50, (B, T)), np.zeros((B, T), int)
  valid = np.ones((B, T), bool)
  if padding:
    valid = rng.random((B, T)) < rng.choice([0.2, 0.7, 0.95])
  if documents:   # ids come again after others, as a loader's may
    ids = np.cumsum(rng.random((B, T)) < rng.choice([0.05, 0.2, 0.8]), axis=1) % 3
  rows = []
  for b in range(B):
    row = list(zip(tokens[b, valid[b]], ids[b, valid[b]]))
    rows.append([[int(t) for t, _ in group] for _, group in itertools.groupby(row, lambda x: x[1])])
  return tokens.astype(np.int32), ids.astype(np.int32), valid, rows


SPLITS = {'whole': (0, T), 'pieces': (0, 9, 10, 19, 20, 21, 22, 23, 24, 25, 26)}   # of 9 and 1


@pytest.mark.parametrize('split', SPLITS)
@pytest.mark.parametrize('size,documents,padding', [
    (4, False, False), (4, False, True), (4, True, False), (4, True, True), (1, True, True),
    (40, True, True)])
def test_every_token_meets_the_memory_of_its_document(size, documents, padding, split):
  for seed in range(8):
    tokens, ids, valid, rows = case(seed, documents, padding)
    run, state = walker(size, documents, padding)
    pieces = []
    for a, b in itertools.pairwise(SPLITS[split]):
      hidden, state = run(tokens[:, a:b], state, ids[:, a:b], valid[:, a:b])
      pieces.append(np.asarray(hidden))
    hidden = np.concatenate(pieces, axis=1)
    assert (hidden[~valid] == 0).all()
    for b in range(B):
      expected = np.array(by_loops(rows[b], size)).reshape(-1, 4)
      np.testing.assert_array_equal(hidden[b, valid[b]], expected)
      last = rows[b][-1] if rows[b] else []
      assert state.count[b] == len(last) % size
      assert state.number[b] == len(last) // size
      assert list(state.tail[b, :state.count[b]]) == last[len(last) - len(last) % size:]


def test_no_gradient_goes_back_beyond_the_segments_that_truncate_allows():
  """A memory that adds tokens up: which tokens the last one of a row of six segments can feel."""
  def read(x_BC, cell, memory_B, key):
    del key
    hidden = memory_B[:, None] + jnp.cumsum(jnp.where(cell.valid_BC, x_BC, 0), axis=1)
    return hidden[..., None], hidden[:, -1]

  def felt(truncate, start):
    state = segments.new_state(1, 2, jnp.zeros(1))._replace(
        tail=jnp.zeros((1, 2)), number=jnp.full(1, start, jnp.int32))
    def last(x):
      hidden, _ = segments.walk(read, begins_with(lambda: jnp.zeros(1)), 2, 1, jnp.float32, x, state,
                                truncate=truncate)
      return hidden[0, -1, 0]
    return np.flatnonzero(jax.jit(jax.grad(last))(jnp.ones((1, 12)))[0])

  assert list(felt(0, 0)) == list(range(12))
  assert list(felt(1, 0)) == [10, 11]
  assert list(felt(2, 0)) == [8, 9, 10, 11]      # segments 4 and 5
  assert list(felt(4, 0)) == [8, 9, 10, 11]      # cut before segments 0 and 4
  assert list(felt(4, 1)) == [6, 7, 8, 9, 10, 11]   # the row is segments 1 to 6: cut before 4


def test_a_cell_of_nobody_is_passed_over():
  """Eight documents of one token each cost eight cells, not as many as there could be: no NaN is met."""
  def read(x_BC, cell, memory_B, key):
    del key
    return jnp.where(cell.valid_BC.any(), x_BC, jnp.nan)[..., None], memory_B
  state = segments.new_state(1, 4, jnp.zeros(1))._replace(tail=jnp.zeros((1, 4)))
  x, ids = jnp.arange(1.0, 9)[None], jnp.arange(8)[None]
  run = lambda x: segments.walk(read, begins_with(lambda: jnp.zeros(1)), 4, 1, jnp.float32, x, state, ids)[0]
  np.testing.assert_array_equal(jax.jit(run)(x)[0, :, 0], x[0])
  assert np.isfinite(jax.jit(jax.grad(lambda x: run(x).sum()))(x)).all()


def test_the_backward_pass_keeps_no_copy_of_the_parameters_for_each_cell_there_may_be():
  """As many unfinished documents as tokens may stand in a row: a copy for each was 12 GiB of a 3M model."""
  D, T, size = 256, 512, 16
  def loss(W, x, ids):
    def read(x_BC, cell, memory_BD, key):
      del key, cell
      hidden = (memory_BD[:, None] + x_BC[..., None]) @ W
      return hidden, jnp.tanh(hidden[:, -1])
    state = segments.new_state(1, size, jnp.zeros((1, D)))._replace(tail=jnp.zeros((1, size)))
    begin = begins_with(lambda: jnp.zeros((1, D)))
    return segments.walk(read, begin, size, D, jnp.float32, x, state, ids,
                         remat=jax.checkpoint_policies.nothing_saveable)[0].sum()
  made = jax.jit(jax.grad(loss)).lower(jnp.ones((D, D)), jnp.ones((1, T)),
                                      jnp.zeros((1, T), int))
  # Two cells for each of the 32 segments, and 512 that may need no memory.
  hidden = 4 * D * T
  assert made.compile().memory_analysis().temp_size_in_bytes < 8 * hidden + 16 * 4 * D * D
