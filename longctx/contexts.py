"""python -m longctx.contexts COMMAND [NAME ...] --store=DIR [--key_file=FILE] [--budget=10GiB]

Looks after the contexts that python -m longctx.chat saves in a folder.

  list                 every context: tokens, bytes, model, when it was used last
  show NAME            what is known of one, after checking every byte of it
  fork NAME NEW        a copy that goes its own way
  delete NAME ...      removes contexts; what is pinned must be unpinned first
  pin NAME ...         never dropped for room, nor deleted; unpin NAME ... undoes it
  encrypt NAME ...     with the key of --key_file or LONGCTX_STORE_KEY; decrypt NAME ... undoes it
  trim                 drops what was used longest ago until the rest fits --budget
"""

# A user's mistake ends in one line on stderr and exit status 2.
# Held by: tests/test_contexts.py.

import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from absl import flags

from longctx import command_line
from longctx.command_line import complain
from longctx.errors import ConfigError, check, nearest

# What each command takes: names, and '...' for one or more.
COMMANDS = {'list': (), 'show': ('NAME',), 'fork': ('NAME', 'NEW'), 'delete': ('NAME', '...'),
            'pin': ('NAME', '...'), 'unpin': ('NAME', '...'), 'encrypt': ('NAME', '...'),
            'decrypt': ('NAME', '...'), 'trim': ()}


def define_flags() -> flags.FlagValues:
  table = flags.FlagValues()
  table.set_gnu_getopt(True)   # names and flags in any order
  define_store_flags(table)
  flags.DEFINE_bool('help', False, 'Show this help.', flag_values=table)
  return table


def define_store_flags(table: flags.FlagValues) -> None:
  text = lambda *args: flags.DEFINE_string(*args, flag_values=table)
  text('store', '', 'Folder of the contexts.')
  text('key_file', '', 'File with the key of encrypted contexts: 64 hexadecimal digits or 32 bytes. '
       'Without it LONGCTX_STORE_KEY is read; without both nothing is encrypted.')
  text('budget', '', 'How much all contexts may take, such as 10GiB; empty: no bound. What was used '
       'longest ago goes first, never what is pinned or in use.')


def open_store(f: flags.FlagValues, make: bool = False) -> Any:
  """The Store of the flags --store, --key_file and --budget."""
  check(bool(f.store), '--store: missing; give a folder for contexts, such as --store=contexts')
  check(not os.path.isfile(f.store), f'--store={f.store}: is a file; give a folder')
  budget = command_line.parse_bytes('--budget', f.budget) if f.budget else 0
  check(bool(f.key_file) or not f['key_file'].present, '--key_file=: is empty; give the path of a file, or leave '
        'it out')
  check(not f.budget or budget > 0, f'--budget={f.budget}: must be at least 1 byte')
  from longctx import store
  return store.Store(f.store, key=store.read_key(f.key_file), budget=budget, make=make)


def parse(argv: list[str]) -> tuple[flags.FlagValues, str, list[str]]:
  """(flags, command, its names); ConfigError names the first mistake."""
  table = define_flags()
  words = command_line.parse_words(table, argv)
  if table.help:
    return table, '', []
  known = ', '.join(COMMANDS)
  check(bool(words), f'no command; give one of {known}, such as: python -m longctx.contexts list '
        '--store=contexts')
  command, *names = words
  check(command in COMMANDS, f'{command!r}: is no command; must be one of {known}'
        f'{nearest(command, COMMANDS)}')
  takes = COMMANDS[command]
  many = takes[-1:] == ('...',)
  check(len(names) >= 1 if many else len(names) == len(takes),
        f'{command}: takes {" ".join(takes) or "no name"}, and got '
        f'{" ".join(names) or "none"}; write {command} {" ".join(takes)}'.rstrip())
  return table, command, names


def run(f: flags.FlagValues, command: str, names: list[str]) -> None:
  store = open_store(f)
  if command == 'list':
    print(table_of(store.rows()))
  elif command == 'show':
    print(described(store, names[0]))
  elif command == 'fork':
    size, dropped = store.fork(*names)
    print('\n'.join([f'{names[1]}: a copy of {names[0]}, {size:,} bytes', *told(dropped)]))
  elif command == 'trim':
    trim(store)
  else:
    act = {'delete': store.delete, 'pin': store.pin, 'unpin': lambda name: store.pin(name, False),
           'encrypt': store.encrypt, 'decrypt': store.decrypt}[command]
    done = {'delete': 'deleted', 'pin': 'pinned', 'unpin': 'unpinned', 'encrypt': 'encrypted',
            'decrypt': 'decrypted'}[command]
    for name in names:   # all are there and can be, or none is touched
      sealed = store.row(name).state == 'encrypted'
      check(command != 'encrypt' or not sealed, f'context {name!r}: is encrypted already; leave it out')
      check(command != 'decrypt' or sealed, f'context {name!r}: is not encrypted; leave it out')
    for name in names:
      written = act(name)
      print('\n'.join([f'{name}: {done}', *told(written.dropped if written else ())]))


def told(dropped: Sequence[str]) -> list[str]:
  """The line, if any, that says what went for room."""
  return [f'dropped {", ".join(dropped)}'] if dropped else []


def trim(store: Any) -> None:
  check(store.budget > 0, 'trim: no budget; give --budget=10GiB')
  dropped, left = store.trim()
  for line in told(dropped) or ['fits; nothing was dropped'] * (left <= store.budget):
    print(line)
  check(left <= store.budget, f'--budget={store.budget}: contexts that are pinned or in use have '
        f'{left} bytes; unpin or delete some, or give a budget of {left} or more')


def table_of(rows: list) -> str:
  """One line a context, and their sum."""
  if not rows:
    return 'no contexts'
  when = lambda ns: time.strftime('%Y-%m-%d %H:%M', time.localtime(ns / 1e9))
  lines = [('name', 'tokens', 'bytes', 'model', 'used', '')]
  lines += [(r.name, '?' if r.tokens is None else f'{r.tokens:,}', f'{r.bytes:,}',
             f'{r.model} {r.hash[:8]}'.strip() or '?', when(r.used),
             ' '.join(filter(None, [r.state, 'pinned' * r.pinned]))) for r in rows]
  lines.append((f'{len(rows)} in all', '', f'{sum(r.bytes for r in rows):,}', '', '', ''))
  widths = [max(map(len, column)) for column in zip(*lines)]
  right = (1, 2)
  return '\n'.join('  '.join(
      cell.rjust(width) if i in right else cell.ljust(width)
      for i, (cell, width) in enumerate(zip(line, widths))).rstrip() for line in lines)


def described(store: Any, name: str) -> str:
  """Every fact of one context, after all its bytes were checked."""
  from longctx.store import file
  row = store.row(name)
  context = store.read(name)
  facts = file.facts(context.header)
  settings = facts.pop('config')
  facts |= {'file': str(store.path(name)), 'bytes': f'{row.bytes:,}',
            'encrypted': 'yes' if row.state == 'encrypted' else 'no',
            'pinned': 'yes' if row.pinned else 'no',
            'saved': time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(context.header.created))}
  lines = [f'{key:<14}{value}' for key, value in facts.items()]
  lines += ['', 'model'] + [f'  {key} = {value!r}' for key, value in settings.items()]
  lines += ['', 'state'] + [f'  {key}  {x.dtype}{list(x.shape)}' for key, x in context.arrays.items()]
  return '\n'.join(lines)


def main(argv: list[str]) -> int:
  try:
    f, command, names = parse(argv)
    if f.help:
      print(command_line.help_text(__doc__, f))
      return 0
    run(f, command, names)
  except ConfigError as e:
    return complain(e)
  except KeyboardInterrupt:
    return 130
  except BrokenPipeError:   # the reader, such as head, had enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv))
