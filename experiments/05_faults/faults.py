"""What a run of several processes does when one thing goes wrong: a fault, what was said, what was lost.

Each trial has a workdir of its own: the run begins, the fault comes at a random step, the same command is
given again where the run ended (or the launcher does so), and what stands in metrics.jsonl and in the last
checkpoint at the end is compared with a run that nothing happened to.
"""

import contextlib
import json
import random
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import faulty
from children import ROOT, Launched, Run

from experiments import shared

EVERY = 6     # steps between checkpoints
# Kind -> what is promised.
KINDS = {
    'term': 'SIGTERM to one process: all save the same step and leave with status 75',
    'kill': 'SIGKILL to one process: the others name it and leave; the launcher starts all again',
    'stop': 'SIGSTOP to one process: the watchdog says where each stands, and ends the run',
    'hang': 'a collective hangs: the watchdog ends the run; the launcher starts all again',
    'cut': 'a file of the newest checkpoint, cut short: said, and the one before is used',
    'missing': 'a file of the newest checkpoint, gone: the same',
    'flip': 'a bit of the newest checkpoint, another: the same',
    'resize': 'killed, and carried on by half as many processes: the same losses to 0.1 %',
    'disk': f'one process has no room for {faulty.SECONDS:g} seconds: saves are tried again',
    'bucket': f'no process reaches workdir and tokens for {faulty.SECONDS:g} seconds: tried again',
    'nan': 'a batch with a NaN: its step is skipped and recorded, and no other',
    'spike': 'a batch of another kind, at which the loss leaps: the same',
    'rollback': 'two bad batches: back to the checkpoint before, past the data since',
    'divergence': 'a bit of a parameter in one process: parameter and process are named, status 1',
    'restart': f'as `kill`, and started again no process reaches workdir and tokens for {faulty.SECONDS:g} seconds: '
               'tried again, once',
    'minute': f'as `bucket`, for {faulty.MINUTE:g} seconds, the run\'s last save among them',
}
# The first trial of kinds that came behind the others, which are recorded by number.
LATER = {'restart': 112, 'minute': 120}
DAMAGE = ('cut', 'missing', 'flip')
LAUNCHED = ('kill', 'restart', 'hang')               # started again by launch/local.sh
SKIPS = ('nan', 'spike', 'rollback')      # what follows is another run than without the fault
GOES_ON = ('disk', 'bucket', 'minute', *SKIPS)      # the run that meets it comes to its end
AGAIN = 'launch: restart 1 of 3'          # what the launcher says


def plan(number: int, count: int, steps: int) -> dict:
  """Which fault the trial of this number has: the kinds in turn, the rest at random."""
  chance = random.Random(number)
  kinds = [kind for kind, first in LATER.items() if number >= first][-1:] or [k for k in KINDS if k not in LATER]
  return dict(trial=number, kind=kinds[number % len(kinds)], process=chance.randrange(count),
              step=chance.randrange(EVERY + 4, steps - 2 * EVERY), processes=count, steps=steps)


def flags(steps: int, base: Path, kind: str = '') -> list[str]:
  settings = dict(
      mesh_layout='data', data_batch_size=8, data_cache_dir=f'file://{base}/tokens', perplexity_max_tokens=512,
      run_num_steps=steps, run_log_every=1, run_checkpoint_every=EVERY, run_check_hosts_every=3,
      run_spike_sigmas=6, run_spike_window=16, run_rollback_after=2, run_compilation_cache=base / 'xla',
      run_watchdog_seconds=10 if kind in ('stop', 'hang') else 600 if kind == 'minute' else 60)
  return ['--config=configs/quickstart.py:debug',
          *(f'--config.{name.replace("_", ".", 1)}={value}' for name, value in settings.items())]


# What a run leaves.

def lines(path: Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def logged(folder: Path) -> list[dict]:
  clock = ('tokens_per_second', 'seconds', 'skipped_steps')
  return [{k: v for k, v in line.items() if k not in clock} for line in lines(folder / 'metrics.jsonl')]


def checkpoints(folder: Path) -> list[int]:
  found = folder / 'checkpoints'
  return sorted(int(p.name) for p in found.iterdir() if p.name.isdecimal()) if found.exists() else []


def batches_read(folder: Path) -> int:
  """Where the data stream of the newest checkpoint stands."""
  newest = folder / 'checkpoints' / str(checkpoints(folder)[-1])
  places = {x['next_index'] for x in json.loads((newest / 'stream' / 'metadata').read_text())['processes']}
  return places.pop() if len(places) == 1 else -1


def straight(base: Path, steps: int, count: int) -> list[dict]:
  """What a run logs that nothing happens to; made once for each state of the program."""
  program = shared.digest(sorted(map(str, [*(ROOT / 'longctx').rglob('*.py'), ROOT / 'configs/quickstart.py',
                                           Path(__file__)])))
  folder = base / f'straight_{count}_{steps}_{program}'
  if not (folder / 'done').exists():
    shutil.rmtree(folder, ignore_errors=True)
    with Run(folder / 'w', count, flags(steps, base)) as run:
      if any(run.wait()) or 'skipped' in run.said():
        raise RuntimeError(f'the undisturbed run failed, or skipped a step: {run.said()}')
    (folder / 'done').touch()
  return logged(folder / 'w')


# A trial.

def trial(key: dict, base: Path) -> dict:
  """One fault and what came of it; a run that hangs or fails kept nothing."""
  expected = straight(base, key['steps'], key['processes'])
  before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
  try:
    found = provoke(key, base, expected)
  except Exception as e:   # whatever a broken run leads to, the other trials go on
    found = dict(kept=False, error=f'{type(e).__name__}: {e}'[-2000:])
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  return found | dict(wall=round(time.monotonic() - began, 1), commit=shared.provenance()['commit'],
                      cpu=round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1))


@contextlib.contextmanager
def workdir(base: Path, key: dict) -> Iterator[Path]:
  """A new folder for a trial."""
  folder = base / f'trial_{key["trial"]}'
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  yield folder / 'w'


def provoke(key: dict, base: Path, expected: list[dict]) -> dict:
  kind, steps = key['kind'], key['steps']
  with workdir(base, key) as folder:
    arguments = flags(steps, base, kind)
    found = (launched if kind in LAUNCHED else goes_on if kind in GOES_ON else carried_on)(key, folder, arguments)
    ours = logged(folder)
    found |= dict(same=alike(ours, expected, key), lost=lost(key, folder, ours, found.get('passed_over', 0)))
    found['kept'] = bool(found['said'] and found['finished'] and found['same'] and not found['lost'])
    if found['kept']:
      shutil.rmtree(folder.parent)
  return found


def fault_of(key: dict, folder: Path) -> str:
  """faulty.py's argument; '' where the fault comes from outside."""
  known = key['kind'] in faulty.KINDS
  # restart: one of the first fifteen files, which are those of the lock, the config, checkpoints and tokens.
  at = key['step'] - EVERY - 3 if key['kind'] == 'restart' else key['step']
  return f'{key["kind"]}:{key["process"]}:{at}:{mark(folder)}' if known else ''


def mark(folder: Path) -> Path:
  return folder.parent / 'began'


def began_at(run: Run, folder: Path) -> float:
  """Waits for it; the time that the file has, which is there a moment before its content."""
  run.wait_for('fault', lambda: mark(folder).exists() and mark(folder).read_text())
  return float(mark(folder).read_text())


def launched(key: dict, folder: Path, arguments: list[str]) -> dict:
  """The launcher's processes, one of which is lost, or hangs."""
  victim, killed = key['process'], key['kind'] != 'hang'
  with Launched(folder, key['processes'], arguments, fault_of(key, folder)) as run:
    if killed:
      run.wait_for('step', lambda: max([0, *run.steps()]) >= key['step'])
      reached, began = max(run.steps()), time.time()
      Path(f'{mark(folder)}.killed').touch()
      run.kill(victim, signal.SIGKILL)
    else:
      reached, began = key['step'], began_at(run, folder)
    left = run.wait_for('restart', lambda: AGAIN in run.said())
    on = run.wait_for('first step', lambda: bool(run.steps(AGAIN)))
    all_said = [run.said(i) for i in range(key['processes'])]
    told = f'process {victim} is lost' if killed else 'nothing has moved in process'
    patient = key['kind'] != 'restart' or any('tried again in' in text for text in all_said)
    return dict(codes=run.wait(), finished=run.wait() == [0], reached=reached,
                resumed_at=resumed_at(run.said()), seconds=round(left - began, 1), recovered=round(on - began, 1),
                said=all(told in text for i, text in enumerate(all_said) if i != victim) and patient
                and run.said().count('launch: restart') == 1)


def goes_on(key: dict, folder: Path, arguments: list[str]) -> dict:
  """A run that comes to its end by itself."""
  kind, step = key['kind'], key['step']
  with Run(folder, key['processes'], arguments, fault_of(key, folder)) as run:
    began = began_at(run, folder)
    back = r'^back to step (\d+): 2 bad steps in a row'
    on = run.wait_for('going on', dict(
        **dict.fromkeys(('disk', 'bucket', 'minute'), lambda: max([0, *checkpoints(folder)]) >= step),
        rollback=lambda: re.search(back, run.said(), re.MULTILINE) and bool(run.steps('back to step')),
        ).get(kind, lambda: max([0, *run.steps()]) > step))
    codes, said = run.wait(), run.said()
  events = [(e['what'], e['step']) for e in lines(folder / 'events.jsonl')]
  skipped = [at for what, at in events if what == 'skipped']
  found = dict(codes=codes, finished=not any(codes), recovered=round(on - began, 1))
  if kind in ('nan', 'spike'):
    why = 'the loss is not finite' if kind == 'nan' else 'standard deviations above those before'
    return found | dict(said=skipped == [step] and re.search(rf'^step {step} was skipped: .*{why}|^step {step} was '
                        r'skipped: the gradient of \S+ is not finite', said, re.MULTILINE) is not None)
  if kind == 'rollback':
    to = int(re.search(back, said, re.MULTILINE).group(1))
    at = [at for what, at in events if what == 'rollback']   # a step is looked at while the next one computes
    return found | dict(passed_over=at[0] - to, resumed_at=to, reached=at[0], said=skipped == [step, step + 1] and (
        at in ([step + 1], [step + 2]) and to == (step - 1) // EVERY * EVERY))
  return found | dict(said=said.count('could not save step') == [what for what, _ in events].count('failed_saves') > 0)


def carried_on(key: dict, folder: Path, arguments: list[str]) -> dict:
  """A run that ends, and the same command once more."""
  kind, count, victim = key['kind'], key['processes'], key['process']
  with Run(folder, count, arguments, fault_of(key, folder)) as run:
    if kind == 'divergence':
      reached, began = key['step'], began_at(run, folder)
    else:
      there = 2 if kind in DAMAGE else 0   # the newest, and the one before it
      run.wait_for('step', lambda: max([0, *run.steps()]) >= key['step'] and len(checkpoints(folder)) >= there)
      reached, began = max(run.steps()), time.time()
      number = {'term': signal.SIGTERM, 'stop': signal.SIGSTOP}.get(kind, signal.SIGKILL)
      for i in range(count):
        if i == victim or kind in (*DAMAGE, 'resize'):
          run.kill(i, number)
    codes = run.wait(victim if kind == 'stop' else None)
    found = dict(codes=codes, reached=reached, seconds=round(time.time() - began, 1),
                 said=said_as_promised(run, key, codes))
  newest = checkpoints(folder)[-1]
  if kind in DAMAGE:
    found['file'] = damage(folder / 'checkpoints' / str(newest), kind, random.Random(key['trial'] + 1))
  if kind == 'divergence':
    for step in checkpoints(folder):   # what the message asks for
      if step > key['step'] // 3 * 3:
        shutil.rmtree(folder / 'checkpoints' / str(step))
  again = time.time()
  with Run(folder, count // 2 if kind == 'resize' else count, arguments) as run:
    on = run.wait_for('first step', lambda: bool(run.steps()))
    codes = run.wait()
    if kind in DAMAGE:
      found['said'] = found['said'] and f'step {newest} cannot be read' in run.said()
    return found | dict(finished=not any(codes), resumed_at=resumed_at(run.said()),
                        recovered=round(found['seconds'] + on - again, 1))


def resumed_at(said: str) -> int | None:
  found = re.findall(r'resumed at step (\d+)', said)
  return int(found[-1]) if found else None


def said_as_promised(run: Run, key: dict, codes: list[int]) -> bool:
  """Whether exit statuses and words are those that KINDS has; a majority is needed to name who differs."""
  kind, victim = key['kind'], key['process']
  others = [run.said(i) for i in range(key['processes']) if i != victim]
  if kind == 'term':
    return codes == [75] * len(codes) and 'the same command carries on from there' in run.said()
  if kind == 'stop':
    return set(codes) == {75} and all(
        re.search(rf'process {victim}: step \d+, .* silent|process {victim} is lost', text) for text in others)
  if kind == 'divergence':
    return set(codes) == {1} and all(f'(process {victim}) has other bits than its replicas' in text
                                     for text in [*others, run.said(victim)])
  return True


def damage(checkpoint: Path, kind: str, chance: random.Random) -> str:
  """Does to one of its files what `kind` says; which file."""
  file = chance.choice(sorted(p for p in checkpoint.rglob('*') if p.is_file() and p.stat().st_size > 1))
  if kind == 'missing':
    file.unlink()
  else:
    content = bytearray(file.read_bytes())
    at = chance.randrange(len(content))
    content[at] ^= 1 << chance.randrange(8)
    file.write_bytes(content[:at] if kind == 'cut' else content)
  return str(file.relative_to(checkpoint))


def alike(ours: list[dict], expected: list[dict], key: dict) -> bool:
  """Bit for bit; another number of processes sums in another order; after a skipped step all is another."""
  close = 1e-3 if key['kind'] == 'resize' else 0.0
  until = (key['step'] - 1) // EVERY * EVERY if key['kind'] == 'rollback' else key['step'] - 1
  for a, b in zip(ours, expected):
    if key['kind'] in SKIPS and b['step'] > until:
      if b['step'] != key['step'] and None in a.values():   # not finite
        return False
    elif a.keys() != b.keys() or None in a.values() or any(abs(a[k] - b[k]) > close * abs(b[k]) for k in a):
      return False
  return True


def lost(key: dict, folder: Path, ours: list[dict], passed_over: int) -> int:
  """Steps that no line tells of, or told twice, and batches of the data that were neither trained on nor said to be
  passed over, or read twice."""
  steps = [line['step'] for line in ours if 'loss' in line]
  return abs(batches_read(folder) - key['steps'] - passed_over) + len(
      set(range(1, key['steps'] + 1)) ^ set(steps)) + len(steps) - len(set(steps))


def runs(args, tier) -> Iterator[tuple[dict, Callable[[], dict]]]:
  for number in tier['trials']:
    key = plan(number, tier['processes'], tier['steps'])
    if not args.kinds or key['kind'] in args.kinds:
      yield key, lambda key=key: trial(key, Path(args.work))


def table(rows: list[dict]) -> str:
  """Kind by kind: how many kept what is promised, what was lost, how long it took."""
  lines = ['| fault | promised | kept | data lost | seconds until all had left, median (most) '
           '| until steps go on | steps done again |', '|---|---|---|---|---|---|---|']
  middle = lambda x: sorted(x)[len(x) // 2]
  shown = lambda x, digits: f'{middle(x):.{digits}f} ({max(x):.{digits}f})' if x else '-'
  for kind, promise in KINDS.items():
    of = [row for row in rows if row['kind'] == kind]
    if of:
      again = [max(0, row['reached'] - (row['resumed_at'] or 0)) for row in of if 'reached' in row]
      values = [[row[name] for row in of if name in row] for name in ('seconds', 'recovered')]
      lines.append(f'| `{kind}` | {promise} | {sum(row["kept"] for row in of)} of {len(of)} | '
                   f'{_lost(of)} | {shown(values[0], 1)} | {shown(values[1], 1)} | {shown(again, 0)} |')
  return '\n'.join([*lines, f'| all | | {sum(row["kept"] for row in rows)} of {len(rows)} | {_lost(rows)} | | | |'])


def _lost(rows: list[dict]) -> str:
  """In how many trials, where it is known."""
  known = [row for row in rows if 'lost' in row]
  some = sum(bool(row['lost']) or not row['same'] for row in known)
  return f'{f"in {some}" if some else "none"}' + (f', not known of {len(rows) - len(known)}' if len(known) < len(rows) else '')
