"""Saves, loads, forks and drops contexts of the store FOLDER for a while, as process NUMBER of several."""

import random
import sys

import numpy as np

from longctx import store
from longctx.errors import ConfigError

IDENTITY = store.Identity(model='toy', config={'size': 1}, parameters='0' * 64, tokenizer='bytes')
BUDGET, NAMES, ROUNDS = 60_000, 12, 60


def make(number: int, size: int = 1000) -> store.Context:
  """A context that says of itself who wrote it, all over."""
  return store.take({'x': np.full((1, size), number, np.int32)}, IDENTITY, tokens=number)


if __name__ == '__main__':
  folder, number = sys.argv[1], int(sys.argv[2])
  rng = random.Random(number)
  contexts = store.Store(folder, budget=BUDGET, make=True)
  for i in range(ROUNDS):
    name = f'c{rng.randrange(NAMES)}'
    try:
      if rng.random() < 0.6:
        contexts.save(name, make(1000 * number + i))
      elif rng.random() < 0.7:
        contexts.load(name)
      else:
        contexts.fork(name, f'fork{number}-{i}')
    except ConfigError as e:   # dropped by the other; the other was first
      if 'there is none' not in str(e) and 'there already' not in str(e):
        raise
  print('done')
