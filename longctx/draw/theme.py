"""What figures share: a canvas without a window, and colours for a page that may be dark.

Colours are matplotlib's own settings, so that one function draws both: `with theme.dark():
draw(...)`.
Held by: tests/test_draw_tasks.py.
"""

import contextlib
from typing import Any

INK, PAPER, FAINT = '#d9dce3', '#16181d', '#343841'   # on a dark page

DARK = {'figure.facecolor': PAPER, 'axes.facecolor': PAPER, 'savefig.facecolor': PAPER,
        'text.color': INK, 'axes.labelcolor': INK, 'axes.edgecolor': '#8a8f9a', 'xtick.color': INK,
        'ytick.color': INK, 'grid.color': FAINT}
LIGHT = {'grid.color': '0.9'}
DPI = 150   # of every figure


@contextlib.contextmanager
def dark():
  """Figures that are made and saved within it are for a dark page."""
  import matplotlib
  with matplotlib.rc_context(DARK):
    yield


def figure(width: float, height: float) -> Any:
  """A matplotlib Figure; sizes in inches."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure
  made = Figure(figsize=(width, height), dpi=DPI, layout='constrained')
  FigureCanvasAgg(made)
  return made


def is_dark() -> bool:
  import matplotlib
  return matplotlib.rcParams['figure.facecolor'] == PAPER


def faint() -> str:
  """Of lines that help to read."""
  return FAINT if is_dark() else LIGHT['grid.color']


def short(count: int) -> str:
  """A number of tokens in few letters: 512, 4k, 1.5k, 2M."""
  for unit, letter in ((2**20, 'M'), (2**10, 'k')):
    if count >= unit:
      return f'{count / unit:.3g}{letter}'
  return str(count)
