"""What both sides share: the shape, the batch, and a process that makes steps when it is told to.

A worker compiles, makes its first steps, prints one JSON line {"parameters", "start_seconds"}, and
then for every line `n` on stdin makes n steps and prints {"wall", "cpu", "loss"}: seconds a step on
the clock and on all cores, and the last loss.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable

import numpy as np

WARM_STEPS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
  for name, value in (('length', 256), ('batch', 12), ('vocab', 257), ('layers', 4), ('heads', 4),
                      ('dim', 128)):
    parser.add_argument(f'--{name}', type=int, default=value)


def batch(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
  """(tokens, targets), the same on both sides."""
  rows = np.random.RandomState(0).randint(0, args.vocab, (args.batch, args.length + 1))
  return rows[:, :-1].astype(np.int32), rows[:, 1:].astype(np.int32)


def serve(step: Callable[[], float], parameters: int) -> None:
  began = time.perf_counter()
  for _ in range(WARM_STEPS):
    step()
  say(parameters=parameters, start_seconds=time.perf_counter() - began)
  for line in sys.stdin:
    count = int(line)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
      loss = step()
    say(wall=(time.perf_counter() - wall) / count, cpu=(time.process_time() - cpu) / count,
        loss=loss)


def say(**record) -> None:
  print(json.dumps(record), flush=True)
