"""Which recurrence recalls, which tracks a state, which models text, and does its memory stay flat?

    python experiments/02_recurrences/run.py --part=tasks      # hours on 2 cores; carries on where it stopped
    python experiments/02_recurrences/run.py --part=text
    python experiments/02_recurrences/run.py --part=stream
    python experiments/02_recurrences/run.py --tier=hour       # fewer models, less text: about three hours of a core
    python experiments/02_recurrences/run.py --tier=smoke      # all three, tiny, a minute

Each run is one line of results/<part>.jsonl; a run that is there is not done again. Then the tables of
README.md are printed and the figures drawn from all lines.
"""

import argparse
import functools
import os
import re
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

import parts  # noqa: E402
import small_models  # noqa: E402

from experiments import shared  # noqa: E402

# Of the tasks: (batches, rows of one). States are tracked sooner than pairs are recalled, or not at all.
LEARNED = {'mqar': (1000, 64), 'selective_copy': (600, 32), 'parity': (400, 32), 's3': (400, 32)}
TIERS = {
    'smoke': dict(models=('rglru', 'lstm'), tasks=('mqar',), rates=(3e-3,), seeds=(0,),
                  learned={'mqar': (2, 64)}, text_steps=2, text_batches=1, stream=16 * 1024),
    'hour': dict(models=small_models.NAMES, task_models=small_models.TELLING,
                 tasks=tuple(parts.LENGTHS), rates=(1e-3, 3e-3, 1e-2), seeds=(0, 1), learned=LEARNED,
                 only_best=True, text_steps=600, text_batches=24, stream=1 << 20),
    'cpu': dict(models=small_models.NAMES, tasks=tuple(parts.LENGTHS), rates=(1e-3, 3e-3, 1e-2),
                seeds=(0, 1), learned=LEARNED, text_steps=3000, text_batches=48, stream=1 << 20),
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--tier', choices=TIERS, default='cpu')
  parser.add_argument('--part', choices=tuple(parts.PARTS), default='', help='one part; else all')
  parser.add_argument('--models', default='', help='names with commas between; else all')
  parser.add_argument('--tasks', default='', help='names with commas between; else all')
  parser.add_argument('--text', default='', help='a text file for --part=text')
  parser.add_argument('--out', default=os.path.join(HERE, 'results'))
  args = parser.parse_args()
  tier = TIERS[args.tier]
  chosen = tuple(re.findall(r'[^,(]+(?:\(.*?\))?', args.models))   # commas, but not those of (0,2)
  unknown = set(chosen) - set(small_models.NAMES)
  if unknown:
    parser.error(f'--models: no {", ".join(sorted(unknown))}; there are '
                 f'{", ".join(small_models.NAMES)}')
  os.makedirs(args.out, exist_ok=True)
  for name in [args.part] if args.part else parts.PARTS:
    path = os.path.join(args.out, f'{name}.jsonl')
    models = chosen or (name == 'tasks' and tier.get('task_models')) or tier['models']
    part = parts.PARTS[name]
    done = shared.carry_on(path, functools.partial(part.runs, models, tier, args))
    print(part.table(done), flush=True)
    part.draw(done, os.path.join(args.out, f'{name}.png'))


if __name__ == '__main__':
  main()
