"""Figure of accuracy by length and depth: where in a long text is a needle found?

A column a length, a row a band of depths, from the text's start at the top to its end; red is 0,
green is 1, hatched cells hold no example. Numbers stand in the cells where there is room for them,
and how many examples a cell holds is in the title, or under its number where cells differ. Colours:
Kamradt's needle in a haystack (github gkamradt/LLMTest_NeedleInAHaystack).
Held by: tests/test_draw_tasks.py.
"""

import os
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from longctx.draw import theme

COLOURS = ('#F0496E', '#EBB839', '#0CD79F')
ROOM = 16   # columns and rows up to which numbers can be read


class Grid(NamedTuple):
  """By band of depth and by length."""

  lengths: list[int]
  score_RC: np.ndarray   # mean; NaN for no example
  count_RC: np.ndarray


def grid(examples: Iterable[tuple[int, float, float]], rows: int) -> Grid:
  """(length, depth from 0 to 1, score) of each example, in so many even bands of depth."""
  cells = defaultdict(list)
  for length, depth, score in examples:
    if not 0 <= depth <= 1:
      raise ValueError(f'depth={depth}: must be from 0 (the start) to 1 (the end)')
    cells[min(int(depth * rows), rows - 1), length].append(score)
  lengths = sorted({length for _, length in cells})
  held = [[cells.get((row, length), []) for length in lengths] for row in range(rows)]
  return Grid(lengths, np.array([[np.mean(x) if x else np.nan for x in row] for row in held]),
              np.array([[len(x) for x in row] for row in held]))


def draw(cells: Grid, path: str | os.PathLike | BinaryIO, *, title: str) -> None:
  """Writes a PNG.

  Args:
    cells: from `grid`, of at least one example.
    path: the file to write, whose folder exists, or one that is open.
    title: of the figure; how many examples a cell holds is added.
  """
  from matplotlib.colors import LinearSegmentedColormap
  rows, columns = cells.score_RC.shape
  if not columns:
    raise ValueError('heatmap: no example; there is nothing to draw')
  counts = sorted(set(cells.count_RC[cells.count_RC > 0].tolist()))
  figure = theme.figure(min(12, max(5, 1.9 + 0.62 * columns)), max(3, 1.5 + 0.3 * min(rows, 20)))
  axes = figure.subplots()
  shade = LinearSegmentedColormap.from_list('needle', COLOURS)
  axes.patch.set(hatch='////', edgecolor='0.6', facecolor=theme.faint())   # seen where nothing is
  image = axes.imshow(100 * np.ma.masked_invalid(cells.score_RC), cmap=shade, vmin=0, vmax=100,
                      aspect='auto', interpolation='nearest')
  if rows <= ROOM and columns <= ROOM:
    _numbers(axes, cells, each=len(counts) > 1)
  axes.set_xticks(range(columns), [theme.short(n) for n in cells.lengths], fontsize=8,
                  rotation=40 if columns > 12 else 0)
  step = max(1, rows // 10)
  axes.set_yticks(range(0, rows, step), [f'{100 * r / rows:.0f}–{100 * (r + 1) / rows:.0f}%'
                                         for r in range(0, rows, step)], fontsize=8)
  axes.tick_params(length=0)
  axes.spines[:].set_visible(False)
  axes.set_xticks(np.arange(columns - 1) + 0.5, minor=True)
  axes.set_yticks(np.arange(rows - 1) + 0.5, minor=True)
  if max(rows, columns) <= 40:
    axes.grid(which='minor', color=theme.PAPER if theme.is_dark() else 'white', linewidth=1)
  axes.tick_params(which='minor', length=0)
  axes.set_xlabel('length in tokens')
  axes.set_ylabel('depth of the needle')
  held = f'{counts[0]} a cell' if len(counts) == 1 else f'{counts[0]} to {counts[-1]} a cell'
  axes.set_title(f'{title} ({held})', fontsize=10)
  bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
  bar.set_label('score, %', fontsize=8)
  bar.ax.tick_params(labelsize=8)
  bar.outline.set_visible(False)
  figure.savefig(path, format='png')


def _numbers(axes: Any, cells: Grid, each: bool) -> None:
  small = cells.score_RC.shape[1] > 9
  for (row, column), score in np.ndenumerate(cells.score_RC):
    if np.isnan(score):
      continue
    text = f'{100 * score:.0f}'
    if each:
      text += f'\nn {cells.count_RC[row, column]}'
    axes.text(column, row, text, ha='center', va='center', color='black',
              fontsize=(6 if small else 7) if each else (7 if small else 9))
