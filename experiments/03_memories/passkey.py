"""A passkey in 1,048,576 tokens of noise, after training on at most 16 segments of 64.

The mark and five digits stand in one of a document's first 16 segments; then noise; after 16, 64, ...
16,384 segments the mark is shown again and the digits are asked for, from the state as it is. The reading
process (reading.py) looks at its resident memory after each call. Then one row of such a document in two
more processes: one reads half, saves the context and reads on; the other reads on from the file. Their
logits must agree in every bit.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import models
import numpy as np

from experiments import far_passkey, shared, small_training
from longctx.data.tasks import token_batches

SEGMENT, DIGITS, TRAIN_ROWS, ROWS = 64, 5, 32, 8
CURRICULUM = (1, 2, 4, 8, 16)   # segments; one more length each fifth of the steps
CALL = 16                       # segments a call of the stream
TASK = token_batches.TASKS['passkey']
# Digits of a key differ and each is asked for with the right ones before it: a tenth of the first can be guessed,
# a ninth of the second.
CHANCE = sum(1 / (10 - i) for i in range(DIGITS)) / DIGITS


def lengths(most: int) -> list[int]:
  """Segments behind which the digits are asked for: 16, 64, 256, ..."""
  return [n for n in (CALL * 4 ** i for i in range(12)) if n <= most]


def runs(args, tier, done) -> Iterator[tuple[dict, Callable[[], dict]]]:
  for seed in tier['seeds']:
    for rate in tier['passkey_rates']:
      for model in args.models or tier['passkey']:
        if model in models.PASSKEY:
          key = dict(model=model, learning_rate=rate, seed=seed, steps=tier['passkey_steps'],
                     segments=tier['passkey_segments'])
          yield key, lambda key=key: one(curriculum=tier['passkey_curriculum'], **key)


def config_of(model: str) -> Any:
  return models.small(models.PASSKEY[model], TASK.vocab_size, SEGMENT)


def one(model: str, learning_rate: float, seed: int, steps: int, segments: int,
        curriculum: tuple[int, ...]) -> dict:
  config = config_of(model)
  programs = small_training.programs(config, SEGMENT, steps)
  rng = np.random.default_rng(seed)

  def batches():
    for step in range(steps):
      stage = step * len(curriculum) // steps + 1
      yield TASK.make(rng, TRAIN_ROWS, SEGMENT * int(rng.choice(curriculum[:stage])))

  trained = small_training.train(programs, batches(), steps, learning_rate, seed)
  row = dict(parameters=small_training.count(trained.params), loss=trained.loss,
             train_seconds=round(trained.seconds, 1),
             state_floats=small_training.state_floats(config, 1))
  held_out = np.random.default_rng(10_000)
  for count in curriculum:
    row[f'whole_{count}'] = small_training.accuracy(
        programs, trained.params, *TASK.make(held_out, 64, SEGMENT * count))
  return row | read_apart(trained.params, model, segments)


def read_apart(params: Any, model: str, segments: int) -> dict:
  """What other processes found, reading with these parameters."""
  program = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'reading.py')
  with tempfile.TemporaryDirectory() as folder:
    at = lambda name: os.path.join(folder, name)
    np.savez(at('parameters.npz'), *jax.tree.leaves(params))
    for what in ('all', 'first', 'second'):
      subprocess.run([sys.executable, program, folder, model, str(segments), what], check=True)
    with open(at('all.json'), encoding='utf-8') as file:
      found = json.load(file)
    same = np.load(at('first.npy')).tobytes() == np.load(at('second.npy')).tobytes()
    return found | dict(same_bits=same, context_bytes=os.path.getsize(at('half.lcm')))


def document(rows: int) -> far_passkey.Document:
  return far_passkey.Document(TASK, rows, segment=SEGMENT, call=CALL, digits=DIGITS)


def stream(reader: far_passkey.Reader, segments: int) -> dict:
  """Accuracy of the digits after so many segments, and resident memory on the way."""
  text, found, sizes = document(ROWS), {}, []
  state, begin = reader.fresh(reader.params, ROWS, 0), time.perf_counter()
  for i in range(segments // CALL):
    state = jax.block_until_ready(reader.read(state, text.piece(i)))
    if (i + 1) * CALL in lengths(segments):
      logits = reader.ask(state, text.question)
      if not np.isfinite(logits).all():
        raise FloatingPointError(f'logits after {i + 1} calls are not finite')
      right = logits.argmax(-1) == text.answer
      found[f'accuracy_{(i + 1) * CALL}'] = float(right.mean())
      found[f'keys_{(i + 1) * CALL}'] = float(right.all(1).mean())
      found[f'digits_{(i + 1) * CALL}'] = right.sum(1).tolist()   # of each document
    sizes.append(shared.resident())
  seconds = time.perf_counter() - begin
  return found | dict(
      tokens=segments * SEGMENT, tokens_per_second=round(ROWS * segments * SEGMENT / seconds),
      **growth(sizes), curve=sizes[::max(1, len(sizes) // 64)])


def growth(sizes: list[int]) -> dict:
  """How far the most of the second half is above the most from a tenth to the half.

  Not above one sample: what a process has resident jumps up and down by what the allocator holds.
  """
  early, late = max(sizes[len(sizes) // 10:len(sizes) // 2]), max(sizes[len(sizes) // 2:])
  return dict(resident_early=early, growth=round(late / early - 1, 4), growth_samples=len(sizes))


def table(rows: list[dict]) -> str:
  most = max((r['segments'] for r in rows), default=0)
  counts = lengths(most)
  lines = ['digits right after so many segments of 64 (trained on 1 to 16), and keys right as a whole', '',
           '| model | rate, seed | state, floats | ' + ' | '.join(f'{n:,}' for n in counts)
           + ' | memory grows by | saved, answered elsewhere | tokens/s |',
           '|---' * (len(counts) + 6) + '|']
  for r in sorted(rows, key=lambda r: r['model']):
    cells = ' | '.join(f'{r[f"accuracy_{n}"]:.2f}, {ROWS * r[f"keys_{n}"]:.0f} of {ROWS}'
                       if f'accuracy_{n}' in r else '-' for n in counts)
    same = 'the same bits' if r['same_bits'] else '**other bits**'
    lines.append(f'| {r["model"]} | {r["learning_rate"]:g}, {r["seed"]} | {r["state_floats"]:,} | '
                 f'{cells} | {100 * r["growth"]:.1f} % | {same} | {r["tokens_per_second"]:,} |')
  return '\n'.join(lines)


def draw(rows: list[dict], path: str) -> None:
  def panels(figure):
    left, right = figure.subplots(1, 2)
    for model in dict.fromkeys(r['model'] for r in rows):
      r = max((r for r in rows if r['model'] == model), key=lambda r: r[f'accuracy_{lengths(r["segments"])[0]}'])
      counts = lengths(r['segments'])
      left.plot(counts, [r[f'accuracy_{n}'] for n in counts], marker='.',
                **models.style(model))
      right.plot(np.linspace(0, r['tokens'], len(r['curve'])), np.array(r['curve']) / 2 ** 20,
                 **models.style(model))
    left.axhline(CHANCE, color='0.5', linestyle=':')
    left.axvline(CURRICULUM[-1], color='0.5', linestyle='--', linewidth=0.8)
    left.set(xscale='log', xlabel='segments of 64 tokens (trained up to the dashed line)',
             ylabel='digits right', ylim=(0, 1.03))
    right.set(xlabel='tokens read', ylabel='resident memory, MiB', ylim=(0, None))
    left.legend(fontsize=6)
  shared.draw(panels, path, width=11, height=4)
