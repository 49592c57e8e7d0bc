"""The five trials of the arena: what each trains on, and what it is asked.

    mqar      8 pairs of 64 symbols, then each key asked for among blanks: as in figure 2 of Zoology, whose
              noise is blank and does not hold keys by chance
    rewrite   2 or 8 keys, each with two values in turn: the last counts; asked for 8 and 16
    parity    the parity of all bits so far; asked of up to 64 and up to 256. 16 bits of a row are learned at
              first, and in the second half of the steps more and more: an LSTM did not learn 64 otherwise
    passkey   three digits in one of 2 or 4 segments; asked after 16 and 64 times as many
    books     rows of 512 bytes of the training books; other books read for 4,096          segments of 128

The first four are rows of 64 tokens of 64 symbols, in segments of 16: a model of them is one model, compiled
once. What is shorter has blanks behind it, of which nothing is asked.

Every model meets the same batches. Each token's vector has a map of the one before it added, for all
alike (experiments/small_training.py). The learning rate is chosen by what is asked of the validation
draw (of books: other files) and reported is the test draw, which is the same for all models and seeds.

B batch
"""

import functools
import glob
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from experiments import far_passkey, shared, small_training
from longctx.data.tasks import token_batches

Batch = tuple[np.ndarray, np.ndarray]
Asked = dict[str, np.ndarray]   # of each score, its mean over each row [B]; a row's tokens hang together
DRAWS = dict(validation=11_000, test=10_000)   # seeds
ROWS = 256                    # of a draw
ROW, SEGMENT, SYMBOLS = 64, 16, 64
BLANK = 0
DIGITS = 3
KEYS = token_batches.passkey_task(segment=SEGMENT, digits=DIGITS)
CURRICULUM = (2, 4)           # segments of a passkey's document; in the second half of the steps of both
FAR = (16, 64)                # times the longest
FAR_DOCUMENTS = 32
CALL = CURRICULUM[-1]         # segments read at once
PAIRS = 8
TRAINED_KEYS = (2, 8)         # the first alone in the first fifth of the steps
FIRST_BITS = 16
LENGTH, FAR_LENGTH, FAR_ROWS = 512, 4096, 8   # of books, bytes


class Trial(NamedTuple):
  """A task and its questions."""

  vocab_size: int
  segment: int
  batch: Callable[[np.random.Generator, float, int], Batch]   # generator, part of the steps done, rows
  ask: Callable[[Any, Any, str], Asked]   # programs, parameters, draw -> the scores where it was trained;
                                          # the first of the validation draw chooses the rate
  far: Callable[[Any, Any], Asked]        # programs, parameters -> the scores beyond, of the test draw


def answered(p: Any, params: Any, task: token_batches.Task, draw: str, length: int,
             skip: int = 0) -> np.ndarray:
  """[B]: of what each row asks from token `skip` on, the part that is right."""
  tokens, targets = task.make(np.random.default_rng(DRAWS[draw]), ROWS, length)
  targets[:, :skip] = token_batches.UNSCORED
  return small_training.right(p, params, tokens, targets) / (targets != token_batches.UNSCORED).sum(axis=1)


def padded(batch: Batch) -> Batch:
  """With blanks behind it, to ROW tokens."""
  (tokens, targets), left = batch, ROW - batch[0].shape[1]
  return (np.pad(tokens, ((0, 0), (0, left)), constant_values=BLANK),
          np.pad(targets, ((0, 0), (0, left)), constant_values=token_batches.UNSCORED))


def of_both(make: Callable[[int, int], Batch], sizes: tuple[int, int], rows: int, first: bool) -> Batch:
  """Rows of `make(rows, size)`: of the first size alone, or half of them of the second."""
  many = 0 if first else rows // 2
  parts = [padded(make(count, size)) for count, size in zip((rows - many, many), sizes) if count]
  tokens, targets = (np.concatenate(x) for x in zip(*parts))
  return tokens, targets


def recall(rng: np.random.Generator, rows: int, length: int) -> Batch:
  tokens, targets = token_batches.mqar(rng, rows, length, pairs=PAIRS, vocab_size=SYMBOLS)
  noise = targets == token_batches.UNSCORED
  noise[:, :2 * PAIRS] = False
  return np.where(noise, BLANK, tokens), targets   # BLANK is no key and no value


def mqar() -> Trial:
  task = token_batches.Task(recall, SYMBOLS, 1 / PAIRS)
  return Trial(SYMBOLS, SEGMENT, lambda rng, done, rows: recall(rng, rows, ROW),
               lambda p, params, draw: dict(mqar=answered(p, params, task, draw, ROW)),
               lambda p, params: {})


def rewrite() -> Trial:
  task = token_batches.TASKS['segment_rewrite']   # a key: 6 tokens, twice with a value and once to be asked

  def batch(rng, done, rows):
    return of_both(lambda count, keys: task.make(rng, count, 6 * keys), TRAINED_KEYS, rows, first=done < 0.2)

  return Trial(SYMBOLS, SEGMENT, batch,
               lambda p, params, draw: dict(rewrite_8=answered(p, params, task, draw, 6 * 8)),
               lambda p, params: dict(rewrite_16=answered(p, params, task, 'test', 6 * 16)))


def parity() -> Trial:
  task = token_batches.TASKS['parity']

  def batch(rng, done, rows):
    tokens, targets = task.make(rng, rows, ROW)
    part = min(1, max(0, (done - 0.5) / 0.4))   # a tenth of the steps has all bits
    targets[:, int(FIRST_BITS + part * (ROW - FIRST_BITS)):] = token_batches.UNSCORED
    return tokens, targets

  return Trial(SYMBOLS, SEGMENT, batch,
               lambda p, params, draw: dict(parity_64=answered(p, params, task, draw, ROW)),
               lambda p, params: dict(parity_256=answered(p, params, task, 'test', 256, skip=ROW)))


@functools.lru_cache(maxsize=1)
def reader(graphdef: Any) -> far_passkey.Reader:
  return far_passkey.Reader(graphdef, None, DIGITS)


def passkey() -> Trial:
  def batch(rng, done, rows):
    return of_both(lambda count, segments: KEYS.make(rng, count, SEGMENT * segments), CURRICULUM, rows,
                   first=done < 0.5)

  def far(p, params):
    document = far_passkey.Document(KEYS, FAR_DOCUMENTS, segment=SEGMENT, call=CALL, digits=DIGITS)
    read = reader(p.graphdef).of(params)
    state = read.fresh(params, FAR_DOCUMENTS, SEGMENT * (CALL * FAR[-1] + 1))
    found = {}
    for i in range(FAR[-1]):
      state = read.read(state, document.piece(i))
      if i + 1 in FAR:
        right = read.ask(state, document.question).argmax(-1) == document.answer
        found[f'passkey_{i + 1}'] = right.mean(axis=1)
    return found

  return Trial(SYMBOLS, SEGMENT, batch, lambda p, params, draw: dict(
      passkey_1=answered(p, params, KEYS, draw, SEGMENT * CALL)), far)


class Books(NamedTuple):
  train: np.ndarray        # bytes, int32
  validation: np.ndarray
  test: np.ndarray
  digest: str              # of all files


@functools.lru_cache(maxsize=1)
def read_books(pattern: str) -> Books:
  """Of each four files in the order of their names the third is the validation's, the fourth the test's."""
  paths = sorted(glob.glob(os.path.expanduser(pattern)))
  if len(paths) < 4:
    raise SystemExit(f'--books={pattern!r}: {len(paths)} files match; give a glob of 4 or more text files')
  def load(kept: list[str]) -> np.ndarray:
    return np.concatenate([np.fromfile(path, np.uint8) for path in kept]).astype(np.int32)
  validation, test = paths[2::4], paths[3::4]
  found = Books(load([path for path in paths if path not in validation + test]), load(validation),
                load(test), shared.digest(paths))
  sizes = [len(text) for text in found[:3]]
  if min(sizes) <= FAR_LENGTH + 1:
    raise SystemExit(f'--books={pattern!r}: {sizes[0]:,} bytes to train on, {sizes[1]:,} to choose by and '
                     f'{sizes[2]:,} of the test; give files with more than {FAR_LENGTH + 1:,} of each')
  return found


def books(pattern: str) -> Trial:
  texts = read_books(pattern)

  def rows_of(text: np.ndarray, starts: np.ndarray, length: int) -> Batch:
    pieces = text[starts[:, None] + np.arange(length + 1)]
    return pieces[:, :-1], pieces[:, 1:]

  def batch(rng, done, rows):
    return rows_of(texts.train, rng.integers(0, len(texts.train) - LENGTH - 1, rows), LENGTH)

  def bits(p, params, text, length, skip=0):
    """[B]: bits per byte from position `skip` on, of rows spread over the text."""
    count = FAR_ROWS * FAR_LENGTH // length
    starts = np.linspace(0, len(text) - FAR_LENGTH - 1, count).astype(int)
    nats = [np.asarray(p.score(params, *rows_of(text, starts[i:i + FAR_ROWS], length))[0])
            for i in range(0, count, FAR_ROWS)]
    return np.concatenate(nats)[:, skip:].mean(axis=1) / np.log(2)

  return Trial(257, 128, batch,
               lambda p, params, draw: dict(books=bits(p, params, getattr(texts, draw), LENGTH)),
               lambda p, params: dict(books_far=bits(p, params, texts.test, FAR_LENGTH, skip=LENGTH)))


MAKE = dict(mqar=mqar, rewrite=rewrite, parity=parity, passkey=passkey)
NAMES = (*MAKE, 'books')
LESS_IS_MORE = ('books', 'books_far')   # scores


def make(name: str, books_pattern: str) -> Trial:
  return books(books_pattern) if name == 'books' else MAKE[name]()
