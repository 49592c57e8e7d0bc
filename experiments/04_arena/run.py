"""Every model of longctx on the same trials, at equal parameters, batches and learning-rate grid.

    python experiments/04_arena/run.py --tier=cpu --books='../shared/data/books/*.txt'   # hours; carries on
    python experiments/04_arena/run.py --tier=cpu --books=... --rates=0.003              # its first pass
    python experiments/04_arena/run.py --tier=cpu --books=... --minutes=90               # a part of it
    python experiments/04_arena/run.py --tier=smoke                                      # two models, tiny
    python experiments/04_arena/run.py --tier=cpu --models=infini,lstm --trials=parity   # some
    python experiments/04_arena/run.py --tier=cpu --seeds=1                              # one more seed
    python experiments/04_arena/run.py --tier=cpu --minutes=0                            # tables again

A run is one model, trial, learning rate and seed, and a line of results/runs.jsonl as soon as it ends;
stopped in whatever way, the same command does what is missing. All models meet all trials at one rate before
any meets another; a model's trials at a rate are one process's, and share what was compiled. Then the leaderboard is written from all lines of the tier. Without --books that trial is
left out.
"""

import argparse
import functools
import json
import os
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

import arena  # noqa: E402
import leaderboard  # noqa: E402
import roster  # noqa: E402
import trials  # noqa: E402
import workers  # noqa: E402

from experiments import shared  # noqa: E402
from longctx import main as longctx_main  # noqa: E402
from longctx.parallel import host_memory  # noqa: E402

TIERS = {   # steps, rows of a batch; as many steps of the first four are one program
    'smoke': dict(models=('window', 'gru'), rates=arena.RATES[:1], seeds=(0,), sizes=dict(
        mqar=(2, 8), rewrite=(2, 8), parity=(2, 8), passkey=(2, 8), books=(2, 2))),
    'cpu': dict(models=roster.NAMES, rates=arena.RATES, seeds=(0,), sizes=dict(
        mqar=(450, 16), rewrite=(450, 16), parity=(450, 16), passkey=(450, 16), books=(200, 4))),
    'gpu': dict(models=roster.NAMES, rates=arena.RATES, seeds=(0, 1, 2), sizes=dict(
        mqar=(4000, 64), rewrite=(4000, 64), parity=(4000, 64), passkey=(4000, 64), books=(4000, 16))),
}


def all_runs(tier: dict, files: str) -> list[dict]:
  """Of a tier, in the order in which they are done; `files` is the digest of the books."""
  return [dict(trial=trial, model=model, steps=tier['sizes'][trial][0], rows=tier['sizes'][trial][1],
               learning_rate=rate, seed=seed, **(dict(files=files) if trial == 'books' else {}))
          for seed in tier['seeds'] for rate in tier['rates'] for model in tier['models']
          for trial in tier['trials']]


def units(runs: list[dict], done: list[dict]) -> list[list[dict]]:
  """What is missing; a model's trials at a rate together, which compile once."""
  have, found = {arena.key_of(line) for line in done}, []
  same = lambda run: (run['model'], run['learning_rate'], run['seed'])
  for run in runs:
    if arena.key_of(run) not in have:
      if found and same(found[-1][0]) == same(run):
        found[-1].append(run)
      else:
        found.append([run])
  return found


def one(run: dict, books: str) -> dict:
  """In a worker."""
  begin(os.getpid())
  return arena.compete(run, books)


@functools.cache
def begin(process: int) -> None:
  host_memory.keep_freed_memory()
  longctx_main.set_compilation_cache('')   # for the other rates, in a later sitting too


def cores_of(count: int) -> list[int | None]:
  """A core for each worker, so that none waits for another's threads; one worker alone has them all."""
  if count == 1 or not hasattr(os, 'sched_getaffinity'):
    return [None] * count
  mine = sorted(os.sched_getaffinity(0))
  return [mine[i % len(mine)] for i in range(count)]


def core_seconds(runs: list[dict], done: list[dict]) -> float:
  """What `runs` may take: each as those of its model and trial that are done, or of its trial, or as any."""
  spent = lambda chosen: [r['train_seconds'] + r['test_seconds'] for r in done if chosen(r)]
  mean = lambda values: sum(values) / len(values) if values else 0.0
  same = lambda run, *fields: lambda r: all(r[field] == run[field] for field in fields)
  return sum(mean(spent(same(run, 'trial', 'steps', 'rows', 'model')) or
                  spent(same(run, 'trial', 'steps', 'rows')) or spent(lambda r: True)) for run in runs)


def compete_all(work: list[list[dict]], path: str, books: str, count: int, minutes: float) -> None:
  """Adds a line for each run that ends well."""
  about, failed = shared.provenance(), []
  total, left = sum(map(len, work)), [run for unit in work for run in unit]
  cores = cores_of(count)
  for number, done in enumerate(workers.work_off(
      work, functools.partial(one, books=books), cores, 60 * minutes), 1):
    left.remove(done.run)
    if done.line is None:   # the same command tries it again
      failed.append(f'{done.run}: {done.error}')
      print(f'failed: {failed[-1]}', file=sys.stderr, flush=True)
      continue
    line = done.line | about | dict(ended=time.strftime('%Y-%m-%dT%H:%MZ', time.gmtime()))
    with open(path, 'a', encoding='utf-8') as file:
      file.write(json.dumps(line) + '\n')
    hours = core_seconds(left, shared.read(path)) / 3600
    print(f'{number}/{total}, {hours:.1f} core-hours left: {json.dumps(line)}', flush=True)
  if failed:
    print('not done:\n' + '\n'.join(failed), file=sys.stderr)
    raise SystemExit(1)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--tier', choices=TIERS, default='cpu')
  parser.add_argument('--models', default='', help='names with commas between; else all')
  parser.add_argument('--trials', default='', help=f'of {",".join(trials.NAMES)}; else all')
  parser.add_argument('--seeds', default='', help="numbers with commas between; else the tier's")
  parser.add_argument('--rates', default='', help="numbers with commas between, of the tier's; else all")
  parser.add_argument('--books', default='', help='text files, a glob')
  parser.add_argument('--minutes', type=float, default=float('inf'), help='begin no run after so many')
  parser.add_argument('--workers', type=int, default=0, help='processes; 0: a core each, one on a GPU')
  parser.add_argument('--out', default='', help='a folder; else results/ of the cpu tier, results/TIER of others')
  args = parser.parse_args()
  results = os.path.join(HERE, 'results')   # what the README tells of
  args.out = args.out or (results if args.tier == 'cpu' else os.path.join(results, args.tier))
  names = lambda text, known, flag: chosen(parser, text, known, flag)
  tier = dict(TIERS[args.tier])
  tier['models'] = names(args.models, roster.NAMES, '--models') or tier['models']
  tier['trials'] = names(args.trials, trials.NAMES, '--trials') or trials.NAMES
  tier['seeds'] = numbers(parser, args.seeds, int, '--seeds', 'whole numbers', '0,1') or tier['seeds']
  grid = tier['rates']
  tier['rates'] = numbers(parser, args.rates, float, '--rates', f'of {grid}', '0.003') or grid
  if unknown := set(tier['rates']) - set(grid):
    parser.error(f'--rates: no {", ".join(map(str, unknown))}; there are {", ".join(map(str, grid))}')
  digest = ''
  if args.books:
    digest = trials.read_books(args.books).digest   # what is wrong with them is said before hours of work
  else:
    tier['trials'] = [trial for trial in tier['trials'] if trial != 'books']
    print("books: left out, for want of --books='GLOB'", file=sys.stderr)
  os.makedirs(args.out, exist_ok=True)
  path = os.path.join(args.out, 'runs.jsonl')
  work = units(all_runs(tier, digest), shared.read(path))
  allowed = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
  count = args.workers or (1 if args.tier == 'gpu' else allowed)
  try:
    if work and args.minutes > 0:
      compete_all(work, path, args.books, min(count, len(work)), args.minutes)
  finally:
    rows = of_tier(shared.read(path), tier, digest)
    report = leaderboard.report(rows, len(grid), command(args))
    print(report, flush=True)
    leaderboard.write(report, rows, args.out, os.path.join(HERE, 'README.md')
                      if args.tier == 'cpu' and os.path.realpath(args.out) == os.path.realpath(results) else '')


def of_tier(rows: list[dict], tier: dict, digest: str) -> list[dict]:
  """The lines at the tier's sizes; of books, those of the files that were given, or else of the last ones."""
  rows = [r for r in rows if (r['steps'], r['rows']) == tier['sizes'][r['trial']]]
  digest = digest or next((r['files'] for r in reversed(rows) if r['trial'] == 'books'), '')
  return [r for r in rows if r['trial'] != 'books' or r['files'] == digest]


def command(args: argparse.Namespace) -> str:
  return (f'python experiments/04_arena/run.py --tier={args.tier}'
          + (" --books='BOOKS/*.txt'" if args.books else ''))


def numbers(parser: argparse.ArgumentParser, text: str, kind: type, flag: str, what: str, such: str) -> tuple:
  """With commas between; () of an empty text."""
  try:
    return tuple(kind(x) for x in text.split(',')) if text else ()
  except ValueError:
    parser.error(f'{flag}={text!r}: must be {what} with commas between, such as {such}')


def chosen(parser: argparse.ArgumentParser, text: str, known: tuple[str, ...], flag: str) -> list[str]:
  """Names with commas between; one may have a comma in brackets."""
  held, found = text, []
  for name in sorted(known, key=len, reverse=True):
    if held == name or name in held.split(',') or ('(' in name and name in held):
      found.append(name)
      held = held.replace(name, '', 1)
  left = [x for x in held.split(',') if x]
  if left:
    parser.error(f'{flag}: no {", ".join(left)}; there are {", ".join(known)}')
  return [name for name in known if name in found]


if __name__ == '__main__':
  main()
