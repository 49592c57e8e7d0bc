"""One run: a model on a trial at a learning rate, trained, asked, and made a line of the results."""

import functools
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import roster
import trials

from experiments import small_training

KEY = ('trial', 'model', 'steps', 'rows', 'learning_rate', 'seed', 'files')   # what a line is a line of
RATES = (3e-3, 1e-3, 1e-2)   # all models meet the first before any meets another


def key_of(line: dict) -> tuple:
  return tuple(line.get(field) for field in KEY)   # `files`, a digest: of books alone


@functools.lru_cache(maxsize=1)
def forget_others(model: str) -> None:
  """Drops the programs of the model before, once; those of one model serve all its trials, rates and seeds."""
  small_training.programs.cache_clear()
  trials.reader.cache_clear()
  jax.clear_caches()


def prepared(trial: str, model: str, steps: int, books_pattern: str) -> tuple[trials.Trial, Any, Any]:
  """(trial, config, programs)."""
  forget_others(model)
  made = trials.make(trial, books_pattern)
  config = roster.config(model, made.vocab_size, made.segment)
  return made, config, small_training.programs(config, made.segment, steps)


def compete(run: dict, books_pattern: str) -> dict:
  """The line of a run, which is the fields of KEY.

  Each score has the standard error of its mean over the test's rows, and how many rows these are; the
  validation's score is what a rate is chosen by. Seconds are of this process's CPU, compilation within.
  """
  trial, config, p = prepared(run['trial'], run['model'], run['steps'], books_pattern)
  steps, rows, seed = run['steps'], run['rows'], run['seed']

  def batches() -> Iterator[trials.Batch]:
    rng = np.random.default_rng(seed)
    for step in range(steps):
      yield trial.batch(rng, step / steps, rows)

  trained = small_training.train(p, batches(), steps, run['learning_rate'], seed)
  begin = time.process_time()
  chosen_by = next(iter(trial.ask(p, trained.params, 'validation').values()))
  asked = trial.ask(p, trained.params, 'test') | trial.far(p, trained.params)
  return run | dict(
      parameters=config.num_parameters(), loss=trained.loss, validation=float(chosen_by.mean()),
      **{name: float(by_row.mean()) for name, by_row in asked.items()},
      standard_errors={name: float(by_row.std(ddof=1) / math.sqrt(len(by_row)))
                       for name, by_row in asked.items()},
      examples={name: len(by_row) for name, by_row in asked.items()},
      state_floats=small_training.state_floats(config, trials.FAR_LENGTH),
      train_seconds=round(trained.seconds, 1), test_seconds=round(time.process_time() - begin, 1),
      device=jax.devices()[0].device_kind)
