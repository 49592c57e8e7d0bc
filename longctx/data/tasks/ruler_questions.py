"""RULER's two tasks of questions about documents, balanced.

    ruler_qa_1   the answer stands in one document (there: SQuAD v2.0's answerable questions)
    ruler_qa_2   two documents are needed (there: HotpotQA's, distractor setting)

With eval.paragraphs the documents and questions are those of SQuAD or HotpotQA files; an example
takes the next question in an order drawn from the seed, each once: where they are used up the next is
refused (training is given no such files). What guessing scores is not known. Without,
they are SYNTHETIC (results are marked -syn, "documents" in `info` says which): towns that do not exist,
a fact of one; and people born in them, a fact of the town where one was born. Differs from NVIDIA/RULER at c3f5e3b: see ruler.py; and no document is
there twice before all were there once, the answer's own never twice; for qa_2 those that the answer
needs are known (`needles`) and stand apart.
Held by: tests/test_tasks.py,
tests/test_task_questions.py.
"""

import functools
from collections.abc import Callable

import numpy as np

from longctx.data.tasks import fit, paragraphs, ruler_prompts, scoring, units
from longctx.data.tasks.example import Draw, Example, Task, generator
from longctx.data.tasks.needles import depths_of
from longctx.data.tasks.paragraphs import FACTS, TRADES, Question
from longctx.data.tasks.retrieval import invented
from longctx.data.tasks.ruler_prompts import DOCUMENT, NEW_TOKENS, QA
from longctx.errors import check, labelled

TOWN_BYTES = 120   # of the shortest of the invented paragraphs


def about_documents(draw: Draw, name: str, question: str, answers: tuple[str, ...],
                    golds: list[bytes], others: units.Pool, documents: str) -> Example:
  """Gold documents at their depths among others, all numbered."""
  depths = depths_of(draw, len(golds))
  # A document more goes somewhere among the others, in their order; it has a token or more.
  places = draw.rng.random(draw.length)
  form = lambda i, document: DOCUMENT.format(i=i, document='').encode() + document

  def arranged(n: int) -> tuple[list[bytes], list[int]]:
    chosen = others.first(n)
    found, where = units.among([chosen[i] for i in np.argsort(places[:n])], golds, depths)
    return [form(i, document) for i, document in enumerate(found, 1)], where

  head, ask = QA[0].encode(), QA[1].format(query=question).encode()
  target = f' {answers[0]}'.encode()
  new_tokens = max(NEW_TOKENS['qa'], *(draw.count(f' {answer}'.encode()) for answer in answers))
  prompt, n = units.fitted(
      draw, name, lay=lambda n: head + b'\n\n'.join(arranged(n)[0]),
      tail=lambda n: b'\n\n' + form(n + len(golds) + 1, others[n]) + b'\n\n' + others[n + 1],
      after=ask, new_tokens=new_tokens)
  found = units.spans(*arranged(n), b'\n\n', len(head))
  return Example(
      prompt=prompt, question=len(prompt) - len(ask), target=target, references=answers,
      new_tokens=new_tokens, needles=tuple(found), info=dict(documents=documents),
      depth=(found[0][0] - len(head)) / (len(prompt) - len(head) - len(ask)))


@functools.lru_cache(maxsize=4)
def _order(seed: object, count: int) -> np.ndarray:
  return generator('ruler_qa', seed).permutation(count)


def from_files(draw: Draw, name: str, kind: str) -> Example:
  label = draw.label('paragraphs')
  with labelled(label):
    given = paragraphs.read(draw.paragraphs, kind)
  count = len(given.questions)
  # One put again would be no independent sample.
  check(draw.index < count, f'{label}: {name}: example {draw.index}: only {count} questions of {kind} are there, each '
        f"once; set {draw.setting.format('samples')} to at most that, or name more files")
  asked: Question = given.questions[_order(draw.seed, count)[draw.index]]
  known = {*asked.golds, *asked.near}
  far = [i for i in draw.rng.permutation(len(given.documents)).tolist() if i not in known]
  others = [asked.near[i] for i in draw.rng.permutation(len(asked.near))] + far
  check(bool(others), f'{label}: holds no documents but those of one question, to stand around them; '
        'name more files')
  pool = units.Pool(lambda: [given.documents[other] for other in others])   # round and round
  return about_documents(draw, name, asked.text, asked.answers,
                         [given.documents[i] for i in asked.golds], pool, kind)


def synthetic(draw: Draw, name: str, hops: int) -> Example:
  count = 2 + fit.bytes_for(draw) // TOWN_BYTES   # more than there is room for
  names = invented(draw.rng, (3 if hops == 2 else 1) * count)
  towns = paragraphs.towns(draw.rng, names[:count])
  kinds, facts = draw.rng.integers(2, size=count).tolist(), [*FACTS]
  fact = facts[draw.rng.integers(len(facts))]
  told = [town.told(kind).encode() for town, kind in zip(towns, kinds)]
  answers = (getattr(towns[0], fact),)
  if hops == 1:
    return about_documents(draw, name, FACTS[fact][0].format(towns[0].name), answers, told[:1],
                           units.Pool(lambda: told[1:]), 'synthetic')
  told = [f'{town.name}\n'.encode() + text for town, text in zip(towns, told)]
  full = [f'{first} {last}' for first, last in zip(names[count::2], names[count + 1::2])]
  trades = draw.rng.integers(len(TRADES), size=count).tolist()
  people = [f'{person}\n{person} was a {TRADES[trade]} who was born in {town.name}.'.encode()
            for person, trade, town in zip(full, trades, towns)]
  others = [document for pair in zip(people[1:], told[1:]) for document in pair]
  return about_documents(
      draw, name, FACTS[fact][0].format(f'the town where {full[0]} was born'), answers,
      [people[0], told[0]], units.Pool(lambda: others), 'synthetic')


def _task(name: str, kind: str, hops: int) -> Task:
  make: Callable[[Draw], Example] = lambda draw: (
      from_files(draw, name, kind) if draw.paragraphs else synthetic(draw, name, hops))
  return Task(
      make=make, score=scoring.match_part, reads=('paragraphs',), own=dict(paragraphs='invented documents'),
      instead_of=dict(paragraphs=f"{kind}'s"), floor_without=('paragraphs',),
      floor=float(np.mean([1 / number for _, number in FACTS.values()])),   # a guess
      source=f'NVIDIA/RULER, scripts/data/synthetic/qa.py, balanced; {kind} where eval.paragraphs '
      'names it, else synthetic, of which the floor is',
      published=ruler_prompts.published(name.removeprefix('ruler_')))


TASKS = {
    'ruler_qa_1': _task('ruler_qa_1', 'SQuAD', 1),
    'ruler_qa_2': _task('ruler_qa_2', 'HotpotQA', 2),
}
