"""Text cut so that a prompt has exactly so many tokens in the model's own tokenizer.

A prompt is `build(filler)` for some text that may be cut anywhere. Tokens of subwords do not add up: where
a cut goes through a word, its rest is other tokens. So the cut is found by trying: by the rate of tokens a
byte so far, then byte by byte about the place, and at last with a few full stops, each of its own token.
Held by: tests/test_tasks.py.
"""

from collections.abc import Callable

from longctx.data.tasks.example import Draw
from longctx.errors import ConfigError

NEAR, STOPS = 48, 8   # bytes tried on either side of the cut; full stops


def between(text: bytes, cut: int) -> int:
  """The last place at or before `cut` that is between two UTF-8 characters."""
  while 0 < cut < len(text) and text[cut] & 0xC0 == 0x80:
    cut -= 1
  return cut


def filled(draw: Draw, build: Callable[[bytes], bytes], text: bytes, new_tokens: int,
           name: str) -> tuple[bytes, bytes]:
  """(build(filler), filler) with the prompt of exactly the length that is drawn.

  Args:
    draw: the length and the tokenizer.
    build: the prompt with the filler in it; more filler never makes it shorter.
    text: what the filler is the beginning of; at least as much as is needed.
    new_tokens: of the answer, which count too.
    name: of the task, for the error.
  """
  want = draw.length - 1 - new_tokens
  tokens = lambda cut: draw.count(build(text[:cut]))
  least = tokens(0)
  if least > want:
    raise ConfigError(f'{name}: length={draw.length}: must be at least {least + 1 + new_tokens} in this '
                      f"model's tokens ({new_tokens} of them for the answer)")
  cut, rate = 0, len(text) / max(1, draw.count(text[:4096])) * min(1, 4096 / max(1, len(text)))
  best, seen = 0, {0: least}
  for _ in range(24):
    found = seen[cut]
    if found == want:
      return build(text[:cut]), text[:cut]
    if found < want:
      best = max(best, cut)
    step = int((want - found) * rate) or (1 if found < want else -1)
    cut = between(text, min(max(cut + step, 0), len(text)))
    if cut in seen:
      break
    seen[cut] = tokens(cut)
  for near in range(max(0, best - NEAR), min(len(text), best + NEAR) + 1):
    near = between(text, near)
    if near not in seen:
      seen[near] = tokens(near)
  best = max((cut for cut, found in seen.items() if found <= want), default=0)
  exact = [cut for cut, found in seen.items() if found == want]
  if exact:
    return build(text[:exact[0]]), text[:exact[0]]
  for stops in range(1, STOPS + 1):
    for back in range(NEAR):
      filler = text[:between(text, max(0, best - back))] + b' .' * stops
      if draw.count(build(filler)) == want:
        return build(filler), filler
  if tokens(len(text)) < want:
    raise AssertionError(f'{name}: {len(text)} bytes of filler are too few for {draw.length} tokens')
  raise ConfigError(f'{name}: length={draw.length}: no cut of the text gives exactly so many tokens with '
                    f'this tokenizer; try {draw.length + 1}')
