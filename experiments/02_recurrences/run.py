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
import json
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

import parts  # noqa: E402
import small_models  # noqa: E402

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
  chosen = tuple(filter(None, args.models.split(',')))
  unknown = set(chosen) - set(small_models.NAMES)
  if unknown:
    parser.error(f'--models: no {", ".join(sorted(unknown))}; there are '
                 f'{", ".join(small_models.NAMES)}')
  os.makedirs(args.out, exist_ok=True)
  for name in [args.part] if args.part else parts.PARTS:
    path = os.path.join(args.out, f'{name}.jsonl')
    done = read(path)
    models = chosen or (name == 'tasks' and tier.get('task_models')) or tier['models']
    for key, work in parts.PARTS[name].runs(models, tier, args, done):
      if any(all(row[k] == v for k, v in key.items()) for row in done):
        continue
      row = key | work()
      done.append(row)
      with open(path, 'a', encoding='utf-8') as file:
        file.write(json.dumps(row) + '\n')
      print(json.dumps({k: v for k, v in row.items() if not isinstance(v, list)}), flush=True)
    print(parts.PARTS[name].table(done), flush=True)
    parts.PARTS[name].draw(done, os.path.join(args.out, f'{name}.png'))


def read(path: str) -> list[dict]:
  """The lines of a file; a last one that was cut short is dropped from the file too."""
  if not os.path.exists(path):
    return []
  with open(path, encoding='utf-8') as file:
    lines = file.read().split('\n')
  if lines[-1]:   # the process was killed while it wrote
    with open(path, 'w', encoding='utf-8') as file:
      file.writelines(line + '\n' for line in lines[:-1])
  return [json.loads(line) for line in lines[:-1]]


if __name__ == '__main__':
  main()
