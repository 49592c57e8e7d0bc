"""What the files hold that tasks are given text by: the SHA-256 of what each reads, whatever the path.

Held by: tests/test_task_sources.py.
"""

import functools
import hashlib
import pathlib
from collections.abc import Mapping, Sequence

from longctx.data.tasks import haystack, lra, paragraphs
from longctx.data.tasks.table import TASKS
from longctx.errors import ConfigError, labelled


def digests(names: Sequence[str], given: Mapping[str, str], setting: str = 'eval.{}') -> dict[str, dict[str, str]]:
  """Of each task, {source: digest of the files} of those of example.SOURCES that it reads and that name files.

  Args:
    names: of tasks.
    given: as a config has them.
    setting: what the user knows a source by.
  """
  @functools.cache
  def of_glob(source: str) -> str:
    paths = dict(haystack=haystack, paragraphs=paragraphs)[source].paths(given[source])
    return _digest([(str(i), path) for i, path in enumerate(paths)])

  def of(name: str, source: str) -> str:
    with labelled(f'{setting.format(source)}={given[source]!r}'):
      if source != 'files':
        return of_glob(source)
      folder = pathlib.Path(given['files']).expanduser()
      return _digest([(str(path.relative_to(folder)), path) for path in sorted(lra.paths(name, folder))])

  names_files = lambda source: given.get(source) and (source != 'haystack' or given[source] not in haystack.NAMES)
  return {name: {source: of(name, source) for source in TASKS[name].reads if names_files(source)} for name in names}


def read_by(name: str, given: Mapping[str, str], found: Mapping[str, str]) -> dict[str, str]:
  """Of each source that a task reads what it is: the digest of its files among `found`, or the word given."""
  return {source: f'sha256 {found[source]}' if source in found else given.get(source, '')
          for source in (TASKS[name].reads if name in TASKS else ())}


def _digest(named: Sequence[tuple[str, str | pathlib.Path]]) -> str:
  """Of names and contents, each file read in pieces."""
  whole = hashlib.sha256()
  for name, path in named:
    try:
      with open(path, 'rb') as file:
        whole.update(f'{name} {hashlib.file_digest(file, "sha256").hexdigest()}\n'.encode())
    except OSError as e:
      raise ConfigError(f'{path}: cannot be read ({e.strerror}); let yourself read it, or name other files') from e
  return whole.hexdigest()[:16]


def forget() -> None:
  """Has what was read of files read again, should they have changed."""
  haystack.read.cache_clear()
  paragraphs.read.cache_clear()
  lra.items.cache_clear()
