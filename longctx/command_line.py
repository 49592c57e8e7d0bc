"""Flags and config files, read so that each mistake ends in one line that names it.

A face (main.py, generate.py) defines its flags in a table of its own and calls `parse_flags`, or
`parse_with_config` where it takes --config=FILE[:VARIANT] and an override for each leaf of it.
Nothing here imports jax; a config file does.
Held by: tests/test_mistakes.py, tests/test_configs.py.
"""

import glob
import importlib.machinery
import importlib.util
import inspect
import json
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags
from ml_collections.config_flags import config_path

from longctx.errors import ConfigError, check, nearest
from longctx.training.workdir import leaves, tuples

ABSL = ('flagfile', 'undefok')   # flags that every table has
HELP = {'--help', '-help', '-h', '--helpfull', '--helpshort'}
CONFIG_HELP = ('Config file, such as configs/quickstart.py or configs/quickstart.py:debug; any '
               'leaf can be overridden: --config.model.num_layers=6.')
KINDS = {'int': 'a whole number', 'float': 'a number', 'bool': 'true or false',
         'tuple': "a tuple, such as '(512, 0)' or \"('a', 'b')\""}
OVERRIDE = re.compile(r'--?(no)?config\.([^=]*)')


def complain(error: BaseException) -> int:
  """The one line that a user's mistake ends in; exit status 2."""
  line = ' '.join(str(error).split()) or type(error).__name__
  sys.stderr.write(f'longctx: {line}\n')   # at once: print writes the end of a line by itself
  sys.stderr.flush()
  return 2


CHECKPOINT_HELP = ('Which checkpoint: newest (that can be read), best (of the lowest validation '
                   'loss), or a step.')


def check_checkpoint(value: str) -> None:
  check(value in ('newest', 'best') or re.fullmatch('[0-9]+', value) is not None,
        f'--checkpoint={value}: must be newest, best or a step, such as 1000'
        f'{nearest(value, ("newest", "best"))}')


def help_text(doc: str, table: flags.FlagValues) -> str:
  """What --help prints: the face's docstring, and each flag of its own with its default."""
  lines = [doc]
  for name in table:
    if table[name].help and name not in ABSL:
      lines += [f'  --{name}={table[name].value!r}',
                textwrap.fill(table[name].help, 96, initial_indent=' ' * 6,
                              subsequent_indent=' ' * 6)]
  return '\n'.join(lines)


def parse_flags(table: flags.FlagValues, argv: list[str], more: Iterable[str] = (),
                stray: str = 'flags begin with --') -> None:
  """Reads `argv` into `table`. `more`: names that would be right too; `stray`: of other words."""
  rest = parse_words(table, argv, more)
  check(not rest, f'{"".join(rest[:1])!r}: not a flag; {stray}; see --help')


def parse_words(table: flags.FlagValues, argv: list[str], more: Iterable[str] = ()) -> list[str]:
  """Reads `argv` into `table`; returns the words that are no flags."""
  try:
    return table(argv)[1:]
  except flags.UnrecognizedFlagError as e:
    hint = nearest(e.flagname, [*(n for n in table if n not in ABSL), *more])
    raise ConfigError(f'--{e.flagname}: unknown flag{hint}; see --help') from None
  except flags.IllegalFlagValueError as e:
    raise ConfigError(_illegal_value(e, table)) from None
  except flags.Error as e:
    raise ConfigError(_other_fault(e)) from None


def parse_bytes(flag: str, text: str) -> int:
  """Bytes of '10GiB', '500 MB' or '1000000'."""
  found = re.fullmatch(r'\s*([0-9]+(?:\.[0-9]*)?)\s*(?:([kKMGT])(i?))?B?\s*', text)
  check(found is not None, f'{flag}={text}: must be a size, such as 10GiB, 500MB or 1000000')
  number, letter, binary = found.groups()
  return int(float(number) * (1024 if binary else 1000) ** ' KMGT'.index((letter or ' ').upper()))


def _other_fault(e: flags.Error) -> str:
  name = str(e).removeprefix('Missing value for flag ')
  if name != str(e):
    return f'{name}: has no value; write {name}=VALUE'
  return f'--flagfile: {str(e).removeprefix("ERROR:: ")}' if 'flagfile' in str(e) else str(e)


def _illegal_value(e: flags.IllegalFlagValueError, table: flags.FlagValues) -> str:
  """'--seed=x: must be a whole number'; a config's field goes by its own name."""
  # absl says 'flag --NAME=VALUE: REASON', and has no attributes that tell them apart.
  name, said = re.fullmatch(r'flag --([^=]+)=(.*)', str(e), re.DOTALL).groups()
  value = said.removesuffix(f': {e.__context__}')
  kind = table[name].parser.flag_type() or 'string'
  field = name.removeprefix('config.') if name.startswith('config.') else f'--{name}'
  return f'{field}={value}: must be {KINDS.get(kind, kind)}'


def parse_with_config(define: Callable[[], flags.FlagValues], argv: list[str],
                      stray: str = 'flags begin with --'
                      ) -> tuple[flags.FlagValues, ml_collections.ConfigDict | None]:
  """(flags, config), with the config's leaves overridden; config is None where none was given.

  `define()` makes the table of the face's own flags; `stray` is of words that are none.
  """
  table = define()
  try:
    argv = table.read_flags_from_files(argv, force_gnu=False)
  except flags.Error as e:
    raise ConfigError(_other_fault(e)) from None
  given, argv = _take_config(argv)
  if given is None:
    check(not any(OVERRIDE.match(arg) for arg in argv),
          '--config: missing; give a config file before its overrides, such as '
          '--config=configs/quickstart.py')
    parse_flags(table, argv, ['config'], stray)
    return table, None
  config = load_config_file(given)
  names = leaves(config.to_dict())
  _check_overrides(config, names, argv)
  try:
    config_flags.DEFINE_config_dict('config', config, CONFIG_HELP, flag_values=table,
                                    sys_argv=argv)
  except flags.Error as e:
    raise ConfigError(str(e)) from None
  parse_flags(table, argv, [f'config.{name}' for name in names], stray)
  return table, config


def _take_config(argv: list[str]) -> tuple[str | None, list[str]]:
  """(the value of --config, the other arguments). The last one counts, as for every flag."""
  given, rest, words = None, [], iter(argv)
  for word in words:
    if word == '--':
      return given, [*rest, word, *words]
    if word in ('--config', '-config'):
      given = next(words, None)
      check(given is not None, '--config: has no value; give a config file, such as '
            '--config=configs/quickstart.py')
    elif re.match('--?config=', word):
      given = word.split('=', 1)[1]
    else:
      rest.append(word)
  return given, rest


def _check_overrides(config: ml_collections.ConfigDict, names: dict[str, Any],
                     argv: list[str]) -> None:
  for name in (m[2] for m in map(OVERRIDE.match, argv) if m):
    below = [known for known in names if known.startswith(f'{name}.')]
    check(not below, f'{name}: is a section; override its fields one by one, such as '
          f'--config.{"".join(below[:1])}=...')
    section, _, field = name.partition('.')
    fields = [known for known in names if known.startswith(f'{section}.')]
    elsewhere = [known for known in names if known.rpartition('.')[2] == (field or section)]
    known = f'{section} has {", ".join(f.partition(".")[2] for f in fields)}' if fields else (
        f'a config has {", ".join(config)}')
    check(name in names, f'{name}: no such field{nearest(name, elsewhere or fields or names)}; '
          f'{known}')
    kind = config_path.get_type(name, config)
    check(kind in (int, float, bool, str, tuple), f'{name}={names[name]!r}: the config file gives '
          f'this field the type {kind.__name__}, which no flag can override; give it a number, '
          'true or false, a string or a tuple there')


def load_config_file(given: str) -> ml_collections.ConfigDict:
  """What get_config of FILE, or get_config(VARIANT) of FILE:VARIANT, returns."""
  path, colon, variant = given.partition(':')
  flag = f'--config={given}'
  check(bool(path), f'{flag}: names no file; give a config file, such as configs/quickstart.py')
  here = os.path.dirname(path)
  check(not os.path.isdir(path), f'{flag}: is a folder; give a config file in it, such as '
        f'{(sorted(glob.glob(os.path.join(path, "[!_]*.py"))) or ["configs/quickstart.py"])[0]}')
  beside = glob.glob(os.path.join(glob.escape(here), '[!_]*.py'))
  check(os.path.exists(path), f'{flag}: no such file{nearest(path, beside)}')
  if path.endswith('.json'):   # as a workdir keeps it: config.json, configs/*.json
    check(not colon, f'{flag}: a JSON file has no variants; give the file without a colon')
    return _load_json(flag, path)
  # A module of its own each time: get_config of one run says nothing to another.
  loader = importlib.machinery.SourceFileLoader('config_file', path)
  module = importlib.util.module_from_spec(
      importlib.util.spec_from_loader('config_file', loader))
  try:
    loader.exec_module(module)
    get_config = getattr(module, 'get_config', None)
    check(callable(get_config), 'has no function get_config; see configs/quickstart.py')
    check(not colon or len(inspect.signature(get_config).parameters) > 0, f'variant {variant!r}: '
          'get_config of this file takes no variant; give the file without a colon')
    config = get_config(*([variant] if colon else []))
  except ConfigError as e:
    raise ConfigError(f'{flag}: {e}') from e
  except OSError as e:
    if e.filename != path:
      raise ConfigError(f'{flag}: {_blame(e, path)}') from e
    raise ConfigError(f'{flag}: cannot be read: {e.strerror}') from e
  except (Exception, SystemExit) as e:   # whatever the user's own code raises
    raise ConfigError(f'{flag}: {_blame(e, path)}') from e
  check(isinstance(config, ml_collections.ConfigDict), f'{flag}: get_config returned '
        f'{type(config).__name__}; must be the ConfigDict that longctx.configuration.base() made')
  return config


def _load_json(flag: str, path: str) -> ml_collections.ConfigDict:
  try:
    with open(path, encoding='utf-8') as file:
      config = json.load(file)
  except OSError as e:
    raise ConfigError(f'{flag}: cannot be read: {e.strerror}') from e
  except ValueError as e:
    raise ConfigError(f'{flag}: is no JSON ({e}); give a config that a workdir keeps, or a Python file') from e
  check(isinstance(config, dict), f'{flag}: holds a {type(config).__name__}; must hold an object of sections, as a '
        "workdir's config.json does")
  return ml_collections.ConfigDict(tuples(config))


def _blame(e: BaseException, path: str) -> str:
  """'line 7: KeyError: lenght': the last line of the file that took part, and what was raised."""
  if isinstance(e, SyntaxError) and e.filename == path:
    return f'line {e.lineno}: not Python: {e.msg}'
  frames = traceback.extract_tb(e.__traceback__)
  line = next((f'line {f.lineno}: ' for f in reversed(frames) if f.filename == path), '')
  said = ' '.join(str(e).split())
  said = said if len(said) <= 300 else f'{said[:297]}...'
  return f'{line}{type(e).__name__}: {said}'
