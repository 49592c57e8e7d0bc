"""A list of the files of a folder with their sizes and SHA-256, by which damage is seen.

The checkpoint format has checksums over part of its bytes only: an array's own bytes may flip
unseen. The manifest covers all that was there when it was written.

Held by: tests/test_checkpoint.py (every file of a checkpoint, flipped, cut short, removed).
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from longctx.files import PASSING, PAUSES, again, atomic_write

NAME = 'manifest.json'
_THREADS = 4  # hashing releases the interpreter lock; more threads than this starve the train step


NOT_NOW = 'cannot be read now'   # and is not damaged


def why(e: OSError | ValueError) -> str:
  """Of what was tried again where that may help."""
  if getattr(e, 'errno', None) in PASSING:
    return f'{NOT_NOW} ({e.strerror}), tried for {sum(PAUSES)} s'
  return f'cannot be read ({e})'


def write(folder: Path) -> None:
  """Lists every file now in the subfolders of `folder` in folder/manifest.json."""
  names = sorted(str(p.relative_to(folder)) for p in folder.glob('*/**/*') if p.is_file())
  with ThreadPoolExecutor(_THREADS) as pool:
    digests = list(pool.map(lambda name: _digest(folder / name), names))
  files = {name: [(folder / name).stat().st_size, digest] for name, digest in zip(names, digests)}
  atomic_write(folder / NAME, json.dumps({'files': files}, indent=1).encode())


def fault(folder: Path) -> str:
  """What is wrong with `folder`, in a few words; '' if every listed file is as it was written."""
  try:
    files = dict(json.loads(again((folder / NAME).read_bytes))['files'])
  except FileNotFoundError:
    return f'{NAME} is missing'
  except OSError as e:
    return f'{NAME} {why(e)}'
  except (ValueError, KeyError, TypeError):
    return f'{NAME} is damaged'
  pool = ThreadPoolExecutor(_THREADS)
  try:
    faults = pool.map(lambda item: _file_fault(folder, *item), files.items())
    return next(filter(None, faults), '')
  finally:
    pool.shutdown(cancel_futures=True)   # each would be tried for a minute


def _file_fault(folder: Path, name: str, expected: object) -> str:
  try:
    if not isinstance(expected, list) or len(expected) != 2:
      return f'{NAME} is damaged'
    size = again((folder / name).stat).st_size
    if size != expected[0]:
      return f'{name} has {size} bytes instead of {expected[0]}'
    if again(_digest, folder / name) != expected[1]:
      return f'{name} is damaged (its SHA-256 differs)'
  except FileNotFoundError:
    return f'{name} is missing'
  except (OSError, ValueError) as e:  # ValueError: a NUL in a damaged name
    return f'{name} {why(e)}'
  return ''


def _digest(path: Path) -> str:
  with open(path, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()
