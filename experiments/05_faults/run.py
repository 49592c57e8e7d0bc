"""What becomes of a run of four processes to which a hundred things happen?

    python experiments/05_faults/run.py                # two hours on 2 idle cores; carries on where it stopped
    python experiments/05_faults/run.py --kinds=kill,stop
    python experiments/05_faults/run.py --tier=smoke   # two faults, two processes, minutes

Each fault is one line of results/faults.jsonl; one that is there is not provoked again. Then the table of
README.md is printed. The folder of a trial that did not go as promised is kept in --work.
"""

import argparse
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

import faults  # noqa: E402

from experiments import shared  # noqa: E402

TIERS = {
    'smoke': dict(trials=(1, 5), processes=2, steps=60),   # kill, flip
    'cpu': dict(trials=range(100), processes=4, steps=60),
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--tier', choices=TIERS, default='cpu')
  parser.add_argument('--kinds', default='', help='names with commas between; else all')
  parser.add_argument('--work', default='runs/faults', help='folder of the runs; trials that went well leave it')
  parser.add_argument('--out', default=os.path.join(HERE, 'results'))
  args = parser.parse_args()
  args.kinds = tuple(filter(None, args.kinds.split(',')))
  args.work = os.path.abspath(args.work)
  unknown = set(args.kinds) - set(faults.KINDS)
  if unknown:
    parser.error(f'--kinds: no {", ".join(sorted(unknown))}; there are {", ".join(faults.KINDS)}')
  os.makedirs(args.out, exist_ok=True)
  done = shared.carry_on(os.path.join(args.out, 'faults.jsonl'), lambda _: faults.runs(args, TIERS[args.tier]))
  print(faults.table(done), flush=True)


if __name__ == '__main__':
  main()
