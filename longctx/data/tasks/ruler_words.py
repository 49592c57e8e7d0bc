"""RULER's two tasks of frequent words, balanced.

    ruler_cwe   a numbered list in which ten words stand 30 times and the others 3 times; a worked
                example comes first
    ruler_fwe   coded words, that of rank k about 1/k^2 as often as the first, "..."; ranks 2 to 4

Differs from NVIDIA/RULER at c3f5e3b: see ruler.py; and
  * cwe takes its short form (6 times and once) where its long one does not fit, as there below 4096
    tokens: in bytes the long one needs about 8,000. The worked example has no word of the list.
  * cwe's words are adjective-noun pairs where the 8,166 words of the list would not do; there they
    are of a second list, which is a download.
  * fwe has enough words for rank 4 to be more frequent than rank 5. What is left over is noise,
    "...", which is 60 % of the words, as there: it is what makes the task long.
Held by: tests/test_tasks.py, tests/test_task_ruler.py (counted).
"""

import dataclasses
import string

import numpy as np

from longctx.data.tasks import ruler_prompts, scoring, units, words
from longctx.data.tasks.example import Draw, Example, Task
from longctx.data.tasks.ruler_prompts import CWE, FWE, NEW_TOKENS

COMMON, LONG_FROM = 10, 4096
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


def cwe(draw: Draw) -> Example:
  rng = draw.rng
  head, question = CWE
  entry = draw.count(b' 100. probable' * 64) / 64   # tokens of one, about, alike for all examples
  fixed = 2 * draw.count((head + question).encode()) + NEW_TOKENS['cwe'] + COMMON * entry
  least = entry * (LONG.shown_entries + COMMON * (LONG.often + LONG.seldom)) + fixed
  form = LONG if draw.length >= max(LONG_FROM, least) else SHORT

  # Entries: numbers and words differ in length.
  most = int(draw.length / entry * 1.5) + COMMON * form.often
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
  target = f' {numbered([*first_seen])}'.encode()
  new_tokens = max(NEW_TOKENS['cwe'], draw.count(target))
  prompt, _ = units.fitted(
      draw, 'ruler_cwe', lay=lambda n: before + numbered(arranged(n)).encode(),
      tail=lambda n: f' {numbered(entries[size(n):size(n) + 4], size(n) + 1)}'.encode(),
      after=question.encode(), new_tokens=new_tokens, least=COMMON * form.seldom)
  return Example(prompt=prompt, question=len(prompt) - len(question.encode()), target=target,
                 references=tuple(first_seen), new_tokens=new_tokens)


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
