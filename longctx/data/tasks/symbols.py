"""Tasks of symbols, spelt as text: for a model of bytes, readable by a person (token_batches.py: as arrays).

    mqar             key=value pairs in noise, four keys asked at once: say each with its value
                     (Zoology, arXiv:2312.04927). A pair for each 32 tokens: longer is more to keep
    segment_recall   one pair a line, a line for each 64 tokens (associative recall by segments of
                     ARMT, arXiv:2407.04841)
    segment_rewrite  the same, each key twice with different values: the last one counts
    selective_copy   eight capitals in noise: say them in order (Mamba, arXiv:2312.00752, 4.3.1)
    induction        a mark and a letter in noise, at the end the mark: say the letter (the same)
    parity           zeros and ones: is the number of ones odd or even (state of two values)
    s3               moves of three letters, one after the other: what is their order now (state of
                     six, and it matters in which order; Liu et al. 2022, arXiv:2210.10749)

Differs: noise is of random letters in words of five, so that it can be neither foretold nor packed
into few tokens; all is asked in one answer, which must be right as a whole, as far as it is read: as many tokens
as the right one has bytes. `eval.haystack` changes
nothing here.
Held by: tests/test_tasks.py, tests/test_task_symbols.py.
"""

import string
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from longctx.data.tasks import fit, scoring
from longctx.data.tasks.example import Draw, Example, Task

ASKED = 4                        # keys in a question
KEYS = 26 ** 3                   # names of three letters
MOST = 8192                      # pairs, at most: then the noise between them grows
PAIR_TOKENS, LINE_TOKENS = 32, 64
CAPITALS = 8
WORD = 6                         # bytes of a word of noise and the space after it
LETTERS = np.frombuffer(string.ascii_lowercase.encode(), np.uint8)
# Where each letter of the new order stands in the old one.
MOVES = {'e': (0, 1, 2), 'l': (1, 2, 0), 'r': (2, 0, 1),
         'x': (1, 0, 2), 'y': (0, 2, 1), 'z': (2, 1, 0)}
START = 'abc'


def noise(rng: np.random.Generator, size: int) -> bytes:
  """At least `size` bytes of words of five random letters."""
  words = LETTERS[rng.integers(0, 26, (size // WORD + 1, WORD))]
  words[:, -1] = ord(' ')
  return words.tobytes()


def scattered(draw: Draw, name: str, *, head: bytes, items: Sequence[bytes],
              places: Sequence[float], needed: Sequence[int], question: bytes, target: bytes,
              **info: Any) -> Example:
  """An example with each item between two words of noise.

  Args:
    head, question: what stands before and after the noise.
    items: of one text each, with the space or line end after it; in the order of `places`.
    places: 0 to 1, rising.
    needed: which items the answer needs; the first one's place is the example's depth.
  """
  text, places = noise(draw.rng, fit.bytes_for(draw)), np.asarray(places)

  def laid(filler: bytes) -> tuple[list[bytes], np.ndarray]:
    """The pieces, and at which byte of the filler each item stands."""
    at = (places * (len(filler) // WORD)).astype(int) * WORD
    cuts = zip([0, *at], [*at, len(filler)], strict=True)
    pieces = [filler[start:stop] for start, stop in cuts]
    between = (piece for pair in zip(pieces, items) for piece in pair)
    return [head, *between, pieces[-1], question], at

  prompt, filler = fit.filled(draw, lambda part: b''.join(laid(part)[0]), text, len(target), name)
  sizes = np.array([len(item) for item in items])
  begins = len(head) + laid(filler)[1] + np.cumsum(sizes) - sizes
  span = len(prompt) - len(head) - len(question)
  return Example(
      prompt=prompt, question=len(prompt) - len(question), target=target,
      references=(target.decode().strip(),),
      new_tokens=len(target),   # no token is of less than a byte
      depth=float(begins[needed[0]] - len(head)) / max(1, span),
      needles=tuple((int(begins[i]), int(begins[i] + sizes[i])) for i in needed), info=info)


def _key(number: int) -> bytes:
  return bytes(LETTERS[[number // 676, number // 26 % 26, number % 26]])


def mqar(draw: Draw) -> Example:
  rng = draw.rng
  count = min(max(ASKED, draw.length // PAIR_TOKENS), MOST)
  keys = [_key(int(i)) for i in rng.choice(KEYS, count, replace=False)]
  values = rng.integers(0, 10, count)
  places = rng.random(count)
  if draw.depth is not None:
    places[0] = draw.depth
  order = np.argsort(places, kind='stable')
  asked = np.arange(ASKED)   # any four: the pairs' places are random
  items = [b'%s=%d ' % (keys[i], values[i]) for i in order]
  rank = np.argsort(order)
  return scattered(draw, 'mqar', head=b'remember each key=value\n', items=items,
                   places=places[order], needed=rank[asked].tolist(),
                   **_asked([keys[i] for i in asked], values[asked]))


def _asked(keys: Sequence[bytes], values: Sequence[int]) -> dict[str, bytes]:
  return {'question': b'\n' + b' '.join(keys) + b':',
          'target': b''.join(b' %s=%d' % pair for pair in zip(keys, values, strict=True))}


def segment_recall(draw: Draw, name: str = 'segment_recall', times: int = 1) -> Example:
  """Each key on `times` lines of all, with another value on each."""
  rng = draw.rng
  count = min(max(ASKED, draw.length // (LINE_TOKENS * times)), MOST)
  lines = count * times
  # lines_of[k]: those of key k, rising. The first key's last line is where the depth asks for it.
  depth = rng.random() if draw.depth is None else draw.depth
  last = min(max(int(depth * lines), times - 1), lines - 1)
  mine = [*np.sort(rng.choice(last, times - 1, replace=False)), last]
  others = np.setdiff1d(np.arange(lines), mine)
  lines_of = np.array([mine, *np.sort(rng.permutation(others).reshape(-1, times), axis=1)])
  # No value stands again when its key is written anew.
  changes = np.concatenate(
      [rng.integers(0, 10, (count, 1)), rng.integers(1, 10, (count, times - 1))], axis=1)
  values = np.cumsum(changes, axis=1) % 10
  keys = [_key(int(i)) for i in rng.choice(KEYS, count, replace=False)]
  fractions = rng.random(lines)
  if draw.depth is not None:
    fractions[last] = np.clip(depth * lines - last, 0, 1)
  said = np.empty((lines, 2), int)
  said[lines_of] = np.stack([np.repeat(np.arange(count)[:, None], times, axis=1), values], axis=2)
  # Line ends are items too: the first of a line's two.
  items = [piece for i, (key, value) in enumerate(said)
           for piece in (b'\n' if i else b'', b'%s=%d ' % (keys[key], value))]
  places = np.stack([np.arange(lines), np.arange(lines) + fractions], axis=1).reshape(-1) / lines
  head = b'remember each key=value' + (b'; the last value counts' if times > 1 else b'') + b'\n'
  return scattered(draw, name, head=head, items=items, places=places,
                   needed=(2 * lines_of[:ASKED, -1] + 1).tolist(),
                   **_asked(keys[:ASKED], values[:ASKED, -1]))


def segment_rewrite(draw: Draw) -> Example:
  return segment_recall(draw, 'segment_rewrite', times=2)


def selective_copy(draw: Draw) -> Example:
  rng = draw.rng
  capitals = bytes(LETTERS[rng.integers(0, 26, CAPITALS)]).upper()
  first = 0.0 if draw.depth is None else draw.depth
  places = first + (1 - first) * np.sort(rng.random(CAPITALS))
  if draw.depth is not None:
    places[0] = first
  return scattered(draw, 'selective_copy', head=b'copy the capitals\n',
                   items=[b'%c ' % c for c in capitals], places=places, needed=range(CAPITALS),
                   question=b'\ncapitals:', target=b' ' + capitals)


def induction(draw: Draw) -> Example:
  letter = bytes(LETTERS[[draw.rng.integers(0, 26)]])
  place = draw.rng.random() if draw.depth is None else draw.depth
  return scattered(draw, 'induction',
                   head=b'a mark and its letter; at the mark again, say the letter\n',
                   items=[b'#' + letter + b' '], places=[place], needed=[0], question=b'\n#',
                   target=letter)


def _sequence(draw: Draw, name: str, head: bytes, symbols: bytes, question: bytes,
              answers: Sequence[str], answer: Callable[[str], str]) -> Example:
  """As many random symbols as there is room for, and `answer(sequence)`, one of `answers`."""
  size = fit.bytes_for(draw)
  text = np.frombuffer(symbols, np.uint8)[draw.rng.integers(0, len(symbols), size)].tobytes()
  new_tokens = 1 + max(len(said) for said in answers)
  # The first symbol always stands, so that no sequence is empty.
  prompt, filler = fit.filled(draw, lambda part: head + text[:1] + part + question, text[1:],
                              new_tokens, name)
  said = answer((text[:1] + filler).decode())
  return Example(prompt=prompt, question=len(prompt) - len(question), target=b' ' + said.encode(),
                 references=(said,), new_tokens=new_tokens)


def parity(draw: Draw) -> Example:
  return _sequence(draw, 'parity', b'count the ones\n', b'01', b'\nodd or even:', ('odd', 'even'),
                   lambda bits: ('even', 'odd')[bits.count('1') % 2])


def s3(draw: Draw) -> Example:
  legend = ' '.join(f'{move}={"".join(START[i] for i in order)}' for move, order in MOVES.items())
  return _sequence(draw, 's3', f'{START}; {legend}; move by move\n'.encode(),
                   ''.join(MOVES).encode(), b'\nnow:', (START,), moved)


def moved(moves: str) -> str:
  """The order after the moves; what is no move changes nothing."""
  steps = np.array([MOVES['e'], *(MOVES.get(move, MOVES['e']) for move in moves)])
  while len(steps) > 1:   # two at a time, since moves can be joined in any grouping
    if len(steps) % 2:
      steps = np.concatenate([steps, [MOVES['e']]])
    steps = np.take_along_axis(steps[::2], steps[1::2], axis=1)
  return ''.join(START[i] for i in steps[0])


ZOOLOGY, ARMT = 'Zoology, arXiv:2312.04927', 'ARMT, arXiv:2407.04841'
MAMBA, AUTOMATA = 'Mamba, arXiv:2312.00752, section 4.3', 'Liu et al. 2022, arXiv:2210.10749'

# Floors: every answer that the rules allow is as likely as any other.
TASKS = {
    name: Task(make=make, score=scoring.exact, floor=floor, source=source, placed=name not in ('parity', 's3'))
    for name, make, floor, source in (
        ('mqar', mqar, 10.0 ** -ASKED, ZOOLOGY),
        ('segment_recall', segment_recall, 10.0 ** -ASKED, ARMT),
        ('segment_rewrite', segment_rewrite, 10.0 ** -ASKED, ARMT),
        ('selective_copy', selective_copy, 26.0 ** -CAPITALS, MAMBA),
        ('induction', induction, 1 / 26, MAMBA),
        ('parity', parity, 1 / 2, AUTOMATA),
        ('s3', s3, 1 / 6, AUTOMATA))}
