"""Figure of what an answer's tokens read: a row a head, a column a place of the text.

Each layer is a block of rows, its heads in order; a place is a bin of neighbouring tokens and shows
the largest weight among them, so that one token that is read alone does not fade in a long text.
Shades go by the square root of the weight. Bars above mark the needle and the question.
Held by: tests/test_draw_inspect.py.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from longctx.draw import theme

BINS = 480


def binned(weights_NT: np.ndarray, bins: int = BINS) -> tuple[np.ndarray, np.ndarray]:
  """([N, bins] the largest weight of each bin, the first token of each and the end)."""
  T = weights_NT.shape[1]
  edges = np.unique(np.linspace(0, T, min(bins, T) + 1).round().astype(int))
  return np.maximum.reduceat(weights_NT, edges[:-1], axis=1), edges


def draw(maps: Mapping[str, np.ndarray], path: str | os.PathLike | BinaryIO, *, title: str,
         marks: Mapping[str, Sequence[tuple[int, int]]], unit: str = 'token of the text') -> None:
  """Writes a PNG.

  Args:
    maps: of each layer, by its name, weights [heads, tokens]; all of as many tokens.
    path: the file to write, whose folder exists, or one that is open.
    title: of the figure.
    marks: spans of tokens [low, high) by what they are.
    unit: what a column is.
  """
  from matplotlib.colors import PowerNorm
  if not maps:
    raise ValueError('attention: no map; there is nothing to draw')
  rows = [binned(weights)[0] for weights in maps.values()]
  _, edges = binned(next(iter(maps.values())))
  shown = np.concatenate(rows)
  figure = theme.figure(9, min(12, 1.6 + 0.13 * len(shown) + 0.12 * len(maps)))
  axes = figure.subplots()
  image = axes.pcolormesh(edges, np.arange(len(shown) + 1), shown, rasterized=True, shading='flat',
                          cmap='magma' if theme.is_dark() else 'magma_r',
                          norm=PowerNorm(0.5, vmin=0, vmax=max(float(shown.max()), 1e-6)))
  axes.invert_yaxis()
  heads = [len(part) for part in rows]
  ends = np.cumsum(heads)
  for end in ends[:-1]:
    axes.axhline(end, color=theme.PAPER if theme.is_dark() else 'white', linewidth=2)
  axes.set_yticks(ends - np.array(heads) / 2, list(maps), fontsize=8)
  axes.tick_params(axis='y', length=0)
  axes.spines[:].set_visible(False)
  _marks(axes, marks)
  axes.set_xlabel(unit, fontsize=9)
  axes.tick_params(axis='x', labelsize=8)
  axes.set_title(title, fontsize=10, pad=16 if marks else 6)
  bar = figure.colorbar(image, ax=axes, fraction=0.025, pad=0.01)
  bar.set_label('largest weight', fontsize=8)
  bar.ax.tick_params(labelsize=7)
  bar.outline.set_visible(False)
  figure.savefig(path, format='png')


def _marks(axes: Any, marks: Mapping[str, Sequence[tuple[int, int]]]) -> None:
  """Bars above the map, each kind named once."""
  left, right = axes.get_xlim()
  least = (right - left) / 200   # a needle in a long text is narrower than a line
  for number, (name, spans) in enumerate(marks.items()):
    colour = f'C{number + 1}'
    for i, (low, high) in enumerate(spans):
      axes.plot([low, max(high, low + least)], [1.012, 1.012], color=colour, linewidth=4,
                solid_capstyle='butt', transform=axes.get_xaxis_transform(), clip_on=False)
      if i == 0:
        middle = (low + max(high, low + least)) / 2
        axes.text(
          middle,
          1.025,
          name,
          color=colour,
          fontsize=8,
          transform=axes.get_xaxis_transform(),
          ha='right'
          if middle > right - (right - left) / 8
          else 'left'
          if middle < left + (right - left) / 8
          else 'center',
          va='bottom',
        )
