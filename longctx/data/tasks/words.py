"""English words: the lists of the wonderwords package (MIT), of which RULER's prompts are made.

    keys()          every "adjective-noun", in alphabetical order, as NVIDIA's niah.py has them:
                    six million words, of which none is made before it is asked for
    vocabulary()    every noun, adjective and verb: common_words_extraction.py's 8,166
Held by: tests/test_task_ruler_compat.py (the order, by the reference's own prompts).
"""

import bisect
import functools
import importlib.resources
from collections.abc import Iterable, Sequence


@functools.cache
def listed(kind: str) -> tuple[str, ...]:
  """The words of one list: 'noun', 'adjective' or 'verb', as they stand in it."""
  file = importlib.resources.files('wonderwords').joinpath('assets', f'{kind}list.txt')
  return tuple(line.rstrip() for line in file.read_text('utf-8').splitlines())


class Pairs(Sequence):
  """sorted({f'{first}-{second}'}) of all firsts and seconds, without making them all.

  Pairs with another first stand in the order of 'first-', unless one 'first-' begins with the
  other, as "blue-eyed-" does with "blue-": only the pairs of such firsts are made and sorted
  together.
  """

  def __init__(self, firsts: Iterable[str], seconds: Iterable[str]):
    self._seconds = sorted(set(seconds))
    groups: list[list[str]] = []
    for first in sorted({f'{first}-' for first in firsts}):
      if groups and first.startswith(groups[-1][0]):
        groups[-1].append(first)
      else:
        groups.append([first])
    self._groups = [group[0] if len(group) == 1 else
                    sorted({first + second for first in group for second in self._seconds})
                    for group in groups]
    self._starts = [0]
    for group in self._groups:
      size = len(self._seconds) if isinstance(group, str) else len(group)
      self._starts.append(self._starts[-1] + size)

  def __len__(self) -> int:
    return self._starts[-1]

  def __getitem__(self, i: int) -> str:
    if not 0 <= i < len(self):
      raise IndexError(f'{i} is not in 0 to {len(self) - 1}')
    g = bisect.bisect_right(self._starts, i) - 1
    group, i = self._groups[g], i - self._starts[g]
    return group + self._seconds[i] if isinstance(group, str) else group[i]


@functools.cache
def keys() -> Pairs:
  return Pairs(listed('adjective'), listed('noun'))


@functools.cache
def vocabulary() -> tuple[str, ...]:
  return tuple(sorted({*listed('noun'), *listed('adjective'), *listed('verb')}))
