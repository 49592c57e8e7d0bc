"""What makes an evaluation again: its config, told by what differs from the run's, and the command.

A line of tasks.jsonl, and evaluation.json, have `overrides`, the leaves of the config in which the evaluation
differed from W/config.json, and `config`, the hash of all leaves, by which it is seen that W/config.json has
changed since. The whole of it is kept as W/configs/HASH.json, which the command then names.
Held by: tests/test_eval_again.py, tests/test_eval_tasks.py (the command, run through the flags).
"""

import copy
import functools
import hashlib
import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from longctx.data.tasks.table import TASKS
from longctx.training import workdir
from longctx.training.metrics import refusal_is_told

ROOT = Path(__file__).parents[2]
CONFIGS = 'configs'   # of W


def digest(config: Any) -> str:
  """The hash of a config, a ConfigDict or as JSON gives it back."""
  return hashlib.sha256(json.dumps(workdir.plain(config), sort_keys=True).encode()).hexdigest()[:16]


def about(folder: str, config: Any) -> dict[str, Any]:
  """What is kept of the config of an evaluation of the workdir `folder`."""
  return dict(config=digest(config), overrides=workdir.overrides(folder, config))


def keep(folder: str, config: Any) -> None:
  """Keeps the config of an evaluation in W, once; a disk that takes nothing costs the command alone."""
  path = kept_path(folder, digest(config))
  if jax.process_index() == 0 and not path.exists():
    with refusal_is_told(str(path)):
      path.parent.mkdir(exist_ok=True)
      workdir.atomic_write(path, (json.dumps(workdir.plain(config), indent=2, sort_keys=True) + '\n').encode())


def kept_path(folder: str, hashed: str) -> Path:
  return Path(folder) / CONFIGS / f'{hashed}.json'


def kept(folder: str, hashed: str) -> dict | None:
  """The config of this hash, where W has it and it is whole."""
  try:
    config = json.loads(kept_path(folder, hashed).read_bytes())
  except (OSError, ValueError):
    return None
  return config if digest(config) == hashed else None


@functools.cache
def commit() -> str | None:
  """That this code is of, '+' behind it where Python files differ from it; None: not a checkout, or no git."""
  def git(*words: str) -> str:
    return subprocess.run(['git', '--no-optional-locks', '-C', str(ROOT), *words], capture_output=True, text=True,
                          check=True, timeout=10).stdout.strip()
  if not (ROOT / '.git').exists():   # nor is it of a repository that an installed package lies in
    return None
  try:
    return git('rev-parse', '--short=12', 'HEAD') + '+' * bool(git('status', '--porcelain', '--', '*.py'))
  except (OSError, subprocess.SubprocessError, ValueError):
    return None


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


def of_now(folder: str, config: dict, found: Mapping[str, Any], overrides: Callable[[dict], dict[str, Any]]
           ) -> tuple[list[str], bool]:
  """(the words of the command, whether it gives the config of then) of a line or of evaluation.json.

  Args:
    folder: the workdir W.
    config: W/config.json of now.
    found: the line, or evaluation.json.
    overrides: of_tasks or of_held_out, of a run's config.
  """
  same, step = is_made_by(config, found), found.get('step')
  then = None if same else kept(folder, found['config'])
  if then is None:
    return command(folder, step, overrides(config)), same
  now, old = workdir.leaves(config), workdir.leaves(then)
  flags = {name: value for name, value in overrides(then).items() if name not in old or old[name] != value}
  given, absent = old | flags, object()
  changed = [name for name in sorted(now | given) if now.get(name, absent) != given.get(name, absent)]
  return command(folder, step, flags, kept_path(folder, found['config']), changed), True


def command(folder: str, step: int | None, flags: Mapping[str, Any], config: str | Path = 'CONFIG',
            changed: Sequence[str] | None = None) -> list[str]:
  """The words of the command.

  Args:
    folder: the workdir W.
    step: of the checkpoint.
    flags: leaves that are given besides.
    config: the file; CONFIG stands for that of the run's config.
    changed: the leaves that differ from W/config.json; None: those of flags.
  """
  changed = [name for name in (flags if changed is None else changed) if not workdir.within(name, workdir.EVALUATED)]
  return ['python', '-m', 'longctx.main', f'--config={config}', f'--workdir={folder}', '--mode=eval',
          *([] if step is None else [f'--checkpoint={step}']),
          *([f'--allow_config_change={",".join(changed)}'] if changed else []),
          *(f'--config.{name}={workdir.tuples(value)}' for name, value in flags.items())]
