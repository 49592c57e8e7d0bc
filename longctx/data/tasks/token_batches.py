"""Small tasks that separate ways of remembering, made on the fly from a NumPy generator.

    mqar            keys and values, then keys again among noise: say each key's value (Zoology,
                    arXiv:2312.04927, its generator; associative recall)
    selective_copy  data tokens scattered in noise, then as many marks: say the data in order
                    (Mamba, arXiv:2312.00752, section 4.3.1)
    parity          bits: at each, the parity of all so far (state of two values)
    s3              permutations of three things: at each, the product so far (state of six, and it
                    matters in which order; Liu et al. 2022, arXiv:2210.10749)
    segment_recall  a key and its value a segment of two tokens, then each key and ASK, in another
                    order: say its value (the one fact a segment of ARMT, arXiv:2407.04841, with all
                    facts asked)
    segment_rewrite the same, each key with a second value later on: the last one counts
    passkey         a mark and five different digits in one segment of noise, the mark again at the end
                    of the last: say the digits (Mohtashami & Jaggi 2023, arXiv:2305.16300)

A batch is (tokens, targets), int32 [B, T]; targets are UNSCORED where nothing is asked. The answer
to token t stands at t: nothing is shifted.
Held by: tests/test_token_batches.py.

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
  """`pairs` keys with values, then each key once more, near ones likelier (power law `alpha`).

  Noise is of any symbol, as by default in Zoology's generator, and so may be a key, with a symbol behind it that
  is not its value: in 72 % of the rows of TASKS, and 4.2 % of all questions come behind such a false pair of their
  own key. Zoology's figure 2 is without; experiments/04_arena puts blanks in the place of noise.
  """
  half, slots = vocab_size // 2, (length - 2 * pairs) // 2
  check(pairs < half and slots >= pairs, f'mqar: length={length}, vocab_size={vocab_size}: must have '
        f'room for {pairs} pairs twice, and more than twice as many symbols')
  draw = lambda low, high: _some(rng, rows, high - low, pairs) + low
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


def segment_recall(rng: np.random.Generator, rows: int, length: int, *, keys: int, values: int,
                   times: int = 1) -> Batch:
  """Each key `times` times with a value, in a new order each time; then each once more, with ASK.

  Tokens: keys from 0, values from `keys`, then ASK. There are as many keys as `length` has room for.
  """
  n, left = divmod(length, 2 * (times + 1))
  check(not left and 1 <= n <= keys, f'segment_recall: length={length}: must be {2 * (times + 1)} '
        f'tokens for each of 1 to {keys} keys')
  names = _some(rng, rows, keys, n)
  shuffled = lambda: np.take_along_axis(names, _some(rng, rows, n, n), axis=1)
  written, asked = np.concatenate([shuffled() for _ in range(times)], axis=1), shuffled()
  said = rng.integers(keys, keys + values, written.shape)
  last = np.zeros((rows, keys), np.int64)
  np.put_along_axis(last, written[:, -n:], said[:, -n:], axis=1)
  ask, unscored = np.full_like(asked, keys + values), np.full_like(written, UNSCORED)
  interleave = lambda a, b: np.stack([a, b], axis=2).reshape(rows, -1)
  tokens = np.concatenate([interleave(written, said), interleave(asked, ask)], axis=1)
  answers = interleave(np.full_like(asked, UNSCORED), np.take_along_axis(last, asked, axis=1))
  targets = np.concatenate([interleave(unscored, unscored), answers], axis=1)
  return tokens.astype(np.int32), targets.astype(np.int32)


def passkey(rng: np.random.Generator, rows: int, length: int, *, segment: int, digits: int,
            symbols: int) -> Batch:
  """The mark and its digits stand in one segment before the last, if there is more than one.

  Tokens: ten digits, `symbols` of noise, the mark. The answer to the mark is the first digit, the
  answer to the first digit the second.
  """
  count, left = divmod(length, segment)
  check(not left and count and segment > 2 * digits and digits <= 10, f'passkey: length={length}: '
        f'must be segments of {segment}, each longer than twice {digits} different digits')
  key = _some(rng, rows, 10, digits)
  mark = np.full((rows, 1), 10 + symbols)
  tokens = rng.integers(10, 10 + symbols, (rows, length))
  room = segment - (2 * digits if count == 1 else digits)
  start = rng.integers(0, max(1, count - 1), rows) * segment + rng.integers(0, room, rows)
  np.put_along_axis(tokens, start[:, None] + np.arange(digits + 1),
                    np.concatenate([mark, key], axis=1), axis=1)
  tokens[:, -digits:] = np.concatenate([mark, key[:, :-1]], axis=1)
  targets = np.full((rows, length), UNSCORED, np.int32)
  targets[:, -digits:] = key
  return tokens.astype(np.int32), targets


def _some(rng: np.random.Generator, rows: int, of: int, count: int) -> np.ndarray:
  """[rows, count] different numbers below `of` in each row, in any order."""
  return np.argsort(rng.random((rows, of)), axis=1)[:, :count]


def mqar_task(pairs: int = 8, vocab_size: int = 256) -> Task:
  make = lambda rng, rows, length: mqar(rng, rows, length, pairs=pairs, vocab_size=vocab_size)
  return Task(make, vocab_size, 1 / pairs)   # one of the values that were seen


def selective_copy_task(items: int = 8, symbols: int = 16) -> Task:
  make = lambda rng, rows, length: selective_copy(rng, rows, length, items=items, symbols=symbols)
  return Task(make, symbols + 2, 1 / symbols)


def segment_recall_task(times: int, keys: int = 32, values: int = 16) -> Task:
  make = lambda rng, rows, length: segment_recall(rng, rows, length, keys=keys, values=values,
                                                  times=times)
  return Task(make, keys + values + 1, 1 / values)


def passkey_task(segment: int = 64, digits: int = 5, symbols: int = 32) -> Task:
  make = lambda rng, rows, length: passkey(rng, rows, length, segment=segment, digits=digits,
                                           symbols=symbols)
  return Task(make, 10 + symbols + 1, 1 / 10)


TASKS = {
    'mqar': mqar_task(),
    'selective_copy': selective_copy_task(),
    'parity': Task(parity, 2, 1 / 2),
    's3': Task(s3, 6, 1 / 6),
    'segment_recall': segment_recall_task(1),
    'segment_rewrite': segment_recall_task(2),
    'passkey': passkey_task(),
}
