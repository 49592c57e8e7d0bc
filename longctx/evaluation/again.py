"""What makes an evaluation again: its config, told by what differs from the run's, and the command.

A line of tasks.jsonl, and evaluation.json, have `overrides`, the leaves of the config in which the evaluation
differed from W/config.json, and `config`, the hash of all leaves, by which it is seen that W/config.json has
changed since.
Held by: tests/test_eval_again.py, tests/test_eval_tasks.py (the command, run through the flags).
"""

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from longctx.data.tasks.table import TASKS
from longctx.training import workdir


def digest(config: Any) -> str:
  """The hash of a config, a ConfigDict or as JSON gives it back."""
  return hashlib.sha256(json.dumps(workdir.plain(config), sort_keys=True).encode()).hexdigest()[:16]


def about(folder: str, config: Any) -> dict[str, Any]:
  """What is kept of the config of an evaluation of the workdir `folder`."""
  return dict(config=digest(config), overrides=workdir.overrides(folder, config))


def is_made_by(config: dict, found: Mapping[str, Any]) -> bool:
  """Whether this config, with the overrides of a line or of evaluation.json, is the one of then."""
  config = copy.deepcopy(config)
  for name, value in found.get('overrides', {}).items():
    *sections, field = name.split('.')
    inner = config
    for section in sections:
      inner = inner.setdefault(section, {})
    inner[field] = value
  return 'config' not in found or digest(config) == found['config']


def of_tasks(config: dict, lines: Sequence[dict]) -> dict[str, Any]:
  """The overrides that ask all that `lines` answer, which share settings and texts (report.newest); `config` is the
  run's."""
  flags = dict(lines[-1]['overrides'])
  asked = workdir.leaves(config) | flags
  each = lambda field: dict.fromkeys(line[field] for line in lines)
  own = dict(tasks=asked['eval.tasks'], lengths=asked['eval.lengths'] or [asked['data.length']],
             samples=asked['eval.samples'])
  # An earlier command may have asked more under the same key.
  every = dict(tasks=[*dict.fromkeys([*own['tasks'], *each('task')])],
               lengths=[*dict.fromkeys([*own['lengths'], *each('length')])],
               samples=max(own['samples'], 1 + max(line['index'] for line in lines)))
  for line in lines:   # the newest last; one that asked no task that reads a text may not have named it
    reads = TASKS[line['task']].reads if line['task'] in TASKS else ()
    given = {source: line.get(source, '') for source in reads} | ({'depths': line['depths']} if 'depths' in line else {})
    every |= given
    own |= {name: asked.get(f'eval.{name}', 0 if name == 'depths' else '') for name in given}
  flags |= {f'eval.{name}': value for name, value in every.items() if value != own[name]}
  if any(line['too_long'] for line in lines):
    flags['eval.too_long'] = 'count'
  return flags


def of_held_out(config: dict, found: Mapping[str, Any]) -> dict[str, Any]:
  """The overrides of evaluation.json, which is read where no task is put."""
  flags = dict(found.get('overrides', {}))
  return flags | ({'eval.tasks': []} if (workdir.leaves(config) | flags).get('eval.tasks') else {})


def command(folder: str, step: int | None, flags: Mapping[str, Any]) -> list[str]:
  """The words of the command; CONFIG stands for the file of the run's config."""
  changed = [name for name in flags if not workdir.within(name, workdir.EVALUATED)]
  return ['python', '-m', 'longctx.main', '--config=CONFIG', f'--workdir={folder}', '--mode=eval',
          *([] if step is None else [f'--checkpoint={step}']),
          *([f'--allow_config_change={",".join(changed)}'] if changed else []),
          *(f'--config.{name}={workdir.tuples(value)}' for name, value in flags.items())]
