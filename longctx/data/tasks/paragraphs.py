"""Documents and questions about them: read from files, or made of invented towns and people.

    read(pattern)       SQuAD (v1.1, v2.0) and HotpotQA (distractor) JSON as their authors give
                        them out; which of the two a file is, its shape says. Questions without an
                        answer are left out. Errors name no setting: who knows it labels them.
    towns(rng, names)   towns that do not exist, of four facts each

Sources: Rajpurkar et al. 2018, arXiv:1806.03822; Yang et al. 2018, arXiv:1809.09600. The invented
ones are our own.
Held by: tests/test_task_questions.py.
"""

import dataclasses
import functools
import glob
import json
import os
from typing import Any

import numpy as np

from longctx.errors import ConfigError, check

# Without March and May, which an answer may say in another meaning.
MONTHS = ('January', 'February', 'April', 'June', 'July', 'August', 'September', 'October',
          'November', 'December')
GOODS = ('glass', 'clocks', 'honey', 'carpets', 'bells', 'lace', 'cider', 'paper', 'saddles',
         'pottery', 'knives', 'hats', 'ropes', 'candles', 'flutes', 'barrels', 'cheese', 'tiles',
         'mirrors', 'boats', 'buttons', 'needles', 'soap', 'maps', 'baskets', 'globes')
RIVERS = ('Arva', 'Belth', 'Corrin', 'Dunmar', 'Elsk', 'Fennow', 'Garda', 'Hurne', 'Ister', 'Jolva',
          'Kesh', 'Lomar', 'Mirn', 'Nolde', 'Orvane', 'Pelk', 'Quill', 'Rhosk', 'Sarn', 'Tamble',
          'Ulver', 'Vexa', 'Wend', 'Yarrow')
YEARS = range(1100, 2000)
TRADES = ('baker', 'painter', 'surgeon', 'printer', 'lawyer', 'gardener', 'sailor', 'weaver',
          'teacher', 'mason')
# (what is asked of a town, of the town where somebody was born; among how many the answer is).
FACTS = {
    'year': ('In which year was {} founded?', len(YEARS)),
    'good': ('What is {} known for making?', len(GOODS)),
    'river': ('On which river does {} lie?', len(RIVERS)),
    'month': ('In which month is the market of {} held?', len(MONTHS)),
}


@dataclasses.dataclass(frozen=True)
class Question:
  """A question about numbered documents."""

  text: str
  answers: tuple[str, ...]
  golds: tuple[int, ...]   # documents that the answer needs
  near: tuple[int, ...]    # that belong to them without telling it; first among the others


@dataclasses.dataclass(frozen=True)
class Paragraphs:
  documents: tuple[bytes, ...]
  questions: tuple[Question, ...]


class _Numbers:
  """Documents, each once, by their numbers."""

  def __init__(self):
    self.of: dict[str, int] = {}

  def __call__(self, document: str) -> int:
    return self.of.setdefault(document, len(self.of))


def _squad(data: dict[str, Any], number: _Numbers) -> list[Question]:
  out = []
  for article in data['data']:
    article_numbers = [number(paragraph['context']) for paragraph in article['paragraphs']]
    for gold, paragraph in zip(article_numbers, article['paragraphs']):
      near = tuple(dict.fromkeys(i for i in article_numbers if i != gold))
      for asked in paragraph['qas']:
        answers = tuple(dict.fromkeys(answer['text'] for answer in asked['answers']))
        if answers:   # v2.0: impossible ones have none
          out.append(Question(asked['question'], answers, (gold,), near))
  return out


def _hotpot(data: list[dict[str, Any]], number: _Numbers) -> list[Question]:
  out = []
  for asked in data:
    numbers = {title: number(f'{title}\n{"".join(sentences)}')
               for title, sentences in asked['context']}
    golds = tuple(dict.fromkeys(numbers[title] for title, _ in asked['supporting_facts']))
    near = tuple(i for i in numbers.values() if i not in golds)
    out.append(Question(asked['question'], (asked['answer'],), golds, near))
  return out


def paths(pattern: str) -> list[str]:
  """The files of a glob, in any file system's order alike."""
  found = [path for path in sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
           if os.path.isfile(path)]
  check(bool(found), 'no file matches; give SQuAD or HotpotQA JSON files')
  return found


@functools.lru_cache(maxsize=4)
def read(pattern: str, kind: str) -> Paragraphs:
  """The files of one kind, 'SQuAD' or 'HotpotQA', among those that a glob names."""
  number, questions = _Numbers(), []
  for path in paths(pattern):
    try:
      with open(path, encoding='utf-8') as f:
        data = json.load(f)
      found = {dict: 'SQuAD', list: 'HotpotQA'}[type(data)]
      if found == kind:
        questions += (_squad if kind == 'SQuAD' else _hotpot)(data, number)
    except OSError as e:
      raise ConfigError(f'{path}: {e.strerror}; let yourself read it, or name other files') from e
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
      raise ConfigError(f'{path}: is not JSON in UTF-8: {e}; fetch it again') from e
    except (KeyError, TypeError, ValueError) as e:
      raise ConfigError(f'{path}: is neither SQuAD nor HotpotQA (distractor) JSON as published: '
                        f'{type(e).__name__} {e}; leave it out') from e
  check(bool(questions), f'no file holds questions of {kind}; name one too, or leave out the task '
        'that asks them')
  return Paragraphs(tuple(document.encode() for document in number.of), tuple(questions))


@dataclasses.dataclass(frozen=True)
class Town:
  name: str
  year: str
  good: str
  river: str
  month: str

  def told(self, kind: int) -> str:
    """Its facts in one of two orders."""
    river, founded = f'lies on the river {self.river}', f'was founded in {self.year}'
    first, second = (river, founded) if kind else (founded, river)
    good = f'It is known for making {self.good}.'
    market = f'A market is held there every {self.month}.'
    last = f'{market} {good}' if kind else f'{good} {market}'
    return f'{self.name} {first} and {second}. {last}'


def towns(rng: np.random.Generator, names: list[str]) -> list[Town]:
  lists = (YEARS, GOODS, RIVERS, MONTHS)
  drawn = [rng.integers(len(values), size=len(names)).tolist() for values in lists]
  return [Town(name, *(str(values[i]) for values, i in zip(lists, facts)))
          for name, *facts in zip(names, *drawn)]
