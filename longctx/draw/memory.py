"""Figure of what the layers' states hold while a text is read: a panel an array, a line a layer.

A state that grows without end, one that is full at once, and one that forgets look different here;
the needle's place is marked, to see whether it leaves a trace.
Held by: tests/test_draw_inspect.py.
"""

import os
from collections.abc import Mapping, Sequence
from typing import BinaryIO

import numpy as np

from longctx.draw import theme

PANELS = 12


def draw(tokens: np.ndarray, series: Mapping[tuple[int, str], np.ndarray],
         path: str | os.PathLike | BinaryIO, *, title: str,
         needles: Sequence[tuple[int, int]] = ()) -> None:
  """Writes a PNG.

  Args:
    tokens: read so far, at each point.
    series: (layer, array of its state) -> norm at each point.
    path: the file to write, whose folder exists, or one that is open.
    title: of the figure; where there are more arrays than panels, how many are left out is added.
    needles: spans of tokens [low, high).
  """
  import matplotlib
  names = list(dict.fromkeys(name for _, name in series))
  if not names or not len(tokens):
    raise ValueError('memory: no state was measured; there is nothing to draw')
  shown = names[:PANELS]
  layers = sorted({layer for layer, _ in series})
  shades = matplotlib.colormaps['viridis']
  columns = min(3, len(shown))
  rows = -(-len(shown) // columns)
  figure = theme.figure(9, 0.8 + 2.0 * rows)
  panels = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
  for axes in panels[len(shown):]:
    axes.set_visible(False)
  for axes, name in zip(panels, shown):
    for place, layer in enumerate(layers):
      if (layer, name) in series:
        # Layers in order of depth, none so bright or so dark that the page hides it.
        axes.plot(tokens, series[layer, name], linewidth=1.3, label=f'layer {layer}',
                  marker='o' if len(tokens) == 1 else None,
                  color=shades(0.3 * theme.is_dark() + 0.7 * place / max(1, len(layers) - 1)))
    for low, high in needles:
      axes.axvspan(low, max(high, low + 1), color='#F0496E', alpha=0.35, linewidth=0)
    axes.set_title(name, fontsize=8)
    axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=7)
    axes.grid(color=theme.faint(), linewidth=0.6)
    axes.spines[['top', 'right']].set_visible(False)
    axes.set_xlabel('tokens read', fontsize=8)
  if len(layers) > 1:
    some = {label: handle for axes in figure.axes for handle, label in
            zip(*axes.get_legend_handles_labels())}
    step = -(-len(layers) // 12)
    named = [f'layer {layer}' for layer in layers[::step]]
    figure.legend(
      [some[n] for n in named],
      named,
      frameon=False,
      fontsize=7,
      ncols=min(6, len(named)),
      loc='outside lower center',
    )
  left = len(names) - len(shown)
  figure.suptitle(title + (f' ({left} more arrays are not shown)' if left else ''), fontsize=10)
  figure.savefig(path, format='png')
