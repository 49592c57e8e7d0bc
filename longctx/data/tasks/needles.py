"""Facts hidden in a long text, and asked for at its end.

    passkey   five digits said twice among "The grass is green ..."; asked at the end (Mohtashami & Jaggi 2023,
              arXiv:2305.16300, their prompt). Differs: digits are drawn from a seed, all five of them.

A needle stands between two sentences, as near as may be to the depth that is drawn: uniformly, so that
accuracy by depth has as many examples everywhere.
Held by: tests/test_tasks.py, tests/test_task_needles.py.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from longctx.data.tasks import fit, haystack, scoring
from longctx.data.tasks.example import Draw, Example, Task

# The epfml prompt.
PASSKEY_HEAD = (b'There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. '
                b'I will quiz you about the important information there.\n')
PASSKEY_QUESTION = b'\nWhat is the pass key? The pass key is'


def hidden(draw: Draw, name: str, *, head: bytes, needles: Sequence[bytes], depths: Sequence[float],
           question: bytes, target: bytes, references: Sequence[str], new_tokens: int,
           needed: Sequence[int] | None = None, text: Callable[[int], bytes] = haystack.repeated,
           **info: Any) -> Example:
  """An example with each needle between two sentences at its depth of a text as long as there is room for.

  Args:
    head, question: what stands before and after the text.
    needles: of one text each, with the space after it.
    depths: 0 to 1, one for each needle.
    target, references, new_tokens: see Example.
    needed: which needles the answer needs; None: all.
    text: size in bytes -> so many bytes of text.
  """
  most = haystack.of(draw, text)(fit.bytes_for(draw))
  starts = haystack.sentence_starts(most)
  order = sorted(range(len(needles)), key=lambda i: (depths[i], i))

  def laid(part: bytes) -> tuple[bytes, dict[int, int]]:
    """The prompt with this filler, and where each needle begins in it."""
    inside = starts[:max(1, np.searchsorted(starts, len(part) - 2 * fit.STOPS))]   # not among the full stops
    pieces, begins, at, size = [head], {}, 0, len(head)
    for i in order:
      place = haystack.near(inside, depths[i] * len(part))
      pieces += [part[at:place], needles[i]]
      size += place - at
      begins[i] = size
      size, at = size + len(needles[i]), place
    return b''.join([*pieces, part[at:], question]), begins

  prompt, cut = fit.filled(draw, lambda part: laid(part)[0], most, new_tokens, name)
  begins = laid(cut)[1]
  span = len(prompt) - len(head) - len(question)
  which = range(len(needles)) if needed is None else needed
  return Example(
      prompt=prompt, question=len(prompt) - len(question), target=target, references=tuple(references),
      new_tokens=new_tokens, depth=(begins[which[0]] - len(head)) / max(1, span),
      needles=tuple((begins[i], begins[i] + len(needles[i])) for i in which), info=info)


def passkey(draw: Draw) -> Example:
  key = str(draw.rng.integers(10_000, 100_000))
  depth = draw.rng.random() if draw.depth is None else draw.depth
  target = f' {key}'.encode()
  needle = f'The pass key is {key}. Remember it. {key} is the pass key. '.encode()
  return hidden(draw, 'passkey', head=PASSKEY_HEAD, needles=[needle], depths=[depth],
                question=PASSKEY_QUESTION, target=target, references=[key],
                new_tokens=len(target))   # no token is of less than a byte


TASKS = {
    'passkey': Task(make=passkey, score=scoring.first_number, floor=1 / 90_000,
                    source='Mohtashami & Jaggi 2023, arXiv:2305.16300'),
}
