"""Every task that a config may name, by its name."""

from longctx.data.tasks import listops, needles, symbols
from longctx.data.tasks.example import Task

TASKS: dict[str, Task] = {**needles.TASKS, **symbols.TASKS, **listops.TASKS}
