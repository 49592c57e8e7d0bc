"""model.truncate: through a memory, gradients go back so many segments of a document and no more.

RMT's published code, and what copied it, detaches a local variable: the truncation has no effect there,
and no loss or value shows it. So the gradient itself is looked at, for each memory that has one and in
each order in which segments are read.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.models import schedules
from longctx.models.memories import MEMORIES
from tests.test_models import built, memory

SEGMENTS, C, TRUNCATE = 6, 2, 2

memory = functools.partial(memory, vocab_size=SEGMENTS, embed_dim=8, segment=C, mlp='none', tied=False,
                           remat='none', truncate=TRUNCATE)
MODELS = {
    'infini': memory('infini'),
    'armt': memory('armt', memory_tokens=2, memory_width=8),
    'rmt': memory('rmt', memory_tokens=2),
    'memory_caching': memory('memory_caching', memory_size=3),
    'titans': memory('titans'),
    'ttt': memory('ttt'),
    'block_recurrent': memory('block_recurrent', memory_tokens=2),
}
ORDERS = {'P0': ('sequential', 'parallel'), 'P1': ('sequential', 'parallel'),
          'P2': ('sequential', 'wavefront'), 'P3': ('sequential',)}
# Gradients are cut in one place for all: a memory of each dependency class stands for the others.
FAST = ('infini', 'armt', 'rmt')
# After so many segments of the document, known to be a multiple of so many.
CASES = [pytest.param(name, order, *after, marks=() if name in FAST else pytest.mark.slow)
         for name, config in MODELS.items()
         for order in ('walk', *ORDERS[MEMORIES[config.long_term].dependency])
         for after in ([(0, 0), (2, 2), (1, 1)] if order == 'parallel' else [(0, 0)])]


@pytest.mark.parametrize('name, order, number, every', CASES)
def test_gradients_end_where_they_are_truncated(name, order, number, every):
  """Segment s is the token s, C times: row s of the table's gradient is what goes back to segment s."""
  graphdef, params = nnx.split(built(MODELS[name]))
  tokens = jnp.repeat(jnp.arange(SEGMENTS), C)[None]
  def losses(params):
    """One a segment."""
    model = nnx.merge(graphdef, params)
    if order == 'walk':
      hidden, _ = model(tokens, valid_BT=jnp.ones(tokens.shape, bool))
    else:
      hidden, _ = model.read_segments(
          tokens.reshape(1, SEGMENTS, C), jnp.ones((1, SEGMENTS, C), bool),
          jnp.full((1,), number, jnp.int32), model.fresh(1), schedule=order, every=every)
    hidden = hidden.reshape(SEGMENTS, -1)
    return (hidden * jnp.arange(hidden.shape[1])).sum(1)
  by_table = jax.jit(lambda params: jax.jacrev(losses)(params).embedding.table[...])
  reach = np.abs(by_table(params)).max(-1)   # [loss of segment n, of what segment s says]
  n, s = np.mgrid[:SEGMENTS, :SEGMENTS]
  within = (s <= n) & (number + s >= (number + n) // TRUNCATE * TRUNCATE)
  assert not reach[~within].any()
  assert (reach[within] > 1e-5).all()


@pytest.mark.parametrize('S, truncate, every, expected', [
    (4, 2, 0, True), (4, 2, 4, True), (4, 2, 1, False), (4, 3, 0, False), (4, 8, 4, True),
    (4, 6, 4, False), (4, 6, 0, True), (4, 4, 4, True), (4, 8, 1, False), (4, 1, 1, True)])
def test_groups_that_may_be_read_at_once(S, truncate, every, expected):
  """By trying all numbers of segments before that are promised."""
  cuts = lambda number: [s for s in range(S) if number + s and (number + s) % truncate == 0]
  groups = {0, *range(0, S, truncate)} if truncate < S and S % truncate == 0 else {0}
  numbers = [0] if every == 0 else range(0, 100 * every, every)
  at_groups = all(set(cuts(n)) | {0} == groups for n in numbers) if len(groups) > 1 else \
      all(set(cuts(n)) <= groups for n in numbers)
  assert schedules.cuts_at_groups(S, truncate, every) == expected == at_groups
