"""Recall a pair a segment: how many facts does each memory keep, and does it replace what is rewritten?

A segment is a key and its value, or a key and ASK (longctx/data/tasks/token_batches.py: segment_recall, and
segment_rewrite, where each key is written twice and the last value counts). Trained at 2, then at 2, 4 or
8 pairs, drawn anew at each step: memories that meet one number of segments alone forget shorter documents.
"""

import itertools
from collections.abc import Callable, Iterator

import models
import numpy as np

from experiments import shared, small_training
from longctx.data.tasks.token_batches import TASKS

TIMES = {'segment_recall': 1, 'segment_rewrite': 2}   # that each key is written
SEGMENT, ROWS, TEST_ROWS = 2, 64, 512
TRAINED, TESTED = (2, 4, 8), (2, 4, 8, 16, 32)


def length(task: str, pairs: int) -> int:
  """Tokens of a row that writes `pairs` pairs and asks for each of its keys."""
  return 2 * (pairs + pairs // TIMES[task])


def guess(pairs: int) -> float:
  """Accuracy of saying one of the values that were written."""
  return 1 / pairs + (1 - 1 / pairs) * TASKS['segment_recall'].chance


def runs(args, tier, done) -> Iterator[tuple[dict, Callable[[], dict]]]:
  """All models at one rate and seed first; then the rest of the grid, a model's runs together: they share
  their programs. With tier['recall_only_best'] seeds after the first only at the rate that was best with it."""
  names = [model for model in args.models or tier['recall'] if model in models.RECALL]
  pairs = list(itertools.product(tier['recall_tasks'], names))
  (first, *seeds), rates = tier['seeds'], tier['rates']

  def run(task, model, rate, seed):
    key = dict(task=task, model=model, learning_rate=rate, seed=seed, steps=tier['recall_steps'])
    return key, lambda: one(tested=tier['recall_pairs'], **key)

  for task, model in pairs:
    yield run(task, model, rates[0], first)
  for task, model in pairs:
    for rate in rates[1:]:
      yield run(task, model, rate, first)
    for seed in seeds:
      mine = [r for r in done if (r['task'], r['model'], r['seed']) == (task, model, first)]
      for rate in (best_rate(mine),) if tier['recall_only_best'] else rates:
        yield run(task, model, rate, seed)


def one(task: str, model: str, learning_rate: float, seed: int, steps: int,
        tested: tuple[int, ...]) -> dict:
  kind = TASKS[task]
  config = models.small(models.RECALL[model], kind.vocab_size, SEGMENT)
  programs = small_training.programs(config, SEGMENT, steps)
  rng = np.random.default_rng(seed)

  def batches():
    for step in range(steps):
      pairs = TRAINED[0] if step < steps // 5 else int(rng.choice(TRAINED))
      yield kind.make(rng, ROWS, length(task, pairs))

  trained = small_training.train(programs, batches(), steps, learning_rate, seed)
  held_out = np.random.default_rng(10_000)   # the same for all
  found = {f'accuracy_{pairs}': small_training.accuracy(
      programs, trained.params, *kind.make(held_out, TEST_ROWS, length(task, pairs)))
           for pairs in tested}
  most = length(task, tested[-1])
  return dict(parameters=small_training.count(trained.params), loss=trained.loss,
              seconds=round(trained.seconds, 1), state_floats=small_training.state_floats(config, most),
              flops_per_token=config.flops_per_token(length(task, TRAINED[-1])), **found)


def best_rate(rows: list[dict]) -> float:
  """Of one task and model: the rate of the best mean accuracy where it was trained, over the seeds that all
  rates have."""
  of = lambda rate: {r['seed']: r[f'accuracy_{TRAINED[-1]}'] for r in rows if r['learning_rate'] == rate}
  rates = sorted({r['learning_rate'] for r in rows})
  seeds = set.intersection(*(set(of(rate)) for rate in rates))
  return max(rates, key=lambda rate: np.mean([of(rate)[seed] for seed in seeds]))


def best(rows: list[dict], task: str) -> dict[str, list[dict]]:
  """model -> its rows, a seed each, at the best rate; in the order of the models' table."""
  found = {}
  for model in models.RECALL:
    if mine := [r for r in rows if (r['task'], r['model']) == (task, model)]:
      rate = best_rate(mine)
      found[model] = sorted((r for r in mine if r['learning_rate'] == rate), key=lambda r: r['seed'])
  return found


def table(rows: list[dict]) -> str:
  lines = []
  for task in TIMES:
    found = best(rows, task)
    lines += [f'{task}: accuracy at pairs written, a seed beside the other (runs made)', '',
              '| model | state, floats | rate | ' + ' | '.join(map(str, TESTED)) + ' |',
              '|---' * (len(TESTED) + 3) + '|',
              '| one of the values | | | ' + ' | '.join(f'{guess(p):.2f}' for p in TESTED) + ' |']
    for model, mine in found.items():
      cells = [' / '.join(f'{r.get(f"accuracy_{p}", np.nan):.3f}' for r in mine) for p in TESTED]
      made = sum((r['task'], r['model']) == (task, model) for r in rows)
      state = 'grows' if model == models.FULL else f'{mine[0]["state_floats"]:,}'
      lines.append(f'| {model} | {state} | {mine[0]["learning_rate"]:g} ({made}) | '
                   + ' | '.join(cells) + ' |')
    lines.append('')
  return '\n'.join(lines)


def draw(rows: list[dict], path: str) -> None:
  """Accuracy against pairs, and at 16 pairs against the size of the state."""
  def panels(figure):
    axes = figure.subplots(2, 2, width_ratios=(3, 2))
    for (left, right), task in zip(axes, TIMES):
      found = best(rows, task)
      for model, mine in found.items():
        y = np.array([[r.get(f'accuracy_{p}', np.nan) for p in TESTED] for r in mine])
        line, = left.plot(TESTED, y.mean(0), marker='.', **models.style(model))
        left.fill_between(TESTED, y.min(0), y.max(0), color=line.get_color(), alpha=0.15)
        at = mine[0]['state_floats'], y.mean(0)[TESTED.index(16)]
        right.plot(*at, 'o', markersize=4, color=line.get_color())
        right.annotate(model, at, xytext=(4, 2), textcoords='offset points', fontsize=6)
      left.plot(TESTED, [guess(p) for p in TESTED], ':', color='0.5', label='one of the values')
      left.axvline(TRAINED[-1], color='0.5', linestyle='--', linewidth=0.8)
      left.set(title=task, xlabel='pairs written (trained up to the dashed line)',
               ylabel='accuracy', ylim=(0, 1.03), xscale='log')
      left.set_xticks(TESTED, map(str, TESTED))
      left.minorticks_off()
      right.set(xlabel='state, floats a row', ylabel='accuracy at 16 pairs', xscale='log',
                ylim=(0, 1.03))
      right.margins(x=0.2)
      left.legend(fontsize=6, loc='center left', bbox_to_anchor=(1, 0.5))
  shared.draw(panels, path, width=11, height=8)
