"""Figure of a training run: loss by step, of batches and of held-out text.

Batches jump: their mean over neighbouring steps stands before them, which are pale.
Held by: tests/test_draw_tasks.py.
"""

import os
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np

from longctx.draw import theme

MEANS = 100   # points of the smoothed line


def draw(
  metrics: Sequence[dict[str, Any]], path: str | os.PathLike | BinaryIO, *, title: str
) -> None:
  """Writes a PNG of the lines of metrics.jsonl; a loss that is not finite (null) is left out."""
  some = lambda name: [(m['step'], m[name]) for m in metrics if m.get(name) is not None]
  batches, held_out = some('loss'), some('validation_loss')
  if not batches and not held_out:
    raise ValueError('curve: no loss in these metrics; there is nothing to draw')
  figure = theme.figure(7.6, 3.2)
  axes = figure.subplots()
  if batches:
    step, loss = np.array(batches, float).T
    size = -(-len(loss) // MEANS)
    axes.plot(step, loss, color='C0', linewidth=0.8, alpha=0.35 if size > 1 else 1, label='batches')
    if size > 1:
      starts = np.arange(0, len(loss), size)
      counts = np.diff([*starts, len(loss)])
      axes.plot(np.add.reduceat(step, starts) / counts, np.add.reduceat(loss, starts) / counts,
                color='C0', linewidth=1.6, label=f'mean of {size}')
  if held_out:
    axes.plot(
      *zip(*held_out), color='C1', marker='o', markersize=3, linewidth=1.2, label='held out'
    )
  axes.set_xlabel('step')
  axes.set_ylabel('loss, nats per token')
  axes.grid(axis='y', color=theme.faint(), linewidth=0.8)
  axes.set_axisbelow(True)
  axes.spines[['top', 'right']].set_visible(False)
  axes.legend(frameon=False, fontsize=8)
  axes.set_title(title, fontsize=11)
  figure.savefig(path, format='png')
