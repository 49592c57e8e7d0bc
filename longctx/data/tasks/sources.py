"""What the files hold that tasks are given text by: the SHA-256 of what is read, whatever the path.

Held by: tests/test_task_sources.py.
"""

import hashlib
import pathlib
from collections.abc import Mapping, Sequence

from longctx.data.tasks import haystack, lra, paragraphs
from longctx.data.tasks.table import TASKS
from longctx.errors import ConfigError


def digests(names: Sequence[str], given: Mapping[str, str]) -> dict[str, str]:
  """{source: digest of the files} of each of example.SOURCES that is given and names files.

  Args:
    names: of tasks; of a folder the files that these read count.
    given: as a config has them.
  """
  found = {}
  if given.get('haystack') and given['haystack'] not in haystack.NAMES:
    found['haystack'] = _digest('haystack', [(str(i), path) for i, path in enumerate(haystack.paths(given['haystack']))])
  if given.get('paragraphs'):
    found['paragraphs'] = _digest(
        'paragraphs', [(str(i), path) for i, path in enumerate(paragraphs.paths(given['paragraphs']))])
  if given.get('files'):
    folder = pathlib.Path(given['files']).expanduser()
    read = sorted({path for name in names if 'files' in TASKS[name].reads for path in lra.paths(name, folder)})
    found['files'] = _digest('files', [(str(path.relative_to(folder)), path) for path in read])
  return found


def _digest(source: str, named: Sequence[tuple[str, str | pathlib.Path]]) -> str:
  """Of names and contents, each file read in pieces."""
  whole = hashlib.sha256()
  for name, path in named:
    try:
      with open(path, 'rb') as file:
        whole.update(f'{name} {hashlib.file_digest(file, "sha256").hexdigest()}\n'.encode())
    except OSError as e:
      raise ConfigError(f'eval.{source}: {path}: cannot be read ({e.strerror}); let yourself read it, or name other '
                        'files') from e
  return whole.hexdigest()[:16]


def forget() -> None:
  """Has what was read of files read again, should they have changed."""
  haystack.read.cache_clear()
  paragraphs.read.cache_clear()
  lra.items.cache_clear()
