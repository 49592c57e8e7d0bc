"""Pairs and labelled texts made from a seed, for examples that run without a download.

    translate   English sentences of few words into an invented language: verb last, adjectives after
                their noun and in its gender and number, the object marked, 'not' before the verb
    summarise   news of two to ten sentences; who announced what, in order, and nothing else
    sentiment   opinions on a film, some denied; 1 if more of them are good than bad, else 0

Each takes a NumPy generator and gives (text, answer): bytes, or for `sentiment` the number of the class.
The rules are whole: an answer follows from its text by them alone.
Held by: tests/test_data_examples.py.
"""

from collections.abc import Callable

import numpy as np

# English -> (stem, gender) in the invented language; its genders are the vowels that end a noun.
NOUNS = {'fox': ('vul', 'o'), 'bird': ('piri', 'a'), 'king': ('rego', 'o'), 'river': ('flum', 'a'),
         'house': ('domi', 'o'), 'stone': ('petr', 'a'), 'girl': ('nin', 'a'), 'tree': ('arb', 'o'),
         'star': ('stel', 'a'), 'ship': ('nav', 'a'), 'horse': ('kaval', 'o'), 'song': ('kant', 'a')}
ADJECTIVES = {'red': 'rus', 'old': 'vetul', 'small': 'mik', 'dark': 'nokt', 'quiet': 'siln',
              'wild': 'feral', 'tall': 'alt', 'cold': 'frid', 'young': 'jun', 'lost': 'perd'}
VERBS = {'see': 'vid', 'find': 'trov', 'love': 'am', 'follow': 'sek', 'hear': 'aud', 'carry': 'port',
         'fear': 'tim', 'know': 'sav'}
NUMBERS = {'one': 'un', 'two': 'du', 'three': 'tri', 'four': 'kar'}
PLURAL, OBJECT, NOT = 's', 'n', 'ne'

NAMES = ('Ana', 'Ben', 'Eva', 'Ivo', 'Kim', 'Leo', 'Mia', 'Noa', 'Oto', 'Pia', 'Rui', 'Uma')
THINGS = ('bridge', 'school', 'market', 'garden', 'museum', 'tunnel', 'harbour', 'library', 'theatre',
          'clinic', 'station', 'park')
SEEN = ('painted', 'visited', 'liked', 'passed', 'forgot', 'described', 'sketched', 'missed')
KINDS = ('new', 'small', 'green', 'public', 'modern', 'large')
PLACES = ('in the north', 'by the lake', 'near the hill', 'in the old town', 'at the border')

PARTS = ('acting', 'plot', 'music', 'ending', 'camera work', 'script', 'pace', 'cast')
GOOD = ('great', 'moving', 'clever', 'lovely', 'sharp', 'warm')
BAD = ('dull', 'awful', 'clumsy', 'boring', 'weak', 'stale')
ASIDES = ('I saw it on a Sunday.', 'My brother came along.', 'It runs for two hours.',
          'The hall was half full.', 'We sat in the third row.')


def _one(rng: np.random.Generator, of: tuple | dict) -> str:
  items = tuple(of)
  return items[rng.integers(len(items))]


def _noun_phrase(rng: np.random.Generator, is_object: bool) -> tuple[str, str, bool]:
  """(English, invented, whether plural)."""
  noun, number = _one(rng, NOUNS), _one(rng, NUMBERS)
  stem, gender = NOUNS[noun]
  plural = number != 'one'
  adjectives = [_one(rng, ADJECTIVES) for _ in range(rng.integers(3))]
  end = gender + PLURAL * plural + OBJECT * is_object
  english = ' '.join([number, *adjectives, noun + 's' * plural])
  said = ' '.join([NUMBERS[number], stem + end, *(ADJECTIVES[a] + end for a in adjectives)])
  return english, said, plural


def translate(rng: np.random.Generator) -> tuple[bytes, bytes]:
  subject, subject_said, plural = _noun_phrase(rng, False)
  thing, thing_said, _ = _noun_phrase(rng, True)
  verb, denied = _one(rng, VERBS), rng.random() < 0.3
  third = verb[:-1] + 'ies' if verb.endswith('y') else verb + 's'
  english = (f'{"do" if plural else "does"} not {verb}' if denied else verb if plural else third)
  stem = VERBS[verb] + ('em' if plural else 'e')
  said = [subject_said, thing_said, *([NOT] if denied else []), stem]
  return f'{subject} {english} {thing}'.encode(), ' '.join(said).encode()


def summarise(rng: np.random.Generator) -> tuple[bytes, bytes]:
  count = int(rng.integers(2, 11))   # short ones among them, from which it is learned what is asked
  chosen = set(rng.choice(count, rng.integers(1, min(3, count) + 1), replace=False).tolist())
  sentences, said = [], []
  for i in range(count):
    name, thing, kind = _one(rng, NAMES), _one(rng, THINGS), _one(rng, KINDS)
    verb = 'announced' if i in chosen else _one(rng, SEEN)
    sentences.append(f'{name} {verb} a {kind} {thing} {_one(rng, PLACES)}.')
    if i in chosen:
      said.append(f'{name}: {thing}')
  return ' '.join(sentences).encode(), '; '.join(said).encode()


def sentiment(rng: np.random.Generator) -> tuple[bytes, int]:
  count = int(rng.choice((3, 5, 7)))
  sentences, good = [], 0
  for _ in range(count):
    is_good, denied = rng.random() < 0.5, rng.random() < 0.3
    good += is_good
    word = _one(rng, GOOD if is_good != denied else BAD)
    sentences.append(f'The {_one(rng, PARTS)} was {"not " * denied}{word}.')
    if rng.random() < 0.3:
      sentences.append(_one(rng, ASIDES))
  return ' '.join(sentences).encode(), int(good > count / 2)


PAIRS: dict[str, Callable] = {'translate': translate, 'summarise': summarise}
LABELS: dict[str, Callable] = {'sentiment': sentiment}
CLASSES = {'sentiment': ('bad', 'good')}
