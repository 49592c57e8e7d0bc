"""Every task that a config may name, by its name; and whether these read what they are given."""

from collections.abc import Mapping, Sequence

from longctx.data.tasks import (
    associations,
    babilong,
    coreference,
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
