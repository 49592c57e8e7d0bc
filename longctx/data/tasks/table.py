"""Every task that a config may name, by its name; what these read of what they are given, and what without.

Held by: tests/test_tasks.py, tests/test_eval_tasks.py, tests/test_task_sources.py.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from longctx.data.tasks import (
    associations,
    babilong,
    coreference,
    haystack,
    listops,
    lra,
    needles,
    retrieval,
    ruler,
    ruler_compat,
    symbols,
)
from longctx.data.tasks.example import SOURCES, Task
from longctx.errors import check

TASKS: dict[str, Task] = {
    **needles.TASKS, **associations.TASKS, **retrieval.TASKS, **coreference.TASKS, **symbols.TASKS,
    **listops.TASKS, **babilong.TASKS, **lra.TASKS,
    **ruler.TASKS, **ruler_compat.TASKS}


def unread(names: Sequence[str], given: Mapping[str, str], setting: str) -> list[str]:
  """A sentence for each source that some of the tasks have no use for; ConfigError where all have none.

  Args:
    names: of tasks.
    given: of SOURCES, those that are not here or '' were not given.
    setting: what the user knows a source by, such as 'eval.{}'.
  """
  told = []
  for source in SOURCES:
    if not (value := given.get(source)):
      continue
    label = f'{setting.format(source)}={value!r}'
    without = [name for name in names if source not in TASKS[name].reads]
    able = [name for name, task in TASKS.items() if source in task.reads]
    check(len(without) < len(names), f'{label}: is read by none of {", ".join(names)}; leave it out, or '
          f'name a task that reads it: {", ".join(able)}')
    if without:
      told.append(f'{label}: not read by {", ".join(without)}, whose text is their own')
  return told


class Text(NamedTuple):
  """What a task's examples are made of."""

  words: str         # '' where it reads nothing that could be given
  given: bool        # by its user
  synthetic: bool    # made up, where the published task has a text of its own


SYNTHETIC = '-syn'   # behind the name of a task whose text is


def text_of(name: str, given: Mapping[str, str]) -> Text:
  """Args: given: of SOURCES, as a config or a line of tasks.jsonl has them."""
  task = TASKS[name]
  for source in task.reads:
    if source == 'files':   # the benchmark's own
      continue
    value = given.get(source, '')
    if value and (source != 'haystack' or value not in haystack.NAMES):
      return Text(repr(value), True, False)
    words = task.own.get(source, haystack.NAMES['repeated']) if not value else haystack.NAMES[value]
    instead = task.instead_of.get(source)
    return Text(f'{words} in place of {instead}' if instead else words, bool(value), bool(instead))
  return Text('', False, False)


def floor(name: str, given: Mapping[str, str]) -> float | None:
  """The score of guessing, with the texts given; None where it is not known."""
  task = TASKS[name]
  return None if any(given.get(source) for source in task.floor_without) else task.floor
