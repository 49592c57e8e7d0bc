"""What RULER's table says of a model: averages over lengths, and up to which it is good enough.

Hsieh et al. 2024, arXiv:2404.06654, table 3. With the mean score s_i of the thirteen tasks at the
i-th of n lengths, from short to long:

    average                mean of s_i
    wAvg. (inc)            sum of i s_i / sum of i: who reads long texts
    wAvg. (dec)            sum of (n + 1 - i) s_i / sum of i: who reads short ones
    effective length       the longest whose s_i is at least 85.6, Llama-2-7B-chat's at 4096

`compared` puts a model's scores beside the published ones, of any benchmark whose tasks have these.
Held by: tests/test_ruler_summary.py (rows of the published table).
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from longctx.data.tasks.ruler_compat import SEED
from longctx.data.tasks.table import SYNTHETIC, TASKS
from longctx.errors import check, check_range
from longctx.evaluation import records, ruler_published

THRESHOLD = 85.6
FAMILIES = ('ruler_compat_', 'ruler_', 'lra_')   # begins of names; a task is of the first that fits
NUM_TASKS = 13
FORMS = {
    'ruler_': "Published: of NVIDIA's form.",
    'ruler_compat_': "Published: of the same form, byte for byte but for the tokenizer's tokens.",
    'lra_': 'Published: of models trained on the task.'}
STAND_INS = f'Tasks marked {SYNTHETIC} were put here in other text, made up: their scores are not of the same questions.'


def _scores(scores_by_length: Mapping[int, float]) -> list[float]:
  """In the order of their lengths."""
  check(bool(scores_by_length), 'scores_by_length={}: has no score; give one for each length, in '
        'percent')
  for length, score in scores_by_length.items():
    check_range(f'scores_by_length[{length}]', score, 0, 100)
  return [score for _, score in sorted(scores_by_length.items())]


def effective_length(scores_by_length: Mapping[int, float],
                     threshold: float = THRESHOLD) -> int | None:
  """The longest length whose score, in percent, reaches the threshold; None if none does."""
  _scores(scores_by_length)
  return max((length for length, score in scores_by_length.items() if score >= threshold),
             default=None)


def average(scores_by_length: Mapping[int, float]) -> float:
  scores = _scores(scores_by_length)
  return sum(scores) / len(scores)


def weighted_average(scores_by_length: Mapping[int, float], *, rising: bool) -> float:
  """wAvg. (inc) if weights rise with the length, else wAvg. (dec)."""
  scores = _scores(scores_by_length)
  weights = range(1, len(scores) + 1) if rising else range(len(scores), 0, -1)
  return sum(w * s for w, s in zip(weights, scores)) / sum(weights)


class Compared(NamedTuple):
  """A table, what stands above it and what has to be said of it."""

  title: str
  columns: list[str]
  rows: list[list[str]]
  notes: list[str]

  def markdown(self) -> str:
    table = records.markdown(self.columns, ['---'] + ['---:'] * (len(self.columns) - 1), self.rows)
    return '\n\n'.join([f'{self.title}', table, *self.notes])


def compared(found: Sequence[records.Cell]) -> list[Compared]:
  """For each benchmark put whose tasks have published numbers: scores by length, these, and the means.

  Of RULER its summary too, and where all its tasks were put the means of all models that are published. A mean
  is of all tasks that were put, or none is given.
  """
  tables = []
  for family in FAMILIES:
    names = [name for name in dict.fromkeys(c.task for c in found) if _family(name) == family]
    if names and any(TASKS[name].published for name in names):
      beside, means = _beside(family, names, found)
      tables.append(beside)
      if family == 'ruler_' and len(names) == NUM_TASKS and means:
        tables.append(_among_published(means, _marked(names, found)))
  return tables


def _family(name: str) -> str | None:
  return next((family for family in FAMILIES if name.startswith(family)), None) if name in TASKS else None


def _marked(names: Sequence[str], found: Sequence[records.Cell]) -> str:
  """How many of the tasks have made-up text where the published ones have another; '' for none."""
  count = len({c.task for c in found if c.task in names and c.text.synthetic})
  return f', {count} {SYNTHETIC}' if count else ''


def _seeds(family: str, names: Sequence[str], found: Sequence[records.Cell]) -> list[str]:
  """What has to be said of seeds where the published bytes are those of one."""
  others = sorted({c.seed for c in found if c.task in names and c.seed not in (None, SEED)})
  return [f'Its bytes are those of eval.seed={SEED}; here it is {", ".join(map(str, others))}: other draws, no '
          'rerun of the published set.'] if others and family == 'ruler_compat_' else []


def _among_published(scores: Mapping[int, float], marked: str) -> Compared:
  """The mean of all tasks, by length, and what others have."""
  lengths = sorted({*scores, *ruler_published.LENGTHS})
  row = lambda name, means: [name, *(f'{means[n]:.1f}' if n in means else '-' for n in lengths)]
  rows = [row(name, dict(zip(ruler_published.LENGTHS, means))) for name, means in ruler_published.MEANS.items()]
  return Compared(f'RULER: mean of the {NUM_TASKS} tasks, %, by length, and published', [
      'model', *(f'{length:,}' for length in lengths)], [row(f'this one{marked}', scores), *rows], [
          f"Of the README of NVIDIA/RULER at c3f5e3b. {' '.join([FORMS['ruler_'], *([STAND_INS] if marked else [])])}"])


def _beside(family: str, names: list[str], found: Sequence[records.Cell]) -> tuple[Compared, dict[int, float]]:
  """The tasks of a family beside published models, and the means over all of them."""
  ours = {(c.task, c.length): 100 * c.score.mean for c in found if c.score is not None}
  lengths = sorted({c.length for c in found if c.task in names})
  models = sorted({model for name in names for model in TASKS[name].published}, key=_by_model)
  value = lambda name, column: (
      ours.get((name, column)) if isinstance(column, int) else TASKS[name].published.get(column))
  columns, means = [*lengths, *models], {}
  for column in columns:
    each = [value(name, column) for name in names]
    means[column] = None if None in each else sum(each) / len(each)
  said = lambda x: '-' if x is None else f'{x:.1f}'
  named, marked = {c.task: c.name for c in found}, _marked(names, found)
  rows = [[named[name], *(said(value(name, column)) for column in columns)] for name in names]
  rows.append([f'mean of {len(names)}{marked}', *(said(means[column]) for column in columns)])
  scores = {length: means[length] for length in lengths if means[length] is not None}
  notes = [' '.join([FORMS[family], *_seeds(family, names, found), *([STAND_INS] if marked else [])]), *(_summary(scores, len(names)) if family != 'lra_' else [])]
  return Compared(f'{family}*: score, %, by length, and published', [
      'task', *(f'{length:,}' for length in lengths), *(f'published: {model}' for model in models)], rows, notes), scores


def _by_model(name: str) -> tuple[str, int]:
  """'model at length' in order of the model, then of the length."""
  model, length = re.fullmatch(r'(.*) at (\d+)', name).groups()
  return model, int(length)


def _summary(scores: Mapping[int, float], count: int) -> list[str]:
  if not scores:
    return []
  effective = effective_length(scores)
  few = '' if count == NUM_TASKS else (
      f' Of {count} of the {NUM_TASKS} tasks: not to be compared with means of all.')
  left = f'over {len(scores)} length{"s" * (len(scores) > 1)}'
  return [f'RULER\'s summary {left}: average {average(scores):.1f}, wAvg. (inc) '
          f'{weighted_average(scores, rising=True):.1f}, wAvg. (dec) {weighted_average(scores, rising=False):.1f}, '
          f'effective length {"none" if effective is None else f"{effective:,}"} (the longest whose mean is at '
          f"least {THRESHOLD}, Llama-2-7B-chat's at 4,096).{few}"]
