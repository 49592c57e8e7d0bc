"""RULER as published, byte for byte: the five tasks of NVIDIA's generators that need no download.

    niah_single_1, niah_multikey_2, niah_multikey_3   scripts/data/synthetic/niah.py
    vt                                                variable_tracking.py
    fwe                                               freq_words_extraction.py

Source: github.com/NVIDIA/RULER at c3f5e3b (Apache-2.0); the prompts are its words, the code is
ours. Its numbers come from one generator for the whole set, in the order of its calls, those of its
search for a size of the haystack too: sample i is known only after all before it. Its loop of tries
has an end here: where it would go on for ever (a byte tokenizer's vt, whose worked example never
fits 500 tokens), a ConfigError says so. A length is a bound of prompt and answer, as there, the
separator aside; `ruler.py` has the form with exact lengths and the faults mended.
Held by: tests/test_task_ruler_compat.py (hashes of what the reference wrote).
"""

import dataclasses
import functools
import itertools
import random
import string
import uuid
from collections.abc import Callable, Iterator

import numpy as np

from longctx.data.tasks import ruler_prompts as prompts
from longctx.data.tasks import scoring, words
from longctx.data.tasks.example import Draw, Example, Task
from longctx.data.tokenizer import Tokenizer
from longctx.errors import ConfigError, check

NOISE = 'The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.'
SEED = 42
TRIES = 100     # at the smallest haystack, where the reference has no end
HOPS = 4
EXAMPLE = 500   # tokens that vt's worked example may have

Count = Callable[[str], int]   # tokens of a text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
  """What the reference writes: its `input` + `answer_prefix`, and its `outputs`."""

  prompt: str
  answers: tuple[str, ...]
  head: int                    # characters before the context
  question: str                # what stands after it
  needles: tuple[str, ...]     # what the answer needs, as and in the order in which it stands there


class FailedSampleError(ConfigError):
  """An error of the reference, which its loop of tries hides and its search for a size does not."""


def _size(tokens: Callable[[int], int], step: int, length: int, extra: int) -> int:
  """Units of haystack: the reference's search, which draws a new sample for each size."""
  low, high = step, max(int(length / (tokens(step) / step) * 3), step * 2)
  found = step
  while low <= high:
    middle = (low + high) // 2
    if tokens(middle) + extra <= length:
      found, low = middle, middle + 1
    else:
      high = middle - 1
  return found


def _samples(make: Callable[[int], Sample], count: Count, size: int, step: int, length: int,
             new_tokens: int, name: str) -> Iterator[Sample]:
  """Samples of at most `length` tokens with the answer; a longer one is drawn again, of less."""
  while True:
    used, tries, least = size, 0, None
    while True:
      try:
        sample = make(used)
        tokens = count(sample.prompt) + new_tokens
        if tokens <= length:
          break
        least = min(tokens, least or tokens)
      except FailedSampleError:
        pass
      tries += used <= step
      check(tries < TRIES, f'{name}: length={length}: the published generator would never end: of '
            f"its smallest samples none has fewer than {least} of this model's tokens; take a "
            'longer one')
      if used > step:
        used -= step
    yield sample


def _number(rng: random.Random) -> str:
  return str(rng.randint(10**6, 10**7 - 1))


def _word(rng: random.Random) -> str:
  return rng.choice(words.keys())


def _uuid(rng: random.Random) -> str:
  return str(uuid.UUID(int=rng.getrandbits(128), version=4))


KINDS = {'numbers': _number, 'words': _word, 'uuids': _uuid}


def niah(count: Count, length: int, seed: int, name: str, *, haystack: str, key: str,
         value: str) -> Iterator[Sample]:
  """One needle among lines of noise ('noise'), or of needles with other keys ('needles')."""
  rng = random.Random(seed)
  head, question = (part.replace('{kind}', value[:-1]) for part in prompts.one(prompts.NIAH))

  def needle() -> tuple[str, str, str]:
    k, v = KINDS[key](rng), KINDS[value](rng)
    return k, v, prompts.NEEDLE.format(kind=value, key=k, value=v)

  def make(size: int) -> Sample:
    k, v, line = needle()
    lines = [NOISE] * size if haystack == 'noise' else [needle()[2] for _ in range(size)]
    lines.insert(rng.sample(range(size), 1)[0], line)
    rng.sample(range(1), 1)   # which of the keys is asked for, of which there is one
    asked = question.format(query=k)
    return Sample(prompt=head + '\n'.join(lines) + asked, answers=(v,), head=len(head),
                  question=asked, needles=(line,))

  new_tokens = prompts.NEW_TOKENS['niah']
  step = 25 if length >= 4096 else 5
  size = _size(lambda size: count(make(size).prompt), step, length, new_tokens)
  return _samples(make, count, size, step, length, new_tokens, name)


def vt(count: Count, length: int, seed: int, name: str) -> Iterator[Sample]:
  """A chain of assignments among lines of noise, after an example with other names each time."""
  rng, old = random.Random(seed), np.random.RandomState(seed)   # NumPy's old numbers, as there
  head, question = prompts.VT

  def named(k: int) -> str:
    return ''.join(rng.choices(string.ascii_uppercase, k=k))

  def chain(k: int, value: Callable[[], str]) -> tuple[list[str], list[str]]:
    """(names of k letters, their assignments)."""
    names = [named(k) for _ in range(HOPS + 1)]
    while len(set(names)) < HOPS + 1:
      names.append(named(k))
    for begun in range(0, len(names), HOPS + 1):
      first = f'VAR {names[begun]} = {value()}'
      if begun:
        raise FailedSampleError(f'{name}: seed={seed}: the published generator stops here, as two '
                                'of its names are the same; take another seed')
      lines = [first, *(f'VAR {b} = VAR {a} ' for a, b in itertools.pairwise(names))]
    return names, lines

  def make(size: int, k: int, value: Callable[[], str]) -> Sample:
    names, assignments = chain(k, value)
    if size < len(assignments):
      raise FailedSampleError(f'{name}: length={length}: has no room for the {len(assignments)} '
                              'assignments')
    lines = [NOISE] * size
    for i, at in enumerate(sorted(rng.sample(range(size), len(assignments)))):
      lines.insert(at + i, assignments[i])
    asked = question.format(query=assignments[0].split('=')[-1].strip(), number=HOPS + 1)
    return Sample(prompt=head + '\n'.join(lines) + asked, answers=tuple(names), head=len(head),
                  question=asked, needles=tuple(assignments))

  worked = lambda size: make(size, 3, lambda: '12345')
  size = _size(lambda size: count(worked(size).prompt), 5, EXAMPLE, 0)
  shown = next(_samples(worked, count, size, 5, EXAMPLE, 0, f'{name}, its worked example'))
  shown = f'{shown.prompt} {" ".join(shown.answers)}\n'

  def renamed() -> str:
    text = shown
    for name in text.split()[-HOPS - 1:]:
      text = text.replace(name, named(len(name)))
    return text.replace('12345', str(old.randint(10000, 99999)))

  asked = lambda size: make(size, 5, lambda: str(old.randint(10000, 99999)))

  def after_example(size: int) -> Sample:
    sample = asked(size)
    before = renamed() + '\n'
    return dataclasses.replace(sample, prompt=before + sample.prompt,
                               head=len(before) + sample.head)

  new_tokens = prompts.NEW_TOKENS['vt']
  step = 10 if length >= 4096 else 5
  size = _size(lambda size: count(asked(size).prompt), step, length, count(shown) + new_tokens)
  return _samples(after_example, count, size, step, length, new_tokens, name)


def fwe(count: Count, length: int, seed: int, name: str) -> Iterator[Sample]:
  """Coded words, as often as 1/k^2 of their rank k says; the first is noise, ranks 2 to 4 asked."""
  rng = random.Random(seed)
  room = length - prompts.NEW_TOKENS['fwe']
  step = room // 32
  head, question = prompts.FWE
  check(step > 0 and count(head + question) < room, f'{name}: length={length}: must be more than '
        f"{max(32, count(head + question)) + prompts.NEW_TOKENS['fwe']} of this model's tokens")

  def vocabulary() -> list[str]:
    coded = set()
    for _ in range(room // 50):
      coded.add(''.join(rng.choices(string.ascii_lowercase, k=6)))
    while len(coded) < room // 50:
      coded.add(''.join(rng.choices(string.ascii_lowercase, k=6)))
    coded = sorted(coded)
    random.Random(seed).shuffle(coded)
    return ['...', *coded[1:]]

  def make(size: int, coded: list[str]) -> Sample:
    ranks = np.arange(1, len(coded) + 1)
    counts = (size * ranks**-2.0 / (np.pi**2 / 6)).astype(int)
    text = [word for word, n in zip(coded, counts) for _ in range(n)]
    random.Random(seed).shuffle(text)
    return Sample(prompt=head + ' '.join(text) + question, answers=tuple(coded[1:4]),
                  head=len(head), question=question, needles=())

  coded = vocabulary()
  size = room // 6
  while count(make(size, coded).prompt) < room:
    size += step
  size -= step

  def fitting() -> Iterator[Sample]:
    while True:
      coded, used = vocabulary(), size
      sample = make(used, coded)
      while count(sample.prompt) > room:
        used -= step
        check(used > 0, f'{name}: length={length}: holds no coded words; take a longer one')
        sample = make(used, coded)
      yield sample

  return fitting()


GENERATORS: dict[str, Callable[[Count, int, int, str], Iterator[Sample]]] = {
    'ruler_compat_niah_single_1': functools.partial(
        niah, haystack='noise', key='words', value='numbers'),
    'ruler_compat_niah_multikey_2': functools.partial(
        niah, haystack='needles', key='words', value='numbers'),
    'ruler_compat_niah_multikey_3': functools.partial(
        niah, haystack='needles', key='uuids', value='uuids'),
    'ruler_compat_vt': vt,
    'ruler_compat_fwe': fwe,
}


def samples(name: str, count: Count, length: int, *, seed: int = SEED) -> Iterator[Sample]:
  """The reference's samples, one after another, whatever its num_samples was."""
  return GENERATORS[name](count, length, seed, name)


class _Set:
  """The samples of one set, asked for by their indices: in their order each is made once."""

  def __init__(self, name: str, tokenizer: Tokenizer, length: int, seed: int):
    count = lambda text: len(tokenizer.encode(text.encode()))
    self._begin = lambda: enumerate(samples(name, count, length, seed=seed))
    self._rest, self._last = self._begin(), (-1, None)

  def __getitem__(self, index: int) -> Sample:
    if index < self._last[0]:
      self._rest = self._begin()
      self._last = next(self._rest)
    while self._last[0] < index:
      self._last = next(self._rest)
    return self._last[1]


_sets = functools.lru_cache(maxsize=len(GENERATORS))(_Set)


def example(draw: Draw, name: str) -> Example:
  """Sample `index` of the reference's set; eval.seed is its --random_seed, as published 42."""
  check(isinstance(draw.seed, int), f'{name}: seed={draw.seed!r}: must be a number, as the '
        f"published generator takes; train on {name.replace('compat_', '')}")
  check(draw.depth is None, f'{name}: depth={draw.depth}: the published prompts have their own '
        f"depths; {name.replace('compat_', '')} takes any")
  sample = _sets(name, draw.tokenizer, draw.length, draw.seed)[draw.index]
  kind = 'niah' if 'niah' in name else name.removeprefix('ruler_compat_')
  begins = [sample.prompt.index(line, sample.head) for line in sample.needles]
  end = len(sample.prompt) - len(sample.question)
  joined = (' ' if kind == 'vt' else ', ').join(sample.answers)
  return Example(
      prompt=sample.prompt.encode(), question=end, references=sample.answers,
      target=('' if kind == 'vt' else ' ').encode() + joined.encode(),
      new_tokens=prompts.NEW_TOKENS[kind],
      # In ASCII, where a letter is a byte.
      needles=tuple((at, at + len(line)) for at, line in zip(begins, sample.needles)),
      depth=(begins[0] - sample.head) / (end - sample.head) if begins else None)


# One guess for each answer asked for, as in ruler.py.
FLOORS = {'niah_single_1': 1 / 9e6, 'niah_multikey_2': 1 / 9e6, 'niah_multikey_3': 2.0 ** -122,
          'vt': (HOPS + 1) / 26**5, 'fwe': 3 / 26**6}
TASKS = {
    f'ruler_compat_{name}': Task(
        make=functools.partial(example, name=f'ruler_compat_{name}'), score=scoring.match_all,
        floor=floor, source='NVIDIA/RULER at c3f5e3b, scripts/data/synthetic, byte for byte',
        published=prompts.published(name), exact=False, placed=False)
    for name, floor in FLOORS.items()}
