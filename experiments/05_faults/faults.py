"""What a run of several processes does when one thing goes wrong: a fault, what was said, what was lost.

Each trial has a workdir of its own: the run begins, the fault comes at a random step, the same command is
given again where the run ended, and what stands in metrics.jsonl at the end is compared with a run that
nothing happened to.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
EVERY = 10      # steps between checkpoints
LIMIT = 1800    # seconds for one run, on a machine that does much else
# Kind -> what is promised.
KINDS = {
    'term': 'all save the same step and leave; the same command carries on',
    'kill': 'the others name the lost process and leave',
    'stop': 'the watchdog says where each stands, and ends the run',
    'cut': 'a file of the newest checkpoint, cut short: the one before is used',
    'missing': 'a file of the newest checkpoint, gone: the one before is used',
    'flip': 'a byte of the newest checkpoint, another: the one before is used',
    'resize': 'killed, and carried on by half as many processes',
    'disk': 'a save fails and is tried again; training goes on',
    'nan': 'one step is skipped',
    'divergence': 'the parameter and the process that differ are named',
}
DAMAGE = ('cut', 'missing', 'flip')


def plan(number: int, count: int, steps: int) -> dict:
  """Which fault the trial of this number has: the kinds in turn, the rest at random."""
  chance = random.Random(number)
  return dict(trial=number, kind=list(KINDS)[number % len(KINDS)], process=chance.randrange(count),
              step=chance.randrange(EVERY + 5, steps - 2 * EVERY), processes=count, steps=steps)


class Run:
  """Several processes of one command over one workdir."""

  def __init__(self, folder: Path, count: int, flags: list[str], fault: str = ''):
    self.folder, folder_out = folder, folder.parent / 'out'
    folder_out.mkdir(parents=True, exist_ok=True)
    with socket.socket() as s:
      s.bind(('localhost', 0))
      address = f'localhost:{s.getsockname()[1]}'
    program = [str(HERE / 'faulty.py'), f'--fault={fault}'] if fault else ['-m', 'longctx.main']
    self.files = [folder_out / f'{time.time_ns()}.{i}' for i in range(count)]
    self.children = []
    for i, file in enumerate(self.files):
      with open(file, 'wb') as output:
        self.children.append(subprocess.Popen(
            [sys.executable, *program, f'--workdir={folder}', *flags, f'--coordinator_address={address}',
             f'--num_processes={count}', f'--process_id={i}'], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
            env=os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '1'}))

  def said(self, process: int = 0) -> str:
    return self.files[process].read_text(errors='replace')

  def wait_for(self, step: int) -> None:
    """Until so many steps are said to be done."""
    deadline = time.monotonic() + LIMIT
    while max([0, *map(int, re.findall(r'^step +(\d+)/', self.said(), re.MULTILINE))]) < step:
      if self.children[0].poll() is not None or time.monotonic() > deadline:
        raise RuntimeError(f'step {step} was not reached: {self.said()}')
      time.sleep(0.01)

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


def flags(steps: int, cache: Path) -> list[str]:
  settings = dict(
      mesh_layout='data', data_batch_size=8, run_num_steps=steps, run_log_every=1, run_checkpoint_every=EVERY,
      run_watchdog_seconds=20, run_check_hosts_every=5, run_compilation_cache=cache / 'xla')
  return ['--config=configs/quickstart.py:debug',
          *(f'--config.{name.replace("_", ".", 1)}={value}' for name, value in settings.items())]


def logged(folder: Path) -> list[dict]:
  clock = ('tokens_per_second', 'seconds', 'skipped_steps')
  return [{k: v for k, v in json.loads(line).items() if k not in clock}
          for line in (folder / 'metrics.jsonl').read_text().splitlines()]


def checkpoints(folder: Path) -> list[int]:
  return sorted(int(p.name) for p in (folder / 'checkpoints').iterdir() if p.name.isdecimal())


def damage(folder: Path, kind: str, chance: random.Random) -> str:
  """Does to a file of the newest checkpoint what `kind` says; which file."""
  newest = folder / 'checkpoints' / str(checkpoints(folder)[-1])
  file = chance.choice(sorted(p for p in newest.rglob('*') if p.is_file() and p.stat().st_size > 1))
  if kind == 'missing':
    file.unlink()
  else:
    content = bytearray(file.read_bytes())
    at = chance.randrange(len(content))
    content[at] ^= 1 << chance.randrange(8)
    file.write_bytes(content[:at] if kind == 'cut' else content)
  return str(file.relative_to(newest))


@contextlib.contextmanager
def workdir(base: Path, key: dict) -> Iterator[Path]:
  """A new folder for a trial, removed where the trial went as it should."""
  folder = base / f'trial_{key["trial"]}'
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  yield folder / 'w'
  shutil.rmtree(folder)


def straight(base: Path, steps: int, count: int) -> list[dict]:
  """What a run logs that nothing happens to; made once."""
  folder = base / f'straight_{count}_{steps}'
  if not (folder / 'done').exists():
    with Run(folder / 'w', count, flags(steps, base)) as run:
      if any(run.wait()):
        raise RuntimeError(f'the undisturbed run failed: {run.said()}')
    (folder / 'done').touch()
  return logged(folder / 'w')


def trial(key: dict, base: Path) -> dict:
  """One fault and what came of it; a run that hangs or fails kept nothing."""
  expected = straight(base, key['steps'], key['processes'])
  try:
    return provoke(key, base, expected)
  except (RuntimeError, OSError, subprocess.TimeoutExpired) as e:
    return dict(kept=False, error=str(e)[-2000:])


def provoke(key: dict, base: Path, expected: list[dict]) -> dict:
  kind, count, steps, victim = key['kind'], key['processes'], key['steps'], key['process']
  chance, arguments = random.Random(key['trial'] + 1), flags(steps, base)
  inside = kind in ('disk', 'nan', 'divergence')
  found: dict = {}
  with workdir(base, key) as folder:
    with Run(folder, count, arguments, f'{kind}:{victim}:{key["step"]}' if inside else '') as run:
      if not inside:
        run.wait_for(key['step'])
        found |= strike(run, kind, victim)
      codes = run.wait(victim if kind in ('kill', 'stop') else None)
      found |= dict(codes=codes, said=promise_is_kept(run, kind, victim, codes, key))
    if kind in DAMAGE:
      found['file'] = damage(folder, kind, chance)
    on_disk = checkpoints(folder)
    if kind == 'divergence':
      for step in on_disk:   # what the message asks for
        if step > key['step'] // 5 * 5:
          shutil.rmtree(folder / 'checkpoints' / str(step))
    with Run(folder, count // 2 if kind == 'resize' else count, arguments) as run:
      again = run.wait()
      carried_on = re.search(r'resumed at step (\d+)', run.said())
      found['resumed_at'] = int(carried_on.group(1)) if carried_on else None
      if kind in DAMAGE:
        found['said'] = found['said'] and f'step {on_disk[-1]} cannot be read' in run.said()
    ours = logged(folder)
    found |= dict(finished=again == [0] * len(again), same=alike(ours, expected, kind))
    found['kept'] = bool(found['said'] and found['finished'] and found['same'])
    if not found['kept']:
      shutil.copytree(folder.parent, base / f'kept_{key["trial"]}', dirs_exist_ok=True)
  return found


def strike(run: Run, kind: str, victim: int) -> dict:
  """The fault; seconds until the others had left, and the step that was reached."""
  began = time.monotonic()
  reached = max(map(int, re.findall(r'^step +(\d+)/', run.said(), re.MULTILINE)))
  number = {'term': signal.SIGTERM, 'stop': signal.SIGSTOP}.get(kind, signal.SIGKILL)
  for i, child in enumerate(run.children):
    if i == victim or kind in (*DAMAGE, 'resize'):
      child.send_signal(number)
  run.wait(victim if kind in ('kill', 'stop') else None)
  return dict(seconds=round(time.monotonic() - began, 1), reached=reached)


def promise_is_kept(run: Run, kind: str, victim: int, codes: list[int], key: dict) -> bool:
  """Whether exit statuses and words are those that KINDS has; a majority is needed to name who differs."""
  others = [run.said(i) for i in range(len(run.children)) if i != victim]
  if kind == 'term':
    return codes == [75] * len(codes) and 'the same command carries on from there' in run.said()
  if kind == 'kill':
    return set(codes) == {75} and all(f'process {victim} is lost' in text for text in others)
  if kind == 'stop':
    return set(codes) == {75} and all(
        re.search(rf'process {victim}: step \d+, .* silent|process {victim} is lost', text) for text in others)
  if kind == 'disk':
    return codes == [0] * len(codes) and 'could not save step' in run.said()
  if kind == 'nan':
    return codes == [0] * len(codes) and run.said().count(f'step {key["step"]} was skipped') == 1
  if kind == 'divergence':
    return set(codes) == {1} and all(f'(process {victim}) has other bits than its replicas' in text
                                     for text in [*others, run.said(victim)])
  return True


def alike(ours: list[dict], expected: list[dict], kind: str) -> bool:
  """Bit for bit; another number of processes sums in another order; a skipped step changes all after it."""
  if [line['step'] for line in ours] != [line['step'] for line in expected]:
    return False
  if kind == 'nan':
    return True
  close = 1e-3 if kind == 'resize' else 0.0
  return all(a.keys() == b.keys() and all(abs(a[k] - b[k]) <= close * abs(b[k]) for k in a)
             for a, b in zip(ours, expected))


def runs(args, tier) -> Iterator[tuple[dict, Callable[[], dict]]]:
  for number in tier['trials']:
    key = plan(number, tier['processes'], tier['steps'])
    if not args.kinds or key['kind'] in args.kinds:
      yield key, lambda key=key: trial(key, Path(args.work))


def table(rows: list[dict]) -> str:
  """Kind by kind: how many kept what is promised, seconds until all had left, steps done again."""
  lines = ['| fault | promised | kept | seconds to leave, median (most) | steps done again, median (most) |',
           '|---|---|---|---|---|']
  middle = lambda x: sorted(x)[len(x) // 2]
  shown = lambda x, digits: f'{middle(x):.{digits}f} ({max(x):.{digits}f})' if x else '-'
  for kind, promise in KINDS.items():
    of = [row for row in rows if row['kind'] == kind]
    if of:
      seconds = [row['seconds'] for row in of if 'seconds' in row]
      again = [max(0, row['reached'] - (row['resumed_at'] or 0)) for row in of if 'reached' in row]
      lines.append(f'| {kind} | {promise} | {sum(row["kept"] for row in of)} of {len(of)} | '
                   f'{shown(seconds, 1)} | {shown(again, 0)} |')
  return '\n'.join([*lines, f'| all | | {sum(row["kept"] for row in rows)} of {len(rows)} | | |'])
