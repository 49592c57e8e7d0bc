"""The five trials of the arena: what each trains on, for how long, and what it is asked.

    mqar      8 pairs among 64 tokens, each key asked again                              segments of 16
    rewrite   a key and its value a segment; each key twice, the last value counts        segments of 2
              trained on 2, 4 or 8 keys, asked for 8 and 16
    parity    the parity of all bits so far; trained on 40, asked up to 256               segments of 8
    passkey   three digits in one of 1 to 8 segments; asked after 16 and 64 times as many segments of 32
    books     rows of 512 bytes of the training books; held-out books read for 4,096      segments of 128

Every model meets the same batches. Each token's vector has a map of the one before it added, for all
alike (experiments/small_training.py).
"""

import glob
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import roster

from experiments import far_passkey, small_training
from longctx.data.tasks import token_batches

Batch = tuple[np.ndarray, np.ndarray]
RATES = (1e-3, 3e-3, 1e-2)
DIGITS, PASSKEY_SEGMENT = 3, 32
KEYS = token_batches.passkey_task(segment=PASSKEY_SEGMENT, digits=DIGITS)
CURRICULUM = (1, 2, 4, 8)     # segments of a passkey's document; one more length each quarter of the steps
FAR = (16, 64)                # times the longest
CALL = CURRICULUM[-1]         # segments read at once
TRAINED_PAIRS = (2, 4, 8)
LENGTH, FAR_LENGTH, FAR_ROWS = 512, 4096, 8   # of books, bytes


class Trial(NamedTuple):
  """A task, its budget and its questions."""

  vocab_size: int
  segment: int
  steps: int
  rows: int
  batch: Callable[[np.random.Generator, float, int], Batch]   # generator, part of the steps done, rows
  score: Callable[[Any, Any], dict[str, float]]               # programs, parameters -> what is asked at once
  chosen_by: str                                              # the score that chooses the rate
  far: Callable[[Any, Any], dict[str, float]] = lambda programs, params: {}   # asked of the best alone


def held_out() -> np.random.Generator:
  return np.random.default_rng(10_000)   # the same for all


def mqar(steps: int, rows: int = 64) -> Trial:
  task = token_batches.TASKS['mqar']
  ask = lambda p, params: dict(mqar=small_training.accuracy(p, params, *task.make(held_out(), 256, 64)))
  return Trial(task.vocab_size, 16, steps, rows, lambda rng, done, rows: task.make(rng, rows, 64), ask,
               'mqar')


def rewrite(steps: int, rows: int = 64) -> Trial:
  task = token_batches.TASKS['segment_rewrite']   # a key: 6 tokens, twice with a value and once to be asked

  def batch(rng, done, rows):
    keys = TRAINED_PAIRS[0] if done < 0.2 else int(rng.choice(TRAINED_PAIRS))
    return task.make(rng, rows, 6 * keys)

  ask = lambda p, params: {f'rewrite_{n}': small_training.accuracy(
      p, params, *task.make(held_out(), 256, 6 * n)) for n in (8, 16)}
  return Trial(task.vocab_size, 2, steps, rows, batch, ask, 'rewrite_8')


def parity(steps: int, rows: int = 32) -> Trial:
  task = token_batches.TASKS['parity']

  def ask(p, params):
    near = small_training.accuracy(p, params, *task.make(held_out(), 256, 40))
    tokens, targets = task.make(held_out(), 256, 256)
    targets[:, :40] = token_batches.UNSCORED
    return dict(parity_40=near, parity_256=small_training.accuracy(p, params, tokens, targets))
  return Trial(task.vocab_size, 8, steps, rows, lambda rng, done, rows: task.make(rng, rows, 40), ask,
               'parity_40')


def passkey(steps: int, rows: int = 32) -> Trial:
  def batch(rng, done, rows):
    stage = int(done * len(CURRICULUM)) + 1
    return KEYS.make(rng, rows, PASSKEY_SEGMENT * int(rng.choice(CURRICULUM[:stage])))

  def ask(p, params):
    length = PASSKEY_SEGMENT * CURRICULUM[-1]
    return dict(passkey_1=small_training.accuracy(p, params, *KEYS.make(held_out(), 256, length)))

  def far(p, params):
    document = far_passkey.Document(KEYS, 32, segment=PASSKEY_SEGMENT, call=CALL, digits=DIGITS)
    reader = far_passkey.Reader(p.graphdef, params, DIGITS)
    state = reader.fresh(params, 32, PASSKEY_SEGMENT * (CALL * FAR[-1] + 1))
    found = {}
    for i in range(FAR[-1]):
      state = reader.read(state, document.piece(i))
      if i + 1 in FAR:
        right = reader.ask(state, document.question).argmax(-1) == document.answer
        found[f'passkey_{i + 1}'] = float(right.mean())
    return found
  return Trial(KEYS.vocab_size, PASSKEY_SEGMENT, steps, rows, batch, ask, 'passkey_1', far)


def read_books(pattern: str) -> tuple[np.ndarray, np.ndarray]:
  """(bytes to train on, bytes held out): of the files in the order of their names every fourth is held out."""
  paths = sorted(glob.glob(os.path.expanduser(pattern)))
  if len(paths) < 4:
    raise SystemExit(f'--books={pattern!r}: {len(paths)} files match; give a glob of 4 or more text files')
  def load(kept: list[str]) -> np.ndarray:
    return np.concatenate([np.fromfile(path, np.uint8) for path in kept]).astype(np.int32)
  held = paths[3::4]
  train, held_out = load([path for path in paths if path not in held]), load(held)
  if min(len(train), len(held_out)) <= FAR_LENGTH + 1:
    raise SystemExit(f'--books={pattern!r}: {len(train):,} bytes to train on and {len(held_out):,} held out; '
                     f'give files with more than {FAR_LENGTH + 1:,} of each')
  return train, held_out


def books(steps: int, pattern: str, rows: int = 8) -> Trial:
  train, held = read_books(pattern)

  def rows_of(text: np.ndarray, starts: np.ndarray, length: int) -> Batch:
    pieces = text[starts[:, None] + np.arange(length + 1)]
    return pieces[:, :-1], pieces[:, 1:]

  def batch(rng, done, rows):
    return rows_of(train, rng.integers(0, len(train) - LENGTH - 1, rows), LENGTH)

  def bits(p, params, length, low):
    """Bits per byte from position `low` on, of rows spread over what is held out."""
    count = FAR_ROWS * FAR_LENGTH // length
    starts = np.linspace(0, len(held) - FAR_LENGTH - 1, count).astype(int)
    nats = [np.asarray(p.score(params, *rows_of(held, starts[i:i + FAR_ROWS], length))[0])[:, low:]
            for i in range(0, count, FAR_ROWS)]
    return float(np.mean(nats) / np.log(2))

  ask = lambda p, params: dict(books=bits(p, params, LENGTH, 0))
  far = lambda p, params: dict(books_far=bits(p, params, FAR_LENGTH, LENGTH))
  return Trial(257, 128, steps, rows, batch, ask, 'books', far)


NAMES = ('mqar', 'rewrite', 'parity', 'passkey', 'books')
MAKE = dict(mqar=mqar, rewrite=rewrite, parity=parity, passkey=passkey)


def make(name: str, steps: int, books_pattern: str) -> Trial:
  return books(steps, books_pattern) if name == 'books' else MAKE[name](steps)


def compete(name: str, model: str, steps: int, rates: tuple[float, ...], seed: int,
            books_pattern: str) -> list[dict]:
  """A line for each rate: one model on one trial. What lies far beyond is asked of the best rate alone."""
  trial = make(name, steps, books_pattern)
  config = roster.config(model, trial.vocab_size, trial.segment)
  p = small_training.programs(config, trial.segment, steps)

  def batches() -> Iterator[Batch]:
    rng = np.random.default_rng(seed)
    for step in range(steps):
      yield trial.batch(rng, step / steps, trial.rows)

  lines, held = [], []
  for rate in rates:
    trained = small_training.train(p, batches(), steps, rate, seed)
    held.append(trained.params)
    lines.append(dict(
        trial=name, model=model, learning_rate=rate, seed=seed, steps=steps,
        parameters=config.num_parameters(),
        state_floats=small_training.state_floats(config, FAR_LENGTH), loss=trained.loss,
        seconds=round(trained.seconds, 1), **trial.score(p, trained.params)))
  sign = -1 if name == 'books' else 1
  worth = [sign * line[trial.chosen_by] for line in lines]
  best = max(range(len(lines)), key=lambda i: worth[i] if np.isfinite(worth[i]) else -np.inf)
  lines[best] |= dict(best=True, **trial.far(p, held[best]))
  jax.clear_caches()
  small_training.programs.cache_clear()
  return lines
