"""Examples from a .jsonl file beside this one, and the score of an answer: what an exported lm_eval task calls.

`harness_tasks.export` copies this file, as longctx_tasks.py, and data/tasks/scoring.py into the folder that it
writes: they need the standard library, and Hugging Face's datasets, which lm_eval has.
Held by: tests/test_lm_eval.py (run by lm_eval from a folder that knows nothing of longctx).
"""

import importlib.util
import json
import pathlib
import types
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
  spec = importlib.util.spec_from_file_location('longctx_scoring', FOLDER / 'scoring.py')
  scoring = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(scoring)
  example = types.SimpleNamespace(references=tuple(doc['references']), info=json.loads(doc['info']))
  return {'score': getattr(scoring, doc['scorer'])(results[0], example)}
