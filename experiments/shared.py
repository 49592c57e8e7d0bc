"""What experiments of many runs share: a file of results that goes on where it stopped, what made a line,
figures, memory."""

import hashlib
import json
import os
import resource
import subprocess
from collections.abc import Callable, Iterable

import jax

import longctx

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

Run = tuple[dict, Callable[[], dict]]   # what it is, and what does it


def carry_on(path: str, runs: Callable[[list[dict]], Iterable[Run]]) -> list[dict]:
  """Does the runs that are not lines of `path` yet, adds a line for each, and gives all lines.

  `runs` is given the lines, which grow while it is asked for the next.
  """
  done = read(path)
  for key, work in runs(done):
    if any(all(row[k] == v for k, v in key.items()) for row in done):
      continue
    row = key | work()
    done.append(row)
    with open(path, 'a', encoding='utf-8') as file:
      file.write(json.dumps(row) + '\n')
    print(json.dumps({k: v for k, v in row.items() if not isinstance(v, list)}), flush=True)
  return done


def read(path: str) -> list[dict]:
  """The lines of a file; a last one that was cut short is dropped from the file too."""
  if not os.path.exists(path):
    return []
  with open(path, encoding='utf-8') as file:
    lines = file.read().split('\n')
  if lines[-1]:   # the process was killed while it wrote
    with open(path, 'w', encoding='utf-8') as file:
      file.writelines(line + '\n' for line in lines[:-1])
  return [json.loads(line) for line in lines[:-1]]


def provenance() -> dict:
  """What a line was made by: the commit ('+' behind it: Python files differ from it; None: no repository
  or no git) and versions."""
  def git(*arguments: str) -> str | None:
    try:
      done = subprocess.run(['git', '-C', ROOT, *arguments], capture_output=True, text=True)
    except OSError:
      return None
    return done.stdout.strip() if done.returncode == 0 else None
  commit = git('rev-parse', '--short=12', 'HEAD')
  if commit and git('status', '--porcelain', '--', '*.py'):
    commit += '+'
  return dict(commit=commit, versions=dict(longctx=longctx.__version__, jax=jax.__version__))


def digest(paths: Iterable[str]) -> str:
  """16 hexadecimal digits of the SHA-256 of all files' names and bytes, in the order given."""
  found = hashlib.sha256()
  for path in paths:
    with open(path, 'rb') as file:
      data = file.read()
    found.update(f'{os.path.basename(path)} {len(data)}\n'.encode() + data)
  return found.hexdigest()[:16]


def draw(panels: Callable, path: str, *, width: float, height: float) -> None:
  """Draws `panels(figure)` into a PNG; sizes in inches."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure
  figure = Figure(figsize=(width, height), dpi=150, layout='constrained')
  FigureCanvasAgg(figure)
  panels(figure)
  figure.savefig(path)


def resident() -> int:
  """Bytes of this process in memory now."""
  with open('/proc/self/statm', encoding='ascii') as file:
    return int(file.read().split()[1]) * resource.getpagesize()
