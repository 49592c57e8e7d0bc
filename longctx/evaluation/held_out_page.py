"""Held-out text in the report: scores with their intervals, all and by position, LongPPL and the context's gain.

Made from evaluation.json, as result.py and held_out.py write it, or wrote it before there were intervals.
Held by: tests/test_report.py.
"""

from collections.abc import Collection

from longctx.draw import position
from longctx.evaluation import page, records


def parts(found: dict, leave_out: Collection[str]) -> list[str]:
  """What stands under the heading; of rows that are right all fields but those that are left out."""
  if 'modes' not in found:   # rows that are right, see held_out.py
    rows = [[key.replace('_', ' '), f'{value:,.4g}' if isinstance(value, float) else f'{value}']
            for key, value in found.items() if value is not None and key not in leave_out]
    return [page.table(['measure', 'value'], rows)]
  rows = [[mode, *_scored(one)] for mode, one in found['modes'].items()]
  made = [page.table(['windows', *SCORED], rows),
          page.paragraph('95 % interval: had other documents been drawn; -: too few documents to tell.', soft=True),
          page.figure(lambda file: position.draw({f'step {found["step"]}': found}, file),
                      'Loss by context position: tokens before the predicted one; about it its 95 % interval.')]
  for mode, one in found['modes'].items():
    rows = [[_position(row), *_scored(row)] for row in one['positions'] if row['tokens'] and not row['few']]
    made.append(page.details(f'{mode}: by position', page.table(['position', *SCORED], rows)))
  return made + (_key_tokens(found['key_tokens']) if 'key_tokens' in found else [])


SCORED = ('tokens', 'bits per byte', '95 % interval', 'perplexity', '95 % interval')


def _scored(one: dict) -> list[str]:
  """Cells under SCORED."""
  return [f'{one["tokens"]:,}', _number(one['bits_per_byte'], 4), _interval(one, 'bits_per_byte', 4),
          _number(one['perplexity'], 3), _interval(one, 'perplexity', 3)]


def _key_tokens(found: dict) -> list[str]:
  """LongPPL, and what a long context gains, see longppl.py."""
  short, stride = found['short_context'], found['stride']
  gained = lambda one: [f'{one["tokens"]:,}', f'{one["keys"]:,}', _number(one['gain'], 4), _interval(one, 'gain', 4)]
  rows = [[_position(row), *gained(row)] for row in found['positions'] if row['tokens']]
  return [
    page.heading('Key tokens and gain of the context', 3),
    page.table(['tokens', 'key tokens', 'share, %', 'LongPPL', '95 % interval'],
               [[f'{found["tokens"]:,}', f'{found["keys"]:,}', records.percent(found['share']),
                 _number(found['perplexity'], 3), _interval(found, 'perplexity', 3)]]),
    page.table(['position', 'tokens', 'key tokens', 'gain, nats', '95 % interval'], [*rows, ['all', *gained(found)]]),
    page.paragraph(f'gain: nats a token by which all the context foretells it better than the last {short - stride:,} '
                   f'to {short:,} tokens alone. key: a token of gain over {found["alpha"]:g} and loss under '
                   f'{found["beta"]:g} nats. LongPPL: the perplexity of key tokens.', soft=True),
  ]


def _position(row: dict) -> str:
  return f'{row["first"]:,}' if row['first'] == row['last'] else f'{row["first"]:,}-{row["last"]:,}'


def _number(x: float | None, digits: int) -> str:
  return '-' if x is None else f'{x:,.{digits}f}'


def _interval(one: dict, name: str, digits: int) -> str:
  """Of a file that an earlier version wrote there is none."""
  low, high = one.get(f'{name}_low'), one.get(f'{name}_high')
  return '-' if low is None or high is None else f'{_number(low, digits)} to {_number(high, digits)}'
