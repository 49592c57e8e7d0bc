"""Text cut so that a prompt has exactly so many tokens in the model's own tokenizer.

A prompt is `build(filler)` for some text that may be cut anywhere. Tokens of subwords do not add
up: where a cut goes through a word, its rest is other tokens. So the cut is found by trying: by the
rate of tokens a byte so far, then byte by byte about the place, and at last with a few full stops,
or words of one token in most tokenizers, in place of what is there. Whole prompts take time to count: byte by
byte only those are of which the tokens about the cut say that they are right, as long as that finds one.
Held by: tests/test_task_fit.py.
"""

import functools
import itertools
from collections.abc import Callable

import numpy as np

from longctx.data.tasks.example import Draw
from longctx.data.tokenizer import Tokenizer
from longctx.errors import ConfigError

NEAR = 48          # bytes tried on either side of the cut
WINDOW = 256       # bytes on either side of what differs, whose tokens tell a prompt from another
# of many and of few tokens a byte; so many at the end, at most
ENDS, STOPS = (b' .', b' the', b'.'), 8
# a token of running text, at most, on average; with fewer an example is refused, not short
BYTES = 8
ENDING = STOPS * max(map(len, ENDS))   # bytes of it
RATE_BYTES = 4096  # of the text, by which tokens a byte are guessed


def between(text: bytes, cut: int) -> int:
  """The last place at or before `cut` that is between two UTF-8 characters."""
  while 0 < cut < len(text) and text[cut] & 0xC0 == 0x80:
    cut -= 1
  return cut


def bytes_for(draw: Draw) -> int:
  """Bytes of running text that are enough for a prompt of the length drawn."""
  return draw.length * min(_longest(draw.tokenizer), BYTES) + NEAR


@functools.lru_cache(maxsize=8)
def _longest(tokenizer: Tokenizer) -> int:
  """Bytes of the longest token."""
  return int(tokenizer.num_bytes(np.arange(tokenizer.vocab_size)).max())


def told(count: Callable[[bytes], int], new: bytes, old: bytes, tokens: int) -> int:
  """Tokens of a text as those about where it differs from another, of so many, say: seldom others than it has."""
  size = min(len(new), len(old))
  a, b = (np.frombuffer(text, np.uint8) for text in (new, old))
  same = lambda a, b: int(differ[0]) if (differ := np.flatnonzero(a != b)).size else size
  start = same(a[:size], b[:size])
  left = between(old, max(0, start - WINDOW))
  stop = min(same(a[::-1][:size], b[::-1][:size]), size - start)
  right = len(old) - between(old, len(old) - max(0, stop - WINDOW))
  window = lambda text: count(text[left:len(text) - right])
  return tokens + window(new) - window(old)


def filled(draw: Draw, build: Callable[[bytes], bytes], text: bytes, new_tokens: int,
           name: str) -> tuple[bytes, bytes]:
  """(build(filler), filler) with the prompt of exactly the length that is drawn.

  Args:
    draw: the length and the tokenizer.
    build: the prompt with the filler in it; more filler never makes it shorter.
    text: what the filler is the beginning of; at least as much as is needed, see `bytes_for`.
    new_tokens: of the answer, which count too.
    name: of the task, for the error.
  """
  want = draw.length - 1 - new_tokens
  least = draw.count(build(b''))
  if least > want:
    raise ConfigError(f'{name}: length={draw.length}: must be at least {least + 1 + new_tokens} '
                      f"in this model's tokens ({new_tokens} of them for the answer)")
  seen = {0: least}

  def exact(cut: int) -> bool:
    if cut not in seen:
      seen[cut] = draw.count(build(text[:cut]))
    return seen[cut] == want

  begin = text[:between(text, min(RATE_BYTES, len(text)))]
  rate, cut = len(begin) / max(1, draw.count(begin)), 0
  for _ in range(24):
    if exact(cut):
      return build(text[:cut]), text[:cut]
    step = int((want - seen[cut]) * rate) or (1 if seen[cut] < want else -1)
    cut = between(text, min(max(cut + step, 0), len(text)))
    if cut in seen:
      break
  best = max(cut for cut, found in seen.items() if found <= want)
  if best == len(text) and seen[best] < want:
    raise AssertionError(f'{name}: {len(text)} bytes of filler are too few for {draw.length} '
                         'tokens')
  # First by what tokens about a cut tell, which leaves few to count, then all.
  prompt, tokens, guessed = build(text[:best]), seen[best], {}
  once = functools.cache(draw.count)
  nearby = [between(text, min(max(0, best + away), len(text)))   # the nearest first
            for far in range(1, NEAR + 1) for away in (-far, far)]
  for every in (False, True):
    for cut in nearby:
      if not every:
        guessed[cut] = told(once, build(text[:cut]), prompt, tokens)
      if (every or guessed[cut] == want) and exact(cut):
        return build(text[:cut]), text[:cut]
    best = max(cut for cut, found in (guessed | seen).items() if found <= want)
    for back, count, stop in itertools.product(range(NEAR), range(1, STOPS + 1), ENDS):
      filler = text[:between(text, max(0, best - back))] + count * stop
      if draw.count(build(filler)) == want:
        return build(filler), filler
  raise ConfigError(f'{name}: length={draw.length}: no cut of the text gives exactly so many '
                    f'tokens with this tokenizer; try {draw.length + 1}')
