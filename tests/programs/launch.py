"""Starts `python -m longctx.main` on the tiny config, as one process or as several."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def command(workdir, text: dict[str, str], variant: str = 'packed', **changes) -> list[str]:
  """run_num_steps=40 becomes --config.run.num_steps=40; `text` is the corpus and its cache."""
  changes = {f'data_{name}': value for name, value in text.items()} | changes
  flags = [f'--config.{name.replace("_", ".", 1)}={value}' for name, value in changes.items()]
  return [sys.executable, '-m', 'longctx.main', f'--workdir={workdir}',
          f'--config=tests/programs/tiny.py:{variant}', *flags]


def start(arguments: list[str], output: Path, devices: int = 1, quick: bool = True
          ) -> subprocess.Popen:
  """A process whose output goes to a file; `quick` compiles in a third of the time."""
  env = os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': str(devices),
                      'JAX_DISABLE_MOST_OPTIMIZATIONS': str(quick).lower()}
  with open(output, 'wb') as file:
    return subprocess.Popen(arguments, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT)


@contextlib.contextmanager
def several(arguments: list[str], output: Path, processes: int = 2, devices: int = 4):
  """(processes, their output files) of one distributed run; none is left behind."""
  with socket.socket() as s:
    s.bind(('localhost', 0))
    address = f'localhost:{s.getsockname()[1]}'
  files = [output.with_suffix(f'.{i}') for i in range(processes)]
  children = [start([*arguments, f'--coordinator_address={address}', f'--process_id={i}',
                     f'--num_processes={processes}'], file, devices)
              for i, file in enumerate(files)]
  try:
    yield children, files
  finally:
    for child in children:
      child.kill()
      child.wait()
