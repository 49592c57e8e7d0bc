"""Several processes of one command over one workdir: started each by itself, or by launch/local.sh."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LIMIT = 900   # seconds for whatever is waited for, on a machine that does much else
ENVIRONMENT = os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '1',
                            'JAX_DISABLE_MOST_OPTIMIZATIONS': 'true'}   # compiles in a third of the time


class Run:
  """The processes of a run, each started by itself.

  Args:
    folder: the workdir; what they say goes beside it.
    count: how many.
    flags: of longctx.main.
    fault: as faulty.py has it; '': none.
  """

  def __init__(self, folder: Path, count: int, flags: list[str], fault: str = ''):
    self.folder, self.count = folder, count
    self.out = folder.parent / 'out' / str(time.time_ns())
    self.out.mkdir(parents=True)
    self.children: list[subprocess.Popen] = []
    self.start(flags, fault)

  def start(self, flags: list[str], fault: str) -> None:
    with socket.socket() as s:
      s.bind(('localhost', 0))
      address = f'localhost:{s.getsockname()[1]}'
    for i in range(self.count):
      self.children.append(self.popen(
          [sys.executable, *program(fault), f'--workdir={self.folder}', *flags, f'--coordinator_address={address}',
           f'--num_processes={self.count}', f'--process_id={i}'], self.out / str(i)))

  def popen(self, command: list[str], output: Path, **environment: str) -> subprocess.Popen:
    with open(output, 'wb') as file:
      return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                              env=ENVIRONMENT | environment)

  def said(self, process: int = 0) -> str:
    return (self.out / str(process)).read_text(errors='replace')

  def steps(self, after: str = '') -> list[int]:
    """The steps that are said to be done, in their order, since `after` was said."""
    said = self.said()
    if after not in said:
      return []
    return [int(x) for x in re.findall(r'^step +(\d+)/', said[said.rindex(after) if after else 0:], re.MULTILINE)]

  def wait_for(self, what: str, happened: Callable[[], bool]) -> float:
    """Until it has happened; when that was, as time.time() has it."""
    deadline = time.monotonic() + LIMIT
    while not happened():
      ended = self.children[0].poll() is not None
      if (ended and not happened()) or time.monotonic() > deadline:
        raise RuntimeError(f'{what}: did not happen; {self.said()[-1500:]}')
      time.sleep(0.01)
    return time.time()

  def kill(self, process: int, number: int) -> None:
    self.children[process].send_signal(number)

  def wait(self, but: int | None = None) -> list[int]:
    """The exit statuses of all, `but` one, once they have left."""
    deadline = time.monotonic() + LIMIT
    return [child.wait(max(1.0, deadline - time.monotonic()))
            for i, child in enumerate(self.children) if i != but]

  def __enter__(self) -> 'Run':
    return self

  def __exit__(self, *exc) -> None:
    for child in self.children:
      child.kill()
      child.wait()


class Launched(Run):
  """The same by launch/local.sh, which starts them again: its only child here."""

  def start(self, flags: list[str], fault: str) -> None:
    python = self.out / 'python'   # what the launcher takes for Python
    python.write_text(f'#!/bin/sh\nif [ "$1" = -m ]; then shift 2; set -- {" ".join(program(fault))} "$@"; fi\n'
                      f'exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    self.children.append(self.popen(
        [str(ROOT / 'launch' / 'local.sh'), f'--workdir={self.folder}', f'--processes={self.count}', '--devices=1',
         *flags], self.out / '0', PYTHON=str(python)))

  def said(self, process: int = 0) -> str:
    if not process:
      return super().said()
    log = self.folder / 'logs' / f'process_{process}.log'
    return log.read_text(errors='replace') if log.exists() else ''

  def kill(self, process: int, number: int) -> None:
    os.kill(self.pids()[process], number)

  def pids(self) -> dict[int, int]:
    """{which process: its id} of those that run."""
    found = {}
    for pid in Path(f'/proc/{self.children[0].pid}/task/{self.children[0].pid}/children').read_text().split():
      try:
        command = Path(f'/proc/{pid}/cmdline').read_text()
      except OSError:   # it has ended
        continue
      if place := re.search(r'--process_id=(\d+)', command):
        found[int(place.group(1))] = int(pid)
    return found

  def __exit__(self, *exc) -> None:
    if self.children[0].poll() is None:
      for pid in self.pids().values():
        os.kill(pid, 9)
    super().__exit__(*exc)


def program(fault: str) -> list[str]:
  return [str(HERE / 'faulty.py'), *([f'--fault={fault}'] if fault else [])]
