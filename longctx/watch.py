"""What a model does on the way, told to whoever watches: queries and keys, reads of a memory,
gates.

    with watch.told() as calls:
      hidden, state = model(tokens, state)      calls: a list of Told, in the order of the work

A part says `tell('infini', strength=...)` where the values stand anyway. Nobody watching, that is
one look at a variable while a program is traced and nothing in the program: no result, no module
and no state carries what is told. What is told inside of a scan, a branch or a rematerialised
function belongs to that function's trace, so whoever watches calls layers one by one
(longctx/evaluation/inspect.py), in the function that it compiles.
Held by: tests/test_watch.py (programs with and without `tell` are the same text).
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, NamedTuple


class Told(NamedTuple):
  """By whom, and what."""

  name: str
  values: dict[str, Any]


_listener: contextvars.ContextVar[list[Told] | None] = contextvars.ContextVar(
  'listener', default=None
)


def tell(name: str, **values: Any) -> None:
  """Nothing, unless somebody watches."""
  listener = _listener.get()
  if listener is not None:
    listener.append(Told(name, values))


@contextlib.contextmanager
def told() -> Iterator[list[Told]]:
  """What is told while the `with` lasts; one inside another hears alone."""
  calls: list[Told] = []
  token = _listener.set(calls)
  try:
    yield calls
  finally:
    _listener.reset(token)
