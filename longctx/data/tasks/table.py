"""Every task that a config may name, by its name."""

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
from longctx.data.tasks.example import Task

TASKS: dict[str, Task] = {
    **needles.TASKS, **associations.TASKS, **retrieval.TASKS, **coreference.TASKS, **symbols.TASKS,
    **listops.TASKS, **babilong.TASKS, **lra.TASKS,
    **ruler.TASKS, **ruler_compat.TASKS}
