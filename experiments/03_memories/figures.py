"""What the parts of experiment 03 share besides models and training: figures, memory, counts."""

import resource
from collections.abc import Callable
from typing import Any

import jax


def save(panels: Callable, path: str, *, width: float, height: float) -> None:
  """Draws `panels(figure)` into a PNG."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure
  figure = Figure(figsize=(width, height), dpi=150, layout='constrained')
  FigureCanvasAgg(figure)
  panels(figure)
  figure.savefig(path)


def resident() -> int:
  """Bytes of this process in memory now."""
  with open('/proc/self/statm', encoding='ascii') as file:
    return int(file.read().split()[1]) * resource.getpagesize()


def count(params: Any) -> int:
  return sum(x.size for x in jax.tree.leaves(params))
