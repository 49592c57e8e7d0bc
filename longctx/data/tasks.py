"""Small tasks that separate ways of remembering, made on the fly from a NumPy generator.

    mqar            keys and values, then keys again among noise: say each key's value (Zoology,
                    arXiv:2312.04927, its generator; associative recall)
    selective_copy  data tokens scattered in noise, then as many marks: say the data in order
                    (Mamba, arXiv:2312.00752, section 4.3.1)
    parity          bits: at each, the parity of all so far (state of two values)
    s3              permutations of three things: at each, the product so far (state of six, and it
                    matters in which order; Liu et al. 2022, arXiv:2210.10749)

A batch is (tokens, targets), int32 [B, T]; targets are UNSCORED where nothing is asked. The answer
to token t stands at t: nothing is shifted.
Held by: tests/test_tasks.py.

B batch  T tokens
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from longctx.errors import check

UNSCORED = -1
Batch = tuple[np.ndarray, np.ndarray]


class Task(NamedTuple):
  """A task at its sizes: `make(rng, rows, length)` draws a batch."""

  make: Callable[[np.random.Generator, int, int], Batch]
  vocab_size: int
  chance: float      # accuracy of guessing among the answers that the prompt leaves open


def mqar(rng: np.random.Generator, rows: int, length: int, *, pairs: int, vocab_size: int,
         alpha: float = 0.01) -> Batch:
  """`pairs` keys with values, then each key once more, near ones likelier (power law `alpha`)."""
  half, slots = vocab_size // 2, (length - 2 * pairs) // 2
  check(pairs < half and slots >= pairs, f'mqar: length={length}, vocab_size={vocab_size}: must have '
        f'room for {pairs} pairs twice, and more than twice as many symbols')
  draw = lambda low, high: np.argsort(rng.random((rows, high - low)), axis=1)[:, :pairs] + low
  keys, values = draw(1, half), draw(half, vocab_size)
  tokens = rng.integers(0, vocab_size, (rows, length))
  tokens[:, 0:2 * pairs:2], tokens[:, 1:2 * pairs:2] = keys, values
  # Slots without replacement with p(n) ~ n^(alpha - 1): the largest of log p + Gumbel noise.
  weight = (alpha - 1) * np.log(np.arange(1, slots + 1)) + rng.gumbel(size=(rows, slots))
  where = 2 * pairs + 2 * np.argsort(-weight, axis=1)[:, :pairs]
  targets = np.full((rows, length), UNSCORED)
  np.put_along_axis(tokens, where, keys, axis=1)
  np.put_along_axis(targets, where, values, axis=1)
  return tokens.astype(np.int32), targets.astype(np.int32)


def selective_copy(rng: np.random.Generator, rows: int, length: int, *, items: int,
                   symbols: int) -> Batch:
  """Symbols 2 .. symbols + 1 among zeros, then `items` marks (1), each to be answered."""
  body = length - items
  check(body >= items, f'selective_copy: length={length}: must be at least twice items={items}')
  data = rng.integers(2, symbols + 2, (rows, items))
  where = np.sort(np.argsort(rng.random((rows, body)), axis=1)[:, :items], axis=1)
  tokens = np.zeros((rows, length), np.int32)
  np.put_along_axis(tokens, where, data.astype(np.int32), axis=1)
  tokens[:, body:] = 1
  targets = np.full((rows, length), UNSCORED, np.int32)
  targets[:, body:] = data
  return tokens, targets


def parity(rng: np.random.Generator, rows: int, length: int) -> Batch:
  bits = rng.integers(0, 2, (rows, length), dtype=np.int32)
  return bits, (np.cumsum(bits, axis=1) % 2).astype(np.int32)


PERMUTATIONS = tuple(itertools.permutations(range(3)))
# PRODUCT[a, b]: first a, then b.
PRODUCT = np.array([[PERMUTATIONS.index(tuple(b[i] for i in a)) for b in PERMUTATIONS]
                    for a in PERMUTATIONS], np.int32)


def s3(rng: np.random.Generator, rows: int, length: int) -> Batch:
  tokens = rng.integers(0, 6, (rows, length), dtype=np.int32)
  targets, state = np.empty_like(tokens), np.zeros(rows, np.int32)
  for t in range(length):
    state = targets[:, t] = PRODUCT[state, tokens[:, t]]
  return tokens, targets


def mqar_task(pairs: int = 8, vocab_size: int = 256) -> Task:
  make = lambda rng, rows, length: mqar(rng, rows, length, pairs=pairs, vocab_size=vocab_size)
  return Task(make, vocab_size, 1 / pairs)   # one of the values that were seen


def selective_copy_task(items: int = 8, symbols: int = 16) -> Task:
  make = lambda rng, rows, length: selective_copy(rng, rows, length, items=items, symbols=symbols)
  return Task(make, symbols + 2, 1 / symbols)


TASKS = {
    'mqar': mqar_task(),
    'selective_copy': selective_copy_task(),
    'parity': Task(parity, 2, 1 / 2),
    's3': Task(s3, 6, 1 / 6),
}
