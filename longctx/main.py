"""python -m longctx.main --config=configs/X.py --workdir=W [--mode=train|eval] [--config.a.b=c]
python -m longctx.main --config=configs/X.py --mode=describe|plan|compile [--topology=v5e:8x8]

Trains the config's model in the folder W; the same command again carries on from where it ended.
Or says, without training, what a step needs of the devices that are here, or of a topology.
"""

# Flags in, one call. A user's mistake ends in one line on stderr and exit status 2.
# Held by: tests/test_mistakes.py, tests/test_train.py.

import os
import re
import sys
from typing import Any

from absl import flags, logging

from longctx import command_line
from longctx.command_line import complain
from longctx.errors import ConfigError, RunError, check, check_choice, check_range

MODES = ('train', 'eval', 'describe', 'plan', 'compile')
NEED_WORKDIR = ('train', 'eval')


def define_flags() -> flags.FlagValues:
  """The flags of this face but for --config, in a table of their own."""
  table = flags.FlagValues()
  text = lambda *args: flags.DEFINE_string(*args, flag_values=table)
  whole = lambda *args: flags.DEFINE_integer(*args, flag_values=table)
  text('workdir', '', 'Folder of the run: checkpoints, metrics, figures. compile and plan write '
       'their JSON there, or into the current directory.')
  text('mode', 'train', 'train: train, resume and evaluate. eval: evaluate a checkpoint. '
       'describe: the model, its layers, state and costs. plan: predict the memory of a device, '
       'part by part. compile: compile the step and say what it needs.')
  text('topology', '', 'With describe, plan and compile: a TPU slice that need not be here, such as v5e:8x8.')
  text('checkpoint', 'newest', f'With eval. {command_line.CHECKPOINT_HELP}')
  text('allow_config_change', '', 'Keys or sections, with commas between, in which the config may '
       'differ from the one that the workdir has.')
  flags.DEFINE_bool('distributed', False, 'One of several processes: call '
                    'jax.distributed.initialize (TPU pods and SLURM are detected).',
                    flag_values=table)
  text('coordinator_address', '', 'host:port of process 0; implies --distributed.')
  whole('num_processes', 0, 'How many processes, where not detected.')
  whole('process_id', -1, 'Which of them this is, where not detected.')
  flags.DEFINE_bool('help', False, 'Show this help.', flag_values=table)
  return table


def help_text() -> str:
  table = flags.FlagValues()
  flags.DEFINE_string('config', '', command_line.CONFIG_HELP, flag_values=table)
  table.append_flag_values(define_flags())
  return command_line.help_text(__doc__, table)


def check_flags(f: flags.FlagValues) -> None:
  check_choice('--mode', f.mode, MODES)
  check(bool(f.workdir) or f.mode not in NEED_WORKDIR, '--workdir: missing; give a folder for the '
        'run, such as --workdir=runs/quickstart')
  check(not f.topology or f.mode not in NEED_WORKDIR, f'--topology={f.topology}: does nothing with '
        f'--mode={f.mode}; give --mode=describe, --mode=plan or --mode=compile')
  command_line.check_checkpoint(f.checkpoint)
  check(f.checkpoint == 'newest' or f.mode == 'eval', f'--checkpoint={f.checkpoint}: does nothing '
        f'with --mode={f.mode}; give --mode=eval')
  check(not f.coordinator_address or re.fullmatch(r'.+:\d+', f.coordinator_address) is not None,
        f'--coordinator_address={f.coordinator_address}: must be host:port, such as 10.0.0.1:1234')
  check_range('--num_processes', f.num_processes, 0)
  check_range('--process_id', f.process_id, -1)
  check(not f.num_processes or f.process_id < f.num_processes, f'--process_id={f.process_id}: must '
        f'be below --num_processes={f.num_processes}; the first process is 0')
  for name, unset in (('num_processes', 0), ('process_id', -1)):
    check(f[name].value == unset or f.distributed or bool(f.coordinator_address),
          f'--{name}={f[name].value}: does nothing alone; give --coordinator_address=host:port too')


def initialize_distributed(f: flags.FlagValues) -> None:
  """Joins the other processes of the run, if there are any."""
  import jax
  if not (f.distributed or f.coordinator_address):
    return
  # It takes SIGTERM for itself, and ends nothing: who is asked to stop here saves by himself, or leaves.
  jax.config.update('jax_enable_preemption_service', False)
  if jax.config.jax_platforms == 'cpu' or os.environ.get('JAX_PLATFORMS') == 'cpu':
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  try:
    jax.distributed.initialize(
        coordinator_address=f.coordinator_address or None, num_processes=f.num_processes or None,
        process_id=f.process_id if f.process_id >= 0 else None)
  except ValueError as e:   # what it needs was neither given nor detected
    raise ConfigError(f'--distributed: {e}; give --coordinator_address=host:port, --num_processes '
                      'and --process_id') from e


def check_devices() -> None:
  """Starts JAX's backend, with what a CPU's memory needs; a platform that is not there is named."""
  import jax
  try:
    jax.devices()
  except RuntimeError as e:
    raise ConfigError(f'JAX_PLATFORMS={jax.config.jax_platforms or ""}: {e}; set it to cpu, or to '
                      'the accelerator that this machine has') from e
  if jax.default_backend() == 'cpu':
    from longctx.parallel import host_memory
    host_memory.keep_freed_memory()


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


def run(argv: list[str]) -> int:
  """Reads the command line, checks it and does what it says; the exit status."""
  f, config = command_line.parse_with_config(define_flags, argv)
  check(config is not None, '--config: missing; give a config file, such as '
        '--config=configs/quickstart.py')
  check_flags(f)
  logging.set_verbosity(logging.WARNING)
  from longctx import configuration
  parts = configuration.parts(config)   # before other processes, or a compiler, are waited for
  if f.mode not in NEED_WORKDIR:
    return look_ahead(f, config)
  from longctx.training import workdir
  with workdir.LeaveAtOnce():   # until there is something to save
    initialize_distributed(f)
    check_devices()
    set_compilation_cache(parts.run.compilation_cache)
    from longctx import train
    return train.run(config, f.workdir, mode=f.mode, allow_config_change=f.allow_config_change,
                     checkpoint=f.checkpoint)


def look_ahead(f: flags.FlagValues, config: Any) -> int:
  """--mode=describe, plan and compile: 1 where the step does not fit."""
  if f.topology:
    from longctx.parallel import aot
    aot.check_topology(f.topology)
    import jax
    jax.config.update('jax_platforms', 'cpu')   # what is here is not asked for, and not taken
  check_devices()
  if f.mode == 'compile':
    from longctx import compile
    return compile.run(config, f.workdir, f.topology)
  if f.mode == 'describe':
    from longctx import describe
    return describe.run(config, f.workdir, f.topology)
  from longctx import plan
  return plan.run(config, f.workdir, f.topology)


def main(argv: list[str]) -> int:
  try:
    if command_line.HELP & set(argv[1:]):
      print(help_text())
      return 0
    return run(argv)
  except ConfigError as e:
    return complain(e)
  except RunError as e:
    complain(e)
    return 1
  except KeyboardInterrupt:
    complain(KeyboardInterrupt('interrupted; the same command carries on from the last checkpoint'))
    return 130


if __name__ == '__main__':
  sys.exit(main(sys.argv))
