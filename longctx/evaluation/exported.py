"""Reads the examples of a .jsonl file beside this one and scores answers: for exported tasks.

`harness_tasks.export` copies this file, as longctx_tasks.py, and the modules that score, as the
package longctx_scores, into the folder that it writes. They need the standard library, and Hugging
Face's datasets, which lm_eval has.
Held by: tests/test_lm_eval.py (run where neither longctx nor NumPy can be imported).
"""

import functools
import importlib.util
import json
import pathlib
import sys
import types
import zlib
from typing import Any

FOLDER = pathlib.Path(__file__).parent


def load(longctx_file: str, **metadata: Any) -> dict[str, Any]:
  """The data set of a task, for its `custom_dataset`."""
  del metadata   # of the command line, for other tasks
  import datasets
  with open(FOLDER / longctx_file, encoding='utf-8') as file:
    return {'test': datasets.Dataset.from_list([json.loads(line) for line in file])}


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
  """{'score': 0 to 1} of what a model wrote."""
  module, _, function = doc['scorer'].partition('.')
  example = types.SimpleNamespace(references=tuple(doc['references']), info=json.loads(doc['info']))
  return {'score': getattr(_scores(module), function)(results[0], example)}


@functools.cache
def _scores(module: str) -> types.ModuleType:
  # Another folder's may be of another version.
  package = f'longctx_scores_{zlib.crc32(bytes(FOLDER))}'
  if package not in sys.modules:
    init = FOLDER / 'longctx_scores' / '__init__.py'
    spec = importlib.util.spec_from_file_location(package, init)
    sys.modules[package] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[package])
  return importlib.import_module(f'{package}.{module}')
