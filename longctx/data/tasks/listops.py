"""ListOps as in Long Range Arena: the value of nested lists.

    [MAX 4 3 [MIN 2 3 ] 1 0 [SM 8 9 2 ] ]  ->  9

(Nangia & Bowman 2018, arXiv:1804.06028.) MIN, MAX, MED (the median, rounded down) and SM (the sum
modulo 10) of 2 to 10 things each, a digit or a list; a thing is a list once in four times, and
never at depth 10. LRA (arXiv:2011.04006, its data/listops.py) keeps the trees of more than 500 and
fewer than 2,000 symbols ("[MAX", "4" and "]" are one each), drops the round brackets it writes
around every pair, spells "]" as X, numbers the words that remain and pads with zeros to 2,000. Its
most frequent answers are 0 and 9, each 17 % (counts are in LOG.md): 15.8 to 18.0 %, as several rows
of its table have, is what guessing gives.

Here a tree fills about nine tenths of the length or more, in any tokenizer, and full stops before
the question fill the rest; above 2,000 symbols trees may be as much deeper as they must be to grow
so large, a level for each half as long again. The floor is 17 % at every length, which is that of
LRA's: at 3,000 bytes 0 answers 17.3 % of 2,500 examples. In short ones guessing gives less: 15.3 %
at 200 bytes, 14.6 % at 400, 15.4 % at 1,000 (of 6,000, 8,000 and 5,000). Differs: drawn from a seed
(LRA's generator has none, and cuts its sets out of a Python set, in another order each time); no two
examples are compared, since none is drawn twice.
Held by: tests/test_tasks.py, tests/test_task_reasoning.py.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from longctx.data.tasks import fit, scoring
from longctx.data.tasks.example import Draw, Example, Task
from longctx.errors import check

HEAD = (b'The value of nested lists. MIN: the least. MAX: the greatest. MED: the median, '
        b'rounded down. SM: the sum modulo 10.\n')
QUESTION = b'\nIts value is'
TARGET_BYTES = 2
LIST, MOST_ARGS, DEPTH, SYMBOLS = 0.25, 10, 10, 2000   # LRA's
GROWTH = (2 + MOST_ARGS) / 2 * LIST                    # lists at a level for each one above
FILLED = 0.9                                           # of the length, by a tree, at least
BATCH, TRIES = 512, 200
SAMPLE = b'[MIN 3 4 [SM 5 6 7 ] 2 [MED 1 8 ] 9 0 [MAX 5 5 3 2 ] ]', 22   # a text, and its symbols



def median(of: Sequence[int]) -> int:
  of = sorted(of)
  return (of[(len(of) - 1) // 2] + of[len(of) // 2]) // 2


OPERATIONS: dict[str, Callable[[Sequence[int]], int]] = {
    'MIN': min, 'MAX': max, 'MED': median, 'SM': lambda of: sum(of) % 10}


class Shapes(NamedTuple):
  """How many nodes, and how many lists of 2, 3 ... things, each level of some trees has."""

  nodes_TL: np.ndarray       # trees, levels
  lists_TLA: np.ndarray      # lists by the number of their things
  symbols_T: np.ndarray


def shapes(rng: np.random.Generator, count: int, depth: int) -> Shapes:
  """Shapes of `count` trees that are no digit, by the law of LRA's generator; the root is at 1."""
  arities = np.arange(2, MOST_ARGS + 1)
  nodes, lists, level, symbols = [], [], np.ones(count, int), np.zeros(count, int)
  for at in range(1, depth):
    heads = np.ones(count, int) if at == 1 else rng.binomial(level, LIST)
    of_size = rng.multinomial(heads, np.full(len(arities), 1 / len(arities)))
    nodes.append(level)
    lists.append(of_size)
    symbols += level + heads   # a list has its name and its bracket
    level = of_size @ arities
  nodes.append(level)
  lists.append(np.zeros_like(lists[-1]))
  return Shapes(np.stack(nodes, 1), np.stack(lists, 1), symbols + level)


def written(rng: np.random.Generator, nodes: Sequence[int], lists: np.ndarray) -> tuple[str, int]:
  """(text, value) of a tree of this shape, all trees of the shape alike likely."""
  names, levels = list(OPERATIONS), []
  for count, of_size in zip(nodes, lists, strict=True):
    digits = np.zeros(count - of_size.sum(), int)
    sizes = np.concatenate([np.repeat(np.arange(2, MOST_ARGS + 1), of_size), digits])
    levels.append([iter(column.tolist()) for column in (
        rng.permutation(sizes), rng.integers(0, 10, count), rng.integers(0, len(names), count))])
  pieces = []

  def walk(level: int) -> int:
    size, digit, name = (next(column) for column in levels[level])
    if not size:
      pieces.append(str(digit))
      return digit
    pieces.append('[' + names[name])
    value = OPERATIONS[names[name]]([walk(level + 1) for _ in range(size)])
    pieces.append(']')
    return value

  value = walk(0)
  return ' '.join(pieces), value


def tree(rng: np.random.Generator, low: int, high: int, depth: int = DEPTH,
         fits: Callable[[str], bool] = lambda text: True) -> tuple[str, int]:
  """(text, value) of a tree of more than `low` and fewer than `high` symbols that fits."""
  for _ in range(TRIES):
    drawn = shapes(rng, BATCH, depth)
    for i in np.flatnonzero((drawn.symbols_T > low) & (drawn.symbols_T < high))[:8]:
      text, value = written(rng, drawn.nodes_TL[i], drawn.lists_TLA[i])
      if fits(text):
        return text, value
  raise AssertionError(f'listops: no tree of {low} to {high} symbols in {TRIES * BATCH}')


def listops(draw: Draw) -> Example:
  want = draw.length - 1 - TARGET_BYTES
  count = lambda text: draw.count(HEAD + text.encode() + QUESTION)
  least = count('[MIN 0 0 ]')
  check(least <= want, f'listops: length={draw.length}: must be at least '
        f"{least + 1 + TARGET_BYTES} in this model's tokens ({TARGET_BYTES} for the answer)")
  most = max((want - draw.count(HEAD + QUESTION)) * SAMPLE[1] / draw.count(SAMPLE[0]), 4)
  depth = DEPTH + max(0, int(np.ceil(np.log(most / SYMBOLS) / np.log(GROWTH))))
  text, value = tree(draw.rng, min(int(FILLED * most), int(most) - 2), int(most) + 1, depth,
                     lambda text: count(text) <= want)
  prompt, _ = fit.filled(draw, lambda part: part + HEAD + text.encode() + QUESTION, dots(draw),
                         TARGET_BYTES, 'listops')
  return Example(prompt=prompt, question=len(prompt) - len(QUESTION), target=f' {value}'.encode(),
                 references=(str(value),), new_tokens=TARGET_BYTES)


def dots(draw: Draw) -> bytes:
  """Full stops that fill a prompt."""
  return b'. ' * fit.bytes_for(draw)


TASKS = {
    'listops': Task(make=listops, score=scoring.exact, floor=0.17, placed=False,
                    source="Long Range Arena, arXiv:2011.04006, data/listops.py; floor: always 0, at its lengths"),
}
