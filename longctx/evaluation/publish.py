"""What an evaluation by position leaves in a workdir: the table printed, evaluation.json, a figure.

Held by: tests/test_train.py.
"""

import io
import json
import os
from collections.abc import Mapping
from typing import Any

import jax

from longctx.evaluation import held_out, result
from longctx.training import workdir
from longctx.training.metrics import refusal_is_told


def publish(found: result.Result | held_out.Result, folder: str, at: int,
            about: Mapping[str, Any] | None = None) -> bool:
  """Prints the table; writes evaluation.json and figures/loss_by_position.png. False: not all.

  `about`: what evaluation.json tells of the model and the text, see examine.about. How many examples are right is a number without a figure.
  """
  if jax.process_index() != 0:
    return True
  from longctx.draw import position
  print(found.table(), flush=True)
  values, figure = f'{folder}/evaluation.json', f'{folder}/figures/loss_by_position.png'
  written = []
  with refusal_is_told(values):
    workdir.atomic_write(values, (json.dumps(
        dict(step=at) | dict(about or {}) | found.to_json(), indent=2) + '\n').encode())
    written.append(values)
  if isinstance(found, held_out.Result):
    return len(written) == 1
  with refusal_is_told(figure):
    os.makedirs(os.path.dirname(figure), exist_ok=True)
    drawn = io.BytesIO()
    position.draw({f'step {at}': found.to_json()}, drawn)
    workdir.atomic_write(figure, drawn.getvalue())
    written.append(figure)
    print(f'figure: {figure}', flush=True)
  return len(written) == 2
