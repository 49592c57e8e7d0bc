"""Every task that a config may name, by its name; what these read of what they are given, and what without.

Held by: tests/test_tasks.py, tests/test_eval_tasks.py, tests/test_task_sources.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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


def unread(names: Sequence[str], given: Mapping[str, Any], setting: str) -> list[str]:
  """A sentence for each thing given that some of the tasks have no use for; ConfigError where all have none.

  Args:
    names: of tasks.
    given: of SOURCES and 'depths', those that are not here, '' or 0 were not given.
    setting: what the user knows one by, such as 'eval.{}'.
  """
  told = []
  for what in (*SOURCES, 'depths'):
    if not (value := given.get(what)):
      continue
    label = f'{setting.format(what)}={value!r}'
    able = [name for name, task in TASKS.items() if (task.placed if what == 'depths' else what in task.reads)]
    without = [name for name in names if name not in able]
    read = 'taken' if what == 'depths' else 'read'
    check(len(without) < len(names), f'{label}: is {read} by none of {", ".join(names)}; leave it out, or '
          f'name a task that {"takes" if what == "depths" else "reads"} it: {", ".join(able)}')
    if without:
      why = 'where no needle is placed' if what == 'depths' else 'whose text is their own'
      told.append(f'{label}: not {read} by {", ".join(without)}, {why}')
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
