"""Every model of longctx on the same trials, at equal parameters, batches and learning-rate grid.

    python experiments/04_arena/run.py --tier=cpu --books='../shared/data/books/*.txt'   # hours; carries on
    python experiments/04_arena/run.py --tier=smoke                                      # two models, tiny
    python experiments/04_arena/run.py --tier=cpu --models=infini,lstm --trials=parity   # a part

A trial of a model is one unit of work: all its rates, a process a core. Its lines go to results/runs.jsonl
when it is done; killed, the same command does what is missing. Then the leaderboard is printed and drawn
from all lines. Without --books that trial is left out.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

import arena  # noqa: E402
import leaderboard  # noqa: E402
import roster  # noqa: E402

from experiments import shared  # noqa: E402
from longctx.parallel import host_memory  # noqa: E402

TIERS = {
    'smoke': dict(models=('window', 'gru'), rates=(3e-3,), seeds=(0,), steps=dict(
        mqar=2, rewrite=2, parity=2, passkey=4, books=2)),
    'cpu': dict(models=roster.NAMES, rates=arena.RATES, seeds=(0,), steps=dict(
        mqar=400, rewrite=400, parity=300, passkey=400, books=200)),
    'gpu': dict(models=roster.NAMES, rates=arena.RATES, seeds=(0, 1, 2), steps=dict(
        mqar=4000, rewrite=4000, parity=3000, passkey=4000, books=4000)),
}


def units(tier: dict, models: list[str], trials: list[str], done: list[dict]) -> list[tuple]:
  """What is missing: (trial, model, steps, rates, seed)."""
  of = lambda r: (r['trial'], r['model'], r['steps'], r['seed'])
  have = {(*of(r), r['learning_rate']) for r in done}
  return [(trial, model, tier['steps'][trial], tier['rates'], seed)
          for seed in tier['seeds'] for trial in trials for model in models
          if any((trial, model, tier['steps'][trial], seed, rate) not in have for rate in tier['rates'])]


def begin_worker(cores: 'multiprocessing.Queue') -> None:
  """A process keeps to a core of its own, so that none waits for another's threads."""
  core = cores.get()
  if core is not None:
    os.sched_setaffinity(0, {core})
  host_memory.keep_freed_memory()


def cores_of(workers: int) -> list[int | None]:
  if workers == 1 or not hasattr(os, 'sched_getaffinity'):
    return [None] * workers
  mine = sorted(os.sched_getaffinity(0))
  return [mine[i % len(mine)] for i in range(workers)]


def compete_all(work: list[tuple], path: str, books: str, workers: int) -> None:
  context = multiprocessing.get_context('spawn')
  cores = context.Queue()
  for core in cores_of(workers):
    cores.put(core)
  begin = time.time()
  with concurrent.futures.ProcessPoolExecutor(
      workers, mp_context=context, initializer=begin_worker, initargs=(cores,)) as pool:
    waiting = {pool.submit(arena.compete, *unit, books): unit for unit in work}
    failed = []
    for number, future in enumerate(concurrent.futures.as_completed(waiting), 1):
      if future.exception() is not None:   # the others go on; the same command tries it again
        failed.append(f'{waiting[future][:2]}: {future.exception()!r}')
        print(f'failed: {failed[-1]}', file=sys.stderr, flush=True)
        continue
      lines = future.result()
      with open(path, 'a', encoding='utf-8') as file:
        file.write(''.join(json.dumps(line) + '\n' for line in lines))
      best = next(line for line in lines if line.get('best'))
      left = (time.time() - begin) / number * (len(work) - number) / 60
      print(f'{number}/{len(work)}, {left:.0f} min left: {json.dumps(best)}', flush=True)
  if failed:
    raise SystemExit('not done:\n' + '\n'.join(failed))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--tier', choices=TIERS, default='cpu')
  parser.add_argument('--models', default='', help='names with commas between; else all')
  parser.add_argument('--trials', default='', help=f'of {",".join(arena.NAMES)}; else all')
  parser.add_argument('--books', default='', help='text files, a glob')
  parser.add_argument('--workers', type=int, default=0, help='processes; 0: a core each, one on a GPU')
  parser.add_argument('--out', default=os.path.join(HERE, 'results'))
  args = parser.parse_args()
  tier = TIERS[args.tier]
  names = lambda text, known, flag: chosen(parser, text, known, flag)
  models = names(args.models, roster.NAMES, '--models') or list(tier['models'])
  trials = names(args.trials, arena.NAMES, '--trials') or list(arena.NAMES)
  if not args.books:
    trials = [trial for trial in trials if trial != 'books']
    print("books: left out, for want of --books='GLOB'", file=sys.stderr)
  else:
    arena.read_books(args.books)   # what is wrong with it is said before hours of work
  os.makedirs(args.out, exist_ok=True)
  path = os.path.join(args.out, 'runs.jsonl')
  work = units(tier, models, trials, shared.read(path))
  allowed = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
  workers = args.workers or (1 if args.tier == 'gpu' else allowed)
  if work:
    compete_all(work, path, args.books, min(workers, len(work)))
  rows = [r for r in shared.read(path) if r['steps'] == tier['steps'][r['trial']]]   # of this tier
  print(leaderboard.table(rows), flush=True)
  leaderboard.draw(rows, args.out)


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
