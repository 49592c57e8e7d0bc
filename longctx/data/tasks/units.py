"""Prompts of whole units (lines, words of a list, documents) and the begin of one more.

A prompt is `lay(n)` with n units whole, the begin of another unit, and `after`. n is the largest
that fits; what is then missing is a cut through the next unit, found by counting the tokens near
the cut alone: those of the rest stay as they are, but for rare merges, which the count of the whole
prompt finds and mends.
Held by: tests/test_task_units.py.
"""

from collections.abc import Callable, Sequence

import numpy as np

from longctx.data.tasks.example import Draw
from longctx.data.tasks.fit import NEAR, STOPS, between
from longctx.errors import ConfigError

WINDOW = 256   # bytes on either side of a cut, whose tokens are counted
ROUNDS = 8     # in which a cut that is right nearby is mended by what the whole prompt says


class Pool:
  """Units made when they are asked for, always in the same order."""

  def __init__(self, make: Callable[[], Sequence[bytes]]):
    """`make` makes the next ones."""
    self._make, self._units = make, []

  def first(self, n: int) -> list[bytes]:
    while len(self._units) < n:
      self._units += self._make()
    return self._units[:n]

  def __getitem__(self, i: int) -> bytes:
    return self.first(i + 1)[i]


def fitted(draw: Draw, name: str, *, lay: Callable[[int], bytes], tail: Callable[[int], bytes],
           after: bytes, new_tokens: int, least: int = 0) -> tuple[bytes, int]:
  """(the prompt, n): the prompt has exactly the tokens drawn, n of its units are whole.

  Args:
    draw: the length and the tokenizer.
    name: of the task, for the errors.
    lay: n -> the prompt up to the end of its n-th unit.
    tail: n -> what would stand after that: the next unit, with what parts it from the others.
    after: the rest of the prompt.
    new_tokens: of the answer, which count too.
    least: units without which there is no question.
  """
  want = draw.length - 1 - new_tokens
  counted = {}

  def tokens(n: int) -> int:
    if n not in counted:
      counted[n] = draw.count(lay(n) + after)
    return counted[n]

  if tokens(least) > want:
    raise ConfigError(f'{name}: length={draw.length}: must be at least '
                      f"{tokens(least) + 1 + new_tokens} in this model's tokens ({new_tokens} of "
                      'them for the answer)')
  n = _most(tokens, want, least)
  return _ended(draw, name, lay(n), tail(n), after, want, tokens(n)), n


def _most(tokens: Callable[[int], int], want: int, least: int) -> int:
  """The largest n >= least whose tokens are at most `want`; tokens(least) are."""
  low, high, step = least, None, 16
  while high is None or high - low > 1:
    if low > least + want:
      raise AssertionError(f'{low} units have fewer than {want} tokens: they came to an end')
    if high is None:
      n = low + step
    else:   # where a straight line between the two would meet `want`, never at either
      slope = (tokens(high) - tokens(low)) / (high - low)
      n = min(max(low + int((want - tokens(low)) / slope), low + 1), high - 1)
    if tokens(n) > want:
      high = n
      continue
    if high is None:   # as far as the rate so far says, and a little more: to the other side soon
      rate = max(1e-3, (tokens(n) - tokens(low)) / (n - low))
      step = max(1, int((want - tokens(n)) / rate * 1.02)) + 1
    low = n
  return low


def _ended(draw: Draw, name: str, before: bytes, text: bytes, after: bytes, want: int,
           have: int) -> bytes:
  """before + some begin of `text` + after, of `want` tokens; without it they have `have`."""
  if have == want:
    return before + after
  left = before[between(before, max(0, len(before) - WINDOW)):]
  right = after[:between(after, min(WINDOW, len(after)))]
  near = {}

  def count(filler: bytes) -> int:
    if filler not in near:
      near[filler] = draw.count(left + filler + right)
    return near[filler]

  missing = want - have
  for _ in range(ROUNDS):
    filler = _filler(count, text, count(b'') + missing)
    if filler is None:
      break
    found = draw.count(before + filler + after)
    if found == want:
      return before + filler + after
    missing += want - found
  raise ConfigError(f'{name}: length={draw.length}: no cut of the text gives exactly so many '
                    f'tokens with this tokenizer; try {draw.length + 1}')


def _filler(count: Callable[[bytes], int], text: bytes, want: int) -> bytes | None:
  """A begin of `text`, at need with full stops, with which `count` says `want`, or None."""
  low, high = 0, len(text)
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if count(text[:between(text, middle)]) <= want else (low, middle)
  for away in range(NEAR + 1):
    for cut in (low - away, low + away):
      part = text[:between(text, min(max(cut, 0), len(text)))]
      if count(part) == want:
        return part
  for stops in (stop * n for stop in (b' .', b'.') for n in range(1, STOPS + 1)):
    for back in range(NEAR):
      part = text[:between(text, max(0, low - back))] + stops
      if count(part) == want:
        return part
  return None


def among(units: Sequence[bytes], golds: Sequence[bytes],
          depths: Sequence[float]) -> tuple[list[bytes], list[int]]:
  """(the units with the golds among them, the place of each gold in that list).

  Every gap between two units, and before the first and after the last, has as much of 0 to 1 as any
  other; golds of one gap stand in the order of their depths.
  """
  out, places, last = [], [0] * len(golds), 0
  for i in sorted(range(len(golds)), key=lambda i: (depths[i], i)):
    gap = min(int(depths[i] * (len(units) + 1)), len(units))
    out += units[last:gap]
    places[i], last = len(out), gap
    out.append(golds[i])
  return [*out, *units[last:]], places


def spans(units: Sequence[bytes], places: Sequence[int], part: bytes,
          start: int) -> list[tuple[int, int]]:
  """Bytes [start, stop) of the units at some places, where `part` stands between two units."""
  begins = start + np.cumsum([0, *(len(unit) + len(part) for unit in units)])
  return [(int(begins[i]), int(begins[i]) + len(units[i])) for i in places]
