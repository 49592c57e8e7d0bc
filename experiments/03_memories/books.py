"""Books by bytes, at equal parameters and tokens: what does each memory know at which place of a book?

Each row is a run of longctx.main with configs/books_memory.py, the fields of models.BOOKS, and an MLP as
wide as makes it 3M parameters; its workdir stays in results/books/<model>, and a run that was killed
carries on there. Whole held-out books are read from their first byte, the memory carried on.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import models
import numpy as np

from configs import books_memory
from experiments import shared, small_training
from longctx import configuration
from longctx.training import workdir

PARAMETERS, VOCAB = 3_000_000, 257
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def runs(args, tier, done) -> Iterator[tuple[dict, Callable[[], dict]]]:
  for model in args.models or tier['books']:
    if model in models.BOOKS:
      key = dict(model=model, steps=tier['books_steps'], debug=tier['books_debug'])
      yield key, lambda key=key: one(args.books, args.out, **key)


def at_budget(fields: dict[str, Any], parameters: int) -> Any:
  """The model's config with the width of MLP that makes it as many parameters as may be."""
  base = configuration.parts(books_memory.get_config()).model
  made = lambda width: dataclasses.replace(base, vocab_size=VOCAB, mlp_dim=width, **fields)
  return min(map(made, range(64, 1025, 8)), key=lambda c: abs(c.num_parameters() - parameters))


def one(files: str, out: str, model: str, steps: int, debug: bool) -> dict:
  fields = models.BOOKS[model]
  given = fields if debug else fields | dict(mlp_dim=at_budget(fields, PARAMETERS).mlp_dim)
  folder = os.path.join(out, 'books', f'{model}_{steps}')
  command = [sys.executable, '-m', 'longctx.main',
             f'--config={ROOT}/configs/books_memory.py' + ':debug' * debug, f'--workdir={folder}',
             '--config.data.corpus=files', f'--config.data.files={os.path.abspath(files)}',
             f'--config.run.num_steps={steps}',
             *(['--config.optimizer.gate_rate=1.0'] if model in models.GATES_AT_ONE else []),
             *(f'--config.model.{name}={value}' for name, value in given.items())]
  subprocess.run(command, check=True, cwd=ROOT, stdout=sys.stderr)
  with open(os.path.join(folder, 'evaluation.json'), encoding='utf-8') as file:
    found = json.load(file)
  with open(os.path.join(folder, 'metrics.jsonl'), encoding='utf-8') as file:
    lines = [json.loads(line) for line in file]
  rates = [line['tokens_per_second'] for line in lines if 'tokens_per_second' in line]
  config = configuration.parts(workdir.load_config(folder)).model.resolved(VOCAB)
  gates = {name: x for line in lines for name, x in line.items() if name.startswith('gate_')}   # the last
  positions = found['modes']['full']['positions']
  return dict(parameters=config.num_parameters(), state_floats=small_training.state_floats(config, 0),
              bits_per_byte=found['bits_per_byte'], tokens_per_second=round(statistics.median(rates)),
              read_tokens_per_second=round(found['tokens_per_second']),
              gates=gates, curve=[[line['step'], line['bits_per_byte']] for line in lines if 'bits_per_byte' in line],
              mlp_dim=config.mlp_dim, bytes=found['modes']['full']['bytes'],
              first=[p['first'] for p in positions], last=[p['last'] for p in positions],
              bits=[p['bits_per_byte'] for p in positions])


PLACES = (256, 512, 4096, 32_768, 131_072)   # first positions of bins that the table shows


def table(rows: list[dict]) -> str:
  lines = ['bits per byte of held-out books, all and by position in the book', '',
           '| model | parameters | state, floats | all | ' +
           ' | '.join(f'{p:,} to {2 * p - 1:,}' for p in PLACES) + ' | tokens/s, training | reading |',
           '|---' * (len(PLACES) + 6) + '|']
  for r in sorted(rows, key=lambda r: r['bits_per_byte']):
    at = dict(zip(r['first'], r['bits']))
    cells = [f'{at[p]:.3f}' if at.get(p) else '-' for p in PLACES]
    lines.append(f'| {r["model"]} | {r["parameters"]:,} | {r["state_floats"]:,} | '
                 f'{r["bits_per_byte"]:.4f} | ' + ' | '.join(cells)
                 + f' | {r["tokens_per_second"]:,} | {r["read_tokens_per_second"]:,} |')
  return '\n'.join(lines)


def draw(rows: list[dict], path: str) -> None:
  """Bits by position, and what each saves against no memory."""
  def panels(figure):
    left, right = figure.subplots(1, 2)
    plain = next((r for r in rows if r['model'] == 'no_memory'), None)
    for r in rows:
      x, y = np.array(r['first'], float) + 1, np.array(r['bits'], float)
      keep = x >= 64
      left.plot(x[keep], y[keep], marker='.', **models.style(r['model']))
      if plain is not None and len(plain['bits']) == len(y):
        right.plot(x[keep], (np.array(plain['bits'], float) - y)[keep], marker='.',
                   **models.style(r['model']))
    left.set(xscale='log', xlabel='position in the book, bytes', ylabel='bits per byte')
    right.set(xscale='log', xlabel='position in the book, bytes',
              ylabel='bits per byte less than without a memory')
    right.axhline(0, color='0.5', linewidth=0.8)
    left.legend(fontsize=6)
  shared.draw(panels, path, width=11, height=4)
