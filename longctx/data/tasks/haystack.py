"""Text to hide needles in: a sentence over and over, random words, or any text by its path.

A haystack gives at least so many bytes, and says where a sentence ends, since a needle stands between two.
Held by: tests/test_tasks.py.
"""

import functools
import glob
import os
import pathlib
import re

import numpy as np

from longctx.errors import ConfigError, check

# RULER's noise, Mohtashami & Jaggi's before it.
GRASS = (b'The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. ')
SENTENCE_END = re.compile(rb'[.!?]["\')\]]*\s+')


def repeated(size: int, sentence: bytes = GRASS) -> bytes:
  """`size` bytes of one sentence over and over."""
  return (sentence * (size // len(sentence) + 1))[:size]


@functools.lru_cache(maxsize=4)
def _read(pattern: str) -> bytes:
  paths = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))   # in any file system's order alike
  check(bool(paths), f'eval.haystack={pattern!r}: no file matches; give a glob of text files')
  try:
    text = b'\n\n'.join(pathlib.Path(path).read_bytes() for path in paths if os.path.isfile(path))
    text.decode('utf-8')
  except OSError as e:
    raise ConfigError(f'eval.haystack={pattern!r}: {e.filename}: {e.strerror}') from e
  except UnicodeDecodeError as e:
    raise ConfigError(f'eval.haystack={pattern!r}: must be UTF-8; byte {e.start} is not') from e
  check(bool(text.strip()), f'eval.haystack={pattern!r}: the files hold no text')
  return re.sub(rb'\s+', b' ', text).strip() + b' '


def real(pattern: str, rng: np.random.Generator, size: int) -> bytes:
  """`size` bytes of the files, in the order of their names, from a sentence anywhere; round and round."""
  text = _read(pattern)
  starts = sentence_starts(text)
  start = int(starts[rng.integers(len(starts))])
  whole = text[start:] + text[:start]
  return (whole * (size // len(whole) + 1))[:size]


def sentence_starts(text: bytes) -> np.ndarray:
  """Bytes at which a needle may stand: 0 and after each sentence's end."""
  return np.array([0] + [m.end() for m in SENTENCE_END.finditer(text)])


def near(starts: np.ndarray, place: float) -> int:
  """The sentence start nearest to a byte."""
  i = int(np.searchsorted(starts, place))
  around = starts[max(0, i - 1):i + 1]
  return int(around[np.argmin(np.abs(around - place))])
