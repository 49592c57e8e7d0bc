"""Figure of the loss by context position: does a longer context help, and how far?

A line a run and mode: bits per byte over the log2-spaced bins of context position, both axes
logarithmic, so that a power law is a straight line and the far bins, which matter, have room. About it
its 95 % interval as a band, where there is one; of one that is wider than its point is high the scale leaves out
the ends. Under
it how many tokens each bin of the first run holds, which tells how far to trust a point.
Held by: tests/test_draw.py.
"""

import math
import os
from typing import Any, BinaryIO

from longctx.draw import theme

STYLES = {'full': '-', 'sliding': '--'}  # one colour a run, one dash a mode
MARKS = {'full': 'o', 'sliding': 's'}


def points(mode: dict[str, Any]) -> list[tuple[int, float]]:
  """(bin, bits per byte) of bins above 0 with enough tokens; bin i > 0: from 2^(i-1)."""
  return [(i, row['bits_per_byte']) for i, row in enumerate(mode['positions'])
          if row['bits_per_byte'] and not row['few']]


def bands(mode: dict[str, Any]) -> list[tuple[int, float, float]]:
  """(bin, low, high) of the points that have an interval."""
  ends = [(i, *(mode['positions'][i].get(f'bits_per_byte_{end}') for end in ('low', 'high'))) for i, _ in points(mode)]
  return [one for one in ends if None not in one]


def labels(count: int) -> list[str]:
  """Names of the first `count` bins: 0, 1, 2-3, 4-7, ... with 1k for 1024."""
  short = lambda n: f'{n // 2**20}M' if n >= 2**20 else f'{n // 1024}k' if n >= 1024 else str(n)
  names = ['0', '1']
  for i in range(2, count):
    low, high = 2**(i - 1), 2**i
    names.append(f'{low}–{high - 1}' if high <= 512 else f'{short(low)}–{short(high)}')
  return names[:count]


def draw(runs: dict[str, dict[str, Any]], path: str | os.PathLike | BinaryIO, *,
         title: str = '') -> None:
  """Writes a PNG of one or several evaluations.

  Args:
    runs: a name for each `Result.to_json()` of longctx.evaluation.perplexity.
    path: the file to write, whose folder exists, or one that is open.
    title: '' = split, tokens and context length of the first run.
  """
  import matplotlib
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  colours = matplotlib.colormaps['tab10'].colors
  figure = Figure(figsize=(8, 5.2), dpi=150, layout='constrained')
  FigureCanvasAgg(figure)
  axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=(5, 1))
  first = next(iter(runs.values()))
  num_bins = max(len(mode['positions']) for run in runs.values() for mode in run['modes'].values())
  for number, (name, run) in enumerate(runs.items()):
    for mode, found in run['modes'].items():
      _line(axes, f'{name}, {mode}', mode, found, colours[number % len(colours)])
  _frame(axes, title or _title(first))
  limits = axes.get_ylim()
  for number, run in enumerate(runs.values()):
    for found in run['modes'].values():
      _band(axes, found, colours[number % len(colours)])
  axes.set_ylim(limits)
  _tokens(counts, first, num_bins)
  figure.savefig(path, format='png')


def _title(run: dict[str, Any]) -> str:
  mode = next(iter(run['modes'].values()))
  context = f'context {run["length"]:,} tokens' if run['length'] else 'whole documents as context'
  return f'Loss by context position: {run["split"]}, {mode["tokens"]:,} tokens, {context}'


def _line(axes: Any, name: str, mode: str, found: dict[str, Any], colour: Any) -> None:
  line = points(found)
  if not line:
    axes.plot([], [], STYLES.get(mode, ':'), color=colour, label=f'{name}: not finite')
    return
  # Of a bin with few documents the interval may be many times as wide as all else.
  ends = [(i, end) for i, *both in bands(found) if both[1] - both[0] <= found['positions'][i]['bits_per_byte']
          for end in both]
  if ends:
    axes.update_datalim(ends)
    axes.autoscale_view()
  total = found['bits_per_byte']
  overall = 'not finite' if total is None else f'{total:.3f} overall'
  axes.plot(*zip(*line), STYLES.get(mode, ':'), marker=MARKS.get(mode, '.'), markersize=5,
            color=colour, markerfacecolor='white' if mode == 'sliding' else colour,
            linewidth=1.6, label=f'{name}: {overall}')
  above = mode == 'full'  # of the two modes of a run the one with less context is the higher
  axes.annotate(f'{line[-1][1]:.2f}', line[-1], xytext=(0, 7 if above else -13), fontsize=8,
                textcoords='offset points', color=colour, ha='center')


def _band(axes: Any, found: dict[str, Any], colour: Any) -> None:
  known = {i: (low, high) for i, low, high in bands(found)}
  x = [i for i, _ in points(found)]
  low, high = zip(*(known.get(i, (math.nan, math.nan)) for i in x)) if x else ((), ())
  axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
  if len(known) == 1:   # a band of one point has no width
    axes.vlines(x, low, high, color=colour, alpha=0.5, linewidth=1.6)


def _frame(axes: Any, title: str) -> None:
  from matplotlib.ticker import FuncFormatter, LogLocator
  low, high = axes.get_ylim()
  wide = low > 0 and high > 1.5 * low  # a narrow range has no round numbers on a log axis
  if wide:
    axes.set_yscale('log')
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 1.5, 2, 2.5, 3, 4, 5, 6, 8)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f'{y:g}'))
    axes.minorticks_off()
  axes.margins(y=0.12)
  axes.set_ylabel('bits per byte (log scale)' if wide else 'bits per byte')
  axes.grid(axis='y', color=theme.faint(), linewidth=0.8)
  axes.set_axisbelow(True)
  axes.set_title(title, fontsize=11)
  axes.tick_params(axis='x', length=0)
  axes.spines[['top', 'right', 'bottom']].set_visible(False)
  axes.legend(frameon=False, fontsize=9, loc='upper right')


def _tokens(counts: Any, run: dict[str, Any], num_bins: int) -> None:
  """Bars of the tokens in each bin, on a log axis, a bar group a mode."""
  modes, largest = list(run['modes'].items()), 1
  for number, (mode, found) in enumerate(modes):
    width = 0.8 / len(modes)
    tokens = [row['tokens'] for row in found['positions']]
    largest = max(largest, *tokens)
    x = [i + (number + 0.5) * width - 0.4 for i in range(len(tokens))]
    counts.bar(x, tokens, width=width, label=mode, edgecolor='0.6', linewidth=0.6,
               color='0.75' if mode == 'full' else 'white')
  counts.set_yscale('log')
  top = 1 + int(math.log10(largest))
  ticks = [10**d for d in range(0, top + 1, 1 + top // 4)]
  counts.set_yticks(ticks, [f'{t:,}' for t in ticks], fontsize=7)
  counts.set_ylim(0.5, largest * 2)
  counts.minorticks_off()
  counts.set_ylabel('tokens', fontsize=8)
  counts.spines[['top', 'right']].set_visible(False)
  many = num_bins > 9
  counts.set_xticks(range(num_bins), labels(num_bins), fontsize=8, rotation=35 if many else 0,
                    ha='right' if many else 'center')
  counts.set_xlim(-0.6, num_bins - 0.4)
  counts.set_xlabel('context position: tokens before the predicted one (log scale)')
  if len(modes) > 1:
    counts.legend(frameon=False, fontsize=7, loc='upper left', ncols=2, borderaxespad=0)
