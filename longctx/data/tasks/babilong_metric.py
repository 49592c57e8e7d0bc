"""How answers of BABILong are judged: its own metric, that of another harness, and one that is mended.

    compare_answers      BABILong's (booydar/babilong, babilong/metrics.py at 7a6efee), its quirks with it: letters
                         alike in both cases; what follows the first full stop, "<context>" or "<example>" is not
                         read; labels that the question names do not count; right if the target is the only label
                         left, or, of a target with commas longer than three letters, if its parts are all that is
                         left. A label counts wherever its letters stand: "no" in "I do not know", and "one" in
                         "none", so that "none" (task 7) is never right. It also cuts at "Question", which no
                         lower-cased answer holds.
    compare_words        the same, but a label counts as a whole word: what task 7 is scored by here
    contains_target      that of EleutherAI's lm-evaluation-harness (tasks/babilong): right if the target's letters
                         stand anywhere in the answer, whatever else does. Higher; not to be compared with the others

As scoring.py, this file is written beside exported tasks: evaluation/harness_tasks.py.
Held by: tests/test_task_babilong.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from longctx.data.tasks.scoring import cleaned

if TYPE_CHECKING:
  from longctx.data.tasks.example import Example

_PLACES = ('bathroom', 'bedroom', 'garden', 'hallway', 'kitchen', 'office')
_YES_NO = ('no', 'yes')
LABELS: dict[int, tuple[str, ...]] = {
    **dict.fromkeys((1, 2, 3, 4, 11, 12, 13), _PLACES),
    5: ('Bill', 'Fred', 'Jeff', 'Mary', 'apple', 'football', 'milk'),
    **dict.fromkeys((6, 9, 17, 18), _YES_NO),
    7: ('none', 'one', 'three', 'two'),
    8: ('apple', 'football', 'milk', 'nothing'),
    10: ('maybe', *_YES_NO),
    14: ('bedroom', 'cinema', 'kitchen', 'office', 'park', 'school'),
    15: ('cat', 'mouse', 'sheep', 'wolf'),
    16: ('gray', 'green', 'white', 'yellow'),
    19: ('e,e', 'e,n', 'e,s', 'n,e', 'n,n', 'n,w', 's,e', 's,s', 's,w', 'w,n', 'w,s', 'w,w'),
    20: ('bedroom', 'bored', 'garden', 'hungry', 'kitchen', 'thirsty', 'tired'),
}


def _compare(target: str, output: str, question: str, labels: Collection[str],
             stands: Callable[[str, str], bool]) -> bool:
  said = re.split(r'\.|<context>|<example>', output.lower())[0]
  target, question = target.lower(), question.lower()
  left = {label for label in map(str.lower, labels) if stands(label, said) and label not in question}
  parts = target.split(',') if ',' in target and len(target) > 3 else [target]
  return left == set(parts)


def compare_answers(target: str, output: str, question: str, labels: Collection[str]) -> bool:
  return _compare(target, output, question, labels, lambda label, said: label in said)


def compare_words(target: str, output: str, question: str, labels: Collection[str]) -> bool:
  whole = lambda label, said: re.search(rf'\b{re.escape(label)}\b', said) is not None
  return _compare(target, output, question, labels, whole)


def contains_target(target: str, output: str) -> bool:
  return target.strip().lower() in cleaned(output).lower()


def score(text: str, example: Example) -> float:
  number = example.info['number']
  compare = compare_words if number == 7 else compare_answers
  return float(compare(example.references[0], text, example.info['asked'], LABELS[number]))
