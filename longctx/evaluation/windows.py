"""Which tokens are read together, and which of them are scored: the windows of an evaluation.

A document is its tokens SEP b1 .. bn; input i is scored on the token after it, the last one on the
separator that follows the document. A window reads inputs start..stop from an empty state and is
scored on inputs scored..stop. Windows of `length` inputs start every `stride`; each but the first
of its document scores the inputs that the one before did not reach, so that every input of every
document is scored once. With stride = length the windows are disjoint.
Held by: tests/test_perplexity.py.
"""

from typing import NamedTuple

import numpy as np


class Windows(NamedTuple):
  """Each int64 [number of windows]; start, scored and stop count from the document's first token."""
  document: np.ndarray
  start: np.ndarray
  scored: np.ndarray
  stop: np.ndarray


def prefix(lengths: np.ndarray, max_tokens: int) -> np.ndarray:
  """How many inputs of each document are scored: the first `max_tokens` of all, 0 = every one."""
  if not max_tokens:
    return lengths
  before = np.cumsum(lengths) - lengths
  return np.clip(max_tokens - before, 0, lengths)


def cut(lengths: np.ndarray, length: int, stride: int) -> Windows:
  """Windows over documents of `lengths` inputs (those of 0 have none); length 0 = whole ones."""
  length = length or max(1, lengths.max(initial=1))
  more = np.maximum(lengths - length, 0)
  counts = np.where(lengths > 0, 1 + -(-more // stride), 0)
  document = np.repeat(np.arange(len(lengths)), counts)
  number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
  start = number * stride
  stop = np.minimum(start + length, lengths[document])
  scored = np.where(number > 0, start + length - stride, 0)
  return Windows(document, start, scored, stop)


def num_read(windows: Windows) -> int:
  """Tokens that are read in all of them."""
  return int((windows.stop - windows.start).sum())


def longest_first(windows: Windows) -> Windows:
  """Sorted by tokens to read, so that the rows of a batch end together; stable."""
  order = np.argsort(windows.start - windows.stop, kind='stable')
  return Windows(*(x[order] for x in windows))


def position_bin(position: np.ndarray) -> np.ndarray:
  """Bin of a context position: [0], [1], [2, 3], [4, 7], ...: the length of its binary form."""
  return np.frexp(position.astype(np.float64))[1]


def bin_edges(index: int) -> tuple[int, int]:
  """First and last position of a bin."""
  return (0, 0) if index == 0 else (2**(index - 1), 2**index - 1)
