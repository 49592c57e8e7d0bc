"""python -m longctx.main --config=configs/X.py --workdir=W [--mode=train|eval] [--config.a.b=c]

Flags in, one call. A user's mistake ends in one line on stderr and exit status 2.
Held by: tests/test_mistakes.py, tests/test_train.py.
"""

import os
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from longctx.errors import ConfigError, nearest

_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'Config file, such as configs/quickstart.py or configs/quickstart.py:debug; '
    'any leaf can be overridden: --config.model.num_layers=6.', lock_config=True)
_WORKDIR = flags.DEFINE_string('workdir', '', 'Folder of the run: checkpoints, metrics, figures.')
_MODE = flags.DEFINE_string('mode', 'train', 'train: train, resume and evaluate. eval: evaluate '
                            'the newest checkpoint.')
_ALLOW = flags.DEFINE_string('allow_config_change', '', 'Keys or sections, with commas between, '
                             'in which the config may differ from the one that the workdir has.')
_DISTRIBUTED = flags.DEFINE_bool('distributed', False, 'One of several processes: call '
                                 'jax.distributed.initialize (TPU pods and SLURM are detected).')
_COORDINATOR = flags.DEFINE_string('coordinator_address', '', 'host:port of process 0; implies '
                                   '--distributed.')
_PROCESSES = flags.DEFINE_integer('num_processes', 0, 'How many processes, where not detected.')
_PROCESS = flags.DEFINE_integer('process_id', -1, 'Which of them this is, where not detected.')

MODES = ('train', 'eval')


def complain(error: Exception) -> int:
  """The one line that a user's mistake ends in; exit status 2."""
  line = ' '.join(str(error).split()) or type(error).__name__
  print(f'longctx: {line}', file=sys.stderr, flush=True)
  return 2


def parse(argv: list[str]) -> list[str]:
  """absl's flags, with each mistake told in one line."""
  try:
    return flags.FLAGS(argv, known_only=False)
  except flags.UnrecognizedFlagError as e:
    known = [name for name in flags.FLAGS if not name.startswith('config.')]
    hint = nearest(e.flagname, known)
    raise ConfigError(f'--{e.flagname}: unknown flag{hint}; see --help') from None
  except flags.Error as e:
    raise ConfigError(str(e)) from None
  except (AttributeError, KeyError, TypeError, ValueError, ImportError, OSError, SyntaxError,
          NameError) as e:
    raise ConfigError(f'--config: {e.__class__.__name__}: {e}'
                      if not isinstance(e, ConfigError) else str(e)) from None


def initialize_distributed() -> None:
  """Joins the other processes of the run, if there are any."""
  import jax
  if not (_DISTRIBUTED.value or _COORDINATOR.value):
    return
  if jax.config.jax_platforms == 'cpu' or os.environ.get('JAX_PLATFORMS') == 'cpu':
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  given = dict(coordinator_address=_COORDINATOR.value or None,
               num_processes=_PROCESSES.value or None,
               process_id=_PROCESS.value if _PROCESS.value >= 0 else None)
  jax.distributed.initialize(**given)


def set_compilation_cache(folder: str) -> None:
  """Keeps compiled programs on disk, so that the next start does not compile."""
  import jax
  if folder == 'none':
    return
  if not folder:
    caches = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    folder = os.path.join(caches, 'longctx', 'xla')
  jax.config.update('jax_compilation_cache_dir', folder)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)


def main(argv: list[str]) -> int:
  try:
    rest = parse(argv)[1:]
    if rest:
      raise ConfigError(f'{rest[0]!r}: not a flag; flags begin with --, see --help')
    if _CONFIG.value is None:
      raise ConfigError('--config: missing; give a config file, such as configs/quickstart.py')
    if not _WORKDIR.value:
      raise ConfigError('--workdir: missing; give a folder for the run, such as runs/quickstart')
    if _MODE.value not in MODES:
      raise ConfigError(f'--mode={_MODE.value}: must be one of {", ".join(MODES)}'
                        f'{nearest(_MODE.value, MODES)}')
    logging.set_verbosity(logging.WARNING)
    initialize_distributed()
    set_compilation_cache(str(_CONFIG.value.get('run', {}).get('compilation_cache', '')))
    from longctx import train
    train.run(_CONFIG.value, _WORKDIR.value, mode=_MODE.value, allow_config_change=_ALLOW.value)
  except ConfigError as e:
    return complain(e)
  except KeyboardInterrupt:
    return complain(KeyboardInterrupt('interrupted'))
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv))
