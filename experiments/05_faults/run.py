"""What becomes of a run of four processes to which a hundred things happen?

    python experiments/05_faults/run.py                # 122 faults; an hour on 2 idle cores
    python experiments/05_faults/run.py --faults=14    # one of each, but of the last two
    python experiments/05_faults/run.py --kinds=kill,stop
    python experiments/05_faults/run.py --tier=smoke   # two faults, two processes, a minute

Each fault is one line of results/faults.jsonl; one that is there is not provoked again, so that the same command
carries on where it was killed. Then the table of README.md is printed, and written into it. The folder of a trial
that did not go as promised is kept in --work.
"""

import argparse
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

import faults  # noqa: E402

from experiments import shared  # noqa: E402

RESULTS, README = os.path.join(HERE, 'results'), os.path.join(HERE, 'README.md')
BEGIN, END = '<!-- the table of run.py -->', '<!-- its end -->'
TIERS = {
    'smoke': dict(trials=(6, 10), processes=2, steps=36),   # flip, nan
    'cpu': dict(trials=range(122), processes=4, steps=36),
}


def with_table(text: str, rows: list[dict]) -> str:
  """README.md with the table of these lines of results."""
  head, _, rest = text.partition(BEGIN)
  return f'{head}{BEGIN}\n{faults.table(rows)}\n{END}{rest.partition(END)[2]}'


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--tier', choices=TIERS, default='cpu')
  parser.add_argument('--faults', type=int, default=0, help='how many; 0: as many as the tier has')
  parser.add_argument('--kinds', default='', help='names with commas between; else all')
  parser.add_argument('--work', default='runs/faults', help='folder of the runs; trials that went well leave it')
  parser.add_argument('--out', default=RESULTS)
  args = parser.parse_args()
  args.kinds = tuple(filter(None, args.kinds.split(',')))
  args.work = os.path.abspath(args.work)
  unknown = set(args.kinds) - set(faults.KINDS)
  if unknown:
    parser.error(f'--kinds: no {", ".join(sorted(unknown))}; there are {", ".join(faults.KINDS)}')
  tier = TIERS[args.tier]
  if args.faults:
    tier = tier | dict(trials=range(args.faults))
  os.makedirs(args.out, exist_ok=True)
  done = shared.carry_on(os.path.join(args.out, 'faults.jsonl'), lambda _: faults.runs(args, tier))
  print(faults.table(done), flush=True)
  if os.path.abspath(args.out) == RESULTS and args.tier == 'cpu':
    with open(README, encoding='utf-8') as file:
      text = with_table(file.read(), done)
    with open(README, 'w', encoding='utf-8') as file:
      file.write(text)


if __name__ == '__main__':
  main()
