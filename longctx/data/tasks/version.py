"""Which code makes and scores the examples of a task: what was made by the same need not be compared.

Held by: tests/test_eval_tasks.py.
"""

import functools
import hashlib
import pathlib
from collections.abc import Callable

import numpy as np

from longctx.data.tasks.table import TASKS


def code_of(name: str) -> str | None:
  """The hash of the code that makes and scores a task's examples; None: it is not of this folder, and not known."""
  task = TASKS[name]
  return _here() if all(_module(f).startswith(f'{__package__}.') for f in (task.make, task.score)) else None


def _module(function: Callable) -> str:
  while isinstance(function, functools.partial):
    function = function.func
  return getattr(function, '__module__', None) or ''


@functools.cache
def _here() -> str | None:
  """Of all files of this folder, for tasks share most of them, of the tokenizers, and NumPy, which draws the numbers."""
  folder = pathlib.Path(__file__).parent
  whole = hashlib.sha256(np.__version__.encode())
  try:
    for path in (*sorted(folder.glob('*.py')), folder.parent / 'tokenizer.py'):
      whole.update(f'\n{path.name} '.encode() + hashlib.sha256(path.read_bytes()).digest())
  except OSError:   # installed without its source
    return None
  return whole.hexdigest()[:16]
