"""How an answer is scored: functions of (text, example) -> 0 to 1.

The two of RULER (NVIDIA/RULER, scripts/eval/synthetic/constants.py): letters alike in both cases,
and control characters of the answer taken as line ends. An answer that says more than is asked is
not punished. This file runs without the rest of longctx: evaluation/harness_tasks.py writes it
beside the tasks it exports.
Held by: tests/test_task_scoring.py.
"""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from longctx.data.tasks.example import Example

CONTROL = re.compile('[\x00-\x1f]')


def cleaned(text: str) -> str:
  return CONTROL.sub('\n', text.strip()).strip()


def match_all(text: str, example: Example) -> float:
  """The share of the references that stand in the answer (RULER's string_match_all)."""
  said = cleaned(text).lower()
  return sum(ref.lower() in said for ref in example.references) / len(example.references)


def match_part(text: str, example: Example) -> float:
  """1 if any reference stands in the answer (RULER's string_match_part, for its questions)."""
  said = cleaned(text).lower()
  return float(any(ref.lower() in said for ref in example.references))


def starts_with(text: str, example: Example) -> float:
  """1 if the answer begins with the reference, spaces before it aside."""
  return float(text.lstrip().startswith(example.references[0]))


def exact(text: str, example: Example) -> float:
  """1 if the answer's first line is the reference and no more, spaces around it aside."""
  return float(text.strip().split('\n')[0].strip() == example.references[0])


def first_number(text: str, example: Example) -> float:
  """1 if the first whole number of the answer is the reference (Mohtashami & Jaggi's passkey)."""
  found = re.search(r'\d+', text)
  return float(found is not None and found.group() == example.references[0])


def first_choice(text: str, example: Example) -> float:
  """1 if of the example's choices the reference is named first, each as a whole word."""
  named = re.search('|'.join(rf'\b{re.escape(choice)}\b' for choice in example.info['choices']),
                    text)
  return float(named is not None and named.group() == example.references[0])


def after_mark(text: str, example: Example) -> float:
  """How much of the reference follows the example's mark, where it is last; 0 without a mark.

  MRCR's (google-deepmind/eval_hub, mrcr_v2): difflib's ratio, 2 M / T with M letters in matching
  runs and T of both texts. From 200 letters on, difflib takes letters that are common in the answer
  for no begin of a run (autojunk): two unlike English texts share about 3 % then, shorter ones
  about 40 %, and the ratio of a and b is not that of b and a. To be comparable it stays so;
  references that are longer than 200 letters keep answers on one side of it.
  """
  before, mark, answer = text.strip().rpartition(example.info['mark'])
  del before
  if not mark:
    return 0.0
  return difflib.SequenceMatcher(None, example.references[0].strip(), answer.strip()).ratio()
