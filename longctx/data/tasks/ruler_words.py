"""RULER's two tasks of frequent words, balanced.

    ruler_cwe   a numbered list in which ten words stand 30 times and the others 3 times; a worked
                example comes first
    ruler_fwe   coded words, that of rank k about 1/k^2 as often as the first, "..."; ranks 2 to 4

Differs from NVIDIA/RULER at c3f5e3b: see ruler.py; and
  * cwe takes its short form (6 times and once) where its long one does not fit, as there below 4096
    tokens: in bytes the long one needs about 8,000. All examples of a length have one form; words of which
    the long one does not fit, near its border one draw in a thousand, are drawn anew. The worked example
    has no word of the list.
  * cwe's words are adjective-noun pairs where the 8,166 words of the list would not do; there they
    are of a second list, which is a download.
  * fwe has enough words for rank 4 to be more frequent than rank 5. What is left over is noise,
    "...", which is 60 % of the words, as there: it is what makes the task long.
Held by: tests/test_tasks.py, tests/test_task_ruler.py (counted).
"""

import dataclasses
import functools
import string
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from longctx.data.tasks import ruler_prompts, scoring, units, words
from longctx.data.tasks.example import Draw, Example, Task, generator
from longctx.data.tasks.ruler_prompts import CWE, FWE, NEW_TOKENS
from longctx.data.tokenizer import Tokenizer
from longctx.errors import ConfigError

COMMON, LONG_FROM = 10, 4096
SAMPLE, DEVIATIONS = 128, 3   # lists that tell the long form's tokens, and what is added to their mean
TRIES = 8   # draws of words for a list of the long form, then one more
LETTERS, LEAST_WORDS = 6, 53   # with 42 to 52 words, rank 4 and rank 5 stand once each
ALPHA = 2.0


@dataclasses.dataclass(frozen=True)
class Form:
  """How often common words and others stand in the list, and in the worked example's."""

  often: int
  seldom: int
  shown: int   # words of the worked example
  shown_often: int
  shown_seldom: int

  @property
  def shown_entries(self) -> int:
    return COMMON * self.shown_often + (self.shown - COMMON) * self.shown_seldom


LONG, SHORT = Form(30, 3, 40, 10, 3), Form(6, 1, 20, 3, 1)


def numbered(entries: list[str], first: int = 1) -> str:
  return ' '.join(f'{i}. {word}' for i, word in enumerate(entries, first))


class Listed(NamedTuple):
  lay: Callable[[int], bytes]    # n -> what stands before the question, with n words that are not common
  tail: Callable[[int], bytes]   # n -> the words after these
  target: bytes
  common: tuple[str, ...]


def listed(rng: np.random.Generator, form: Form, most: int) -> Listed:
  """A list of up to `most` words that are not common."""
  head, question = CWE
  distinct = form.shown + COMMON + -(-most // form.seldom)
  pool = words.vocabulary() if distinct <= len(words.vocabulary()) else words.keys()
  drawn = [pool[i] for i in rng.choice(len(pool), size=distinct, replace=False).tolist()]
  shown, drawn = drawn[:form.shown], drawn[form.shown:]

  example = shown[:COMMON] * form.shown_often + shown[COMMON:] * form.shown_seldom
  example = [example[i] for i in rng.permutation(len(example))]
  before = f'{head}{numbered(example)}{question} {numbered(shown[:COMMON])}\n{head}'.encode()

  entries = [word for word in drawn[:COMMON] for _ in range(form.often)]
  entries += [word for word in drawn[COMMON:] for _ in range(form.seldom)]
  places = rng.random(len(entries))   # one more goes somewhere among the others
  size = lambda n: COMMON * form.often + n
  arranged = lambda n: [entries[i] for i in np.argsort(places[:size(n)])]
  first_seen = dict.fromkeys(arranged(0))   # of the common words; entries of others change nothing
  return Listed(lambda n: before + numbered(arranged(n)).encode(),
                lambda n: f' {numbered(entries[size(n):size(n) + 4], size(n) + 1)}'.encode(),
                f' {numbered([*first_seen])}'.encode(), tuple(first_seen))


@functools.lru_cache(maxsize=8)
def long_needs(tokenizer: Tokenizer) -> float:
  """Tokens that the least list of the long form needs at most, but for one draw of words in a thousand.

  Told by lists drawn for this, alike for all examples.
  """
  rng, least, found = generator('ruler_cwe', 'the long form'), COMMON * LONG.seldom, []
  count = lambda text: len(tokenizer.encode(text))
  for _ in range(SAMPLE):
    one = listed(rng, LONG, least)
    found.append(1 + count(one.lay(least) + CWE[1].encode()) + max(NEW_TOKENS['cwe'], count(one.target)))
  return float(np.mean(found) + DEVIATIONS * np.std(found))


def cwe(draw: Draw) -> Example:
  form = LONG if draw.length >= LONG_FROM and draw.length >= long_needs(draw.tokenizer) else SHORT
  # Entries: numbers and words differ in length.
  entry = draw.count(b' 100. probable' * 64) / 64   # tokens of one, about
  most = int(draw.length / entry * 1.5) + COMMON * form.often
  for _ in range(TRIES if form is LONG else 0):
    try:
      return _made(draw, form, most)
    except ConfigError:   # these words have too many tokens
      continue
  return _made(draw, form, most)


def _made(draw: Draw, form: Form, most: int) -> Example:
  one, question = listed(draw.rng, form, most), CWE[1].encode()
  new_tokens = max(NEW_TOKENS['cwe'], draw.count(one.target))
  prompt, _ = units.fitted(draw, 'ruler_cwe', lay=one.lay, tail=one.tail, after=question,
                           new_tokens=new_tokens, least=COMMON * form.seldom)
  return Example(prompt=prompt, question=len(prompt) - len(question), target=one.target,
                 references=one.common, new_tokens=new_tokens)


def coded_words(rng: np.random.Generator, count: int) -> list[str]:
  coded: dict[str, None] = {}
  while len(coded) < count:
    letters = rng.integers(26, size=(count - len(coded), LETTERS)).tolist()
    coded.update({''.join(string.ascii_lowercase[i] for i in word): None for word in letters})
  return [*coded]


def fwe(draw: Draw) -> Example:
  head, question = (part.encode() for part in FWE)
  coded = ['...', *coded_words(draw.rng, max(5, (draw.length - NEW_TOKENS['fwe']) // 50))]
  target = f' {", ".join(coded[1:4])}'.encode()
  new_tokens = max(NEW_TOKENS['fwe'], draw.count(target))
  places = draw.rng.random(max(draw.length, LEAST_WORDS))   # a word has a token or more
  share = np.arange(1, len(coded) + 1) ** -ALPHA / (np.pi**2 / 6)   # zeta(2)

  def lay(n: int) -> bytes:
    text = np.repeat(np.arange(len(coded)), (n * share).astype(int))
    return head + ' '.join(coded[rank] for rank in text[np.argsort(places[:len(text)])]).encode()

  prompt, _ = units.fitted(draw, 'ruler_fwe', lay=lay, tail=lambda n: b' ...' * 64, after=question,
                           new_tokens=new_tokens, least=LEAST_WORDS)
  return Example(prompt=prompt, question=len(prompt) - len(question), target=target,
                 references=tuple(coded[1:4]), new_tokens=new_tokens)


TASKS = {
    'ruler_cwe': Task(
        make=cwe, score=scoring.match_all, placed=False,
        floor=COMMON / len(words.vocabulary()),   # ten words of the list
        source='NVIDIA/RULER, scripts/data/synthetic/common_words_extraction.py, balanced',
        published=ruler_prompts.published('cwe')),
    'ruler_fwe': Task(
        make=fwe, score=scoring.match_all, placed=False, floor=3 / 26**LETTERS,
        source='NVIDIA/RULER, scripts/data/synthetic/freq_words_extraction.py, balanced',
        published=ruler_prompts.published('fwe')),
}
