"""Text to hide needles in: a sentence over and over, random words, or any text by its path.

A haystack gives at least so many bytes of whole characters, and says where a needle may stand:
between two sentences; in a long stretch without a sentence's end, such as a table's, between two
words. Errors about files name no setting: who knows it labels them.
Held by: tests/test_task_fit.py.
"""

import functools
import glob
import os
import pathlib
import re
from collections.abc import Callable

import numpy as np

from longctx.data.tasks.example import Draw
from longctx.data.tasks.fit import between
from longctx.errors import ConfigError, check, labelled

# RULER's noise, Mohtashami & Jaggi's before it.
GRASS = (b'The grass is green. The sky is blue. The sun is yellow. Here we go. There and back '
         b'again. ')
# Words of `noise`: common ones of one or two syllables, no name and no number among them.
COMMON = ('about above again along apple ask away back ball bank begin bell below bird boat bone '
          'book bread bridge bring brown build call carry chair clean climb close cloud coat cold '
          'come corner count cover dance day deep door draw dream drink dry early earth empty '
          'every face fall farm fast field find fire fish floor flower follow garden gate gather '
          'gentle give glass grow hand happy hear heavy hill hold home hope horse house keep kind '
          'ladder lake lamp laugh leaf learn leave letter light listen little long look lost make '
          'map meadow meet milk moon morning mountain move never night old open orange over paint '
          'paper path picture plain plant play quick quiet rain reach read rest return ride river '
          'road roof root rope round run salt sand sea season send shadow shape shelf ship shore '
          'short silver simple sing slow small smoke snow soft song sound spoon spring stand star '
          'stone storm street summer sweet table talk tall tell thin throw tired tower town travel '
          'tree turn under valley wait walk wall warm wash watch water wheel wild wind window '
          'winter wood work write yard year young')
WORDS = COMMON.split()
# The end of a sentence in Latin, Greek, Cyrillic, Arabic and Indic scripts, with what closes after
# it, and in Chinese and Japanese, where no space follows.
SENTENCE_END = re.compile(
    '(?:[.!?]|…|؟|।)(?:["\')\\]]|»|”|’)*\\s+|(?:。|！|？)(?:」|』|”|’|）)*\\s*'.encode())
WORD_END = re.compile(rb'\s+')
NAMES = {'repeated': 'one sentence over and over', 'noise': 'random words'}   # all else is a glob
STRETCH = 1000   # bytes without a sentence's end, after which a word's end will do


def repeated(size: int, sentence: bytes = GRASS) -> bytes:
  """`size` bytes of one ASCII sentence over and over."""
  return (sentence * (size // len(sentence) + 1))[:size]


def noise(rng: np.random.Generator, size: int) -> bytes:
  """At least `size` bytes of sentences of 4 to 12 random words."""
  count = size // 4 + 16   # no word with its space is shorter than 4 bytes
  words = np.array(WORDS)[rng.integers(len(WORDS), size=count)].tolist()
  out, at = [], 0
  for length in rng.integers(4, 13, size=count // 4 + 1):
    out.append(' '.join(words[at:at + length]).capitalize())
    at += length
    if at >= count:
      break
  return ('. '.join(out) + '. ').encode()


def paths(pattern: str) -> list[str]:
  """The files of a glob, in any file system's order alike."""
  found = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
  check(bool(found), 'no file matches; give a glob of text files')
  return [path for path in found if os.path.isfile(path)]


@functools.lru_cache(maxsize=4)
def read(pattern: str) -> tuple[bytes, np.ndarray]:
  """(the files' text, where its sentences begin)."""
  try:
    text = b'\n\n'.join(pathlib.Path(path).read_bytes() for path in paths(pattern))
    text.decode('utf-8')
  except OSError as e:
    raise ConfigError(f'{e.filename}: {e.strerror}; let yourself read it, or name other files') from e
  except UnicodeDecodeError as e:
    raise ConfigError(f'must be UTF-8; byte {e.start} is not') from e
  check(bool(text.strip()), 'the files hold no text; name others')
  text = re.sub(rb'\s+', b' ', text).strip() + b' '
  starts = sentence_starts(text)
  longest = int(np.diff([*starts, len(text)]).max())
  check(longest <= 2 * STRETCH, f'has {longest} bytes without the end of a sentence or a word, so '
        'that needles could not stand where they are asked for; give running text')
  return text, starts


def real(pattern: str, rng: np.random.Generator, size: int) -> bytes:
  """At least `size` bytes of the files, by name, from a sentence anywhere; round and round."""
  text, starts = read(pattern)
  start = int(starts[rng.integers(len(starts))])
  around = text[start:start + size + 4]
  while len(around) < size + 4:
    around += text[:size + 4 - len(around)]
  return around[:between(around, size + 3)]


def of(draw: Draw, own: Callable[[int], bytes] = repeated) -> Callable[[int], bytes]:
  """Size -> at least so many bytes of the haystack drawn: '' is the task's own, 'repeated' a
  sentence over and over, 'noise' random words; all else is a glob."""
  if draw.haystack in ('', 'repeated'):
    return repeated if draw.haystack else own
  if draw.haystack == 'noise':
    return lambda size: noise(draw.rng, size)
  return labelled(draw.label('haystack'))(lambda size: real(draw.haystack, draw.rng, size))


def sentence_starts(text: bytes) -> np.ndarray:
  """Where a needle may stand: 0, ends of sentences, and of words where none ends for long."""
  starts = np.array([0, *(match.end() for match in SENTENCE_END.finditer(text))])
  if (long := np.flatnonzero(np.diff(starts, append=len(text)) > STRETCH)).size:
    ends = [*starts[1:].tolist(), len(text)]
    starts = np.sort(np.concatenate([starts, *(_words(text, starts[i], ends[i]) for i in long)]))
  return starts


def _words(text: bytes, start: int, stop: int) -> np.ndarray:
  """Ends of words between two places, half of STRETCH or more apart."""
  found = []
  while match := WORD_END.search(text, start + STRETCH // 2, stop):
    start = match.end()
    found.append(start)
  return np.array(found, int)


def near(starts: np.ndarray, place: float) -> int:
  """The sentence start nearest to a byte."""
  i = int(np.searchsorted(starts, place))
  around = starts[max(0, i - 1):i + 1]
  return int(around[np.argmin(np.abs(around - place))])
