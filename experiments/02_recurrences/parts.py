"""The three parts of experiment 02: `runs` yields (key, work), `table` and `draw` show all lines."""

import itertools
import os
import pathlib
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import small_models
from flax import nnx
from training import Trained

from experiments import shared
from longctx.assembly import make_model
from longctx.data.tasks.token_batches import TASKS

TEST_ROWS = 256
LENGTHS = {   # trained at, tested at
    'mqar': (64, (64,)), 'selective_copy': (64, (64,)), 'parity': (40, (40, 256)),
    's3': (40, (40, 256)),
}
Runs = Iterator[tuple[dict, Callable[[], dict]]]


class Tasks:
  """Recall and state tracking: two layers of width 64, no MLP, a grid of learning rates, two seeds."""

  @staticmethod
  def runs(models, tier, args, done) -> Runs:
    """With tier['only_best'], seeds after the first only at the rate that was best with it."""
    names = tuple(filter(None, args.tasks.split(','))) or tier['tasks']
    for seed, task, model, rate in itertools.product(tier['seeds'], names, models, tier['rates']):
      steps, rows = tier['learned'][task]
      first = [r for r in done if (r['task'], r['model'], r['seed']) == (task, model, tier['seeds'][0])]
      if seed != tier['seeds'][0] and tier.get('only_best') and Tasks.best_rate(first) != rate:
        continue
      key = dict(task=task, model=model, learning_rate=rate, seed=seed, steps=steps, rows=rows)
      yield key, lambda key=key: Tasks.one(**key)

  @staticmethod
  def one(task, model, learning_rate, seed, steps, rows) -> dict:
    kind, (length, tests) = TASKS[task], LENGTHS[task]
    config = small_models.config(model, vocab_size=kind.vocab_size, dim=64, layers=2, mlp=False)
    rng = np.random.default_rng(seed)
    batches = iter(lambda: kind.make(rng, rows, length), None)
    trained = Trained(config, batches, steps, learning_rate, seed)
    row = dict(parameters=config.num_parameters(), seconds=round(trained.seconds, 2),
               loss=trained.loss)
    held_out = np.random.default_rng(10_000)   # the same for all
    for test in tests:
      _, by_position = trained.score(*kind.make(held_out, TEST_ROWS, test))
      beyond = by_position[length:] if test > length else by_position
      row[f'accuracy_{test}'] = float(np.nanmean(beyond))
      row[f'by_position_{test}'] = [None if np.isnan(x) else round(float(x), 4) for x in by_position]
    return row

  @staticmethod
  def best(rows: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """(task, model) -> its rows at the learning rate that did best where it was trained."""
    found = {}
    for task, model in dict.fromkeys((r['task'], r['model']) for r in rows):
      mine = [r for r in rows if (r['task'], r['model']) == (task, model)]
      rate = Tasks.best_rate(mine)
      found[task, model] = [r for r in mine if r['learning_rate'] == rate]
    return found

  @staticmethod
  def best_rate(rows: list[dict]) -> float:
    """Of one task and model: the rate of the best mean accuracy where it was trained, over the seeds
    that all rates have; of equals, that of more seeds."""
    name = f'accuracy_{LENGTHS[rows[0]["task"]][0]}'
    of = lambda rate: {r['seed']: r[name] for r in rows if r['learning_rate'] == rate}
    rates = sorted({r['learning_rate'] for r in rows})
    seeds = set.intersection(*(set(of(rate)) for rate in rates))
    return max(rates, key=lambda rate: (np.mean([of(rate)[seed] for seed in seeds]), len(of(rate))))

  @staticmethod
  def table(rows: list[dict]) -> str:
    best = Tasks.best(rows)
    columns = [(task, test) for task in dict.fromkeys(t for t, _ in best)
               for test in LENGTHS[task][1]]
    title = lambda task, test: f'{task} {test}' if test == LENGTHS[task][0] else f'{task} 41-{test}'
    lines = ['| model | ' + ' | '.join(title(*c) for c in columns) + ' |',
             '|---' * (len(columns) + 1) + '|',
             '| chance | ' + ' | '.join(f'{TASKS[t].chance:.3f}' for t, _ in columns) + ' |']
    for model in dict.fromkeys(m for _, m in best):
      cells = []
      for task, test in columns:
        found = [r[f'accuracy_{test}'] for r in best.get((task, model), [])]
        cells.append(' / '.join(f'{x:.3f}' for x in found) or '-')
      lines.append(f'| {model} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)

  @staticmethod
  def draw(rows: list[dict], path: str) -> None:
    best = Tasks.best(rows)
    names = list(dict.fromkeys(task for task, _ in best))

    def panels(figure):
      axes = figure.subplots(1, len(names), squeeze=False)[0]
      for axis, task in zip(axes, names):
        length, tests = LENGTHS[task]
        for model in dict.fromkeys(m for t, m in best if t == task):
          y = np.array([r[f'by_position_{tests[-1]}'] for r in best[task, model]], float).mean(0)
          at = np.flatnonzero(~np.isnan(y))
          axis.plot(at, y[at], marker='.', markersize=2, linewidth=1, label=model, **style(model))
        axis.axhline(TASKS[task].chance, color='0.5', linestyle=':')
        if tests[-1] > length:
          axis.axvline(length, color='0.5', linestyle='--')
        axis.set(title=task, xlabel='position', ylabel='accuracy', ylim=(0, 1.03))
      axes[-1].legend(fontsize=6, loc='center left', bbox_to_anchor=(1, 0.5))
    shared.draw(panels, path, width=4.5 * len(names) + 1.5, height=4)


class Text:
  """Characters of one text at equal parameters and tokens: bits per byte, and what it cost."""

  PARAMETERS, LENGTH, ROWS = 800_000, 256, 8

  @staticmethod
  def runs(models, tier, args, done) -> Runs:
    del done
    text = read_text(args.text)
    for model in models:
      key = dict(model=model, steps=tier['text_steps'], learning_rate=3e-3, seed=0)
      yield key, lambda key=key: Text.one(text, tier['text_batches'], **key)

  @staticmethod
  def one(text: np.ndarray, batches_held_out: int, *, model: str, steps: int,
          learning_rate: float, seed: int) -> dict:
    config = small_models.at_budget(model, Text.PARAMETERS, vocab_size=256, dim=128, layers=3,
                                    mlp=True)
    split = int(0.9 * len(text))
    rng, curve = np.random.default_rng(seed), []

    def batches():
      while True:
        at = rng.integers(0, split - Text.LENGTH - 1, (Text.ROWS, 1)) + np.arange(Text.LENGTH + 1)
        yield text[at[:, :-1]], text[at[:, 1:]]

    trained = Trained(config, batches(), steps, learning_rate, seed,
                      lambda step, loss, seconds: curve.append(
                          [step * Text.ROWS * Text.LENGTH, round(loss / np.log(2), 4),
                           round(seconds, 2)]))
    held_out = text[split:]
    count = min((len(held_out) - 1) // Text.LENGTH // Text.ROWS, batches_held_out) * Text.ROWS
    at = np.arange(count)[:, None] * Text.LENGTH + np.arange(Text.LENGTH + 1)
    nats = [trained.score(held_out[rows[:, :-1]], held_out[rows[:, 1:]])[0]
            for rows in np.split(at, count // Text.ROWS)]
    return dict(parameters=config.num_parameters(), bits_per_byte=float(np.mean(nats) / np.log(2)),
                seconds=round(trained.seconds, 1), curve=curve,
                tokens_per_second=round(steps * Text.ROWS * Text.LENGTH / trained.seconds))

  @staticmethod
  def table(rows: list[dict]) -> str:
    lines = ['| model | parameters | bits per byte, held out | tokens/s of CPU |', '|---|---|---|---|']
    return '\n'.join(lines + [
        f'| {r["model"]} | {r["parameters"]:,} | {r["bits_per_byte"]:.3f} | '
        f'{r["tokens_per_second"]:,} |' for r in sorted(rows, key=lambda r: r['bits_per_byte'])])

  @staticmethod
  def draw(rows: list[dict], path: str) -> None:
    def panels(figure):
      axes = figure.subplots(1, 2)
      for axis, column, label in zip(axes, (0, 2), ('tokens', 'CPU seconds')):
        for r in rows:
          axis.plot([c[column] for c in r['curve']], [c[1] for c in r['curve']], linewidth=1,
                    label=r['model'], **style(r['model']))
        axis.set(xlabel=label, ylabel='bits per byte of a batch', xscale='log')
      axes[1].legend(fontsize=6, loc='center left', bbox_to_anchor=(1, 0.5))
    shared.draw(panels, path, width=11, height=4)


class Stream:
  """A document without an end through each model whose state does not grow: resident memory."""

  CHUNK = 1024

  @staticmethod
  def runs(models, tier, args, done) -> Runs:
    del args, done
    for model in models:
      if model not in (small_models.ATTENTION, small_models.GRIFFIN):
        key = dict(model=model, tokens=tier['stream'])
        yield key, lambda key=key: Stream.one(**key)

  @staticmethod
  def one(model: str, tokens: int) -> dict:
    config = small_models.config(model, vocab_size=256, dim=64, layers=2, mlp=False)
    graphdef, params = nnx.split(make_model(config, jax.random.key(0)))
    step = jax.jit(lambda params, state, tokens: nnx.merge(graphdef, params)(tokens, state),
                   donate_argnums=1)
    state = jax.jit(lambda params: nnx.merge(graphdef, params).init_state(1))(params)
    rng, begin, sizes = np.random.default_rng(0), time.perf_counter(), []
    for _ in range(tokens // Stream.CHUNK):
      chunk = rng.integers(0, 256, (1, Stream.CHUNK), dtype=np.int32)
      hidden, state = step(params, state, chunk)
      hidden = float(jnp.abs(hidden).max())   # waits, and would show what is not finite
      if not np.isfinite(hidden):
        raise FloatingPointError(f'{model}: hidden states are not finite')
      sizes.append(shared.resident())
    tenth = sizes[len(sizes) // 10]
    return dict(seconds=round(time.perf_counter() - begin, 1), resident_at_tenth=tenth,
                resident_most_after=max(sizes[len(sizes) // 10:]),
                growth=round(max(sizes[len(sizes) // 10:]) / tenth - 1, 4),
                state_bytes=sum(x.nbytes for x in jax.tree.leaves(state)),
                curve=sizes[::max(1, len(sizes) // 64)])

  @staticmethod
  def table(rows: list[dict]) -> str:
    lines = ['| model | tokens | state, bytes | resident memory grows by | seconds |',
             '|---|---|---|---|---|']
    return '\n'.join(lines + [
        f'| {r["model"]} | {r["tokens"]:,} | {r["state_bytes"]:,} | {100 * r["growth"]:.1f} % | '
        f'{r["seconds"]:.0f} |' for r in rows])

  @staticmethod
  def draw(rows: list[dict], path: str) -> None:
    def panels(figure):
      axis = figure.subplots()
      for r in rows:
        axis.plot(np.linspace(0, r['tokens'], len(r['curve'])), np.array(r['curve']) / 2 ** 20,
                  linewidth=1, label=r['model'], **style(r['model']))
      axis.set(xlabel='tokens read', ylabel='resident memory, MiB', ylim=(0, None))
      axis.legend(fontsize=6, loc='center left', bbox_to_anchor=(1, 0.5))
    shared.draw(panels, path, width=8, height=4)


def style(model: str) -> dict[str, str]:
  """The same colour and dashes for a model in every figure."""
  i = small_models.NAMES.index(model)
  return dict(color=f'C{i % 10}', linestyle=('-', '--', ':')[i // 10])


def read_text(path: str) -> np.ndarray:
  """Bytes of a text file; without one, of the sources of Python's standard library."""
  if path:
    with open(path, 'rb') as file:
      data = file.read()
  else:
    sources = sorted(pathlib.Path(os.__file__).parent.glob('*.py'))
    data = b''.join(source.read_bytes() for source in sources)[:1_200_000]
  return np.frombuffer(data, np.uint8).astype(np.int32)


PARTS = {'tasks': Tasks, 'text': Text, 'stream': Stream}
