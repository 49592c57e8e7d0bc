"""What was asked and answered, a JSON line an example, and the table that comes of it.

W/tasks.jsonl grows a batch at a time, each written in one call: after a kill at most its last line is torn,
and the same evaluation carries on behind it; of two lines of an example the later counts. A line's `key` is the hash of all that its answer depends on but
the example itself (checkpoint, seed, the bytes of what its task reads, ...): lines of another key stay where they are
and are not counted, so that one file may hold several evaluations. `settings` is the part of it that is no text's.
Held by: tests/test_eval_records.py.
"""

import errno
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from longctx.data.tasks.table import SYNTHETIC, TASKS, Text, text_of
from longctx.errors import ConfigError
from longctx.files import atomic_write, sync_folder

Z = 1.959964   # of a normal distribution, 95 % lie within


class Interval(NamedTuple):
  mean: float
  low: float
  high: float


def interval(scores: Sequence[float]) -> Interval:
  """The mean of scores from 0 to 1 and its 95 % confidence interval.

  Wilson's (1927), which is that of scores 0 and 1. Others of the same mean spread less (their variance is
  at most m (1 - m); Bhatia & Davis 2000): for them it is too wide if anything, and never a point, however
  alike they are.
  """
  mean = math.fsum(scores) / len(scores)
  return Interval(mean, *wilson(mean, len(scores)))


def wilson(share: float, n: int) -> tuple[float, float]:
  """The 95 % interval of the share of n that are right, or of their mean score (Wilson 1927); all of 0 to 1 where n is 0."""
  if not n:
    return 0.0, 1.0
  middle = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
  half = Z / (1 + Z * Z / n) * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
  # The ends are within by rounding alone where all or none are right.
  return max(0.0, min(middle - half, share)), min(1.0, max(middle + half, share))


class Cell(NamedTuple):
  """One task at one length. Scores are parts of 1."""

  task: str
  length: int
  score: Interval | None      # None: no example was asked
  control: float | None       # mean score of the same questions without their context; None: not asked
  logprob: float | None       # mean log-probability of the right answers, natural; None: not asked
  count: int                  # examples that were asked
  too_long: int               # and those that were not, being longer than the model takes
  text: Text = Text('', False, False)   # that the examples are made of
  seed: int | None = None     # that they were drawn from; None: not known
  fit: tuple[int, int] | None = None   # items that are short enough, of how many; None: examples are not items of files

  @property
  def name(self) -> str:
    """The task's, with a mark where its text is a stand-in."""
    return self.task + SYNTHETIC * self.text.synthetic


def cells(lines: Iterable[dict]) -> list[Cell]:
  """In the order in which tasks and lengths come up first."""
  groups: dict[tuple[str, int], list[dict]] = {}
  for line in lines:
    groups.setdefault((line['task'], line['length']), []).append(line)
  made = []
  for (task, length), group in groups.items():
    asked = [line for line in group if not line['too_long']]
    of = lambda field, asked=asked: [line[field] for line in asked if line.get(field) is not None]
    mean = lambda values: math.fsum(values) / len(values) if values else None
    made.append(Cell(task, length, interval(of('score')) if asked else None, mean(of('control_score')),
                     mean(of('answer_logprob')), len(asked), len(group) - len(asked),
                     *([text_of(task, group[-1])] if task in TASKS else []), seed=group[-1].get('seed'),
                     fit=(group[-1]['fit'], group[-1]['of']) if 'fit' in group[-1] else None))
  return made


def percent(x: float | None) -> str:
  """Of a part of 1."""
  return '-' if x is None else f'{100 * x:.1f}' if x == 0 or x >= 5e-4 else f'{100 * x:.1g}'


def markdown(columns: Sequence[str], rules: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A table; `rules` are '---' and '---:'."""
  return '\n'.join('| ' + ' | '.join(row) + ' |' for row in (columns, rules, *rows))


def footnotes(found: Sequence[Cell]) -> list[str]:
  """What the mark means, what the text was that was given, and what was left out."""
  def of(chosen: Sequence[Cell]) -> str:
    tasks: dict[str, list[str]] = {}
    for c in chosen:
      if c.task not in tasks.setdefault(c.text.words, []):
        tasks[c.text.words].append(c.task)
    return '; '.join(f'{", ".join(names)}: {words}' for words, names in tasks.items())

  made_up = of([c for c in found if c.text.synthetic])
  given = of([c for c in found if c.text.given and not c.text.synthetic])
  short = [f'{c.task} at {c.length:,}: {c.fit[0]:,} of {c.fit[1]:,} items fit' for c in found
           if c.fit and c.fit[0] < c.fit[1]]
  return ([f'{SYNTHETIC}: made-up text stands in for what the published task has. {made_up}.'] * bool(made_up)
          + [f'Text given: {given}.'] * bool(given)
          + [f'{"; ".join(short)}; the longer ones were left out.'] * bool(short))


def table(found: Sequence[Cell], floors: Mapping[str, float | None]) -> str:
  """Markdown, in percent; the columns of what was asked of no cell are left out. `floors`: None is not known."""
  columns = [
      ('task', '---', lambda c: c.name),
      ('length', '---:', lambda c: f'{c.length:,}'),
      ('score, %', '---:', lambda c: percent(c.score and c.score.mean)),
      ('95 % interval', '---', lambda c: '-' if c.score is None else
       f'{percent(c.score.low)} to {percent(c.score.high)}'),
      ('guessing', '---:', lambda c: percent(floors[c.task])),
      ('without context', '---:', lambda c: percent(c.control)),
      ('nats of the answer', '---:', lambda c: '-' if c.logprob is None else f'{-c.logprob:.3f}'),
      ('n', '---:', lambda c: f'{c.count:,}'),
      ('too long', '---:', lambda c: f'{c.too_long:,}')]
  unused = {'without context': all(c.control is None for c in found),
            'nats of the answer': all(c.logprob is None for c in found),
            'too long': not any(c.too_long for c in found)}
  columns = [column for column in columns if not unused.get(column[0])]
  return markdown([name for name, _, _ in columns], [rule for _, rule, _ in columns],
                  [[cell(c) for _, _, cell in columns] for c in found])


class Records:
  """The lines of W/tasks.jsonl that have the key of their task. `enabled`: False on all processes but one, which write nothing."""

  def __init__(self, folder: str | os.PathLike, keys: Mapping[str, str], enabled: bool = True):
    """Reads the file; `keys`: of each task; a torn last line is dropped. ConfigError names any other that is not ours."""
    self.path, self.enabled = Path(folder) / 'tasks.jsonl', enabled
    self.lines: dict[tuple, dict] = {}
    if not enabled or not self.path.exists():
      return
    data = self.path.read_bytes()
    whole = data[:data.rfind(b'\n') + 1]
    for number, line in enumerate(whole.splitlines(), start=1):
      try:
        value = json.loads(line)
        if value['key'] == keys.get(value['task']):
          self.lines[identity(value)] = value
      except (ValueError, KeyError, TypeError) as e:
        raise ConfigError(f'{self.path}: line {number} is no line of an evaluation; remove it, or the '
                          'file, to have its examples asked again') from e
    if len(whole) < len(data):
      try:
        os.truncate(self.path, len(whole))
      except OSError as e:
        raise ConfigError(f'{self.path}: cannot drop its torn last line ({e.strerror}); let yourself '
                          'write there, or give another workdir') from e

  def append(self, lines: Sequence[dict]) -> None:
    """In one call, and on the disk when it returns."""
    for line in lines:
      self.lines[identity(line)] = line
    if not self.enabled:
      return
    data = b''.join(json.dumps(line, allow_nan=False).encode() + b'\n' for line in lines)
    try:
      new = not self.path.exists()
      with open(self.path, 'ab', buffering=0) as file:
        end = file.tell()
        if file.write(data) < len(data):
          file.truncate(end)
          raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())
      if new:
        sync_folder(self.path.parent)
    except OSError as e:
      raise ConfigError(f'{self.path}: cannot be written ({e.strerror}); make room, and the same command '
                        'carries on from there') from e

  def write_table(self, text: str) -> None:
    """W/tasks.md."""
    if self.enabled:
      atomic_write(self.path.with_suffix('.md'), text.encode())


def identity(line: dict) -> tuple:
  """Which example a line is of."""
  return line['task'], line['length'], line['index']
