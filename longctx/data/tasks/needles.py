"""Facts hidden in a long text, and asked for at its end.

    passkey      five digits said twice among "The grass is green ..."; asked at the end (Mohtashami
                 & Jaggi 2023, arXiv:2305.16300, their prompt). Differs: digits are drawn from a
                 seed, all five of them; of an answer as many tokens are read as the right one has
                 bytes (they read 10): by a tokenizer of bytes a longer number that begins with the
                 key counts, since a model that learned answers alone never learned to end one.
    niah         one city's seven-digit number in a haystack, in the words of Liu et al. 2024,
                 arXiv:2402.08268 (LWM, scripts/eval_needle.py). Differs: no city is twice as likely
                 for being twice in the list; the place is met in bytes and not in another model's
                 tokens; the answer is begun, so that a model that follows no instructions can be
                 asked; the number must not stand in the haystack.
    niah_multi   four cities' numbers, of which two are asked for: the share of them that is found.

A needle stands between two sentences, as near as may be to the depth that is drawn: uniformly, so
that accuracy by depth has as many examples everywhere.
Held by: tests/test_tasks.py, tests/test_task_needles.py.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from longctx.data.tasks import fit, haystack, scoring
from longctx.data.tasks.example import Draw, Example, Task
from longctx.errors import ConfigError

# The epfml prompt.
PASSKEY_HEAD = (b'There is an important info hidden inside a lot of irrelevant text. Find it and '
                b'memorize them. '
                b'I will quiz you about the important information there.\n')
PASSKEY_QUESTION = b'\nWhat is the pass key? The pass key is'

# LWM's prompt, cut at its {context}; what is asked; and how an answer is to be.
LWM_HEAD = b'You are a helpful assistant. USER: '
LWM_ONE, LWM_MORE = 'What is the special magic {} number?', 'What are the special magic {} numbers?'
LWM_RULES = (" Don't give information outside the document or repeat your findings. Keep your "
             'response short and direct. ASSISTANT: ')
CITIES = (
    'Almaty', 'Amman', 'Amsterdam', 'Antananarivo', 'Astana', 'Athens', 'Baghdad', 'Bangalore',
    'Bangkok', 'Barcelona', 'Beirut', 'Belgrade', 'Berlin', 'Bratislava', 'Brussels', 'Bucharest',
    'Budapest', 'Buenos Aires', 'Cairo', 'Chicago', 'Colombo', 'Copenhagen', 'Dakar', 'Damascus',
    'Delhi', 'Doha', 'Dubai', 'Helsinki', 'Ho Chi Minh City', 'Istanbul', 'Jakarta',
    'Johannesburg', 'Kampala', 'Khartoum', 'Kigali', 'Kuala Lumpur', 'Lagos', 'Lima', 'Lisbon',
    'Los Angeles', 'Madrid', 'Maputo', 'Melbourne', 'Mexico City', 'Moscow', 'Mumbai', 'Nairobi',
    'Oslo', 'Paris', 'Port Louis', 'Rabat', 'San Francisco', 'Santiago', 'Sarajevo', 'Seattle',
    'Seoul', 'Shanghai', 'Sofia', 'Sydney', 'Tashkent', 'Thimphu', 'Tokyo', 'Toronto', 'Tunis',
    'Vancouver', 'Victoria', 'Vienna', 'Yangon', 'Yerevan')

TRIES = 1000   # to draw a number that a text does not hold


def hidden(draw: Draw, name: str, *, head: bytes, needles: Sequence[bytes], depths: Sequence[float],
           question: bytes, target: bytes, references: Sequence[str], new_tokens: int,
           needed: Sequence[int] | None = None,
           text: bytes | Callable[[int], bytes] = haystack.repeated,
           places: np.ndarray | None = None, rest: Callable[[bytes], bytes] | None = None,
           **info: Any) -> Example:
  """An example with each needle between two sentences, at its depth of as much text as fits.

  Args:
    head, question: what stands before and after the text.
    needles: of one text each, with the space after it.
    depths: 0 to 1, one for each needle.
    target, references, new_tokens: see Example.
    needed: which needles the answer needs; None: all.
    text: what to hide them in, of fit.bytes_for bytes; or the task's own, size in bytes -> so many
      bytes, in place of which the haystack drawn is read.
    places: bytes of `text` between which its parts stand, where it is made of such; needles stand
      between two of them, and no part is cut. None: sentences.
    rest: with places, what becomes of a part that is cut: something well formed, of as many tokens
      as it.
  """
  most = text if isinstance(text, bytes) else haystack.of(draw, text)(fit.bytes_for(draw))
  starts = haystack.sentence_starts(most) if places is None else places
  # Not among what ends a text for its length's sake; of parts, not in the one that is cut.
  spare = fit.ENDING if places is None else -1
  order = sorted(range(len(needles)), key=lambda i: (depths[i], i))

  def laid(part: bytes) -> tuple[bytes, dict[int, int]]:
    """The prompt with this filler, and where each needle begins in it."""
    inside = starts[:max(1, np.searchsorted(starts, len(part) - spare))]
    end = len(part) if rest is None else int(inside[-1])
    pieces, begins, at, size = [head], {}, 0, len(head)
    for i in order:
      place = haystack.near(inside, depths[i] * end)
      pieces += [part[at:place], needles[i]]
      size += place - at
      begins[i] = size
      size, at = size + len(needles[i]), place
    last = b'' if rest is None else rest(part[end:])
    return b''.join([*pieces, part[at:end], last, question]), begins

  prompt, cut = fit.filled(draw, lambda part: laid(part)[0], most, new_tokens, name)
  begins = laid(cut)[1]
  which = range(len(needles)) if needed is None else needed
  span = len(prompt) - len(head) - len(question) - len(needles[which[0]])
  return Example(
      prompt=prompt, question=len(prompt) - len(question), target=target,
      references=tuple(references), new_tokens=new_tokens,
      depth=(begins[which[0]] - len(head)) / max(1, span),
      needles=tuple((begins[i], begins[i] + len(needles[i])) for i in which), info=info)


def depths_of(draw: Draw, count: int) -> list[float]:
  """Depths of so many needles: uniform, but the first one's is what was asked for."""
  depths = draw.rng.random(count).tolist()
  return depths if draw.depth is None else [draw.depth, *depths[1:]]


def number(draw: Draw, digits: int, text: bytes, taken: Sequence[str] = ()) -> str:
  """A number of so many digits that the text does not hold, and none of those taken."""
  for _ in range(TRIES):
    found = str(draw.rng.integers(10 ** (digits - 1), 10 ** digits))
    if found not in taken and found.encode() not in text:
      return found
  raise ConfigError(f"{draw.label('haystack')}: holds each of {TRIES} numbers of {digits} digits that were drawn, of "
                    'which one must not be in it; give a text of fewer numbers')


def passkey(draw: Draw) -> Example:
  depths = depths_of(draw, 1)
  text = haystack.of(draw)(fit.bytes_for(draw))
  key = number(draw, 5, text)
  target = f' {key}'.encode()
  needle = f'The pass key is {key}. Remember it. {key} is the pass key. '.encode()
  return hidden(draw, 'passkey', head=PASSKEY_HEAD, needles=[needle], depths=depths,
                question=PASSKEY_QUESTION, target=target, references=[key],
                new_tokens=len(target), text=text)   # no token is of less than a byte


def niah(draw: Draw, name: str, hidden_cities: int, asked: int) -> Example:
  depths = depths_of(draw, hidden_cities)
  cities = [CITIES[i] for i in draw.rng.permutation(len(CITIES))[:hidden_cities]]
  text = haystack.of(draw)(fit.bytes_for(draw))
  numbers = [number(draw, 7, text) for _ in cities]
  named = ' and '.join(cities[:asked])
  begun = f'The special magic {named} number' + (' is:' if asked == 1 else 's are:')
  target = f' {", ".join(numbers[:asked])}'.encode()
  return hidden(
      draw, name, head=LWM_HEAD, depths=depths,
      needles=[f'\nThe special magic {city} number is: {found}\n'.encode()
               for city, found in zip(cities, numbers)],
      question=f' {(LWM_ONE if asked == 1 else LWM_MORE).format(named)}{LWM_RULES}{begun}'.encode(),
      target=target, references=numbers[:asked], new_tokens=len(target), needed=range(asked),
      text=text)


LWM = 'Liu et al. 2024, arXiv:2402.08268, scripts/eval_needle.py'
TASKS = {
    'passkey': Task(make=passkey, score=scoring.first_number, floor=1 / 90_000, reads=('haystack',),
                    source='Mohtashami & Jaggi 2023, arXiv:2305.16300'),
    'niah': Task(make=lambda draw: niah(draw, 'niah', 1, 1), score=scoring.match_all,
                 floor=1 / 9_000_000, source=LWM, reads=('haystack',)),
    'niah_multi': Task(make=lambda draw: niah(draw, 'niah_multi', 4, 2), score=scoring.match_all,
                       floor=2 / 9_000_000, source=LWM, reads=('haystack',)),
}
