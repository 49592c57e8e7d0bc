"""The arena's table and figures, from the lines of all runs."""

import os
from typing import Any

import numpy as np
import roster

from experiments import shared

# A column: the field, its title, whether more is better. Trials of which a column is the judge stand first.
COLUMNS = (
    ('mqar', 'mqar', True), ('rewrite_8', 'rewrite 8', True), ('rewrite_16', 'rewrite 16', True),
    ('parity_40', 'parity 40', True), ('parity_256', 'parity 41-256', True),
    ('passkey_1', 'passkey', True), ('passkey_16', 'passkey 16x', True),
    ('passkey_64', 'passkey 64x', True), ('books', 'books, bits', False),
    ('books_far', 'books beyond 512', False))
LESS_IS_MORE = tuple(name for name, _, up in COLUMNS if not up)
RANKED = ('mqar', 'rewrite_16', 'parity_256', 'passkey_16', 'books_far')   # one of each trial
# The commonest of the values that were written last: drawn 100,000 times. A passkey's digits differ.
CHANCE = dict(mqar=1 / 8, rewrite_8=0.258, rewrite_16=0.192, parity_40=0.5, parity_256=0.5,
              passkey_1=0.112, passkey_16=0.112, passkey_64=0.112)


def best_lines(rows: list[dict]) -> dict[str, dict[str, list[float]]]:
  """model -> field -> its value at each seed, at the best rate of the seed."""
  found: dict[str, dict[str, list[float]]] = {}
  for r in rows:
    if r.get('best'):
      fields = found.setdefault(r['model'], {})
      for name, _, _ in COLUMNS:
        if name in r:
          fields.setdefault(name, []).append(r[name])
      fields.setdefault('seconds', []).append(r['seconds'])
      fields.setdefault('state', []).append(r['state_floats'])
  return {name: found[name] for name in roster.NAMES if name in found}


def ranks(found: dict[str, dict[str, list[float]]]) -> dict[str, float]:
  """The mean place over what every model was asked: 1 is first; equals share a place."""
  places: dict[str, list[float]] = {name: [] for name in found}
  for field in RANKED:
    if not all(field in fields for fields in found.values()):
      continue
    sign = -1 if field in LESS_IS_MORE else 1
    value = {name: sign * round(float(np.mean(fields[field])), 3) for name, fields in found.items()}
    value = {name: x if np.isfinite(x) else -np.inf for name, x in value.items()}   # the last
    for name in found:
      better = sum(v > value[name] for v in value.values())
      equal = sum(v == value[name] for v in value.values())
      places[name].append(better + (equal + 1) / 2)
  return {name: float(np.mean(p)) if p else float('nan') for name, p in places.items()}


def table(rows: list[dict]) -> str:
  """Models by their mean place; a dash is what was not run."""
  found = best_lines(rows)
  place = ranks(found)
  lines = ['| model | mean place | ' + ' | '.join(title for _, title, _ in COLUMNS)
           + ' | largest state, floats | CPU minutes |', '|---' * (len(COLUMNS) + 4) + '|',
           '| one that guesses | | ' + ' | '.join(
               f'{CHANCE[n]:.3f}' if n in CHANCE else '' for n, _, _ in COLUMNS) + ' | | |']
  total = {name: sum(r['seconds'] for r in rows if r['model'] == name) / 60 for name in found}
  for name in sorted(found, key=lambda name: place[name]):
    fields = found[name]
    cells = [f'{np.mean(fields[n]):.3f}' if n in fields else '-' for n, _, _ in COLUMNS]
    lines.append(f'| {name} | {place[name]:.1f} | ' + ' | '.join(cells)
                 + f' | {max(fields["state"]):,} | {total[name]:.1f} |')
  return '\n'.join(lines)


def draw(rows: list[dict], out: str) -> None:
  """leaderboard.png: a cell for each model and column, coloured from chance (or the worst) to the best."""
  found = best_lines(rows)
  place = ranks(found)
  names = sorted(found, key=lambda name: place[name])
  columns = [c for c in COLUMNS if any(c[0] in found[name] for name in names)]

  def panels(figure: Any) -> None:
    axes = figure.subplots()
    shade = np.full((len(names), len(columns)), np.nan)
    for j, (field, _, up) in enumerate(columns):
      value = np.array([np.mean(found[n][field]) if field in found[n] else np.nan for n in names])
      low = CHANCE.get(field, np.nanmin(value))
      high = 1.0 if up else np.nanmax(value)
      part = (value - low) / max(high - low, 1e-9)
      shade[:, j] = np.clip(part if up else 1 - part, 0, 1)
      for i, x in enumerate(value):
        axes.text(j, i, '-' if np.isnan(x) else f'{x:.2f}', ha='center', va='center', fontsize=7,
                  color='white' if shade[i, j] > 0.6 else 'black')
    axes.imshow(shade, cmap='Blues', vmin=0, vmax=1, aspect='auto')
    axes.set_xticks(range(len(columns)), [t for _, t, _ in columns], rotation=30, ha='right', fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_title('accuracy, and bits per byte of books; dark is good', fontsize=10)
  if names:
    shared.draw(panels, os.path.join(out, 'leaderboard.png'), width=2 + 0.75 * len(columns),
                height=1.5 + 0.24 * len(names))
