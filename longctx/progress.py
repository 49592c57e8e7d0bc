"""Long work says that it goes on, to whoever waits for it: a cache that is built, an evaluation.

    with progress.told(ledger.tick):    each `progress.moved()` inside calls it

It is said after a piece that takes seconds, and by the thread that began the `with`: so a piece that hangs is
heard of by nobody. Where nobody listens nothing happens.
Held by: tests/test_data_cache.py, tests/test_data_remote.py (pieces made in other processes), tests/test_train.py.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

_listener: contextvars.ContextVar[Callable[[], None] | None] = contextvars.ContextVar('listener', default=None)


def moved() -> None:
  """Says that a piece is done."""
  if listener := _listener.get():
    listener()


def listen(listener: Callable[[], None]) -> contextvars.Token:
  """From here on, in this thread."""
  return _listener.set(listener)


@contextlib.contextmanager
def told(listener: Callable[[], None]) -> Iterator[None]:
  token = listen(listener)
  try:
    yield
  finally:
    _listener.reset(token)
