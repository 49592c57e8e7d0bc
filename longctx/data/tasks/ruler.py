"""RULER's thirteen tasks (Hsieh et al. 2024, arXiv:2404.06654), balanced: what the published form
gets wrong is mended, and every length is met exactly in any tokenizer.

    ruler_niah_single_1                         a number among lines of noise
    ruler_niah_single_2, _single_3              a number, a UUID in an essay
    ruler_niah_multikey_1                       one of four keys' numbers in an essay
    ruler_niah_multikey_2, _multikey_3          a number, a UUID among needles with other keys
    ruler_niah_multivalue, _multiquery          four numbers of one key, or of four, in an essay
    ruler_vt                                    the five names that a value came to have
    ruler_cwe, ruler_fwe                        words that are more frequent: ruler_words.py
    ruler_qa_1, ruler_qa_2                      questions about documents: ruler_questions.py

The prompts, the number of needles, the budgets of new tokens and the scores are the published ones
(ruler_prompts.py). Differs from NVIDIA/RULER at c3f5e3b, whose own bytes ruler_compat.py repeats:
  * Needles and documents stand at depths drawn uniformly for each example, any depth may be asked
    for; there the document of every answer stands at one depth, and essays have forty.
  * Words of lists and coded words stand in another order in each example; there in one order for
    all.
  * What does not fit is refused with the least length that does; there the loop has no end.
  * A prompt is filled by a cut through its last line, word or document; there it is up to a line
    shorter.
  * A key and a value that are asked for stand in their own needle alone.
  * The essay is made of random words ("synthetic" in `info`, -syn in results) unless eval.haystack
    names a text of any size; there it is Paul Graham's, which has no licence.
  * vt's worked example has five lines of noise; there as many as 500 tokens hold, in bytes none.
  * Answers may take more tokens than there where their right continuation does.
Answers of several parts are learned in the order of the text, or of the question where it names
them.
Held by: tests/test_tasks.py (exact lengths), tests/test_task_ruler.py.
"""

import functools
import itertools
import string

from longctx.data.tasks import (
  fit,
  haystack,
  ruler_prompts,
  ruler_questions,
  ruler_words,
  scoring,
  units,
  words,
)
from longctx.data.tasks.example import Draw, Example, Task
from longctx.data.tasks.needles import depths_of, hidden, number
from longctx.data.tasks.retrieval import uuids
from longctx.data.tasks.ruler_prompts import NEEDLE, NEW_TOKENS, NIAH, VT

NOISE = haystack.GRASS.strip()
HOPS, EXAMPLE_LINES = 4, 5   # of vt: assignments after the first; noise in its worked example


def needle(kind: str, key: str, value: str) -> bytes:
  return NEEDLE.format(kind=kind, key=key, value=value).encode()


def words_of(draw: Draw, count: int) -> list[str]:
  """Different adjective-noun keys."""
  keys = words.keys()
  return [keys[i] for i in draw.rng.choice(len(keys), size=count, replace=False).tolist()]


def listed(parts: list[str]) -> str:
  """'a' or 'a, b, and c', as RULER's question names its keys."""
  return parts[0] if len(parts) == 1 else f'{", ".join(parts[:-1])}, and {parts[-1]}'


def asked(kind: str, keys: list[str], answers: int) -> tuple[bytes, bytes]:
  """What stands before and after the context."""
  head, question = ruler_prompts.one(NIAH) if answers == 1 else NIAH
  kind = kind[:-1] if answers == 1 else kind
  return head.format(kind=kind).encode(), question.format(kind=kind, query=listed(keys)).encode()


def essay(draw: Draw, name: str, *, kind: str = 'numbers', keys: int = 1, values: int = 1,
          queries: int = 1) -> Example:
  """`values` needles for each key in running text; the first `queries` keys are asked for."""
  depths = depths_of(draw, keys * values)
  text = haystack.of(draw, lambda size: haystack.noise(draw.rng, size))(fit.bytes_for(draw))
  named = words_of(draw, keys)
  if kind == 'uuids':
    found = uuids(draw.rng, keys * values)
  else:
    found = []
    while len(found) < keys * values:
      found.append(number(draw, 7, text, found))
  needed = range(queries * values)
  # The text's, or the question's.
  order = sorted(needed, key=lambda i: depths[i]) if values > 1 else needed
  references = [found[i] for i in order]
  head, question = asked(kind, named[:queries], len(needed))
  target = f' {listed(references)}'.encode()
  return hidden(
      draw, name, head=head, depths=depths, question=question, target=target, references=references,
      needles=[needle(kind, named[i // values], value) + b' ' for i, value in enumerate(found)],
      new_tokens=max(NEW_TOKENS['niah'], draw.count(target)), needed=needed, text=text,
      haystack=draw.haystack or 'synthetic')


def in_lines(draw: Draw, name: str, *, head: bytes, lines: units.Pool, golds: list[bytes],
             depths: list[float], question: bytes, target: bytes, references: list[str],
             budget: int) -> Example:
  """Gold lines at their depths among others."""
  arranged = lambda n: units.among(lines.first(n), golds, depths)
  new_tokens = max(budget, draw.count(target))
  prompt, n = units.fitted(
      draw, name, lay=lambda n: head + b'\n'.join(arranged(n)[0]), tail=lambda n: b'\n' + lines[n],
      after=question, new_tokens=new_tokens, least=1)
  found = units.spans(*arranged(n), b'\n', len(head))
  return Example(
      prompt=prompt, question=len(prompt) - len(question), target=target,
      references=tuple(references), new_tokens=new_tokens, needles=tuple(found),
      depth=(found[0][0] - len(head)) / (len(prompt) - len(head) - len(question)))


def noise_lines() -> units.Pool:
  return units.Pool(lambda: [NOISE] * 64)


def lines(draw: Draw, name: str, *, key: str = 'words', kind: str = 'numbers',
          distractors: bool = False) -> Example:
  """One needle among lines of noise, or of needles with other keys."""
  depths = depths_of(draw, 1)

  def drawn(count: int) -> tuple[list[str], list[str]]:
    """(keys, values)."""
    return (words_of(draw, count) if key == 'words' else uuids(draw.rng, count),
            uuids(draw.rng, count) if kind == 'uuids' else
            draw.rng.integers(10**6, 10**7, size=count).astype(str).tolist())

  (one,), (value,) = drawn(1)

  def others() -> list[bytes]:
    return [needle(kind, k, v) for k, v in zip(*drawn(64)) if k != one and v != value]

  head, question = asked(kind, [one], 1)
  return in_lines(
      draw, name, head=head, lines=units.Pool(others) if distractors else noise_lines(),
      golds=[needle(kind, one, value)], depths=depths, question=question,
      target=f' {value}'.encode(), references=[value], budget=NEW_TOKENS['niah'])


def chain(draw: Draw, letters: int, value: int) -> tuple[list[str], list[bytes]]:
  """(names, what assigns them, in turn)."""
  names: dict[str, None] = {}
  while len(names) <= HOPS:
    names[''.join(string.ascii_uppercase[i] for i in draw.rng.integers(26, size=letters))] = None
  told = [*names]
  return told, [f'VAR {told[0]} = {value}'.encode(),
                *(f'VAR {b} = VAR {a}'.encode() for a, b in itertools.pairwise(told))]


def vt(draw: Draw) -> Example:
  """Names of one value, each assigned from the last, after a worked example with other names."""
  anywhere = lambda: sorted(draw.rng.random(HOPS + 1).tolist())
  depths = anywhere()
  if draw.depth is not None:   # the first where it was asked for, the others anywhere after it
    depths = [draw.depth, *(draw.depth + (1 - draw.depth) * depth for depth in depths[1:])]
  values = draw.rng.choice(90_000, size=2, replace=False) + 10_000
  head = VT[0].encode()
  ask = lambda value: VT[1].format(query=value, number=HOPS + 1).encode()
  shown, assigned = chain(draw, 3, values[0])
  worked, _ = units.among([NOISE] * EXAMPLE_LINES, assigned, anywhere())
  example = head + b'\n'.join(worked) + ask(values[0]) + ' '.join(shown).encode() + b'\n\n'
  names, golds = chain(draw, 5, values[1])
  return in_lines(
      draw, 'ruler_vt', head=example + head, lines=noise_lines(), golds=golds, depths=depths,
      question=ask(values[1]), target=' '.join(names).encode(), references=names,
      budget=NEW_TOKENS['vt'])


NEEDLES = {
    'niah_single_1': lines,
    'niah_single_2': essay,
    'niah_single_3': functools.partial(essay, kind='uuids'),
    'niah_multikey_1': functools.partial(essay, keys=4),
    'niah_multikey_2': functools.partial(lines, distractors=True),
    'niah_multikey_3': functools.partial(lines, key='uuids', kind='uuids', distractors=True),
    'niah_multivalue': functools.partial(essay, values=4),
    'niah_multiquery': functools.partial(essay, keys=4, queries=4),
}
ESSAYS = ('niah_single_2', 'niah_single_3', 'niah_multikey_1', 'niah_multivalue', 'niah_multiquery')
# One guess for each answer asked for; any of four answers is right wherever it is said.
UUID = 2.0 ** -122
FLOORS = {'niah_single_3': UUID, 'niah_multikey_3': UUID, 'niah_multivalue': 4 / 9e6,
          'niah_multiquery': 4 / 9e6}


def _task(name: str) -> Task:
  return Task(
      make=lambda draw: NEEDLES[name](draw, f'ruler_{name}'), score=scoring.match_all,
      floor=FLOORS.get(name, 1 / 9e6), published=ruler_prompts.published(name),
      **(dict(reads=('haystack',), own=dict(haystack='random words'),
              instead_of=dict(haystack="Paul Graham's essays")) if name in ESSAYS else {}),
      source='NVIDIA/RULER, scripts/data/synthetic/niah.py, balanced')


TASKS = {
    **{f'ruler_{name}': _task(name) for name in NEEDLES},
    'ruler_vt': Task(
        make=vt, score=scoring.match_all, floor=(HOPS + 1) / 26**5,   # as many guesses as names
        source='NVIDIA/RULER, scripts/data/synthetic/variable_tracking.py, balanced',
        published=ruler_prompts.published('vt')),
    **ruler_words.TASKS,
    **ruler_questions.TASKS,
}
