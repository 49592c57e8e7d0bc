"""Pictures of a mask: who sees whom, as text for a docstring or a PNG for a page.

Rows are queries, columns are keys, both in the order in which they stand; so a mask whose tokens
are laid out over devices shows its layout too.
Held by: tests/test_intervals.py.
"""

import os
from typing import Any

import numpy as np


def seen(mask: Any, row: int = 0) -> np.ndarray:
  """[T, S] bool of one row of a mask of `attention.intervals`."""
  rows = mask.start_BT.shape[0]
  if not 0 <= row < rows:
    raise ValueError(f'row={row}: the mask has {rows} rows')
  key_1S = np.asarray(mask.keys_BS)[row][None]
  pairs = [(mask.start_BT, mask.end_BT)]
  if mask.has_sinks:
    pairs.append((mask.sink_start_BT, mask.sink_end_BT))
  within = [(np.asarray(a)[row][:, None] <= key_1S) & (key_1S < np.asarray(b)[row][:, None])
            for a, b in pairs]
  return np.logical_or.reduce(within)


def mask_text(mask: Any, row: int = 0) -> str:
  """One line a query: # where it sees the key, a dot where not."""
  return '\n'.join(''.join('#' if x else '.' for x in line) for line in seen(mask, row))


def mask_figure(masks: dict[str, Any], path: str | os.PathLike, row: int = 0) -> str:
  """A PNG with one panel a mask, named; returns its path."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure
  figure = Figure(figsize=(2.4 * len(masks), 2.8), dpi=150, layout='constrained')
  FigureCanvasAgg(figure)
  panels = figure.subplots(1, len(masks), squeeze=False)[0]
  for axes, (name, mask) in zip(panels, masks.items()):
    axes.imshow(seen(mask, row), cmap='Blues', vmin=0, vmax=1.4, interpolation='nearest')
    axes.set_title(name, fontsize=9)
    axes.set_xlabel('key')
  panels[0].set_ylabel('query')
  figure.savefig(path)
  return os.fspath(path)
