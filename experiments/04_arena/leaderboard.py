"""The arena's tables and figure, from the lines of all runs.

Held by: tests/test_arena.py.
"""

import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import predictions
import roster
import trials

from experiments import shared

# A column: the field, its title.
COLUMNS = (
    ('mqar', 'mqar'), ('rewrite_8', 'rewrite 8'), ('rewrite_16', 'rewrite 16'), ('parity_64', 'parity 64'),
    ('parity_256', 'parity 65-256'), ('passkey_1', 'passkey'), ('passkey_16', 'passkey 16x'),
    ('passkey_64', 'passkey 64x'), ('books', 'books, bits'), ('books_far', 'books beyond 512'))
RANKED = ('mqar', 'rewrite_16', 'parity_256', 'passkey_16', 'books_far')   # one of each trial
BEGIN, END = '<!-- leaderboard: begin -->', '<!-- leaderboard: end -->'    # in README.md


def best_lines(rows: list[dict]) -> list[dict]:
  """Of each trial, model and seed the line whose rate the validation chooses, with `rates`: of how many.

  Where it says the same of two, as of two that are always right, the lower loss in training, then the lower rate.
  """
  groups: dict[tuple, list[dict]] = {}
  for r in rows:
    groups.setdefault((r['trial'], r['model'], r['seed']), []).append(r)
  def worth(r: dict) -> tuple[float, ...]:
    sign = -1 if r['trial'] in trials.LESS_IS_MORE else 1
    of = lambda value: value if math.isfinite(value) else -math.inf
    return of(sign * r['validation']), of(-r['loss']), -r['learning_rate']
  return [max(lines, key=worth) | dict(rates=len({r['learning_rate'] for r in lines}))
          for lines in groups.values()]


def scores(rows: list[dict]) -> predictions.Scores:
  """model -> field -> the mean of its seeds; models in the order of the roster.

  The standard error is the test's, and of several seeds theirs too.
  """
  lines: dict[str, dict[str, list[dict]]] = {}
  for r in best_lines(rows):
    for field in r['standard_errors']:
      lines.setdefault(r['model'], {}).setdefault(field, []).append(r)

  def score(field: str, of: list[dict]) -> predictions.Score:
    values = np.array([r[field] for r in of])
    test = np.mean([r['standard_errors'][field] for r in of])   # one draw for all seeds
    seeds = values.std(ddof=1) / math.sqrt(len(of)) if len(of) > 1 else 0.0
    return predictions.Score(float(values.mean()), float(np.hypot(test, seeds)), min(r['rates'] for r in of))
  return {name: {field: score(field, of) for field, of in lines[name].items()}
          for name in roster.NAMES if name in lines}


def ranks(found: predictions.Scores) -> dict[str, float]:
  """The mean place over what was asked: 1 is first; equals share a place, and all that are at chance one.

  NaN of a model that lacks a part of it.
  """
  asked = [field for field in RANKED if any(field in fields for fields in found.values())]
  whole = {name: fields for name, fields in found.items() if all(field in fields for field in asked)}
  places: dict[str, list[float]] = {name: [] for name in found}
  for field in asked:
    sign = -1 if field in trials.LESS_IS_MORE else 1
    value = {name: sign * round(fields[field].mean, 3) for name, fields in whole.items()}
    value = {name: x if np.isfinite(x) else -np.inf for name, x in value.items()}   # the last
    if field in predictions.CHANCE:   # what is not above it by more than noise
      value |= {name: -np.inf for name in whole if predictions.near_chance(whole[name][field], field)}
    for name in whole:
      better = sum(v > value[name] for v in value.values())
      equal = sum(v == value[name] for v in value.values())
      places[name].append(better + (equal + 1) / 2)
  return {name: float(np.mean(p)) if p else float('nan') for name, p in places.items()}


def by_place(place: dict[str, float]) -> list[str]:
  """Those without one last."""
  return sorted(place, key=lambda name: (math.isnan(place[name]), place[name]))


def costs(rows: list[dict], name: str) -> tuple[int, float]:
  """(the largest state of a model, in floats; CPU minutes of all its runs)."""
  mine = [r for r in rows if r['model'] == name]
  return (max(r['state_floats'] for r in mine),
          sum(r['train_seconds'] + r['test_seconds'] for r in mine) / 60)


def table(rows: list[dict], rates: int) -> str:
  """Models by their mean place among those that were asked all; a dash is what was not run."""
  found = scores(rows)
  place = ranks(found)
  lines = ['| model | mean place | ' + ' | '.join(title for _, title in COLUMNS)
           + ' | largest state, floats | CPU minutes |', '|---' * (len(COLUMNS) + 4) + '|',
           '| one that guesses | | ' + ' | '.join(
               f'{predictions.CHANCE[n]:.3f}' if n in predictions.CHANCE else ''
               for n, _ in COLUMNS) + ' | | |']
  def cell(score: predictions.Score | None) -> str:
    return '-' if score is None else str(score) + (f' ({score.rates})' if score.rates < rates else '')
  for name in by_place(place):
    state, minutes = costs(rows, name)
    cells = [cell(found[name].get(field)) for field, _ in COLUMNS]
    lines.append(f'| {name} | {"-" if math.isnan(place[name]) else f"{place[name]:.1f}"} | ' + ' | '.join(cells) + f' | {state:,} | {minutes:.1f} |')
  return '\n'.join(lines)


def verdicts(rows: list[dict]) -> str:
  found = scores(rows)
  lines = ['| | predicted | | numbers |', '|---|---|---|---|']
  for prediction in predictions.PREDICTIONS:
    mark, numbers = prediction.rule(found)
    lines.append(f'| {prediction.name} | {prediction.says} | {mark} | {numbers} |')
  return '\n'.join(lines)


def report(rows: list[dict], rates: int, command: str) -> str:
  """Both tables and what made them, in Markdown."""
  if not rows:
    return 'No run yet.'
  each = lambda value: ', '.join(dict.fromkeys(value(r) for r in rows))
  commits, versions = each(lambda r: r['commit'] or 'no repository'), each(
      lambda r: ', '.join(f'{name} {version}' for name, version in r['versions'].items()))
  best = best_lines(rows)
  grid = f'{rates} rate' + 's' * (rates > 1)
  partial = sum(r['rates'] < rates for r in best)
  hours = sum(r['train_seconds'] + r['test_seconds'] for r in rows) / 3600
  seeds = sorted({r['seed'] for r in rows})
  return '\n'.join((
      f'`{command}`, {len(rows)} runs, {hours:.1f} core-hours, seeds {", ".join(map(str, seeds))}; '
      f'at {commits}; {versions}; on {each(lambda r: r["device"])}.', '',
      f'Test scores ± standard errors at the best of {grid} by the validation draw; a number in brackets: of '
      f'so many rates so far ({partial} of {len(best)} are such). Books: bits per byte, less is better.', '',
      table(rows, rates), '', verdicts(rows)))


def write(text: str, rows: list[dict], out: str, readme: str) -> None:
  """leaderboard.md and leaderboard.png in `out`; the text in the README too, if its path is given."""
  with open(os.path.join(out, 'leaderboard.md'), 'w', encoding='utf-8') as file:
    file.write(text + '\n')
  draw(rows, out)
  if readme:
    with open(readme, encoding='utf-8') as file:
      before, rest = file.read().split(BEGIN)
    with open(readme, 'w', encoding='utf-8') as file:
      file.write(f'{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}')


def shades(found: predictions.Scores, names: list[str], field: str) -> np.ndarray:
  """[names]: 0 at chance, or the worst of bits or one above the best, to 1 at all right, or the best of
  bits; NaN: not run."""
  value = np.array([found[n][field].mean if field in found[n] else np.nan for n in names])
  value[~np.isfinite(value)] = np.nan
  if np.isnan(value).all():
    return value
  less = field in trials.LESS_IS_MORE
  best = np.nanmin(value) if less else 1.0
  worst = min(np.nanmax(value), best + 1) if less else predictions.CHANCE[field]   # else one hides the rest
  part = (value - worst) / (best - worst) if best != worst else np.ones_like(value)
  return np.clip(part, 0, 1)


def draw(rows: list[dict], out: str) -> None:
  """leaderboard.png: a cell for each model and column, the darker the better; state and time beside it."""
  found = scores(rows)
  place = ranks(found)
  names = by_place(place)
  if names:
    shared.draw(panels(rows, found, names), os.path.join(out, 'leaderboard.png'),
                width=3.5 + 0.7 * len(COLUMNS), height=2 + 0.25 * len(names))


def panels(rows: list[dict], found: predictions.Scores, names: list[str]) -> Callable[[Any], None]:
  def paint(figure: Any) -> None:
    axes = figure.subplots()
    shade = np.stack([shades(found, names, field) for field, _ in COLUMNS], axis=1)
    beside = np.full((len(names), 2), np.nan)
    axes.imshow(np.concatenate([shade, beside], axis=1), cmap='Blues', vmin=0, vmax=1, aspect='auto')
    write = lambda j, i, text, dark=False: axes.text(
        j, i, text, ha='center', va='center', fontsize=7, color='white' if dark else 'black')
    for i, name in enumerate(names):
      for j, (field, _) in enumerate(COLUMNS):
        if field in found[name]:
          write(j, i, f'{found[name][field].mean:.2f}', shade[i, j] > 0.6)
        else:
          write(j, i, '-')
      state, minutes = costs(rows, name)
      write(len(COLUMNS), i, f'{state:,}')
      write(len(COLUMNS) + 1, i, f'{minutes:.1f}')
    titles = [title for _, title in COLUMNS] + ['state, floats', 'CPU minutes']
    axes.set_xticks(range(len(titles)), titles, rotation=35, ha='right', fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_title('Accuracy, and bits per byte of books; dark is good, white is chance or the worst. '
                   'Models by mean place', fontsize=9)
  return paint
