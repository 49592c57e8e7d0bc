"""What a user got wrong, said in one line: the field, the value, the rule, the remedy.

`ConfigError`, and `RunError` of machines that went wrong, are the exceptions that the command-line
faces turn into a single line without a traceback; everything else is a fault of ours and keeps its
traceback.
Held by: tests/test_mistakes.py.
"""

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class ConfigError(ValueError):
  """A mistake in a config, a flag, a file or a workdir that its user can mend."""


class RunError(RuntimeError):
  """What a machine got wrong, such as a file system that is away for long; started again the run may go on."""


def nearest(name: str, known: Iterable[str]) -> str:
  """' (did you mean "x"?)' with the known name closest to `name`, or '' if none is close."""
  found = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
  return f' (did you mean "{found[0]}"?)' if found else ''


@contextlib.contextmanager
def labelled(label: str) -> Iterator[None]:
  """Has a ConfigError from within begin with what its user knows the matter by."""
  try:
    yield
  except ConfigError as e:
    raise ConfigError(f'{label}: {e}') from e


def check(condition: bool, message: str) -> None:
  """Raises ConfigError(message) unless the condition holds."""
  if not condition:
    raise ConfigError(message)


def check_choice(field: str, value: str, choices: Iterable[str]) -> None:
  """Raises unless `value` is one of `choices`; names the nearest."""
  choices = list(choices)
  if value not in choices:
    raise ConfigError(
        f'{field}={value!r}: must be one of {", ".join(choices)}{nearest(value, choices)}')


def check_choices(field: str, values: Iterable[str], choices: Iterable[str]) -> None:
  """`check_choice` of each; two in one, with a comma between them, are told how to be given."""
  choices = list(choices)
  for value in values:
    parts = tuple(str(value).split(','))
    check(len(parts) == 1 or not set(parts) <= set(choices), f'{field}={value!r}: is one name; give them as "{parts}"')
    check_choice(field, value, choices)


def check_range(field: str, value: float, low: float | None = None,
                high: float | None = None) -> None:
  """Raises unless low <= value <= high (an end that is None is open); refuses NaN."""
  rule = ' and '.join([f'at least {low}'] * (low is not None) +
                      [f'at most {high}'] * (high is not None))
  inside = (value == value and (low is None or value >= low) and (high is None or value <= high))
  check(inside, f'{field}={value}: must be {rule or "a number"}')
