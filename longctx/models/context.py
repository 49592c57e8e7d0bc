"""Where each token of a call stands: its index in the stream, its document, its position.

Every model reads the same three optional arguments (`positions_BT`, `segment_ids_BT`, `valid_BT`)
through `place_tokens`, and carries the same small `Clock` in its state, so that documents, padding
and splits mean the same to attention and to recurrence.
Held by: tests/test_models.py.

B batch  T tokens
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from longctx.attention import Intervals
from longctx.parallel import mesh


class Clock(NamedTuple):
  """What must be known of the past to place the next token. Each int32 [B]."""

  index: jax.Array      # tokens seen so far: the index of the next one
  start: jax.Array      # index of the first token of the document being read
  segment: jax.Array    # segment id of the last token seen; NO_SEGMENT before any


NO_SEGMENT = -1


LIMIT = 2 ** 30   # from here on a row's indices are counted anew; int32 ends at twice as many


def rebase(clock: Clock, unit: int = 1) -> tuple[Clock, jax.Array, int]:
  """The clock with smaller indices in rows that have reached LIMIT, for streams without an end.

  Also how much less they are in each row, int32 [B], 0 or `shift`; and shift: a multiple of `unit`
  unless that is above LIMIT / 2. A document of more than LIMIT tokens loses count of its positions.
  """
  shift = LIMIT // 2 // unit * unit or LIMIT // 2
  less_B = jnp.where(clock.index >= LIMIT, shift, 0)
  start_B = jnp.maximum(clock.start - less_B, -LIMIT)
  return Clock(clock.index - less_B, start_B, clock.segment), less_B, shift


def new_clock(batch_size: int) -> Clock:
  zeros = jnp.zeros((batch_size,), jnp.int32)
  return Clock(zeros, zeros, jnp.full((batch_size,), NO_SEGMENT, jnp.int32))


class Context(NamedTuple):
  """The tokens of one call. int32 or bool, each [B, T]; None where it would be trivial."""

  index_BT: jax.Array          # index of the token in its row's stream; -1 for padding
  start_BT: jax.Array          # index of the first token of its document
  position_BT: jax.Array       # what position encodings see: counted within the document
  reset_BT: jax.Array | None   # True where a document begins; None: nowhere but at index 0
  valid_BT: jax.Array | None   # False for padding; None: no padding
  whole: bool                  # static: one document a row, index == arange(T)
  dense: bool                  # static: index == arange(T) (documents may begin anywhere)
  order: str = ''              # static: of tokens that were laid out over devices; '': as they come
  angles: tuple[jax.Array, jax.Array] | None = None   # of rotary positions, made once a call
  bias: Any = None             # of the scores of every layer, see attention/biases.py
  end_BT: jax.Array | None = None   # index after its document's last token, if that is seen; see both_ways

  def both_ways(self) -> 'Context':
    """The same tokens, of a layer that sees what follows too: the whole document."""
    if self.order:
      raise ValueError('tokens that do not stand in their order cannot see both ways: where their '
                       'document ends is not known')
    count_B1 = self.index_BT.max(axis=1, keepdims=True) + 1
    if self.reset_BT is None:
      return self._replace(end_BT=jnp.broadcast_to(count_B1, self.index_BT.shape))
    begins_BT = jnp.where(self.reset_BT, self.index_BT, count_B1)
    after_BT = jnp.concatenate([begins_BT[:, 1:], count_B1], axis=1)
    return self._replace(end_BT=jax.lax.cummin(after_BT, axis=1, reverse=True))

  def mask(self, window: int = 0) -> Intervals:
    """Which of the call's tokens, and of those before, each of them sees: its document so far."""
    if self.end_BT is not None:
      return self._mask_both_ways(window)
    start_BT, end_BT = self.start_BT, self.index_BT + 1
    if window:
      start_BT = jnp.maximum(start_BT, end_BT - window)
    if self.valid_BT is not None:
      end_BT = jnp.where(self.valid_BT, end_BT, start_BT)   # padding sees nothing
    kind = 'causal' if self.whole else 'ordered' if self.dense else 'any'
    # Padding amid a row puts tokens apart that follow each other: then a window reaches anywhere.
    padded = self.valid_BT is not None and not self.order
    return Intervals(start_BT=start_BT, end_BT=end_BT, index_BT=self.index_BT, kind=kind,
                     reach=0 if padded else window, order=self.order or 'contiguous')

  def _mask_both_ways(self, window: int) -> Intervals:
    if window:
      raise ValueError(f'window={window}: layers that see both ways see the whole document; give 0')
    end_BT = self.end_BT
    if self.valid_BT is not None:
      end_BT = jnp.where(self.valid_BT, end_BT, self.start_BT)
    return Intervals(start_BT=self.start_BT, end_BT=end_BT, index_BT=self.index_BT,
                     kind='full' if self.whole else 'any')


def place_tokens(tokens_BT: jax.Array, clock: Clock | None, positions_BT: jax.Array | None,
                 segment_ids_BT: jax.Array | None, valid_BT: jax.Array | None,
                 places: tuple[jax.Array, jax.Array] | None = None,
                 ) -> tuple[Context, Clock | None]:
  """Places the tokens of a call after those the clock has seen; returns the clock after them.

  `places`: (index_BT, start_BT) of tokens that do not stand in their order (parallel/layouts.py);
  they are whole documents or parts that nothing was seen before.

  A document begins at a valid token whose segment id differs from that of the valid token
  before it. Without segment ids the document that the clock was in goes on.
  """
  batch, length = tokens_BT.shape
  if not length:
    raise ValueError(f'tokens have shape {tokens_BT.shape}; must be [B, T] of at least one token '
                     'each row')
  for name, x in (('positions_BT', positions_BT), ('segment_ids_BT', segment_ids_BT),
                  ('valid_BT', valid_BT)):
    if x is not None and x.shape != tokens_BT.shape:
      raise ValueError(f'{name} has shape {x.shape}; must be that of the tokens, '
                       f'{tokens_BT.shape}')
  if places is not None:
    if clock is not None:
      raise ValueError('tokens that do not stand in their order cannot follow a state; '
                       'give places or a state, not both')
    index_BT, start_BT = places
    if positions_BT is None:
      positions_BT = jnp.maximum(index_BT - start_BT, 0)
    valid_BT = index_BT >= 0
    layout = mesh.current()
    return Context(index_BT, start_BT, positions_BT, valid_BT & (index_BT == start_BT), valid_BT,
                   whole=False, dense=False, order=layout.order if layout else 'contiguous'), None
  seen = clock if clock is not None else new_clock(batch)
  slot_T = jnp.arange(length, dtype=jnp.int32)
  if valid_BT is None:
    index_BT = seen.index[:, None] + slot_T
    next_index = seen.index + length
  else:
    count_BT = jnp.cumsum(valid_BT, axis=1, dtype=jnp.int32)
    index_BT = jnp.where(valid_BT, seen.index[:, None] + count_BT - 1, -1)
    next_index = seen.index + count_BT[:, -1]

  if segment_ids_BT is None:
    reset_BT, last_segment = None, seen.segment
    start_BT = jnp.broadcast_to(seen.start[:, None], (batch, length))
  else:
    if valid_BT is None:
      before_BT = jnp.concatenate([seen.segment[:, None], segment_ids_BT[:, :-1]], axis=1)
      last_segment = segment_ids_BT[:, -1]
    else:
      latest_BT = jax.lax.cummax(jnp.where(valid_BT, slot_T, -1), axis=1)
      filled_BT = jnp.where(latest_BT < 0, seen.segment[:, None],
                            jnp.take_along_axis(segment_ids_BT, latest_BT.clip(0), axis=1))
      before_BT = jnp.concatenate([seen.segment[:, None], filled_BT[:, :-1]], axis=1)
      last_segment = filled_BT[:, -1]
    reset_BT = segment_ids_BT != before_BT
    if valid_BT is not None:
      reset_BT &= valid_BT
    start_BT = jax.lax.cummax(jnp.where(reset_BT, index_BT, seen.start[:, None]), axis=1)

  if positions_BT is None:
    positions_BT = jnp.maximum(index_BT - start_BT, 0)
  dense = clock is None and valid_BT is None
  context = Context(index_BT, start_BT, positions_BT, reset_BT, valid_BT,
                    whole=dense and segment_ids_BT is None, dense=dense)
  if clock is None:
    return context, None
  return context, Clock(next_index, start_BT[:, -1], last_segment.astype(jnp.int32))
