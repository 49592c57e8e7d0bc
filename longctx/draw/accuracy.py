"""Figure of accuracy by length: how far does an answer still come right?

A line a task (or a model) over the lengths, on a log2 axis, with its confidence interval as a band;
the score of guessing dotted, and the length of training rows dashed, for what lies right of it was
never seen in training.
Held by: tests/test_draw_tasks.py.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

from longctx.draw import theme


class Point(NamedTuple):
  """Scores are parts of 1."""

  length: int    # tokens
  score: float   # the mean
  low: float     # ends of its confidence interval
  high: float
  count: int     # examples


class Line(NamedTuple):
  points: Sequence[Point]
  floor: float | None = None   # the score of guessing


def draw(lines: Mapping[str, Line], path: str | os.PathLike | BinaryIO, *, title: str,
         trained: int = 0) -> None:
  """Writes a PNG.

  Args:
    lines: by name; a point of no example is left out.
    path: the file to write, whose folder exists, or one that is open.
    title: of the figure.
    trained: tokens of a row in training; 0: not drawn.
  """
  import matplotlib
  lengths = sorted({p.length for line in lines.values() for p in line.points if p.count})
  if not lengths:
    raise ValueError('accuracy: no example in any line; there is nothing to draw')
  colours = matplotlib.colormaps['tab10'].colors
  figure = theme.figure(7.6, 4.4)
  axes = figure.subplots()
  floors = {line.floor for line in lines.values()} - {None}
  for number, (name, line) in enumerate(lines.items()):
    _line(axes, name, line, colours[number % 10], '-' if number < 10 else '--')
    if line.floor is not None and len(floors) > 1:
      axes.axhline(100 * line.floor, color=colours[number % 10], linestyle=':', linewidth=1)
  if len(floors) == 1:   # of all lines
    axes.axhline(100 * floors.pop(), color='0.5', linestyle=':', linewidth=1.2, label='guessing')
  elif floors:
    axes.plot([], [], color='0.5', linestyle=':', linewidth=1, label='guessing')
  if trained:
    axes.axvline(trained, color='0.5', linestyle='--', linewidth=1,
                 label=f'trained at {theme.short(trained)}')
  _frame(axes, sorted({*lengths, *([trained] if trained else [])}), title)
  many = len(lines) > 6
  axes.legend(
    frameon=False,
    fontsize=8,
    **(dict(loc='center left', bbox_to_anchor=(1.01, 0.5)) if many else dict(loc='best')),
  )
  figure.savefig(path, format='png')


def _line(axes: Any, name: str, line: Line, colour: Any, dash: str) -> None:
  points = sorted(p for p in line.points if p.count)
  if not points:
    axes.plot([], [], dash, color=colour, label=f'{name}: no example')
    return
  x = [p.length for p in points]
  percent = lambda field: [100 * getattr(p, field) for p in points]
  axes.plot(x, percent('score'), dash, marker='o', markersize=4.5, linewidth=1.6, color=colour,
            label=name)
  if len(points) > 1:
    axes.fill_between(x, percent('low'), percent('high'), color=colour, alpha=0.16, linewidth=0)
  else:   # a band of one point has no width
    axes.vlines(x, percent('low'), percent('high'), color=colour, alpha=0.5, linewidth=1.6)


def _frame(axes: Any, lengths: list[int], title: str) -> None:
  axes.set_xscale('log', base=2)
  shown = [n for i, n in enumerate(lengths) if i == 0 or n / lengths[i - 1] > 1.15]
  axes.set_xticks(shown, [theme.short(n) for n in shown], fontsize=8,
                  rotation=40 if len(shown) > 12 else 0)
  axes.minorticks_off()
  axes.set_xlim(lengths[0] / 1.25, lengths[-1] * 1.25)
  axes.set_ylim(-3, 103)
  axes.set_xlabel('length in tokens (log scale)')
  axes.set_ylabel('score, %')
  axes.grid(axis='y', color=theme.faint(), linewidth=0.8)
  axes.set_axisbelow(True)
  axes.spines[['top', 'right']].set_visible(False)
  axes.set_title(title, fontsize=11)
